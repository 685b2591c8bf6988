//! What was found wrong with computes once: the names of the tests are those of the faults.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, connect, pg_command, signal, wait_gone};
use postgres::Client;
use rustix::process::Signal;

fn count(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

fn show(client: &mut Client, name: &str) -> String {
    client.query_one(&format!("show {name}"), &[]).unwrap().get(0)
}

/// Waits for something that is about to be true.
fn wait_for(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn l1_minimal_wal_level_loses_nothing_and_l22_settings_that_are_not_followed_are_shown() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table old as select g from generate_series(1, 1000) g").unwrap();
    for setting in ["wal_level = minimal", "max_wal_senders = 0", "archive_mode = on", "port = 1"] {
        client.batch_execute(&format!("alter system set {setting}")).unwrap();
    }
    let mut client = cluster.restart();
    assert_eq!(show(&mut client, "wal_level"), "replica");
    client.batch_execute("create table big as select g from generate_series(1, 200000) g").unwrap();
    client.batch_execute("vacuum full old").unwrap();
    let mut client = cluster.restart();
    assert_eq!(count(&mut client, "select count(*) from big"), 200_000);
    assert_eq!(count(&mut client, "select count(*) from old"), 1000);

    let status = cluster.status();
    let warnings = status["computes"][0]["warnings"].to_string();
    for name in ["wal_level = minimal", "archive_mode = on", "port = 1"] {
        assert!(warnings.contains(name), "{name}: {warnings}");
    }
    assert!(cluster.cli(&["status"]).contains("archive_mode = on"));
    let log = cluster.dir().join("computes/main/postgres.log");
    assert!(std::fs::read_to_string(log).unwrap().contains("WARNING: wal_level = minimal"));
}

#[test]
fn l2_a_read_only_compute_is_never_promoted() {
    let cluster = Cluster::new();
    cluster.client().batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["branch", "create", "ro"]);
    let row = cluster.json(&["compute", "start", "ro", "--read-only"]);
    let uri = row["uri"].as_str().unwrap();
    let data = row["data_dir"].as_str().unwrap();
    let mut client = connect(uri);
    let error = client.batch_execute("select pg_promote(true, 5)").unwrap_err();
    let text = error.as_db_error().unwrap().message().to_owned();
    assert!(text.contains("promote") && text.contains("Read-only"), "{text}");
    let output = pg_command("pg_ctl", &["promote", "-t", "3", "-D", data]).output().unwrap();
    assert!(!output.status.success());
    assert!(client.batch_execute("create table lost ()").is_err(), "it still only answers queries");
    assert_eq!(count(&mut client, "select count(*) from t"), 1);
    let log = std::fs::read_to_string(cluster.dir().join("computes/ro/postgres.log")).unwrap();
    assert!(log.contains("a read-only compute can't be promoted"), "{log}");
}

#[test]
fn l13_more_prepared_transactions_than_a_new_directory_would_have_room_for() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("alter system set max_prepared_transactions = 200").unwrap();
    let mut client = cluster.restart();
    client.batch_execute("create table t (a int)").unwrap();
    for number in 0..70 {
        let text =
            format!("begin; insert into t values ({number}); prepare transaction 'p{number}'");
        client.batch_execute(&text).unwrap();
    }
    cluster.cli(&["branch", "create", "other"]);
    let mut other = cluster.branch_client("other");
    assert_eq!(count(&mut other, "select count(*) from pg_prepared_xacts"), 70);
    // Less than what is prepared needs is not followed as long as it is.
    other.batch_execute("alter system set max_prepared_transactions = 10").unwrap();
    drop(other);
    cluster.cli(&["compute", "stop", "other"]);
    let mut other = cluster.branch_client("other");
    assert_eq!(show(&mut other, "max_prepared_transactions"), "200");
    for number in 0..70 {
        other.batch_execute(&format!("commit prepared 'p{number}'")).unwrap();
    }
    drop(other);
    cluster.cli(&["compute", "stop", "other"]);
    let mut other = cluster.branch_client("other");
    assert_eq!(show(&mut other, "max_prepared_transactions"), "10");
    assert_eq!(count(&mut other, "select count(*) from t"), 70);
    // On a directory that is gone, main finds its room as well.
    cluster.kill("compute-main");
    wait_for("main's directory can be removed", || {
        std::fs::remove_dir_all(cluster.dir().join("computes/main")).is_ok()
    });
    let mut client = cluster.client();
    assert_eq!(count(&mut client, "select count(*) from pg_prepared_xacts"), 70);
}

