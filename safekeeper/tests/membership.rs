//! Who the members of a timeline are, and how they change: real safekeepers, and the proposer driver.

#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::members::{change, decide, decided, group, member, object, recover, wait_until};
use common::source::Writer;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::proposer::{Proposing, SafekeeperClient, elect};
use pgstrata_format::registration::Registration;
use pgstrata_format::safekeeper::decode_timelines;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId};
use pgstrata_quorum::{Adopter, Holding, joint_in_use};
use pgstrata_wire::safekeeper::Status;

const START: Lsn = Lsn(SEGMENT_SIZE);
const PATIENCE: Duration = Duration::from_secs(10);

fn try_to_learn(cluster: &Cluster, id: u64, number: u64) -> std::io::Result<Status> {
    let node = cluster.nodes.iter().find(|node| node.id == id).unwrap();
    let parameters = parameters(START);
    let mut client = SafekeeperClient::connect(&node.wal, None, None, PATIENCE).unwrap();
    client.learn(parameters.tenant, parameters.timeline, number)
}

fn learn(cluster: &Cluster, id: u64, number: u64) -> Status {
    let status = try_to_learn(cluster, id, number).unwrap();
    assert!(status.configuration.number() >= number, "{status:?}");
    status
}

/// Whether both groups have committed something in a term of the joint configuration.
fn is_in_use(cluster: &Cluster, ids: &[u64], number: u64) -> bool {
    let said = ids.iter().map(|&id| {
        let status = learn(cluster, id, number);
        Adopter {
            number: status.configuration.number(),
            configured_in: status.configured_in,
            holding: Holding {
                member: status.member,
                flush_lsn: status.flush_lsn,
                history: status.history,
            },
        }
    });
    let said: Vec<Adopter> = said.collect();
    joint_in_use(decided(cluster).chain.newest(), &said).is_some()
}

/// A compute that was told of these.
fn lead(cluster: &Cluster, ids: &[u64]) -> (Writer, Proposing) {
    let asked = ids.iter().map(|&id| NodeId(id)).collect();
    cluster.lead_by(&parameters(START), true, asked)
}

/// The fourth takes the third's place, under a compute that goes on.
fn replace_the_third(cluster: &mut Cluster, between: impl Fn()) {
    let joint = decide(cluster, |chain| chain.change_to(group(cluster, &[1, 2, 4])).unwrap());
    // Its peers tell it where they are by the compute, or by a broker; here there is none yet.
    learn(cluster, 4, joint);
    for id in [1, 2, 3] {
        learn(cluster, id, joint);
    }
    between();
    wait_until("in use", || is_in_use(cluster, &[1, 2, 3, 4], joint));
    let ended = decide(cluster, |chain| chain.change_ended().unwrap());
    for id in [1, 2, 3, 4] {
        learn(cluster, id, ended);
    }
}

#[test]
fn members_change_while_a_compute_writes() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    for size in [10, 1000, 100_000] {
        writer.commit(20, size);
    }
    replace_the_third(&mut cluster, || {
        for _ in 0..50 {
            writer.commit(3, 1000);
        }
    });
    writer.commit(3, 1000);
    // The one that left is not needed, and one of the others isn't either.
    cluster.nodes[2].kill();
    cluster.nodes[3].wait_lsn("commit_lsn", proposing.commit_lsn(), PATIENCE);
    cluster.nodes[0].kill();
    let end = writer.commit(20, 1000);
    cluster.nodes[3].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[3].read_all(first, end) == writer.bytes());
    // It was one proposer all the time; its log is elected again, by who is told of any of them.
    proposing.stop().unwrap();
    cluster.nodes[0].start();
    let mut config = cluster.config(&parameters(START));
    config.safekeepers_to_ask = vec![NodeId(2)];
    let leader = elect(config, PATIENCE).unwrap();
    assert_eq!(leader.elected().start_lsn, end);
}

