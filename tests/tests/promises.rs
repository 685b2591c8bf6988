//! One test for each sentence of the README that begins a promise, by real processes, with kills. Each looks at the
//! promise from the outside only; what is behind it has tests of its own.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pgstrata_tests::{Cluster, connect, free_port, pg_directory, pg_program};
use postgres::Client;

fn number(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// Files below a directory, and the bytes of disk that they take.
fn disk_use(directory: &Path) -> (usize, u64) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let about = entry.metadata().unwrap();
        let (files, bytes) = match about.is_dir() {
            true => disk_use(&entry.path()),
            false => (1, about.blocks() * 512),
        };
        sum = (sum.0 + files, sum.1 + bytes);
    }
    sum
}

/// "no acknowledged commit is ever lost: kill everything, delete the compute's and the page server's directories, start
/// again, and every commit is there"
#[test]
fn no_acknowledged_commit_is_ever_lost() {
    let cluster = Cluster::new();
    cluster.client().batch_execute("create table commits (n int primary key)").unwrap();
    let mut acknowledged = 0;
    for round in 0..3 {
        let mut client = cluster.client();
        for _ in 0..100 {
            let next = acknowledged + 1;
            client.batch_execute(&format!("insert into commits values ({next})")).unwrap();
            acknowledged = next;
        }
        // In the middle of a transaction that nobody was told of.
        client
            .batch_execute(
                "begin; insert into commits select 100000 + g from generate_series(1, 1000) g",
            )
            .unwrap();
        let directories = cluster.data_directories();
        cluster.kill_everything();
        cluster.delete_local_directories(&directories);
        let mut client = cluster.client();
        let query = format!("select count(*) from commits where n <= {acknowledged}");
        assert_eq!(number(&mut client, &query), acknowledged, "round {round}");
        assert_eq!(number(&mut client, "select count(*) from commits"), acknowledged);
    }
}

/// "a compute is stateless: it starts on an almost empty directory in well under a second, whatever the size of the
/// database" (how long it takes is for the benchmarks to say)
#[test]
fn a_compute_is_stateless() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client
        .batch_execute(
            "create table large as select g, repeat(md5(g::text), 30) filler from generate_series(1, 60000) g;
             create table small as select 1 a",
        )
        .unwrap();
    let size = number(&mut client, "select pg_table_size('large')");
    assert!(size > 50 << 20);
    let data = cluster.data_directories().remove(0);
    cluster.kill("compute-main");
    std::fs::remove_dir_all(&data).unwrap();
    let mut client = cluster.client();
    assert_eq!(number(&mut client, "select count(*) from small"), 1);
    // Neither the start nor a query of another table brought it here.
    let (_, used) = disk_use(&data.join("base"));
    assert!(used < size as u64 / 4, "{used} of {size} bytes");
    assert_eq!(number(&mut client, "select count(*) from large"), 60_000);
}

/// "a branch is one small write: of now, of an LSN, of a time"
#[test]
fn a_branch_is_one_small_write() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g from generate_series(1, 100000) g").unwrap();
    let now =
        "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let time: String = client.query_one(now, &[]).unwrap().get(0);
    let lsn = cluster.cli(&["lsn"]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    client.batch_execute("delete from t where g > 10").unwrap();
    // Everything is taken in and quiet before objects are counted.
    cluster.cli(&["compact"]);
    let objects = cluster.dir().join("objects");
    for (name, at, rows) in
        [("now", None, 10), ("lsn", Some(&lsn), 100_000), ("time", Some(&time), 100_000)]
    {
        let (files, bytes) = disk_use(&objects);
        let mut arguments = vec!["branch", "create", name];
        arguments.extend(at.iter().flat_map(|at| ["--at", at.as_str()]));
        cluster.cli(&arguments);
        let (files_after, bytes_after) = disk_use(&objects);
        assert!(files_after <= files + 2, "{name}: {} objects", files_after - files);
        assert!(bytes_after <= bytes + (64 << 10), "{name}: {} bytes", bytes_after - bytes);
        // It is there whatever happens next.
        cluster.kill("pageserver");
        cluster.up();
        let mut branch = cluster.branch_client(name);
        assert_eq!(number(&mut branch, "select count(*) from t"), rows, "{name}");
        drop(branch);
        cluster.cli(&["compute", "stop", name]);
    }
}

/// "leaving is easy: `pg_basebackup` gives a plain data directory at any LSN of any branch"
#[test]
fn leaving_is_easy() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g from generate_series(1, 1000) g").unwrap();
    cluster.cli(&["branch", "create", "other"]);
    let mut other = cluster.branch_client("other");
    other.batch_execute("delete from t where g > 500").unwrap();
    let lsn = cluster.cli(&["lsn", "--branch", "other"]);
    other.batch_execute("drop table t").unwrap();
    drop(other);
    cluster.kill("pageserver");
    cluster.up();
    let directory = pg_directory();
    let target = directory.path().join("plain");
    let target = target.to_str().unwrap();
    let port = cluster.replication_port("pageserver");
    let connection = format!(
        "host=127.0.0.1 port={port} user=postgres options='-c pgstrata.branch=other -c pgstrata.lsn={lsn}'"
    );
    pg_program("pg_basebackup", &["-D", target, "-d", &connection, "--no-sync"]);
    // Nothing of ours is needed from here on.
    cluster.kill_everything();
    let port = free_port();
    let options =
        format!("-c unix_socket_directories={target} -c port={port} -c listen_addresses=127.0.0.1");
    let log = format!("{target}/log");
    pg_program("pg_ctl", &["-D", target, "-w", "-l", &log, "-o", &options, "start"]);
    let mut plain = connect(&format!("postgresql://postgres@127.0.0.1:{port}/postgres"));
    assert_eq!(number(&mut plain, "select count(*) from t"), 500);
    plain.batch_execute("insert into t values (0)").unwrap();
    drop(plain);
    pg_program("pg_ctl", &["-D", target, "-w", "-m", "fast", "stop"]);
}
