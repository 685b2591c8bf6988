//! No acknowledged commit is ever lost, whatever is killed and whatever is deleted.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, S3Server, connect, pg_program, signal, thorough, unprivileged};
use postgres::{Client, NoTls};
use rustix::process::Signal;

/// Writers that note what they were told is committed.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(u64, Duration, bool)>>,
    total: Arc<AtomicU64>,
}

impl Writers {
    /// Each writer `n` inserts (n, 1), (n, 2), ... one commit each, until it is stopped or fails.
    fn start(uri: &str, count: i64, from: i64) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let total = Arc::new(AtomicU64::new(0));
        let threads = (0..count)
            .map(|writer| {
                let mut client = connect(uri);
                let (stop, total) = (Arc::clone(&stop), Arc::clone(&total));
                std::thread::spawn(move || {
                    let (mut acknowledged, mut longest, mut failed) = (0, Duration::ZERO, false);
                    for number in from.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let started = Instant::now();
                        let insert = "insert into promises values ($1, $2)";
                        if client.execute(insert, &[&writer, &number]).is_err() {
                            failed = true;
                            break;
                        }
                        longest = longest.max(started.elapsed());
                        acknowledged = number as u64;
                        total.fetch_add(1, Ordering::Relaxed);
                    }
                    (acknowledged, longest, failed)
                })
            })
            .collect();
        Writers { stop, threads, total }
    }

    /// How many commits were acknowledged so far.
    fn acknowledged(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// The last number acknowledged to each writer, its longest commit, and whether it failed.
    fn end(self) -> Vec<(u64, Duration, bool)> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }
}

fn assert_kept(client: &mut Client, from: u64, acknowledged: &[(u64, Duration, bool)]) {
    for (writer, (last, _, _)) in acknowledged.iter().enumerate() {
        let row = client
            .query_one(
                "select count(*) from promises where writer = $1 and number between $2 and $3",
                &[&(writer as i64), &(from as i64), &(*last as i64)],
            )
            .unwrap();
        let kept: i64 = row.get(0);
        let promised = (last + 1).saturating_sub(from);
        assert_eq!(kept as u64, promised, "writer {writer} was promised up to {last}");
    }
}

#[test]
fn kill_everything_and_delete_what_may_be_lost() {
    kill_everything(&Cluster::new(), if thorough() { 10 } else { 3 });
}

#[test]
fn kill_everything_and_delete_what_may_be_lost_on_s3() {
    let server = S3Server::start();
    kill_everything(&server.cluster(), if thorough() { 10 } else { 1 });
}

fn kill_everything(cluster: &Cluster, rounds: i64) {
    let mut uri = cluster.up();
    let mut client = connect(&uri);
    client
        .batch_execute(
            "create table promises (writer bigint, number bigint, primary key (writer, number))",
        )
        .unwrap();
    client.batch_execute("create extension amcheck").unwrap();
    pg_program("pgbench", &["-i", "-q", "-s", "2", &uri]);
    for round in 0..rounds {
        let from = 1 + round * 1_000_000;
        let writers = Writers::start(&uri, 4, from);
        let mut pgbench =
            pgstrata_tests::pg_command("pgbench", &["-n", "-c", "8", "-T", "60", &uri])
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until || writers.acknowledged() < 50 {
            std::thread::sleep(Duration::from_millis(10));
        }
        let data_directories = cluster.data_directories();
        cluster.kill_everything();
        let acknowledged = writers.end();
        pgbench.wait().unwrap();
        cluster.delete_local_directories(&data_directories);

        uri = cluster.up();
        let mut client = connect(&uri);
        assert_kept(&mut client, from as u64, &acknowledged);
        // Every transaction of pgbench is whole.
        let row = client
            .query_one(
                "select (select sum(abalance) from pgbench_accounts),
                        (select sum(bbalance) from pgbench_branches),
                        (select coalesce(sum(delta), 0) from pgbench_history)",
                &[],
            )
            .unwrap();
        let (accounts, branches, history): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!((accounts, branches), (history, history));
    }
    let port = uri.rsplit_once(':').unwrap().1.split('/').next().unwrap();
    let at = ["-h", "127.0.0.1", "-p", port, "-U", "postgres", "-d", "postgres"];
    pg_program("pg_amcheck", &[&["--heapallindexed"], &at[..]].concat());
    pg_program("pgbench", &["-n", "-c", "8", "-t", "20", &uri]);
}

