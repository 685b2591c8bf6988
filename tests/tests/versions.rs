//! Computes on PostgreSQL 16, 17 and 18 do what those on 15 do.
//!
//! `make test` runs 18 whole, and the short form of the others; `make test-all` runs all of them
//! whole. `tests/standby.rs` compares pages with a stock standby's in the same way.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgstrata_tests::installation::{Installation, Server};
use pgstrata_tests::workload::{Moment, note_moment, permanent, step};
use pgstrata_tests::{Cluster, backup, connect, pg_directory, pg_program, thorough};
use postgres::Client;
use tempfile::TempDir;

const PAGE: u64 = 8192;

fn in_database(uri: &str, database: &str) -> String {
    format!("{}/{database}", uri.rsplit_once('/').unwrap().0)
}

fn setting(client: &mut Client, name: &str) -> String {
    client.query_one("select current_setting($1)", &[&name]).unwrap().get(0)
}

/// Whether the cluster that a test makes has page checksums: initdb's default since 18, asked for
/// on 15 to have both kinds, and to have what comes out looked at by 15's own `pg_checksums`.
fn has_checksums(major: u32) -> bool {
    matches!(major, 15 | 18)
}

/// What a compute of this version has to run with.
fn check_settings(client: &mut Client, major: u32) {
    let version: u32 = setting(client, "server_version_num").parse().unwrap();
    assert_eq!(version / 10_000, major);
    assert_eq!(setting(client, "full_page_writes"), "off");
    assert_eq!(setting(client, "fsync"), "on");
    assert_eq!(setting(client, "wal_sync_method"), "fdatasync");
    assert_eq!(setting(client, "data_checksums") == "on", has_checksums(major));
    if major >= 18 {
        // What io_uring reads does not pass the preload library.
        assert_eq!(setting(client, "io_method"), "worker");
    }
}

/// What branches.rs does not have in its steps: several databases, a tablespace, transactions that
/// stay prepared, files that are read and grown many blocks at once.
fn extras(client: &mut Client, uri: &str, major: u32, tablespace: &Path) {
    let mut run = |statement: &str| {
        client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    };
    run(
        "create table wide as select g a, repeat(md5(g::text), 20) b from generate_series(1, 20000) g",
    );
    run("create index on wide using gin (string_to_array(left(b, 40), 'a'))");
    run("create index on wide using hash (a)");
    run("create index on wide using brin (a)");
    run("create table points as select point(g, g) p from generate_series(1, 3000) g");
    run("create index on points using gist (p)");
    run("create index on points using spgist (p)");
    run(&format!("create tablespace ts location '{}'", tablespace.display()));
    run("create table in_ts (a int primary key, b text) tablespace ts");
    run("insert into in_ts select g, md5(g::text) from generate_series(1, 2000) g");
    run("create unlogged table unlogged (a int primary key, b text)");
    run("insert into unlogged values (1, 'gone after a crash')");
    run("set allow_in_place_tablespaces = on");
    run("create tablespace inside location ''");
    run("create table in_inside tablespace inside as select g a from generate_series(1, 500) g");
    run("select lo_from_bytea(4711, decode(repeat('ab', 30000), 'hex'))");
    run("create database walcopy strategy wal_log");
    run("create database filecopy strategy file_copy");
    if major >= 18 {
        // Copies with copy_file_range, which the preload library has to see.
        run("set file_copy_method = clone");
        run("create database cloned template filecopy strategy file_copy");
        run("reset file_copy_method");
    }
    for database in databases(major) {
        let mut other = connect(&in_database(uri, database));
        let table = "create table t as select g a, md5(g::text) b from generate_series(1, 1000) g";
        other.batch_execute(table).unwrap();
    }
    client.batch_execute("begin; insert into in_ts values (-1, 'prepared'); create table made (a int); insert into made values (7); prepare transaction 'later'").unwrap();
}

/// Files that were never read here are copied, and a database is moved.
fn copy_what_is_not_here(client: &mut Client, uri: &str, major: u32) {
    let mut run = |statement: &str| {
        client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    };
    run("create database late template filecopy strategy file_copy");
    if major >= 18 {
        run("set file_copy_method = clone");
        run("create database latest template cloned strategy file_copy");
        run("alter database cloned set tablespace ts");
        run("reset file_copy_method");
    }
    run("alter database walcopy set tablespace ts");
    check_databases(uri, major);
    check_database(uri, "late");
    if major >= 18 {
        check_database(uri, "latest");
    }
}

