//! An object store that is slow, refuses or cuts connections, and processes that hang: what does not need them goes on,
//! and what does recovers by itself.
//!
//! `make test` does it for seconds, `make test-all` for as long as real outages last, and prints what it measured.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgstrata_tests::health::{
    Stopped, flushed, wait_until_all_have, wait_until_healthy, wait_until_right,
};
use pgstrata_tests::installation::Installation;
use pgstrata_tests::load::{Load, SCHEMA};
use pgstrata_tests::probes::{Probe, Probes, request};
use pgstrata_tests::proxy::{Mode, Proxy};
use pgstrata_tests::workload::permanent;
use pgstrata_tests::{Cluster, S3Server, connect, programs, thorough};
use postgres::Client;
use serde_json::Value;

/// Nobody waits longer for a commit while one process hangs or the object store is away.
const LONGEST_STALL: Duration = Duration::from_secs(2);
/// Of 100 requests that need no object store, 99 are answered within this.
const P99: Duration = Duration::from_millis(100);
/// How long anything may take to recover that has no figure of its own: above the longest pause between two attempts to
/// archive WAL (60 s), with what an attempt itself may take (30 s).
const RECOVERY: Duration = Duration::from_secs(150);

/// Those who measure do it alone: tests run two at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the programs are those that users run; others start more slowly.
fn optimised() -> bool {
    match std::env::var_os("PGSTRATA_TEST_PROGRAMS").map(PathBuf::from) {
        Some(path) => path.file_name().is_some_and(|name| name == "release"),
        None => !cfg!(debug_assertions),
    }
}

/// How long a start may take that one hung process does not concern.
fn longest_start() -> Duration {
    Duration::from_millis(if optimised() { 1000 } else { 4500 })
}

fn versions(test: fn(&Installation)) {
    let _alone = alone();
    test(&Installation::of(15));
    if thorough() {
        test(&Installation::of(18));
    }
}

/// A table of one row a page, that nobody has read since main's compute was started again.
fn cold_table(client: &mut Client, pages: usize) {
    let text = format!(
        "create table cold (number int, filler text) with (fillfactor = 10);
         insert into cold select g, repeat(md5(g::text), 27) from generate_series(0, {pages} - 1) g;
         vacuum cold; checkpoint"
    );
    text.split(';').for_each(|text| client.batch_execute(text).unwrap());
}

/// The addresses of everybody's HTTP interface.
fn addresses(cluster: &Cluster) -> Vec<(String, String)> {
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap().iter();
    let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
    processes.map(|row| (text(row, "name"), text(row, "http"))).collect()
}

fn address(cluster: &Cluster, name: &str) -> String {
    let all = addresses(cluster);
    all.into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
}

