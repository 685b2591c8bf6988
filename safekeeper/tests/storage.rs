//! What happens to a timeline when its disk fails, fills up, or is damaged.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_blob::{Location, Store};
use pgstrata_env::Disk;
use pgstrata_format::registration::Registration;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_listen::Security;
use pgstrata_quorum::{
    Append, Configuration, Elected, PeerRange, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace, DiskState};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::pace::{CatchUpArguments, Pace};
use pgstrata_safekeeper::segment::{FlushedNote, Preparer, SegmentFiles, Zeros};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{Answer, OpenContext, Timeline};
use pgstrata_safekeeper::timelines::{Greeted, Timelines, TimelinesContext};
use pgstrata_safekeeper::wal;
use pgstrata_sim::{Fail, FaultyDisk, SimDisk};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason};

const START: Lsn = Lsn(SEGMENT_SIZE);

const OWN: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

struct World {
    runtime: tokio::runtime::Runtime,
    objects: tempfile::TempDir,
    directory: tempfile::TempDir,
    disk: FaultyDisk,
    /// The disk as whoever opened the directory last has it.
    opened: Mutex<Weak<FaultyDisk>>,
    latch: Latch,
    generator: WalGenerator,
    /// What is kept of the disk.
    arguments: DiskArguments,
    /// What whoever opened the directory last sees of it.
    space: Mutex<Option<DiskSpace>>,
}

fn greeting() -> Greeting {
    Greeting {
        parameters: parameters(START),
        known: 0,
        addresses: Vec::new(),
        proposer: ProposerId([1; 16]),
    }
}

fn configuration() -> Configuration {
    Configuration::new(1, vec![OWN]).unwrap()
}

impl World {
    fn new() -> World {
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
    fn open(&self) -> Timelines {
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
        };
        Timelines::open(context, self.directory.path()).unwrap()
    }

    fn decisions(&self) -> Decisions {
        let location = Location::Directory(self.objects.path().to_owned());
        let store = Store::open(&location, None).unwrap();
        Decisions::new(store, self.runtime.handle().clone())
    }

    fn timeline_directory(&self) -> PathBuf {
        let parameters = parameters(START);
        let tenant = self.directory.path().join(parameters.tenant.to_string());
        tenant.join(parameters.timeline.to_string())
    }

    /// A timeline that follows the proposer of term 1.
    fn led(&self) -> Arc<Timeline> {
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
    fn wait_for_next_segment(&self) {
        let number = self.generator.at.segment_number(SEGMENT_SIZE) + 1;
        let path = self.timeline_directory().join(parameters(START).segment_name(number));
        wait_until("the next segment", || path.exists());
    }

    fn append(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        self.append_in(timeline, 1, size)
    }

    /// The same in a term, of a proposer that knows everything before it to be committed.
    fn append_in(
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

fn vote(timeline: &Timeline, term: u64) -> Result<Answer, StorageError> {
    let proposer = ProposerId([term as u8; 16]);
    timeline.vote(&VoteRequest { term: Term(term), proposer, configuration: configuration() })
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "no {what} after a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_or_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    let acknowledged = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    world.disk.fail(Fail::Sync);
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Failed { .. })));
    assert!(world.latch.reason().unwrap().contains("injected"));
    // The disk is well again, but who knows what it lost.
    world.disk.fail(Fail::Nothing);
    let syncs = world.disk.syncs();
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Latched(_))));
    assert!(matches!(vote(&timeline, 2), Err(StorageError::Latched(_))));
    // Nobody is told how far it is: it counts on what may be lost.
    assert!(matches!(timeline.status(), Err(StorageError::Latched(_))));
    assert!(matches!(timeline.holding(), Err(StorageError::Latched(_))));
    assert_eq!(world.disk.syncs(), syncs);
    drop(timeline);
    // The process would have ended; what was acknowledged is there.
    world.latch = Latch::default();
    let timeline = world.open().only().unwrap();
    assert!(timeline.flush_lsn() >= acknowledged);
}

#[test]
fn a_failed_sync_of_a_segment_made_ahead_latches() {
    for fail in [Fail::Sync, Fail::Write] {
        let world = World::new();
        let preparer = Preparer::start(world.latch.clone()).unwrap();
        let disk = Arc::new(world.disk.clone());
        let files = SegmentFiles::new(disk, world.directory.path(), parameters(START));
        let files = Arc::new(files);
        world.disk.fail(fail);
        preparer.request(&files, 1, Zeros::Written);
        wait_until("latch", || world.latch.reason().is_some());
        assert!(world.latch.reason().unwrap().contains("injected"));
        // The disk is well again; still no segment is made.
        world.disk.fail(Fail::Nothing);
        let syncs = world.disk.syncs();
        preparer.request(&files, 1, Zeros::Written);
        preparer.request(&files, 2, Zeros::Written);
        drop(preparer);
        // The thread has ended once it has let go of the last request.
        wait_until("end of the thread", || Arc::weak_count(&files) == 0);
        assert_eq!((world.disk.syncs(), files.numbers().unwrap()), (syncs, Vec::new()));
    }
}

