//! Damaged WAL on a member: found, fetched anew from others, and never counted meanwhile.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, Node};
use common::replication;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::proposer::{SafekeeperClient, elect};
use pgstrata_ids::{Lsn, Term};

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

/// Rots in an old segment, which no start looks at.
const OLD: Lsn = Lsn(START.0 + 500_000);

#[test]
fn rot_is_found_by_the_scrub_and_mended_while_a_compute_writes() {
    let args = ["--scrub-every", "1", "--scrub-rate", "1000"];
    let cluster = Cluster::start_with(3, &args);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(350, 10_000);
    let node = &cluster.nodes[0];
    node.wait_lsn("commit_lsn", end, LONG);
    for damage in ALL {
        let mended = metric(node, "pgstrata_safekeeper_mended_total");
        damage.happens(node, OLD);
        let mut end = end;
        wait_until(&format!("{damage:?} is mended"), || {
            end = writer.commit(1, 100);
            metric(node, "pgstrata_safekeeper_mended_total") > mended
        });
        node.wait_lsn("commit_lsn", end, LONG);
        assert_mended(node, first, &writer.bytes(), &format!("{damage:?}"));
    }
    assert_eq!(writer.fenced(), None);
    assert!(metric(node, "pgstrata_safekeeper_damage_found_total") >= 4);
    proposing.stop().unwrap();
}

#[test]
fn who_reads_is_given_nothing_that_is_wrong_and_it_is_mended() {
    let mut cluster = Cluster::start_with(3, &["--scrub-rate", "0"]);
    let (first, bytes) = written(&cluster, 350);
    let end = first + bytes.len() as u64;
    // So that nobody reads it to archive it.
    cluster.nodes[0].wait_lsn("archived_lsn", end.segment_start(SEGMENT_SIZE), LONG);
    for by_replication in [false, true] {
        let node = &mut cluster.nodes[0];
        // Nothing of it is in a cache of ours.
        assert_eq!(node.stop(), Some(0));
        Damage::Flip.happens(node, OLD);
        node.start();
        assert_eq!(damaged(node), None, "a start reads old segments");
        let read = match by_replication {
            true => replication::read_until_error(&node.pg, first, end),
            false => {
                let patience = Duration::from_secs(10);
                let mut client =
                    SafekeeperClient::connect(&node.wal, None, None, patience).unwrap();
                let timeline = parameters(START);
                client.open(timeline.tenant, timeline.timeline).unwrap();
                let mut read = Vec::new();
                let refused = client.read_wal(first, end, Term(0), &mut read).unwrap_err();
                assert!(refused.to_string().contains("as it was written"), "{refused}");
                read
            }
        };
        assert!(read.len() as u64 <= OLD - first && bytes.starts_with(&read));
        wait_until("the mend", || metric(node, "pgstrata_safekeeper_mended_total") > 0);
        assert_mended(node, first, &bytes, "what somebody met");
    }
}

#[test]
fn a_member_alone_is_mended_by_the_archive() {
    let args = ["--scrub-every", "1", "--scrub-rate", "1000"];
    let mut cluster = Cluster::start_with(1, &args);
    let (first, bytes) = written(&cluster, 350);
    let end = first + bytes.len() as u64;
    let node = &mut cluster.nodes[0];
    node.wait_lsn("archived_lsn", end.segment_start(SEGMENT_SIZE), LONG);
    for damage in ALL {
        let mended = metric(node, "pgstrata_safekeeper_mended_total");
        damage.happens(node, OLD);
        wait_until("the mend", || metric(node, "pgstrata_safekeeper_mended_total") > mended);
        assert_mended(node, first, &bytes, &format!("{damage:?}"));
    }
    // What is in no archive yet is lost; it says so, and is not taken for less.
    assert_eq!(node.stop(), Some(0));
    Damage::Flip.happens(node, Lsn(end.0 - 5000));
    node.start();
    wait_until("the reason", || damaged(node).is_some_and(|why| why.contains("the archive")));
    let why = damaged(node).unwrap();
    assert!(why.contains("safekeeper replace") && why.contains(&end.to_string()), "{why}");
    assert!(elect(cluster.config(&parameters(START)), Duration::from_secs(2)).is_err());
}

