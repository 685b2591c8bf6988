//! One compute: the shipped proposer, the log that it goes on with, and its end of each connection.

use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::{Configuration, Phase, Proposer, ProposerId};
use pgstrata_sim::wal::WalGenerator;

use crate::plan::Time;

/// What it knows of its connection to one safekeeper.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Its index, while there is one.
    pub connection: Option<usize>,
    pub last_heard: Time,
    /// The next byte to send, once it may.
    pub next: Option<Lsn>,
    /// The commit LSN that was sent last.
    pub told: Lsn,
}

/// See the module.
#[derive(Debug)]
pub struct Compute {
    pub index: usize,
    /// How many there were in its place.
    pub life: u64,
    pub proposer: Option<Proposer>,
    pub links: Vec<Link>,
    /// Of the own term: bytes from its start on.
    pub log: Vec<u8>,
    pub start: Lsn,
    /// Once the last record before the start is known.
    pub generator: Option<WalGenerator>,
    /// Whether somebody is asked for that record.
    pub asks: bool,
}

impl Compute {
    pub fn new(index: usize, nodes: usize) -> Compute {
        Compute {
            index,
            life: 0,
            proposer: None,
            links: vec![Link::default(); nodes],
            log: Vec::with_capacity(64 << 10),
            start: Lsn::INVALID,
            generator: None,
            asks: false,
        }
    }

    /// One begins, which nobody knows.
    pub fn begin(&mut self, configuration: Configuration, skipped: u32) {
        self.life += 1;
        let mut id = [self.index as u8 + 1; 16];
        id[..8].copy_from_slice(&self.life.to_le_bytes());
        let proposer = Proposer::new(ProposerId(id), configuration, Term(0));
        self.proposer = Some(proposer.skipping(skipped));
        self.links = vec![Link::default(); self.links.len()];
        self.log.clear();
        self.generator = None;
        self.asks = false;
    }

    /// It is gone.
    pub fn end(&mut self) {
        self.proposer = None;
        self.generator = None;
    }

    pub fn is_elected(&self) -> bool {
        self.proposer.as_ref().is_some_and(|proposer| proposer.phase() == Phase::Elected)
    }

    pub fn term(&self) -> Term {
        self.proposer.as_ref().map_or(Term(0), Proposer::term)
    }

    pub fn commit_lsn(&self) -> Lsn {
        self.proposer.as_ref().map_or(Lsn::INVALID, Proposer::commit_lsn)
    }

    /// End of what it wrote.
    pub fn end_lsn(&self) -> Lsn {
        self.start + self.log.len() as u64
    }

    /// Own bytes from `from` on, so many at most.
    pub fn bytes(&self, from: Lsn, most: usize) -> &[u8] {
        let offset = (from.0.saturating_sub(self.start.0) as usize).min(self.log.len());
        &self.log[offset..self.log.len().min(offset + most)]
    }
}
