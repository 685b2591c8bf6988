//! Timelines that come to rest, and are opened when they are needed.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use parking_lot::Mutex;
use pgstrata_blob::{Location, Store};
use pgstrata_env::Disk;
use pgstrata_format::quorum::{AllGivenUp, GivenUp, Quorum};
use pgstrata_format::registration::Registration;
use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, TenantId, Term, TimelineId, TimelineParameters,
};
use pgstrata_quorum::{
    Append, Configuration, Elected, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::archive::{Archive, Tail};
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::{Preparations, Preparer, SegmentFiles};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{OpenContext, Timeline};
use pgstrata_safekeeper::timelines::{Greeted, TimelineKey, Timelines, TimelinesContext};
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason};

const START: Lsn = Lsn(SEGMENT_SIZE);

const OWN: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

const DIRECTORY: &str = "/safekeeper";

fn nth(n: u8) -> TimelineParameters {
    TimelineParameters { timeline: TimelineId([n; 16]), ..parameters(START) }
}

fn key(n: u8) -> TimelineKey {
    (nth(n).tenant, nth(n).timeline)
}

fn directory(n: u8) -> PathBuf {
    Path::new(DIRECTORY).join(key(n).0.to_string()).join(key(n).1.to_string())
}

/// A safekeeper's directory on a disk that loses what it may.
struct World {
    runtime: tokio::runtime::Runtime,
    objects: tempfile::TempDir,
    disk: SimDisk,
    latch: Latch,
}

/// What one life of its process has.
struct Life {
    timelines: Arc<Timelines>,
    /// Nobody makes what is asked for ahead, unless a test does.
    preparations: Mutex<Preparations>,
}

impl World {
    fn new(seed: u64) -> World {
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

    fn decisions(&self) -> Decisions {
        let location = Location::Directory(self.objects.path().to_owned());
        let store = Store::open(&location, None).unwrap();
        Decisions::new(store, self.runtime.handle().clone())
    }

    fn archive(&self) -> Archive {
        let location = Location::Directory(self.objects.path().to_owned());
        Archive::new(Store::open(&location, None).unwrap())
    }

    /// Archives the tail of a timeline that nobody writes to.
    fn archive_tail(&self, timeline: &Timeline) {
        let tail = timeline.read_tail(timeline.commit_lsn()).unwrap();
        self.runtime.block_on(self.archive().put_tail(timeline.parameters(), &tail)).unwrap();
        timeline.note_archived(timeline.commit_lsn());
    }

    fn try_to_open(&mut self) -> Result<Life, StorageError> {
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
        };
        let timelines = Arc::new(Timelines::open(context, Path::new(DIRECTORY))?);
        Ok(Life { timelines, preparations: Mutex::new(preparations) })
    }

    fn open(&mut self) -> Life {
        self.try_to_open().unwrap()
    }
}

impl Life {
    /// Timeline `n`, founded and led by a proposer.
    fn found(&self, n: u8) -> Log {
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

    fn get(&self, n: u8) -> Result<Arc<Timeline>, RefusedReason> {
        self.timelines.get(key(n))
    }

    /// Lets it come to rest, as one that is archived; whether it did.
    fn rest(&self, n: u8) -> bool {
        let timeline = self.get(n).unwrap();
        timeline.note_archived(timeline.commit_lsn());
        drop(timeline);
        self.rest_as_it_is(n)
    }

    fn rest_as_it_is(&self, n: u8) -> bool {
        self.get(n).unwrap().checkpoint().unwrap();
        self.timelines.let_rest(&[key(n)]).unwrap() == 1
    }

    fn is_open(&self, n: u8) -> bool {
        self.timelines.open_keys().contains(&key(n))
    }
}

/// What is written to one timeline.
#[derive(Clone)]
struct Log {
    n: u8,
    generator: WalGenerator,
}

impl Log {
    /// Appends a record, and commits what there is then.
    fn commit(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        let end = self.write(timeline, size)?;
        append(timeline, end, &[], end)?;
        assert_eq!(timeline.commit_lsn(), end);
        Ok(end)
    }