#[test]
fn a_failed_write_latches_too() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    world.disk.fail(Fail::Write);
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Failed { .. })));
    assert!(world.latch.reason().is_some());
}

/// Bytes that were written and not synced when somebody else asks for a vote.
fn append_unsynced(world: &mut World, timeline: &Timeline) {
    let start = world.generator.at;
    let bytes = world.generator.record(1000);
    let end = world.generator.at;
    let length = bytes.len() as u64;
    let append = Append { term: Term(1), start, length, record_end: end, commit_lsn: start };
    timeline.batch().append(&append, &bytes).unwrap();
}

#[test]
fn l8_a_sync_that_finds_no_space_in_a_vote_is_not_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    append_unsynced(&mut world, &timeline);
    world.disk.fail(Fail::SyncFull);
    assert!(vote(&timeline, 2).is_err());
    assert!(world.latch.reason().is_some());
    world.disk.fail(Fail::Nothing);
    let syncs = world.disk.syncs();
    assert!(matches!(vote(&timeline, 2), Err(StorageError::Latched(_))));
    assert_eq!(world.disk.syncs(), syncs);
}

#[test]
fn a_vote_that_a_full_disk_prevents_destroys_nothing() {
    let mut world = World::new();
    let timeline = world.led();
    let end = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // The beginning of a record, which a vote takes away.
    let bytes = world.generator.record(1000);
    let append = Append {
        term: Term(1),
        start: end,
        length: 500,
        record_end: Lsn::INVALID,
        commit_lsn: end,
    };
    timeline.batch().append(&append, &bytes[..500]).unwrap();
    world.disk.fail(Fail::Full);
    assert!(matches!(vote(&timeline, 2), Err(StorageError::DiskFull { .. })));
    assert_eq!((timeline.term(), world.latch.reason()), (Term(1), None));
    let append = Append { start: end + 500, length: bytes.len() as u64 - 500, ..append };
    timeline.batch().append(&append, &bytes[500..]).unwrap();
    world.disk.fail(Fail::Nothing);
    vote(&timeline, 2).unwrap();
    assert_eq!(timeline.flush_lsn(), end + bytes.len() as u64);
}

#[test]
fn l8_a_name_that_could_not_be_synced_is_not_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // The new control file has its name by then: whether it is the durable one nobody knows.
    world.disk.fail(Fail::NamesFull);
    assert!(vote(&timeline, 2).is_err());
    assert!(world.latch.reason().is_some());
}

#[test]
fn l7_nothing_is_acknowledged_in_a_segment_whose_name_may_be_lost() {
    let mut world = World::new();
    let timeline = world.led();
    let disk = world.disk.clone();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // From now on segments get their names, but these don't become durable.
    disk.fail(Fail::HoldNames);
    std::thread::scope(|scope| {
        let world = &mut world;
        let timeline = &timeline;
        let appending = scope.spawn(move || {
            while world.generator.at.segment_number(SEGMENT_SIZE) < 3 {
                world.append(timeline, 100_000).unwrap();
            }
        });
        let number = |name: u64| parameters(START).segment_name(name);
        let named = timeline.files().directory().join(number(3));
        wait_until("name of the segment", || named.exists());
        std::thread::sleep(Duration::from_millis(500));
        assert!(!appending.is_finished(), "acknowledged before the name was durable");
        assert!(timeline.flush_lsn() < Lsn(3 * SEGMENT_SIZE));
        disk.fail(Fail::Nothing);
        appending.join().unwrap();
    });
    let acknowledged = timeline.flush_lsn();
    assert!(acknowledged > Lsn(3 * SEGMENT_SIZE));
    drop(timeline);
    disk.lose_unsynced_names().unwrap();
    assert_eq!(world.open().only().unwrap().flush_lsn(), acknowledged);
}

#[test]
fn l7_names_are_durable_before_a_log_counts_again() {
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at.segment_number(SEGMENT_SIZE) < 3 {
        world.append(&timeline, 100_000).unwrap();
    }
    world.wait_for_next_segment();
    // Until its name is synced too.
    std::thread::sleep(Duration::from_millis(200));
    drop(timeline);
    // Without one to remove, opening has no other reason to sync names.
    std::fs::remove_file(world.timeline_directory().join(parameters(START).segment_name(4)))
        .unwrap();
    // As after a crash between a rename and the sync: the name is there, and may still be lost.
    let path = world.timeline_directory().join(parameters(START).segment_name(3));
    let unsynced = path.with_extension("unsynced");
    std::fs::rename(&path, &unsynced).unwrap();
    pgstrata_env::Disk::rename(&world.disk, &unsynced, &path).unwrap();
    let flush_lsn = world.open().only().unwrap().flush_lsn();
    world.disk.lose_unsynced_names().unwrap();
    assert!(flush_lsn > Lsn(3 * SEGMENT_SIZE));
    assert!(path.exists(), "the log was counted, and its name was lost");
}

