//! One compute: the shipped driver of the proposer, and the log that it goes on with.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use bytes::Bytes;
use pgstrata_compute_shim::proposer::{
    Driver, Limits, Members, ProposerConfig, ProposerError, WalChunk, WalSource,
};
use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{Phase, ProposerId, TermHistory};
use pgstrata_sim::wal::WalGenerator;

use crate::wires::Wires;

/// Of what it wrote and is committed, what its files still have: the rest is removed, and members get it from each other. In bytes.
const KEPT: u64 = 64 << 10;

/// Where safekeepers are, which is found, and who is said to have the timeline.
#[derive(Clone, Copy, Debug)]
pub struct Everybody {
    /// Nodes that are said to have the timeline: those from 1 to this.
    pub holders: u64,
}

impl Members for Everybody {
    fn addresses(&self, node: NodeId) -> Vec<String> {
        vec![format!("safekeeper-{node}:5454")]
    }

    fn holders(&self) -> Vec<NodeId> {
        (1..=self.holders).map(NodeId).collect()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Compute {
    pub index: usize,
    /// How many there were in its place.
    pub life: u64,
    pub driver: Option<Driver<Wires>>,
    pub wires: Wires,
    /// The newest connection to each safekeeper.
    pub connections: Vec<Option<usize>>,
    /// The highest term that it asked for.
    pub asked_term: Arc<AtomicU64>,
    /// It tries again, and outranks nobody who came after it.
    pub tries_again: bool,
    /// Number of its turn, which waits for something to happen.
    pub turn: u64,
    /// Something has happened.
    pub is_woken: bool,
    /// It pauses before it campaigns again.
    pub pauses: bool,
    /// The last term that it has won, and the log that it was won with.
    pub won: Term,
    pub history: TermHistory,
    /// Of its terms: bytes from the first one's start on.
    pub log: Vec<u8>,
    pub start: Lsn,
    /// The end of the last record in it.
    pub record_end: Lsn,
    /// Once the last record before the start is known.
    pub generator: Option<WalGenerator>,
    /// Whether somebody is asked for that record.
    pub asks: bool,
    /// What it knows to be committed, in whichever of its terms.
    pub committed: Lsn,
}

impl Compute {
    pub fn new(index: usize, nodes: usize) -> Compute {
        Compute {
            index,
            life: 0,
            driver: None,
            wires: Wires::default(),
            connections: vec![None; nodes],
            asked_term: Arc::default(),
            tries_again: false,
            turn: 0,
            is_woken: false,
            pauses: false,
            won: Term(0),
            history: TermHistory::default(),
            log: Vec::with_capacity(64 << 10),
            start: Lsn::INVALID,
            record_end: Lsn::INVALID,
            generator: None,
            asks: false,
            committed: Lsn::INVALID,
        }
    }

    /// One begins, which nobody knows, or which has campaigned before.
    pub fn begin(
        &mut self,
        parameters: TimelineParameters,
        safekeepers_to_ask: Vec<NodeId>,
        limits: Limits,
        tries_again: bool,
        seed: u64,
        now: Instant,
    ) -> Result<(), ProposerError> {
        let life = self.life + 1;
        let mut fresh = Compute::new(self.index, self.connections.len());
        std::mem::swap(&mut fresh.log, &mut self.log);
        fresh.log.clear();
        fresh.life = life;
        if tries_again {
            fresh.asked_term = Arc::clone(&self.asked_term);
        }
        *self = fresh;
        let before = Term(self.asked_term.load(std::sync::atomic::Ordering::Acquire));
        let before = Some(before).filter(|term| term.0 > 0);
        self.tries_again = before.is_some();
        let config = ProposerConfig {
            parameters,
            safekeepers_to_ask,
            safekeepers: Arc::new(Everybody { holders: self.connections.len() as u64 }),
            identity: None,
            id: self.id(),
            seed,
            asked_term: Arc::clone(&self.asked_term),
            limits,
        };
        self.driver = Some(Driver::new(config, before, self.wires.clone(), now)?);
        Ok(())
    }

    fn id(&self) -> ProposerId {
        let mut id = [self.index as u8 + 1; 16];
        id[..8].copy_from_slice(&self.life.to_le_bytes());
        ProposerId(id)
    }

    /// It is gone.
    pub fn end(&mut self) {
        self.driver = None;
        self.generator = None;
    }

    /// Whether the term that it has won last is led.
    pub fn is_elected(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| {
            driver.core().phase() == Phase::Elected && driver.core().term() == self.won
        })
    }

    /// Own bytes from `from` on.
    pub fn bytes(&self, from: Lsn) -> &[u8] {
        let offset = (from.0.saturating_sub(self.start.0) as usize).min(self.log.len());
        &self.log[offset..]
    }
}

/// What it wrote, as files have it.
#[derive(Debug)]
pub struct Files<'a> {
    pub log: &'a [u8],
    pub start: Lsn,
    pub committed: Lsn,
    pub reads: &'a mut u64,
    /// By mistake.
    pub are_recycled: bool,
}

impl WalSource for Files<'_> {
    fn poll_wal(&mut self, _: usize) -> io::Result<Option<WalChunk>> {
        Ok(None)
    }

    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes> {
        let end = self.start + self.log.len() as u64;
        if from < self.start {
            // It began there: what is before is another's, and was never written here.
            return Ok(Bytes::from(vec![0; (to - from) as usize]));
        }
        let is_there = to <= end && from + KEPT >= self.committed;
        if !is_there {
            return Err(io::ErrorKind::NotFound.into());
        }
        *self.reads += 1;
        if self.are_recycled {
            return Ok(Bytes::from(vec![0; (to - from) as usize]));
        }
        let range = (from - self.start) as usize..(to - self.start) as usize;
        Ok(Bytes::copy_from_slice(&self.log[range]))
    }

    fn on_commit(&mut self, _: Lsn) {}

    fn on_fenced(&mut self, _: Term) {}
}