    /// Appends a record that isn't committed.
    fn write(&mut self, timeline: &Timeline, size: usize) -> Result<Lsn, StorageError> {
        let mut next = self.generator.clone();
        let bytes = next.record(size);
        append(timeline, self.generator.at, &bytes, timeline.commit_lsn())?;
        assert_eq!(timeline.flush_lsn(), next.at);
        self.generator = next;
        Ok(self.generator.at)
    }
}

fn append(timeline: &Timeline, start: Lsn, bytes: &[u8], commit: Lsn) -> Result<(), StorageError> {
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

fn vote(timeline: &Timeline, term: u64) -> Result<(), StorageError> {
    let configuration = Configuration::new(1, vec![OWN]).unwrap();
    let proposer = ProposerId([term as u8; 16]);
    let vote = timeline.vote(&VoteRequest { term: Term(term), proposer, configuration })?;
    assert!(matches!(vote, Some(Message::Vote(_))), "{vote:?}");
    Ok(())
}

#[test]
fn what_rests_is_not_opened_at_a_start_and_is_when_it_is_needed() {
    let mut world = World::new(1);
    let life = world.open();
    let mut logs = [life.found(1), life.found(2)];
    for log in &mut logs {
        log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
    }
    assert!(life.rest(1) && !life.is_open(1));
    let before = life.timelines.overviews();
    drop(life);
    world.disk.lose_power();

    // What it says is what it said, and nothing was read of it.
    let life = world.open();
    assert_eq!(life.timelines.open_keys(), [key(2)]);
    let summary = |all: &[pgstrata_safekeeper::timeline::Overview], n| {
        let found = all.iter().find(|one| one.key() == key(n)).unwrap();
        (found.is_open, found.summary.clone())
    };
    let after = life.timelines.overviews();
    assert_eq!(summary(&after, 1), summary(&before, 1));
    assert_eq!(after.len(), 2);
    // It goes on from there.
    let timeline = life.get(1).unwrap();
    assert_eq!(timeline.flush_lsn(), logs[0].generator.at);
    assert_eq!(timeline.commit_lsn(), logs[0].generator.at);
    assert_eq!(timeline.term(), Term(1));
    logs[0].commit(&timeline, 500).unwrap();
    drop((timeline, life));
    world.disk.lose_power();
    let life = world.open();
    assert_eq!(life.timelines.open_keys(), [key(1), key(2)]);
    assert_eq!(life.get(1).unwrap().flush_lsn(), logs[0].generator.at);
}

#[test]
fn what_something_is_to_be_done_with_does_not_rest() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    log.commit(&timeline, 1000).unwrap();
    // Somebody has it.
    assert!(!life.rest(1));
    let compute = timeline.compute_connected();
    drop(timeline);
    assert!(!life.rest(1));
    drop(compute);
    // Not all that is known is on disk.
    life.get(1).unwrap().note_addresses(&[(NodeId(2), "127.0.0.1:5".into())]);
    assert_eq!(life.timelines.let_rest(&[key(1)]).unwrap(), 0);
    assert!(life.rest(1));
    // What is not committed is to be proven, or cut.
    log.write(&life.get(1).unwrap(), 1000).unwrap();
    assert!(!life.rest(1));
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    // A full segment is to be archived, and then to be removed.
    let timeline = life.get(1).unwrap();
    while timeline.commit_lsn() < Lsn(2 * SEGMENT_SIZE) + 200_000 {
        log.commit(&timeline, 100_000).unwrap();
    }
    drop(timeline);
    assert!(!life.rest_as_it_is(1));
    // And what there is of the last one too.
    life.get(1).unwrap().note_archived(Lsn(2 * SEGMENT_SIZE));
    assert!(!life.rest_as_it_is(1));
    assert!(life.rest(1));
    life.get(1).unwrap().note_consistent(Lsn(2 * SEGMENT_SIZE));
    assert!(!life.rest(1));
    assert_eq!(life.get(1).unwrap().trim().unwrap(), 1);
    assert!(life.rest(1));
    // Members who are to come have to get it.
    let other = Member { node: NodeId(2), ..OWN };
    let joint = Configuration::joint(2, vec![OWN], vec![OWN, other]).unwrap();
    assert_eq!(life.get(1).unwrap().configure(&joint).unwrap(), None);
    assert!(!life.rest(1));
    let new = Configuration::new(3, vec![OWN, other]).unwrap();
    assert_eq!(life.get(1).unwrap().configure(&new).unwrap(), None);
    assert!(life.rest(1));
}

/// Stops in the middle of what comes after a rest, at each operation.
#[test]
fn nothing_acknowledged_after_a_rest_is_lost_and_the_next_start_sees_to_it() {
    let (mut stopped_early, mut acknowledged) = (0, 0);
    for operations in 0..40 {
        for seed in 0..6 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut log = life.found(1);
            let mut durable = log.commit(&life.get(1).unwrap(), 1000).unwrap();
            assert!(life.rest(1));
            world.disk.stop_after(operations);
            let mut has_opened = false;
            if let Ok(timeline) = life.get(1) {
                has_opened = true;
                if let Ok(end) = log.write(&timeline, 1000) {
                    durable = end;
                    acknowledged += 1;
                }
            } else {
                stopped_early += 1;
            }
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            let what = format!("{operations} operations, seed {seed}");
            // It has a tail that is to be proven, or something that is to be cut.
            assert!(life.is_open(1) || !has_opened, "{what}: it counts as resting");
            let timeline = life.get(1).unwrap();
            assert!(timeline.flush_lsn() >= durable, "{what}: {}", timeline.flush_lsn());
            assert!(timeline.commit_lsn() >= START, "{what}");
        }
    }
    assert!(stopped_early > 20 && acknowledged > 20, "{stopped_early} {acknowledged}");
}

