//! What safekeepers do among themselves, with no compute running.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::broker::{Broker, start_broker};
use common::cluster::Cluster;
use common::replication;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_ids::{Lsn, TimelineId, TimelineParameters};

const START: Lsn = Lsn(SEGMENT_SIZE);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_safekeeper_catches_up_from_its_peers_without_a_compute() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let some = writer.commit(10, 1000);
    // Commits wait for two of them, and one that never heard of a timeline has nothing to catch up with.
    cluster.nodes[2].wait_lsn("flush_lsn", some, LONG);
    cluster.nodes[2].kill();
    let end = writer.commit(300, 10_000);
    proposing.stop().unwrap();
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert!(cluster.nodes[2].read_all(first, end) == writer.bytes());
}

/// What a member has that came to nothing is cut, however much of it there is, and what is committed is copied.
#[test]
fn a_tail_that_came_to_nothing_is_replaced_without_a_compute() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let shared = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", shared, LONG);
    for node in &mut cluster.nodes[..2] {
        node.kill();
    }
    let tail = writer.write(50, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", tail, LONG);
    cluster.nodes[2].kill();
    drop(proposing);
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(10, 700);
    assert!(end < tail);
    let end = writer.commit(200, 10_000);
    proposing.stop().unwrap();
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert!(cluster.nodes[2].read_all(first, end) == writer.bytes());
}

#[test]
fn after_a_restart_of_all_everything_committed_is_served_without_a_compute() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let end = writer.commit(10, 1000);
    // The last commit LSN may have reached nobody: the proposer dies with them.
    cluster.nodes.iter_mut().for_each(|node| node.kill());
    drop(proposing);
    cluster.nodes[0].start();
    assert!(cluster.nodes[0].timeline_lsn("flush_lsn") >= Lsn(0));
    cluster.nodes[1].start();
    // Two of the three hold it, as a quorum did when it was committed.
    let held = [0, 1].map(|node: usize| cluster.nodes[node].timeline_lsn("flush_lsn"));
    let provable = held[0].min(held[1]);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("commit_lsn", provable, LONG);
    }
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
}

#[test]
fn full_segments_are_archived_trimmed_and_read_back() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args = ["--broker", &broker.url, "--object-store", &store_path, "--zone", "here"];
    let mut cluster = Cluster::start_with(3, &args);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    let some = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", some, LONG);
    cluster.nodes[2].kill();
    let end = writer.commit(500, 10_000);
    let archived = end.segment_start(SEGMENT_SIZE);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("archived_lsn", archived, LONG);
    }
    let crowded = cluster.nodes[0].status()["timelines"][0]["majority_in_one_zone"].clone();
    assert_eq!(crowded, "here");
    let name = format!(
        "tenants/{}/timelines/{}/wal/{}.zst",
        parameters.tenant,
        parameters.timeline,
        parameters.segment_name(1)
    );
    assert!(store.path().join(&name).exists(), "{name} is missing");

    // A page server that has it all lets go; both members trim, though it tells only one.
    page_server_says(&cluster.nodes[0].pg, end);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("available_lsn", archived, LONG);
        let path = node.dir.join(parameters.tenant.to_string());
        let path = path.join(parameters.timeline.to_string());
        // The position is written down first, then the files go.
        let deadline = Instant::now() + LONG;
        while path.join(parameters.segment_name(1)).exists() {
            assert!(Instant::now() < deadline, "the first segment is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(path.join(parameters.segment_name(end.segment_number(SEGMENT_SIZE))).exists());
    }

    // What was trimmed is still streamed, and a member that missed it gets it from the archive.
    assert!(stream(&cluster.nodes[0].pg, first, end) == writer.bytes());
    proposing.stop().unwrap();
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert!(stream(&cluster.nodes[2].pg, first, end) == writer.bytes());

    // The broker's death changes nothing for those who know each other.
    drop(broker);
    let (writer, proposing) = cluster.lead(&parameters, true);
    writer.commit(10, 1000);
    proposing.stop().unwrap();
}