/// One has what the others lack, acknowledged in a term that may yet come to something. Then it rots.
#[test]
fn a_damaged_tail_does_not_vote_until_a_later_term_has_settled_it() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let shared = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", shared, LONG);
    cluster.nodes[0].kill();
    cluster.nodes[1].kill();
    let tail = writer.write(50, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", tail, LONG);
    assert_eq!(cluster.nodes[2].stop(), Some(0));
    drop(proposing);
    Damage::Flip.happens(&cluster.nodes[2], Lsn(tail.0 - 20_000));
    cluster.nodes[2].start();
    cluster.nodes[0].start();
    wait_until("the reason", || {
        damaged(&cluster.nodes[2]).is_some_and(|why| why.contains("asked"))
    });
    // Two are up, and one of them is as if it were not.
    let alone = elect(cluster.config(&parameters(START)), Duration::from_secs(2)).unwrap_err();
    assert!(alone.to_string().contains("quorum"), "{alone}");
    assert!(damaged(&cluster.nodes[2]).is_some());
    cluster.nodes[1].start();
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(200, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    assert_mended(&cluster.nodes[2], first, &writer.bytes(), "a later term");
    proposing.stop().unwrap();
    assert_eq!(writer.fenced(), None);
}

/// What two of three have lost the third has, and gives it to them: a majority is elected that lacks nothing.
#[test]
fn a_majority_that_is_damaged_elects_nobody_with_less() {
    let mut cluster = Cluster::start(3);
    let (first, bytes) = written(&cluster, 50);
    let end = first + bytes.len() as u64;
    for node in &mut cluster.nodes {
        assert_eq!(node.stop(), Some(0));
    }
    for node in &cluster.nodes[..2] {
        Damage::Flip.happens(node, Lsn(end.0 - 100_000));
    }
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    assert!(elect(cluster.config(&parameters(START)), Duration::from_secs(3)).is_err());
    cluster.nodes[2].start();
    for node in &cluster.nodes[..2] {
        assert_mended(node, first, &bytes, "the third");
    }
    cluster.nodes[2].kill();
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
}

/// Killed again and again while it mends, it is mended in the end.
#[test]
fn kills_in_the_midst_of_mending_do_no_harm() {
    let mut cluster = Cluster::start(3);
    let (first, bytes) = written(&cluster, 350);
    let end = first + bytes.len() as u64;
    for round in 0..12u64 {
        let node = &mut cluster.nodes[1];
        assert_eq!(node.stop(), Some(0));
        for lsn in [START + 10_000, START + SEGMENT_SIZE + 10_000, Lsn(end.0 - 50_000)] {
            Damage::Flip.happens(node, lsn);
        }
        node.start();
        std::thread::sleep(Duration::from_millis(round * 3));
        node.kill();
        node.start();
        wait_until("the mend", || damaged(node).is_none());
        // All of it, or what was damaged is so still, and is found when it is read.
        let is_whole = || {
            let lsn = node.timeline_lsn("flush_lsn");
            assert!(lsn >= end || damaged(node).is_some(), "{lsn} in round {round}");
            lsn >= end && read(node, first, end).is_ok_and(|read| read == bytes)
        };
        wait_until("all bytes", is_whole);
    }
}

fn read(node: &Node, from: Lsn, to: Lsn) -> std::io::Result<Vec<u8>> {
    let patience = Duration::from_secs(10);
    let mut client = SafekeeperClient::connect(&node.wal, None, None, patience)?;
    let timeline = parameters(START);
    client.open(timeline.tenant, timeline.timeline)?;
    let mut bytes = Vec::new();
    client.read_wal(from, to, Term(0), &mut bytes)?;
    Ok(bytes)
}

/// Members may have been given up, and what they archived is not right then: while that can't be read the archive is no source.
#[test]
fn nothing_is_mended_from_the_archive_while_it_is_not_known_who_was_given_up() {
    let mut cluster = Cluster::start(3);
    let (first, bytes) = written(&cluster, 350);
    cluster.nodes[0].wait_lsn("archived_lsn", START + 2 * SEGMENT_SIZE, LONG);
    for node in &mut cluster.nodes {
        node.kill();
    }
    let parameters = parameters(START);
    let of = format!("objects/tenants/{}/timelines/{}", parameters.tenant, parameters.timeline);
    let object = cluster.dir.path().join(of).join("quorum");
    let right = std::fs::read(&object).unwrap();
    let mut wrong = right.clone();
    *wrong.last_mut().unwrap() ^= 1;
    std::fs::write(&object, wrong).unwrap();
    let node = &mut cluster.nodes[0];
    Damage::Missing.happens(node, START);
    node.start();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert!(damaged(node).is_some());
        std::thread::sleep(Duration::from_millis(100));
    }
    std::fs::write(&object, right).unwrap();
    assert_mended(node, first, &bytes, "the archive");
}
