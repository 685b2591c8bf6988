//! What follows for a timeline from what its peers say of theirs.

use std::sync::atomic::Ordering;

use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::{Append, Holding, PeerRange, provable_commit};
use pgstrata_wire::safekeeper::{Message, RefusedReason, Status};

use super::{Answer, Timeline};
use crate::storage_error::StorageError;

/// WAL that a peer has and this safekeeper lacks: committed, or what the term began with that is followed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Index of the peer's status among those that were given.
    pub peer: usize,
    /// Where the two logs part.
    pub from: Lsn,
    /// What the peer knows to be committed; or up to where its log is the one that is followed here.
    pub target: Lsn,
    /// The term that is followed, as which the peer is asked for it; 0 if it is committed.
    pub term: Term,
}

impl Missing {
    /// What `length` committed bytes of that peer are, from `at` on.
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
    /// True if the log ends before the term begins that is followed: whoever won it does not have, and does not send,
    /// what is missing.
    pub fn lacks_beginning(&self) -> bool {
        self.flush_lsn() < Lsn(self.beginning_lsn.load(Ordering::Acquire))
    }

    /// Whether a peer has something that is missing here, for all that is known.
    pub fn lacks_what_has(&self, peer: &Status) -> bool {
        peer.commit_lsn > self.flush_lsn()
            || self.missing_beginning(std::slice::from_ref(peer)).is_some()
    }

    /// What of it a peer has. Only one that is bound to the same term: until it is promised another one, nothing else comes to
    /// be where its log is the same now, so that it may be read later.
    fn missing_beginning(&self, peers: &[Status]) -> Option<Missing> {
        let core = self.core.lock();
        let from = core.acceptor.flush_lsn();
        let shared = peers.iter().enumerate().filter_map(|(peer, status)| {
            let (term, target) =
                core.acceptor.shares_beginning(&status.history, status.flush_lsn)?;
            (status.term == term).then_some(Missing { peer, from, target, term })
        });
        shared.max_by_key(|missing| missing.target).filter(|missing| missing.target > from)
    }

    /// Takes `bytes` of what is missing, which the peer gave from `at` on, durably up to the end of the last whole record
    /// among them.
    pub fn take_missing(
        &self,
        missing: &Missing,
        peer: &Status,
        at: Lsn,
        bytes: &[u8],
    ) -> Result<Answer, StorageError> {
        if missing.term == Term(0) {
            return self.peer_range(&missing.range(peer, at, bytes.len()), bytes);
        }
        // As if its proposer had sent it, who has it all, and would if it still knew.
        let append = Append {
            term: missing.term,
            start: at,
            length: bytes.len() as u64,
            record_end: at,
            commit_lsn: Lsn::INVALID,
        };
        let mut batch = self.batch();
        let refusal = batch.append(&append, bytes)?;
        if refusal.is_some() {
            return Ok(refusal);
        }
        let has_it = batch.write_lsn() >= at + append.length;
        // Nobody is told: the answer is for the proposer, which asks.
        batch.finish()?;
        self.wake_readers();
        let text = || format!("another term than {} is followed by now", missing.term);
        Ok((!has_it).then(|| Message::Refused(RefusedReason::Unavailable(text()))))
    }

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
            return Ok(Some(Missing { peer, from, target, term: Term(0) }));
        }
        // All of it is here; the other knows that it is committed, and of which term it is.
        let agreed = own.divergence(target, theirs, target, self.parameters().start_lsn);
        if target > self.commit_lsn() && agreed == target {
            let last = own.last().map_or(Term(0), |last| last.term);
            self.learn_commit(last, target)?;
        }
        Ok(self.missing_beginning(peers))
    }
}