fn check_database(uri: &str, database: &str) {
    let mut other = connect(&in_database(uri, database));
    let query = "select count(*), sum(a), md5(string_agg(b, '' order by a)) from t";
    let row = other.query_one(query, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1000, 500_500), "{database}");
    let expected =
        "select md5(string_agg(md5(g::text), '' order by g)) from generate_series(1, 1000) g";
    let expected: String = other.query_one(expected, &[]).unwrap().get(0);
    assert_eq!(row.get::<_, String>(2), expected, "{database}");
}

fn check_databases(uri: &str, major: u32) {
    databases(major).iter().for_each(|database| check_database(uri, database));
}

fn databases(major: u32) -> &'static [&'static str] {
    if major >= 18 { &["walcopy", "filecopy", "cloned"] } else { &["walcopy", "filecopy"] }
}

/// A whole data directory as the page server gives it, at an LSN. Tablespaces lie beside it.
fn export(cluster: &Cluster, branch: &str, lsn: &str) -> (TempDir, PathBuf) {
    let directory = pg_directory();
    let options = format!("-c pgstrata.branch={branch} -c pgstrata.lsn={lsn}");
    let port = cluster.replication_port("pageserver");
    let taken = backup::take(port, &options, "LABEL 'test', WAL true, MANIFEST 'no'").unwrap();
    let data = taken.unpack(directory.path());
    (directory, data)
}

/// PostgreSQL's own look at every page: `BASE_BACKUP` verifies checksums unless told not to.
fn verify_checksums(server: &Server<'_>) -> Result<(), String> {
    let arguments = "LABEL 'verify', CHECKPOINT 'fast', WAL false, MANIFEST 'no'";
    backup::take(server.port(), "", arguments).map(drop)
}

fn amcheck(port: u16) {
    let port = port.to_string();
    let at = ["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-d", "postgres"];
    pg_program("pg_amcheck", &[&["--heapallindexed"], &at[..]].concat());
}

fn port_of(uri: &str) -> u16 {
    uri.rsplit_once(':').unwrap().1.split('/').next().unwrap().parse().unwrap()
}

/// Stock PostgreSQL starts on the exported directory, finds nothing wrong, and has that moment.
fn check_export(installation: &Installation, cluster: &Cluster, moment: &Moment, last: bool) {
    let (_directory, data) = export(cluster, "main", &moment.lsn);
    if installation.major() == 15 && has_checksums(15) {
        installation.run("pg_checksums", &["--check", "-D", data.to_str().unwrap()]);
    }
    let server = installation.start(&data);
    let mut client = server.client();
    assert!(server.log().contains("database system was shut down at"), "{}", server.log());
    assert_eq!(permanent(&mut client), moment.digests, "exported as of {}", moment.lsn);
    if last {
        check_databases(&server.uri(), installation.major());
    }
    client.batch_execute("create table written_here as select 1 a; checkpoint").unwrap();
    if !has_checksums(installation.major()) {
        return;
    }
    verify_checksums(&server).unwrap();
    let failures = "select coalesce(sum(checksum_failures), 0)::bigint from pg_stat_database";
    assert_eq!(client.query_one(failures, &[]).unwrap().get::<_, i64>(0), 0);

    // That look would have found a single flipped bit.
    let query = "select pg_relation_filepath('pg_proc'), pg_relation_size('pg_proc') / 8192";
    let row = client.query_one(query, &[]).unwrap();
    let (path, blocks): (String, i64) = (row.get(0), row.get(1));
    drop(client);
    drop(server);
    let mut file =
        std::fs::OpenOptions::new().read(true).write(true).open(data.join(path)).unwrap();
    file.seek(SeekFrom::Start(blocks as u64 / 2 * PAGE + PAGE - 10)).unwrap();
    let mut byte = [0];
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Current(-1)).unwrap();
    file.write_all(&[byte[0] ^ 1]).unwrap();
    drop(file);
    let server = installation.start(&data);
    let error = verify_checksums(&server).unwrap_err();
    assert!(error.contains("checksum"), "{error}");
}

/// A branch shows that moment, and is a database of its own.
fn check_branch(cluster: &Cluster, name: &str, at: &str, moment: &Moment) {
    cluster.cli(&["branch", "create", name, "--at", at]);
    let mut client = cluster.branch_client(name);
    assert_eq!(permanent(&mut client), moment.digests, "branch at {at}");
    client.batch_execute("create table mine as select 1 a; drop table t0 cascade").unwrap();
    drop(client);
    cluster.cli(&["compute", "stop", name]);
}