/// What the others have trimmed no proposer can send: the member gets it by itself, from where it is, under load.
#[test]
fn what_was_trimmed_is_pulled_while_a_compute_writes() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args = ["--broker", &broker.url, "--object-store", &store_path];
    let mut cluster = Cluster::start_with(3, &args);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, false);
    let first = proposing.commit_lsn();
    let some = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", some, LONG);
    cluster.nodes[2].kill();
    // More than a proposer keeps for one that is away.
    let mut end = writer.commit(300, 10_000);
    for _ in 0..24 {
        end = writer.commit(300, 10_000);
    }
    let archived = end.segment_start(SEGMENT_SIZE);
    for node in &cluster.nodes[..2] {
        // A few segments a second.
        node.wait_lsn("archived_lsn", archived, 3 * LONG);
    }
    page_server_says(&cluster.nodes[0].pg, end);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("available_lsn", archived, LONG);
    }
    // Where it is by then, the proposer has connected.
    let timeline = object_file(store.path(), 1).parent().unwrap().to_owned();
    let away = store.path().join("away");
    std::fs::rename(&timeline, &away).unwrap();
    cluster.nodes[2].start();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(cluster.nodes[2].timeline_lsn("flush_lsn"), some);
    std::fs::rename(&away, &timeline).unwrap();
    let deadline = Instant::now() + 2 * LONG;
    while cluster.nodes[2].timeline_lsn("flush_lsn") < end {
        writer.commit(3, 1000);
        assert!(Instant::now() < deadline, "it does not come closer");
        std::thread::sleep(Duration::from_millis(20));
    }
    // It is one of those that commit.
    cluster.nodes[0].kill();
    let end = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert!(stream(&cluster.nodes[2].pg, first, end) == writer.bytes());
    proposing.stop().unwrap();
}

/// What is archived a newcomer does not copy, if all of that is there.
#[test]
fn a_newcomer_begins_where_the_others_do() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args = ["--broker", &broker.url, "--object-store", &store_path];
    let mut cluster = Cluster::start_with(3, &args);
    cluster.nodes[2].kill();
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, false);
    let first = proposing.commit_lsn();
    let end = writer.commit(500, 10_000);
    let archived = end.segment_start(SEGMENT_SIZE);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("archived_lsn", archived, LONG);
    }
    page_server_says(&cluster.nodes[0].pg, end);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("available_lsn", archived, LONG);
    }
    // What is before its own is no compute's to send.
    proposing.stop().unwrap();
    let (second, proposing) = cluster.lead(&parameters, false);
    let between = proposing.commit_lsn();
    let end = second.commit(10, 1000);
    // One is gone, another one can't be read.
    let (gone, away) = (object_file(store.path(), 2), store.path().join("away"));
    std::fs::rename(&gone, &away).unwrap();
    let damaged = object_file(store.path(), 1);
    let whole = std::fs::read(&damaged).unwrap();
    std::fs::write(&damaged, b"nothing").unwrap();
    cluster.nodes[2].start();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(cluster.nodes[2].timeline_lsn("flush_lsn"), START);
    std::fs::rename(&away, &gone).unwrap();
    cluster.nodes[2].wait_lsn("flush_lsn", end, LONG);
    assert_eq!(cluster.nodes[2].timeline_lsn("available_lsn"), archived);
    // It is one of those that commit, and of those that archive.
    cluster.nodes[0].kill();
    let end = second.commit(300, 10_000);
    let archived = end.segment_start(SEGMENT_SIZE);
    cluster.nodes[2].wait_lsn("archived_lsn", archived, LONG);
    std::fs::write(&damaged, whole).unwrap();
    let all = stream(&cluster.nodes[2].pg, first, end);
    assert!(all.starts_with(&writer.bytes()));
    assert!(all[(between - first) as usize..] == second.bytes());
    proposing.stop().unwrap();
}

fn page_server_says(address: &str, done: Lsn) {
    let mut client = replication::Client::start(address, "pageserver", done);
    client.say(done);
    while client.receive().1[0] != b'k' {}
}

