//! Two page servers on one object store: the older one must find out, and do no harm.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pgstrata_blob::claim::{Claim, Place};
use pgstrata_blob::{Interceptor, Location, Store, Verdict};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Lsn, TimelineId};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::remote::index_object;
use pgstrata_pageserver::repository::FLUSH;
use pgstrata_pageserver::timeline::Limits;
use pgstrata_pg_wal::PgVersion;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::faults::Faults;
use support::model::State;
use support::process::{Process, command};
use support::wal::History;
use support::{TENANT, archive, open, runtime};

const ID: TimelineId = TimelineId([7; 16]);

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

#[test]
fn h11_an_older_page_server_lets_go_and_leaves_the_newer_one_alone() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
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
    let index = runtime.block_on(store.get(&object, u64::MAX)).unwrap();
    ingest.freeze_if_due(true);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while repository.timeline(ID).is_ok() {
        assert!(std::time::Instant::now() < deadline, "it holds on");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let refused = repository.timeline(ID).err().unwrap().to_string();
    assert!(refused.contains("another page server has taken over"), "{refused}");
    assert!(timeline.is_stopping() && timeline.has_failed());
    // What it has besides goes on.
    let state = cluster().0;
    repository.import(TENANT, TimelineId([8; 16]), "another", &state[..]).unwrap();
    repository.stop();

    let newer = index;
    let index = runtime.block_on(store.get(&index_object(TENANT, ID), u64::MAX)).unwrap();
    assert!(index == newer, "the older page server overwrote the newer one's index");
    for entry in TimelineIndex::decode(&index).unwrap().layers {
        let layer = format!("tenants/{TENANT}/timelines/{ID}/layers/{}", entry.name);
        runtime.block_on(store.get(&layer, u64::MAX)).unwrap();
    }
    // And an older generation can't even open what a later one has.
    let error = runtime.block_on(async {
        let older = pgstrata_ids::Generation(1);
        pgstrata_pageserver::remote::RemoteIndex::open(&store, TENANT, ID, older, false)
            .await
            .err()
            .unwrap()
    });
    assert!(format!("{error:#}").contains("later generation"), "{error:#}");
}

/// No page server removes an index: one that is missing says nothing of another's. But a claim that is another's does.
#[test]
fn an_index_that_is_missing_is_waited_for_unless_the_store_is_anothers() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let runtime = runtime();
    let claim = |token: &str| {
        let (machine, host, path) = ("m".into(), "h".into(), "/p".into());
        let place = Place { machine, host, path, device: 1, inode: 2 };
        let since = "2026-01-01T00:00:00Z".into();
        let claim = Claim { token: token.into(), place, since, store_inode: None };
        std::fs::write(directory.join("objects/claim"), claim.encode()).unwrap();
    };
    let store = store_in(directory).under(Some("a"));
    claim("a");
    let repository = open(&runtime, &store, &directory.join("one"), Limits::default()).unwrap();
    let timeline = repository.import(TENANT, ID, "main", &cluster().0[..]).unwrap();
    let history = history(timeline.info.start_lsn, timeline.info.start_record);
    let (half, rest) = history.bytes.split_at(history.bytes.len() / 2);
    let mut ingest = Ingest::new(Arc::clone(&timeline)).unwrap();
    let wait_until = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !is_so() {
            assert!(std::time::Instant::now() < deadline, "{what}: waited in vain");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    let (index, aside) =
        (directory.join("objects").join(index_object(TENANT, ID)), directory.join("aside"));
    std::fs::rename(&index, &aside).unwrap();
    ingest.feed(half).unwrap();
    ingest.freeze_if_due(true);
    let said = || timeline.trouble(FLUSH).unwrap_or_default();
    wait_until("it is told of", &|| said().contains("put it back"));
    assert!(repository.timeline(ID).is_ok() && !timeline.has_failed());
    std::fs::rename(&aside, &index).unwrap();
    wait_until("it goes on", &|| timeline.frozen_layers() == 0 && said().is_empty());

    // Whoever has the store now may have removed what it likes.
    std::fs::rename(&index, &aside).unwrap();
    claim("b");
    ingest.feed(rest).unwrap();
    ingest.freeze_if_due(true);
    wait_until("it lets go", &|| repository.timeline(ID).is_err());
    let refused = repository.timeline(ID).err().unwrap().to_string();
    assert!(refused.contains("another page server has taken over"), "{refused}");
    assert!(timeline.is_stopping() && timeline.has_failed() && !index.exists());
    repository.stop();
}