/// Stops at each operation while two timelines come to rest, one of them for the second time.
#[test]
fn whatever_is_left_of_a_rest_it_is_only_said_of_what_rests() {
    let mut rested = 0;
    for operations in 0..24 {
        for seed in 0..6 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut logs = [life.found(1), life.found(2)];
            for log in &mut logs {
                log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            }
            assert!(life.rest(1));
            logs[0].commit(&life.get(1).unwrap(), 700).unwrap();
            for n in [1, 2] {
                let timeline = life.get(n).unwrap();
                timeline.note_archived(timeline.commit_lsn());
                timeline.checkpoint().unwrap();
            }
            world.disk.stop_after(operations);
            let outcome = life.timelines.let_rest(&[key(1), key(2)]);
            assert!(outcome.is_ok() || world.latch.reason().is_some());
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            for log in &logs {
                let what = format!("{operations} operations, seed {seed}, timeline {}", log.n);
                let all = life.timelines.overviews();
                let one = all.iter().find(|one| one.key() == key(log.n)).unwrap();
                // The summary is that of the second rest, or it was opened.
                assert_eq!(one.summary.flush_lsn, log.generator.at, "{what}");
                rested += u32::from(!one.is_open);
                assert_eq!(life.get(log.n).unwrap().commit_lsn(), log.generator.at, "{what}");
            }
        }
    }
    assert!((20..2 * 24 * 6 - 20).contains(&rested), "{rested}");
}

#[test]
fn two_at_once_open_it_once() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    for _ in 0..20 {
        assert!(life.rest(1));
        let opened = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| opened.lock().push(life.get(1).unwrap()));
            }
        });
        let opened = opened.into_inner();
        assert!(opened.iter().all(|other| Arc::ptr_eq(other, &opened[0])));
    }
}

/// Who comes and goes, and what rests in between, with segments that are made ahead.
#[test]
fn a_timeline_that_rests_again_and_again_under_writes_is_one_log() {
    let mut world = World::new(1);
    let life = world.open();
    let log = Mutex::new(life.found(1));
    let is_over = AtomicBool::new(false);
    let rests = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let mut log = log.lock();
                        let timeline = life.get(1).unwrap();
                        log.commit(&timeline, 3000).unwrap();
                        timeline.note_archived(log.generator.at);
                        timeline.checkpoint().unwrap();
                        drop(timeline);
                        drop(log);
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        let preparing = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                if !life.preparations.lock().step() {
                    std::thread::yield_now();
                }
            }
        });
        let mut rests = 0;
        while !writers.iter().all(|writer| writer.is_finished()) {
            rests += life.timelines.let_rest(&[key(1)]).unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        preparing.join().unwrap();
        rests
    });
    assert!(rests > 20, "it came to rest {rests} times");
    assert_eq!(world.latch.reason(), None);
    let end = log.into_inner().generator.at;
    assert!(end > Lsn(2 * SEGMENT_SIZE));
    drop(life);
    world.disk.lose_power();
    assert_eq!(world.open().get(1).unwrap().flush_lsn(), end);
}