/// Everything that does not need the object store.
fn watch(cluster: &Cluster, client: &mut Client, reader: &str, pages: u32) -> Probes {
    let mut probes = Probes::new();
    let (mut of_pageserver, mut of_others) = (Vec::new(), Vec::new());
    for (name, address) in addresses(cluster) {
        let list = if name == "pageserver" { &mut of_pageserver } else { &mut of_others };
        list.extend(
            ["/healthz", "/metrics", "/readyz"].map(|path| Probe::get(&name, &address, path)),
        );
        let own: &[&str] = match name.as_str() {
            // The first is what 'branch list' asks.
            "pageserver" => &["/v1/branches?sizes=true", "/v1/branch?name=main"],
            "storage-broker" => &["/v1/nodes"],
            _ => &["/v1/status"],
        };
        list.extend(own.iter().map(|path| Probe::get(&name, &address, path)));
    }
    // Not so often that they are what the processors are busy with.
    probes.add(of_pageserver, Duration::from_millis(20));
    probes.add(of_others, Duration::from_millis(5));
    let path: String = client.query_one("select pg_relation_filepath('cold')", &[]).unwrap().get(0);
    let relation = path.replace("base/", "1663/");
    let pageserver = address(cluster, "pageserver");
    // Far from one another, so that none comes along with one that was asked for.
    let mut block = 0;
    let mut next = move || {
        block = (block + 7919) % pages;
        block
    };
    let page = Probe::new("pageserver /v1/branch/page", move || {
        let path = format!("/v1/branch/page?name=main&rel={relation}&block={}", next());
        match request("GET", &pageserver, &path, Duration::from_secs(15)) {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let mut reads = connect(reader);
    let mut number = 0;
    let read = Probe::new("SQL read of a cold page", move || {
        number = (number + 7919) % pages;
        let query = format!("select number from cold where ctid = '({number},1)'");
        let row = reads.query_one(&query, &[]).map_err(|error| format!("{error:?}"))?;
        (row.get::<_, i32>(0) as u32 == number).then_some(()).ok_or("another row".to_owned())
    });
    probes.add(vec![page, read], Duration::from_millis(20));
    let mut command = cluster_command(cluster, &["branch", "list"]);
    let list = Probe::new("pgstrata branch list", move || {
        let output = command.output().map_err(|error| error.to_string())?;
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(complaints)
    });
    probes.add(vec![list], Duration::from_millis(100));
    probes
}

fn cluster_command(cluster: &Cluster, arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(programs().join("pgstrata"));
    command.arg("--dir").arg(cluster.dir()).args(arguments);
    command
}

/// Makes the page server write out what it has, and safekeepers archive a segment, again and again.
fn keep_uploading(cluster: &Cluster, uri: &str) -> Probes {
    let pageserver = address(cluster, "pageserver");
    let flush = Probe::new("flush", move || {
        // It waits for the object store, as it should.
        let path = "/v1/branch/compact?name=main";
        drop(request("POST", &pageserver, path, Duration::from_secs(1)));
        Ok(())
    });
    let mut client = connect(uri);
    let switch = Probe::new("switch", move || {
        client.batch_execute("select pg_switch_wal()").map_err(|error| error.to_string())
    });
    let mut uploads = Probes::new();
    uploads.add(vec![flush], Duration::from_secs(2));
    uploads.add(vec![switch], Duration::from_secs(if thorough() { 15 } else { 5 }));
    uploads
}

/// What was seen in some seconds, printed, and what of it is not as it should be.
fn watched(what: &str, seconds: u64, probes: &Probes, load: &Load) -> Vec<String> {
    probes.take();
    load.take();
    std::thread::sleep(Duration::from_secs(seconds));
    let seen = probes.take();
    let (stall, mut wrong) = load.take();
    println!("{what}: longest commit {stall:?}");
    if stall >= LONGEST_STALL {
        wrong.push(format!("a commit took {stall:?}"));
    }
    for (name, seen) in seen {
        let (p99, longest, count) = (seen.p99(), seen.longest(), seen.count());
        println!("{what}: {name}: p99 {p99:?}, longest {longest:?}, of {count}");
        // Of the command most is the start of a program that was not optimised; what it asks for is watched as well.
        let is_judged = optimised() || !name.starts_with("pgstrata ");
        if is_judged && p99 >= P99 {
            wrong.push(format!("{name}: p99 {p99:?}"));
        }
        wrong.extend(seen.failure.map(|failure| format!("{name}: {failure}")));
    }
    wrong
}

/// What is not as it should be. What waits for the object store does so in every round; what waited for a processor that
/// something else on this machine had, does not.
fn judged(what: &str, seconds: u64, probes: &Probes, load: &Load) -> Vec<String> {
    const ROUNDS: usize = 3;
    let mut wrong = Vec::new();
    for _ in 0..ROUNDS {
        wrong = watched(what, seconds, probes, load);
        if wrong.is_empty() {
            break;
        }
        println!("{what}: {wrong:?}");
    }
    wrong.into_iter().map(|wrong| format!("{what}: {wrong}")).collect()
}

fn store_goes_bad(installation: &Installation) {
    let server = S3Server::start();
    let proxy = Proxy::start(&server.endpoint);
    let cluster = Cluster::in_s3(&proxy.endpoint).with_server_of(installation);
    let mut client = cluster.client();
    client.batch_execute(SCHEMA).unwrap();
    let pages = if thorough() { 12_000 } else { 2000 };
    cold_table(&mut client, pages);
    cluster.cli(&["compact"]);
    cluster.cli(&["branch", "create", "reader"]);
    let reader = cluster.json(&["compute", "start", "reader"]);
    let probes = watch(&cluster, &mut client, reader["uri"].as_str().unwrap(), pages as u32);
    let uri = cluster.up();
    let mut load = Load::start(&uri, 3);
    let uploads = keep_uploading(&cluster, &uri);
    load.wait_for_progress(RECOVERY);

    let (seconds, delay) = if thorough() { (60, 10) } else { (6, 5) };
    let modes =
        [Mode::Pass, Mode::SlowIndexes(Duration::from_secs(delay)), Mode::Refuse, Mode::Cut];
    let version = installation.major();
    let mut wrong = Vec::new();
    for mode in modes {
        proxy.switch(mode);
        let what = format!("PostgreSQL {version}, {mode:?}");
        wrong.extend(judged(&what, seconds, &probes, &load));
        let disturbed = proxy.switch(Mode::Pass);
        assert!(mode == Mode::Pass || disturbed > 0, "{mode:?}: nothing was uploaded meanwhile");
        let mark = flushed(&mut client);
        let caught_up = wait_until_right(RECOVERY, || {
            let branches = cluster.json(&["branch", "list"]);
            let main = branches.as_array().unwrap().iter().find(|row| row["name"] == "main");
            let reached = main.and_then(|row| row["remote_lsn"].as_str()).unwrap_or("0/0");
            (pgstrata_tests::health::lsn(reached) < pgstrata_tests::health::lsn(&mark))
                .then(|| format!("uploaded to {reached}, not to {mark}: {main:?}"))
        });
        println!("{mode:?}: {disturbed} requests; uploads catch up in {caught_up:?}");
    }
    drop(uploads);
    drop(probes);
    let mark = flushed(&mut client);
    client.batch_execute("select pg_switch_wal(); insert into load values (-1, 1, '')").unwrap();
    let archived = wait_until_all_have(&cluster, "archived_lsn", &mark, RECOVERY);
    println!("archived by all after {archived:?}");
    load.wait_for_progress(RECOVERY);
    load.stop(RECOVERY);
    wait_until_healthy(&cluster, RECOVERY);
    let digests = permanent(&mut client);

    // The page server's copies are gone; what it uploaded is not.
    drop(client);
    cluster.kill("pageserver");
    std::fs::remove_dir_all(cluster.dir().join("pageserver")).unwrap();
    cluster.up();
    let mut client = cluster.restart();
    assert_eq!(permanent(&mut client), digests);
    load.check(&mut client);
    wait_until_healthy(&cluster, RECOVERY);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_that_can_do_without_the_object_store_waits_for_it() {
    versions(store_goes_bad);
}

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