fn check_read_only(cluster: &Cluster, moment: &Moment) {
    cluster.cli(&["branch", "create", "view", "--at", &moment.lsn]);
    let row = cluster.json(&["compute", "start", "view", "--read-only"]);
    let mut view = connect(row["uri"].as_str().unwrap());
    assert_eq!(permanent(&mut view), moment.digests, "read-only at {}", moment.lsn);
    let write = view.batch_execute("begin read write; create table no (a int); commit");
    assert!(write.is_err(), "a read-only compute took a write");
    drop(view);
    cluster.cli(&["compute", "stop", "view"]);
}

/// Everything killed at once, while somebody commits; every local directory deleted.
fn lose_everything(cluster: &Cluster, uri: &str) -> i64 {
    let mut writer = connect(uri);
    let thread = std::thread::spawn(move || {
        for number in 1.. {
            if writer.execute("insert into promises values ($1)", &[&number]).is_err() {
                return number - 1;
            }
        }
        0
    });
    std::thread::sleep(Duration::from_millis(300));
    let data_directories = cluster.data_directories();
    cluster.kill_everything();
    let promised: i64 = thread.join().unwrap();
    assert!(promised > 0, "nothing was committed");
    cluster.delete_local_directories(&data_directories);
    promised
}

fn check_version(major: u32, whole: bool) {
    let installation = Installation::of(major);
    let options: &[&str] = if major == 15 { &["--data-checksums"] } else { &[] };
    let cluster = Cluster::of(&installation, options);
    let uri = cluster.up();
    let mut client = connect(&uri);
    check_settings(&mut client, major);
    let mut moments = Vec::new();
    for number in 0..if whole { 10 } else { 4 } {
        step(&mut client, number);
        moments.push(note_moment(&mut client));
        std::thread::sleep(Duration::from_millis(5));
    }
    let tablespaces = pg_directory();
    extras(&mut client, &uri, major, tablespaces.path());
    moments.push(note_moment(&mut client));
    client
        .batch_execute("create extension amcheck; create table promises (number bigint)")
        .unwrap();
    let before = permanent(&mut client);
    drop(client);

    let promised = lose_everything(&cluster, &uri);
    let uri = cluster.up();
    let mut client = connect(&uri);
    let kept = client
        .query_one("select count(*), max(number) from promises where number <= $1", &[&promised])
        .unwrap();
    assert_eq!((kept.get::<_, i64>(0), kept.get::<_, i64>(1)), (promised, promised));
    let mut after = permanent(&mut client);
    after.retain(|(name, _, _)| name != "promises");
    let before: Vec<_> = before.into_iter().filter(|(name, _, _)| name != "promises").collect();
    assert_eq!(after, before);
    // An unlogged table and its index begin anew, as after any crash.
    let count = client.query_one("select count(*) from unlogged", &[]).unwrap();
    assert_eq!(count.get::<_, i64>(0), 0);
    client.batch_execute("insert into unlogged select g from generate_series(1, 999) g").unwrap();
    copy_what_is_not_here(&mut client, &uri, major);
    let object = client.query_one("select length(lo_get(4711))", &[]).unwrap();
    assert_eq!(object.get::<_, i32>(0), 30_000);
    client.batch_execute("commit prepared 'later'").unwrap();
    let row = client.query_one("select a, (select b from in_ts where a = -1) from made", &[]);
    let row = row.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1)), (7, "prepared".into()));
    amcheck(port_of(&uri));
    // What is read and written after that goes on as if nothing had been.
    step(&mut client, 13);
    moments.push(note_moment(&mut client));
    drop(client);

    let last = moments.len() - 1;
    let by_lsn: &[usize] = if whole { &[1, 4, last - 1, last] } else { &[last - 1] };
    let by_time: &[usize] = if whole { &[3, 6, last] } else { &[2] };
    for &number in by_lsn {
        check_branch(&cluster, &format!("l{number}"), &moments[number].lsn, &moments[number]);
    }
    for &number in by_time {
        check_branch(&cluster, &format!("t{number}"), &moments[number].time, &moments[number]);
    }
    check_export(&installation, &cluster, &moments[last], true);
    check_read_only(&cluster, &moments[last - 1]);
    if whole {
        check_export(&installation, &cluster, &moments[5], false);
        check_read_only_restarts(&cluster, &moments[last - 1]);
        check_more_room(&cluster);
    }
    let other = Installation::of(if major == 15 { 16 } else { 15 });
    let refusal = cluster.refusal(&["up", "--pg-bin", other.bin().to_str().unwrap()], 1);
    assert!(refusal.contains("same major version"), "{refusal}");
    cluster.up();
}