#[test]
fn a_segment_is_not_made_ahead_for_who_has_let_go() {
    let disk = Arc::new(SimDisk::new(1));
    disk.create_directory(Path::new(DIRECTORY)).unwrap();
    let latch = Latch::default();
    let (preparer, preparations) = Preparer::queue(latch.clone());
    let files = Arc::new(SegmentFiles::new(disk, Path::new(DIRECTORY), parameters(START)));
    preparer.request(&files, 1);
    preparer.request(&files, 2);
    assert!(preparations.step());
    files.let_go();
    assert!(preparations.step());
    assert_eq!(files.numbers().unwrap(), [1]);
    assert!(files.open_or_make(1).is_ok() && files.open_or_make(2).is_err());
    assert_eq!(latch.reason(), None);
}

#[test]
fn what_is_damaged_is_found_when_it_is_opened_and_others_are_served() {
    let mut world = World::new(1);
    let life = world.open();
    let mut logs = [life.found(1), life.found(2)];
    for log in &mut logs {
        log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
        assert!(life.rest(log.n));
    }
    drop(life);
    let segment = directory(1).join(parameters(START).segment_name(1));
    world.disk.rot(&segment, 300).unwrap();
    let life = world.open();
    assert_eq!((life.timelines.overviews().len(), life.timelines.damaged()), (2, Vec::new()));
    for _ in 0..2 {
        let refused = life.get(1).unwrap_err();
        assert!(matches!(&refused, RefusedReason::Storage(text) if text.contains("damaged")));
    }
    assert_eq!(life.get(2).unwrap().flush_lsn(), logs[1].generator.at);
    let damaged = life.timelines.damaged();
    assert_eq!((life.timelines.overviews().len(), damaged.len()), (1, 1));
    assert!(damaged[0].1.contains("damaged"), "{damaged:?}");
    // The next start says so at once.
    drop(life);
    world.disk.lose_power();
    assert_eq!(world.open().timelines.damaged().len(), 1);
}

#[test]
fn one_whose_directory_is_gone_is_missed_at_the_start() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    drop(life);
    let gone = directory(1).with_extension("gone");
    world.disk.rename(&directory(1), &gone).unwrap();
    let life = world.open();
    assert!(life.timelines.damaged()[0].1.contains("is gone"));
}

#[test]
fn a_list_that_is_lost_or_broken_costs_a_look_and_nothing_else() {
    let list = Path::new(DIRECTORY).join("resting");
    for is_broken in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut log = life.found(1);
        log.commit(&life.get(1).unwrap(), 1000).unwrap();
        assert!(life.rest(1));
        drop(life);
        match is_broken {
            true => world.disk.rot(&list, 70).unwrap(),
            false => world.disk.remove(&list).unwrap(),
        }
        let life = world.open();
        assert!(life.is_open(1));
        assert_eq!(life.get(1).unwrap().flush_lsn(), log.generator.at);
        assert!(life.rest(1));
        drop(life);
        assert!(!world.open().is_open(1));
    }
}

#[test]
fn on_a_full_disk_a_timeline_is_opened_and_does_not_count_as_resting() {
    for seed in 0..10 {
        let mut world = World::new(seed);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            assert!(life.rest(log.n));
        }
        world.disk.set_full(true);
        let timeline = life.get(1).unwrap();
        // Its segment is there.
        logs[0].write(&timeline, 1000).unwrap();
        drop(timeline);
        // Nor can it be written down what rests.
        assert_eq!(life.get(2).unwrap().commit_lsn(), logs[1].generator.at);
        assert_eq!(life.timelines.let_rest(&[key(2)]).unwrap(), 1);
        assert_eq!(world.latch.reason(), None);
        drop(life);
        world.disk.lose_power();
        let life = world.open();
        assert_eq!(life.timelines.open_keys(), [key(1), key(2)]);
        assert_eq!(life.get(1).unwrap().flush_lsn(), logs[0].generator.at);
        world.disk.set_full(false);
        assert!(life.rest(2));
        drop(life);
        world.disk.lose_power();
        assert_eq!(world.open().timelines.open_keys(), [key(1)]);
    }
}

