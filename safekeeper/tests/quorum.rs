//! Three real safekeepers and the proposer driver.

#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::proposer::{ProposerError, SafekeeperClient, elect};
use pgstrata_ids::{Lsn, NodeId, Term};
use pgstrata_quorum::VoteRequest;
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{Greeting, Message, WAL, encode};

const PATIENCE: Duration = Duration::from_secs(10);
const START: Lsn = Lsn(SEGMENT_SIZE);

#[test]
fn commits_survive_an_election_and_a_restart_of_all() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    for size in [0, 10, 100, 9000, 100_000] {
        writer.commit(20, size);
    }
    let end = writer.commit(1, 3 << 20);
    let last = writer.generator().prev;
    proposing.stop().unwrap();
    for node in &mut cluster.nodes {
        node.kill();
        node.start();
    }
    let leader = cluster.elect(&parameters);
    let elected = leader.elected();
    assert_eq!(elected.start_lsn, end);
    assert_eq!(elected.prev_record_lsn, Some(last));
    drop(leader);
    let (writer2, proposing) = cluster.lead(&parameters, true);
    writer2.commit(1, 10);
    for node in &cluster.nodes {
        node.wait_lsn("commit_lsn", end, Duration::from_secs(5));
        assert!(node.read_all(first, end) == writer.bytes());
    }
    proposing.stop().unwrap();
}

#[test]
fn one_of_three_may_die_and_is_caught_up_when_it_returns() {
    for keeps_old in [true, false] {
        let mut cluster = Cluster::start(3);
        let (writer, proposing) = cluster.lead(&parameters(START), keeps_old);
        let first = proposing.commit_lsn();
        writer.commit(10, 1000);
        cluster.nodes[0].kill();
        let mut longest = Duration::ZERO;
        for _ in 0..400 {
            let started = Instant::now();
            writer.commit(4, 60_000);
            longest = longest.max(started.elapsed());
        }
        assert!(longest < Duration::from_secs(2), "a commit took {longest:?}");
        cluster.nodes[0].start();
        let end = writer.commit(1, 10);
        cluster.nodes[0].wait_lsn("commit_lsn", end, Duration::from_secs(20));
        assert!(cluster.nodes[0].read_all(first, end) == writer.bytes());
        proposing.stop().unwrap();
    }
}

#[test]
fn l5_one_that_lags_the_election_is_sent_no_zeros() {
    let mut cluster = Cluster::start(3);
    // Which never hears of the timeline from its peers.
    cluster.nodes[2].kill();
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    let before = writer.commit(100, 10_000);
    proposing.stop().unwrap();
    let (second, proposing) = cluster.lead(&parameters(START), true);
    second.commit(10, 1000);
    // It misses what was there before the running proposer's own WAL begins.
    cluster.nodes[2].start();
    let end = second.commit(1, 10);
    cluster.nodes[2].wait_lsn("commit_lsn", end, Duration::from_secs(20));
    assert!(cluster.nodes[2].read_all(first, before) == writer.bytes());
    proposing.stop().unwrap();
}

/// What only the donor has is no compute's to send, and nothing can be committed before another member has it too.
#[test]
fn what_a_term_begins_with_is_pulled_from_who_has_it() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let first = proposing.commit_lsn();
    writer.commit(10, 1000);
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    // In more than one piece, which end within records.
    let end = writer.write(12, 400_000);
    cluster.nodes[0].wait_lsn("flush_lsn", end, PATIENCE);
    proposing.stop().unwrap();
    cluster.nodes[1].start();
    let started = Instant::now();
    let (second, proposing) = cluster.lead(&parameters(START), true);
    println!("a first commit after {:?}", started.elapsed());
    second.commit(1, 10);
    cluster.nodes[2].start();
    let last = second.commit(1, 10);
    for node in &cluster.nodes {
        node.wait_lsn("commit_lsn", last, Duration::from_secs(20));
        assert!(node.read_all(first, end) == writer.bytes());
    }
    proposing.stop().unwrap();
}

#[test]
fn l10_fewer_members_are_no_quorum_of_their_own() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(10, 1000);
    // A majority may be the two others.
    cluster.nodes[0].wait_lsn("flush_lsn", end, Duration::from_secs(5));
    proposing.stop().unwrap();
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    let mut config = cluster.config(&parameters);
    // It is told of one, which says who they are.
    config.safekeepers_to_ask = vec![NodeId(1)];
    let alone = elect(config, Duration::from_secs(2)).unwrap_err();
    assert!(matches!(alone, ProposerError::NoQuorum { .. }), "{alone}");
    for node in ["safekeeper 2", "safekeeper 3"] {
        assert!(alone.to_string().contains(node), "{alone}");
    }
    cluster.nodes[1].start();
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
}