#[test]
fn a_minority_of_safekeepers_may_die() {
    minority_dies(&Cluster::new());
}

#[test]
fn a_minority_of_safekeepers_may_die_on_s3() {
    let server = S3Server::start();
    minority_dies(&server.cluster());
}

fn minority_dies(cluster: &Cluster) {
    let uri = cluster.up();
    let mut client = connect(&uri);
    client
        .batch_execute(
            "create table promises (writer bigint, number bigint, primary key (writer, number))",
        )
        .unwrap();

    // One of three: nobody notices.
    let writers = Writers::start(&uri, 4, 1);
    std::thread::sleep(Duration::from_millis(300));
    cluster.kill("safekeeper-2");
    std::thread::sleep(Duration::from_secs(2));
    let before = writers.acknowledged();
    std::thread::sleep(Duration::from_millis(500));
    assert!(writers.acknowledged() > before, "commits go on");
    let ended = writers.end();
    for (_, longest, failed) in &ended {
        assert!(!failed, "no client sees an error");
        assert!(*longest < Duration::from_secs(2), "a commit took {longest:?}");
    }
    assert_kept(&mut client, 1, &ended);

    // It comes back, and catches up.
    cluster.up();
    let commit = cluster.cli(&["lsn"]);
    wait_caught_up(cluster, "safekeeper-2", &commit);

    // Two of three: commits wait, reads go on; one returns: commits resume.
    cluster.kill("safekeeper-1");
    cluster.kill("safekeeper-3");
    let mut waiting = connect(&uri);
    let insert = std::thread::spawn(move || {
        waiting.execute("insert into promises values (100, 1)", &[]).unwrap();
        Instant::now()
    });
    std::thread::sleep(Duration::from_millis(1000));
    assert!(!insert.is_finished(), "a commit without a quorum");
    let row = client.query_one("select count(*) from promises where writer = 100", &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 0, "nothing is visible before it is safe");
    cluster.up();
    insert.join().unwrap();
    let row = client.query_one("select count(*) from promises where writer = 100", &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 1);
}

