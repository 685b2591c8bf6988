//! The address behind a name, found without keeping the loop waiting.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use pgstrata_wal_client::resolve;

/// Looks one `host:port` up, anew each time. At most one thread waits for the system's answer.
#[derive(Debug)]
pub struct Lookup {
    address: String,
    asked: Option<Receiver<io::Result<SocketAddr>>>,
}

impl Lookup {
    pub fn new(address: String) -> Lookup {
        Lookup { address, asked: None }
    }

    /// Whether the system was asked and has not answered.
    pub fn is_pending(&self) -> bool {
        self.asked.is_some()
    }

    /// The answer, or `None` while there is none: then ask again.
    pub fn poll(&mut self) -> Option<io::Result<SocketAddr>> {
        if let Ok(address) = self.address.parse() {
            return Some(Ok(address));
        }
        let Some(asked) = &self.asked else {
            let (sender, receiver) = channel();
            let address = self.address.clone();
            let thread = std::thread::Builder::new().name("lookup".into());
            let spawned = thread.spawn(move || {
                // Nobody waits any more if the link is gone.
                let _ = sender.send(resolve(&address));
            });
            self.asked = Some(receiver);
            return spawned.err().map(Err);
        };
        let answer = match asked.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the look-up ended early")),
        };
        self.asked = None;
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn h4_a_name_is_looked_up_beside_the_loop() {
        let mut lookup = Lookup::new("localhost:7".to_owned());
        let since = Instant::now();
        assert!(lookup.poll().is_none(), "the first call only asks");
        let address = loop {
            assert!(since.elapsed() < Duration::from_secs(20));
            match lookup.poll() {
                Some(answer) => break answer.unwrap(),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        assert!(address.ip().is_loopback() && address.port() == 7);
        assert!(Lookup::new("127.0.0.1:7".to_owned()).poll().is_some());
    }
}