#[test]
fn l10_an_emptied_directory_does_not_vote() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let some = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", some, Duration::from_secs(5));
    cluster.nodes[2].kill();
    let end = writer.commit(10, 1000);
    // Its disk is lost while the compute runs, which knew it before.
    cluster.nodes[0].kill();
    std::fs::remove_dir_all(&cluster.nodes[0].dir).unwrap();
    cluster.nodes[0].start();
    let more = writer.write(1, 10);
    assert!(!writer.wait_commit(more, Duration::from_secs(2)));
    drop(proposing);
    // The one that lags and the one that forgot are no quorum: the commit is on the second only.
    cluster.nodes[1].kill();
    cluster.nodes[2].start();
    let elected = elect(cluster.config(&parameters), Duration::from_secs(4));
    let refused = elected.map(|leader| leader.elected().start_lsn).unwrap_err();
    assert!(refused.to_string().contains("another directory"), "{refused}");
    cluster.nodes[1].start();
    assert!(cluster.elect(&parameters).elected().start_lsn >= end);
}

#[test]
fn s2_an_absurd_term_does_not_end_a_branch() {
    use std::io::Write;
    let cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(10, 1000);
    proposing.stop().unwrap();
    let config = cluster.config(&parameters);
    let mut reader =
        SafekeeperClient::connect(&cluster.nodes[0].wal, None, None, PATIENCE).unwrap();
    let status = reader.open(parameters.tenant, parameters.timeline).unwrap();
    let configuration = status.configuration;
    assert_eq!((configuration.number(), configuration.members().len()), (1, 3));
    assert!(configuration.contains(status.member));
    for (node, times) in cluster.nodes.iter().zip([1, 3, 0]) {
        for _ in 0..times {
            let mut bytes = Vec::new();
            let greeting = Greeting {
                parameters: parameters.clone(),
                known: 1,
                addresses: Vec::new(),
                proposer: config.id,
            };
            encode(&Message::Greeting(greeting), Stamp::First(WAL.speaks), &mut bytes);
            let (term, proposer) = (Term(u64::MAX), config.id);
            let configuration = configuration.clone();
            let request = VoteRequest { term, proposer, configuration };
            let stamp = Stamp::In(WAL.speaks.highest());
            encode(&Message::VoteRequest(request), stamp, &mut bytes);
            let mut stream = std::net::TcpStream::connect(&node.wal).unwrap();
            stream.write_all(&bytes).unwrap();
            let mut input = FrameBuffer::new(1 << 16);
            // Until it closes: after a refusal it does.
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            while input.fill(&mut stream).unwrap_or(false) {}
        }
    }
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
}

#[test]
fn without_a_majority_commits_wait_and_then_go_on() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    writer.commit(10, 1000);
    cluster.nodes[0].kill();
    cluster.nodes[1].kill();
    let end = writer.write(3, 1000);
    assert!(!writer.wait_commit(end, Duration::from_millis(300)));
    cluster.nodes[1].start();
    assert!(writer.wait_commit(end, Duration::from_secs(5)));
    proposing.stop().unwrap();
}

#[test]
fn a_newer_compute_fences_the_older() {
    let cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (old, old_proposing) = cluster.lead(&parameters, true);
    old.commit(10, 1000);
    let (new, new_proposing) = cluster.lead(&parameters, true);
    let before = old.commit_lsn();
    let lost = old.write(1, 1000);
    assert!(!old.wait_commit(lost, Duration::from_millis(300)));
    assert_eq!(old.commit_lsn(), before);
    assert!(old.fenced().is_some());
    assert!(matches!(old_proposing.stop(), Err(ProposerError::Fenced(_))));
    new.commit(10, 1000);
    new_proposing.stop().unwrap();
}

#[test]
fn a_clean_stop_says_so() {
    let mut cluster = Cluster::start(1);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    let end = writer.commit(10, 1000);
    proposing.stop().unwrap();
    assert_eq!(cluster.nodes[0].stop(), Some(0));
    cluster.nodes[0].start();
    assert_eq!(cluster.nodes[0].timeline_lsn("flush_lsn"), end);
    assert!(cluster.nodes[0].get("/metrics").contains("pgstrata_safekeeper_commit_lsn"));
    assert_eq!(cluster.nodes[0].get("/healthz"), "ok\n");
    assert_eq!(cluster.nodes[0].get("/readyz"), "ready\n");
}