/// Waits until a safekeeper has everything up to `lsn`.
fn wait_caught_up(cluster: &Cluster, name: &str, lsn: &str) {
    let wanted = parse_lsn(lsn);
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap().clone();
    let http = processes.iter().find(|process| process["name"] == name).unwrap()["http"].clone();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let body = http_get(http.as_str().unwrap(), "/v1/status");
        let status: serde_json::Value = serde_json::from_str(&body).unwrap();
        let timelines = status["timelines"].as_array().unwrap();
        let flush = timelines.iter().filter_map(|timeline| timeline["flush_lsn"].as_str());
        if flush.map(parse_lsn).max().is_some_and(|flush| flush >= wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} does not catch up to {lsn}: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn parse_lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

fn http_get(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// "Everything committed so far", of which a branch is made, includes what a client heard of just
/// now.
#[test]
fn a_compute_reports_a_commit_before_its_client_hears_of_it() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t (a int)").unwrap();
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap();
    let main = processes.iter().find(|process| process["role"] == "compute").unwrap();
    let http = main["http"].as_str().unwrap();
    for round in 0..100 {
        client.execute("insert into t values ($1)", &[&round]).unwrap();
        // What PostgreSQL takes for flushed is on a quorum.
        let flushed = client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap();
        let report: serde_json::Value =
            serde_json::from_str(&http_get(http, "/v1/status")).unwrap();
        let (flushed, committed) = (flushed.get(0), report["commit_lsn"].as_str().unwrap());
        assert!(
            parse_lsn(flushed) <= parse_lsn(committed),
            "round {round}: flushed up to {flushed}, reported up to {committed}"
        );
    }
}

#[test]
fn a_second_compute_fences_the_first() {
    second_compute_fences(&Cluster::new());
}

#[test]
fn a_second_compute_fences_the_first_on_s3() {
    let server = S3Server::start();
    second_compute_fences(&server.cluster());
}

fn second_compute_fences(cluster: &Cluster) {
    let uri = cluster.up();
    let mut first = connect(&uri);
    first.batch_execute("create table t (who text)").unwrap();
    first.batch_execute("insert into t values ('first')").unwrap();
    let compute = &cluster.json(&["compute", "list"])[0];
    let first_postgres = compute["postgres_pid"].as_u64().unwrap();
    let first_shim = compute["pid"].as_u64().unwrap();

    // Somebody else starts a compute on the same branch: the same command, another directory.
    let arguments = std::fs::read(format!("/proc/{first_shim}/cmdline")).unwrap();
    let mut arguments: Vec<String> = arguments
        .split(|&byte| byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    arguments.pop();
    let directory = pgstrata_tests::pg_directory();
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port().to_string()
    };
    let replace = |arguments: &mut Vec<String>, name: &str, value: &str| {
        let at = arguments.iter().position(|argument| argument == name).unwrap();
        value.clone_into(&mut arguments[at + 1]);
    };
    replace(&mut arguments, "--dir", directory.path().to_str().unwrap());
    replace(&mut arguments, "--port", &port);
    replace(&mut arguments, "--listen-http", "127.0.0.1:0");
    let mut command = if pgstrata_tests::running_as_root() {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]);
        command
    } else {
        std::process::Command::new("env")
    };
    let mut second_shim = command
        .args(&arguments)
        .current_dir("/")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let second_uri = format!("postgresql://postgres@127.0.0.1:{port}/postgres");
    let mut second = connect(&second_uri);

    // The first can't commit any more, and its Postgres ends.
    let late = first.batch_execute("insert into t values ('late')");
    assert!(late.is_err(), "a fenced compute committed");
    pgstrata_tests::wait_gone(first_postgres);
    assert!(Client::connect(&uri, NoTls).is_err());

    second.batch_execute("insert into t values ('second')").unwrap();
    let rows = second.query("select who from t order by 1", &[]).unwrap();
    let who: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(who, ["first", "second"], "nothing of the first after the fence");
    drop(second);
    second_shim.kill().unwrap();
    second_shim.wait().unwrap();
}

#[test]
fn a_server_without_the_shim_does_not_open_the_directory() {
    let cluster = Cluster::new();
    cluster.up();
    let data = cluster.data_directories().remove(0);
    cluster.cli(&["compute", "stop", "main", "--immediate"]);
    let _ = std::fs::remove_file(data.join("postmaster.pid"));
    let output = pgstrata_tests::pg_command("postgres", &["-D", data.to_str().unwrap(), "-p", "1"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("pg_control"), "{text}");
}

/// A member that lags gets what it misses from whoever has it, also where the first that is asked hangs; until then no commit
/// is possible.
#[test]
fn a_donor_that_says_nothing_is_left_for_another() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let lagging = cluster.pid("safekeeper-3");
    let command = std::fs::read(format!("/proc/{lagging}/cmdline")).unwrap();
    let words: Vec<&str> =
        command.split(|byte| *byte == 0).map(|word| std::str::from_utf8(word).unwrap()).collect();
    let arguments = &words[1..words.len() - 1];
    cluster.kill("safekeeper-3");
    let mut client = connect(&uri);
    client
        .batch_execute(
            "create table missed as select g, repeat('x', 100) from generate_series(1, 5000) g",
        )
        .unwrap();
    drop(client);
    // A compute that starts has nothing in memory of what is older.
    cluster.cli(&["compute", "stop", "main"]);
    cluster.cli(&["compute", "start", "main"]);
    let hangs = cluster.pid("safekeeper-2");
    let mut client = connect(&uri);
    client.batch_execute("insert into missed values (0, 'before')").unwrap();
    signal(hangs, Signal::STOP);
    let mut again = unprivileged(Path::new(words[0]), arguments);
    let mut again = again.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (sender, committed) = std::sync::mpsc::channel();
    let insert = std::thread::spawn(move || {
        let _ = sender.send(client.batch_execute("insert into missed values (1, 'after')").is_ok());
    });
    let committed = committed.recv_timeout(Duration::from_secs(25));
    signal(hangs, Signal::CONT);
    insert.join().unwrap();
    again.kill().unwrap();
    again.wait().unwrap();
    assert_eq!(committed, Ok(true), "two of three are there, and one of them has everything");
}
