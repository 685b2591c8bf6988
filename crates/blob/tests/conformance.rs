//! One suite over every backend. S3 is a real server that this test starts: moto, unless
//! `PGSTRATA_TEST_S3_ENDPOINT` names another (with a bucket `pgstrata-test` in it).

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_blob::{CasOutcome, Location, PutOutcome, Store};
use pgstrata_tests::other_s3::{Condition, OtherS3};
use pgstrata_tests::{S3_ENVIRONMENT, free_port};

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn conforms(store: &Store) {
    assert!(store.check().await.unwrap(), "conditional writes must be enforced");

    // Absent objects.
    assert!(store.get("a/none", 100).await.unwrap_err().is_not_found());
    assert_eq!(store.list("a").await.unwrap(), vec![]);
    store.delete("a/none").await.unwrap();

    // Put, overwrite, ranges.
    store.put("a/b/one", bytes("0123456789")).await.unwrap();
    store.put("a/b/one", bytes("abcdefghij")).await.unwrap();
    assert_eq!(store.get("a/b/one", 10).await.unwrap(), "abcdefghij");
    let refused = store.get("a/b/one", 9).await.unwrap_err().to_string();
    assert!(refused.contains("'a/b/one'") && refused.contains("10 bytes"), "{refused}");
    assert_eq!(store.get_range("a/b/one", 2..5).await.unwrap(), "cde");

    // Put-if-absent never changes what is there.
    assert_eq!(store.put_if_absent("a/two", bytes("x")).await.unwrap(), PutOutcome::Created);
    assert_eq!(store.put_if_absent("a/two", bytes("y")).await.unwrap(), PutOutcome::Exists);
    assert_eq!(store.get("a/two", 100).await.unwrap(), "x");

    // Listings are sorted, whole components, with sizes.
    store.put("ab/three", bytes("z")).await.unwrap();
    let listed: Vec<_> =
        store.list("a").await.unwrap().into_iter().map(|info| (info.path, info.size)).collect();
    assert_eq!(listed, vec![("a/b/one".to_owned(), 10), ("a/two".to_owned(), 1)]);

    // Compare-and-swap: creation, then only from the version last seen.
    let CasOutcome::Swapped(first) =
        store.compare_and_swap("index", None, bytes("v1")).await.unwrap()
    else {
        panic!("creation must succeed")
    };
    assert_eq!(
        store.compare_and_swap("index", None, bytes("v1'")).await.unwrap(),
        CasOutcome::Conflict
    );
    let CasOutcome::Swapped(second) =
        store.compare_and_swap("index", Some(&first), bytes("v2")).await.unwrap()
    else {
        panic!("swap from the current version must succeed")
    };
    assert_eq!(
        store.compare_and_swap("index", Some(&first), bytes("v3")).await.unwrap(),
        CasOutcome::Conflict
    );
    let (content, version) = store.get_versioned("index", 100).await.unwrap();
    assert_eq!(content, "v2");
    assert!(matches!(
        store.compare_and_swap("index", Some(&version), bytes("v4")).await.unwrap(),
        CasOutcome::Swapped(_)
    ));
    assert_eq!(
        store.compare_and_swap("index", Some(&second), bytes("v5")).await.unwrap(),
        CasOutcome::Conflict
    );

    // A swap repeated after a lost answer is success, not conflict (remote stores only can lose
    // an answer; a local one reports the truth at once).
    assert_eq!(store.get("index", 100).await.unwrap(), "v4");

    store.delete("a/two").await.unwrap();
    assert!(store.get("a/two", 100).await.unwrap_err().is_not_found());
}

