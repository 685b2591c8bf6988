//! An object store that is away for a while: nothing is written in its place, nothing is given up, and all of it goes on when it
//! is back.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgstrata_format::claim::Claim;
use pgstrata_ids::Lsn;
use pgstrata_tests::{Cluster, connect};
use serde_json::Value;

fn main_branch(cluster: &Cluster) -> Value {
    let rows = cluster.json(&["branch", "list"]);
    rows.as_array().unwrap().iter().find(|row| row["name"] == "main").unwrap().clone()
}

fn lsn(row: &Value, field: &str) -> Lsn {
    row[field].as_str().unwrap().parse().unwrap()
}

/// How far the compute has written.
fn current(client: &mut postgres::Client) -> Lsn {
    let sql = "select pg_current_wal_flush_lsn()::text";
    client.query_one(sql, &[]).unwrap().get::<_, String>(0).parse().unwrap()
}

fn wait_until(what: &str, cluster: &Cluster, is_so: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let row = main_branch(cluster);
        if is_so(&row) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: waited in vain: {row}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Has what was taken in uploaded, by a command that may have to wait.
fn begin_upload(cluster: &Cluster) -> Child {
    let mut command = cluster.command(&["compact"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn uploads_wait_for_an_object_store_that_is_away() {
    let cluster = Cluster::new();
    let mut client = connect(&cluster.up());
    client.batch_execute("create table t (a int)").unwrap();
    // Pages are read from the store; what is done meanwhile needs none that was not read before.
    let work = "insert into t select generate_series(1, 1000); insert into t values (0)";
    client.batch_execute(work).unwrap();
    cluster.cli(&["compact"]);
    let (store, aside) = (cluster.dir().join("objects"), cluster.dir().join("objects.away"));
    // Nothing is in its place; or another directory is, as where a disk is not mounted, in which another command has been.
    for is_there in [false, true] {
        // Taken in, and not uploaded yet.
        client.batch_execute(work).unwrap();
        let end = current(&mut client);
        wait_until("it is taken in", &cluster, |row| lsn(row, "last_record_lsn") >= end);
        fs::rename(&store, &aside).unwrap();
        if is_there {
            fs::create_dir(&store).unwrap();
            fs::write(store.join(".lock"), "").unwrap();
        }
        let mut upload = begin_upload(&cluster);
        wait_until("it is told of", &cluster, |row| {
            row["upload_failure"].as_str().unwrap_or_default().contains("the store is away")
        });
        let said = String::from_utf8(cluster.try_cli(&["status"]).stdout).unwrap();
        assert!(said.contains("uploads fail") && said.contains("the store is away"), "{said}");
        // It is tried again and again, and nothing comes of that.
        std::thread::sleep(Duration::from_secs(4));
        let left: Vec<_> = fs::read_dir(&store).into_iter().flatten().flatten().collect();
        assert_eq!(left.len(), usize::from(is_there), "{left:?}");
        // Ingest may have to read what is there, and waits then.
        client.batch_execute(work).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        let failure = main_branch(&cluster)["failure"].clone();
        let failure = failure.as_str().unwrap_or_default();
        assert!(failure.is_empty() || failure.contains("the store is away"), "{failure}");
        if is_there {
            fs::remove_dir_all(&store).unwrap();
        }
        fs::rename(&aside, &store).unwrap();
        let end = current(&mut client);
        wait_until("it is taken in later", &cluster, |row| lsn(row, "last_record_lsn") >= end);
        let mut again = begin_upload(&cluster);
        wait_until("it goes on", &cluster, |row| {
            row["upload_failure"].is_null()
                && row["failure"].is_null()
                && lsn(row, "remote_lsn") >= end
        });
        for process in [&mut upload, &mut again] {
            let _ = process.kill();
            process.wait().unwrap();
        }
    }
    let count = |mut client: postgres::Client| -> i64 {
        client.query_one("select count(*) from t", &[]).unwrap().get(0)
    };
    assert_eq!(count(cluster.restart()), 5 * 1001);
}

/// What is started meanwhile makes none in its place, which would be in the way of who puts it back.
#[test]
fn nothing_that_starts_makes_a_store_in_the_place_of_one_that_is_away() {
    let cluster = Cluster::new();
    connect(&cluster.up()).batch_execute("create table t as select 1 a").unwrap();
    let (store, aside) = (cluster.dir().join("objects"), cluster.dir().join("objects.away"));
    fs::rename(&store, &aside).unwrap();
    cluster.kill("safekeeper-1");
    cluster.up();
    assert!(!store.exists(), "a safekeeper made it");
    cluster.kill("pageserver");
    let said = cluster.refusal(&["up"], 1);
    assert!(said.contains("is away") && !said.contains("take-over"), "{said}");
    assert!(!store.exists(), "the command made it");
    fs::rename(&aside, &store).unwrap();
    let found: i32 = cluster.client().query_one("select a from t", &[]).unwrap().get(0);
    assert_eq!(found, 1);
}

/// The claim of another is there: whoever it is may do with the store what it likes, and this one keeps off, and says so.
#[test]
fn a_branch_whose_store_is_anothers_is_given_up_and_told_of() {
    let cluster = Cluster::new();
    let mut client = connect(&cluster.up());
    client.batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["compact"]);
    let store = cluster.dir().join("objects");
    let ours = Claim::decode(&fs::read(store.join("claim")).unwrap()).unwrap();
    let theirs = Claim { token: "theirs".into(), ..ours };
    fs::write(store.join("claim"), theirs.encode()).unwrap();
    let row = main_branch(&cluster);
    let (tenant, timeline) =
        (row["tenant_id"].as_str().unwrap(), row["timeline_id"].as_str().unwrap());
    let index = store.join(format!("tenants/{tenant}/timelines/{timeline}/index"));
    fs::remove_file(&index).unwrap();
    client.batch_execute("insert into t values (2)").unwrap();
    let mut upload = begin_upload(&cluster);
    wait_until("it is given up", &cluster, |row| {
        row["failure"].as_str().unwrap_or_default().contains("another page server has taken over")
    });
    let _ = upload.kill();
    upload.wait().unwrap();
    assert!(!index.exists());
    let output = cluster.try_cli(&["up"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("main is up, but branch 'main' is not served by the page server"),
        "{said}"
    );
}
