//! An object store that is slow, refuses or cuts connections holds up only what needs it.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgstrata_ids::TimelineId;
use pgstrata_pg_wal::PgVersion;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::archive;
use support::model::State;
use support::process::{Process, command, with_s3};
use support::s3::S3;

const ID: TimelineId = TimelineId([7; 16]);

/// A page server over `s3` with a branch `main`, and the path of one of its pages.
fn served(s3: &S3, directory: &std::path::Path) -> (Arc<Process>, String) {
    let state = State::first(&mut SmallRng::seed_from_u64(1));
    let started = command(directory, "s3://bucket/prefix");
    let process = Arc::new(Process::start(with_s3(started, &s3.endpoint)));
    let imported = process.import(ID, "main", &archive(PgVersion::V15, &state));
    assert_eq!(imported.status, 200, "{}", imported.text());
    let (rel, _) = state.relations.iter().find(|(_, pages)| !pages.is_empty()).unwrap();
    let page = format!("/v1/branch/page?name=main&rel={}/{}/{}&block=0", rel.spc, rel.db, rel.rel);
    assert_eq!(process.get(&page).status, 200);
    (process, page)
}

fn answers_at_once(process: &Process, page: &str) {
    let layers = "/v1/branch/layers?name=main";
    for path in ["/healthz", "/metrics", "/v1/branches", layers, page] {
        let answer = process.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(answer.took < Duration::from_millis(100), "{path} took {:?}", answer.took);
    }
}

#[test]
fn h2_a_slow_index_write_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let (process, page) = served(&s3, directory.path());
    s3.bucket.index_delay_ms.store(10_000, Ordering::SeqCst);
    let writer = Arc::clone(&process);
    let writer =
        std::thread::spawn(move || writer.post("/v1/branch/rename?name=main&to=other", b""));
    let started = Instant::now();
    while s3.bucket.delayed.load(Ordering::SeqCst) == 0 {
        assert!(started.elapsed() < Duration::from_secs(5), "no index is written");
        std::thread::sleep(Duration::from_millis(5));
    }
    // As many at once as there can be workers; one that waits would stay.
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let (process, page) = (Arc::clone(&process), page.clone());
            std::thread::spawn(move || {
                for _ in 0..20 {
                    answers_at_once(&process, &page);
                }
            })
        })
        .collect();
    asking.into_iter().for_each(|asks| asks.join().unwrap());
    assert!(started.elapsed() < Duration::from_secs(9), "the write ended too early to prove it");
    let renamed = writer.join().unwrap();
    assert_eq!(renamed.status, 200, "{}", renamed.text());
    assert_eq!(process.get("/v1/branch?name=other").status, 200);
}

#[test]
fn h2_a_slow_branch_creation_holds_up_no_other_name() {
    let directory = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let (process, _) = served(&s3, directory.path());
    let create = |name: &str| {
        let body = serde_json::json!({ "name": name, "from": "main" }).to_string();
        let process = Arc::clone(&process);
        std::thread::spawn(move || process.post("/v1/branches", body.as_bytes()))
    };
    s3.bucket.index_delay_ms.store(3_000, Ordering::SeqCst);
    let creating = [create("one"), create("one"), create("two"), create("three")];
    let answers = creating.map(|thread| thread.join().unwrap());
    let mut made: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    made.sort_unstable();
    assert_eq!(made, [200, 200, 200, 409], "one name went to two branches, or to none");
    for answer in &answers {
        assert!(
            answer.took < Duration::from_secs(5),
            "it waited for the others: {:?}",
            answer.took
        );
    }
}

#[test]
fn h2_refusals_and_cut_connections_are_ridden_out() {
    let directory = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let (process, page) = served(&s3, directory.path());
    for (round, (from, to)) in [("main", "a"), ("a", "main")].into_iter().enumerate() {
        let bad = if round == 0 { &s3.bucket.refusing } else { &s3.bucket.cutting };
        bad.store(true, Ordering::SeqCst);
        let writer = Arc::clone(&process);
        let path = format!("/v1/branch/rename?name={from}&to={to}");
        let writer = std::thread::spawn(move || writer.post(&path, b""));
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(100));
            for path in ["/healthz", "/metrics", "/v1/branches"] {
                let answer = process.get(path);
                assert!(answer.took < Duration::from_millis(100), "{path}: {:?}", answer.took);
            }
        }
        bad.store(false, Ordering::SeqCst);
        let renamed = writer.join().unwrap();
        assert_eq!(renamed.status, 200, "{}", renamed.text());
    }
    assert!(s3.bucket.failed.load(Ordering::SeqCst) > 0);
    answers_at_once(&process, &page);
}

#[test]
fn h2_a_listing_waits_for_no_sizes() {
    let directory = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    drop(served(&s3, directory.path()));
    // Nothing is there to read sizes from but the object store.
    let empty = tempfile::tempdir().unwrap();
    s3.bucket.refusing_layers.store(true, Ordering::SeqCst);
    let process =
        Process::start(with_s3(command(empty.path(), "s3://bucket/prefix"), &s3.endpoint));
    let list = || {
        let answer = process.get("/v1/branches?sizes=true");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.took < Duration::from_millis(100), "{:?}", answer.took);
        let rows = answer.json();
        assert_eq!(rows[0]["name"], "main");
        rows[0]["logical_size"].as_u64()
    };
    for _ in 0..20 {
        assert_eq!(list(), None);
    }
    assert!(s3.bucket.failed.load(Ordering::SeqCst) > 0, "the sizes were there");
    s3.bucket.refusing_layers.store(false, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(60);
    let size = loop {
        if let Some(size) = list() {
            break size;
        }
        assert!(Instant::now() < deadline, "no size is shown");
        std::thread::sleep(Duration::from_millis(50));
    };
    // It is still shown when the object store is away again.
    s3.bucket.refusing.store(true, Ordering::SeqCst);
    assert_eq!(list(), Some(size));
}