#[test]
fn members_change_while_a_compute_is_idle() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    writer.commit(20, 1000);
    replace_the_third(&mut cluster, || ());
    cluster.nodes[2].kill();
    let end = writer.commit(1, 10);
    cluster.nodes[3].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[3].read_all(first, end) == writer.bytes());
    proposing.stop().unwrap();
}

/// As machines that are cut off, or gone: nobody says that nobody is there.
#[test]
fn members_that_are_silent_hold_a_change_up_once() {
    let cluster = Cluster::start(6);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3, 4, 5]);
    writer.commit(20, 1000);
    let silent = [3, 4].map(|at: usize| {
        rustix::process::Pid::from_child(cluster.nodes[at].child.as_ref().unwrap())
    });
    let tell = |signal| {
        silent.iter().for_each(|pid| rustix::process::kill_process(*pid, signal).unwrap());
    };
    tell(rustix::process::Signal::STOP);
    let before = Instant::now();
    change(&cluster, 1, "1,2,3,5,6");
    let first = before.elapsed();
    let before = Instant::now();
    change(&cluster, 1, "1,2,3,5");
    let second = before.elapsed();
    tell(rustix::process::Signal::CONT);
    // Each question would take six seconds, and there are some seven.
    assert!(first < Duration::from_secs(20), "{first:?}");
    assert!(second < Duration::from_secs(10), "{second:?}");
    writer.commit(20, 1000);
    proposing.stop().unwrap();
}

#[test]
fn a_member_that_is_gone_is_replaced() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    writer.commit(20, 1000);
    cluster.nodes[2].kill();
    let before = Instant::now();
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| change(&cluster, 1, "1,2,4"));
        while !changing.is_finished() {
            writer.commit(3, 1000);
        }
        changing.join().unwrap();
    });
    assert!(before.elapsed() < Duration::from_secs(20));
    // Asking again finds it done.
    assert_eq!(change(&cluster, 2, "1,2,4"), 1);
    cluster.nodes[0].kill();
    let end = writer.commit(20, 1000);
    cluster.nodes[3].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[3].read_all(first, end) == writer.bytes());
    proposing.stop().unwrap();
    // The one that was gone comes back: it lets go of what it had.
    cluster.nodes[0].start();
    cluster.nodes[2].start();
    learn(&cluster, 3, decided(&cluster).chain.newest().number());
    assert_eq!(cluster.nodes[2].stop(), Some(0));
    cluster.nodes[2].start();
    assert_eq!(cluster.nodes[2].status()["timelines"].as_array().unwrap().len(), 0);
    let of_tenant = cluster.nodes[2].dir.join(parameters(START).tenant.to_string());
    assert_eq!(std::fs::read_dir(of_tenant).unwrap().count(), 0);
    // It may be a member again, and has the log then.
    change(&cluster, 3, "1,2,3,4");
    cluster.nodes[2].wait_lsn("flush_lsn", end, PATIENCE);
    let leader = elect(
        pgstrata_compute_shim::proposer::ProposerConfig {
            safekeepers_to_ask: vec![NodeId(3)],
            ..cluster.config(&parameters(START))
        },
        PATIENCE,
    );
    assert_eq!(leader.unwrap().elected().start_lsn, end);
}

#[test]
fn members_change_without_a_compute() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let end = writer.commit(20, 1000);
    proposing.stop().unwrap();
    cluster.nodes[2].kill();
    change(&cluster, 4, "1,2,4");
    cluster.nodes[0].kill();
    cluster.nodes[3].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[3].read_all(first, end) == writer.bytes());
    assert_eq!(cluster.elect(&parameters(START)).elected().start_lsn, end);
}

#[test]
fn a_member_with_an_emptied_directory_is_made_one_anew() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    writer.commit(20, 1000);
    let node = &mut cluster.nodes[2];
    node.kill();
    std::fs::remove_dir_all(&node.dir).unwrap();
    node.start();
    writer.commit(20, 1000);
    change(&cluster, 3, "1,2,3");
    cluster.nodes[1].kill();
    let end = writer.commit(20, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[2].read_all(first, end) == writer.bytes());
    proposing.stop().unwrap();
}

