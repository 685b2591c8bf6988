//! A process hangs: what has a majority goes on, and all recovers by itself.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgstrata_tests::health::{
    Stopped, flushed, wait_until_all_have, wait_until_healthy, wait_until_right,
};
use pgstrata_tests::installation::Installation;
use pgstrata_tests::load::{Load, SCHEMA};
use pgstrata_tests::{Cluster, connect, thorough};
use serde_json::Value;

use crate::{LONGEST_STALL, RECOVERY, cluster_command, cold_table, longest_start, versions};

/// A thread's result, which is there in time.
fn join<T>(what: &str, thread: JoinHandle<T>, patience: Duration) -> T {
    let deadline = Instant::now() + patience;
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "{what} takes more than {patience:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    thread.join().unwrap()
}

/// Starts a branch's compute; the result says how long the command took, and what it printed.
fn starting(cluster: &Cluster, branch: &str) -> JoinHandle<(Duration, Result<Value, String>)> {
    let mut command = cluster_command(cluster, &["compute", "start", branch, "--json"]);
    std::thread::spawn(move || {
        let since = Instant::now();
        let output = command.output().unwrap();
        let took = since.elapsed();
        let printed = match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        };
        (took, printed)
    })
}

/// What is stopped, and how long.
struct Room<'a> {
    cluster: &'a Cluster,
    load: Option<Load>,
    /// How long a process is stopped.
    hold: Duration,
    version: u32,
    uri: String,
}

