//! A port: connections that have a place are let in, one after the other.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::{Place, Shares, Sparing};

/// Pause after a connection could not be accepted: out of descriptors, most likely.
const PAUSE: Duration = Duration::from_millis(10);

/// How often it is said at most that connections are refused.
const SAID_EVERY: Duration = Duration::from_secs(10);

static NOT_ACCEPTED: Sparing = Sparing::new();

/// See the module.
#[derive(Debug)]
pub struct Port {
    listeners: Vec<TcpListener>,
    /// Which of them is asked first, the next time: none keeps the others waiting.
    turn: usize,
    shares: Shares,
    /// For the log.
    name: &'static str,
    /// How many were refused since it was said, and when that was.
    refused: (u64, Option<Instant>),
}

impl Port {
    /// Lets in at most `of_all` connections at once, of one peer `of_one`.
    pub fn new(
        listeners: Vec<TcpListener>,
        name: &'static str,
        of_one: usize,
        of_all: usize,
    ) -> Port {
        let shares = Shares::new(of_one, of_all);
        Port { listeners, turn: 0, shares, name, refused: (0, None) }
    }

    /// The first address that is listened on.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self.listeners.first() {
            Some(listener) => listener.local_addr(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The next connection to any of the addresses.
    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let count = self.listeners.len();
        poll_fn(|context| {
            for step in 0..count {
                let at = (self.turn + step) % count;
                if let Poll::Ready(accepted) = self.listeners[at].poll_accept(context) {
                    self.turn = at + 1;
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next connection that there is a place for. Others are closed.
    pub async fn next(&mut self) -> (TcpStream, SocketAddr, Place) {
        loop {
            match self.accept().await {
                Ok((stream, peer)) => match self.shares.take(peer.ip()) {
                    Ok(place) => return (stream, peer, place),
                    Err(why) => self.say_refused(&why),
                },
                Err(error) => {
                    NOT_ACCEPTED.refused(self.name, None, &error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Who floods a port does not flood the log as well.
    fn say_refused(&mut self, why: &str) {
        let (count, said) = &mut self.refused;
        *count += 1;
        if said.is_none_or(|said| said.elapsed() >= SAID_EVERY) {
            tracing::warn!(port = self.name, connections = *count, "refused: {why}");
            self.refused = (0, Some(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_address_keeps_another_waiting() {
        let mut listeners = Vec::new();
        for _ in 0..2 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> =
            listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let mut port = Port::new(listeners, "test", 100, 100);
        // The first has many, the second one.
        let mut clients = Vec::new();
        for address in [addresses[0], addresses[0], addresses[0], addresses[1]] {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let second = clients[3].local_addr().unwrap();
        let mut met = Vec::new();
        for _ in 0..2 {
            met.push(port.next().await.1);
        }
        assert!(met.contains(&second), "{met:?} lacks {second}");
    }
}
