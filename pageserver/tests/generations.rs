//! Two page servers on one object store: the older one must find out, and do no harm.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use pgstrata_blob::{Location, Store};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Lsn, TimelineId};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::remote::index_object;
use pgstrata_pageserver::timeline::Limits;
use pgstrata_pg_wal::PgVersion;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::faults::Faults;
use support::model::State;
use support::wal::History;
use support::{TENANT, archive, open, runtime};

const ID: TimelineId = TimelineId([7; 16]);
const ROLE: &str = "PGSTRATA_TEST_STALE_IN";

fn cluster() -> (Vec<u8>, State) {
    let state = State::first(&mut SmallRng::seed_from_u64(1));
    (archive(PgVersion::V15, &state), state)
}

fn history(start: Lsn, record_start: Lsn) -> History {
    let mut history = History::new(PgVersion::V15, start, record_start, Arc::new(cluster().1));
    history.grow(&mut SmallRng::seed_from_u64(2), 200);
    history
}

fn store_in(directory: &Path) -> Store {
    Store::open(&Location::Directory(directory.join("objects")), None).unwrap()
}

/// The older page server, in a process of its own, since it is to end.
fn stale_one(directory: &Path) {
    let runtime = runtime();
    let store = store_in(directory);
    let repository = open(&runtime, &store, &directory.join("old"), Limits::default()).unwrap();
    let timeline = repository.import(TENANT, ID, "main", &cluster().0[..]).unwrap();
    let history = history(timeline.info.start_lsn, timeline.info.start_record);
    let mut ingest = Ingest::new(Arc::clone(&timeline)).unwrap();
    ingest.feed(&history.bytes).unwrap();

    // Another one starts meanwhile, and writes.
    let newer = open(&runtime, &store, &directory.join("new"), Limits::default()).unwrap();
    let taken = newer.timeline(ID).unwrap();
    let mut again = Ingest::new(Arc::clone(&taken)).unwrap();
    again.feed(&history.bytes[..history.bytes.len() / 2]).unwrap();
    newer.shut_down();
    let object = index_object(TENANT, ID);
    let index = runtime.block_on(store.get(&object)).unwrap();
    std::fs::write(directory.join("index-of-newer"), &index).unwrap();

    println!("the older one writes");
    ingest.freeze_if_due(true);
    while timeline.frozen_layers() > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    println!("and went on");
}

#[test]
fn an_older_page_server_ends_and_leaves_the_newer_one_alone() {
    if let Some(directory) = std::env::var_os(ROLE) {
        return stale_one(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "an_older_page_server_ends_and_leaves_the_newer_one_alone",
            "--nocapture",
        ])
        .env(ROLE, directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the older one writes"), "{said} {complained}");
    assert!(!said.contains("and went on"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{complained}");
    assert!(complained.contains("another page server has taken over"), "{complained}");

    let runtime = runtime();
    let store = store_in(directory.path());
    let index = runtime.block_on(store.get(&index_object(TENANT, ID))).unwrap();
    let newer = std::fs::read(directory.path().join("index-of-newer")).unwrap();
    assert!(index == newer.as_slice(), "the older page server overwrote the newer one's index");
    for entry in TimelineIndex::decode(&index).unwrap().layers {
        let layer = format!("tenants/{TENANT}/timelines/{ID}/layers/{}", entry.name);
        runtime.block_on(store.get(&layer)).unwrap();
    }
    // And an older generation can't even open what a later one has.
    let error = runtime.block_on(async {
        let older = pgstrata_ids::Generation(1);
        pgstrata_pageserver::remote::RemoteIndex::open(&store, TENANT, ID, older)
            .await
            .err()
            .unwrap()
    });
    assert!(format!("{error:#}").contains("later generation"), "{error:#}");
}

#[test]
fn an_import_that_fails_never_was() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let truth = Store::open(&Location::Memory, None).unwrap();
    let faults = Arc::new(Faults::new(3));
    let store = truth.intercepted(Arc::clone(&faults) as _);
    let repository = open(&runtime, &store, directory.path(), Limits::default()).unwrap();
    faults.set(1000);
    let archive = cluster().0;
    let refused = repository.import(TENANT, ID, "main", &archive[..]).err().unwrap();
    assert!(format!("{refused:#}").contains("interceptor"), "{refused:#}");
    faults.set(0);
    assert!(repository.branches().is_empty());
    assert!(runtime.block_on(truth.get(&index_object(TENANT, ID))).unwrap_err().is_not_found());
    // The same again is not in its own way.
    repository.import(TENANT, ID, "main", &archive[..]).unwrap();
    let twice = repository.import(TENANT, ID, "other", &archive[..]).err().unwrap();
    assert!(format!("{twice:#}").contains("exists already"), "{twice:#}");
    repository.stop();
}

#[test]
fn a_local_directory_that_takes_nothing_is_no_reason_not_to_answer() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let store = Store::open(&Location::Memory, None).unwrap();
    let nowhere = directory.path().join("file");
    std::fs::write(&nowhere, "not a directory").unwrap();
    let limits = Limits { open_layer_bytes: 100_000, level0_layers: 2, ..Limits::default() };
    let repository = open(&runtime, &store, &nowhere, limits).unwrap();
    let timeline = repository.import(TENANT, ID, "main", &cluster().0[..]).unwrap();
    let history = history(timeline.info.start_lsn, timeline.info.start_record);
    let mut ingest = Ingest::new(Arc::clone(&timeline)).unwrap();
    history.bytes.chunks(10_000).for_each(|chunk| ingest.feed(chunk).unwrap());
    repository.shut_down();
    assert_eq!(timeline.remote_consistent_lsn(), history.end());

    let repository = open(&runtime, &store, &nowhere, limits).unwrap();
    let timeline = repository.timeline(ID).unwrap();
    let mut page = [0; 8192];
    let mut compared = 0;
    for (lsn, (_, state)) in history.states.iter().step_by(10) {
        for (rel, pages) in &state.relations {
            for (block, expected) in (0..).zip(pages) {
                timeline.block(*rel, block, *lsn, &mut page).unwrap();
                assert!(page == **expected, "block {block} of {rel} at {lsn}");
                compared += 1;
            }
        }
    }
    assert!(compared > 100);
    repository.stop();
}
