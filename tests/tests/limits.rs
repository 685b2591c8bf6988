//! How much of anything there may be: relations, databases, layers, connections at 1,024 descriptors a process, and
//! WAL records of any length that PostgreSQL can write.
//!
//! `make test` runs small forms of both, on PostgreSQL 15 and 18; `make test-all` the whole. Clients are of the server's
//! version: those of an older one refuse it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::installation::Installation;
use pgstrata_tests::{Cluster, connect, pg_directory, signal, thorough, unprivileged, wait_gone};
use postgres::Client;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SEGMENT_SIZE: u64 = 16 * MIB;

fn number(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

fn run(client: &mut Client, statement: &str) {
    client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error:?}"));
}

/// Waits for something that is about to be true.
fn wait_for(what: &str, seconds: u64, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !is_true() {
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a service answers over HTTP.
fn ask(address: &str, method: &str, path: &str) -> Value {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{path}: {error}: {answer}"))
}

fn http_address(status: &Value, name: &str) -> String {
    let processes = status["processes"].as_array().unwrap();
    let found = processes.iter().find(|process| process["name"] == name).unwrap();
    found["http"].as_str().unwrap().to_owned()
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap_or_else(|| panic!("no LSN: {text}"));
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

fn lsn_text(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)
}

fn wal_position(client: &mut Client) -> u64 {
    let row = client.query_one("select pg_current_wal_insert_lsn()::text", &[]).unwrap();
    lsn(row.get(0))
}

fn in_database(uri: &str, database: &str) -> String {
    format!("{}/{database}", uri.rsplit_once('/').unwrap().0)
}

/// PostgreSQL's client programs of a version.
struct Clients(PathBuf);

impl Clients {
    fn of(installation: &Installation) -> Clients {
        Clients(installation.clients())
    }

    /// What one of them prints.
    fn run(&self, name: &str, arguments: &[&str]) -> String {
        let output = unprivileged(&self.0.join(name), arguments).output().unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name} {arguments:?}: {complaints}");
        // A size that can't be found out is a warning or an empty field elsewhere.
        assert!(complaints.is_empty(), "{name} {arguments:?}: {complaints}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Many relations, databases, layers and connections
// ---------------------------------------------------------------------------------------------------------------------

struct Crowd {
    tables: i64,
    databases: i64,
    layers: usize,
    connections: usize,
}

/// Makes tables `t1`, `t2`, ...: each of one row, whose number is the table's.
fn make_tables(client: &mut Client, count: i64) {
    run(
        client,
        "create procedure fill(tables int) language plpgsql as $$
         begin
             for i in 1..tables loop
                 execute format('create table t%s (a int)', i);
                 execute format('insert into t%s values (%s)', i, i);
                 if i % 200 = 0 then commit; end if;
             end loop;
         end $$",
    );
    run(client, &format!("call fill({count})"));
}

/// Makes layers until main has so many. Each `compact` leaves one more behind: the runs of compacted layers are not
/// merged with each other.
fn make_layers(cluster: &Cluster, client: &mut Client, count: usize) {
    let address = http_address(&cluster.status(), "pageserver");
    let layers = || ask(&address, "GET", "/v1/branch/layers?name=main").as_array().unwrap().len();
    run(client, "create table grows (a int)");
    let deadline = Instant::now() + Duration::from_secs(900);
    let mut has = layers();
    while has < count {
        assert!(Instant::now() < deadline, "{has} layers, not {count}");
        for _ in has..count {
            run(client, "insert into grows values (1)");
            ask(&address, "POST", "/v1/branch/compact?name=main");
        }
        // One less where the page server compacted by itself in between.
        has = layers();
    }
}

/// What is in a database's directory besides its relations' blocks, at most: free space maps of its catalogs, which are
/// not kept, and `pg_internal.init` (160 kB), which PostgreSQL makes when somebody connects, such as autovacuum.
const BESIDES: i64 = 512 << 10;

/// Sizes of everything, and what one row of many relations says.
#[derive(Debug)]
struct Sizes {
    databases: Vec<(String, i64)>,
    relations: i64,
    rows: i64,
}

fn sizes(client: &mut Client, tables: i64) -> Sizes {
    let databases = client
        .query("select datname::text, pg_database_size(oid) from pg_database order by 1", &[])
        .unwrap();
    let relations = "select sum(pg_total_relation_size(oid))::bigint from pg_class
                     where relname ~ '^t[0-9]+$' and relkind = 'r'";
    let rows = format!(
        "select sum((xpath('/row/a/text()', query_to_xml(format('select a from t%s', i), false,
             true, '')))[1]::text::bigint)::bigint from generate_series(1, {tables}, 7) i"
    );
    Sizes {
        databases: databases.iter().map(|row| (row.get(0), row.get(1))).collect(),
        relations: number(client, relations),
        rows: number(client, &rows),
    }
}