#[test]
fn a_full_disk_refuses_and_goes_on_reading() {
    let mut world = World::new();
    let timeline = world.led();
    let first = world.append(&timeline, 1000).unwrap();
    world.disk.fail(Fail::Full);
    // What fits the segments made before is taken; then it is refused.
    let refused = loop {
        match world.append(&timeline, 100_000) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StorageError::DiskFull { .. }), "{refused}");
    assert!(refused.to_string().contains("free space"), "{refused}");
    assert!(matches!(vote(&timeline, 2), Err(StorageError::DiskFull { .. })));
    assert_eq!((timeline.term(), world.latch.reason()), (Term(1), None));
    let mut bytes = vec![0; (first - START) as usize];
    assert_eq!(timeline.reader().read(START, &mut bytes).unwrap(), bytes.len());
    assert_ne!(bytes, vec![0; bytes.len()]);
    // Space again: everything goes on.
    world.disk.fail(Fail::Nothing);
    world.append(&timeline, 100_000).unwrap();
    vote(&timeline, 2).unwrap();
    assert_eq!(timeline.term(), Term(2));
}

/// On a disk of so many bytes, of which 2 MiB are kept. It is slow below 4 MiB, and warns below 7.
fn small_world(size: u64) -> World {
    let mut world = World::new();
    world.disk.resize(size);
    world.arguments = DiskArguments {
        disk_warn: Some(7 << 20),
        disk_slow: Some(4 << 20),
        disk_refuse: Some(2 << 20),
    };
    world
}

impl World {
    fn space(&self) -> DiskSpace {
        self.space.lock().unwrap().clone().unwrap()
    }

    fn free(&self) -> u64 {
        let look = self.space();
        look.look();
        look.last().space.free
    }
}

