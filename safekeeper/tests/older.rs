//! Branches that an older version began, whose members were nodes: what becomes of them under this one.

#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::cluster::{Cluster, Node};
use common::members::{change, decide, decided, group, member, object, recover, wait_until};
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::proposer::{SafekeeperClient, elect};
use pgstrata_ids::{Incarnation, Lsn, NodeId};

const START: Lsn = Lsn(SEGMENT_SIZE);
const PATIENCE: Duration = Duration::from_secs(10);

/// What `control` of version 2 was: members by their nodes only, and no term in which they were taken.
fn to_second_version(path: &Path, members: u64) {
    let bytes = std::fs::read(path).unwrap();
    let body = &bytes[24..];
    let (before, after) = (&body[..156], &body[156 + 8 + 4 + 24 * members as usize..]);
    let mut body = before.to_vec();
    body.extend_from_slice(&(members as u32).to_le_bytes());
    (1..=members).for_each(|node| body.extend_from_slice(&node.to_le_bytes()));
    body.extend_from_slice(after);
    std::fs::write(path, with_header(b"pgsSKctl", 2, &body)).unwrap();
}

fn with_header(magic: &[u8; 8], version: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Makes what a cluster has what an older version would have left: `met` is whom they had met.
fn make_older(cluster: &mut Cluster, met: &BTreeMap<u64, Incarnation>) {
    let parameters = parameters(START);
    for node in &mut cluster.nodes {
        assert_eq!(node.stop(), Some(0));
        let timeline = node.dir.join(parameters.tenant.to_string());
        let timeline = timeline.join(parameters.timeline.to_string());
        to_second_version(&timeline.join("control"), 3);
        std::fs::remove_file(node.dir.join("timelines")).unwrap();
        let identity = std::fs::read(node.dir.join("identity")).unwrap();
        let identity = with_header(b"pgsSKid\n", 2, &identity[24..]);
        std::fs::write(node.dir.join("identity"), identity).unwrap();
        write_met(node, met);
    }
    std::fs::remove_file(object(cluster)).unwrap();
}

fn write_met(node: &Node, met: &BTreeMap<u64, Incarnation>) {
    let mut body = (met.len() as u32).to_le_bytes().to_vec();
    for (node, incarnation) in met {
        body.extend_from_slice(&node.to_le_bytes());
        body.extend_from_slice(&incarnation.0);
    }
    std::fs::write(node.dir.join("members"), with_header(b"pgsSKmem", 1, &body)).unwrap();
}

/// The first met the third in an earlier life of its directory, as nobody else did.
fn first_met_another(cluster: &Cluster) {
    let met = |id| (id, member(cluster, id).incarnation);
    let met = [met(1), met(2), (3, Incarnation([9; 16]))].into_iter().collect();
    write_met(&cluster.nodes[0], &met);
}

/// Three as an older version left them, all down, with a log that the first two have whole; and where that ends.
fn older_cluster() -> (Cluster, Lsn) {
    let (cluster, first, bytes) = older_log(10, 1000, 2);
    (cluster, first + bytes.len() as u64)
}

/// The same with a log of so many records that so many of them have whole; where that begins, and what it is.
fn older_log(records: usize, size: usize, wholes: usize) -> (Cluster, Lsn, Vec<u8>) {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let end = writer.commit(records, size);
    for node in &cluster.nodes[..wholes] {
        node.wait_lsn("flush_lsn", end, PATIENCE);
    }
    proposing.stop().unwrap();
    let met = (1..=3).map(|id| (id, member(&cluster, id).incarnation)).collect();
    make_older(&mut cluster, &met);
    let all = writer.bytes();
    (cluster, first, all)
}

fn directory(node: &Node) -> PathBuf {
    let parameters = parameters(START);
    node.dir.join(parameters.tenant.to_string()).join(parameters.timeline.to_string())
}

#[test]
fn a_branch_of_an_older_version_goes_on() {
    let (mut cluster, end) = older_cluster();
    let parameters = parameters(START);
    for node in &mut cluster.nodes {
        node.start();
    }
    // Whatever it is told, a compute founds it with those whose it was.
    let mut config = cluster.config(&parameters);
    config.safekeepers_to_ask = vec![NodeId(3)];
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
    let quorum = decided(&cluster);
    assert!(quorum.is_older);
    assert_eq!(quorum.chain.newest().members(), group(&cluster, &[1, 2, 3]));
    // It is written down, and is needed no more.
    for node in &mut cluster.nodes {
        node.kill();
        std::fs::remove_file(node.dir.join("members")).unwrap();
        node.start();
        assert_eq!(node.status()["timelines"][0]["quorum"]["number"], 1);
    }
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
}

/// Whoever begins it as if it were new could go on beside those who have it.
#[test]
fn a_branch_of_an_older_version_is_not_founded_by_others() {
    let mut cluster = Cluster::start(6);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead_by(&parameters, true, [1, 2, 3].map(NodeId).to_vec());
    let end = writer.commit(10, 1000);
    cluster.nodes[0].wait_lsn("flush_lsn", end, PATIENCE);
    cluster.nodes[1].wait_lsn("flush_lsn", end, PATIENCE);
    proposing.stop().unwrap();
    let met = (1..=3).map(|id| (id, member(&cluster, id).incarnation)).collect();
    let strangers = cluster.nodes.split_off(3);
    make_older(&mut cluster, &met);
    cluster.nodes.iter_mut().for_each(Node::start);
    // They are down again, and nobody says that they have it.
    cluster.nodes.iter_mut().for_each(Node::kill);
    cluster.nodes.extend(strangers);
    let by = |cluster: &Cluster, nodes: [u64; 3]| {
        let mut config = cluster.config(&parameters);
        config.safekeepers_to_ask = nodes.map(NodeId).to_vec();
        elect(config, Duration::from_secs(3))
    };
    let refused = by(&cluster, [4, 5, 6]).unwrap_err().to_string();
    assert!(refused.contains("safekeepers 1, 2, 3 have copies"), "{refused}");
    assert!(!object(&cluster).exists());
    cluster.nodes[..3].iter_mut().for_each(Node::start);
    assert_eq!(by(&cluster, [1, 2, 3]).unwrap().elected().start_lsn, end);
    // What is new is founded by anybody.
    let mut config = cluster.config(&parameters);
    config.parameters.timeline = pgstrata_ids::TimelineId([0xEE; 16]);
    config.safekeepers_to_ask = [4, 5, 6].map(NodeId).to_vec();
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, START);
}