impl Sizes {
    fn compare(&self, before: &Sizes, when: &str) {
        assert_eq!((self.relations, self.rows), (before.relations, before.rows), "{when}");
        for (now, before) in self.databases.iter().zip(&before.databases) {
            let is_close = (now.1 - before.1).abs() <= BESIDES;
            assert!(now.0 == before.0 && is_close, "{when}: {now:?}, not {before:?}");
        }
        assert_eq!(self.databases.len(), before.databases.len(), "{when}");
    }
}

/// What PostgreSQL's own clients say of a compute.
fn check_clients(clients: &Clients, uri: &str, crowd: &Crowd) {
    let shown = clients.run("psql", &["-X", "-A", "-t", "-F", "|", "-c", "\\l+", uri]);
    let sized = |line: &&str| line.contains(" MB|") || line.contains(" kB|");
    // Those that were made, and the three that initdb makes.
    let count = shown.lines().filter(sized).count() as i64;
    assert_eq!(count, crowd.databases + 3, "{shown}");
    let shown = clients.run("psql", &["-X", "-A", "-t", "-F", "|", "-c", "\\dt+ t*", uri]);
    let count = shown.lines().filter(|line| line.contains("|8192 bytes|")).count() as i64;
    assert_eq!(count, crowd.tables, "{}", shown.lines().take(5).collect::<String>());
    let dump = clients.run("pg_dump", &["--schema-only", "-d", uri]);
    let count = dump.lines().filter(|line| line.starts_with("CREATE TABLE public.t")).count();
    assert_eq!(count as i64, crowd.tables);
}

/// So many sessions at once, each of which reads tables that no other has read.
fn check_connections(uri: &str, crowd: &Crowd) {
    let mut clients: Vec<Client> = (0..crowd.connections).map(|_| connect(uri)).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        for table in [at as i64 % crowd.tables + 1, (at as i64 * 23) % crowd.tables + 1] {
            assert_eq!(number(client, &format!("select a::bigint from t{table}")), table);
        }
    }
    for client in &mut clients {
        assert_eq!(number(client, "select 1::bigint"), 1, "all of them are there still");
    }
}

/// Descriptors of each process of ours, for the figures.
fn descriptors(cluster: &Cluster) -> BTreeMap<String, usize> {
    let count = |pid: u64| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    pids(cluster).into_iter().map(|(name, pid)| (name, count(pid))).collect()
}