#[test]
fn a_disk_that_fills_warns_slows_refuses_and_recovers_by_itself() {
    use DiskState::{Fine, Refuses, Slows, Warns};
    let mut world = small_world(12 << 20);
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    let mut states = vec![world.space().last().state()];
    let refused = loop {
        match world.append(&timeline, 100_000) {
            Ok(_) => {}
            Err(error) => break error,
        }
        // As of the looks that making segments has, also by the thread that makes them ahead.
        let state = world.space().last().state();
        if states.last() != Some(&state) {
            states.push(state);
        }
    };
    assert!(states.is_sorted() && states[0] == Fine, "{states:?}");
    assert!(states.contains(&Warns) && states.contains(&Slows), "{states:?}");
    assert!(refused.is_for_kept_space(), "{refused}");
    assert!(refused.to_string().contains("beside the last 2.0 MiB"), "{refused}");
    assert_eq!(world.space().last().state(), Refuses);
    // What is kept is there, and serves for votes and for following who won them.
    assert!(world.free() >= 2 << 20);
    let acknowledged = world.generator.at;
    assert_eq!(timeline.flush_lsn(), acknowledged);
    vote(&timeline, 2).unwrap();
    let entry = |term, lsn| TermStart { term: Term(term), lsn };
    let history = TermHistory::new(vec![entry(1, START), entry(2, acknowledged)]).unwrap();
    timeline.elected(&Elected { term: Term(2), history }).unwrap();
    assert_eq!(timeline.term(), Term(2));
    // What adds nothing is answered: who is connected hears that it is there, and it hears what is committed.
    let (term, record_end, commit_lsn) = (Term(2), Lsn::INVALID, acknowledged);
    let tells = Append { term, start: acknowledged, length: 0, record_end, commit_lsn };
    let mut batch = timeline.batch();
    batch.append(&tells, &[]).unwrap();
    assert!(matches!(batch.finish().unwrap(), Some(Message::Ack(_))));
    assert_eq!(timeline.commit_lsn(), acknowledged);

    // Somebody else takes what was kept: now no byte is taken any more, wherever it would go.
    let ballast = world.directory.path().join("ballast");
    std::fs::File::create(&ballast).unwrap().set_len(1 << 20).unwrap();
    assert!(world.free() < 2 << 20);
    assert!(world.append_in(&timeline, 2, 8).unwrap_err().is_for_kept_space());
    let peers = PeerRange {
        history: timeline.history(),
        commit_lsn: Lsn(acknowledged.0 + 48),
        start: acknowledged,
        length: 48,
    };
    assert!(timeline.peer_range(&peers, &[0; 48]).unwrap_err().is_for_kept_space());
    vote(&timeline, 3).unwrap();
    assert_eq!((timeline.flush_lsn(), world.latch.reason()), (acknowledged, None));

    // Everything is archived and needed no more: trimming makes room, and WAL is taken without anything being started anew.
    timeline.note_archived(acknowledged);
    timeline.note_consistent(acknowledged);
    timeline.checkpoint().unwrap();
    assert!(timeline.trim().unwrap() > 0);
    world.space().look();
    assert_eq!(world.space().last().state(), Fine);
    // Term 2 wrote nothing.
    let history = TermHistory::new(vec![entry(1, START), entry(3, acknowledged)]).unwrap();
    timeline.elected(&Elected { term: Term(3), history }).unwrap();
    let end = world.append_in(&timeline, 3, 100_000).unwrap();
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn an_append_larger_than_what_is_left_is_refused_and_takes_nothing_of_what_is_kept() {
    let mut world = small_world(6 << 20);
    let timeline = world.led();
    let acknowledged = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // Two segments are there, and there is room for one more.
    assert!(world.append(&timeline, 5 << 20).unwrap_err().is_for_kept_space());
    assert!(world.free() >= 2 << 20);
    assert_eq!((timeline.flush_lsn(), world.generator.at), (acknowledged, acknowledged));
    // What fits those that are there is taken, and what was acknowledged stays.
    let end = world.append(&timeline, 1_500_000).unwrap();
    assert!(world.free() >= 2 << 20);
    assert_eq!(timeline.files().size_bytes(), 3 * SEGMENT_SIZE);
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn an_append_that_comes_in_pieces_waits_once() {
    use std::io::Write;
    // Slow from the start on.
    let mut world = small_world(6 << 20);
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    drop(timeline);
    std::fs::File::create(world.directory.path().join("ballast"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut stream = std::net::TcpStream::connect(serve(&world)).unwrap();
    assert_eq!(world.space().last().state(), DiskState::Slows);
    let start = world.generator.at;
    let history =
        vec![TermStart { term: Term(1), lsn: START }, TermStart { term: Term(2), lsn: start }];
    let history = TermHistory::new(history).unwrap();
    let (proposer, configuration) = (ProposerId([2; 16]), configuration());
    let bytes = world.generator.record(600_000);
    let length = bytes.len() as u64;
    let append =
        Append { term: Term(2), start, length, record_end: world.generator.at, commit_lsn: start };
    let speaks = pgstrata_wire::safekeeper::WAL.speaks;
    let mut sent = Vec::new();
    for (number, message) in [
        Message::Greeting(greeting()),
        Message::VoteRequest(VoteRequest { term: Term(2), proposer, configuration }),
        Message::Elected(Elected { term: Term(2), history }),
        Message::Append(append, &bytes),
    ]
    .into_iter()
    .enumerate()
    {
        let stamp = match number {
            0 => pgstrata_wire::frame::Stamp::First(speaks),
            _ => pgstrata_wire::frame::Stamp::In(speaks.highest()),
        };
        pgstrata_wire::safekeeper::encode(&message, stamp, &mut sent);
    }
    for piece in sent.chunks(8 << 10) {
        stream.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let end = world.generator.at;
    let address = stream.peer_addr().unwrap().to_string();
    let has_it = || {
        let client = SafekeeperClient::connect(&address, None, None, Duration::from_secs(5));
        let parameters = parameters(START);
        client.unwrap().open(parameters.tenant, parameters.timeline).unwrap().flush_lsn == end
    };
    wait_until("the append", has_it);
    let paused = world.space().paused();
    assert!(paused > Duration::ZERO && paused < Duration::from_millis(500), "{paused:?}");
}

#[test]
fn a_trim_that_found_no_space_is_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at.segment_number(SEGMENT_SIZE) < 4 {
        world.append(&timeline, 100_000).unwrap();
    }
    world.wait_for_next_segment();
    let files = timeline.files();
    let counted = || files.size_bytes() / SEGMENT_SIZE;
    wait_until("count of what has its name", || counted() == files.numbers().unwrap().len() as u64);
    let before = counted();
    let end = world.append(&timeline, 1000).unwrap();
    timeline.checkpoint().unwrap();
    timeline.note_archived(end);
    timeline.note_consistent(end);
    world.disk.fail(Fail::Full);
    assert!(matches!(timeline.trim(), Err(StorageError::DiskFull { .. })));
    assert_eq!(timeline.marks().available_lsn, START, "it was promised that something is gone");
    world.disk.fail(Fail::Nothing);
    let removed = timeline.trim().unwrap();
    assert!(removed > 0);
    assert_eq!(counted(), before - removed);
    assert_eq!(files.numbers().unwrap().len() as u64, counted());
}

#[test]
fn a_torn_tail_is_cut_to_the_last_whole_record() {
    let mut world = World::new();
    let timeline = world.led();
    let whole = world.append(&timeline, 1000).unwrap();
    // A crash in the middle of the next record, which was never acknowledged.
    let torn = world.generator.record(5000);
    let mut batch = timeline.batch();
    let append =
        Append { term: Term(1), start: whole, length: 3000, record_end: whole, commit_lsn: whole };
    batch.append(&append, &torn[..3000]).unwrap();
    batch.finish().unwrap();
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), whole);
    let mut rest = vec![1; 3000];
    timeline.reader().read(whole, &mut rest).unwrap();
    assert_eq!(rest, vec![0; 3000], "nothing half-written is left");
    assert!(timeline.last_record_before(whole).unwrap().is_some());
}

/// What the timeline says to these bytes, and the end of its durable log then.
fn send(timeline: &Timeline, start: Lsn, bytes: &[u8], record_end: Lsn) -> (Answer, Lsn) {
    let length = bytes.len() as u64;
    let append = Append { term: Term(1), start, length, record_end, commit_lsn: START };
    let mut batch = timeline.batch();
    let mut answer = batch.append(&append, bytes).unwrap();
    if answer.is_none() {
        answer = batch.finish().unwrap();
    }
    (answer, timeline.flush_lsn())
}

fn is_invalid(answer: &Answer) -> bool {
    matches!(answer, Some(Message::Refused(RefusedReason::InvalidWal(_))))
}

#[test]
fn l5_what_is_no_wal_is_not_taken() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let good = world.generator.record(20_000);
    let end = world.generator.at;
    for damage in [0, 8, 16, 500, 19_999] {
        let mut bad = good.clone();
        bad[damage] ^= 1;
        let (answer, flush_lsn) = send(&timeline, at, &bad, end);
        assert!(is_invalid(&answer), "{damage}: {answer:?}");
        assert_eq!(flush_lsn, at);
    }
    let (answer, flush_lsn) = send(&timeline, at, &vec![0; 20_000], end);
    assert!(is_invalid(&answer), "zeros: {answer:?}");
    assert_eq!(flush_lsn, at);
    // A record that follows none of this log.
    let mut stray = WalGenerator::new(parameters(START), at, Lsn(8));
    let bytes = stray.record(10);
    assert!(is_invalid(&send(&timeline, at, &bytes, stray.at).0));
    // Half a record is stored, and is no boundary, whatever its sender says.
    let half = at + 8000;
    assert_eq!(send(&timeline, at, &good[..8000], half).1, at);
    // The sender's end is not needed for a whole one.
    assert_eq!(send(&timeline, half, &good[8000..], at).1, end);
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), end);
    assert_eq!(timeline.last_record_before(end).unwrap().unwrap(), world.generator.prev);
}