/// It was a member, what it promised is lost, and another one can take its place.
#[test]
fn a_member_that_was_wiped_under_an_older_version_is_made_one_anew() {
    let (mut cluster, end) = older_cluster();
    let parameters = parameters(START);
    let was = group(&cluster, &[1, 2, 3]);
    std::fs::remove_dir_all(&cluster.nodes[2].dir).unwrap();
    for node in &mut cluster.nodes {
        node.start();
    }
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
    assert_eq!(decided(&cluster).chain.newest().members(), was);
    cluster.nodes[1].kill();
    let refused = elect(cluster.config(&parameters), Duration::from_secs(3)).unwrap_err();
    assert!(refused.to_string().contains("quorum"), "{refused}");
    cluster.nodes[1].start();
    change(&cluster, 1, "1,2,3");
    let now = group(&cluster, &[1, 2, 3]);
    assert!(now != was && decided(&cluster).chain.newest().members() == now);
    cluster.nodes[1].kill();
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
}

#[test]
fn a_member_that_never_came_under_this_version_holds_nothing_up() {
    let (mut cluster, end) = older_cluster();
    let was = group(&cluster, &[1, 2, 3]);
    std::fs::remove_dir_all(&cluster.nodes[2].dir).unwrap();
    std::fs::remove_file(cluster.dir.path().join("objects/safekeepers/3")).unwrap();
    for node in &mut cluster.nodes[..2] {
        node.start();
    }
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
    assert_eq!(decided(&cluster).chain.newest().members(), was);
}

/// Whom one of them met is not there any more, and the others go on with who is.
#[test]
fn a_branch_of_an_older_version_is_founded_with_who_has_it() {
    let (mut cluster, end) = older_cluster();
    first_met_another(&cluster);
    for node in &mut cluster.nodes {
        node.start();
    }
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
    assert_eq!(decided(&cluster).chain.newest().members(), group(&cluster, &[1, 2, 3]));
}

