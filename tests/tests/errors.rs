//! Wrong input gets one clear line, the right exit status, and damages nothing.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::other_s3::{Condition, OtherS3};
use pgstrata_tests::{Cluster, S3_ENVIRONMENT, connect, pg_bin, pg_command, pg_directory, signal};
use rustix::process::Signal;

#[test]
fn wrong_usage_is_status_2() {
    let cluster = Cluster::new();
    for arguments in [
        &["frobnicate"][..],
        &["up", "--safekeepers", "0"],
        &["up", "--safekeepers", "many"],
        &["branch", "create"],
        &["branch", "create", "x", "--at", "yesterday"],
        &["page", "get", "--rel", "1/2/3"],
        &["compute", "start", "main", "--port", "70000"],
    ] {
        let text = cluster.refusal(arguments, 2);
        assert!(!text.is_empty(), "{arguments:?}");
    }
    assert!(!cluster.dir().exists(), "nothing was made");
}

#[test]
fn nothing_to_talk_to() {
    let cluster = Cluster::new();
    let text = cluster.refusal(&["status"], 1);
    assert!(text.contains("pgstrata up"), "{text}");
    let text = cluster.refusal(&["up", "--pg-bin", "/nonexistent"], 1);
    assert!(text.contains("/nonexistent"), "{text}");
    assert!(!cluster.dir().exists());
    for store in ["ftp://x", "memory://", "s3://", "s3://a b/c"] {
        let text = cluster.refusal(&["up", "--object-store", store], 1);
        assert!(text.contains(store), "{text}");
    }
    assert!(!cluster.dir().exists());
}

#[test]
fn unreachable_and_wrong_buckets() {
    let server = pgstrata_tests::S3Server::start();
    let cluster = Cluster::with(&[], &pgstrata_tests::S3_ENVIRONMENT);
    let pg_bin = pg_bin();
    let up = |endpoint: &str| {
        let arguments = [
            "up",
            "--pg-bin",
            pg_bin.to_str().unwrap(),
            "--object-store",
            "s3://no-such-bucket/p",
            "--s3-endpoint",
            endpoint,
        ];
        cluster.refusal(&arguments, 1)
    };
    let text = up(&server.endpoint);
    assert!(text.contains("no-such-bucket"), "{text}");
    // Endpoints as people mistype them.
    for endpoint in [server.endpoint.trim_start_matches("http://"), "localhost", "http://", ""] {
        let text = up(endpoint);
        assert!(text.contains("no endpoint"), "{endpoint}: {text}");
    }
    // A bucket that can't be made: what the server says, and no more.
    let create = |bucket: &str, endpoint: &str| {
        let arguments =
            ["up", "--object-store", bucket, "--create-bucket", "--s3-endpoint", endpoint];
        let text =
            cluster.refusal(&[&arguments[..], &["--pg-bin", pg_bin.to_str().unwrap()]].concat(), 1);
        assert!(text.len() < 300 && !text.contains("ErrorMetadata"), "{text}");
        text
    };
    assert!(create("s3://b/p", &server.endpoint).contains("InvalidBucketName"));
    assert!(create("s3://some-bucket/p", "127.0.0.1").contains("no endpoint"));
    // Nobody said who we are.
    let nobody = Cluster::with(&[], &[("AWS_ACCESS_KEY_ID", "")]);
    let arguments = ["up", "--object-store", "s3://some-bucket/p", "--s3-endpoint"];
    let text = nobody.refusal(&[&arguments[..], &[&server.endpoint]].concat(), 1);
    assert!(text.contains("AWS_ACCESS_KEY_ID is not set"), "{text}");
    drop(server);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = up(&format!("http://{closed}"));
    assert!(text.contains("no-such-bucket"), "{text}");
}