fn stream(address: &str, from: Lsn, to: Lsn) -> Vec<u8> {
    let mut client = replication::Client::start(address, "reader", from);
    let mut bytes = Vec::new();
    let deadline = Instant::now() + LONG;
    while (bytes.len() as u64) < to - from {
        assert!(Instant::now() < deadline);
        let (_, body) = client.receive();
        if body[0] == b'w' {
            bytes.extend_from_slice(&body[25..]);
        }
    }
    bytes.truncate((to - from) as usize);
    bytes
}

/// What a node says to the broker, true or not.
fn publish(broker: &Broker, archived: Lsn, consistent: Lsn) {
    use std::io::{Read, Write};
    let parameters = parameters(START);
    let body = serde_json::json!({
        "node": 99, "role": "pageserver", "addresses": {},
        "timelines": [{
            "tenant_id": parameters.tenant.to_string(),
            "timeline_id": parameters.timeline.to_string(),
            "term": 1, "flush_lsn": "0/0", "commit_lsn": "0/0",
            "archived_lsn": archived.to_string(),
            "remote_consistent_lsn": consistent.to_string(),
        }],
    });
    let body = body.to_string();
    let address = broker.url.trim_start_matches("http://");
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let head = "POST /v1/publish HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                Content-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}

fn segment_file(node: &common::cluster::Node, number: u64) -> std::path::PathBuf {
    let parameters = parameters(START);
    let directory = node.dir.join(parameters.tenant.to_string());
    directory.join(parameters.timeline.to_string()).join(parameters.segment_name(number))
}

fn object_file(store: &Path, number: u64) -> std::path::PathBuf {
    let parameters = parameters(START);
    store.join(format!(
        "tenants/{}/timelines/{}/wal/{}.zst",
        parameters.tenant,
        parameters.timeline,
        parameters.segment_name(number)
    ))
}

#[test]
fn l9_a_bogus_report_trims_nothing() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args = ["--broker", &broker.url, "--object-store", &store_path];
    let cluster = Cluster::start_with(3, &args);
    let far = "FFFFFFFF/FFFFFFFF".parse().unwrap();
    publish(&broker, far, far);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    for round in 0..40 {
        writer.commit(10, 10_000);
        publish(&broker, far, far);
        std::thread::sleep(Duration::from_millis(if round < 30 { 10 } else { 400 }));
    }
    let end = writer.commit(1, 10);
    for node in &cluster.nodes {
        let archived = end.segment_start(SEGMENT_SIZE);
        node.wait_lsn("archived_lsn", archived, LONG);
        assert_eq!(node.timeline_lsn("archived_lsn"), archived);
        assert_eq!(node.timeline_lsn("available_lsn"), START);
        assert!(segment_file(node, 1).exists());
        node.wait_lsn("commit_lsn", end, LONG);
        assert!(node.read_all(first, end) == writer.bytes());
    }
    proposing.stop().unwrap();
}

#[test]
fn l9_an_object_that_differs_is_not_believed() {
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let cluster = Cluster::start_with(1, &["--object-store", &store_path]);
    cluster.elect(&parameters(START));
    let object = object_file(store.path(), 1);
    std::fs::create_dir_all(object.parent().unwrap()).unwrap();
    let zeros = vec![0; SEGMENT_SIZE as usize];
    std::fs::write(&object, zstd::bulk::compress(&zeros, 3).unwrap()).unwrap();
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(300, 10_000);
    cluster.nodes[0].wait_lsn("commit_lsn", end, LONG);
    page_server_says(&cluster.nodes[0].pg, end);
    std::thread::sleep(Duration::from_secs(4));
    let node = &cluster.nodes[0];
    assert_eq!(node.timeline_lsn("archived_lsn"), START);
    assert_eq!(node.timeline_lsn("available_lsn"), START);
    assert!(node.read_all(first, end) == writer.bytes());
    // Gone, the right one takes its place.
    std::fs::remove_file(&object).unwrap();
    node.wait_lsn("available_lsn", end.segment_start(SEGMENT_SIZE), LONG);
    assert!(stream(&node.pg, first, end) == writer.bytes());
    proposing.stop().unwrap();
}

