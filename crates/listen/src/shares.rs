//! How many connections one peer has of those that a port takes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::places;

/// See the module.
#[derive(Clone, Debug)]
pub struct Shares(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    of_one: usize,
    of_all: usize,
    counts: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

/// One connection's place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    shares: Arc<Inner>,
    peer: IpAddr,
}

impl Shares {
    /// At most `of_all` places, of which one peer gets at most `of_one`: but on the loopback interface all peers are one,
    /// and that one may have all. Where the process may have few descriptors there are fewer, and the part that one peer
    /// gets is the same.
    pub fn new(of_one: usize, of_all: usize) -> Shares {
        Shares::limited(of_one, of_all, places(of_all))
    }

    fn limited(of_one: usize, of_all: usize, places: usize) -> Shares {
        let of_one = (of_one * places / of_all.max(1)).max(1);
        Shares(Arc::new(Inner { of_one, of_all: places, counts: Mutex::default() }))
    }

    /// A place for a connection of `peer`, or why there is none.
    pub fn take(&self, peer: IpAddr) -> Result<Place, String> {
        let mut counts = self.0.counts.lock();
        if counts.0 >= self.0.of_all {
            return Err(format!("more than {} connections", self.0.of_all));
        }
        let share = if peer.is_loopback() { self.0.of_all } else { self.0.of_one };
        let of_peer = counts.1.get(&peer).copied().unwrap_or(0);
        if of_peer >= share {
            return Err(format!("more than {share} connections from {peer}"));
        }
        counts.1.insert(peer, of_peer + 1);
        counts.0 += 1;
        Ok(Place { shares: Arc::clone(&self.0), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.shares.counts.lock();
        counts.0 -= 1;
        if let Some(of_peer) = counts.1.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                counts.1.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h14_one_peer_does_not_take_all_places_where_there_are_few() {
        let shares = Shares::limited(768, 1024, 4);
        let peer = |last: u8| IpAddr::from([10, 0, 0, last]);
        let held: Vec<_> = (0..3).map(|_| shares.take(peer(1)).unwrap()).collect();
        assert!(shares.take(peer(1)).is_err());
        assert!(shares.take(peer(2)).is_ok());
        drop(held);
    }

    #[test]
    fn h14_one_peer_does_not_take_all_places() {
        let shares = Shares::new(2, 3);
        let peer = |last: u8| IpAddr::from([10, 0, 0, last]);
        let first = shares.take(peer(1)).unwrap();
        let second = shares.take(peer(1)).unwrap();
        assert!(shares.take(peer(1)).unwrap_err().contains("10.0.0.1"));
        let third = shares.take(peer(2)).unwrap();
        assert!(shares.take(peer(3)).is_err());
        drop(first);
        assert!(shares.take(peer(3)).is_ok());
        drop((second, third));
        assert!(shares.0.counts.lock().1.is_empty());
        let local: Vec<_> = (0..3).map(|_| shares.take([127, 0, 0, 1].into()).unwrap()).collect();
        assert!(shares.take([127, 0, 0, 1].into()).is_err());
        drop(local);
    }
}
