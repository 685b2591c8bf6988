//! The page server against a model, at every LSN, whatever happens in between: random WAL in random
//! pieces, freezes, flushes, compactions, branches of branches, deletions, crashes that lose what was
//! not uploaded and the local directory too, and an object store that fails.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use pgstrata_blob::{Location, Store};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Fork, Lsn, RelTag, SlruKind, TimelineId};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::remote::index_object;
use pgstrata_pageserver::repository::{Moment, Repository};
use pgstrata_pageserver::timeline::{Limits, Timeline};
use pgstrata_pg_wal::PgVersion;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use support::faults::Faults;
use support::model::State;
use support::wal::{FORKS, History};
use support::{SEGMENT_SIZE, TENANT, archive, open, runtime};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const STEPS: usize = 80;

fn limits() -> Limits {
    Limits {
        // Freezes are made by the test; the background threads flush and compact as they like.
        open_layer_bytes: 1 << 30,
        open_layer_seconds: 3600,
        frozen_layers: 1000,
        level0_layers: 4,
        layer_bytes: 40_000,
        chain: 8,
        compacted_chain: 4,
    }
}

struct Branch {
    id: TimelineId,
    name: String,
    parent: Option<usize>,
    history: History,
    ingest: Option<Ingest>,
    /// What was said to be in the object store.
    remote: Lsn,
    deleted: bool,
}

