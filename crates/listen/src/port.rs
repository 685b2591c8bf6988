//! A port: connections that have a place are let in, one after the other.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::{Place, Shares};

/// Pause after a connection could not be accepted: out of descriptors, most likely.
const PAUSE: Duration = Duration::from_millis(10);

/// How often it is said at most that connections are refused.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Port {
    listener: TcpListener,
    shares: Shares,
    /// For the log.
    name: &'static str,
    /// How many were refused since it was said, and when that was.
    refused: (u64, Option<Instant>),
}

impl Port {
    /// Lets in at most `of_all` connections at once, of one peer `of_one`.
    pub fn new(listener: TcpListener, name: &'static str, of_one: usize, of_all: usize) -> Port {
        Port { listener, shares: Shares::new(of_one, of_all), name, refused: (0, None) }
    }

    /// What is listened on.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection that there is a place for. Others are closed.
    pub async fn next(&mut self) -> (TcpStream, SocketAddr, Place) {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => match self.shares.take(peer.ip()) {
                    Ok(place) => return (stream, peer, place),
                    Err(why) => self.say_refused(&why),
                },
                Err(error) => {
                    tracing::warn!(port = self.name, %error, "a connection can't be accepted");
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
