//! A safekeeper's timelines on a disk that loses what it may, life after life of its process, and what is written to them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_blob::{Location, Store};
use pgstrata_env::Disk;
use pgstrata_format::registration::Registration;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term, TimelineId, TimelineParameters};
use pgstrata_quorum::{
    Append, Configuration, Elected, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::archive::Archive;
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::{Preparations, Preparer};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{OpenContext, Timeline};
use pgstrata_safekeeper::timelines::{Greeted, TimelineKey, Timelines, TimelinesContext};
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason};

use super::wal::{SEGMENT_SIZE, WalGenerator, parameters};

pub const START: Lsn = Lsn(SEGMENT_SIZE);

pub const OWN: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

pub const DIRECTORY: &str = "/safekeeper";

pub fn nth(n: u8) -> TimelineParameters {
    TimelineParameters { timeline: TimelineId([n; 16]), ..parameters(START) }
}

pub fn key(n: u8) -> TimelineKey {
    (nth(n).tenant, nth(n).timeline)
}

pub fn directory(n: u8) -> PathBuf {
    Path::new(DIRECTORY).join(key(n).0.to_string()).join(key(n).1.to_string())
}

/// A safekeeper's directory on a disk that loses what it may.
pub struct World {
    pub runtime: tokio::runtime::Runtime,
    pub objects: tempfile::TempDir,
    pub disk: SimDisk,
    pub latch: Latch,
}

/// What one life of its process has.
pub struct Life {
    pub timelines: Arc<Timelines>,
    /// Nobody makes what is asked for ahead, unless a test does.
    pub preparations: Mutex<Preparations>,
}

impl World {
    pub fn new(seed: u64) -> World {
        let disk = SimDisk::new(seed);
        disk.create_directory(Path::new(DIRECTORY)).unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        let world = World {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            objects: tempfile::tempdir().unwrap(),
            disk,
            latch: Latch::default(),
        };
        let (wal, http) = (String::new(), String::new());
        let registration = Registration { member: OWN, zone: String::new(), wal, http };
        world.runtime.block_on(world.decisions().register(&registration)).unwrap();
        world
    }

    pub fn decisions(&self) -> Decisions {
        let location = Location::Directory(self.objects.path().to_owned());
        let store = Store::open(&location, None).unwrap();
        Decisions::new(store, self.runtime.handle().clone())
    }

    pub fn archive(&self) -> Archive {
        let location = Location::Directory(self.objects.path().to_owned());
        Archive::new(Store::open(&location, None).unwrap())
    }

    /// Archives the tail of a timeline that nobody writes to.
    pub fn archive_tail(&self, timeline: &Timeline) {
        let tail = timeline.read_tail(timeline.commit_lsn(), 1).unwrap();
        self.runtime.block_on(self.archive().put_tail(timeline.parameters(), &tail)).unwrap();
        timeline.note_archived(timeline.commit_lsn());
    }

    pub fn try_to_open(&mut self) -> Result<Life, StorageError> {
        self.latch = Latch::default();
        let disk = Arc::new(self.disk.clone());
        let (preparer, preparations) = Preparer::queue(self.latch.clone());
        let arguments = DiskArguments { disk_refuse: Some(0), ..DiskArguments::default() };
        let shared = OpenContext {
            own: OWN,
            space: DiskSpace::new(disk.clone(), Path::new(DIRECTORY), arguments),
            disk,
            preparer,
            latch: self.latch.clone(),
            meters: Meters::new().unwrap(),
        };
        let decisions = self.decisions();
        let context = TimelinesContext {
            shared,
            decisions,
            archive: Some(Arc::new(self.archive())),
            met: Arc::default(),
            has_list: false,
            smallest_segment: pgstrata_ids::SMALLEST_SEGMENT,
        };
        let timelines = Arc::new(Timelines::open(context, Path::new(DIRECTORY))?);
        Ok(Life { timelines, preparations: Mutex::new(preparations) })
    }

    pub fn open(&mut self) -> Life {
        self.try_to_open().unwrap()
    }
}

impl Life {
    /// Timeline `n`, founded and led by a proposer.
    pub fn found(&self, n: u8) -> Log {
        let greeting = Greeting {
            parameters: nth(n),
            known: 0,
            addresses: Vec::new(),
            proposer: ProposerId([1; 16]),
        };
        let founded = self.timelines.found(&greeting, &[(OWN.node, Some(OWN.incarnation))]);
        let Greeted::Member(timeline) = founded.unwrap() else { panic!("it is no member") };
        vote(&timeline, 1).unwrap();
        let start = TermStart { term: Term(1), lsn: START };
        let history = TermHistory::new(vec![start]).unwrap();
        timeline.elected(&Elected { term: Term(1), history }).unwrap();
        Log { n, generator: WalGenerator::new(nth(n), START, Lsn(8)) }
    }

    pub fn get(&self, n: u8) -> Result<Arc<Timeline>, RefusedReason> {
        self.timelines.get(key(n))
    }

    /// Lets it come to rest, as one that is archived; whether it did.
    pub fn rest(&self, n: u8) -> bool {
        let timeline = self.get(n).unwrap();
        timeline.note_archived(timeline.commit_lsn());
        drop(timeline);
        self.rest_as_it_is(n)
    }

    pub fn rest_as_it_is(&self, n: u8) -> bool {
        self.get(n).unwrap().checkpoint().unwrap();
        self.timelines.let_rest(&[key(n)]).unwrap() == 1
    }

    pub fn is_open(&self, n: u8) -> bool {
        self.timelines.open_keys().contains(&key(n))
    }
}

/// What is written to one timeline.
#[derive(Clone)]
pub struct Log {
    pub n: u8,
    pub generator: WalGenerator,
}

impl Log {
    /// Appends a record, and commits what there is then.
    pub fn commit(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        let end = self.write(timeline, size)?;
        append(timeline, end, &[], end)?;
        assert_eq!(timeline.commit_lsn(), end);
        Ok(end)
    }

    /// Appends a record that isn't committed.
    pub fn write(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        let mut next = self.generator.clone();
        let bytes = next.record(size);
        append(timeline, self.generator.at, &bytes, timeline.commit_lsn())?;
        assert_eq!(timeline.flush_lsn(), next.at);
        self.generator = next;
        Ok(self.generator.at)
    }
}

pub fn append(
    timeline: &Timeline,
    start: Lsn,
    bytes: &[u8],
    commit: Lsn,
) -> Result<(), StorageError> {
    let (term, record_end) = (Term(1), Lsn::INVALID);
    let append = Append { term, start, length: bytes.len() as u64, record_end, commit_lsn: commit };
    let mut batch = timeline.batch();
    let refusal = batch.append(&append, bytes)?;
    assert!(refusal.is_none(), "{refusal:?}");
    match batch.finish()? {
        Some(Message::Ack(_)) => Ok(()),
        other => panic!("{other:?}"),
    }
}

pub fn vote(timeline: &Timeline, term: u64) -> Result<(), StorageError> {
    let configuration = Configuration::new(1, vec![OWN]).unwrap();
    let proposer = ProposerId([term as u8; 16]);
    let vote = timeline.vote(&VoteRequest { term: Term(term), proposer, configuration })?;
    assert!(matches!(vote, Some(Message::Vote(_))), "{vote:?}");
    Ok(())
}