#[test]
fn l5_what_a_peer_gives_is_looked_at() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let good = world.generator.record(20_000);
    let end = world.generator.at;
    let start = TermStart { term: Term(1), lsn: START };
    let history = TermHistory::new(vec![start]).unwrap();
    let length = good.len() as u64;
    let range = PeerRange { history, commit_lsn: end, start: at, length };
    let mut bad = good.clone();
    bad[9000] ^= 1;
    let answer = timeline.peer_range(&range, &bad).unwrap();
    assert!(is_invalid(&answer), "{answer:?}");
    let short = PeerRange { commit_lsn: Lsn(end.0 - 8), length: length - 8, ..range.clone() };
    let answer = timeline.peer_range(&short, &good[..good.len() - 8]).unwrap();
    assert!(is_invalid(&answer), "inside a record: {answer:?}");
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (at, START));
    timeline.peer_range(&range, &good).unwrap();
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (end, end));
}

#[test]
fn what_was_copied_before_a_crash_is_not_copied_again() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let mut bytes = world.generator.record(20_000);
    bytes.extend(world.generator.record(20_000));
    let whole = world.generator.at;
    bytes.extend(world.generator.record(2_000_000));
    let end = world.generator.at;
    let start = TermStart { term: Term(1), lsn: START };
    let history = TermHistory::new(vec![start]).unwrap();
    // The first piece ends within the third record, and so does the second.
    for (from, to) in [(at, whole + 5000), (whole + 5000, whole + 1_500_000)] {
        let piece = &bytes[(from - at) as usize..(to - at) as usize];
        let length = piece.len() as u64;
        let range = PeerRange { history: history.clone(), commit_lsn: end, start: from, length };
        assert_eq!(timeline.peer_range(&range, piece).unwrap(), None);
        assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (whole, whole));
    }
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), whole);
    let rest = &bytes[(whole - at) as usize..];
    let length = rest.len() as u64;
    let range = PeerRange { history, commit_lsn: end, start: whole, length };
    assert_eq!(timeline.peer_range(&range, rest).unwrap(), None);
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (end, end));
}

