//! What follows for a timeline from what its peers say of theirs.

use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::{Holding, PeerRange, provable_commit};
use pgstrata_wire::safekeeper::Status;

use super::Timeline;
use crate::storage_error::StorageError;

/// Committed WAL that a peer has and this safekeeper lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Index of the peer's status among those that were given.
    pub peer: usize,
    /// Where the two logs part.
    pub from: Lsn,
    /// What the peer knows to be committed.
    pub target: Lsn,
}

impl Missing {
    /// What `length` bytes of that peer are, from `at` on.
    pub fn range(&self, peer: &Status, at: Lsn, length: usize) -> PeerRange {
        PeerRange {
            history: peer.history.clone(),
            commit_lsn: self.target,
            start: at,
            length: length as u64,
        }
    }
}

impl Timeline {
    /// Takes note of what peers' logs, together with the own, prove to be committed. Returns what is missing here. The
    /// statuses need not be of one moment, nor of this one.
    pub fn conclude(&self, peers: &[Status]) -> Result<Option<Missing>, StorageError> {
        // By what it says itself in one moment: members may change meanwhile.
        let (own, configuration) = self.holding()?;
        let holding = |status: &Status| Holding {
            member: status.member,
            flush_lsn: status.flush_lsn,
            history: status.history.clone(),
        };
        let mut holdings: Vec<Holding> = peers.iter().map(holding).collect();
        holdings.push(own);
        if let Some((term, lsn)) = provable_commit(&configuration, &holdings) {
            self.learn_commit(term, lsn)?;
        }
        let best = peers.iter().enumerate().max_by_key(|(_, status)| status.commit_lsn);
        let Some((peer, best)) = best else { return Ok(None) };
        let (own, theirs) = (self.history(), &best.history);
        let target = best.commit_lsn;
        if target > self.flush_lsn() {
            // Where entries were merged and none is shared, both have what is committed here.
            let from = own.divergence(self.flush_lsn(), theirs, target, self.commit_lsn());
            return Ok(Some(Missing { peer, from, target }));
        }
        // All of it is here; the other knows that it is committed, and of which term it is.
        let agreed = own.divergence(target, theirs, target, self.parameters().start_lsn);
        if target > self.commit_lsn() && agreed == target {
            let last = own.last().map_or(Term(0), |last| last.term);
            self.learn_commit(last, target)?;
        }
        Ok(None)
    }
}