/// Exactly one of many concurrent writers wins, whatever the backend.
async fn one_winner(store: &Store) {
    let mut tasks = Vec::new();
    for writer in 0..8 {
        let store = store.clone();
        tasks.push(tokio::spawn(async move {
            store.put_if_absent("race/generation", bytes(&writer.to_string())).await.unwrap()
        }));
    }
    let mut created = 0;
    for task in tasks {
        created += usize::from(task.await.unwrap() == PutOutcome::Created);
    }
    assert_eq!(created, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    let store = Store::open(&Location::Memory, None).unwrap();
    conforms(&store).await;
    one_winner(&store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_directory() {
    let directory = tempfile::tempdir().unwrap();
    let location = Location::Directory(directory.path().join("deep/objects"));
    let store = Store::open(&location, None).unwrap();
    conforms(&store).await;
    one_winner(&store).await;
    // A second handle on the same directory, as another process would have, sees the same.
    let again = Store::open(&location, None).unwrap();
    assert_eq!(again.get("index", 100).await.unwrap(), "v4");
    let unwritable = Location::Directory("/proc/pgstrata".into());
    assert!(Store::open(&unwritable, None).is_err());
}

struct S3Server(Option<Child>);

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_s3() -> (S3Server, String) {
    if let Ok(endpoint) = std::env::var("PGSTRATA_TEST_S3_ENDPOINT") {
        return (S3Server(None), endpoint);
    }
    let port = free_port();
    let program = std::env::var("PGSTRATA_MOTO_SERVER").unwrap_or_else(|_| "moto_server".into());
    let mut child = Command::new(&program)
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (pip install 'moto[server]')"));
    let stderr = child.stderr.take().unwrap();
    std::thread::spawn(move || BufReader::new(stderr).lines().for_each(drop));
    let server = S3Server(Some(child));
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "{program} did not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    (server, format!("http://127.0.0.1:{port}"))
}

/// Those that both servers accept.
fn set_credentials() {
    static ONCE: Once = Once::new();
    // SAFETY: the tests that read the environment do so after this, and no other changes it.
    ONCE.call_once(|| {
        for (name, value) in S3_ENVIRONMENT {
            unsafe { std::env::set_var(name, value) };
        }
    });
}

/// A server of another make. It looks at the condition and then writes, so of writers at the same
/// moment more than one may win there: fit for one page server at a time, and for this test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_s3() {
    set_credentials();
    let server = tokio::task::spawn_blocking(|| OtherS3::start(None)).await.unwrap();
    pgstrata_blob::create_bucket("pgstrata-test", Some(&server.endpoint)).await.unwrap();
    let location: Location = "s3://pgstrata-test/some/prefix".parse().unwrap();
    let store = Store::open(&location, Some(&server.endpoint)).unwrap();
    conforms(&store).await;
    tokio::task::spawn_blocking(|| drop(server)).await.unwrap();
}

/// Servers that accept a condition and ignore it are told from those that honour it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ignored_conditions_are_noticed() {
    set_credentials();
    for ignored in [Condition::Absent, Condition::Unchanged] {
        let server =
            tokio::task::spawn_blocking(move || OtherS3::start(Some(ignored))).await.unwrap();
        pgstrata_blob::create_bucket("pgstrata-test", Some(&server.endpoint)).await.unwrap();
        let location: Location = "s3://pgstrata-test/p".parse().unwrap();
        let store = Store::open(&location, Some(&server.endpoint)).unwrap();
        assert!(!store.check().await.unwrap(), "{ignored:?} is ignored there");
        assert_eq!(store.list("probe").await.unwrap(), vec![]);
        tokio::task::spawn_blocking(|| drop(server)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3() {
    let (_server, endpoint) = start_s3();
    set_credentials();
    let missing: Location = "s3://pgstrata-missing/p".parse().unwrap();
    let store = Store::open(&missing, Some(&endpoint)).unwrap();
    let error = store.check().await.unwrap_err().to_string();
    assert!(error.contains("pgstrata-missing"), "{error}");

    let location: Location = "s3://pgstrata-test/some/prefix".parse().unwrap();
    pgstrata_blob::create_bucket("pgstrata-test", Some(&endpoint)).await.unwrap();
    let store = Store::open(&location, Some(&endpoint)).unwrap();
    conforms(&store).await;
    one_winner(&store).await;
}