impl Room<'_> {
    fn load(&self) -> &Load {
        self.load.as_ref().unwrap()
    }

    /// Whatever hung goes on, and so does everything.
    fn recovers(&self, what: &str) {
        let since = Instant::now();
        self.load().wait_for_progress(RECOVERY);
        let mut client = connect(&self.uri);
        let mark = flushed(&mut client);
        wait_until_all_have(self.cluster, "flush_lsn", &mark, RECOVERY);
        wait_until_healthy(self.cluster, RECOVERY);
        let (version, took) = (self.version, since.elapsed());
        println!("PostgreSQL {version}, {what}: all is well {took:?} later");
        self.load().take();
    }

    /// A start that has a majority, and a commit there.
    fn starts(
        &self,
        what: &str,
        branch: &str,
        start: JoinHandle<(Duration, Result<Value, String>)>,
    ) {
        let (took, row) = join("a start", start, RECOVERY);
        let row = row.unwrap_or_else(|error| panic!("{what}: {error}"));
        println!(
            "PostgreSQL {}, {what}: start of {branch}: {took:?}, {} ms of it the compute's",
            self.version, row["start_ms"]
        );
        assert!(took < longest_start(), "{what}: the start took {took:?}");
        let mut client = connect(row["uri"].as_str().unwrap());
        let since = Instant::now();
        client.batch_execute("insert into started values (1)").unwrap();
        let took = since.elapsed();
        assert!(took < LONGEST_STALL, "{what}: the first commit took {took:?}");
    }

    /// One that the others can do without.
    fn minority_hangs(&self, name: &str) {
        let branch = self.branch(name);
        let what = format!("{name} stopped under load");
        let pid = self.cluster.pid(name);
        self.load().take();
        let since = Instant::now();
        let stopped = Stopped::stop(pid);
        self.starts(&what, &branch, starting(self.cluster, &branch));
        std::thread::sleep(self.hold.saturating_sub(since.elapsed()));
        drop(stopped);
        self.load().wait_for_progress(RECOVERY);
        self.commits_went_on(&what);
        self.recovers(&what);
        self.cluster.cli(&["compute", "stop", &branch]);
    }

    fn commits_went_on(&self, what: &str) {
        let (stall, errors) = self.load().take();
        println!("PostgreSQL {}, {what}: longest commit {stall:?}", self.version);
        assert!(errors.is_empty(), "{what}: {errors:?}");
        assert!(stall < LONGEST_STALL, "{what}: a commit took {stall:?}");
    }

    /// A branch that no compute ever ran on.
    fn branch(&self, name: &str) -> String {
        let branch = format!("beside-{name}");
        self.cluster.cli(&["branch", "create", &branch]);
        branch
    }

    /// Commits need no page server: their pages are in the compute's cache. What is not waits, and so does a start, which
    /// begins with the page server's skeleton of a data directory.
    fn pageserver_hangs(&self, pages: i64) {
        let branch = self.branch("pageserver");
        let what = "pageserver stopped under load";
        let mut cold = connect(&self.uri);
        // What the plan needs is read before; the table is not.
        cold.batch_execute("explain select count(*) from cold; set statement_timeout = 0").unwrap();
        let pid = self.cluster.pid("pageserver");
        self.load().take();
        let since = Instant::now();
        let stopped = Stopped::stop(pid);
        let read = std::thread::spawn(move || {
            cold.query_one("select count(*) from cold", &[]).map(|row| row.get::<_, i64>(0))
        });
        let start = starting(self.cluster, &branch);
        std::thread::sleep(self.hold.saturating_sub(since.elapsed()));
        assert!(!read.is_finished(), "the page server was not needed for a cold table");
        assert!(!start.is_finished(), "a start without the page server: {:?}", start.join());
        self.commits_went_on(what);
        drop(stopped);
        let since = Instant::now();
        let found = join("the read of a cold table", read, RECOVERY).unwrap();
        println!("PostgreSQL {}, {what}: a read goes on {:?} later", self.version, since.elapsed());
        assert_eq!(found, pages);
        let (_, row) = join("the start", start, RECOVERY);
        println!("PostgreSQL {}, {what}: a start ends {:?} later", self.version, since.elapsed());
        let row = row.unwrap();
        let mut client = connect(row["uri"].as_str().unwrap());
        client.batch_execute("insert into started values (1)").unwrap();
        self.load().wait_for_progress(RECOVERY);
        self.commits_went_on(what);
        self.recovers(what);
        self.cluster.cli(&["compute", "stop", &branch]);
    }

    /// Of the compute itself nothing can go on, and nothing is lost.
    fn compute_hangs(&self, what: &str, pid: u64) {
        let what = format!("{what} stopped under load");
        self.load().take();
        let stopped = Stopped::stop(pid);
        std::thread::sleep(self.hold);
        drop(stopped);
        self.load().wait_for_progress(RECOVERY);
        let (stall, errors) = self.load().take();
        println!(
            "PostgreSQL {}, {what}: longest commit {stall:?}; {} failed: {errors:?}",
            self.version,
            errors.len()
        );
        self.recovers(&what);
    }

    /// Main's compute is started while something hangs, from before the start or in the midst of it.
    fn main_starts(&self, name: &str, delay: Option<Duration>) {
        let what = match delay {
            None => format!("{name} stopped before the start"),
            Some(delay) => format!("{name} stopped {delay:?} into the start"),
        };
        self.cluster.cli(&["compute", "stop", "main"]);
        let pid = self.cluster.pid(name);
        let stopped = delay.is_none().then(|| Stopped::stop(pid));
        let start = starting(self.cluster, "main");
        let stopped = stopped.unwrap_or_else(|| {
            std::thread::sleep(delay.unwrap_or_default());
            Stopped::stop(pid)
        });
        if name == "pageserver" {
            // It may have been done with the page server already.
            std::thread::sleep(self.hold);
            drop(stopped);
            let since = Instant::now();
            let (_, row) = join("the start", start, RECOVERY);
            let later = since.elapsed();
            println!("PostgreSQL {}, {what}: a start ends {later:?} later", self.version);
            let row = row.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut client = connect(row["uri"].as_str().unwrap());
            client.batch_execute("insert into started values (1)").unwrap();
        } else {
            self.starts(&what, "main", start);
            drop(stopped);
        }
        wait_until_healthy(self.cluster, RECOVERY);
    }

    /// The compute's own process hangs in the midst of its start.
    fn shim_hangs_in_its_start(&self, delay: Duration) {
        let what = format!("compute-main stopped {delay:?} into the start");
        self.cluster.cli(&["compute", "stop", "main"]);
        let start = starting(self.cluster, "main");
        let since = Instant::now();
        let note = self.cluster.dir().join("run/compute-main.pid");
        let mut pid = None;
        wait_until_right(RECOVERY, || {
            let text = std::fs::read_to_string(&note).unwrap_or_default();
            pid = text.split_once(' ').and_then(|(pid, _)| pid.parse().ok());
            pid.is_none().then(|| "no process".to_owned())
        });
        std::thread::sleep(delay.saturating_sub(since.elapsed()));
        let stopped = Stopped::stop(pid.unwrap());
        std::thread::sleep(self.hold);
        drop(stopped);
        let (_, row) = join("the start", start, RECOVERY);
        let row = row.unwrap_or_else(|error| panic!("{what}: {error}"));
        connect(row["uri"].as_str().unwrap())
            .batch_execute("insert into started values (1)")
            .unwrap();
        wait_until_healthy(self.cluster, RECOVERY);
    }
}