fn a_crowd_with_1024_descriptors(major: u32, crowd: &Crowd) {
    let installation = Installation::of(major);
    let clients = Clients::of(&installation);
    let mut cluster = Cluster::of(&installation, &[]);
    cluster.limit_descriptors(1024);
    let began = Instant::now();
    let say = |what: &str| eprintln!("{major}: {:7.1} s {what}", began.elapsed().as_secs_f64());
    let mut client = cluster.client();
    run(&mut client, &format!("alter system set max_connections = {}", crowd.connections + 50));
    let mut client = cluster.restart();
    for database in 1..=crowd.databases {
        run(&mut client, &format!("create database d{database}"));
    }
    say("databases made");
    make_tables(&mut client, crowd.tables);
    say("tables made");
    make_layers(&cluster, &mut client, crowd.layers);
    say("layers made");
    let before = sizes(&mut client, crowd.tables);
    assert_eq!(before.databases.len() as i64, crowd.databases + 3);
    assert!(before.databases.iter().all(|(_, size)| *size > 5 * MIB as i64), "{before:?}");
    assert_eq!(before.relations, crowd.tables * 8192);
    say("sizes taken");

    let mut client = cluster.restart();
    let uri = cluster.up();
    say("compute restarted");
    sizes(&mut client, crowd.tables).compare(&before, "after a restart of the compute");
    say("sizes compared");
    check_clients(&clients, &uri, crowd);
    say("psql and pg_dump");
    check_connections(&uri, crowd);
    say("connections");
    eprintln!("{major}: descriptors: {:?}", descriptors(&cluster));
    let other = format!("d{}", crowd.databases);
    run(&mut connect(&in_database(&uri, &other)), "create table here as select 1 a");

    // On a branch nothing is there yet.
    cluster.cli(&["branch", "create", "other"]);
    let row = cluster.json(&["compute", "start", "other"]);
    say(&format!("branch's compute started in {} ms", row["start_ms"]));
    let uri = row["uri"].as_str().unwrap();
    let mut client = connect(uri);
    sizes(&mut client, crowd.tables).compare(&before, "on a branch");
    say("sizes on the branch");
    check_clients(&clients, uri, crowd);
    check_connections(uri, crowd);
    say("clients and connections on the branch");
    eprintln!("{major}: descriptors: {:?}", descriptors(&cluster));
    let here = number(&mut connect(&in_database(uri, &other)), "select a::bigint from here");
    assert_eq!(here, 1);
    drop(client);

    // Everything stops and starts.
    cluster.cli(&["down"]);
    let mut client = cluster.client();
    say("all restarted");
    sizes(&mut client, crowd.tables).compare(&before, "after a restart of everything");
    let address = http_address(&cluster.status(), "pageserver");
    let layers = ask(&address, "GET", "/v1/branch/layers?name=main").as_array().unwrap().len();
    assert!(layers >= crowd.layers, "{layers}");
    say(&format!("done, with {layers} layers"));
}

fn crowd(major: u32) {
    let small = Crowd { tables: 200, databases: 2, layers: 30, connections: 60 };
    let whole = Crowd { tables: 5000, databases: 20, layers: 2000, connections: 200 };
    a_crowd_with_1024_descriptors(major, if thorough() { &whole } else { &small });
}

#[test]
fn postgresql_15_many_of_everything() {
    crowd(15);
}

#[test]
fn postgresql_18_many_of_everything() {
    crowd(18);
}

// ---------------------------------------------------------------------------------------------------------------------
// Long records
// ---------------------------------------------------------------------------------------------------------------------

/// What a process may grow by, however short the record: buffers that fill once and are bounded, such as a safekeeper's
/// segments being archived (16 MiB, compressed beside it) or PostgreSQL's shared buffers, which count as memory of whoever
/// touches them first. From 16 MiB on the record decides.
const ALLOWANCE: u64 = 64 * MIB;

/// Processes of a cluster and of its compute of main, by name.
fn pids(cluster: &Cluster) -> BTreeMap<String, u64> {
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap().iter();
    let mut pids: BTreeMap<String, u64> = processes
        .filter_map(|process| {
            Some((process["name"].as_str()?.to_owned(), process["pid"].as_u64()?))
        })
        .collect();
    let computes = status["computes"].as_array().unwrap();
    let main = computes.iter().find(|row| row["branch"] == "main").unwrap();
    if let Some(postmaster) = main["postgres_pid"].as_u64() {
        pids.insert("postgres".into(), postmaster);
        let path = format!("/proc/{postmaster}/task/{postmaster}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            let title = command.unwrap_or_default().replace('\0', " ");
            // Of a session, its number; of others, what they are.
            let title = title.trim_start_matches("postgres: ").trim();
            let kind = if title.contains("127.0.0.1") { "session" } else { title };
            pids.insert(format!("{kind} {pid}"), pid);
        }
    }
    pids
}