#[test]
fn three_become_five_and_three_again() {
    let mut cluster = Cluster::start(6);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    writer.commit(20, 1000);
    let change = |by, nodes: &str| {
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| change(&cluster, by, nodes));
            while !changing.is_finished() {
                writer.commit(3, 1000);
            }
            changing.join().unwrap()
        })
    };
    change(1, "1,2,3,4,5");
    change(5, "3,4,6");
    for node in [0, 1, 4] {
        cluster.nodes[node].kill();
    }
    cluster.nodes[2].kill();
    let end = writer.commit(20, 1000);
    for node in [3, 5] {
        cluster.nodes[node].wait_lsn("commit_lsn", end, PATIENCE);
        assert!(cluster.nodes[node].read_all(first, end) == writer.bytes());
    }
    proposing.stop().unwrap();
}

#[test]
fn what_can_not_be_is_refused() {
    let mut cluster = Cluster::start_with(4, &["--zone", "a"]);
    // The first two are elsewhere.
    for (node, zone) in cluster.nodes.iter_mut().zip(["b", "c"]) {
        node.kill();
        node.args.extend(["--zone".to_owned(), zone.to_owned()]);
        node.args.drain(..2);
        node.start();
    }
    let parameters = parameters(START);
    let path = |nodes: &str| {
        format!(
            "/v1/members?tenant_id={}&timeline_id={}&nodes={nodes}",
            parameters.tenant, parameters.timeline
        )
    };
    let refused = |nodes: &str| {
        let (status, answer) = cluster.nodes[0].post(&path(nodes));
        (status, answer["error"].as_str().unwrap_or_default().to_owned())
    };
    let (status, why) = refused("1,2,3");
    assert!(status == 404 && why.contains("never founded"), "{status} {why}");
    lead(&cluster, &[1, 2, 3]).1.stop().unwrap();
    for (nodes, expected, part) in [
        ("1,2,9", 404, "safekeeper 9 has never been started"),
        ("1,2,x", 400, "no node id"),
        ("1,1,2", 409, "listed twice"),
        ("1,3,4", 409, "would be in zone a"),
    ] {
        let (status, why) = refused(nodes);
        assert!(status == expected && why.contains(part), "{nodes}: {status} {why}");
    }
    assert_eq!(decided(&cluster).chain.newest().number(), 1);
    let (status, answer) = cluster.nodes[0].post(&format!("{}&force=true", path("1,3,4")));
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn a_compute_of_before_a_change_goes_on_with_who_is_there() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(20, 1000);
    replace_the_third(&mut cluster, || ());
    proposing.stop().unwrap();
    // It knows of the former members only, of whom the third says who they are now.
    let mut config = cluster.config(&parameters(START));
    config.safekeepers_to_ask = [1, 2, 3].map(NodeId).to_vec();
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
}

/// Nobody tells who has left of what is decided after that; who asks it may know nobody else who is there.
#[test]
fn who_has_left_looks_who_the_members_are_before_it_says_so() {
    let mut cluster = Cluster::start(7);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(20, 1000);
    replace_the_third(&mut cluster, || ());
    proposing.stop().unwrap();
    change(&cluster, 1, "5,6,7");
    for gone in [1, 2, 4] {
        cluster.nodes[gone - 1].kill();
    }
    let knew = cluster.nodes[2].status()["timelines"][0]["quorum"]["number"].clone();
    assert!(knew.as_u64() < Some(decided(&cluster).chain.newest().number()), "{knew}");
    let mut config = cluster.config(&parameters(START));
    config.safekeepers_to_ask = [1, 2, 3].map(NodeId).to_vec();
    // It was told where these three are; the third says where the others are.
    let told = cluster.nodes[..3].iter().map(|node| (NodeId(node.id), node.wal.clone()));
    config.safekeepers = std::sync::Arc::new(told.collect::<Vec<_>>());
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
}