#[test]
fn l14_relation_files_are_read_by_streams() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g from generate_series(1, 100000) g").unwrap();
    let path: String = client.query_one("select pg_relation_filepath('t')", &[]).unwrap().get(0);
    client.batch_execute("checkpoint").unwrap();
    let mut client = cluster.restart();
    for path in [path.clone(), format!("./{}", path.replace('/', "//"))] {
        let query = format!(
            "with f as (select pg_read_binary_file('{path}') b)
             select sum(get_byte(b, n * 8192 + 18)) from f, generate_series(0, length(b) / 8192 - 1) n"
        );
        let layout = count(&mut client, &query);
        let pages = count(&mut client, "select pg_relation_size('t') / 8192");
        // The low byte of the size of a page and its version: 4 on every page that is not all zeros.
        assert_eq!(layout, pages * 4, "{path}");
    }
}

#[test]
fn h1_a_record_longer_than_any_window() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t (a int); insert into t values (1)").unwrap();
    for megabytes in [1, 47, 48, 49, 64, 200] {
        let since = Instant::now();
        client
            .batch_execute(&format!(
                "select pg_logical_emit_message(true, 'm', repeat('x', {megabytes} << 20))"
            ))
            .unwrap();
        client.batch_execute("insert into t values (2)").unwrap();
        assert!(since.elapsed() < Duration::from_secs(60), "{megabytes} MiB");
    }
    let branch = cluster.json(&["branch", "create", "after"]);
    assert!(branch["name"] == "after");
    let mut other = cluster.branch_client("after");
    assert_eq!(count(&mut other, "select count(*) from t"), 7);
    drop(other);
    let mut client = cluster.restart();
    assert_eq!(count(&mut client, "select count(*) from t"), 7);
}

#[test]
fn h4_one_hung_safekeeper_delays_no_start() {
    let cluster = Cluster::new();
    cluster.client().batch_execute("create table t as select 1 a").unwrap();
    for number in 1..=3 {
        cluster.cli(&["compute", "stop", "main"]);
        let pid = cluster.pid(&format!("safekeeper-{number}"));
        signal(pid, Signal::STOP);
        let row = cluster.json(&["compute", "start", "main"]);
        signal(pid, Signal::CONT);
        let ms = row["start_ms"].as_u64().unwrap();
        assert!(ms < 4500, "safekeeper {number} is hung, and the start took {ms} ms: {row}");
        let mut client = connect(row["uri"].as_str().unwrap());
        client.batch_execute("insert into t values (2)").unwrap();
    }
    // Nor does WAL that no safekeeper has: a branch begins in the middle of its ancestor's segment.
    cluster.cli(&["branch", "create", "b"]);
    let row = cluster.json(&["compute", "start", "b"]);
    assert!(row["start_ms"].as_u64().unwrap() < 5000, "{row}");
}

#[test]
fn h6_a_compute_whose_restart_fails_goes_on_trying() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select 1 a").unwrap();
    let keepers = [cluster.pid("safekeeper-1"), cluster.pid("safekeeper-2")];
    keepers.iter().for_each(|pid| signal(*pid, Signal::STOP));
    let postgres = cluster.status()["computes"][0]["postgres_pid"].as_u64().unwrap();
    let shim = cluster.pid("compute-main");
    signal(postgres, Signal::KILL);
    wait_gone(postgres);
    let report = || cluster.status()["computes"][0].clone();
    wait_for("the report says why", || {
        let failure = report()["failure"].to_string();
        failure.contains("no quorum") || failure.contains("not committed")
    });
    assert_eq!(report()["state"], "restarting");
    let http = report()["http"].as_str().map(str::to_owned);
    assert!(http.is_none_or(|address| !address.is_empty()));
    keepers.iter().for_each(|pid| signal(*pid, Signal::CONT));
    wait_for("it runs again", || report()["state"] == "running");
    assert_eq!(cluster.pid("compute-main"), shim, "by itself");
    assert_eq!(count(&mut cluster.client(), "select count(*) from t"), 1);
}

