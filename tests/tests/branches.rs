//! Branches show the past as it was, also after compaction and without any local file.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pgstrata_tests::workload::{Moment, note_moment, permanent, step};
use pgstrata_tests::{Cluster, S3Server, connect, free_port, pg_program, thorough};
use postgres::Client;

fn moments(cluster: &Cluster) {
    let mut client = cluster.client();
    let count = if thorough() { 20 } else { 10 };
    let mut moments = Vec::new();
    for number in 0..count {
        step(&mut client, number);
        moments.push(note_moment(&mut client));
        std::thread::sleep(Duration::from_millis(5));
    }
    check_moments(cluster, &moments, "a", true);
    cluster.cli(&["compact"]);
    check_moments(cluster, &moments, "b", false);
    // Without any local copy, from object storage and the quorum alone.
    cluster.kill("pageserver");
    std::fs::remove_dir_all(cluster.dir().join("pageserver")).unwrap();
    cluster.up();
    check_moments(cluster, &moments, "c", false);
}

fn check_moments(cluster: &Cluster, moments: &[Moment], round: &str, by_time: bool) {
    for (number, Moment { lsn, time, digests }) in moments.iter().enumerate() {
        // Every third moment a round, so that the three rounds cover each once.
        let turn = usize::from(round.as_bytes()[0] - b'a');
        if !thorough() && number % 3 != turn {
            continue;
        }
        let name = format!("{round}{number}");
        let at = if by_time && number % 2 == 0 { time } else { lsn };
        let row = cluster.json(&["branch", "create", &name, "--at", at]);
        assert_eq!(row["ancestor"], "main");
        let mut client = cluster.branch_client(&name);
        assert_eq!(&permanent(&mut client), digests, "moment {number} at {at}");
        // The branch is a database of its own.
        client.batch_execute("create table mine as select 1 a").unwrap();
        drop(client);
        cluster.cli(&["compute", "stop", &name]);
    }
}

#[test]
fn moments_in_a_directory() {
    moments(&Cluster::new());
}

#[test]
fn moments_in_s3() {
    let server = S3Server::start();
    moments(&server.cluster());
}

#[test]
fn branches_of_branches_are_independent() {
    let cluster = Cluster::new();
    let mut main = cluster.client();
    main.batch_execute("create table t (a int); insert into t values (1)").unwrap();
    cluster.cli(&["branch", "create", "child"]);
    let mut child = cluster.branch_client("child");
    child.batch_execute("insert into t values (2)").unwrap();
    main.batch_execute("insert into t values (10)").unwrap();
    cluster.cli(&["branch", "create", "grandchild", "--from", "child"]);
    let mut grandchild = cluster.branch_client("grandchild");
    grandchild.batch_execute("insert into t values (3)").unwrap();
    child.batch_execute("delete from t where a = 1").unwrap();
    let content = |client: &mut Client| -> Vec<i32> {
        client
            .query("select a from t order by 1", &[])
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect()
    };
    assert_eq!(content(&mut main), [1, 10]);
    assert_eq!(content(&mut child), [2]);
    assert_eq!(content(&mut grandchild), [1, 2, 3]);

    // The WAL of a branch is one chain with its ancestors'.
    let verified = cluster.json(&["wal", "verify", "--branch", "grandchild"]);
    assert_eq!(verified["ok"], true);
    let dumped = cluster.json(&["wal", "dump", "--branch", "grandchild"]);
    let records = dumped.as_array().unwrap();
    assert!(records.len() > verified["records"].as_u64().unwrap() as usize);
    for pair in records.windows(2) {
        assert_eq!(pair[1]["prev"], pair[0]["lsn"]);
    }

    let refusal = cluster.refusal(&["branch", "delete", "child"], 1);
    assert!(refusal.contains("child"), "{refusal}");
    drop((child, grandchild));
    cluster.cli(&["compute", "stop", "grandchild"]);
    cluster.cli(&["branch", "delete", "grandchild"]);
    cluster.cli(&["compute", "stop", "child"]);
    cluster.cli(&["branch", "reset", "child"]);
    let mut child = cluster.branch_client("child");
    assert_eq!(content(&mut child), [1, 10]);
    drop(child);
    cluster.cli(&["compute", "stop", "child"]);
    cluster.cli(&["branch", "rename", "child", "other"]);
    cluster.cli(&["branch", "delete", "other"]);
    let names = cluster.json(&["branch", "list"]);
    assert_eq!(names.as_array().unwrap().len(), 1);
}