#[test]
fn h13_another_member_archives_what_the_first_can_not() {
    let broker = start_broker();
    let (store, useless) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // A store that nothing can be written to, as with credentials that don't fit.
    std::fs::write(useless.path().join("tenants"), b"").unwrap();
    let parameters = parameters(START);
    let first = usize::from(parameters.timeline.0[15]) % 3;
    let mut cluster = Cluster::start_with(3, &["--object-store", store.path().to_str().unwrap()]);
    // It can be reached while the branch is founded.
    cluster.lead(&parameters, true).1.stop().unwrap();
    for (n, node) in cluster.nodes.iter_mut().enumerate() {
        node.kill();
        let store = if n == first { &useless } else { &store };
        let store = store.path().to_str().unwrap();
        let args = ["--broker", &broker.url, "--object-store", store];
        node.args = args.map(str::to_owned).to_vec();
        node.start();
    }
    let (writer, proposing) = cluster.lead(&parameters, true);
    writer.commit(1, 1000);
    // Until all know of each other through the broker, and the first has its turn.
    std::thread::sleep(Duration::from_secs(4));
    let end = writer.commit(150, 10_000);
    let archived = end.segment_start(SEGMENT_SIZE);
    cluster.nodes[(first + 1) % 3].wait_lsn("archived_lsn", archived, 3 * LONG);
    assert!(object_file(store.path(), 1).exists());
    let node = &cluster.nodes[first];
    assert_eq!(node.timeline_lsn("archived_lsn"), START);
    let entry = &node.status()["timelines"][0];
    assert!(entry["archiving_error"].is_string() && entry["committed_wal_damaged"] == false);
    let failed = node.get("/metrics");
    let failed = failed.lines().find(|line| line.contains("archiving_failed{")).unwrap();
    assert!(failed.ends_with(" 1"), "{failed}");
    proposing.stop().unwrap();
}

/// A position that a node's status gives for one of its timelines.
fn lsn_of(node: &common::cluster::Node, parameters: &TimelineParameters, field: &str) -> Lsn {
    let status = node.status();
    let timelines = status["timelines"].as_array().unwrap();
    let id = parameters.timeline.to_string();
    let found = timelines.iter().find(|timeline| timeline["timeline_id"] == id.as_str());
    found.map_or(Lsn::INVALID, |found| found[field].as_str().unwrap().parse().unwrap())
}

#[test]
fn l9_a_branch_is_archived_where_its_ancestor_is_not() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args = ["--broker", &broker.url, "--object-store", &store_path];
    let mut cluster = Cluster::start_with(3, &args);
    let parent = parameters(START);
    // The first in the order of those who upload the branch's WAL has none of the parent.
    let mut branch = TimelineParameters {
        timeline: TimelineId([0x33; 16]),
        ancestor: Some(parent.timeline),
        ..parent.clone()
    };
    let first = usize::from(branch.timeline.0[15]) % 3;
    cluster.nodes[first].kill();
    let (writer, proposing) = cluster.lead(&parent, true);
    branch.start_lsn = writer.commit(30, 10_000);
    assert_ne!(branch.start_lsn.segment_offset(SEGMENT_SIZE), 0);
    // On the others, the parent goes on from there.
    writer.commit(10, 10_000);
    for (n, node) in cluster.nodes.iter().enumerate().filter(|(n, _)| *n != first) {
        wait_until(&format!("commit of {n}"), || {
            lsn_of(node, &parent, "commit_lsn") >= branch.start_lsn
        });
    }
    proposing.stop().unwrap();
    cluster.nodes[first].start();
    let (writer, proposing) = cluster.lead(&branch, true);
    let end = writer.commit(500, 10_000);
    let archived = end.segment_start(SEGMENT_SIZE);
    for (n, node) in cluster.nodes.iter().enumerate() {
        wait_until(&format!("{n} has all archived"), || {
            lsn_of(node, &branch, "archived_lsn") == archived
        });
    }
    assert_eq!(lsn_of(&cluster.nodes[first], &parent, "commit_lsn"), Lsn::INVALID);
    proposing.stop().unwrap();
}