/// One that was given up answers first, and refuses, as it would be one again with what it has.
#[test]
fn a_start_waits_for_who_is_left_though_others_refuse() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(20, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", end, PATIENCE);
    drop(proposing);
    cluster.nodes[0].kill();
    cluster.nodes[1].kill();
    let (status, answer) = recover(&cluster, 3, "3", 1);
    assert_eq!(status, 200, "{answer}");
    cluster.nodes[0].start();
    let refused = try_to_learn(&cluster, 1, 2).unwrap_err().to_string();
    assert!(refused.contains("went on without this safekeeper"), "{refused}");
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 3, 4])).unwrap());
    learn(&cluster, 3, joint);
    learn(&cluster, 4, joint);
    let survivor = cluster.nodes[2].child.as_ref().unwrap();
    let survivor = rustix::process::Pid::from_child(survivor);
    rustix::process::kill_process(survivor, rustix::process::Signal::STOP).unwrap();
    let mut config = cluster.config(&parameters(START));
    config.safekeepers_to_ask = [1, 3].map(NodeId).to_vec();
    std::thread::scope(|scope| {
        let start = scope.spawn(|| elect(config, 2 * PATIENCE));
        std::thread::sleep(Duration::from_secs(4));
        let waits = !start.is_finished();
        rustix::process::kill_process(survivor, rustix::process::Signal::CONT).unwrap();
        let elected = start.join().unwrap().map(|leader| leader.elected().start_lsn);
        assert!(waits && elected.is_ok(), "{elected:?}");
        assert_eq!(elected.ok(), Some(end));
    });
}

#[test]
fn whoever_founds_a_timeline_it_has_one_quorum() {
    for _ in 0..5 {
        let cluster = Cluster::start(5);
        let parameters = parameters(START);
        let elected: Vec<_> = std::thread::scope(|scope| {
            let campaign = |ids: [u64; 3]| {
                let mut config = cluster.config(&parameters);
                config.safekeepers_to_ask = ids.map(NodeId).to_vec();
                let campaign = || elect(config, PATIENCE).map(|leader| leader.elected().term);
                scope.spawn(campaign).join().unwrap().unwrap()
            };
            [[1, 2, 3], [3, 4, 5]].map(campaign).to_vec()
        });
        assert_ne!(elected[0], elected[1]);
        let members = decided(&cluster).chain.newest().clone();
        assert_eq!((members.number(), members.members().len()), (1, 3));
        for node in &cluster.nodes {
            let status = node.status();
            let has_it = !status["timelines"].as_array().unwrap().is_empty();
            assert_eq!(has_it, members.nodes().contains(&NodeId(node.id)), "{status}");
        }
    }
}

#[test]
fn a_timeline_whose_directory_is_lost_is_not_begun_anew() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(10, 1000);
    proposing.stop().unwrap();
    let directory = cluster.nodes[0].dir.join(parameters.tenant.to_string());
    cluster.nodes[0].kill();
    let noted = std::fs::read(cluster.nodes[0].dir.join("timelines")).unwrap();
    assert!(decode_timelines(&noted).unwrap().contains(&(parameters.tenant, parameters.timeline)));
    std::fs::remove_dir_all(directory).unwrap();
    cluster.nodes[0].start();
    let status = cluster.nodes[0].status();
    assert!(status["damaged"][0]["error"].as_str().unwrap().contains("is gone"), "{status}");
    // With one that has the log and one that forgot it there is no quorum.
    cluster.nodes[1].kill();
    let refused = elect(cluster.config(&parameters), Duration::from_secs(3)).unwrap_err();
    assert!(refused.to_string().contains("is gone"), "{refused}");
    cluster.nodes[1].start();
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
}

#[test]
fn without_its_list_of_timelines_a_directory_is_not_used() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    writer.commit(10, 1000);
    proposing.stop().unwrap();
    let node = &mut cluster.nodes[0];
    node.kill();
    std::fs::remove_file(node.dir.join("timelines")).unwrap();
    std::fs::remove_dir_all(node.dir.join(parameters.tenant.to_string())).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_safekeeper"));
    command.arg("--dir").arg(&node.dir).args(&node.args);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("move the whole directory away"), "{said}");
}

