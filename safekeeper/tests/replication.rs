//! The PostgreSQL port, with PostgreSQL's own client.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_ids::{Lsn, TimelineId, TimelineParameters};

const START: Lsn = Lsn(SEGMENT_SIZE);

fn pg_receivewal() -> PathBuf {
    let versions = ["15", "16", "17", "18"];
    let installed =
        versions.map(|version| format!("/usr/lib/postgresql/{version}/bin/pg_receivewal"));
    let found = installed.iter().map(PathBuf::from).find(|path| path.exists());
    found.expect("pg_receivewal is installed with PostgreSQL")
}

fn receive(pg: &str, parameters: &TimelineParameters, into: &Path, end: Lsn) -> Child {
    let (host, port) = pg.rsplit_once(':').unwrap();
    let (tenant, timeline) = (parameters.tenant, parameters.timeline);
    let connection = format!(
        "host={host} port={port} user=test sslmode=prefer \
         options='-c pgstrata.tenant={tenant} -c pgstrata.timeline={timeline}'"
    );
    std::fs::create_dir_all(into).unwrap();
    Command::new(pg_receivewal())
        .args(["--no-loop", "--synchronous", "--status-interval=1", "-d", &connection, "-D"])
        .arg(into)
        .arg(format!("--endpos={end}"))
        .spawn()
        .unwrap()
}

fn wait(mut child: Child) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "pg_receivewal: {status}");
            return;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("pg_receivewal did not reach the end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_for_file(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Everything in the segment files, complete or partial.
fn received(from: &Path, parameters: &TimelineParameters, first: u64, last: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in first..=last {
        let path = from.join(parameters.segment_name(number));
        let partial = path.with_extension("partial");
        bytes.extend(std::fs::read(&path).or_else(|_| std::fs::read(partial)).unwrap());
    }
    bytes
}

/// Where `count` records of `size` bytes will end.
fn end_of(generator: &WalGenerator, count: usize, size: usize) -> Lsn {
    let mut generator = generator.clone();
    (0..count).for_each(|_| drop(generator.record(size)));
    generator.at
}

#[test]
fn pg_receivewal_follows_across_segments() {
    let cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    cluster.nodes[1].wait_lsn("commit_lsn", first, Duration::from_secs(5));
    let end = end_of(&writer.generator(), 400, 10_000);
    let directory = cluster.dir.path().join("received");
    let child = receive(&cluster.nodes[1].pg, &parameters, &directory, end);
    wait_for_file(&directory.join(parameters.segment_name(1)).with_extension("partial"));
    for _ in 0..40 {
        writer.commit(10, 10_000);
    }
    assert_eq!(writer.commit_lsn(), end);
    writer.commit(1, 100);
    wait(child);
    let got = received(&directory, &parameters, 1, end.segment_number(SEGMENT_SIZE));
    let from = (first - START) as usize;
    let length = (end - first) as usize;
    assert!(got[from..from + length] == writer.bytes()[..length]);
    proposing.stop().unwrap();
}

#[test]
fn a_branch_is_read_through_to_its_ancestor() {
    let cluster = Cluster::start(3);
    let root = parameters(START);
    let (writer, proposing) = cluster.lead(&root, true);
    let first = proposing.commit_lsn();
    // Branch in the middle of the third segment.
    let branch_at = writer.commit(250, 10_000);
    assert_eq!(branch_at.segment_number(SEGMENT_SIZE), 3);
    let shared = writer.bytes();
    writer.commit(100, 10_000);
    proposing.stop().unwrap();
    let branch = TimelineParameters {
        timeline: TimelineId([0x33; 16]),
        start_lsn: branch_at,
        ancestor: Some(root.timeline),
        ..root.clone()
    };
    let (writer, proposing) = cluster.lead(&branch, true);
    let barrier_end = proposing.commit_lsn();
    // All three know that the ancestor is committed up to the branch.
    // The proposer waits for two of them only.
    let deadline = Instant::now() + Duration::from_secs(10);
    for node in &cluster.nodes {
        let mut text = node.status().to_string();
        while !text.contains(&branch.timeline.to_string()) {
            assert!(Instant::now() < deadline, "{text}");
            std::thread::sleep(Duration::from_millis(10));
            text = node.status().to_string();
        }
    }
    let end = end_of(&writer.generator(), 200, 10_000);
    let directory = cluster.dir.path().join("received");
    let child = receive(&cluster.nodes[2].pg, &branch, &directory, end);
    wait_for_file(&directory.join(branch.segment_name(3)).with_extension("partial"));
    writer.commit(200, 10_000);
    writer.commit(1, 100);
    wait(child);
    // pg_receivewal starts at the beginning of the current segment: the ancestor's bytes.
    let got = received(&directory, &branch, 3, end.segment_number(SEGMENT_SIZE));
    let segment = Lsn(3 * SEGMENT_SIZE);
    let before = (branch_at - segment) as usize;
    assert!(got[..before] == shared[(segment - first) as usize..]);
    let own = (barrier_end - segment) as usize;
    let length = (end - barrier_end) as usize;
    assert!(got[own..own + length] == writer.bytes()[..length]);
    proposing.stop().unwrap();
}

#[test]
fn wrong_questions_get_clear_answers() {
    let cluster = Cluster::start(1);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    writer.commit(1, 10);
    let unknown = TimelineParameters { timeline: TimelineId([0x44; 16]), ..parameters };
    let directory = cluster.dir.path().join("received");
    let mut child = receive(&cluster.nodes[0].pg, &unknown, &directory, Lsn(1));
    assert!(!child.wait().unwrap().success());
    let (host, port) = cluster.nodes[0].pg.rsplit_once(':').unwrap();
    let output = Command::new("psql")
        .args([&format!("host={host} port={port} user=x dbname=x"), "-c", "SELECT 1"])
        .output();
    if let Ok(output) = output {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("replication connections only"), "{text}");
    }
    proposing.stop().unwrap();
}