fn memory(pid: u64, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// What processes have in memory before something that may make them grow.
struct Memory(BTreeMap<u64, u64>);

impl Memory {
    fn note(cluster: &Cluster) -> Memory {
        let mut before = BTreeMap::new();
        for pid in pids(cluster).into_values() {
            // The peak begins anew.
            std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
            before.extend(memory(pid, "VmRSS").map(|now| (pid, now)));
        }
        Memory(before)
    }

    /// How much each has grown at most since then; one that was started meanwhile, from nothing.
    fn growth(&self, cluster: &Cluster) -> BTreeMap<String, u64> {
        let grown = |pid: u64| {
            let before = self.0.get(&pid).copied().unwrap_or(0);
            Some(memory(pid, "VmHWM")?.saturating_sub(before))
        };
        pids(cluster).into_iter().filter_map(|(name, pid)| Some((name, grown(pid)?))).collect()
    }
}

/// `pg_receivewal`, which follows a safekeeper's port for replication.
struct Receiver {
    child: Child,
    directory: TempDir,
}

impl Receiver {
    fn start(clients: &Clients, cluster: &Cluster, main: &Value) -> Receiver {
        let program = clients.0.join("pg_receivewal");
        let connection = format!(
            "host=127.0.0.1 port={} user=test options='-c pgstrata.tenant={} -c pgstrata.timeline={}'",
            cluster.replication_port("safekeeper"),
            main["tenant_id"].as_str().unwrap(),
            main["timeline_id"].as_str().unwrap(),
        );
        let directory = pg_directory();
        let into = directory.path().to_str().unwrap();
        let arguments = ["--no-loop", "--status-interval=1", "-d", &connection, "-D", into];
        let child = unprivileged(&program, &arguments).stdin(Stdio::null()).spawn().unwrap();
        Receiver { child, directory }
    }

    /// Waits until everything before `end` is there, in whole segments.
    fn wait(&mut self, end: u64) {
        let last = (end - 1) / SEGMENT_SIZE;
        let name = format!("00000001{:08X}{:08X}", last / 256, last % 256);
        let path = self.directory.path().join(name);
        wait_for("pg_receivewal has the record", 120, || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("pg_receivewal: {status}");
            }
            path.exists()
        });
    }

    /// Removes what is checked: a test has some gigabytes of WAL.
    fn forget(&self) {
        for entry in std::fs::read_dir(self.directory.path()).unwrap().flatten() {
            if entry.path().extension().is_none_or(|extension| extension != "partial") {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The longest record of a kind in a directory of segments, by PostgreSQL's own `pg_waldump`, which checks checksums
/// and back links of all. It prints sums: there has to be one.
fn longest_by_waldump(clients: &Clients, at: &Path, from: u64, to: u64, kind: &str) -> u64 {
    let (start, end) = (format!("--start={}", lsn_text(from)), format!("--end={}", lsn_text(to)));
    let arguments = ["--stats=record", "-p", at.to_str().unwrap(), &start, &end];
    let output = clients.run("pg_waldump", &arguments);
    let line = output.lines().find(|line| line.trim().starts_with(kind));
    let line = line.unwrap_or_else(|| panic!("no {kind} in {output}"));
    // Kind, count, (share), bytes of records, ...
    let figures: Vec<u64> = line
        .replace(['(', ')'], " ")
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    figures[1]
}

/// One record.
struct Record<'a> {
    /// What to do before, and the statement that writes it.
    prepare: String,
    statement: String,
    /// As `pg_waldump` calls it.
    kind: &'a str,
    /// What the record has at least.
    bytes: u64,
    /// Tables that have to be there.
    tables: i64,
}

fn message(mib: u64) -> Record<'static> {
    let statement =
        format!("select pg_logical_emit_message(true, 'm', repeat('x', {}))", mib * MIB);
    Record {
        prepare: String::new(),
        statement,
        kind: "LogicalMessage/MESSAGE",
        bytes: mib * MIB,
        tables: 0,
    }
}

/// A row whose values were stored elsewhere: the record of its deletion has them all, for whoever decodes it.
fn full_delete(mib: u64) -> Record<'static> {
    // A value has less than a GiB, and so has a record.
    const COLUMNS: u64 = 4;
    let columns: Vec<_> = (0..COLUMNS).map(|column| format!("c{column} text")).collect();
    let external: Vec<_> =
        (0..COLUMNS).map(|column| format!("alter c{column} set storage external")).collect();
    let length = mib * MIB / COLUMNS;
    let values = vec![format!("repeat('x', {length})"); COLUMNS as usize].join(", ");
    let prepare = format!(
        "drop table if exists wide; create table wide ({}); alter table wide {};
         alter table wide replica identity full; insert into wide values ({values})",
        columns.join(", "),
        external.join(", ")
    );
    Record {
        prepare,
        statement: "delete from wide".into(),
        kind: "Heap/DELETE",
        bytes: mib * MIB,
        tables: 0,
    }
}