#[test]
fn a_record_of_many_segments_is_checked_by_reading_it_a_few_times() {
    const SIZE: usize = 48 << 20;
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let mut cluster = Cluster::start(1);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    writer.commit(1, SIZE);
    let end = writer.commit(300, 10_000);
    cluster.nodes[0].wait_lsn("commit_lsn", end, LONG);
    proposing.stop().unwrap();
    assert_eq!(cluster.nodes[0].stop(), Some(0));
    let node = &mut cluster.nodes[0];
    node.args = vec!["--object-store".into(), store_path];
    node.start();
    let before = bytes_read(node);
    node.wait_lsn("archived_lsn", end.segment_start(SEGMENT_SIZE), 3 * LONG);
    let read = bytes_read(node) - before;
    assert!(read < 6 * SIZE as u64, "{read} bytes were read of a record of {SIZE}");
}

/// Bytes that a safekeeper has read so far, from wherever.
fn bytes_read(node: &common::cluster::Node) -> u64 {
    let pid = node.child.as_ref().unwrap().id();
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    line.parse().unwrap()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + 3 * LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn l9_rot_on_disk_is_not_archived() {
    use std::os::unix::fs::FileExt;
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let mut cluster = Cluster::start(1);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let end = writer.commit(300, 10_000);
    cluster.nodes[0].wait_lsn("commit_lsn", end, LONG);
    proposing.stop().unwrap();
    assert_eq!(cluster.nodes[0].stop(), Some(0));
    let path = segment_file(&cluster.nodes[0], 1);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 500_000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 500_000).unwrap();
    cluster.nodes[0].args = vec!["--object-store".into(), store_path];
    cluster.nodes[0].start();
    std::thread::sleep(Duration::from_secs(4));
    assert!(!object_file(store.path(), 1).exists());
    // Nor is it removed: what is damaged may be all that there is.
    assert!(segment_file(&cluster.nodes[0], 1).exists());
    let status = cluster.nodes[0].status();
    assert_eq!(status["timelines"].as_array().unwrap().len(), 0, "it is served: {status}");
    let why = status["damaged"][0]["error"].as_str().unwrap();
    assert!(why.contains("is damaged") && why.contains("the archive"), "{why}");
}