#[test]
fn one_word_of_a_change_stops_no_commits() {
    let cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(10, 1000);
    let term = cluster.nodes[0].status()["timelines"][0]["term"].clone();
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 2, 4])).unwrap());
    learn(&cluster, 4, joint);
    learn(&cluster, 1, joint);
    // The others could not see where it was decided.
    let (objects, away) = (cluster.dir.path().join("objects"), cluster.dir.path().join("away"));
    std::fs::rename(&objects, &away).unwrap();
    std::fs::write(&objects, b"").unwrap();
    for _ in 0..20 {
        writer.commit(3, 1000);
    }
    // It is heard again what the first says, also when it is greeted anew.
    std::thread::sleep(Duration::from_millis(1500));
    let end = writer.commit(3, 1000);
    cluster.nodes[0].wait_lsn("commit_lsn", end, PATIENCE);
    for node in &cluster.nodes[..3] {
        assert_eq!(node.status()["timelines"][0]["term"], term);
    }
    std::fs::remove_file(&objects).unwrap();
    std::fs::rename(&away, &objects).unwrap();
    learn(&cluster, 2, joint);
    wait_until("in use", || is_in_use(&cluster, &[1, 2, 3, 4], joint));
    writer.commit(3, 1000);
    proposing.stop().unwrap();
}

/// The configuration changes again before the election of the one before it has come to its end.
#[test]
fn changes_in_quick_succession_end_no_compute() {
    let cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(10, 1000);
    for round in 0..40 {
        let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 2, 4])).unwrap());
        for id in [4, 1 + round % 3, 1 + (round + 1) % 3] {
            learn(&cluster, id, joint);
        }
        let undone = decide(&cluster, |chain| chain.change_undone().unwrap());
        for id in [1 + (round + 2) % 3, 1 + (round + 1) % 3] {
            learn(&cluster, id, undone);
        }
        writer.commit(2, 100_000);
        for id in [1, 2, 3, 4] {
            learn(&cluster, id, undone);
        }
    }
    let end = writer.commit(2, 100);
    cluster.nodes[2].wait_lsn("commit_lsn", end, PATIENCE);
    proposing.stop().unwrap();
}

/// Asks for a change once.
fn ask(cluster: &Cluster, by: u64, nodes: &str, after: u64) -> (u16, String) {
    let parameters = parameters(START);
    let path = format!(
        "/v1/members?tenant_id={}&timeline_id={}&nodes={nodes}&after={after}",
        parameters.tenant, parameters.timeline
    );
    let (status, answer) = cluster.nodes[by as usize - 1].post(&path);
    (status, answer.to_string())
}

/// Both groups decide, the fourth being the newcomer, and its disk is lost.
fn lose_the_newcomer(cluster: &mut Cluster, writer: &Writer) -> u64 {
    writer.commit(10, 1000);
    let joint = decide(cluster, |chain| chain.change_to(group(cluster, &[1, 2, 4])).unwrap());
    learn(cluster, 4, joint);
    for id in [1, 2, 3] {
        learn(cluster, id, joint);
    }
    wait_until("in use", || is_in_use(cluster, &[1, 2, 3, 4], joint));
    writer.commit(10, 1000);
    cluster.nodes[3].kill();
    std::fs::remove_dir_all(&cluster.nodes[3].dir).unwrap();
    writer.commit(10, 1000);
    joint
}

/// What the members were, from the first configuration on: nodes before and after.
fn steps(cluster: &Cluster) -> Vec<(Vec<u64>, Vec<u64>)> {
    let nodes = |group: &[Member]| group.iter().map(|member| member.node.0).collect();
    let quorum = decided(cluster);
    let all = quorum.chain.configurations().iter();
    all.map(|one| (nodes(one.members()), nodes(one.incoming()))).collect()
}

