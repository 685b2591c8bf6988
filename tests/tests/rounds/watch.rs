//! Who watches: a client that remembers what it was told, and a comparison of all copies.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgstrata_compute_shim::proposer::SafekeeperClient;
use pgstrata_ids::{Lsn, Term};
use pgstrata_tests::{Cluster, connect};

/// Longest wait for commits that have to come.
const PATIENCE: Duration = Duration::from_secs(90);

/// A client that goes on over everything that happens, and remembers what it was told, and where it was told nothing.
pub struct Checker {
    ends: Arc<AtomicBool>,
    told: Arc<Mutex<Told>>,
    thread: std::thread::JoinHandle<()>,
}

struct Told {
    /// What is there, as far as the client knows.
    committed: Vec<i64>,
    /// When the last of it was committed.
    last: Instant,
    /// The longest time without a commit since this was asked for.
    longest: Duration,
}

impl Checker {
    pub fn start(cluster: &Cluster) -> Checker {
        let uri = cluster.up();
        connect(&uri).batch_execute("create table told (a bigint primary key)").unwrap();
        let told =
            Told { committed: Vec::new(), last: Instant::now(), longest: Duration::default() };
        let (ends, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(told)));
        let (until, notes) = (Arc::clone(&ends), Arc::clone(&told));
        let thread = std::thread::spawn(move || {
            let mut client = None;
            let mut number = 0;
            while !until.load(Ordering::Acquire) {
                if client.is_none() {
                    // What is asked first is asked of whatever is there by then.
                    client = postgres::Client::connect(&uri, postgres::NoTls).ok();
                }
                let Some(connected) = &mut client else {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                };
                // One whose answer was lost may be there or not, and its number is not used again.
                number += 1;
                match connected.execute("insert into told values ($1)", &[&number]) {
                    Ok(_) => {
                        let mut notes = notes.lock().unwrap();
                        notes.committed.push(number);
                        notes.longest = notes.longest.max(notes.last.elapsed());
                        notes.last = Instant::now();
                    }
                    Err(_) => client = None,
                }
            }
        });
        Checker { ends, told, thread }
    }

    /// Waits until more is committed.
    pub fn goes_on(&self, what: &str) {
        let count = || self.told.lock().unwrap().committed.len();
        let (before, since) = (count(), Instant::now());
        while count() < before + 10 {
            assert!(since.elapsed() < PATIENCE, "{what}: no commits");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// All that the client was told is there now. Returns how much that is; what is before so many was looked for already.
    pub fn check(&self, uri: &str, before: usize, what: &str) -> usize {
        let told = self.told.lock().unwrap().committed.clone();
        let Some(first) = told.get(before) else { return told.len() };
        let mut client = connect(uri);
        let rows = client.query("select a from told where a >= $1", &[first]).unwrap();
        let found: HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
        let lost: Vec<&i64> =
            told[before..].iter().filter(|number| !found.contains(number)).collect();
        assert!(lost.is_empty(), "{what}: lost {lost:?} of {} commits", told.len());
        told.len()
    }

    /// The longest time without a commit since this was called last.
    pub fn take_longest(&self) -> Duration {
        std::mem::take(&mut self.told.lock().unwrap().longest)
    }

    /// How much was committed.
    pub fn end(self) -> usize {
        self.ends.store(true, Ordering::Release);
        self.thread.join().unwrap();
        self.told.lock().unwrap().committed.len()
    }
}

/// The same WAL on all members, byte by byte. Returns how many members and bytes.
pub fn compare_copies(cluster: &Cluster) -> (usize, u64) {
    let uri = cluster.up();
    let mut client = connect(&uri);
    let lsn: String =
        client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0);
    let lsn: Lsn = lsn.parse().unwrap();
    cluster.cli(&["compute", "stop", "main"]);
    let branches = cluster.json(&["branch", "list"]);
    let id = |field: &str| branches[0][field].as_str().unwrap().to_owned();
    let (tenant, timeline) = (id("tenant_id").parse().unwrap(), id("timeline_id").parse().unwrap());
    let patience = Duration::from_secs(10);
    let since = Instant::now();
    let mut copies = Vec::new();
    for row in cluster.json(&["safekeeper", "list"]).as_array().unwrap() {
        let address = row["address"].as_str().unwrap().to_owned();
        let (status, bytes) = loop {
            let mut client = SafekeeperClient::connect(&address, None, None, patience).unwrap();
            let status = client.open(tenant, timeline).unwrap();
            if status.commit_lsn >= lsn {
                let from = status.available_lsn;
                let mut bytes = Vec::new();
                client.read_wal(from, lsn, Term(0), &mut bytes).unwrap();
                break (status, bytes);
            }
            assert!(since.elapsed() < Duration::from_secs(60), "{row}: {}", status.commit_lsn);
            std::thread::sleep(Duration::from_millis(100));
        };
        copies.push((row["id"].clone(), status.available_lsn, bytes));
    }
    let (first_id, first_from, first) = &copies[0];
    let mut compared = u64::MAX;
    for (id, from, bytes) in &copies[1..] {
        let start = (*first_from).max(*from);
        let of = |from: Lsn, bytes: &[u8]| bytes[(start.0 - from.0) as usize..].to_vec();
        assert!(
            of(*first_from, first) == of(*from, bytes),
            "{first_id} and {id} differ from {start} on"
        );
        compared = compared.min(lsn.0 - start.0);
    }
    (copies.len(), compared)
}
