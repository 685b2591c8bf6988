//! A timeline on a disk that fails as it is told to.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use pgstrata_blob::{Location, Store};
use pgstrata_format::registration::Registration;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_quorum::{
    Append, Configuration, Elected, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::Preparer;
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{Answer, OpenContext, Timeline};
use pgstrata_safekeeper::timelines::{Greeted, Timelines, TimelinesContext};
use pgstrata_sim::FaultyDisk;
use pgstrata_wire::safekeeper::{Greeting, Message};

use super::wal::{SEGMENT_SIZE, WalGenerator, parameters};

pub const START: Lsn = Lsn(SEGMENT_SIZE);

pub const OWN: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

pub struct World {
    pub runtime: tokio::runtime::Runtime,
    pub objects: tempfile::TempDir,
    pub directory: tempfile::TempDir,
    pub disk: FaultyDisk,
    /// The disk as whoever opened the directory last has it.
    pub opened: Mutex<Weak<FaultyDisk>>,
    pub latch: Latch,
    pub generator: WalGenerator,
    /// What is kept of the disk.
    pub arguments: DiskArguments,
    /// What whoever opened the directory last sees of it.
    pub space: Mutex<Option<DiskSpace>>,
}

pub fn greeting() -> Greeting {
    Greeting {
        parameters: parameters(START),
        known: 0,
        addresses: Vec::new(),
        proposer: ProposerId([1; 16]),
    }
}

pub fn configuration() -> Configuration {
    Configuration::new(1, vec![OWN]).unwrap()
}

impl World {
    pub fn new() -> World {
        World {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            objects: tempfile::tempdir().unwrap(),
            directory: tempfile::tempdir().unwrap(),
            disk: FaultyDisk::default(),
            opened: Mutex::default(),
            latch: Latch::default(),
            generator: WalGenerator::new(parameters(START), START, Lsn(8)),
            arguments: DiskArguments::default(),
            space: Mutex::default(),
        }
    }

    /// Opens the directory, as soon as whoever had it before has let go: also its thread, which may
    /// be making a segment, and which ends with its process where there is one.
    pub fn open(&self) -> Timelines {
        let disk = Arc::new(self.disk.clone());
        drop(self.space.lock().unwrap().take());
        let before = std::mem::replace(&mut *self.opened.lock().unwrap(), Arc::downgrade(&disk));
        wait_until("the end of who had the directory", || before.strong_count() == 0);
        let space = DiskSpace::new(disk.clone(), self.directory.path(), self.arguments);
        *self.space.lock().unwrap() = Some(space.clone());
        let shared = OpenContext {
            own: OWN,
            disk,
            preparer: Preparer::start(self.latch.clone()).unwrap(),
            latch: self.latch.clone(),
            space,
            meters: Meters::new().unwrap(),
        };
        let context = TimelinesContext {
            shared,
            decisions: self.decisions(),
            archive: None,
            met: Arc::default(),
            has_list: false,
            smallest_segment: pgstrata_ids::SMALLEST_SEGMENT,
        };
        Timelines::open(context, self.directory.path()).unwrap()
    }

    pub fn decisions(&self) -> Decisions {
        let location = Location::Directory(self.objects.path().to_owned());
        let store = Store::open(&location, None).unwrap();
        Decisions::new(store, self.runtime.handle().clone())
    }

    pub fn timeline_directory(&self) -> PathBuf {
        let parameters = parameters(START);
        let tenant = self.directory.path().join(parameters.tenant.to_string());
        tenant.join(parameters.timeline.to_string())
    }

    /// A timeline that follows the proposer of term 1.
    pub fn led(&self) -> Arc<Timeline> {
        let (wal, http) = (String::new(), String::new());
        let registration = Registration { member: OWN, zone: String::new(), wal, http };
        self.runtime.block_on(self.decisions().register(&registration)).unwrap();
        let greeted = self.open().found(&greeting(), &[(OWN.node, Some(OWN.incarnation))]).unwrap();
        let Greeted::Member(timeline) = greeted else { panic!("{greeted:?}") };
        vote(&timeline, 1).unwrap();
        let start = TermStart { term: Term(1), lsn: START };
        let history = TermHistory::new(vec![start]).unwrap();
        timeline.elected(&Elected { term: Term(1), history }).unwrap();
        timeline
    }

    /// Waits until the segment after the one in use is made, which has syncs of its own.
    pub fn wait_for_next_segment(&self) {
        let number = self.generator.at.segment_number(SEGMENT_SIZE) + 1;
        let path = self.timeline_directory().join(parameters(START).segment_name(number));
        wait_until("the next segment", || path.exists());
    }

    pub fn append(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        self.append_in(timeline, 1, size)
    }

    /// The same in a term, of a proposer that knows everything before it to be committed.
    pub fn append_in(
        &mut self,
        timeline: &Timeline,
        term: u64,
        size: usize,
    ) -> Result<Lsn, StorageError> {
        let mut next = self.generator.clone();
        let start = next.at;
        let bytes = next.record(size);
        let append = Append {
            term: Term(term),
            start,
            length: bytes.len() as u64,
            record_end: next.at,
            commit_lsn: start,
        };
        let mut batch = timeline.batch();
        batch.append(&append, &bytes)?;
        match batch.finish()? {
            Some(Message::Ack(ack)) => {
                self.generator = next;
                Ok(ack.flush_lsn)
            }
            other => panic!("{other:?}"),
        }
    }
}

pub fn vote(timeline: &Timeline, term: u64) -> Result<Answer, StorageError> {
    let proposer = ProposerId([term as u8; 16]);
    timeline.vote(&VoteRequest { term: Term(term), proposer, configuration: configuration() })
}

pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "no {what} after a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

/// What the timeline says to these bytes, and the end of its durable log then.
pub fn send(timeline: &Timeline, start: Lsn, bytes: &[u8], record_end: Lsn) -> (Answer, Lsn) {
    let length = bytes.len() as u64;
    let append = Append { term: Term(1), start, length, record_end, commit_lsn: START };
    let mut batch = timeline.batch();
    let mut answer = batch.append(&append, bytes).unwrap();
    if answer.is_none() {
        answer = batch.finish().unwrap();
    }
    (answer, timeline.flush_lsn())
}