#[test]
fn what_others_keep_by_now_comes_to_rest_and_is_removed_at_the_next_start() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    let other = Member { node: NodeId(2), ..OWN };
    let timeline = life.get(1).unwrap();
    log.write(&timeline, 1000).unwrap();
    let new = Configuration::new(3, vec![other]).unwrap();
    assert_eq!(timeline.configure(&new).unwrap(), None);
    drop(timeline);
    assert!(life.rest(1));
    drop(life);
    let life = world.open();
    assert_eq!((life.timelines.overviews().len(), life.timelines.damaged()), (0, Vec::new()));
    assert!(matches!(life.get(1), Err(RefusedReason::UnknownTimeline)));
    drop(life);
    // It is not mistaken for a resting one when it comes back with nothing.
    let life = world.open();
    assert_eq!(life.timelines.overviews().len(), 0);
}

#[test]
fn several_hear_at_once_that_a_timeline_is_kept() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1);
    let timeline = life.get(1).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| timeline.keep().unwrap()));
        }
    });
    assert!(timeline.is_kept().unwrap());
    assert_eq!(world.latch.reason(), None);
}

/// A wait for a timeline ends, and is for that timeline only.
#[test]
fn others_are_served_while_one_comes_to_rest() {
    let mut world = World::new(1);
    let life = world.open();
    for n in 1..=20 {
        life.found(n).commit(&life.get(n).unwrap(), 1000).unwrap();
    }
    let keys: Vec<TimelineKey> = (1..=19).map(key).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let resting = scope.spawn(|| {
            for _ in 0..20 {
                for key in &keys {
                    life.timelines.get(*key).unwrap().checkpoint().unwrap();
                }
                life.timelines.let_rest(&keys).unwrap();
            }
        });
        while !resting.is_finished() {
            assert!(life.timelines.get_open(key(20)).is_some());
            assert_eq!(life.timelines.overviews().len(), 20);
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(60));
    let unknown = (TenantId([9; 16]), TimelineId([9; 16]));
    assert!(matches!(life.timelines.get(unknown), Err(RefusedReason::UnknownTimeline)));
}

/// Segments of timeline `n` on the disk.
fn segments(world: &World, n: u8) -> Vec<String> {
    let names = world.disk.list(&directory(n)).unwrap();
    names.into_iter().filter(|name| name.len() == 24).collect()
}

/// What timeline `n` serves as committed.
fn served(life: &Life, n: u8, to: Lsn) -> Vec<u8> {
    let timeline = life.get(n).unwrap();
    assert!(timeline.commit_lsn() >= to, "{}", timeline.commit_lsn());
    let mut reading = timeline.read_range(START, to, Term(0)).unwrap();
    let mut bytes = vec![0; (to - START) as usize];
    let mut done = 0;
    while done < bytes.len() {
        done += reading.next(&mut bytes[done..]).unwrap();
    }
    bytes
}

#[test]
fn what_is_archived_goes_from_the_disk_and_comes_back_when_it_is_needed() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let end = log.commit(&timeline, 100_000).unwrap();
    let before = served(&life, 1, end);
    drop(timeline);
    // Not before it rests, nor before all of it is archived.
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    world.archive_tail(&life.get(1).unwrap());
    assert!(life.rest_as_it_is(1));
    assert_eq!(segments(&world, 1).len(), 1);
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
    assert_eq!(segments(&world, 1).len(), 0);
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    assert!(life.timelines.is_away(key(1)));
    let overview = &life.timelines.overviews()[0];
    assert_eq!((overview.size_bytes(), overview.summary.flush_lsn), (0, end));
    drop(life);
    world.disk.lose_power();

    // Nothing is fetched at a start; whether or not there is a list of what rests.
    for has_list in [true, false] {
        if !has_list {
            let list = Path::new(DIRECTORY).join("resting");
            world.disk.remove(&list).unwrap();
            world.disk.sync_directory(Path::new(DIRECTORY)).unwrap();
        }
        let life = world.open();
        assert!(!life.is_open(1) && life.timelines.is_away(key(1)));
        assert_eq!(segments(&world, 1), [""; 0], "{has_list} {:?}", world.disk.list(&directory(1)));
        let overview = &life.timelines.overviews()[0];
        assert_eq!(overview.summary.commit_lsn, end);
        assert_eq!(overview.summary.flush_lsn, end);
    }
    let life = world.open();
    assert!(served(&life, 1, end) == before);
    assert_eq!(segments(&world, 1).len(), 1);
    let timeline = life.get(1).unwrap();
    assert_eq!((timeline.flush_lsn(), timeline.term()), (end, Term(1)));
    let after = log.commit(&timeline, 500).unwrap();
    drop((timeline, life));
    world.disk.lose_power();
    let life = world.open();
    assert_eq!(life.get(1).unwrap().flush_lsn(), after);
    assert!(served(&life, 1, end) == before);
}