struct World {
    seed: u64,
    random: SmallRng,
    runtime: Runtime,
    /// Never fails.
    truth: Store,
    store: Store,
    faults: Arc<Faults>,
    directory: TempDir,
    repository: Arc<Repository>,
    branches: Vec<Branch>,
    names: u32,
    /// What was compared, so that a test that compares nothing is found out.
    compared: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = SmallRng::seed_from_u64(seed);
        let runtime = runtime();
        let directory = TempDir::with_prefix("pgstrata-model-").unwrap();
        let location = match seed % 2 {
            0 => Location::Memory,
            _ => Location::Directory(directory.path().join("objects")),
        };
        let truth = Store::open(&location, None).unwrap();
        let faults = Arc::new(Faults::new(seed));
        let store = truth.intercepted(Arc::clone(&faults) as _);
        let version = *PgVersion::ALL.choose(&mut random).unwrap();
        let state = State::first(&mut random);
        let id = TimelineId([7; 16]);
        let tar = archive(version, &state);
        let mut repository = open(&runtime, &store, &layers(&directory), limits()).unwrap();
        faults.set(if random.random_bool(0.5) { 300 } else { 0 });
        let timeline = loop {
            match repository.import(TENANT, id, "main", &tar[..]) {
                Ok(timeline) => break timeline,
                Err(error) => {
                    assert!(faults.are_on(), "{error:#}");
                    faults.set(0);
                    // The answer that got lost may have been that of the index.
                    repository.stop();
                    repository = open(&runtime, &store, &layers(&directory), limits()).unwrap();
                    assert!(repository.broken().is_empty(), "nothing fails now");
                    if let Ok(timeline) = repository.timeline(id) {
                        break timeline;
                    }
                    assert!(repository.all().is_empty(), "half an import is left");
                }
            }
        };
        faults.set(0);
        let info = &timeline.info;
        assert_eq!(info.start_lsn.0 % u64::from(SEGMENT_SIZE), 0);
        let history = History::new(version, info.start_lsn, info.start_record, Arc::new(state));
        let main = Branch {
            id,
            name: "main".into(),
            parent: None,
            remote: info.start_lsn,
            history,
            ingest: None,
            deleted: false,
        };
        let mut world = World {
            seed,
            random,
            runtime,
            truth,
            store,
            faults,
            directory,
            repository,
            branches: vec![main],
            names: 0,
            compared: 0,
        };
        world.check_everything();
        world
    }

    fn timeline(&self, at: usize) -> Arc<Timeline> {
        self.repository.timeline(self.branches[at].id).unwrap()
    }

    fn some_branch(&mut self) -> usize {
        let live: Vec<_> =
            (0..self.branches.len()).filter(|at| !self.branches[*at].deleted).collect();
        *live.choose(&mut self.random).unwrap()
    }

    /// What the branch is at `lsn`, with the end and the start of the last record before.
    fn expected(&self, at: usize, lsn: Lsn) -> (Lsn, Lsn, Arc<State>) {
        let mut at = at;
        loop {
            let branch = &self.branches[at];
            match branch.history.at(lsn) {
                Some((end, start, state)) => return (end, start, Arc::clone(state)),
                None => at = branch.parent.expect("before the beginning"),
            }
        }
    }

    fn step(&mut self) {
        let at = self.some_branch();
        match self.random.random_range(0..100) {
            0..45 => self.grow_and_feed(at),
            45..58 => {
                if let Some(ingest) = &mut self.branches[at].ingest {
                    ingest.freeze_if_due(true);
                }
                // As after a batch that leaves the layer due at once.
                self.timeline(at).request_freeze();
            }
            58..66 => {
                let flushed = self.timeline(at).flush_one();
                assert!(flushed.is_ok() || self.faults.are_on(), "{flushed:?}");
            }
            66..74 => {
                // Twice at once, as somebody who asks for it and the background may; and the second
                // one finds more to compact.
                if let Some(ingest) = &mut self.branches[at].ingest {
                    ingest.freeze_if_due(true);
                }
                let timeline = self.timeline(at);
                let flushed = || timeline.flush_one().and_then(|_| timeline.compact());
                std::thread::scope(|scope| {
                    let threads = [scope.spawn(|| timeline.compact()), scope.spawn(flushed)];
                    for compacted in threads.map(|thread| thread.join().unwrap()) {
                        assert!(compacted.is_ok() || self.faults.are_on(), "{compacted:?}");
                    }
                });
            }
            74..82 => self.branch(at),
            82..86 => self.delete(at),
            86..92 => self.reopen(),
            92..95 => self.faults.set(*[50, 300, 1000].choose(&mut self.random).unwrap()),
            95..98 => self.faults.set_for_indexes(600),
            _ => self.faults.set(0),
        }
    }

    fn grow_and_feed(&mut self, at: usize) {
        let timeline = self.timeline(at);
        let branch = &mut self.branches[at];
        let records = self.random.random_range(0..60);
        branch.history.grow(&mut self.random, records);
        if timeline.wait(timeline.info.start_lsn, std::time::Duration::ZERO).is_err() {
            // Its ancestor has to ingest again first.
            return;
        }
        if branch.ingest.is_none() {
            match Ingest::new(timeline) {
                Ok(ingest) => branch.ingest = Some(ingest),
                Err(error) => return assert!(self.faults.are_on(), "{error:#}"),
            }
        }
        let ingest = branch.ingest.as_mut().unwrap();
        let first = (ingest.position() - branch.history.start) as usize;
        let mut rest = &branch.history.bytes[first..];
        let mut left = self.random.random_range(0..200_000usize).min(rest.len());
        while left > 0 {
            let largest = if self.random.random_bool(0.3) { 100 } else { 100_000 };
            let size = self.random.random_range(1..=largest).min(left);
            if let Err(error) = ingest.feed(&rest[..size]) {
                assert!(self.faults.are_on(), "{error:#}");
                branch.ingest = None;
                return;
            }
            (rest, left) = (&rest[size..], left - size);
        }
    }

    fn branch(&mut self, at: usize) {
        let live = self.branches.iter().filter(|branch| !branch.deleted).count();
        if live >= 6 {
            return;
        }
        let timeline = self.timeline(at);
        let end = timeline.progress.lsn();
        let oldest = timeline.oldest_lsn();
        let moment = match self.random.random_bool(0.3) {
            true => Moment::Now,
            false => Moment::Lsn(Lsn(self.random.random_range(oldest.0..=end.0))),
        };
        if timeline.wait(timeline.info.start_lsn, std::time::Duration::ZERO).is_err() {
            // It would wait for its ancestors, which only this test feeds.
            return;
        }
        self.names += 1;
        let name = format!("b{}", self.names);
        let created = self.repository.create_branch(&name, &self.branches[at].name, moment);
        let child = match created {
            Ok(child) => child,
            Err(error) => return assert!(self.faults.are_on(), "{error:#}"),
        };
        let start = child.info.start_lsn;
        let (wanted, record_start, state) = match moment {
            Moment::Lsn(lsn) => {
                assert!(start <= lsn, "{start} is after {lsn}");
                self.expected(at, start)
            }
            _ => self.expected(at, end),
        };
        assert_eq!((start, child.info.start_record), (wanted, record_start), "no boundary");
        // The timeline that it really hangs on.
        let parent = child.ancestor.as_ref().unwrap().0.info.id;
        let parent = self.branches.iter().position(|branch| branch.id == parent).unwrap();
        let history = History::new(self.branches[at].history.version, start, record_start, state);
        self.branches.push(Branch {
            id: child.info.id,
            name,
            parent: Some(parent),
            remote: start,
            history,
            ingest: None,
            deleted: false,
        });
    }

    fn delete(&mut self, at: usize) {
        if at == 0 {
            return;
        }
        // Asked of the page server, not of the model: a branch whose creation failed may be there,
        // if the store failed right after it was written.
        let id = self.branches[at].id;
        let is_child = |other: &Arc<Timeline>| {
            other.ancestor.as_ref().is_some_and(|(parent, _)| parent.info.id == id)
        };
        let child = self.repository.branches().iter().any(is_child);
        let known = self.branches.iter().any(|other| other.parent == Some(at) && !other.deleted);
        assert!(child || !known, "a child is gone");
        let name = &self.branches[at].name;
        let delete =
            || self.repository.branch(name).and_then(|found| self.repository.delete_branch(&found));
        let deleted = delete();
        if child {
            assert!(deleted.is_err(), "deleted under its children");
        } else if let Err(error) = deleted {
            assert!(self.faults.are_on(), "{error:#}");
            self.faults.set(0);
            delete().unwrap();
        }
        self.branches[at].deleted = !child;
        self.branches[at].ingest = if child { self.branches[at].ingest.take() } else { None };
    }

    /// The process ends, cleanly or not, and another one starts.
    fn reopen(&mut self) {
        let clean = self.random.random_bool(0.3);
        self.branches.iter_mut().for_each(|branch| branch.ingest = None);
        match clean {
            true => self.repository.shut_down(),
            false => self.repository.stop(),
        }
        let clean = clean && !self.faults.are_on();
        let ingested: Vec<_> = self
            .branches
            .iter()
            .map(|branch| (branch.deleted, self.repository.timeline(branch.id)))
            .collect();
        if self.random.random_bool(0.7) {
            let _ = std::fs::remove_dir_all(layers(&self.directory));
        }
        let again = open(&self.runtime, &self.store, &layers(&self.directory), limits());
        self.repository = again.unwrap_or_else(|error| {
            assert!(self.faults.are_on(), "{error:#}");
            self.faults.set(0);
            open(&self.runtime, &self.store, &layers(&self.directory), limits()).unwrap()
        });
        // What the store did not give at first comes once it answers.
        if !self.repository.broken().is_empty() {
            assert!(self.faults.are_on());
            self.faults.set(0);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while !self.repository.broken().is_empty() {
                assert!(std::time::Instant::now() < deadline, "{:?}", self.repository.broken());
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        for (at, (deleted, before)) in ingested.into_iter().enumerate() {
            let now = self.timeline(at);
            let before = before.unwrap().progress.lsn();
            let reached = now.progress.lsn();
            assert_eq!(reached, now.remote_consistent_lsn());
            assert!(reached >= self.branches[at].remote, "what was durable is lost");
            assert!(reached <= before, "ahead of what was ever ingested");
            assert!(reached == before || !clean || deleted, "a clean end loses nothing");
            assert_eq!(now.is_deleted(), self.branches[at].deleted);
        }
    }

    /// What `remote_consistent_lsn` promises is in the store: the index says so, and what it names
    /// is there.
    fn check_durable(&mut self, at: usize) {
        let timeline = self.timeline(at);
        let branch = &mut self.branches[at];
        let said = timeline.remote_consistent_lsn();
        assert!(said >= branch.remote, "it went back");
        branch.remote = said;
        let object = index_object(TENANT, branch.id);
        let truth = &self.truth;
        let read = || {
            TimelineIndex::decode(&self.runtime.block_on(truth.get(&object, u64::MAX)).unwrap())
                .unwrap()
        };
        let index = read();
        let durable: Lsn = index.remote_consistent_lsn.parse().unwrap();
        assert!(durable >= said, "{said} was said to be durable, and {durable} is");
        for entry in &index.layers {
            let layer = format!("tenants/{TENANT}/timelines/{}/layers/{}", branch.id, entry.name);
            if self.runtime.block_on(truth.get_range(&layer, 0..1)).is_err() {
                let named = read().layers.iter().any(|other| other.name == entry.name);
                assert!(!named, "{layer} is named and not there");
            }
        }
        self.compared += 1;
    }

    /// Everything about a branch at an LSN. With `forgiving`, an error is no answer, and right.
    fn compare(&mut self, at: usize, lsn: Lsn, forgiving: bool) {
        let (_, _, state) = self.expected(at, lsn);
        match compare(&self.timeline(at), lsn, &state, &mut self.random) {
            Ok(compared) => self.compared += compared,
            Err(error) => assert!(
                forgiving || self.faults.are_on(),
                "seed {}, branch {} at {lsn}: {error:#}",
                self.seed,
                self.branches[at].name
            ),
        }
    }

    fn check(&mut self) {
        for _ in 0..4 {
            let at = self.some_branch();
            self.check_durable(at);
            let timeline = self.timeline(at);
            let (oldest, end) = (timeline.oldest_lsn(), timeline.progress.lsn());
            let lsn = match self.random.random_bool(0.3) {
                true => end,
                false => Lsn(self.random.random_range(oldest.0..=end.0)),
            };
            // An ancestor that has to ingest again can't answer for its branches: it must not try.
            let behind = timeline.wait(lsn, std::time::Duration::ZERO).is_err();
            self.compare(at, lsn, behind);
        }
    }

    /// Every branch at every LSN where something happened, with everything ingested.
    fn check_everything(&mut self) {
        self.faults.set(0);
        for at in 0..self.branches.len() {
            if self.branches[at].deleted {
                continue;
            }
            let timeline = self.timeline(at);
            let branch = &mut self.branches[at];
            let mut ingest =
                branch.ingest.take().unwrap_or_else(|| Ingest::new(Arc::clone(&timeline)).unwrap());
            let first = (ingest.position() - branch.history.start) as usize;
            ingest.feed(&branch.history.bytes[first..]).unwrap();
            branch.ingest = Some(ingest);
            assert_eq!(timeline.progress.lsn(), branch.history.end());
            let lsns: Vec<_> = branch.history.states.keys().copied().collect();
            // All of few, some of many.
            let kept = 40.0 / lsns.len() as f64;
            for lsn in lsns {
                if self.random.random_bool(kept.min(1.0)) {
                    self.compare(at, lsn, false);
                }
            }
            self.compare(at, timeline.progress.lsn(), false);
            self.check_durable(at);
        }
    }
}

fn layers(directory: &TempDir) -> std::path::PathBuf {
    directory.path().join("layers")
}

/// Compares a timeline with the model. An error is one that the page server reported; a wrong answer
/// panics. Returns how much was compared.
fn compare(
    timeline: &Timeline,
    lsn: Lsn,
    state: &State,
    random: &mut SmallRng,
) -> anyhow::Result<u64> {
    let mut compared = 0;
    let control = timeline.control_state(lsn)?;
    assert_eq!(control.next_xid, state.next_xid, "the next transaction at {lsn}");
    let databases: BTreeSet<_> = timeline.databases(lsn)?.into_iter().collect();
    let expected: BTreeSet<_> = state.databases.iter().map(|db| (1663, *db)).collect();
    assert_eq!(databases, expected, "databases at {lsn}");
    for (spc, db) in [(1664, 0), (1663, 5), (1663, 6), (1663, 7), (1663, 8), (1663, 9)] {
        let found = timeline.relations(spc, db, lsn)?;
        let expected: Vec<_> = state
            .relations
            .iter()
            .filter(|(rel, _)| (rel.spc, rel.db) == (spc, db))
            .map(|(rel, pages)| (*rel, pages.len() as u32))
            .collect();
        assert_eq!(found, expected, "relations of {spc}/{db} at {lsn}");
        for rel in (16384..16388).flat_map(|rel| FORKS.map(|fork| RelTag { spc, db, rel, fork })) {
            let size = timeline.rel_size(rel, lsn)?.blocks;
            assert_eq!(
                size,
                state.relations.get(&rel).map(|pages| pages.len() as u32),
                "{rel} at {lsn}"
            );
            assert!(rel.fork != Fork::FreeSpace);
            compared += 1;
        }
    }
    let mut page = [0; 8192];
    for (rel, pages) in &state.relations {
        for (block, expected) in (0..).zip(pages) {
            if random.random_bool(0.3) {
                timeline.block(*rel, block, lsn, &mut page)?;
                let same = page == **expected;
                assert!(
                    same,
                    "block {block} of {rel} at {lsn} differs in timeline {}",
                    timeline.info.id
                );
                compared += 1;
            }
        }
        let past = timeline.block(*rel, pages.len() as u32, lsn, &mut page);
        assert!(past.is_err(), "a block past the end of {rel} at {lsn}");
    }
    let extent: Vec<_> = timeline.slru_extent(SlruKind::Clog, lsn)?.pages().collect();
    assert_eq!(extent, state.clog.keys().copied().collect::<Vec<_>>(), "pages of pg_xact at {lsn}");
    for (number, expected) in &state.clog {
        timeline.slru_page(SlruKind::Clog, *number, lsn, &mut page)?;
        assert!(page == **expected, "page {number} of pg_xact at {lsn}");
        compared += 1;
    }
    Ok(compared)
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
        world.check();
    }
    world.check_everything();
    // What a page server finds that knows nothing but the object store.
    world.branches.iter_mut().for_each(|branch| branch.ingest = None);
    world.repository.shut_down();
    let _ = std::fs::remove_dir_all(layers(&world.directory));
    world.repository =
        open(&world.runtime, &world.store, &layers(&world.directory), limits()).unwrap();
    world.check_everything();
    world.repository.stop();
    assert!(world.compared > 1000, "only {} comparisons", world.compared);
}

#[test]
fn equals_the_model_at_every_lsn() {
    if let Ok(seed) = std::env::var("PGSTRATA_TEST_SEED") {
        return run(seed.parse().unwrap());
    }
    let seeds = if std::env::var_os("PGSTRATA_TEST_ALL").is_some() { 300 } else { 24 };
    for seed in 0..seeds {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("the seed was {seed}: PGSTRATA_TEST_SEED={seed} repeats it");
            std::panic::resume_unwind(panic);
        }
    }
}