/// Bytes that a process has handed to the kernel to be written, whether or not they count for anything yet.
fn bytes_written(pid: u64) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok())
}

/// How much the session that writes the record grows on a stock server, after what comes before it.
fn stock_growth(major: u32, record: &Record<'_>) -> u64 {
    let installation = Installation::of(major);
    let directory = pg_directory();
    let data = directory.path().join("data");
    installation
        .run("initdb", &["-D", data.to_str().unwrap(), "-U", "postgres", "--auth=trust", "-N"]);
    let settings = "max_locks_per_transaction = 2000\nwal_level = logical\nfsync = off\n";
    let mut conf =
        std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf")).unwrap();
    conf.write_all(settings.as_bytes()).unwrap();
    let server = installation.start(&data);
    let mut client = server.client();
    make_tables(&mut client, record.tables);
    drop(client);
    let mut client = server.client();
    if !record.prepare.is_empty() {
        run(&mut client, &record.prepare);
    }
    let pid = number(&mut client, "select pg_backend_pid()::bigint") as u64;
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
    let before = memory(pid, "VmRSS").unwrap();
    run(&mut client, &record.statement);
    memory(pid, "VmHWM").unwrap().saturating_sub(before)
}

/// How far a safekeeper is with a timeline.
fn position(safekeeper: &str, timeline: &str, field: &str) -> u64 {
    let said = ask(safekeeper, "GET", "/v1/status");
    let timelines = said["timelines"].as_array().unwrap();
    let found = timelines.iter().find(|one| one["timeline_id"] == timeline);
    found.map_or(0, |found| lsn(found[field].as_str().unwrap()))
}

/// A cluster, and what follows it.
struct Passage {
    major: u32,
    clients: Clients,
    /// It ends before what it follows.
    receiver: Receiver,
    cluster: Cluster,
    timeline: String,
    passed: i64,
}

impl Passage {
    fn start(major: u32, settings: &[&str]) -> Passage {
        let installation = Installation::of(major);
        let clients = Clients::of(&installation);
        let cluster = Cluster::of(&installation, &[]);
        let mut client = cluster.client();
        // A record that is read back by the server's own means is one more copy, and none of ours.
        for setting in settings {
            run(&mut client, &format!("alter system set {setting}"));
        }
        let mut client = cluster.restart();
        run(&mut client, "create table passed (a bigint)");
        let status = cluster.status();
        let branches = status["branches"].as_array().unwrap();
        let main = branches.iter().find(|branch| branch["name"] == "main").unwrap();
        let timeline = main["timeline_id"].as_str().unwrap().to_owned();
        let receiver = Receiver::start(&clients, &cluster, main);
        Passage { major, clients, receiver, cluster, timeline, passed: 0 }
    }

