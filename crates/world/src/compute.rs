//! One compute: the shipped driver of the proposer with what leads it, and the log that it goes on with.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_compute_shim::proposer::{
    Campaign, Driver, Following, Limits, Members, ProposerConfig, ProposerError, Question,
    Recording, WalChunk, WalSource,
};
use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{Phase, ProposerId, TermHistory};
use pgstrata_sim::wal::WalGenerator;

use crate::plan::Time;
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

/// How long a compute tries to win a term: one that nobody knew before, and one that was elected before.
const CAMPAIGN_TIMEOUT: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(5)];

/// What it does, in the order in which a start goes through it.
#[derive(Debug)]
pub enum Stage {
    /// It is over, or not begun.
    Ended,
    Campaigns(Campaign),
    /// For the record before its first one.
    Asks(Question),
    /// Its first record, and after that so many others.
    Records(Recording, u8),
    /// It appends nothing until then: a start does other things here.
    Drives(Time),
    Follows(Following),
}

/// See the module.
#[derive(Debug)]
pub struct Compute {
    pub index: usize,
    /// How many there were in its place.
    pub life: u64,
    pub driver: Option<Driver<Wires>>,
    pub stage: Stage,
    pub wires: Wires,
    /// The newest connection to each safekeeper.
    pub connections: Vec<Option<usize>>,
    /// The highest term that it asked for.
    pub asked_term: Arc<AtomicU64>,
    /// It tries again, and outranks nobody who came after this term.
    pub yields_above: Option<Term>,
    /// Number of its turn, which waits for something to happen.
    pub turn: u64,
    /// Something has happened.
    pub is_woken: bool,
    /// The last term that it has won, and the log that it was won with.
    pub won: Term,
    pub history: TermHistory,
    pub written: Written,
    /// Once the last record before the start is known.
    pub generator: Option<WalGenerator>,
}

/// What it wrote in its terms, as PostgreSQL has it.
#[derive(Debug, Default)]
pub struct Written {
    /// From the first term's start on.
    pub bytes: Vec<u8>,
    pub start: Lsn,
    /// The end of the last record.
    pub record_end: Lsn,
    /// So much of it is said to be written by now: in the midst of a record, perhaps.
    pub visible: Lsn,
    /// So much of it the driver has taken, and the last end of a record in that.
    pub taken: Lsn,
    pub taken_record: Lsn,
    /// Ends of those records which it has not.
    pub ends: VecDeque<Lsn>,
    /// What it knows to be committed, in whichever of its terms.
    pub committed: Lsn,
    /// Where everybody else in a compute finds that, and what PostgreSQL was told.
    pub commit_lsn: Arc<AtomicU64>,
    pub told: Lsn,
}

impl Written {
    /// The first term's start.
    pub fn begin(&mut self, start: Lsn) {
        (self.start, self.record_end, self.visible) = (start, start, start);
        (self.taken, self.taken_record) = (start, start);
    }

    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    /// Bytes from `from` on.
    pub fn from(&self, from: Lsn) -> &[u8] {
        let offset = (from.0.saturating_sub(self.start.0) as usize).min(self.bytes.len());
        &self.bytes[offset..]
    }

    /// The driver was given all of it otherwise than by its source.
    pub fn is_given(&mut self) {
        let end = self.end();
        (self.record_end, self.visible, self.taken, self.taken_record) = (end, end, end, end);
    }
}

impl Compute {
    pub fn new(index: usize, nodes: usize) -> Compute {
        let written = Written { bytes: Vec::with_capacity(64 << 10), ..Written::default() };
        Compute {
            index,
            life: 0,
            driver: None,
            stage: Stage::Ended,
            wires: Wires::default(),
            connections: vec![None; nodes],
            asked_term: Arc::default(),
            yields_above: None,
            turn: 0,
            is_woken: false,
            won: Term(0),
            history: TermHistory::default(),
            written,
            generator: None,
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
        std::mem::swap(&mut fresh.written.bytes, &mut self.written.bytes);
        fresh.written.bytes.clear();
        fresh.life = life;
        if tries_again {
            fresh.asked_term = Arc::clone(&self.asked_term);
        }
        *self = fresh;
        let before = Term(self.asked_term.load(Ordering::Acquire));
        self.yields_above = Some(before).filter(|term| term.0 > 0);
        let yields = self.yields_above.is_some();
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
        let timeout = CAMPAIGN_TIMEOUT[usize::from(yields)];
        self.stage = Stage::Campaigns(Campaign::new(config.id, yields, timeout, now));
        self.driver = Some(Driver::new(config, self.yields_above, self.wires.clone(), now)?);
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
        self.stage = Stage::Ended;
        self.generator = None;
    }

    /// Whether the term that it has won last is led.
    pub fn is_elected(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| {
            driver.core().phase() == Phase::Elected
                && driver.core().term() == self.won
                && driver.check().is_ok()
        })
    }

    /// Whether what PostgreSQL writes is followed.
    pub fn follows(&self) -> bool {
        matches!(self.stage, Stage::Follows(_))
    }
}

/// What it wrote, as files have it.
#[derive(Debug)]
pub struct Files<'a> {
    pub written: &'a mut Written,
    pub reads: &'a mut u64,
    /// So much may wait to be committed when more is asked for.
    pub most_uncommitted: u64,
    /// By mistake.
    pub are_recycled: bool,
    /// What must never be, if it was.
    pub wrong: Option<String>,
}

impl WalSource for Files<'_> {
    fn poll_wal(&mut self, most: usize) -> io::Result<Option<WalChunk>> {
        let written = &mut *self.written;
        let start = written.taken;
        let waits = start.saturating_sub(written.committed);
        if waits >= self.most_uncommitted && written.taken_record > written.committed {
            self.wrong = Some(format!("it takes more while {waits} bytes wait to be committed"));
        }
        if written.visible <= start {
            return Ok(None);
        }
        // Whole records, or a part of a long one.
        let mut end = written.visible.min(start + most as u64);
        while let Some(record) = written.ends.front().copied().filter(|record| *record <= end) {
            written.taken_record = record;
            written.ends.pop_front();
        }
        if written.taken_record > start {
            end = written.taken_record;
        }
        written.taken = end;
        let range = (start - written.start) as usize..(end - written.start) as usize;
        let bytes = Bytes::copy_from_slice(&written.bytes[range]);
        Ok(Some(WalChunk { start, bytes, record_end: written.taken_record }))
    }

    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes> {
        let written = &*self.written;
        if from < written.start {
            // It began there: what is before is another's, and was never written here.
            return Ok(Bytes::from(vec![0; (to - from) as usize]));
        }
        let is_there = to <= written.end() && from + KEPT >= written.committed;
        if !is_there {
            return Err(io::ErrorKind::NotFound.into());
        }
        *self.reads += 1;
        if self.are_recycled {
            return Ok(Bytes::from(vec![0; (to - from) as usize]));
        }
        let range = (from - written.start) as usize..(to - written.start) as usize;
        Ok(Bytes::copy_from_slice(&written.bytes[range]))
    }

    fn on_commit(&mut self, lsn: Lsn) {
        let written = &mut *self.written;
        let found = Lsn(written.commit_lsn.load(Ordering::Acquire));
        if lsn > written.committed || lsn <= written.told || found < lsn {
            self.wrong = Some(format!(
                "PostgreSQL is told that {lsn} is committed, after {}; {found} is found, and {} is",
                written.told, written.committed
            ));
        }
        written.told = lsn;
    }

    fn on_fenced(&mut self, _: Term) {}
}
