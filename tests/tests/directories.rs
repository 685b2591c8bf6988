//! Directories of databases that no WAL record announces, and base backups that hold them.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use pgstrata_tests::{Cluster, connect, free_port, give_to_postgres, pg_directory, pg_program};
use postgres::Client;

/// Every database with tables in two tablespaces, and how many rows each has.
const DATABASES: [&str; 5] = ["a", "b", "c", "copied", "logged"];

fn in_database(uri: &str, database: &str) -> Client {
    connect(&format!("{}/{database}", uri.rsplit_once('/').unwrap().0))
}

/// Makes a table whose pages have long histories.
fn fill(client: &mut Client, table: &str, tablespace: &str) {
    client
        .batch_execute(&format!(
            "create table {table} (a int, b int) tablespace {tablespace};
             insert into {table} select g, 0 from generate_series(1, 1000) g"
        ))
        .unwrap();
    for _ in 0..40 {
        client.batch_execute(&format!("update {table} set b = b + 1 where a <= 20")).unwrap();
    }
}

fn check(uri: &str, database: &str) {
    let mut client = in_database(uri, database);
    for table in ["here", "there"] {
        let row = client
            .query_one(&format!("select count(*), sum(a), sum(b) from {table}"), &[])
            .unwrap_or_else(|error| panic!("{table} in {database}: {error}"));
        let found = (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2));
        assert_eq!(found, (1000, 500_500, 800), "{table} in {database}");
    }
}

#[test]
fn l3_directories_that_no_record_announces() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let places = pg_directory();
    let place = places.path().join("ts");
    std::fs::create_dir(&place).unwrap();
    give_to_postgres(&place);
    let mut client = connect(&uri);
    let mut run = |statement: &str| {
        client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    };
    run(&format!("create tablespace ts location '{}'", place.display()));
    run("create database a tablespace ts");
    fill(&mut in_database(&uri, "a"), "here", "ts");
    fill(&mut in_database(&uri, "a"), "there", "pg_default");
    run("create database b");
    fill(&mut in_database(&uri, "b"), "here", "pg_default");
    run("alter database b set tablespace ts");
    fill(&mut in_database(&uri, "b"), "there", "pg_default");
    run("create database c");
    fill(&mut in_database(&uri, "c"), "here", "pg_default");
    run("alter database c set tablespace ts");
    run("alter database c set tablespace pg_default");
    fill(&mut in_database(&uri, "c"), "there", "ts");
    run("create database copied template b strategy file_copy");
    run("create database logged template c strategy wal_log");
    DATABASES.iter().for_each(|database| check(&uri, database));

    // What compaction makes of it is right too, and stays.
    cluster.cli(&["compact"]);
    cluster.cli(&["compute", "stop", "main"]);
    let row = cluster.json(&["compute", "start", "main"]);
    let uri = row["uri"].as_str().unwrap();
    DATABASES.iter().for_each(|database| check(uri, database));

    cluster.cli(&["branch", "create", "other"]);
    let row = cluster.json(&["compute", "start", "other"]);
    let other = row["uri"].as_str().unwrap();
    DATABASES.iter().for_each(|database| check(other, database));
    drop(client);

    let target = places.path().join("backup");
    let mapped = places.path().join("mapped");
    let mapping = format!("{}={}", place.display(), mapped.display());
    let port = cluster.replication_port("pageserver");
    let connection = format!("host=127.0.0.1 port={port} user=postgres");
    let target = target.to_str().unwrap();
    pg_program(
        "pg_basebackup",
        &["-D", target, "-d", &connection, "-X", "stream", "--no-sync", "-T", &mapping],
    );
    let (server, restored) = start(Path::new(target));
    DATABASES.iter().for_each(|database| check(&restored, database));
    drop(server);
}

/// A stock server, stopped when this is dropped.
struct Server(String);

impl Drop for Server {
    fn drop(&mut self) {
        pg_program("pg_ctl", &["-D", &self.0, "-w", "-m", "immediate", "stop"]);
    }
}

fn start(directory: &Path) -> (Server, String) {
    let target = directory.to_str().unwrap();
    let free = free_port();
    let options =
        format!("-c unix_socket_directories={target} -c port={free} -c listen_addresses=127.0.0.1");
    let log = format!("{target}/log");
    pg_program("pg_ctl", &["-D", target, "-w", "-l", &log, "-o", &options, "start"]);
    let uri = format!("postgresql://postgres@127.0.0.1:{free}/postgres");
    (Server(target.to_owned()), uri)
}

#[test]
fn l20_base_backups_verify() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut client = connect(&uri);
    client.batch_execute("create table t as select g a from generate_series(1, 1000) g").unwrap();
    let directory = pg_directory();
    let port = cluster.replication_port("pageserver");
    // In the middle of a page, of a segment, and at the segment's very start.
    for round in 0..3 {
        let sql = match round {
            2 => "select pg_switch_wal(); select pg_sleep(0)",
            _ => "insert into t select generate_series(1, 700)",
        };
        client.batch_execute(sql).unwrap();
        let row = client.query_one("select pg_current_wal_lsn()::text", &[]).unwrap();
        let lsn: String = row.get(0);
        for wal_method in ["stream", "fetch"] {
            let target = directory.path().join(format!("{wal_method}{round}"));
            let target = target.to_str().unwrap();
            let connection =
                format!("host=127.0.0.1 port={port} user=postgres options='-c pgstrata.lsn={lsn}'");
            let arguments = ["-D", target, "-d", &connection, "-X", wal_method, "--no-sync"];
            pg_program("pg_basebackup", &arguments);
            // Its WAL too.
            pg_program("pg_verifybackup", &[target]);
        }
    }
}