#[test]
fn a_newcomer_that_is_lost_is_given_up_for_another() {
    let mut cluster = Cluster::start(5);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let joint = lose_the_newcomer(&mut cluster, &writer);
    // Nothing comes of what was begun; it may begin anew.
    let (status, answer) = ask(&cluster, 1, "1,2,4", joint);
    assert!(status == 200 && answer.contains("safekeeper 4"), "{status} {answer}");
    change(&cluster, 1, "1,2,5");
    let (old, new) = (vec![1, 2, 3], vec![1, 2, 5]);
    let joint = |incoming: &[u64]| (old.clone(), incoming.to_vec());
    let plain = |members: &Vec<u64>| (members.clone(), vec![]);
    let expected = [plain(&old), joint(&[1, 2, 4]), plain(&old), joint(&new), plain(&new)];
    assert_eq!(steps(&cluster), expected);
    writer.commit(10, 1000);
    cluster.nodes[2].kill();
    cluster.nodes[0].kill();
    let end = writer.commit(10, 1000);
    cluster.nodes[4].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[4].read_all(first, end) == writer.bytes());
    proposing.stop().unwrap();
}

#[test]
fn a_newcomer_that_comes_back_empty_joins_anew() {
    let mut cluster = Cluster::start(4);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let joint = lose_the_newcomer(&mut cluster, &writer);
    let before = decided(&cluster).chain.newest().incoming().to_vec();
    cluster.nodes[3].start();
    change(&cluster, 2, "1,2,4");
    assert_eq!(steps(&cluster).len(), 5);
    let chain = decided(&cluster).chain;
    assert_eq!(chain.newest().number(), joint + 3);
    assert_eq!(chain.newest().members(), group(&cluster, &[1, 2, 4]));
    assert!(!before.contains(&member(&cluster, 4)));
    cluster.nodes[0].kill();
    let end = writer.commit(10, 1000);
    cluster.nodes[3].wait_lsn("commit_lsn", end, PATIENCE);
    assert!(cluster.nodes[3].read_all(first, end) == writer.bytes());
    proposing.stop().unwrap();
}

#[test]
fn nothing_is_begun_that_could_not_go_on() {
    let mut cluster = Cluster::start(5);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(10, 1000);
    cluster.nodes[4].kill();
    let (status, answer) = ask(&cluster, 1, "1,2,5", 1);
    assert!(status == 503 && answer.contains("the newcomer does not answer"), "{status} {answer}");
    proposing.stop().unwrap();
    // Two have lost their disks: whoever changes members now, none of the groups could commit.
    for lost in [1, 2] {
        cluster.nodes[lost].kill();
        std::fs::remove_dir_all(&cluster.nodes[lost].dir).unwrap();
    }
    cluster.nodes[1].start();
    let (status, answer) = ask(&cluster, 1, "1,3,4", 1);
    assert!(status == 503 && answer.contains("no majority of the members"), "{status} {answer}");
    assert!(answer.contains("safekeeper 2: "), "{answer}");
    assert_eq!(steps(&cluster).len(), 1);
}

#[test]
fn a_removal_that_can_not_end_is_not_begun_and_can_be_undone() {
    let mut cluster = Cluster::start(3);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(10, 1000);
    cluster.nodes[1].kill();
    let (status, answer) = ask(&cluster, 1, "1,2", 1);
    assert!(status == 503 && answer.contains("no majority of the members after"), "{answer}");
    cluster.nodes[1].start();
    // It dies after the change has begun.
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 2])).unwrap());
    for id in [1, 2, 3] {
        learn(&cluster, id, joint);
    }
    writer.commit(10, 1000);
    cluster.nodes[1].kill();
    let (status, answer) = ask(&cluster, 1, "1,2,3", joint);
    assert!(status == 200 && answer.contains("done"), "{status} {answer}");
    assert_eq!(steps(&cluster).last().unwrap(), &(vec![1, 2, 3], vec![]));
    let end = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("commit_lsn", end, PATIENCE);
    proposing.stop().unwrap();
}