/// A cluster whose main has a load, and a cold table of so many pages.
fn loaded(cluster: &Cluster, version: u32, pages: usize) -> Room<'_> {
    let mut client = cluster.client();
    client.batch_execute(SCHEMA).unwrap();
    client.batch_execute("create table started (a int)").unwrap();
    cold_table(&mut client, pages);
    drop(client);
    // With nothing in its cache.
    drop(cluster.restart());
    let uri = cluster.up();
    let load = Some(Load::start(&uri, 3));
    let hold = Duration::from_secs(if thorough() { 30 } else { 3 });
    let room = Room { cluster, load, hold, version, uri };
    room.load().wait_for_progress(RECOVERY);
    room
}

fn each_process_hangs(installation: &Installation) {
    const PAGES: usize = 500;
    let cluster = Cluster::of(installation, &[]);
    let mut room = loaded(&cluster, installation.major(), PAGES);
    room.minority_hangs("safekeeper-1");
    if thorough() {
        room.minority_hangs("safekeeper-2");
        room.minority_hangs("safekeeper-3");
    }
    room.minority_hangs("storage-broker");
    room.pageserver_hangs(PAGES as i64);
    if thorough() {
        room.compute_hangs("compute-main", cluster.pid("compute-main"));
        let status = cluster.status();
        let computes = status["computes"].as_array().unwrap();
        let main = computes.iter().find(|row| row["branch"] == "main").unwrap();
        room.compute_hangs("postmaster", main["postgres_pid"].as_u64().unwrap());
    }
    let mut load = room.load.take().unwrap();
    load.stop(RECOVERY);
    load.check(&mut connect(&room.uri));
    let mut client = cluster.restart();
    println!("PostgreSQL {}: {} rows, all there", room.version, load.check(&mut client));
}

fn each_process_hangs_at_a_start(installation: &Installation) {
    let cluster = Cluster::of(installation, &[]);
    let mut room = loaded(&cluster, installation.major(), 10);
    let mut load = room.load.take().unwrap();
    load.stop(RECOVERY);
    if thorough() {
        let minority = ["safekeeper-1", "safekeeper-2", "safekeeper-3", "storage-broker"];
        for name in minority.into_iter().chain(["pageserver"]) {
            room.main_starts(name, None);
            for delay in [30, 100, 200, 400] {
                room.main_starts(name, Some(Duration::from_millis(delay)));
            }
        }
        for delay in [50, 150, 250, 400] {
            room.shim_hangs_in_its_start(Duration::from_millis(delay));
        }
    } else {
        for name in ["safekeeper-2", "storage-broker", "pageserver"] {
            room.main_starts(name, None);
        }
    }
    let mut client = cluster.restart();
    println!("PostgreSQL {}: {} rows, all there", room.version, load.check(&mut client));
}

#[test]
fn one_hung_process_holds_up_no_majority() {
    versions(each_process_hangs);
}

#[test]
fn one_hung_process_holds_up_no_start_of_a_majority() {
    versions(each_process_hangs_at_a_start);
}