#[test]
fn a_running_cluster_refuses_nonsense() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut client = connect(&uri);
    client.batch_execute("create table t as select 1 a").unwrap();
    for (arguments, expected) in [
        (&["branch", "create", "x", "--at", "FFFF/0"][..], "future"),
        (&["branch", "create", "x", "--at", "0/1"], "before"),
        (&["branch", "create", "x", "--at", "1999-01-01T00:00:00Z"], "no commit"),
        (&["branch", "create", "x", "--at", "2999-01-01T00:00:00Z"], "in the future"),
        (&["lsn", "--at", "2999-01-01T00:00:00Z"], "in the future"),
        (&["branch", "create", "x", "--from", "nope"], "nope"),
        (&["branch", "create", "main"], "exists"),
        (&["branch", "create", "../x"], "branch name"),
        (&["branch", "delete", "main"], "compute"),
        (&["branch", "delete", "nope"], "nope"),
        (&["compute", "start", "nope"], "nope"),
        (&["compute", "start", "main"], "already"),
        (&["compute", "stop", "nope"], "nope"),
        (&["lsn", "--branch", "nope"], "nope"),
        (&["lsn", "--at", "1999-01-01T00:00:00Z"], "no commit"),
        (&["page", "get", "--rel", "1663/5/999999", "--block", "0"], "does not exist"),
        (&["page", "get", "--rel", "1663/5/1259", "--block", "4000000"], "does not exist"),
        (&["page", "get", "--rel", "nonsense", "--block", "0"], "nonsense"),
        (&["page", "get", "--rel", "1663/5/1259", "--block", "0", "--at", "FFFF/0"], "future"),
    ] {
        let text = cluster.refusal(arguments, 1);
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
    // A port in use.
    cluster.cli(&["branch", "create", "b"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let text = cluster.refusal(&["compute", "start", "b", "--port", &port], 1);
    assert!(text.contains(&port), "{text}");
    // A compute that is started again has the port that it had, which its clients know; unless
    // somebody else took it meanwhile.
    let start = || cluster.json(&["compute", "start", "b"])["uri"].as_str().unwrap().to_owned();
    let stop = || drop(cluster.cli(&["compute", "stop", "b"]));
    let first = start();
    assert!(!first.contains(&port), "{first}");
    stop();
    assert_eq!(start(), first);
    stop();
    let number = first.rsplit_once(':').unwrap().1.split('/').next().unwrap();
    let _taken = TcpListener::bind(("127.0.0.1", number.parse().unwrap())).unwrap();
    assert_ne!(start(), first);
    // Nothing was damaged.
    let row = client.query_one("select a from t", &[]).unwrap();
    assert_eq!(row.get::<_, i32>(0), 1);
}

#[test]
fn a_read_only_compute_is_of_any_moment_and_says_what_is_wrong_with_it() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select 1 a").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let row = client.query_one("select now()::text", &[]).unwrap();
    let time: String = row.get(0);
    std::thread::sleep(Duration::from_millis(20));
    client.batch_execute("insert into t values (2)").unwrap();
    cluster.cli(&["branch", "create", "b"]);
    let text = cluster.refusal(&["compute", "start", "b", "--read-only", "--at", "0/1"], 1);
    assert!(text.contains("before the history") && !text.contains('{'), "{text}");
    let future = "2999-01-01T00:00:00Z";
    let text = cluster.refusal(&["compute", "start", "b", "--read-only", "--at", future], 1);
    assert!(text.contains("in the future"), "{text}");
    cluster.try_cli(&["compute", "stop", "b"]);
    let row = cluster.json(&["compute", "start", "b", "--read-only", "--at", &time]);
    let mut reader = connect(row["uri"].as_str().unwrap());
    assert_eq!(reader.query_one("select count(*) from t", &[]).unwrap().get::<_, i64>(0), 1);
}

#[test]
fn what_can_not_be_printed_is_a_failure_with_a_line() {
    let cluster = Cluster::new();
    cluster.up();
    let run = |arguments: &[&str], stdout: Stdio| {
        let mut command = Command::new(pgstrata_tests::programs().join("pgstrata"));
        command.arg("--dir").arg(cluster.dir()).args(arguments).stdout(stdout);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for arguments in
        [&["lsn"][..], &["status"], &["status", "--json"], &["wal", "verify"], &["branch", "list"]]
    {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let (code, text) = run(arguments, full.into());
        assert_eq!((code, text.lines().count()), (Some(1), 1), "{arguments:?}: {text}");
        assert!(text.contains("can't write the answer"), "{arguments:?}: {text}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(run(arguments, writer.into()), (Some(0), String::new()), "{arguments:?}");
    }
}

#[test]
fn a_hung_page_server_is_named_and_waited_for_not_long() {
    let cluster = Cluster::new();
    cluster.up();
    let pid = cluster.pid("pageserver");
    signal(pid, Signal::STOP);
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap();
    let row = processes.iter().find(|row| row["name"] == "pageserver").unwrap();
    assert!(row["failure"].as_str().unwrap().contains("does not answer"), "{row}");
    let pg_bin = pg_bin();
    let commands =
        [&["lsn"][..], &["branch", "create", "b"], &["up", "--pg-bin", pg_bin.to_str().unwrap()]];
    std::thread::scope(|scope| {
        for arguments in commands {
            let cluster = &cluster;
            scope.spawn(move || {
                let since = Instant::now();
                let text = cluster.refusal(arguments, 1);
                assert!(text.contains("the page server does not answer"), "{arguments:?}: {text}");
                assert!(since.elapsed() < Duration::from_secs(70), "{:?}", since.elapsed());
            });
        }
    });
    signal(pid, Signal::CONT);
    cluster.cli(&["lsn"]);
}

#[test]
fn a_base_backup_is_of_what_was_asked_for_or_refused() {
    let cluster = Cluster::new();
    cluster.up();
    let port = cluster.replication_port("pageserver");
    let connection =
        format!("host=127.0.0.1 port={port} user=postgres options='-c pgstrata.brnch=main'");
    let directory = pg_directory();
    let target = directory.path().join("backup");
    let arguments = ["-D", target.to_str().unwrap(), "-d", &connection];
    let output = pg_command("pg_basebackup", &arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("no option pgstrata.brnch"), "{text}");
}

#[test]
fn branches_without_a_compute_fill_no_log() {
    let cluster = Cluster::new();
    cluster.up();
    for name in ["a", "b", "c"] {
        cluster.cli(&["branch", "create", name]);
    }
    std::thread::sleep(Duration::from_secs(3));
    let log = std::fs::read_to_string(cluster.dir().join("logs/safekeeper-1.log")).unwrap();
    assert_eq!(log.matches("PostgreSQL client left").count(), 0, "{log}");
    // One that gets a compute is followed at once.
    let mut client = cluster.branch_client("b");
    client.batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["lsn", "--branch", "b"]);
}

/// Files below a directory whose path contains `part`.
fn files_with(root: &std::path::Path, part: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.to_string_lossy().contains(part) {
                found.push(path);
            }
        }
    }
    found
}