#[test]
fn of_who_is_left_the_one_with_most_decides_until_all_have_it() {
    let mut cluster = Cluster::start(6);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3, 4, 5]);
    let first = proposing.commit_lsn();
    writer.commit(10, 1000);
    let (status, answer) = recover(&cluster, 1, "1,2", 1);
    assert!(status == 409 && answer.contains("nothing needs to be given up"), "{answer}");
    // The second lacks what the others have; then three are lost, and one whose change had only begun is left.
    cluster.nodes[1].kill();
    let end = writer.commit(10, 1000);
    cluster.nodes[0].wait_lsn("commit_lsn", end, PATIENCE);
    let next = [1, 2, 3, 4, 6];
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &next)).unwrap());
    drop(proposing);
    for lost in [2, 3, 4] {
        cluster.nodes[lost].kill();
    }
    cluster.nodes[1].start();
    // They know nothing of the change yet: they are told, and it is looked at again.
    let (status, answer) = recover(&cluster, 1, "1,2,6", 1);
    assert!(status == 409 && answer.contains("look again"), "{answer}");
    learn(&cluster, 6, joint);
    assert_eq!(cluster.nodes[0].status()["timelines"][0]["quorum"]["number"], joint);
    let (status, answer) = recover(&cluster, 1, "1,2", joint);
    assert!(status == 409 && answer.contains("others answer than was said"), "{answer}");
    let (status, answer) = recover(&cluster, 1, "1,2,6", joint);
    assert_eq!(status, 200, "{answer}");
    let mut after = group(&cluster, &[1, 2, 6]);
    after.sort_unstable_by_key(|member| member.node);
    let newest = decided(&cluster).chain.newest().clone();
    let mut incoming = newest.incoming().to_vec();
    incoming.sort_unstable_by_key(|member| member.node);
    // The second may have got it from the first by then.
    assert!(newest.members().len() == 1 && newest.members()[0] != member(&cluster, 6));
    assert_eq!((newest.number(), incoming), (joint + 1, after));
    change(&cluster, 1, "1,2,6");
    // Nothing depends on the one that had most any more.
    cluster.nodes[0].kill();
    let mut config = cluster.config(&parameters(START));
    config.safekeepers_to_ask = [2, 6].map(NodeId).to_vec();
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
    cluster.nodes[5].wait_lsn("flush_lsn", end, PATIENCE);
    assert!(cluster.nodes[1].read_all(first, end) == writer.bytes());
    // One that was given up comes back: it is no member, keeps what it has, and doesn't become one with it.
    cluster.nodes[2].start();
    wait_until("told", || {
        cluster.nodes[2].status()["timelines"][0]["quorum"]["number"] != joint - 1
    });
    let third = cluster.nodes[2].dir.join(parameters(START).tenant.to_string());
    assert!(third.join(parameters(START).timeline.to_string()).join("keep").exists());
    let (status, _) = ask(&cluster, 2, "2,3,6", 0);
    assert_eq!(status, 200);
    let (status, answer) = ask(&cluster, 2, "2,3,6", 0);
    assert!(answer.contains("only with a new directory"), "{status} {answer}");
    change(&cluster, 2, "2,6");
}

#[test]
fn two_commands_do_not_undo_each_other() {
    let cluster = Cluster::start(5);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(10, 1000);
    // Both were thought out from the first configuration; the first is under way, then done.
    let joint = decide(&cluster, |chain| chain.change_to(group(&cluster, &[1, 2, 4])).unwrap());
    let (status, answer) = ask(&cluster, 1, "1,2,5", 1);
    assert!(status == 409 && answer.contains("1, 2, 4 (configuration 2)"), "{status} {answer}");
    assert_eq!(steps(&cluster).len(), 2);
    // Who thinks it out again hears of it.
    let knows = |node: &common::cluster::Node| {
        node.status()["timelines"][0]["quorum"]["number"].as_u64() == Some(joint)
    };
    assert_eq!(cluster.nodes[..3].iter().filter(|node| knows(node)).count(), 1);
    change(&cluster, 1, "1,2,4");
    let (status, _) = ask(&cluster, 1, "1,2,5", 1);
    assert_eq!((status, steps(&cluster).len()), (409, 3));
    let (status, _) = ask(&cluster, 1, "1,2,4", 1);
    assert_eq!(status, 200);
    // From what is decided by now it may go on.
    let (status, _) = ask(&cluster, 1, "1,2,5", 3);
    assert_eq!((status, steps(&cluster).len()), (200, 4));
    writer.commit(10, 1000);
    proposing.stop().unwrap();
}