/// A compute with other settings: its read-only copies need as much room, and WAL is summarized
/// where PostgreSQL knows how to.
fn check_more_room(cluster: &Cluster) {
    let mut client = cluster.client();
    client.batch_execute("alter system set max_connections = 150").unwrap();
    client.batch_execute("alter system set max_locks_per_transaction = 128").unwrap();
    let major = setting(&mut client, "server_version_num").parse::<u32>().unwrap() / 10_000;
    if major >= 17 {
        client.batch_execute("alter system set summarize_wal = on").unwrap();
    }
    drop(client);
    cluster.cli(&["compute", "stop", "main"]);
    let mut client = cluster.client();
    assert_eq!(setting(&mut client, "max_connections"), "150");
    client.batch_execute("create table roomy as select 1 a").unwrap();
    let moment = note_moment(&mut client);
    cluster.cli(&["branch", "create", "roomy", "--at", &moment.lsn]);
    let row = cluster.json(&["compute", "start", "roomy", "--read-only"]);
    let mut view = connect(row["uri"].as_str().unwrap());
    assert_eq!(permanent(&mut view), moment.digests);
    if major >= 17 {
        client.batch_execute("checkpoint").unwrap();
        let query = "select summarized_lsn >= $1::text::pg_lsn from pg_get_wal_summarizer_state()";
        let deadline = Instant::now() + Duration::from_secs(20);
        while !client.query_one(query, &[&moment.lsn]).unwrap().get::<_, bool>(0) {
            assert!(Instant::now() < deadline, "WAL is not summarized");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A read-only compute that is killed comes back with the same view.
fn check_read_only_restarts(cluster: &Cluster, moment: &Moment) {
    let row = cluster.json(&["compute", "start", "view", "--read-only"]);
    cluster.kill("compute-view");
    cluster.up();
    let mut view = connect(row["uri"].as_str().unwrap());
    assert_eq!(permanent(&mut view), moment.digests);
    drop(view);
    cluster.cli(&["compute", "stop", "view"]);
}

#[test]
fn postgresql_15() {
    check_version(15, thorough());
}

#[test]
fn postgresql_16() {
    check_version(16, thorough());
}

#[test]
fn postgresql_17() {
    check_version(17, thorough());
}

#[test]
fn postgresql_18() {
    check_version(18, true);
}

/// Gives a data directory to the page server as a branch of a tenant of its own.
fn import(cluster: &Cluster, installation: &Installation, name: &str, number: u32) {
    let directory = pg_directory();
    let data = directory.path().join("data");
    let place = data.to_str().unwrap();
    installation.run("initdb", &["-D", place, "-U", "postgres", "--auth=trust", "-N"]);
    let mut archive = tar::Builder::new(Vec::new());
    for part in ["base", "global", "pg_xact", "pg_multixact", "pg_commit_ts"] {
        archive.append_dir_all(part, data.join(part)).unwrap();
    }
    let body = archive.into_inner().unwrap();
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap();
    let pageserver = processes.iter().find(|process| process["role"] == "pageserver").unwrap();
    let mut stream = TcpStream::connect(pageserver["http"].as_str().unwrap()).unwrap();
    let head = format!(
        "POST /v1/import?tenant={number:032x}&timeline={number:032x}&name={name} HTTP/1.1\r\n\
         Host: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn one_page_server_has_clusters_of_every_version() {
    let cluster = Cluster::new();
    cluster.up();
    let others = [16, 17, 18].map(Installation::of);
    for installation in &others {
        let major = installation.major();
        import(&cluster, installation, &format!("v{major}"), major);
    }
    for installation in &others {
        let major = installation.major();
        let options = format!("-c pgstrata.branch=v{major}");
        let port = cluster.replication_port("pageserver");
        let taken = backup::take(port, &options, "WAL true, MANIFEST 'no'").unwrap();
        let directory = pg_directory();
        let data = taken.unpack(directory.path());
        let server = installation.start(&data);
        let mut client = server.client();
        let version: u32 = setting(&mut client, "server_version_num").parse().unwrap();
        assert_eq!(version / 10_000, major);
        client.batch_execute("create table t as select 1 a; checkpoint").unwrap();
        // The cluster's own programs are of 15, and say so before they touch the branch.
        let refusal = cluster.refusal(&["compute", "start", &format!("v{major}")], 1);
        assert!(refusal.contains(&format!("is of PostgreSQL {major}")), "{refusal}");
    }
}
