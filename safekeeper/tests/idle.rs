//! Thousands of timelines that nobody uses.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::broker::{Broker, start_broker};
use common::cluster::{Cluster, Node};
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::proposer::SafekeeperClient;
use pgstrata_format::safekeeper::{TimelineControl, encode_timelines};
use pgstrata_ids::{Lsn, NodeId, Term, TimelineId, TimelineParameters};

const START: Lsn = Lsn(SEGMENT_SIZE);
const LONG: Duration = Duration::from_secs(20);

/// The timeline of that number; the first is the one that has been written.
fn timeline_id(n: u32) -> TimelineId {
    let mut id = parameters(START).timeline.0;
    id[..4].copy_from_slice(&n.to_be_bytes());
    match n {
        0 => parameters(START).timeline,
        _ => TimelineId(id),
    }
}

fn directory_of(node: &Node, timeline: TimelineId) -> PathBuf {
    node.dir.join(parameters(START).tenant.to_string()).join(timeline.to_string())
}

/// Makes copies of the only timeline in the directory of a node that is not running, so that it has `count`.
fn multiply(node: &Node, count: u32) {
    let tenant = parameters(START).tenant;
    let original = directory_of(node, timeline_id(0));
    let control = std::fs::read(original.join("control")).unwrap();
    let mut control = TimelineControl::decode(&control, NodeId(node.id)).unwrap();
    let names: Vec<_> = std::fs::read_dir(&original).unwrap().map(|entry| entry.unwrap()).collect();
    let segments: Vec<(std::ffi::OsString, Vec<u8>)> = names
        .iter()
        .filter(|entry| entry.file_name().len() == 24)
        .map(|entry| {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            bytes.truncate(bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
            (entry.file_name(), bytes)
        })
        .collect();
    for n in 1..count {
        let directory = directory_of(node, timeline_id(n));
        std::fs::create_dir(&directory).unwrap();
        for (name, bytes) in &segments {
            // With a hole for the zeros.
            let file = File::create(directory.join(name)).unwrap();
            file.write_all_at(bytes, 0).unwrap();
            file.set_len(SEGMENT_SIZE).unwrap();
        }
        std::fs::copy(original.join("flushed"), directory.join("flushed")).unwrap();
        control.parameters.timeline = timeline_id(n);
        std::fs::write(directory.join("control"), control.encode()).unwrap();
    }
    let all: BTreeSet<_> = (0..count).map(|n| (tenant, timeline_id(n))).collect();
    std::fs::write(node.dir.join("timelines"), encode_timelines(&all)).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

fn pid(node: &Node) -> u32 {
    node.child.as_ref().unwrap().id()
}

/// A number from a file in `/proc`.
fn proc_number(node: &Node, file: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/{file}", pid(node))).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Open descriptors.
fn descriptors(node: &Node) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", pid(node))).unwrap().count()
}

/// Time of the processor that the process has taken, of both kinds.
fn processor_time(node: &Node) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", pid(node))).unwrap();
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // `USER_HZ` is 100 wherever Linux runs.
    Duration::from_millis(ticks * 10)
}

fn metric(node: &Node, name: &str) -> u64 {
    let text = node.get("/metrics");
    let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn open_timelines(node: &Node) -> u64 {
    metric(node, "pgstrata_safekeeper_open_timelines")
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + 3 * LONG;
    while !done() {
        assert!(Instant::now() < deadline, "it doesn't come to this: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What one start of a safekeeper with many timelines takes.
struct Cost {
    start: Duration,
    resident_bytes: u64,
    descriptors: usize,
    read_bytes: u64,
}

fn started(node: &mut Node) -> Cost {
    let begun = Instant::now();
    node.start();
    let start = begun.elapsed();
    let cost = Cost {
        start,
        resident_bytes: proc_number(node, "status", "VmRSS:") << 10,
        descriptors: descriptors(node),
        read_bytes: proc_number(node, "io", "rchar:"),
    };
    println!(
        "start {:?}, {} KB resident, {} descriptors, {} KB read",
        cost.start,
        cost.resident_bytes >> 10,
        cost.descriptors,
        cost.read_bytes >> 10
    );
    cost
}

fn is_whole() -> bool {
    std::env::var_os("PGSTRATA_TEST_ALL").is_some()
}

/// With 1,000 timelines; with 10,000 where everything is tested.
#[test]
fn thousands_of_idle_timelines_cost_little() {
    let count: u32 = if is_whole() { 10_000 } else { 1000 };
    let broker = start_broker();
    let mut cluster =
        Cluster::start_with(1, &["--broker", &broker.url, "--archive-tail-after", "1"]);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(10, 1000);
    proposing.stop().unwrap();
    // What is not archived does not rest.
    cluster.nodes[0].wait_lsn("archived_lsn", end, LONG);
    let node = &mut cluster.nodes[0];
    assert_eq!(node.stop(), Some(0));
    let alone = started(node);
    assert_eq!(node.stop(), Some(0));

    // The first time all are opened, since nobody says that they rest, and come to rest.
    multiply(node, count);
    std::fs::remove_file(node.dir.join("resting")).unwrap();
    let first_time = started(node);
    assert!(first_time.read_bytes > u64::from(count) * SEGMENT_SIZE, "nothing was looked at");
    assert!(first_time.resident_bytes < 200 << 20);
    assert_eq!(node.stop(), Some(0));

    let cost = started(node);
    assert!(cost.start < Duration::from_secs(2), "{:?}", cost.start);
    assert!(cost.resident_bytes < 200 << 20, "{} bytes of memory", cost.resident_bytes);
    assert!(cost.descriptors <= alone.descriptors + 8, "{} descriptors", cost.descriptors);
    // The lists, and none of the timelines' files.
    assert!(cost.read_bytes < alone.read_bytes + u64::from(count) * 400);
    assert_eq!(metric(node, "pgstrata_safekeeper_timelines"), u64::from(count));
    assert_eq!(open_timelines(node), 0);

    // Nothing goes on with them, but that the broker is told.
    std::thread::sleep(Duration::from_secs(3));
    let (before, begun) = (processor_time(node), Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    let share = (processor_time(node) - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("{:.1} % of a processor", share * 100.0);
    assert!(share < 0.2, "{share}");
    let resident_bytes = proc_number(node, "status", "VmRSS:") << 10;
    println!("{} KB resident", resident_bytes >> 10);
    assert!(resident_bytes < 200 << 20, "{resident_bytes} bytes of memory");
    assert!(descriptors(node) <= alone.descriptors + 16);

    // Each is there when somebody needs it, but one that is damaged, which is found then.
    flip(&directory_of(node, timeline_id(2)).join(parameters(START).segment_name(1)), 300);
    let read = |n: u32| {
        let mut client = SafekeeperClient::connect(&node.wal, None, None, LONG).unwrap();
        let parameters = TimelineParameters { timeline: timeline_id(n), ..parameters(START) };
        client.open(parameters.tenant, parameters.timeline)?;
        let mut bytes = Vec::new();
        assert_eq!(client.read_wal(first, end, Term(0), &mut bytes).unwrap(), end);
        std::io::Result::Ok(bytes)
    };
    for n in [0, 1, count / 2, count - 1] {
        assert!(read(n).unwrap() == writer.bytes());
    }
    assert_eq!(metric(node, "pgstrata_safekeeper_damaged_timelines"), 0);
    let refused = read(2).unwrap_err().to_string();
    assert!(refused.contains("damaged"), "{refused}");
    assert_eq!(metric(node, "pgstrata_safekeeper_damaged_timelines"), 1);
    assert!(node.status()["damaged"][0]["error"].as_str().unwrap().contains("damaged"));
    assert!(read(3).unwrap() == writer.bytes());
    assert!((1..10).contains(&open_timelines(node)), "{}", open_timelines(node));
}

/// Timelines rest soon.
const SHORT: [&str; 4] = ["--rest-after", "1", "--archive-tail-after", "1"];

/// Three safekeepers, whose timelines rest soon.
fn resting_cluster() -> (Broker, Cluster) {
    let broker = start_broker();
    let cluster = Cluster::start_with(3, &[&SHORT[..], &["--broker", &broker.url]].concat());
    (broker, cluster)
}

fn wait_for_rest(node: &Node) {
    wait_until("a rest", || open_timelines(node) == 0);
}

/// Files of a timeline that a process has open.
fn open_files(node: &Node, timeline: TimelineId) -> usize {
    let directory = directory_of(node, timeline);
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", pid(node))).unwrap();
    let open = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    open.filter(|path| path.starts_with(&directory)).count()
}

#[test]
fn a_timeline_that_nobody_needs_has_no_file_open_and_goes_on_where_it_was() {
    let (_broker, mut cluster) = resting_cluster();
    let parameters = parameters(START);
    for round in 0..3 {
        let (writer, proposing) = cluster.lead(&parameters, true);
        let first = proposing.commit_lsn();
        let end = writer.commit(20, 1000);
        for node in &cluster.nodes {
            node.wait_lsn("commit_lsn", end, LONG);
            assert!(open_files(node, parameters.timeline) > 0);
        }
        proposing.stop().unwrap();
        for node in &cluster.nodes {
            wait_for_rest(node);
            assert_eq!(open_files(node, parameters.timeline), 0);
            assert_eq!(node.timeline_lsn("commit_lsn"), end, "round {round}");
        }
        for node in &cluster.nodes {
            assert!(node.read_all(first, end) == writer.bytes());
        }
        // A start finds it at rest as well.
        wait_for_rest(&cluster.nodes[round]);
        cluster.nodes[round].kill();
        cluster.nodes[round].start();
        assert_eq!(open_timelines(&cluster.nodes[round]), 0);
    }
}

#[test]
fn a_kill_after_the_first_append_that_follows_a_rest_loses_nothing() {
    let (_broker, mut cluster) = resting_cluster();
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(20, 1000);
    cluster.nodes.iter().for_each(|node| node.wait_lsn("commit_lsn", end, LONG));
    proposing.stop().unwrap();
    for _ in 0..3 {
        cluster.nodes.iter().for_each(wait_for_rest);
        let (writer, proposing) = cluster.lead(&parameters, true);
        let first = proposing.commit_lsn();
        let end = writer.commit(1, 100);
        cluster.nodes.iter_mut().for_each(Node::kill);
        drop(proposing);
        cluster.nodes.iter_mut().for_each(Node::start);
        // What a majority acknowledged is committed again, without a compute.
        for node in &cluster.nodes {
            node.wait_lsn("commit_lsn", end, LONG);
            assert!(node.read_all(first, end) == writer.bytes());
        }
    }
}

/// Nobody comes for it: it is the broker's word, or where there is none the others', that it lacks something.
#[test]
fn a_member_at_rest_hears_of_what_it_lacks() {
    for has_broker in [true, false] {
        let broker = has_broker.then(start_broker);
        let mut args = SHORT.to_vec();
        args.extend(broker.iter().flat_map(|broker| ["--broker", broker.url.as_str()]));
        let mut cluster = Cluster::start_with(3, &args);
        let parameters = parameters(START);
        let (writer, proposing) = cluster.lead(&parameters, true);
        let end = writer.commit(20, 1000);
        cluster.nodes.iter().for_each(|node| node.wait_lsn("commit_lsn", end, LONG));
        proposing.stop().unwrap();
        wait_for_rest(&cluster.nodes[2]);
        cluster.nodes[2].stop();
        let mut marks = std::fs::read_dir(cluster.nodes[2].dir.join("awake")).into_iter().flatten();
        assert!(marks.next().is_none(), "it is not at rest");
        let (writer, proposing) = cluster.lead(&parameters, true);
        let first = proposing.commit_lsn();
        let end = writer.commit(20, 1000);
        proposing.stop().unwrap();
        cluster.nodes[2].start();
        cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
        assert!(cluster.nodes[2].read_all(first, end) == writer.bytes());
    }
}