#[test]
fn what_is_lost_is_not_founded_anew() {
    let cluster = Cluster::start(6);
    let parameters = parameters(START);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(3, (SEGMENT_SIZE / 2) as usize);
    cluster.nodes[0].wait_lsn("archived_lsn", START + SEGMENT_SIZE, Duration::from_secs(60));
    proposing.stop().unwrap();
    let bytes = std::fs::read(object(&cluster)).unwrap();
    std::fs::remove_file(object(&cluster)).unwrap();
    let mut config = cluster.config(&parameters);
    config.safekeepers_to_ask = [4, 5, 6].map(NodeId).to_vec();
    let refused = elect(config, Duration::from_secs(3)).unwrap_err().to_string();
    assert!(
        refused.contains("quorum is gone, but") && refused.contains("put it back"),
        "{refused}"
    );
    // Who has it knows who they are, and asks nobody.
    let mut config = cluster.config(&parameters);
    config.safekeepers_to_ask = [1, 5, 6].map(NodeId).to_vec();
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
    assert!(!object(&cluster).exists());
    std::fs::write(object(&cluster), bytes).unwrap();
    let mut config = cluster.config(&parameters);
    config.safekeepers_to_ask = [4, 5, 6].map(NodeId).to_vec();
    assert_eq!(elect(config, PATIENCE).unwrap().elected().start_lsn, end);
}

#[test]
fn nothing_is_founded_with_who_has_registered_as_another() {
    let cluster = Cluster::start(3);
    let parameters = parameters(START);
    let registration = cluster.dir.path().join("objects/safekeepers/2");
    let right = std::fs::read(&registration).unwrap();
    let mut other = Registration::decode(&right, NodeId(2)).unwrap();
    other.member.incarnation = Incarnation([7; 16]);
    std::fs::write(&registration, other.encode()).unwrap();
    let refused = elect(cluster.config(&parameters), Duration::from_secs(2)).unwrap_err();
    assert!(refused.to_string().contains("has registered under its id"), "{refused}");
    std::fs::write(&registration, right).unwrap();
    cluster.elect(&parameters);
}

#[test]
fn what_was_founded_goes_on_without_object_storage() {
    let mut cluster = Cluster::start(3);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(10, 1000);
    proposing.stop().unwrap();
    let objects = cluster.dir.path().join("objects");
    let away = cluster.dir.path().join("away");
    std::fs::rename(&objects, &away).unwrap();
    // Nothing can be made in its place.
    std::fs::write(&objects, b"").unwrap();
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
    let mut other = parameters.clone();
    other.timeline.0[0] ^= 1;
    let refused = elect(cluster.config(&other), Duration::from_secs(2)).unwrap_err();
    assert!(refused.to_string().contains("can't be found out"), "{refused}");
    std::fs::remove_file(&objects).unwrap();
    std::fs::rename(&away, &objects).unwrap();
    cluster.elect(&other);
    // An object that is damaged is said to be; it takes nothing from who has read it before.
    let mut bytes = std::fs::read(object(&cluster)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(object(&cluster), bytes).unwrap();
    assert_eq!(cluster.elect(&parameters).elected().start_lsn, end);
    cluster.nodes[2].kill();
    let timeline = parameters.timeline.to_string();
    let copy = cluster.nodes[2].dir.join(parameters.tenant.to_string()).join(timeline);
    assert!(copy.exists());
    std::fs::remove_dir_all(&cluster.nodes[2].dir).unwrap();
    cluster.nodes[2].start();
    let mut client =
        SafekeeperClient::connect(&cluster.nodes[2].wal, None, None, PATIENCE).unwrap();
    let asked = client.learn(parameters.tenant, parameters.timeline, 1).unwrap_err();
    assert!(asked.to_string().contains("checksum does not match"), "{asked}");
}