fn flip(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_an_object_is_found_and_nothing_wrong_is_served() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g a from generate_series(1, 1000) g").unwrap();
    drop(client);
    cluster.cli(&["compact"]);
    let objects = cluster.dir().join("objects");
    let pg_bin = pg_bin();
    let up = ["up", "--pg-bin", pg_bin.to_str().unwrap()];

    // One clear line, and right again once the objects are.
    cluster.cli(&["compute", "stop", "main"]);
    cluster.kill("pageserver");
    std::fs::remove_dir_all(cluster.dir().join("pageserver")).unwrap();
    for part in ["/layers/", "/index"] {
        let paths = files_with(&objects, part);
        assert!(!paths.is_empty());
        paths.iter().for_each(|path| flip(path));
        let text = cluster.refusal(&up, 1);
        assert!(text.contains("corrupt") || text.contains("checksum"), "{part}: {text}");
        paths.iter().for_each(|path| flip(path));
        cluster.try_cli(&["down"]);
    }
    let mut client = cluster.client();
    assert_eq!(client.query_one("select sum(a) from t", &[]).unwrap().get::<_, i64>(0), 500_500);
}

#[test]
fn a_flipped_bit_in_a_local_copy_costs_a_download() {
    let server = pgstrata_tests::S3Server::start();
    let cluster = server.cluster();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g a from generate_series(1, 1000) g").unwrap();
    drop(client);
    cluster.cli(&["compact"]);
    cluster.cli(&["compute", "stop", "main"]);
    cluster.kill("pageserver");
    let copies = files_with(&cluster.dir().join("pageserver"), "layers");
    assert!(!copies.is_empty());
    copies.iter().for_each(|path| flip(path));
    let mut client = cluster.client();
    assert_eq!(client.query_one("select sum(a) from t", &[]).unwrap().get::<_, i64>(0), 500_500);
}

#[test]
fn a_store_that_ignores_conditions_is_refused() {
    for ignored in [Condition::Absent, Condition::Unchanged] {
        let server = OtherS3::start(Some(ignored));
        let store = ["--object-store", "s3://pgstrata-e2e/p", "--s3-endpoint", &server.endpoint];
        let cluster = Cluster::with(&[&store[..], &["--create-bucket"]].concat(), &S3_ENVIRONMENT);
        let arguments = [&["up", "--create-bucket"], &store[..]].concat();
        let text = cluster.refusal(&arguments, 1);
        assert!(text.contains("ignores 'If-None-Match' or 'If-Match'"), "{text}");
        assert!(!cluster.dir().join("logs").exists(), "nothing was started");
    }
}
