//! Faults that were found, each with the least that shows it.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgstrata_blob::{Interceptor, Location, Store, Verdict};
use pgstrata_ids::{Fork, Key, Lsn, RelTag, TimelineId};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::layer::{COMPLETE, Change, layer_object};
use pgstrata_pageserver::metrics::Metrics;
use pgstrata_pageserver::remote::index_object;
use pgstrata_pageserver::repository::Repository;
use pgstrata_pageserver::timeline::{Limits, Timeline, boundary_key};
use pgstrata_pageserver::value::{Boundary, BoundaryKind};
use pgstrata_pg_wal::{PgVersion, WalWriter, rmgr};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::model::{Operation, State, random_page};
use support::wal::History;
use support::{SEGMENT_SIZE, SYSTEM_ID, TENANT, archive, open, runtime};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const ID: TimelineId = TimelineId([7; 16]);
const OTHER: TimelineId = TimelineId([8; 16]);

struct World {
    runtime: Runtime,
    store: Store,
    directory: TempDir,
    repository: Arc<Repository>,
    timeline: Arc<Timeline>,
    state: State,
}

fn limits() -> Limits {
    // The background leaves alone what tests compact.
    Limits { level0_layers: 1000, ..Limits::default() }
}

impl World {
    fn new(store: Store, limits: Limits) -> World {
        let (runtime, directory) = (runtime(), tempfile::tempdir().unwrap());
        let state = State::first(&mut SmallRng::seed_from_u64(1));
        let repository = open(&runtime, &store, directory.path(), limits).unwrap();
        let archive = archive(PgVersion::V15, &state);
        let timeline = repository.import(TENANT, ID, "main", &archive[..]).unwrap();
        World { runtime, store, directory, repository, timeline, state }
    }

    fn in_memory() -> World {
        World::new(Store::open(&Location::Memory, None).unwrap(), limits())
    }

    fn history(&self) -> History {
        let info = &self.timeline.info;
        let state = Arc::new(self.state.clone());
        History::new(PgVersion::V15, info.start_lsn, info.start_record, state)
    }

    /// Ingests a part of a history, as one layer in the store.
    fn ingest(&self, history: &History, from: Lsn) {
        let mut ingest = Ingest::new(Arc::clone(&self.timeline)).unwrap();
        ingest.feed(&history.bytes[(from - history.start) as usize..]).unwrap();
        self.upload();
    }

