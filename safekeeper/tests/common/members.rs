//! Who the members of the tests' timeline are, and how they are changed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgstrata_format::quorum::Quorum;
use pgstrata_format::safekeeper::decode_identity;
use pgstrata_ids::{Lsn, Member};
use pgstrata_quorum::Chain;

use super::cluster::Cluster;
use super::wal::{SEGMENT_SIZE, parameters};

const START: Lsn = Lsn(SEGMENT_SIZE);

/// The member that a node is now.
pub fn member(cluster: &Cluster, id: u64) -> Member {
    let node = cluster.nodes.iter().find(|node| node.id == id).unwrap();
    let bytes = std::fs::read(node.dir.join("identity")).unwrap();
    let identity = decode_identity(&bytes).unwrap();
    Member { node: identity.node, incarnation: identity.incarnation.unwrap() }
}

pub fn group(cluster: &Cluster, ids: &[u64]) -> Vec<Member> {
    ids.iter().map(|&id| member(cluster, id)).collect()
}

pub fn object(cluster: &Cluster) -> PathBuf {
    let parameters = parameters(START);
    let objects = cluster.dir.path().join("objects");
    objects.join(format!("tenants/{}/timelines/{}/quorum", parameters.tenant, parameters.timeline))
}

pub fn decided(cluster: &Cluster) -> Quorum {
    Quorum::decode(&std::fs::read(object(cluster)).unwrap()).unwrap()
}

/// Decides the next configuration, as nobody else does meanwhile.
pub fn decide(cluster: &Cluster, next: impl Fn(&Chain) -> Chain) -> u64 {
    let mut quorum = decided(cluster);
    quorum.chain = next(&quorum.chain);
    std::fs::write(object(cluster), quorum.encode()).unwrap();
    quorum.chain.newest().number()
}

/// Asks a safekeeper until these are the members. Returns how often it was asked.
pub fn change(cluster: &Cluster, by: u64, nodes: &str) -> u32 {
    let parameters = parameters(START);
    let path = format!(
        "/v1/members?tenant_id={}&timeline_id={}&nodes={nodes}",
        parameters.tenant, parameters.timeline
    );
    let node = cluster.nodes.iter().find(|node| node.id == by).unwrap();
    let begun = Instant::now();
    for asked in 1.. {
        let (status, answer) = node.post(&path);
        if status == 200 && answer["step"] == "done" {
            return asked;
        }
        assert!(status == 200 || status == 503, "{status} {answer}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{answer}");
        std::thread::sleep(Duration::from_millis(50));
    }
    unreachable!()
}

/// Asks for those who are left to go on alone.
pub fn recover(cluster: &Cluster, by: u64, survivors: &str, after: u64) -> (u16, String) {
    let parameters = parameters(START);
    let path = format!(
        "/v1/recover?tenant_id={}&timeline_id={}&survivors={survivors}&after={after}",
        parameters.tenant, parameters.timeline
    );
    let (status, answer) = cluster.nodes[by as usize - 1].post(&path);
    (status, answer.to_string())
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "not {what} after 30 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}