#[test]
fn l11_the_last_record_stays_when_its_segment_is_archived() {
    let mut world = World::new();
    let timeline = world.led();
    // One that begins in a segment and ends in the next, and is the last.
    while world.generator.at < Lsn(3 * SEGMENT_SIZE - 50_000) {
        world.append(&timeline, 40_000).unwrap();
    }
    let end = world.append(&timeline, 100_000).unwrap();
    let last = world.generator.prev;
    assert_eq!((last.segment_number(SEGMENT_SIZE), end.segment_number(SEGMENT_SIZE)), (2, 3));
    let (term, record_end) = (Term(1), Lsn::INVALID);
    let tells = Append { term, start: end, length: 0, record_end, commit_lsn: end };
    let mut batch = timeline.batch();
    batch.append(&tells, &[]).unwrap();
    batch.finish().unwrap();
    assert_eq!(timeline.commit_lsn(), end);
    timeline.checkpoint().unwrap();
    timeline.note_archived(end);
    timeline.note_consistent(end);
    timeline.trim().unwrap();
    assert!(timeline.marks().available_lsn > START, "nothing was trimmed");
    assert_eq!(timeline.last_record_before(end).unwrap(), Some(last));
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.last_record_before(end).unwrap(), Some(last));
}

/// A WAL port with small limits; where it listens.
fn serve(world: &World) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let limits = wal::Limits {
        connections: 8,
        pending: 4,
        greeting: Duration::from_secs(60),
        message: Duration::from_secs(1),
        ..wal::Limits::default()
    };
    let served = wal::Served {
        timelines: Arc::new(world.open()),
        security: Security::default(),
        limits,
        pace: Arc::new(Pace::new(CatchUpArguments { catch_up_rate: 0 })),
    };
    wal::serve(vec![listener], served).unwrap();
    address
}