    fn upload(&self) {
        self.timeline.freeze();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.timeline.frozen_layers() > 0 {
            assert!(std::time::Instant::now() < deadline, "nothing is uploaded");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Puts values into the open layer, as ingest would.
    fn put(&self, values: &[(Key, Lsn, u8, Vec<u8>)], end: Lsn) {
        let mut bytes = Vec::new();
        let mut changes = Vec::new();
        for (key, lsn, flags, value) in values {
            let start = bytes.len();
            bytes.extend_from_slice(value);
            changes.push(Change { key: *key, lsn: *lsn, flags: *flags, value: start..bytes.len() });
        }
        let open = self.timeline.open_layer();
        open.insert(&changes, &mut bytes, 1000, &mut Vec::new());
        open.set_end_lsn(end);
        self.timeline.progress.advance(end, Lsn(end.0 - 8));
    }

    fn local_layers(&self) -> Vec<PathBuf> {
        let directory = self.directory.path().join(ID.to_string());
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn check(&self, lsn: Lsn, state: &State) {
        let mut page = [0; 8192];
        for (rel, pages) in &state.relations {
            for (block, expected) in (0..).zip(pages) {
                self.timeline.block(*rel, block, lsn, &mut page).unwrap();
                assert!(page == **expected, "block {block} of {rel} at {lsn}");
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.repository.stop();
    }
}

const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 20_000, fork: Fork::Main };

fn patches(history: &mut History, rel: RelTag, count: u8) {
    for number in 0..count {
        history.append(&Operation::Patches(vec![(rel, 0, 7900, vec![number; 20])]));
    }
}

#[test]
fn l3_what_comes_after_a_dropped_directory_is_there() {
    let world = World::in_memory();
    let mut random = SmallRng::seed_from_u64(3);
    let mut history = world.history();
    history.append(&Operation::Create(REL));
    history.append(&Operation::Images(vec![
        (REL, 0, random_page(&mut random)),
        (REL, 1, random_page(&mut random)),
        (REL, 2, random_page(&mut random)),
    ]));
    // As `alter database set tablespace` does; then a table in the old place.
    history.append(&Operation::DatabaseDrop(5));
    history.append(&Operation::Create(REL));
    history.append(&Operation::Images(vec![(REL, 0, random_page(&mut random))]));
    patches(&mut history, REL, 30);
    history.append(&Operation::Images(vec![(REL, 2, random_page(&mut random))]));
    world.ingest(&history, history.start);
    let check = || {
        for (lsn, (_, state)) in &history.states {
            world.check(*lsn, state);
        }
    };
    check();
    world.timeline.compact().unwrap();
    check();
}

fn naive(commits: &[(Lsn, Boundary)], time: i64) -> Option<(Lsn, Boundary)> {
    commits.iter().take_while(|(_, boundary)| boundary.time <= time).last().copied()
}

#[test]
fn l19_times_that_step_back() {
    let world = World::in_memory();
    let start = world.timeline.info.start_lsn;
    let mut random = SmallRng::seed_from_u64(5);
    let mut commits = Vec::new();
    let mut values = Vec::new();
    let (mut lsn, mut clock) = (start, 1_000_000i64);
    for number in 0..400 {
        lsn = lsn + 8 * random.random_range(1..1_000_000);
        clock += random.random_range(0..1000);
        if number % 37 == 0 {
            clock -= random.random_range(0..20_000);
        }
        let boundary =
            Boundary { kind: BoundaryKind::Commit, time: clock, record_start: lsn.0 - 8 };
        let mut bytes = Vec::new();
        boundary.encode(&mut bytes);
        values.push((boundary_key(lsn), lsn, COMPLETE, bytes));
        commits.push((lsn, boundary));
    }
    world.put(&values, lsn);
    for (at, boundary) in commits.clone() {
        for time in [boundary.time - 1, boundary.time, boundary.time + 1] {
            let found = world.timeline.lsn_at_time(time, lsn).unwrap();
            assert_eq!(found, naive(&commits, time), "time {time}");
        }
        let until: Vec<_> = commits.iter().copied().filter(|(end, _)| *end <= at).collect();
        let found = world.timeline.lsn_at_time(boundary.time, at).unwrap();
        assert_eq!(found, naive(&until, boundary.time));
    }
    assert_eq!(world.timeline.lsn_at_time(i64::MAX, lsn).unwrap(), commits.last().copied());
}

#[test]
fn h9_a_rotten_local_copy_heals_in_compaction() {
    let world = World::in_memory();
    let mut random = SmallRng::seed_from_u64(4);
    let mut history = world.history();
    for _ in 0..3 {
        let from = history.end();
        history.grow(&mut random, 100);
        world.ingest(&history, from);
    }
    for path in world.local_layers() {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 3;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    assert_eq!(world.timeline.compact().unwrap(), 3);
    for (lsn, (_, state)) in history.states.iter().step_by(17) {
        world.check(*lsn, state);
    }
}

#[test]
fn h19_a_page_that_cannot_be_made_stops_nothing_but_its_reads() {
    let world = World::in_memory();
    let mut random = SmallRng::seed_from_u64(6);
    let mut history = world.history();
    history.append(&Operation::Create(REL));
    history.append(&Operation::Images(vec![(REL, 0, random_page(&mut random))]));
    patches(&mut history, REL, 25);
    world.ingest(&history, history.start);
    // Changes that redo refuses, on another page, as many as make an image due.
    let bad = RelTag { rel: 30_000, ..REL };
    let end = history.end();
    let values: Vec<_> = (1..=30)
        .map(|number| (Key::rel_block(bad, 0), end + 8 * number, 0, vec![0xEE; 40]))
        .chain([(boundary_key(end + 240), end + 240, COMPLETE, {
            let mut bytes = Vec::new();
            Boundary { kind: BoundaryKind::Other, time: 0, record_start: end.0 + 232 }
                .encode(&mut bytes);
            bytes
        })])
        .collect();
    world.put(&values, end + 240);
    world.upload();
    assert_eq!(world.timeline.compact().unwrap(), 2);
    world.check(end, &history.states[&end].1);
    let mut page = [0; 8192];
    assert!(world.timeline.existing_block(bad, 0, end + 240, &mut page).is_err());
    let (unreadable, why) = world.timeline.unmakeable();
    assert!(unreadable == 1 && why.unwrap().contains("1663/5/30000"));
    // Nothing of it is lost.
    assert_eq!(
        world.timeline.history(&Key::rel_block(bad, 0), Lsn(0), Lsn::MAX).unwrap().len(),
        30
    );
}

#[test]
fn h10_a_failed_compaction_leaves_no_local_files() {
    use support::faults::Faults;
    let faults = Arc::new(Faults::new(1));
    let store = Store::open(&Location::Memory, None).unwrap().intercepted(Arc::clone(&faults) as _);
    let world = World::new(store, limits());
    let mut history = world.history();
    history.grow(&mut SmallRng::seed_from_u64(4), 100);
    world.ingest(&history, history.start);
    let before = world.local_layers();
    faults.set_for_indexes(1000);
    for _ in 0..3 {
        assert!(world.timeline.compact().is_err());
    }
    faults.set_for_indexes(0);
    assert_eq!(world.local_layers(), before);
    assert_eq!(world.timeline.compact().unwrap(), 1);
    world.check(history.end(), &history.states[&history.end()].1);
}

#[test]
fn h11_a_corrupt_index_fails_its_timeline_only() {
    let world = World::in_memory();
    let archive = archive(PgVersion::V15, &world.state);
    world.repository.import(TENANT, OTHER, "other", &archive[..]).unwrap();
    world
        .repository
        .create_branch("child", "main", pgstrata_pageserver::repository::Moment::Now)
        .unwrap();
    world.repository.stop();
    let object = index_object(TENANT, ID);
    let mut bytes = world.runtime.block_on(world.store.get(&object, u64::MAX)).unwrap().to_vec();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    world.runtime.block_on(world.store.put(&object, bytes.into())).unwrap();
    let again = tempfile::tempdir().unwrap();
    let repository = open(&world.runtime, &world.store, again.path(), limits()).unwrap();
    let names: Vec<_> = repository.branches().iter().map(|branch| branch.name()).collect();
    assert_eq!(names, ["other"]);
    let broken = repository.broken();
    assert!(broken[&ID].error.contains("checksum"), "{}", broken[&ID].error);
    let child = broken.values().find(|broken| broken.name.as_deref() == Some("child")).unwrap();
    assert!(child.error.contains("ancestor"), "{}", child.error);
    let refused = repository.timeline(ID).err().unwrap().to_string();
    assert!(refused.contains("not served") && refused.contains("checksum"), "{refused}");
    let taken = repository.import(TENANT, ID, "main", &archive[..]).err().unwrap().to_string();
    assert!(taken.contains("exists already"), "{taken}");
    // What can't be read may have any name.
    let third = TimelineId([9; 16]);
    let taken = repository.import(TENANT, third, "main", &archive[..]).err().unwrap().to_string();
    assert!(taken.contains("can't be read"), "{taken}");
    repository.stop();
}

#[test]
fn l15_exchanged_layers_are_refused() {
    let small = Limits { layer_bytes: 20_000, ..limits() };
    let world = World::new(Store::open(&Location::Memory, None).unwrap(), small);
    let mut random = SmallRng::seed_from_u64(9);
    let mut history = world.history();
    history.append(&Operation::Create(REL));
    for block in 0..30 {
        let mut page = *random_page(&mut random);
        rand::Rng::fill_bytes(&mut random, &mut page[100..]);
        history.append(&Operation::Images(vec![(REL, block, Arc::new(page))]));
    }
    world.ingest(&history, history.start);
    world.timeline.compact().unwrap();
    world.repository.stop();
    let mut runs: BTreeMap<(Lsn, Lsn), Vec<String>> = BTreeMap::new();
    for file in world.timeline.layer_files() {
        runs.entry((file.start_lsn, file.end_lsn)).or_default().push(file.entry.name.clone());
    }
    let run = runs.values().find(|run| run.len() > 2).unwrap();
    let [a, b] = [0, 1].map(|at| layer_object(TENANT, ID, &run[at]));
    world.runtime.block_on(async {
        let [one, two] = [
            world.store.get(&a, u64::MAX).await.unwrap(),
            world.store.get(&b, u64::MAX).await.unwrap(),
        ];
        world.store.put(&a, two).await.unwrap();
        world.store.put(&b, one).await.unwrap();
    });
    let again = tempfile::tempdir().unwrap();
    let repository = open(&world.runtime, &world.store, again.path(), small).unwrap();
    let timeline = repository.timeline(ID).unwrap();
    let mut refused = 0;
    for (rel, pages) in &history.states[&history.end()].1.relations {
        for (block, expected) in (0..).zip(pages) {
            let mut page = [0; 8192];
            match timeline.block(*rel, block, history.end(), &mut page) {
                Ok(()) => assert!(page == **expected, "block {block} of {rel} is another version"),
                Err(error) => {
                    assert!(format!("{error:#}").contains("restore it"), "{error:#}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0);
    repository.stop();
}

/// A store whose writes of layers panic or fail on command.
#[derive(Debug, Default)]
struct Trap {
    panics: AtomicBool,
    fails: AtomicBool,
}

impl Interceptor for Trap {
    fn verdict(&self, action: &'static str, path: &str) -> Verdict {
        if action != "write" || !path.contains("/layers/") {
            return Verdict::Perform;
        }
        assert!(!self.panics.load(Ordering::SeqCst), "the trap");
        match self.fails.load(Ordering::SeqCst) {
            true => Verdict::Refuse,
            false => Verdict::Perform,
        }
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn h8_a_thread_that_panics_is_reported_and_goes_on() {
    let trap = Arc::new(Trap::default());
    let store = Store::open(&Location::Memory, None).unwrap().intercepted(Arc::clone(&trap) as _);
    let world = World::new(store, limits());
    let mut history = world.history();
    history.grow(&mut SmallRng::seed_from_u64(4), 100);
    trap.panics.store(true, Ordering::SeqCst);
    let mut ingest = Ingest::new(Arc::clone(&world.timeline)).unwrap();
    ingest.feed(&history.bytes).unwrap();
    world.timeline.freeze();
    until("it is not reported", || !world.repository.panics().is_empty());
    assert!(world.repository.panics()[0].contains("the trap"));
    assert!(world.timeline.trouble("flush").unwrap().contains("the trap"));
    trap.panics.store(false, Ordering::SeqCst);
    until("it does not go on", || world.timeline.remote_consistent_lsn() == history.end());
    until("it is still in trouble", || world.timeline.trouble("flush").is_none());
}

#[test]
fn h18_failing_uploads_are_seen() {
    let trap = Arc::new(Trap::default());
    let store = Store::open(&Location::Memory, None).unwrap().intercepted(Arc::clone(&trap) as _);
    let world = World::new(store, limits());
    let mut history = world.history();
    history.grow(&mut SmallRng::seed_from_u64(4), 100);
    trap.fails.store(true, Ordering::SeqCst);
    let mut ingest = Ingest::new(Arc::clone(&world.timeline)).unwrap();
    ingest.feed(&history.bytes).unwrap();
    world.timeline.freeze();
    until("no trouble", || world.timeline.trouble("flush").is_some());
    let metrics = Metrics::new().unwrap();
    metrics.observe(&world.timeline);
    metrics.observe_repository(&world.repository);
    let text = metrics.text().unwrap();
    assert!(text.contains("upload_failing{branch=\"main\"} 1"), "{text}");
    assert!(text.contains("background_failures{job=\"flush\"} "), "{text}");
    trap.fails.store(false, Ordering::SeqCst);
    until("it does not recover", || world.timeline.trouble("flush").is_none());
}

#[test]
fn h2_a_directory_that_hangs_is_seen_and_what_it_does_later_is_taken_in() {
    use rustix::fs::{FlockOperation, flock};
    let objects = tempfile::tempdir().unwrap();
    let store = Store::open(&Location::Directory(objects.path().to_owned()), None).unwrap();
    let world = World::new(store.with_patience(Duration::from_secs(3)), limits());
    let mut history = world.history();
    history.grow(&mut SmallRng::seed_from_u64(4), 100);
    // Indexes can't be written, as on a network file system whose server is away.
    let lock = std::fs::File::open(objects.path().join(".lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut ingest = Ingest::new(Arc::clone(&world.timeline)).unwrap();
    ingest.feed(&history.bytes).unwrap();
    world.timeline.freeze();
    let says = |trouble: String| trouble.contains("has not answered for 3 s");
    until("the hang is not told", || world.timeline.trouble("flush").is_some_and(says));
    // Nobody waits for the first write any more when it is done; the next attempt finds it.
    drop(lock);
    until("it does not recover", || world.timeline.trouble("flush").is_none());
    assert_eq!(world.timeline.remote_consistent_lsn(), history.end());
    // The index names layers that are there.
    let there = |name: &str| store.local_path(&layer_object(TENANT, ID, name)).unwrap().exists();
    let layers = world.timeline.layer_files();
    assert!(layers.iter().all(|file| there(&file.entry.name)));
    let again = open(&world.runtime, &store, world.directory.path(), limits()).unwrap();
    let timeline = again.branch("main").unwrap();
    assert_eq!(timeline.remote_consistent_lsn(), history.end());
    assert_eq!(timeline.layer_files().len(), layers.len());
    again.shut_down();
}

#[test]
fn h3_a_thousand_layers_take_a_bounded_number_of_descriptors() {
    let world = World::in_memory();
    let mut history = world.history();
    let mut ends = Vec::new();
    for number in 0..150 {
        let from = history.end();
        history.append(&Operation::Commit { xid: 1000 + number, time: 1, drops: Vec::new() });
        world.ingest(&history, from);
        ends.push(history.end());
    }
    let open = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let ours = |link: PathBuf| link.starts_with(world.directory.path());
        links.filter(|link| std::fs::read_link(link.path()).is_ok_and(ours)).count()
    };
    for _ in 0..2 {
        let found = world.timeline.lsn_at_time(i64::MAX, history.end()).unwrap();
        assert_eq!(found.unwrap().0, history.end());
    }
    assert!(world.timeline.layer_files().len() > 150);
    // The capacity of the test's cache is 32.
    assert!(open() <= 40, "{} files are open", open());
}

/// A record of the resource manager, with main data only.
fn record(resource: u8, info: u8, main: &[u8], prev: Lsn) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes.push(254);
    bytes.extend_from_slice(&(main.len() as u32).to_le_bytes());
    bytes.extend_from_slice(main);
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes[8..16].copy_from_slice(&prev.0.to_le_bytes());
    bytes[16] = info;
    bytes[17] = resource;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[24..]), &bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn feed_record(world: &World, bytes: Vec<u8>) -> Result<(), String> {
    let writer = WalWriter {
        version: PgVersion::V15,
        tli: 1,
        system_identifier: SYSTEM_ID,
        segment_size: SEGMENT_SIZE.into(),
    };
    let placed = writer.place(world.timeline.progress.lsn(), bytes);
    let mut ingest = Ingest::new(Arc::clone(&world.timeline)).unwrap();
    for chunk in placed.bytes.chunks(128 * 1024) {
        ingest.feed(chunk).map_err(|error| error.to_string())?;
    }
    assert_eq!(world.timeline.progress.lsn(), placed.end);
    Ok(())
}

#[test]
fn h1_a_record_of_a_hundred_megabytes_is_ingested() {
    let world = World::in_memory();
    let message = vec![b'x'; 100 << 20];
    let (_, prev) = world.timeline.progress.last_record();
    feed_record(&world, record(rmgr::LOGICAL_MESSAGE, 0, &message, prev)).unwrap();
    // What nobody reads again is not kept.
    assert!(world.timeline.open_layer().size() < 1 << 20);
}

#[test]
fn h1_a_commit_of_a_hundred_thousand_relations_is_ingested() {
    let world = World::in_memory();
    let mut main = 77i64.to_le_bytes().to_vec();
    main.extend_from_slice(&(1u32 << 2).to_le_bytes());
    main.extend_from_slice(&100_000u32.to_le_bytes());
    for rel in 0..100_000u32 {
        for word in [1663, 5, 100_000 + rel] {
            main.extend_from_slice(&u32::to_le_bytes(word));
        }
    }
    let (_, prev) = world.timeline.progress.last_record();
    feed_record(&world, record(rmgr::TRANSACTION, 0x80, &main, prev)).unwrap();
}

#[test]
fn l1_wal_level_minimal_is_met_with_an_error() {
    let world = World::in_memory();
    let mut main = Vec::new();
    for word in [100u32, 8, 0, 0, 64, 0] {
        main.extend_from_slice(&word.to_le_bytes());
    }
    main.extend_from_slice(&[0, 0]);
    let (_, prev) = world.timeline.progress.last_record();
    let refused = feed_record(&world, record(rmgr::XLOG, 0x60, &main, prev)).unwrap_err();
    assert!(refused.contains("wal_level=minimal"), "{refused}");
}

#[test]
fn l17_a_promoted_cluster_is_imported() {
    let mut control = support::control(PgVersion::V15);
    control.checkpoint_copy.this_tli = 3;
    control.checkpoint_copy.prev_tli = 3;
    let unlogged = [
        ("base/5/16400_init", &[0u8; 8192][..]),
        ("base/5/16400", &[1u8; 16384][..]),
        ("base/5/16400_vm", &[1u8; 8192][..]),
        ("base/5/16401", &[1u8; 8192][..]),
    ];
    let mut archive = tar::Builder::new(Vec::new());
    let control = control.encode();
    let files = unlogged.into_iter().chain([("global/pg_control", &control[..])]);
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, content).unwrap();
    }
    let (runtime, directory) = (runtime(), tempfile::tempdir().unwrap());
    let store = Store::open(&Location::Memory, None).unwrap();
    let repository = open(&runtime, &store, directory.path(), limits()).unwrap();
    let archive = archive.into_inner().unwrap();
    let timeline = repository.import(TENANT, ID, "main", &archive[..]).unwrap();
    let lsn = timeline.info.start_lsn;
    assert_eq!(timeline.control_state(lsn).unwrap().tli, 1);
    let size = |rel, fork| timeline.rel_size(RelTag { rel, fork, ..REL }, lsn).unwrap().blocks;
    assert_eq!(size(16400, Fork::Init), Some(1));
    assert_eq!(size(16400, Fork::Main), None, "rows of an unlogged relation came along");
    assert_eq!(size(16400, Fork::Visibility), None);
    assert_eq!(size(16401, Fork::Main), Some(1));
    repository.stop();
}