    /// The record is written while a safekeeper is killed, and is found everywhere.
    fn passes(&mut self, record: &Record<'_>) {
        let began = Instant::now();
        let what = format!("{} of {} MiB on {}", record.kind, record.bytes / MIB, self.major);
        let uri = self.cluster.up();
        let mut client = connect(&uri);
        if !record.prepare.is_empty() {
            run(&mut client, &record.prepare);
            // What it wrote is in nobody's memory any more.
            self.cluster.cli(&["compact"]);
        }
        let prepared = began.elapsed();
        let status = self.cluster.status();
        let timeline = self.timeline.clone();
        // Not the one that pg_receivewal listens to.
        let victim = format!("safekeeper-{}", 2 + self.passed % 2);
        let victim_pid = self.cluster.pid(&victim);
        let memory = Memory::note(&self.cluster);
        let start = wal_position(&mut client);

        let since = Instant::now();
        let statement = record.statement.clone();
        let writer = std::thread::spawn(move || {
            run(&mut client, &statement);
            let end = wal_position(&mut client);
            (client, end)
        });
        // In the middle: when it has written a third of the record, which is nothing to it before the record is whole.
        let before = bytes_written(victim_pid).unwrap();
        let mut killed_at = 0;
        while !writer.is_finished() && killed_at < record.bytes / 3 {
            assert!(since.elapsed() < Duration::from_secs(1800), "{what}: it does not move");
            killed_at = bytes_written(victim_pid).unwrap() - before;
            std::thread::sleep(Duration::from_millis(1));
        }
        let in_the_middle = !writer.is_finished() && killed_at < record.bytes;
        signal(victim_pid, Signal::KILL);
        wait_gone(victim_pid);
        wait_for(&format!("{what}: the statement ends"), 1800, || writer.is_finished());
        let (mut client, end) = writer.join().unwrap();
        let written = since.elapsed();
        assert!(end - start >= record.bytes, "{what}: {start} to {end}");
        // A short one may pass between two looks.
        assert!(in_the_middle || record.bytes < 10 * MIB, "{what}: {victim} outlived it");
        run(&mut client, "insert into passed values (1)");
        self.passed += 1;
        let growth_of_writer = memory.growth(&self.cluster);

        // A branch right after.
        let since = Instant::now();
        let branch = format!("after{}", self.passed);
        self.cluster.cli(&["branch", "create", &branch]);
        let mut other = self.cluster.branch_client(&branch);
        assert_eq!(number(&mut other, "select count(*) from passed"), self.passed, "{what}");
        drop(other);
        self.cluster.cli(&["compute", "stop", &branch]);
        let branched = since.elapsed();

        // The one that was killed catches up, and the archive takes it all.
        let since = Instant::now();
        self.cluster.up();
        run(&mut client, "select pg_switch_wal(); insert into passed values (0)");
        run(&mut client, "delete from passed where a = 0");
        let archived = end.div_ceil(SEGMENT_SIZE) * SEGMENT_SIZE;
        for name in ["safekeeper-1", "safekeeper-2", "safekeeper-3"] {
            let address = http_address(&status, name);
            wait_for(&format!("{what}: {name} has it"), 300, || {
                position(&address, &timeline, "commit_lsn") >= end
            });
            wait_for(&format!("{what}: {name} sees it archived"), 300, || {
                position(&address, &timeline, "archived_lsn") >= archived
            });
        }
        let archive_time = since.elapsed();
        let mut growth = growth_of_writer;
        for (name, grown) in memory.growth(&self.cluster) {
            let most = growth.entry(name).or_default();
            *most = grown.max(*most);
        }

        // With the page server's layer uploaded nobody keeps it but the archive, and there it is read.
        self.cluster.cli(&["compact"]);
        for name in ["safekeeper-1", "safekeeper-2", "safekeeper-3"] {
            let address = http_address(&status, name);
            wait_for(&format!("{what}: {name} drops it"), 60, || {
                position(&address, &timeline, "available_lsn") >= end / SEGMENT_SIZE * SEGMENT_SIZE
            });
        }
        let since = Instant::now();
        let (from, to) = (lsn_text(start), lsn_text(end));
        let verified = self.cluster.cli(&["wal", "verify", "--from", &from, "--to", &to]);
        let verify_time = since.elapsed();

        self.receiver.wait(end);
        let at = self.receiver.directory.path();
        let received = longest_by_waldump(&self.clients, at, start, end, record.kind);
        assert!(received >= record.bytes, "{what}: pg_receivewal has {received}");
        self.receiver.forget();
        eprintln!(
            "{what}: prepared {:.1} s, written {:.1} s ({victim} killed at {:.1} of {:.1} MiB), branched {:.1} s, \
             archived {:.1} s, verified {:.1} s ({}), received {received}",
            prepared.as_secs_f64(),
            written.as_secs_f64(),
            killed_at as f64 / MIB as f64,
            (end - start) as f64 / MIB as f64,
            branched.as_secs_f64(),
            archive_time.as_secs_f64(),
            verify_time.as_secs_f64(),
            verified.lines().last().unwrap_or_default(),
        );
        let figures: Vec<_> =
            growth.iter().map(|(name, grown)| format!("{name} {}", grown / MIB)).collect();
        eprintln!("{what}: grown by MiB: {}", figures.join(", "));
        let most = (4 * received.max(record.bytes)).max(ALLOWANCE);
        // What PostgreSQL itself takes for the statement, it takes anywhere.
        let session =
            growth.iter().filter(|(name, _)| name.starts_with("session ")).map(|(_, grown)| *grown);
        let own = match session.max().is_some_and(|grown| grown > most) {
            true => stock_growth(self.major, record),
            false => 0,
        };
        eprintln!("{what}: a session of a stock server has grown by MiB: {}", own / MIB);
        let limit = |name: &str| if name.starts_with("session ") { most + own } else { most };
        let too_much: Vec<_> =
            growth.iter().filter(|(name, grown)| **grown > limit(name)).collect();
        assert!(too_much.is_empty(), "{what}: grown by more than {most} bytes: {too_much:?}");
    }
}

