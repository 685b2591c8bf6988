//! What others can make happen as often as they like is logged sparingly: who floods a port does not flood the log as well.

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How often one thing is said at most.
const EVERY: Duration = Duration::from_secs(10);

/// See the module: one for each thing that is said.
#[derive(Debug)]
pub struct Sparing(Mutex<(u64, Option<Instant>)>);

impl Sparing {
    /// Nothing was said yet.
    pub const fn new() -> Sparing {
        Sparing(Mutex::new((0, None)))
    }

    /// It happened again: how many times since it was said last, if it is to be said now.
    fn count(&self, now: Instant) -> Option<u64> {
        let mut counted = self.0.lock();
        let (count, said) = &mut *counted;
        *count += 1;
        let is_due = said.is_none_or(|said| now.saturating_duration_since(said) >= EVERY);
        is_due.then(|| {
            *said = Some(now);
            std::mem::take(count)
        })
    }

    /// A connection ended before its client was let in. Who leaves by himself, as who only looks whether somebody listens,
    /// is not refused.
    pub fn not_let_in(&self, port: &str, peer: SocketAddr, error: &io::Error) {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            UnexpectedEof | ConnectionReset | BrokenPipe => {
                tracing::debug!(port, %peer, "left: {error}");
            }
            _ => self.refused(port, Some(peer), error),
        }
    }

    /// A client was not let in.
    pub fn refused(&self, port: &str, peer: Option<SocketAddr>, why: &dyn Display) {
        if let Some(connections) = self.count(Instant::now()) {
            let peer = peer.map(|peer| peer.to_string());
            tracing::warn!(port, peer, connections, "not let in: {why}");
        }
    }
}

impl Default for Sparing {
    fn default() -> Sparing {
        Sparing::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line() {
        let (sparing, start) = (Sparing::new(), Instant::now());
        assert_eq!(sparing.count(start), Some(1));
        assert!((0..1000).all(|_| sparing.count(start + EVERY / 2).is_none()));
        assert_eq!(sparing.count(start + EVERY), Some(1001));
        assert_eq!(sparing.count(start + EVERY), None);
    }
}