/// Stops at each operation while WAL goes from the disk, and while it comes back.
#[test]
fn wherever_it_stops_while_wal_goes_or_comes_back_all_of_it_is_there_then() {
    for comes_back in [false, true] {
        let mut whole = 0;
        for operations in 0..30 {
            for seed in 0..2 {
                let what = format!("back {comes_back}, {operations} operations, seed {seed}");
                let mut world = World::new(seed);
                let life = world.open();
                let mut log = life.found(1);
                let end = log.commit(&life.get(1).unwrap(), 20_000).unwrap();
                let before = served(&life, 1, end);
                world.archive_tail(&life.get(1).unwrap());
                assert!(life.rest_as_it_is(1));
                if comes_back {
                    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
                    world.disk.stop_after(operations);
                    whole += usize::from(life.get(1).is_ok());
                } else {
                    world.disk.stop_after(operations);
                    whole += usize::from(life.timelines.send_away(&[key(1)]).is_ok());
                }
                drop(life);
                world.disk.lose_power();
                let life = world.open();
                let timeline = life.get(1).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(timeline.flush_lsn(), end, "{what}");
                assert!(served(&life, 1, end) == before, "{what}");
                let next = log.commit(&timeline, 700).unwrap();
                drop((timeline, life));
                world.disk.lose_power();
                let life = world.open();
                assert_eq!(life.get(1).unwrap().flush_lsn(), next, "{what}");
            }
        }
        assert!((5..50).contains(&whole), "{comes_back}: {whole}");
    }
}

#[test]
fn what_can_not_be_fetched_is_waited_for_and_what_is_gone_is_asked_for() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let end = log.commit(&life.get(1).unwrap(), 20_000).unwrap();
    world.archive_tail(&life.get(1).unwrap());
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
    let parameters = nth(1);
    let of = format!("tenants/{}/timelines/{}/wal/tail", parameters.tenant, parameters.timeline);
    let tails = world.objects.path().join(of);
    let tail = std::fs::read_dir(&tails).unwrap().next().unwrap().unwrap().path();

    // Object storage that can't be read.
    let aside = tails.with_extension("aside");
    std::fs::rename(&tails, &aside).unwrap();
    std::fs::write(&tails, "no directory").unwrap();
    let refused = life.get(1).unwrap_err();
    assert!(
        matches!(&refused, RefusedReason::Unavailable(why) if why.contains("object storage")),
        "{refused}"
    );
    assert!(life.timelines.damaged().is_empty() && life.timelines.is_away(key(1)));
    std::fs::remove_file(&tails).unwrap();
    std::fs::rename(&aside, &tails).unwrap();
    assert_eq!(life.get(1).unwrap().flush_lsn(), end);
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);

    // What is there is not what was: it has to come from other members then, or from there again.
    let mut bytes = std::fs::read(&tail).unwrap();
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    std::fs::write(&tail, &bytes).unwrap();
    assert!(life.get(1).is_err());
    assert_eq!(life.timelines.mending(), [key(1)]);
    drop(life);
    world.disk.lose_power();
    let life = world.open();
    assert!(life.get(1).is_err());
    assert_eq!(life.timelines.mending(), [key(1)]);
    assert!(world.latch.reason().is_none());
}

/// One that may lack everything is not taken for one of which all is in object storage: it asks for what others have.
#[test]
fn what_was_never_written_to_is_not_away() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1);
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    assert!(!life.timelines.is_away(key(1)));
    assert!(!world.disk.list(&directory(1)).unwrap().contains(&"away".to_owned()));
    assert!(life.get(1).is_ok());
}

