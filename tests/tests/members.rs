//! Safekeepers that are lost and replaced, under load, by the command: what a client was told is committed is there
//! afterwards.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, connect};
use serde_json::Value;

/// A client that commits numbers, one after the other, and remembers the last that it was told of.
struct Load {
    ends: Arc<AtomicBool>,
    last: Arc<AtomicI64>,
    thread: std::thread::JoinHandle<Duration>,
}

impl Load {
    fn start(uri: &str) -> Load {
        let (ends, last) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let mut client = connect(uri);
        client.batch_execute("create table told (a bigint primary key)").unwrap();
        let (until, told) = (Arc::clone(&ends), Arc::clone(&last));
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            for number in 1i64.. {
                let since = Instant::now();
                client.execute("insert into told values ($1)", &[&number]).unwrap();
                longest = longest.max(since.elapsed());
                told.store(number, Ordering::Release);
                if until.load(Ordering::Acquire) {
                    break;
                }
            }
            longest
        });
        Load { ends, last, thread }
    }

    /// Waits until it has committed some more.
    fn goes_on(&self) {
        let before = self.last.load(Ordering::Acquire);
        let since = Instant::now();
        while self.last.load(Ordering::Acquire) < before + 20 {
            assert!(since.elapsed() < Duration::from_secs(60), "no commits");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The last number that it was told of, and the longest commit.
    fn end(self) -> (i64, Duration) {
        self.ends.store(true, Ordering::Release);
        let longest = self.thread.join().unwrap();
        (self.last.load(Ordering::Acquire), longest)
    }
}

fn safekeepers(cluster: &Cluster) -> Vec<Value> {
    cluster.json(&["safekeeper", "list"]).as_array().unwrap().clone()
}

fn ids(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["id"].as_u64().unwrap()).collect()
}

fn quorum(cluster: &Cluster, branch: &str) -> Value {
    cluster.json(&["quorum", "show", "--branch", branch])
}

fn members(quorum: &Value) -> Vec<u64> {
    ids(quorum["members"].as_array().unwrap())
}

#[test]
fn a_safekeeper_is_lost_and_replaced_while_a_client_commits() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    cluster.cli(&["branch", "create", "idle"]);
    cluster.cli(&["compute", "start", "idle"]);
    cluster.cli(&["compute", "stop", "idle"]);
    let load = Load::start(&uri);
    load.goes_on();
    assert_eq!(members(&quorum(&cluster, "main")), [1, 2, 3]);
    assert_eq!(quorum(&cluster, "main")["safe_after_losing"].as_u64().unwrap().min(1), 1);
    // Its machine and its disk are gone.
    cluster.kill("safekeeper-2");
    std::fs::remove_dir_all(cluster.dir().join("safekeeper-2")).unwrap();
    load.goes_on();
    let rows = safekeepers(&cluster);
    let second = rows.iter().find(|row| row["id"] == 2).unwrap();
    assert_eq!(second["state"], "gone");
    let said = cluster.cli(&["safekeeper", "replace", "2"]);
    assert!(said.contains("safekeeper 4 is in the place of 2; 2 branches changed"), "{said}");
    for branch in ["main", "idle"] {
        let shown = quorum(&cluster, branch);
        assert_eq!((members(&shown), shown["joint"].as_bool()), (vec![1, 3, 4], Some(false)));
    }
    load.goes_on();
    // The one that came last is one of the two that are left.
    cluster.kill("safekeeper-1");
    load.goes_on();
    cluster.up();
    assert_eq!(cluster.json(&["safekeeper", "add"])["id"], 5);
    cluster.cli(&["safekeeper", "remove", "1"]);
    assert_eq!(members(&quorum(&cluster, "main")), [3, 4, 5]);
    load.goes_on();
    assert_eq!(ids(&safekeepers(&cluster)), [3, 4, 5]);
    let (told, longest) = load.end();
    println!("{told} commits, longest {longest:?}");
    // Everything ends and starts again: what the client was told is there.
    for process in ["safekeeper-3", "safekeeper-4", "safekeeper-5", "compute-main"] {
        cluster.kill(process);
    }
    let mut client = cluster.client();
    let found: i64 = client.query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
    let error = cluster.refusal(&["safekeeper", "replace", "1"], 1);
    assert!(error.contains("there is no safekeeper 1"), "{error}");
    cluster.cli(&["compute", "start", "idle"]);
}
