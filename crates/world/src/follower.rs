//! A page server that follows the log: its shipped decisions, over bytes, with what it made durable.

use std::time::Instant;

use pgstrata_ids::{Lsn, TimelineParameters};
use pgstrata_pageserver::ingest::IngestError;
use pgstrata_pageserver::receiver::Sink;
use pgstrata_pageserver::receiver::believing::{Believing, Decided, Doubt};
use pgstrata_pageserver::receiver::choice::{Choice, Sources};
use pgstrata_pageserver::receiver::session::Session;
use pgstrata_pg_wal::WalChecker;
use pgstrata_safekeeper::checked_reader::CheckedReader;
use pgstrata_safekeeper::checked_segment::checker;
use pgstrata_safekeeper::pg::feeding::Feeding;

use crate::plan::Time;

/// What it is fed: checked, and taken as far as records are whole.
#[derive(Debug)]
pub struct Ingested {
    parameters: TimelineParameters,
    checker: Option<WalChecker>,
    whole: Lsn,
    pub durable: Lsn,
    pub is_wanted: bool,
    /// Fed, and not compared yet; and all of it that is not durable.
    pub fed: Vec<(Lsn, Vec<u8>)>,
    pub unflushed: Vec<(Lsn, Vec<u8>)>,
    /// What it would read of who the members are now.
    pub decided: Result<Decided, String>,
    pub believing: Believing,
    /// What the source says that it follows.
    pub configuration: u64,
    /// It is known that it parts from the log.
    is_in_doubt: bool,
    /// By mistake, it believes everybody; and makes durable what it did not look at again.
    pub believes_all: bool,
    pub flushes_all: bool,
}

impl Ingested {
    pub fn new(parameters: TimelineParameters) -> Ingested {
        let start = parameters.start_lsn;
        Ingested {
            parameters,
            checker: None,
            whole: start,
            durable: start,
            is_wanted: false,
            fed: Vec::new(),
            unflushed: Vec::new(),
            decided: Ok(Decided::default()),
            believing: Believing::default(),
            configuration: 0,
            is_in_doubt: false,
            believes_all: false,
            flushes_all: false,
        }
    }

    /// It makes durable what is whole, unless that is not of the log that goes on, or nobody can say so. What that was.
    pub fn flush(&mut self) -> Vec<(Lsn, Vec<u8>)> {
        if !self.flushes_all && self.believing.has_taken() {
            match self.believing.parts_at(self.decided.clone()) {
                Ok(None) => {}
                Ok(Some(_)) => {
                    self.is_in_doubt = true;
                    return Vec::new();
                }
                Err(_) => return Vec::new(),
            }
        }
        self.durable = self.whole;
        self.believing.durable(self.durable);
        let durable = self.durable;
        let mut flushed = Vec::new();
        for (at, mut wal) in std::mem::take(&mut self.unflushed) {
            let rest = wal.split_off((durable.saturating_sub(at) as usize).min(wal.len()));
            if !rest.is_empty() {
                self.unflushed.push((at + wal.len() as u64, rest));
            }
            flushed.push((at, wal));
        }
        flushed
    }

    /// Its process has ended.
    pub fn restart(&mut self) {
        self.checker = None;
        self.rewind();
        self.believing = Believing::default();
    }

    fn rewind(&mut self) {
        self.whole = self.durable;
        self.fed.clear();
        self.unflushed.clear();
        self.believing.rewound();
        self.is_in_doubt = false;
    }

    /// The end of what it has.
    pub fn end(&self) -> Lsn {
        self.whole
    }
}

impl Sink for Ingested {
    fn begin(&mut self) -> Result<(), IngestError> {
        if self.is_in_doubt {
            self.rewind();
        }
        let whole = self.whole;
        self.unflushed.retain(|(at, _)| *at < whole);
        if let Some((at, wal)) = self.unflushed.last_mut() {
            wal.truncate((whole - *at) as usize);
        }
        self.checker = Some(checker(&self.parameters, self.whole).at_boundary());
        Ok(())
    }

    fn position(&self) -> Lsn {
        self.checker.as_ref().map_or(self.whole, WalChecker::feed_position)
    }

    fn whole(&self) -> Lsn {
        self.whole
    }

    fn feed(&mut self, wal: &[u8]) -> Result<(), IngestError> {
        let Some(checker) = &mut self.checker else {
            return Err(IngestError::Storage(anyhow::anyhow!("it has not begun")));
        };
        let end = checker.feed_position() + wal.len() as u64;
        if end > self.durable {
            self.believing.took(end);
        }
        self.fed.push((checker.feed_position(), wal.to_vec()));
        self.unflushed.push((checker.feed_position(), wal.to_vec()));
        if let Err(error) = checker.check(wal) {
            self.checker = None;
            return Err(IngestError::Bytes(error.into()));
        }
        self.whole = self.whole.max(checker.position());
        Ok(())
    }

    fn believes(&mut self, configuration: u64) -> Result<(), Doubt> {
        self.configuration = configuration;
        if self.believes_all {
            return Ok(());
        }
        let judged = self.believing.judge(configuration, self.decided.clone());
        self.is_in_doubt |= matches!(judged, Err(Doubt::Taken(_)));
        judged
    }

    fn is_in_doubt(&self) -> bool {
        self.is_in_doubt
    }

    fn durable(&self) -> Lsn {
        self.durable
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    fn is_stopping(&self) -> bool {
        false
    }
}

/// Who it may follow.
#[derive(Debug)]
pub struct Known(pub Vec<String>);

impl Sources for Known {
    fn candidates(&self) -> Vec<String> {
        self.0.clone()
    }

    fn is_known(&self) -> bool {
        !self.0.is_empty()
    }
}

/// The safekeeper's side of a stream.
#[derive(Debug)]
pub struct Feeder {
    pub feeding: Feeding,
    pub reader: CheckedReader,
    pub timeline: std::sync::Arc<pgstrata_safekeeper::timeline::Timeline>,
}

/// A stream between a safekeeper and the page server.
#[derive(Debug)]
pub struct Stream {
    pub node: usize,
    pub node_life: u64,
    /// Of the page server.
    pub life: u64,
    pub is_dead: bool,
    /// When what was sent last in either direction arrives.
    pub to_node: Time,
    pub to_follower: Time,
    /// What has come to the safekeeper, and is no whole message.
    pub asked: Vec<u8>,
    pub is_greeted: bool,
    pub feeder: Option<Feeder>,
    /// What has come to the page server.
    pub inbox: std::collections::VecDeque<u8>,
    /// It heard that nothing more comes.
    pub is_over: bool,
    /// The safekeeper's next turn is on its way.
    pub is_due: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Follower {
    pub life: u64,
    /// Number of its turn, which waits for something to happen.
    pub turn: u64,
    pub choice: Choice,
    pub sink: Ingested,
    pub session: Option<(Session, usize)>,
    /// Since when it waits for bytes, and how long at most.
    pub waits_until: Option<Instant>,
}

impl Follower {
    pub fn new(parameters: TimelineParameters) -> Follower {
        Follower {
            life: 0,
            turn: 0,
            choice: Choice::default(),
            sink: Ingested::new(parameters),
            session: None,
            waits_until: None,
        }
    }

    /// Its process ends, and another one goes on with what was durable.
    pub fn restart(&mut self) {
        self.life += 1;
        self.turn += 1;
        self.choice = Choice::default();
        self.session = None;
        self.waits_until = None;
        self.sink.restart();
    }
}