#[test]
fn branches_of_one_name_are_found_by_their_timelines_only() {
    const OTHER: TimelineId = TimelineId([8; 16]);
    let directory = tempfile::tempdir().unwrap();
    let start = |name: &str| {
        let store = directory.path().join("objects");
        Process::start(command(&directory.path().join(name), store.to_str().unwrap()))
    };
    // Neither sees what the other makes.
    let (one, other) = (start("one"), start("other"));
    for (process, id) in [(&one, ID), (&other, OTHER)] {
        let imported = process.import(id, "main", &cluster().0);
        assert_eq!(imported.status, 200, "{}", imported.text());
    }
    drop((one, other));

    let process = start("third");
    let rows = process.get("/v1/branches").json();
    let by_name = process.get("/v1/branch?name=main");
    assert_eq!(by_name.status, 500, "{}", by_name.text());
    let failures = rows.as_array().unwrap().iter().map(|row| row["failure"].as_str().unwrap());
    let texts: Vec<_> = failures.map(str::to_owned).chain([by_name.text()]).collect();
    assert_eq!(texts.len(), 3, "{rows}");
    for text in texts {
        assert!([ID, OTHER].iter().all(|id| text.contains(&id.to_string())), "{text}");
    }
    let metrics = process.get("/metrics").text();
    assert!(metrics.contains("failed{branch=\"main\"} 1"), "{metrics}");
    // No third one, and nothing that a name chooses.
    let body = serde_json::json!({ "name": "main", "from": "main" }).to_string();
    for (path, body) in
        [("/v1/branches", body.as_bytes()), ("/v1/branch/rename?name=main&to=new", b"")]
    {
        let refused = process.post(path, body);
        assert!(refused.status != 200 && refused.text().contains("2 branches"), "{path}");
    }
    let third = process.import(TimelineId([9; 16]), "main", &cluster().0);
    assert!(third.status == 409 && third.text().contains("exists already"), "{}", third.text());

    for id in [ID, OTHER] {
        assert_eq!(process.get(&format!("/v1/timelines/{id}")).status, 200);
    }
    let renamed = process.post(&format!("/v1/timelines/{OTHER}/rename?to=rescued"), b"");
    assert_eq!(renamed.json()["name"], "rescued");
    for (name, id) in [("main", ID), ("rescued", OTHER)] {
        let row = process.get(&format!("/v1/branch?name={name}")).json();
        assert_eq!(row["timeline_id"], id.to_string(), "{row}");
    }
    let rows = process.get("/v1/branches").json();
    assert!(rows.as_array().unwrap().iter().all(|row| row["failure"].is_null()), "{rows}");
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
    assert!(
        runtime
            .block_on(truth.get(&index_object(TENANT, ID), u64::MAX))
            .unwrap_err()
            .is_not_found()
    );
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

/// Lets another page server write an index right before ours is.
#[derive(Debug)]
struct Meddler {
    truth: Store,
    times: AtomicU32,
}

impl Interceptor for Meddler {
    fn verdict(&self, action: &'static str, path: &str) -> Verdict {
        let index = action == "swap" && path.ends_with("/index");
        if index && self.times.load(Ordering::SeqCst) > 0 {
            self.times.fetch_sub(1, Ordering::SeqCst);
            let (truth, path) = (self.truth.clone(), path.to_owned());
            let meddling = std::thread::spawn(move || {
                runtime().block_on(async {
                    let mut index =
                        TimelineIndex::decode(&truth.get(&path, u64::MAX).await.unwrap()).unwrap();
                    index.sequence += 1;
                    truth.put(&path, index.encode().into()).await.unwrap();
                });
            });
            meddling.join().unwrap();
        }
        Verdict::Perform
    }
}

#[test]
fn h11_a_takeover_is_tried_again_when_the_old_one_writes() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let truth = Store::open(&Location::Memory, None).unwrap();
    let old = open(&runtime, &truth, &directory.path().join("old"), Limits::default()).unwrap();
    old.import(TENANT, ID, "main", &cluster().0[..]).unwrap();
    old.stop();
    let meddler = Arc::new(Meddler { truth: truth.clone(), times: AtomicU32::new(3) });
    let store = truth.intercepted(Arc::clone(&meddler) as _);
    let new = open(&runtime, &store, &directory.path().join("new"), Limits::default()).unwrap();
    assert!(new.timeline(ID).is_ok(), "{:?}", new.broken());
    assert_eq!(meddler.times.load(Ordering::SeqCst), 0);
    new.stop();
}