#[test]
fn h3_many_relations_need_few_descriptors() {
    const TABLES: i64 = 1200;
    let mut cluster = Cluster::new();
    cluster.limit_descriptors(1024);
    let mut client = cluster.client();
    client
        .batch_execute(
            "create procedure fill(tables int) language plpgsql as $$
             begin
                 for i in 1..tables loop
                     execute format('create table t%s as select %s a', i, i);
                     if i % 200 = 0 then commit; end if;
                 end loop;
             end $$",
        )
        .unwrap();
    client.batch_execute(&format!("call fill({TABLES})")).unwrap();
    let sizes = "select sum(pg_relation_size(oid))::bigint from pg_class where relkind = 'r'";
    let before = count(&mut client, sizes);
    let mut client = cluster.restart();
    let size = count(&mut client, "select pg_database_size(current_database())");
    assert!(size > TABLES * 8192, "{size}");
    assert_eq!(count(&mut client, sizes), before);
    // Every backend has a descriptor of its own in the shim.
    let uri = cluster.up();
    let mut clients: Vec<Client> = (0..60).map(|_| connect(&uri)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let number = number as i64 * 20 + 1;
        assert_eq!(count(client, &format!("select a::bigint from t{number}")), number);
    }
    let total = format!(
        "select sum((xpath('/row/a/text()', query_to_xml(format('select a from t%s', i), false, true, '')))[1]::text::bigint)::bigint
         from generate_series(1, {TABLES}) i"
    );
    assert_eq!(count(&mut client, &total), TABLES * (TABLES + 1) / 2);
}

#[test]
fn h5_a_read_that_waits_for_the_page_server_can_be_cancelled() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g from generate_series(1, 100000) g").unwrap();
    let mut client = cluster.restart();
    let mut other = cluster.client();
    let pid: i32 = other.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    // What plans need is there, and t is not.
    for client in [&mut client, &mut other] {
        client
            .batch_execute(
                "select 1 from pg_class; select relpages from pg_class where relname = 't'",
            )
            .unwrap();
        client
            .batch_execute("explain select sum(g) from t; select pg_terminate_backend(-1)")
            .unwrap();
    }
    let server = cluster.pid("pageserver");
    signal(server, Signal::STOP);
    client.batch_execute("set statement_timeout = '1s'").unwrap();
    let since = Instant::now();
    let error = client.query_one("select sum(g) from t", &[]).unwrap_err();
    let waited = since.elapsed();
    assert_eq!(error.code().map(|code| code.code()), Some("57014"), "{error:?}");
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    // It is still there, and so is everything that was read before.
    client.batch_execute("select 1").unwrap();
    let ended = std::thread::spawn(move || other.query_one("select sum(g) from t", &[]).is_err());
    std::thread::sleep(Duration::from_millis(300));
    client.batch_execute(&format!("select pg_terminate_backend({pid})")).unwrap();
    let since = Instant::now();
    assert!(ended.join().unwrap());
    assert!(since.elapsed() < Duration::from_secs(10));
    signal(server, Signal::CONT);
    client.batch_execute("reset statement_timeout").unwrap();
    assert_eq!(count(&mut client, "select sum(g) from t"), 5_000_050_000);
}

#[test]
fn h6_a_compute_that_tries_again_takes_nothing_from_its_successor() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select 1 a").unwrap();
    let keepers = [cluster.pid("safekeeper-1"), cluster.pid("safekeeper-2")];
    keepers.iter().for_each(|pid| signal(*pid, Signal::STOP));
    let first = cluster.pid("compute-main");
    let arguments = std::fs::read(format!("/proc/{first}/cmdline")).unwrap();
    let postgres = cluster.status()["computes"][0]["postgres_pid"].as_u64().unwrap();
    signal(postgres, Signal::KILL);
    wait_gone(postgres);
    wait_for("it tries again", || cluster.status()["computes"][0]["state"] == "restarting");
    // It sleeps while another one takes over, and wakes up.
    signal(first, Signal::STOP);
    keepers.iter().for_each(|pid| signal(*pid, Signal::CONT));
    let mut arguments: Vec<String> = arguments
        .split(|&byte| byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    arguments.pop();
    let directory = pgstrata_tests::pg_directory();
    let port = pgstrata_tests::free_port();
    for (name, value) in [
        ("--dir", directory.path().to_str().unwrap()),
        ("--port", &port.to_string()),
        ("--listen-http", "127.0.0.1:0"),
    ] {
        let at = arguments.iter().position(|argument| argument == name).unwrap();
        value.clone_into(&mut arguments[at + 1]);
    }
    let program = arguments.remove(0);
    let rest: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut second = pgstrata_tests::unprivileged(program.as_ref(), &rest)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut client = connect(&format!("postgresql://postgres@127.0.0.1:{port}/postgres"));
    client.batch_execute("insert into t values (2)").unwrap();
    signal(first, Signal::CONT);
    wait_gone(first);
    client.batch_execute("insert into t values (3)").unwrap();
    assert_eq!(count(&mut client, "select count(*) from t"), 3);
    drop(client);
    second.kill().unwrap();
    second.wait().unwrap();
}