/// A timeline whose control file has rotted is damaged, before or after its WAL went; the safekeeper goes on with the others.
#[test]
fn a_control_file_that_rots_ends_nothing_but_its_timeline() {
    for is_away in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            world.archive_tail(&life.get(log.n).unwrap());
            assert!(life.rest_as_it_is(log.n));
        }
        if is_away {
            assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
        }
        world.disk.rot(&directory(1).join("control"), 60).unwrap();
        assert_eq!(life.timelines.send_away(&[key(1), key(2)]).unwrap(), 1);
        assert!(matches!(life.get(1), Err(RefusedReason::Storage(_))));
        assert_eq!(life.timelines.damaged().len(), 1);
        assert!(life.get(2).is_ok());
        assert_eq!(world.latch.reason(), None);
    }
}

#[test]
fn tails_are_removed_when_more_is_archived() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let archive = world.archive();
    let parameters = nth(1);
    let mut ends = Vec::new();
    for _ in 0..3 {
        ends.push(log.commit(&timeline, 3000).unwrap());
        world.archive_tail(&timeline);
    }
    let newest = |world: &World| {
        world.runtime.block_on(archive.newest(&parameters, &AllGivenUp::default())).unwrap()
    };
    let extent = newest(&world).unwrap();
    assert_eq!((extent.from, extent.boundary), (START, ends[2]));
    assert_eq!(extent.history, timeline.history());
    let tail = |end: Lsn| timeline.read_tail(end).unwrap();
    for (drop_to, left) in [(ends[1], [false, true, true]), (ends[2], [false, false, true])] {
        world.runtime.block_on(archive.drop_tails(&parameters, drop_to, 1)).unwrap();
        for (end, is_left) in ends.iter().zip(left) {
            let tail = tail(*end);
            let found = world.runtime.block_on(archive.holds_tail(&parameters, &tail));
            assert_eq!(found, Ok(is_left), "{end}");
        }
    }
    // It counts from the begin of the segment.
    let part = world
        .runtime
        .block_on(archive.part(&parameters, 1, ends[2], &AllGivenUp::default()))
        .unwrap()
        .unwrap();
    assert_eq!((part.0, part.1.len() as u64), (START, ends[2] - START));
    // One that says something else than what is committed is never replaced.
    let mut other = tail(ends[2]);
    Arc::make_mut(&mut other.bytes)[500] ^= 1;
    let error = world.runtime.block_on(archive.put_tail(&parameters, &other)).unwrap_err();
    assert!(error.contains("differs"), "{error}");
}

/// Writes into the timeline's object that its branch was deleted.
fn decide_deleted(world: &World, n: u8) {
    let name = Quorum::object_name(key(n).0, key(n).1);
    let path = world.objects.path().join(name);
    let quorum = Quorum::decode(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, Quorum { is_deleted: true, ..quorum }.encode()).unwrap();
}

#[test]
fn what_was_deleted_goes_and_never_comes_back() {
    for rests in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            world.archive_tail(&life.get(log.n).unwrap());
        }
        assert!(!rests || life.rest_as_it_is(1));
        assert_eq!(life.timelines.look_at_decision(key(1)), Ok(()));
        assert!(life.get(1).is_ok());
        assert!(!rests || life.rest_as_it_is(1));
        decide_deleted(&world, 1);
        assert_eq!(life.timelines.look_at_decision(key(1)), Ok(()));
        assert!(world.disk.list(&directory(1)).is_err());
        assert!(life.timelines.keys() == [key(2)] && life.timelines.damaged().is_empty());
        let archived = |n| {
            world.runtime.block_on(world.archive().newest(&nth(n), &AllGivenUp::default())).unwrap()
        };
        assert!(archived(1).is_none() && archived(2).is_some());
        // Whoever comes for it is told, and it is not begun anew.
        let greeting = Greeting {
            parameters: nth(1),
            known: 0,
            addresses: Vec::new(),
            proposer: ProposerId([2; 16]),
        };
        let refused = life.timelines.greet(&greeting).unwrap_err().to_string();
        assert!(refused.contains("was deleted"), "{refused}");
        let refused = life.timelines.found(&greeting, &[(OWN.node, Some(OWN.incarnation))]);
        assert!(refused.unwrap_err().to_string().contains("was deleted"));
        assert_eq!(life.timelines.heard_of(key(1), 1).unwrap_err().to_string(), refused_text());
        drop(life);
        world.disk.lose_power();
        let life = world.open();
        assert!(life.timelines.keys() == [key(2)] && life.timelines.damaged().is_empty());
        assert!(life.get(2).is_ok());
    }
}