/// It would not go on with what is decided.
#[test]
fn who_does_not_take_the_members_is_not_left_of_them() {
    let (mut cluster, end) = older_cluster();
    first_met_another(&cluster);
    cluster.nodes[1].start();
    cluster.nodes[2].start();
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    cluster.nodes[0].start();
    let (status, answer) = recover(&cluster, 1, "1", 1);
    assert!(status == 409 && answer.contains("others answer than was said"), "{answer}");
    assert_eq!(decided(&cluster).chain.newest().number(), 1);
    assert!(!directory(&cluster.nodes[0]).join("keep").exists());
}

/// The third was never told who the members are, and is down; the second went on alone, as configuration 2.
fn begun_anew() -> Cluster {
    let (mut cluster, end) = older_cluster();
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
    cluster.nodes[0].kill();
    let (status, answer) = recover(&cluster, 2, "2", 1);
    assert_eq!(status, 200, "{answer}");
    cluster
}

/// Others began anew before it was ever told who the members are: it may have what they gave up, and is kept.
#[test]
fn a_copy_of_an_older_version_is_kept_where_others_began_anew() {
    let (mut cluster, parameters) = (begun_anew(), parameters(START));
    cluster.nodes[2].start();
    let learn = |cluster: &Cluster, number| {
        let wal = &cluster.nodes[2].wal;
        let mut client = SafekeeperClient::connect(wal, None, None, PATIENCE).unwrap();
        client.learn(parameters.tenant, parameters.timeline, number)
    };
    // At once: it is served no more.
    let refused = learn(&cluster, 2).unwrap_err();
    assert!(refused.to_string().contains("went on without this safekeeper"), "{refused}");
    assert!(directory(&cluster.nodes[2]).join("keep").exists());
    cluster.nodes[2].kill();
    cluster.nodes[2].start();
    let damaged = cluster.nodes[2].status()["damaged"].to_string();
    assert!(damaged.contains("went on without this safekeeper"), "{damaged}");
    // Nor does it become a member with what it has.
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[2, 3])).unwrap());
    let refused = learn(&cluster, joint).unwrap_err();
    assert!(refused.to_string().contains("went on without this safekeeper"), "{refused}");
}

/// The same where it is told of it only once it is to be a member again.
#[test]
fn a_copy_of_an_older_version_is_no_newcomer_to_those_who_began_anew() {
    let (mut cluster, parameters) = (begun_anew(), parameters(START));
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[2, 3])).unwrap());
    cluster.nodes[2].start();
    let wal = &cluster.nodes[2].wal;
    let mut client = SafekeeperClient::connect(wal, None, None, PATIENCE).unwrap();
    let refused = client.learn(parameters.tenant, parameters.timeline, joint).unwrap_err();
    assert!(refused.to_string().contains("only with a new directory"), "{refused}");
    assert!(directory(&cluster.nodes[2]).join("keep").exists());
}

/// Nobody has had it decided yet who the members are: those that are nodes of it help each other.
#[test]
fn damage_is_mended_before_the_members_are_written_down() {
    let (mut cluster, first, bytes) = older_log(20, 10_000, 3);
    let path = directory(&cluster.nodes[2]).join(parameters(START).segment_name(1));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = first.0 - START.0 + 100_000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    cluster.nodes[2].start();
    assert!(cluster.nodes[2].status()["damaged"].to_string().contains("error"));
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    let end = first + bytes.len() as u64;
    wait_until("mended", || cluster.nodes[2].timeline_lsn("flush_lsn") == end);
    assert!(!object(&cluster).exists());
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
    cluster.nodes[2].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[2].read_all(first, end) == bytes);
}

#[test]
fn a_copy_that_was_lost_under_an_older_version_is_not_begun_anew() {
    let (mut cluster, end) = older_cluster();
    let parameters = parameters(START);
    let lost = cluster.nodes[2].dir.join(parameters.tenant.to_string());
    std::fs::remove_dir_all(lost).unwrap();
    for node in &mut cluster.nodes {
        node.start();
    }
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
    cluster.nodes[1].kill();
    let refused = elect(cluster.config(&parameters), Duration::from_secs(3)).unwrap_err();
    assert!(refused.to_string().contains("before its members were written down"), "{refused}");
    // Nor is it once the others change: it was a member from the first on.
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 3])).unwrap());
    let mut client =
        SafekeeperClient::connect(&cluster.nodes[2].wal, None, None, PATIENCE).unwrap();
    let refused = client.learn(parameters.tenant, parameters.timeline, joint).unwrap_err();
    assert!(refused.to_string().contains("before its members were written down"), "{refused}");
}
