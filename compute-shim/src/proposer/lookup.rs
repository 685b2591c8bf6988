//! The addresses behind a name, found without keeping the loop waiting.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use pgstrata_listen::resolve;

type Found = io::Result<Vec<SocketAddr>>;

/// Looks a `host:port` up, anew each time. At most one thread waits for the system's answer.
#[derive(Debug, Default)]
pub struct Lookup {
    asked: Option<(String, Receiver<Found>)>,
}

impl Lookup {
    /// Whether the system was asked and has not answered.
    pub fn is_pending(&self) -> bool {
        self.asked.is_some()
    }

    /// The answer, or `None` while there is none: then ask again. An answer about another name than the one that is asked
    /// for now is waited for, and thrown away.
    pub fn poll(&mut self, address: &str) -> Option<Found> {
        let Some((name, asked)) = &self.asked else {
            if let Ok(address) = address.parse() {
                return Some(Ok(vec![address]));
            }
            let (sender, receiver) = channel();
            let name = address.to_owned();
            let thread = std::thread::Builder::new().name("lookup".into());
            let spawned = thread.spawn(move || {
                // Nobody waits any more if the link is gone.
                let _ = sender.send(resolve(&name));
            });
            self.asked = Some((address.to_owned(), receiver));
            return spawned.err().map(|error| {
                self.asked = None;
                Err(error)
            });
        };
        let answer = match asked.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the look-up ended early")),
        };
        let is_asked_for = name == address;
        self.asked = None;
        is_asked_for.then_some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn wait(lookup: &mut Lookup, address: &str) -> Vec<SocketAddr> {
        let since = Instant::now();
        loop {
            assert!(since.elapsed() < Duration::from_secs(20));
            match lookup.poll(address) {
                Some(answer) => return answer.unwrap(),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn h4_a_name_is_looked_up_beside_the_loop() {
        let mut lookup = Lookup::default();
        assert!(lookup.poll("localhost:7").is_none(), "the first call only asks");
        let found = wait(&mut lookup, "localhost:7");
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 7));
        assert!(lookup.poll("127.0.0.1:7").is_some());
    }

    #[test]
    fn an_answer_about_another_name_is_none() {
        let mut lookup = Lookup::default();
        assert!(lookup.poll("localhost:7").is_none());
        assert!(wait(&mut lookup, "localhost:8").iter().all(|address| address.port() == 8));
    }
}
