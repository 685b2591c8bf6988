//! Who is let in: a bounded number of connections on each port, and none that says nothing.
//!
//! A connection costs a thread only once its client has said what it wants, in time. Until then it
//! is a few hundred bytes, and there is a bound for these too.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use crate::lock::Mutex;

/// How long a client may take to say what it wants.
pub const GREETING: Duration = Duration::from_secs(10);
/// How long an answer may take to leave: after that the client is taken for gone.
pub const SENDING: Duration = Duration::from_secs(60);
/// How soon a client that said a part is looked at again.
const MOMENT: Duration = Duration::from_millis(5);
/// Connections of clients that have not said yet what they want, on one port.
const GREETINGS: usize = 1024;

/// A bound on connections. One peer gets half of them at most, unless all peers are one: on the
/// loopback interface.
pub struct Slots {
    all: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// A place among the connections; given back when this is dropped.
pub struct Slot {
    slots: Arc<Slots>,
    peer: IpAddr,
}

impl Slots {
    /// At most so many.
    pub fn new(all: usize) -> Arc<Slots> {
        Arc::new(Slots { all, taken: Mutex::default() })
    }

    /// A place for a connection from this address, if there is one.
    pub fn take(self: &Arc<Self>, peer: IpAddr) -> Option<Slot> {
        let mut taken = self.taken.lock();
        let all: usize = taken.values().sum();
        let own = taken.get(&peer).copied().unwrap_or(0);
        let share = if peer.is_loopback() { self.all } else { self.all.div_ceil(2) };
        if all >= self.all || own >= share {
            return None;
        }
        taken.insert(peer, own + 1);
        Some(Slot { slots: Arc::clone(self), peer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
        match taken.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.remove(&self.peer)),
        }
    }
}

/// Waits until `bytes` can be read without waiting.
async fn greeted(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let mut buffer = [0; 256];
    let deadline = Instant::now() + GREETING;
    loop {
        let peeked =
            timeout(deadline.saturating_duration_since(Instant::now()), stream.peek(&mut buffer));
        match peeked.await {
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(there)) if there >= bytes.min(buffer.len()) => return Ok(()),
            Ok(Ok(_)) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Ok(_)) => sleep(MOMENT).await,
            Ok(Err(error)) => return Err(error),
        }
    }
}

/// Accepts connections until the process ends. Each gets a thread that runs `serve`, once its
/// client has sent so many bytes; at most `most` have one at once.
pub async fn threads(
    listener: TcpListener,
    name: &'static str,
    bytes: usize,
    most: usize,
    serve: impl Fn(std::net::TcpStream) + Clone + Send + 'static,
) {
    let (greetings, slots) = (Slots::new(GREETINGS), Slots::new(most));
    loop {
        let Some((stream, peer)) = accept(&listener).await else { continue };
        let Some(greeting) = greetings.take(peer) else { continue };
        let (slots, serve) = (Arc::clone(&slots), serve.clone());
        tokio::spawn(async move {
            if let Err(error) = greeted(&stream, bytes).await {
                return tracing::debug!("{name} connection from {peer}: {error}");
            }
            let Some(slot) = slots.take(peer) else {
                return tracing::warn!("{name} connection from {peer} refused: {most} are served");
            };
            drop(greeting);
            let blocking = stream.into_std().and_then(|stream| {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(SENDING))?;
                Ok(stream)
            });
            let spawned = blocking.and_then(|stream| {
                std::thread::Builder::new().name(name.into()).spawn(move || {
                    let _slot = slot;
                    serve(stream);
                })
            });
            if let Err(error) = spawned {
                tracing::error!("can't serve a connection: {error}");
            }
        });
    }
}

/// The next connection and its peer.
pub async fn accept(listener: &TcpListener) -> Option<(TcpStream, IpAddr)> {
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer.ip())),
        Err(error) => {
            tracing::warn!("can't accept a connection: {error}");
            sleep(Duration::from_millis(10)).await;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_gets_half() {
        let slots = Slots::new(4);
        let (one, two): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let first = slots.take(one);
        let second = slots.take(one);
        assert!(first.is_some() && second.is_some() && slots.take(one).is_none());
        let third = slots.take(two);
        let fourth = slots.take(two);
        assert!(third.is_some() && fourth.is_some() && slots.take([10, 0, 0, 3].into()).is_none());
        drop(first);
        assert!(slots.take(one).is_some());
        drop((second, third, fourth));
        assert!(slots.taken.lock().is_empty());
        let loopback: IpAddr = [127, 0, 0, 1].into();
        let all: Vec<_> = (0..4).filter_map(|_| slots.take(loopback)).collect();
        assert_eq!(all.len(), 4);
    }
}