fn refused_text() -> String {
    RefusedReason::Mismatch(format!("timeline {} was deleted with its branch", key(1).1))
        .to_string()
}

/// Stops at each operation while what was deleted goes: it does not come to be damaged by that, and goes then.
#[test]
fn wherever_it_stops_while_what_was_deleted_goes_it_goes_in_the_end() {
    for operations in 0..8 {
        for seed in 0..4 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut log = life.found(1);
            log.commit(&life.get(1).unwrap(), 1000).unwrap();
            decide_deleted(&world, 1);
            world.disk.stop_after(operations);
            let _ = life.timelines.look_at_decision(key(1));
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            let what = format!("{operations} operations, seed {seed}");
            if !life.timelines.damaged().is_empty() {
                // The list of timelines still has it, and its directory is gone.
                panic!("{what}: {:?}", life.timelines.damaged());
            }
            life.timelines.look_at_decision(key(1)).unwrap();
            assert!(life.timelines.keys().is_empty(), "{what}");
            assert!(world.disk.list(&directory(1)).is_err(), "{what}");
        }
    }
}

/// Members were given up at `ends[1]`, and one of them is there after all: what it archives then is not believed, and it
/// takes nothing away.
#[test]
fn what_is_archived_by_who_was_given_up_is_not_of_the_log_that_goes_on() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let archive = world.archive();
    let parameters = nth(1);
    let ends: Vec<Lsn> = (0..4).map(|_| log.commit(&timeline, 3000).unwrap()).collect();
    let tail = |end: Lsn, configuration: u64| {
        let mut tail = timeline.read_tail(end).unwrap();
        tail.extent.configuration = configuration;
        tail
    };
    let put = |tail: &Tail| world.runtime.block_on(archive.put_tail(&parameters, tail)).unwrap();
    let last_record = tail(ends[1], 1).extent.last_record;
    let given_up = AllGivenUp::default().with(GivenUp { number: 2, lsn: ends[1], last_record });
    let newest = || world.runtime.block_on(archive.newest(&parameters, &given_up)).unwrap();
    let part = |to: Lsn| {
        let part = archive.part(&parameters, 1, to, &given_up);
        world.runtime.block_on(part).unwrap().unwrap()
    };
    // Up to there it is right, whoever archived it.
    put(&tail(ends[1], 1));
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    put(&tail(ends[3], 1));
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    let drop_tails = |to: Lsn, configuration: u64| {
        let dropped = archive.drop_tails(&parameters, to, configuration);
        world.runtime.block_on(dropped).unwrap();
    };
    drop_tails(ends[3], 1);
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    let (from, bytes) = part(ends[1]);
    assert_eq!((from, bytes.len() as u64), (START, ends[1] - START));
    assert_eq!(part(ends[2]).1.len() as u64, ends[1] - START);
    // The log goes on, and is archived; that stays.
    put(&tail(ends[2], 2));
    assert_eq!(newest(), Some(tail(ends[2], 2).extent));
    assert_eq!(part(ends[2]).1.len() as u64, ends[2] - START);
    drop_tails(ends[3], 1);
    assert_eq!(newest(), Some(tail(ends[2], 2).extent));
    // What is right, and said by who was given up, is said again.
    let replaced = |tail: &Tail| {
        let replaced = archive.replace_tail_given_up(&parameters, tail, &given_up);
        world.runtime.block_on(replaced).unwrap()
    };
    let of_before = archive.is_tail_of_before(&parameters, ends[3], 2);
    assert_eq!(world.runtime.block_on(of_before), Ok(true));
    assert!(!replaced(&tail(ends[3], 1)) && replaced(&tail(ends[3], 2)));
    assert!(!replaced(&tail(ends[3], 2)));
    assert_eq!(newest(), Some(tail(ends[3], 2).extent));
    drop_tails(ends[3], 2);
    assert_eq!(newest(), Some(tail(ends[3], 2).extent));
}