fn long_records(major: u32) {
    let mut passage = Passage::start(major, &["wal_level = logical"]);
    let records = if thorough() {
        let messages = [1, 47, 48, 49, 200, 1000].map(message);
        messages.into_iter().chain([49, 200, 1000].map(full_delete)).collect()
    } else {
        vec![message(1), message(49), full_delete(49)]
    };
    for record in &records {
        passage.passes(record);
    }
}

#[test]
fn postgresql_15_long_records() {
    long_records(15);
}

#[test]
fn postgresql_18_long_records() {
    long_records(18);
}

// ---------------------------------------------------------------------------------------------------------------------
// Very many relations, and a commit that drops them
// ---------------------------------------------------------------------------------------------------------------------

fn very_many_relations(major: u32, count: i64) {
    let mut passage = Passage::start(major, &["max_locks_per_transaction = 2000"]);
    let began = Instant::now();
    let say = |what: &str| eprintln!("{major}: {:7.1} s {what}", began.elapsed().as_secs_f64());
    let mut client = passage.cluster.client();
    make_tables(&mut client, count);
    say("relations made");
    drop(client);
    let mut starts_ms = Vec::new();
    for _ in 0..3 {
        passage.cluster.cli(&["compute", "stop", "main"]);
        let row = passage.cluster.json(&["compute", "start", "main"]);
        starts_ms.push(row["start_ms"].as_u64().unwrap());
    }
    say(&format!("started in {starts_ms:?} ms"));
    let mut client = passage.cluster.client();
    let size = number(&mut client, "select pg_database_size(current_database())");
    say(&format!("the database has {size} bytes"));
    assert!(size > count * 8192, "{size}");
    drop(client);
    let since = Instant::now();
    passage.cluster.status();
    say(&format!("status took {:.1} s", since.elapsed().as_secs_f64()));
    // The commit's record is what is looked at: what comes before it are many short ones, and locks.
    let drop = Record {
        prepare: format!(
            "begin; do $$ begin for i in 1..{count} loop execute format('drop table t%s', i); end loop; end $$"
        ),
        statement: "commit".into(),
        kind: "Transaction/COMMIT",
        // For each relation its tablespace, database and number, and some twenty invalidations of 16 bytes.
        bytes: count as u64 * 300,
        tables: count,
    };
    passage.passes(&drop);
    say("dropped");
    // Last, since a machine that is busy with other things spoils this and nothing else.
    assert!(starts_ms.iter().all(|ms| *ms < 2000), "with {count} relations: {starts_ms:?} ms");
}

/// Only whole: what few relations do is seen in `postgresql_15_many_of_everything`.
#[test]
fn postgresql_15_very_many_relations() {
    if thorough() {
        very_many_relations(15, 100_000);
    }
}

#[test]
fn postgresql_18_very_many_relations() {
    if thorough() {
        very_many_relations(18, 100_000);
    }
}