#[test]
fn h14_a_message_must_come_whole() {
    use std::io::Write;
    let world = World::new();
    let mut stream = std::net::TcpStream::connect(serve(&world)).unwrap();
    let mut bytes = Vec::new();
    let parameters = parameters(START);
    let open = Message::Open(parameters.tenant, parameters.timeline);
    let stamp = pgstrata_wire::frame::Stamp::First(pgstrata_wire::safekeeper::WAL.speaks);
    pgstrata_wire::safekeeper::encode(&open, stamp, &mut bytes);
    // A byte now and then, of a message that is fine.
    for byte in &bytes[..bytes.len() - 1] {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("it was listened to for {} bytes", bytes.len());
}

#[test]
fn h14_who_says_nothing_keeps_nobody_out() {
    let world = World::new();
    drop(world.led());
    let address = serve(&world);
    let silent: Vec<_> = (0..40).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let parameters = parameters(START);
    let connected =
        SafekeeperClient::connect(&address.to_string(), None, None, Duration::from_secs(5));
    let status = connected.unwrap().open(parameters.tenant, parameters.timeline);
    assert_eq!(status.unwrap().term, Term(1));
    drop(silent);
}

/// Opens what is left when the note of the durable end was lost, too.
fn forget_note(world: &World) {
    std::fs::remove_file(world.timeline_directory().join("flushed")).unwrap();
}

fn assert_damaged(world: &World, by: &str) {
    let timelines = world.open();
    assert_eq!(timelines.overviews().len(), 0, "{by}: it is counted as whole");
    assert!(timelines.damaged()[0].1.contains("damaged"), "{}", timelines.damaged()[0].1);
}

#[test]
fn l6_rot_in_the_acknowledged_tail_is_no_torn_end() {
    let mut world = World::new();
    let timeline = world.led();
    for _ in 0..5 {
        world.append(&timeline, 1000).unwrap();
    }
    let end = timeline.flush_lsn();
    drop(timeline);
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    // The first record, one in the middle, and the last.
    for at in [300, 2500, (end - START) - 10] {
        flip(&segment, at);
        assert_damaged(&world, &format!("rot at {at}"));
        flip(&segment, at);
        assert_eq!(world.open().only().unwrap().flush_lsn(), end);
    }
    // The same without the note: all the bytes of the record are there, and they are wrong.
    for at in [300, 2500, (end - START) - 10] {
        let note = world.timeline_directory().join("flushed");
        if note.exists() {
            forget_note(&world);
        }
        flip(&segment, at);
        assert_damaged(&world, &format!("rot at {at}, no note"));
        flip(&segment, at);
    }
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn l6_what_a_crash_leaves_of_a_write_is_a_torn_end() {
    use std::os::unix::fs::FileExt;
    for note_is_lost in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        let torn = world.generator.record(5000);
        let mut batch = timeline.batch();
        let length = torn.len() as u64;
        let append =
            Append { term: Term(1), start: whole, length, record_end: whole, commit_lsn: whole };
        batch.append(&append, &torn).unwrap();
        drop(batch);
        drop(timeline);
        // A sector in the middle did not reach the disk, those after it did.
        let segment = world.timeline_directory().join(parameters(START).segment_name(1));
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        file.write_all_at(&[0; 512], 6 * 512).unwrap();
        if note_is_lost {
            forget_note(&world);
        }
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_sector_that_has_only_its_beginning_is_a_torn_end() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    let whole = world.append(&timeline, 1000).unwrap();
    // The first part of a record was synced, with what came before it.
    let torn = world.generator.record(1500);
    let append = |start: Lsn, length: usize| {
        let length = length as u64;
        Append { term: Term(1), start, length, record_end: whole, commit_lsn: whole }
    };
    timeline.batch().append(&append(whole, 100), &torn[..100]).unwrap();
    let mut batch = timeline.batch();
    batch.append(&append(whole + 100, torn.len() - 100), &torn[100..]).unwrap();
    drop(batch);
    drop(timeline);
    // Of the rest only the first sector did not reach the disk.
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    let from = whole + 100 - START;
    file.write_all_at(&vec![0; (from.next_multiple_of(512) - from) as usize], from).unwrap();
    forget_note(&world);
    assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
}

#[test]
fn l6_a_page_of_which_only_the_header_came_is_a_torn_end() {
    for header in [5, 24] {
        let mut world = World::new();
        let timeline = world.led();
        // Up to the end of a page.
        world.append(&timeline, 1000).unwrap();
        let left = (8192 - world.generator.at.page_offset()) as usize;
        let whole = world.append(&timeline, left - 29).unwrap();
        assert_eq!(whole.page_offset(), 0);
        let next = world.generator.record(1000);
        let append = Append {
            term: Term(1),
            start: whole,
            length: header,
            record_end: whole,
            commit_lsn: whole,
        };
        let mut batch = timeline.batch();
        batch.append(&append, &next[..header as usize]).unwrap();
        batch.finish().unwrap();
        drop(timeline);
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_note_that_was_lowered_and_not_synced_does_not_come_back() {
    let directory = Path::new("/timeline");
    for seed in 0..40 {
        let disk = SimDisk::new(seed);
        let open = || FlushedNote::open(&disk, directory).unwrap();
        disk.create_directory(directory).unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        let mut note = open();
        disk.sync_directory(directory).unwrap();
        note.raise(Lsn(2000)).unwrap();
        note.sync().unwrap();
        // Lowered for a cut, but the process ends before it is synced, or that fails.
        match seed % 2 {
            0 => disk.stop_after(1),
            _ => disk.fail_sync_after(0),
        }
        note.lower(Lsn(1000)).unwrap_err();
        disk.end_process();
        // The next one cuts.
        open().lower(Lsn(1000)).unwrap();
        disk.lose_power();
        assert_eq!(open().lsn(), Lsn(1000), "seed {seed}");
    }
}

/// What looks like a torn write and was acknowledged: only the note can tell.
#[test]
fn l6_zeros_in_what_was_noted_are_damage() {
    use std::os::unix::fs::FileExt;
    for noted in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        timeline.note_flushed().unwrap();
        world.append(&timeline, 5000).unwrap();
        if noted {
            timeline.note_flushed().unwrap();
        }
        drop(timeline);
        let segment = world.timeline_directory().join(parameters(START).segment_name(1));
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        file.write_all_at(&[0; 512], 6 * 512).unwrap();
        match noted {
            true => assert_damaged(&world, "a sector of zeros"),
            false => assert_eq!(world.open().only().unwrap().flush_lsn(), whole),
        }
    }
}

#[test]
fn l6_a_hole_far_before_the_end_is_damage() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at < Lsn(8 * SEGMENT_SIZE) {
        world.append(&timeline, 100_000).unwrap();
    }
    drop(timeline);
    let segment = world.timeline_directory().join(parameters(START).segment_name(2));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(&[0; 4096], 8192).unwrap();
    assert_damaged(&world, "a hole");
}

#[test]
fn l6_a_long_record_of_zeros_that_was_cut_short_is_a_torn_end() {
    for note_is_lost in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        // As PostgreSQL writes a message of zeros: its first sectors hold nothing else.
        let record = world.generator.record_of(&vec![0; 9 << 20]);
        let part = &record[..8 << 20];
        for (number, piece) in part.chunks(256 << 10).enumerate() {
            let start = whole + (number * (256 << 10)) as u64;
            let length = piece.len() as u64;
            let append =
                Append { term: Term(1), start, length, record_end: whole, commit_lsn: whole };
            let mut batch = timeline.batch();
            batch.append(&append, piece).unwrap();
            batch.finish().unwrap();
        }
        drop(timeline);
        if note_is_lost {
            forget_note(&world);
        }
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_cut_that_was_interrupted_is_no_damage() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    while world.generator.at < kept + (SEGMENT_SIZE - (100 << 10)) {
        world.append(&timeline, 50_000).unwrap();
    }
    drop(timeline);
    // Zeros were put over the first part of what was cut off.
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(&vec![0; 64 << 10], kept - START).unwrap();
    forget_note(&world);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

#[test]
fn l6_a_cut_is_no_damage() {
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    world.append(&timeline, 1000).unwrap();
    vote(&timeline, 2).unwrap();
    let entry = |term, lsn| TermStart { term: Term(term), lsn };
    let history = TermHistory::new(vec![entry(1, START), entry(2, kept)]).unwrap();
    timeline.elected(&Elected { term: Term(2), history }).unwrap();
    assert_eq!(timeline.flush_lsn(), kept);
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

/// Nothing is missing of it but zeros, and they are there: recovery would find it whole, and a vote that said less would have let a
/// winner begin before it.
#[test]
fn what_has_only_begun_at_a_vote_is_not_there_after_a_crash() {
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    let bytes = world.generator.clone().record(10);
    send(&timeline, kept, &bytes[..bytes.len() - 1], kept);
    assert_eq!(timeline.flush_lsn(), kept);
    drop(timeline);
    // Before anybody was told how far it goes it may count.
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), kept + bytes.len() as u64);
    drop(timeline);
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    send(&timeline, kept, &bytes[..bytes.len() - 1], kept);
    let voted = vote(&timeline, 2).unwrap();
    assert!(matches!(&voted, Some(Message::Vote(vote)) if vote.flush_lsn == kept), "{voted:?}");
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

/// It was taken for the one that the next record links back to, and all that the next proposer sent was refused.
#[test]
fn a_record_that_is_cut_before_what_pads_it_is_forgotten() {
    for ends_segment in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let kept = world.append(&timeline, 1000).unwrap();
        let mut next = world.generator.clone();
        let bytes = if ends_segment { next.switch() } else { next.record(10) };
        // Whole, but what follows it up to the boundary is still to come.
        let length = if ends_segment { 4096 } else { bytes.len() - 1 };
        let append = |term, bytes: &[u8]| {
            let length = bytes.len() as u64;
            let append = Append {
                term: Term(term),
                start: kept,
                length,
                record_end: kept,
                commit_lsn: kept,
            };
            let mut batch = timeline.batch();
            assert_eq!(batch.append(&append, bytes).unwrap(), None);
            batch.finish().unwrap()
        };
        append(1, &bytes[..length]);
        assert_eq!(timeline.flush_lsn(), kept);
        vote(&timeline, 2).unwrap();
        let entry = |term, lsn| TermStart { term: Term(term), lsn };
        let history = TermHistory::new(vec![entry(1, START), entry(2, kept)]).unwrap();
        timeline.elected(&Elected { term: Term(2), history }).unwrap();
        let bytes = world.generator.record(100);
        append(2, &bytes);
        assert_eq!(timeline.flush_lsn(), world.generator.at);
    }
}

#[test]
fn damage_below_what_was_durable_gives_one_clear_error() {
    let mut world = World::new();
    let timeline = world.led();
    for _ in 0..5 {
        world.append(&timeline, 1000).unwrap();
    }
    timeline.checkpoint().unwrap();
    drop(timeline);
    let directory = world.timeline_directory();
    let segment = directory.join(parameters(START).segment_name(1));
    flip(&segment, 2500);
    let timelines = world.open();
    let damaged = timelines.damaged();
    assert_eq!((timelines.overviews().len(), damaged.len()), (0, 1));
    assert!(damaged[0].1.contains("was durable"), "{}", damaged[0].1);
    drop(timelines);
    flip(&segment, 2500);
    assert_eq!(world.open().overviews().len(), 1);
    flip(&directory.join("control"), 60);
    let damaged = world.open().damaged();
    assert!(damaged[0].1.contains("checksum"), "{}", damaged[0].1);
    std::fs::write(directory.join("control"), b"").unwrap();
    assert!(world.open().damaged()[0].1.contains("never written"));
    std::fs::remove_file(directory.join("control")).unwrap();
    assert_eq!(world.open().damaged().len(), 1);
}