/// Objects of the tests' timeline's tails.
fn tails(store: &Path, parameters: &TimelineParameters) -> Vec<String> {
    let of = format!("tenants/{}/timelines/{}/wal/tail", parameters.tenant, parameters.timeline);
    let Ok(found) = std::fs::read_dir(store.join(of)) else { return Vec::new() };
    found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Of a branch that nobody writes to all is archived, and then nothing is kept on the disks. It is there when it is needed.
#[test]
fn a_branch_that_is_idle_is_kept_in_object_storage_only_and_goes_on_from_there() {
    let broker = start_broker();
    let store = tempfile::tempdir().unwrap();
    let store_path = store.path().to_str().unwrap().to_owned();
    let args =
        ["--broker", &broker.url, "--object-store", &store_path, "--archive-tail-after", "1"];
    let args = [&args[..], &["--rest-after", "3", "--archive-only-after", "1"]].concat();
    let mut cluster = Cluster::start_with(3, &args);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    let end = writer.commit(150, 10_000);
    assert!(end.segment_number(SEGMENT_SIZE) > first.segment_number(SEGMENT_SIZE));
    // Also while a compute is connected that writes nothing.
    for node in &cluster.nodes {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    let one = tails(store.path(), &parameters);
    assert_eq!(one.len(), 1, "{one:?}");
    let end = writer.commit(1, 1000);
    for node in &cluster.nodes {
        node.wait_lsn("archived_lsn", end, 3 * LONG);
    }
    let other = tails(store.path(), &parameters);
    assert!(other.len() == 1 && other != one, "{other:?}");
    proposing.stop().unwrap();

    let segments = |cluster: &Cluster| {
        let of_node = |node: &common::cluster::Node| {
            let directory = node.dir.join(parameters.tenant.to_string());
            let names = std::fs::read_dir(directory.join(parameters.timeline.to_string())).unwrap();
            let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.len() == 24).count()
        };
        cluster.nodes.iter().map(of_node).sum::<usize>()
    };
    let deadline = Instant::now() + 2 * LONG;
    while segments(&cluster) > 0 {
        assert!(Instant::now() < deadline, "{} segments are still there", segments(&cluster));
        std::thread::sleep(Duration::from_millis(50));
    }
    // It is said to be there as before, and nobody fetches it for that, nor for a start.
    for node in &mut cluster.nodes {
        assert_eq!(node.stop(), Some(0));
        node.start();
    }
    for node in &cluster.nodes {
        assert_eq!(node.timeline_lsn("commit_lsn"), end);
        assert_eq!(node.timeline_lsn("flush_lsn"), end);
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(segments(&cluster), 0);
    assert!(stream(&cluster.nodes[0].pg, first, end) == writer.bytes());
    assert!(cluster.nodes[1].read_all(first, end) == writer.bytes());

    // A compute goes on; one of the three stays away until it is wanted.
    cluster.nodes[2].kill();
    let (more, proposing) = cluster.lead(&parameters, true);
    let next = more.commit(200, 10_000);
    let full = next.segment_start(SEGMENT_SIZE);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("archived_lsn", full, 3 * LONG);
    }
    // Its tail is in the segment that is full by now.
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", next, LONG);
    let all = stream(&cluster.nodes[2].pg, first, next);
    assert!(all.starts_with(&writer.bytes()) && all.ends_with(&more.bytes()));
    proposing.stop().unwrap();
}

/// Too few answer for a quorum, so that the archive is asked too, and object storage can't be read: what the one has who answers
/// is pulled all the same.
#[test]
fn where_few_answer_and_the_archive_does_not_they_are_pulled_from() {
    let broker = start_broker();
    let mut cluster = Cluster::start_with(5, &["--broker", &broker.url]);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    let some = writer.commit(10, 1000);
    cluster.nodes[4].wait_lsn("flush_lsn", some, LONG);
    cluster.nodes[4].kill();
    let end = writer.commit(50, 1000);
    proposing.stop().unwrap();
    cluster.nodes[3].wait_lsn("commit_lsn", end, LONG);
    for node in &mut cluster.nodes[..3] {
        node.kill();
    }
    let of = format!("tenants/{}/timelines/{}", parameters.tenant, parameters.timeline);
    let wal = cluster.dir.path().join("objects").join(of).join("wal");
    assert!(!wal.exists());
    std::fs::write(&wal, "no directory").unwrap();
    cluster.nodes[4].start();
    cluster.nodes[4].wait_lsn("commit_lsn", end, LONG);
    assert!(cluster.nodes[4].read_all(first, end) == writer.bytes());
}

/// What a compute still has it sends as fast as it can: it is the one that is behind that takes it slowly, while commits go on.
#[test]
fn what_others_have_committed_is_taken_at_a_pace_also_from_a_compute() {
    let mut cluster = Cluster::start_with(3, &["--catch-up-rate", "1"]);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    cluster.nodes[2].wait_lsn("flush_lsn", first, LONG);
    cluster.nodes[2].kill();
    let end = writer.commit(160, 1_000_000);
    cluster.nodes[2].start();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        writer.commit(1, 100);
        std::thread::sleep(Duration::from_millis(10));
    }
    // Some of it comes at once: before it is heard that they commit, or where they had to wait, as on a busy machine.
    let had = cluster.nodes[2].timeline_lsn("flush_lsn");
    assert!(had > first && had - first < 64 << 20, "{had} of {end}");
    // Nobody commits any more.
    cluster.nodes[2].wait_lsn("flush_lsn", end, LONG);
    let all = writer.bytes();
    let end = first + all.len() as u64;
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert!(cluster.nodes[2].read_all(first, end) == all);
    proposing.stop().unwrap();
}
