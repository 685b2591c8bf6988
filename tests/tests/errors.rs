//! Wrong input gets one clear line, the right exit status, and damages nothing.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;

use pgstrata_tests::{Cluster, connect, pg_bin};

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
    let text = cluster.refusal(&["up", "--object-store", "ftp://x"], 1);
    assert!(text.contains("ftp://x"), "{text}");
}

#[test]
fn unreachable_and_wrong_buckets() {
    let environment = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ];
    let server = pgstrata_tests::S3Server::start();
    let cluster = Cluster::with(&[], &environment);
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
    // Nothing was damaged.
    let row = client.query_one("select a from t", &[]).unwrap();
    assert_eq!(row.get::<_, i32>(0), 1);
}