#[test]
fn a_base_backup_of_the_past_starts_by_itself() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut client = connect(&uri);
    client.batch_execute("create table t as select g a from generate_series(1, 1000) g").unwrap();
    client.batch_execute("create database other").unwrap();
    let lsn: String = client.query_one("select pg_current_wal_lsn()::text", &[]).unwrap().get(0);
    client.batch_execute("delete from t; create table later (a int)").unwrap();

    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap();
    let pageserver = processes.iter().find(|process| process["role"] == "pageserver").unwrap();
    let port = pageserver["pg"].as_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
    let directory = pgstrata_tests::pg_directory();
    for wal_method in ["stream", "fetch"] {
        let target = directory.path().join(wal_method);
        let target = target.to_str().unwrap();
        let connection = format!(
            "host=127.0.0.1 port={port} user=postgres options='-c pgstrata.branch=main -c pgstrata.lsn={lsn}'"
        );
        pg_program(
            "pg_basebackup",
            &["-D", target, "-d", &connection, "-X", wal_method, "--no-sync"],
        );
        pg_program("pg_verifybackup", &["-n", target]);
        let socket = format!("-c unix_socket_directories={target}");
        let free = free_port();
        let options = format!("{socket} -c port={free} -c listen_addresses=127.0.0.1");
        let log = format!("{target}/log");
        pg_program("pg_ctl", &["-D", target, "-w", "-l", &log, "-o", &options, "start"]);
        let mut restored = connect(&format!("postgresql://postgres@127.0.0.1:{free}/postgres"));
        let row = restored.query_one("select count(*), sum(a) from t", &[]).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1000, 500_500));
        let row = restored.query_one("select to_regclass('later') is null", &[]).unwrap();
        assert!(row.get::<_, bool>(0));
        restored.batch_execute("insert into t values (1)").unwrap();
        drop(restored);
        pg_program("pg_ctl", &["-D", target, "-w", "-m", "fast", "stop"]);
    }
}

#[test]
fn a_read_only_compute_answers_as_of_an_lsn_and_refuses_writes() {
    let cluster = Cluster::new();
    let mut main = cluster.client();
    main.batch_execute("create table t (a int); insert into t values (1)").unwrap();
    cluster.cli(&["branch", "create", "view"]);
    main.batch_execute("insert into t values (2)").unwrap();
    let row = cluster.json(&["compute", "start", "view", "--read-only"]);
    let mut view = connect(row["uri"].as_str().unwrap());
    assert_eq!(view.query_one("select count(*) from t", &[]).unwrap().get::<_, i64>(0), 1);
    // Not even somebody who insists can write what nobody would keep.
    let write = view.batch_execute(
        "set default_transaction_read_only = off; begin read write; insert into t values (3); commit",
    );
    assert!(write.is_err(), "a read-only compute took a write");
}

#[test]
fn branches_survive_a_page_server_that_forgets_everything() {
    let cluster = Cluster::new();
    let mut main = cluster.client();
    main.batch_execute("create table t (a int)").unwrap();
    // Branches between transactions' ends, at whatever record happened to be the last ingested.
    for number in 0..5 {
        main.batch_execute(&format!(
            "begin; insert into t select {number} from generate_series(1, 50)"
        ))
        .unwrap();
        main.batch_execute("rollback; insert into t values (1)").unwrap();
        cluster.cli(&["branch", "create", &format!("b{number}")]);
    }
    cluster.kill("pageserver");
    std::fs::remove_dir_all(cluster.dir().join("pageserver")).unwrap();
    cluster.up();
    for number in 0..5 {
        let name = format!("b{number}");
        let mut branch = cluster.branch_client(&name);
        let count: i64 = branch.query_one("select count(*) from t", &[]).unwrap().get(0);
        assert_eq!(count, number + 1);
        drop(branch);
        cluster.cli(&["compute", "stop", &name]);
    }
}

