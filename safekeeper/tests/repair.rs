//! Damaged WAL on a member: found, fetched anew from others, and never counted meanwhile.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, Node};
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_ids::Lsn;

const START: Lsn = Lsn(SEGMENT_SIZE);
const LONG: Duration = Duration::from_secs(30);

fn directory(node: &Node) -> PathBuf {
    let parameters = parameters(START);
    node.dir.join(parameters.tenant.to_string()).join(parameters.timeline.to_string())
}

fn segment(node: &Node, lsn: Lsn) -> PathBuf {
    directory(node).join(parameters(START).segment_name(lsn.segment_number(SEGMENT_SIZE)))
}

/// What can happen to a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Flip,
    Zeros,
    Short,
    Missing,
}

const ALL: [Damage; 4] = [Damage::Flip, Damage::Zeros, Damage::Short, Damage::Missing];

impl Damage {
    /// Of the segment of `lsn`, there.
    fn happens(self, node: &Node, lsn: Lsn) {
        let path = segment(node, lsn);
        let at = lsn.segment_offset(SEGMENT_SIZE);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        match self {
            Damage::Flip => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            }
            Damage::Zeros => file.write_all_at(&vec![0; 4096], at).unwrap(),
            Damage::Short => file.set_len(at).unwrap(),
            Damage::Missing => std::fs::remove_file(&path).unwrap(),
        }
    }
}

fn damaged(node: &Node) -> Option<String> {
    let status = node.status();
    Some(status["damaged"].get(0)?["error"].as_str()?.to_owned())
}

fn metric(node: &Node, name: &str) -> u64 {
    let text = node.get("/metrics");
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// It is whole again, and has just these bytes.
fn assert_mended(node: &Node, first: Lsn, bytes: &[u8], by: &str) {
    wait_until(by, || {
        let lsn = node.timeline_lsn("commit_lsn");
        damaged(node).is_none() && lsn >= first + bytes.len() as u64
    });
    assert!(node.read_all(first, first + bytes.len() as u64) == bytes, "{by}");
    assert!(metric(node, "pgstrata_safekeeper_mended_total") > 0, "{by}");
}

/// Three with the same WAL and nobody who writes; where it began, and what it is.
fn written(cluster: &Cluster, records: usize) -> (Lsn, Vec<u8>) {
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(records, 10_000);
    for node in &cluster.nodes {
        node.wait_lsn("commit_lsn", end, LONG);
    }
    proposing.stop().unwrap();
    (first, writer.bytes())
}

#[test]
fn damage_that_is_found_at_a_start_is_mended_by_peers() {
    let mut cluster = Cluster::start(3);
    let (first, bytes) = written(&cluster, 350);
    let end = first + bytes.len() as u64;
    let in_tail = end.segment_start(SEGMENT_SIZE) + 8192;
    assert!(in_tail + 20_000 < end);
    // In an old segment what is there is looked at only when it is read: that is another test.
    let places = ALL.iter().map(|&damage| (damage, in_tail)).chain([
        (Damage::Missing, START + 3 * 8192),
        (Damage::Short, START + 3 * 8192),
        (Damage::Flip, Lsn(end.0 - 100)),
    ]);
    for (damage, lsn) in places {
        let by = format!("{damage:?} at {lsn} of {end}");
        assert_eq!(cluster.nodes[2].stop(), Some(0));
        damage.happens(&cluster.nodes[2], lsn);
        cluster.nodes[2].start();
        // What is left of its end does not show that there was no more of it: a later term has to.
        if [Damage::Short, Damage::Missing].contains(&damage) && lsn == in_tail {
            wait_until(&by, || damaged(&cluster.nodes[2]).is_some_and(|why| why.contains("asked")));
            let (writer, proposing) = cluster.lead(&parameters(START), true);
            let end = writer.commit(1, 10);
            cluster.nodes[2].wait_lsn("flush_lsn", end, LONG);
            proposing.stop().unwrap();
        }
        assert_mended(&cluster.nodes[2], first, &bytes, &by);
    }
}