#[test]
fn a_database_made_anew_under_the_same_oid_has_nothing_of_the_old() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut main = connect(&uri);
    main.batch_execute("create database reused oid 60000 template template0 strategy file_copy")
        .unwrap();
    let (server, _) = uri.rsplit_once('/').unwrap();
    let mut reused = connect(&format!("{server}/reused"));
    let node: i64 =
        reused.query_one("select pg_relation_filenode('pg_class')::bigint", &[]).unwrap().get(0);
    let block = |db: i64, block: i64| {
        let rel = format!("1663/{db}/{node}");
        let output =
            cluster.try_cli(&["page", "get", "--rel", &rel, "--block", &block.to_string()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let blocks: i64 =
        reused.query_one("select pg_relation_size('pg_class') / 8192", &[]).unwrap().get(0);
    // Pages with many changes, which the page server keeps ready once they were read.
    for number in 0..40 {
        reused.batch_execute(&format!("create table t{number} (a int)")).unwrap();
    }
    drop(reused);
    let template: i64 = main
        .query_one("select oid::bigint from pg_database where datname = 'template0'", &[])
        .unwrap()
        .get(0);
    let mut changed = 0;
    for number in 0..blocks {
        changed += usize::from(block(60000, number) != block(template, number));
    }
    assert!(changed > 0, "no page was changed");

    main.batch_execute("drop database reused").unwrap();
    main.batch_execute("create database reused oid 60000 template template0 strategy file_copy")
        .unwrap();
    for number in 0..blocks {
        assert!(block(60000, number) == block(template, number), "block {number}");
    }
}

/// What there is of a timeline's WAL: directories of safekeepers, and objects.
fn wal_of(cluster: &Cluster, tenant: &str, timeline: &str) -> (usize, usize) {
    let of_safekeepers = (1..=3).filter(|id| {
        cluster.dir().join(format!("safekeeper-{id}")).join(tenant).join(timeline).exists()
    });
    let objects = cluster.dir().join("objects/tenants").join(tenant).join("timelines");
    let objects = std::fs::read_dir(objects.join(timeline).join("wal"));
    let files = objects.map_or(0, |found| {
        found.filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_file()).count()
    });
    (of_safekeepers.count(), files)
}

#[test]
fn the_wal_of_a_deleted_branch_goes_from_safekeepers_and_object_storage() {
    let cluster = Cluster::new();
    let mut main = cluster.client();
    main.batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["branch", "create", "child"]);
    let mut child = cluster.branch_client("child");
    child
        .batch_execute("insert into t values (2); select pg_switch_wal(); insert into t values (3)")
        .unwrap();
    let rows = cluster.json(&["branch", "list"]);
    let rows = rows.as_array().unwrap();
    let row = rows.iter().find(|row| row["name"] == "child").unwrap();
    let id = |field: &str| row[field].as_str().unwrap().to_owned();
    let (tenant, timeline) = (id("tenant_id"), id("timeline_id"));
    let wait_until = |what: &str, is_so: &dyn Fn((usize, usize)) -> bool| {
        let since = std::time::Instant::now();
        while !is_so(wal_of(&cluster, &tenant, &timeline)) {
            let found = wal_of(&cluster, &tenant, &timeline);
            assert!(since.elapsed() < Duration::from_secs(90), "not {what}: {found:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_until("archived", &|(copies, objects)| copies == 3 && objects > 0);
    // One of the safekeepers is away when it happens.
    cluster.kill("safekeeper-2");
    drop(child);
    cluster.cli(&["compute", "stop", "child"]);
    cluster.cli(&["branch", "delete", "child"]);
    wait_until("gone from those that are there", &|found| found == (1, 0));
    cluster.up();
    wait_until("gone", &|found| found == (0, 0));
    // Another branch may have the name; what it came from is as it was.
    cluster.cli(&["branch", "create", "child"]);
    let mut child = cluster.branch_client("child");
    let count = |client: &mut Client| -> i64 {
        client.query_one("select count(*) from t", &[]).unwrap().get(0)
    };
    assert_eq!((count(&mut child), count(&mut main)), (1, 1));
    main.batch_execute("insert into t values (4)").unwrap();
    cluster.cli(&["wal", "verify", "--branch", "main"]);
}
