//! Going on where members are lost for good: with what is archived.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::broker::{Broker, start_broker};
use common::cluster::Cluster;
use common::source::Writer;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_compute_shim::places::{Places, Said};
use pgstrata_compute_shim::proposer::{ProposerConfig, Proposing};
use pgstrata_format::quorum::Quorum;
use pgstrata_http_client::Access;
use pgstrata_ids::{Lsn, NodeId};
use pgstrata_wal_client::{SafekeeperClient, refusal_of};
use pgstrata_wire::safekeeper::RefusedReason;
use serde_json::Value;

const START: Lsn = Lsn(SEGMENT_SIZE);
const LONG: Duration = Duration::from_secs(20);

/// Safekeepers with an archive, and a broker.
fn start(count: u64, args: &[&str]) -> (Cluster, Broker) {
    let broker = start_broker();
    let args = [args, &["--broker", &broker.url]].concat();
    (Cluster::start_with(count, &args), broker)
}

fn lead(cluster: &Cluster, ids: &[u64]) -> (Writer, Proposing) {
    let asked = ids.iter().map(|&id| NodeId(id)).collect();
    cluster.lead_by(&parameters(START), true, asked)
}

/// The same for a compute as it is started: it was told of these three, and the broker says who else there is.
fn lead_by_broker(cluster: &Cluster, broker: &Broker) -> (Writer, Proposing) {
    let parameters = parameters(START);
    let three = cluster.nodes.iter().take(3);
    let said = Said {
        safekeepers: three.map(|node| (NodeId(node.id), node.wal.clone())).collect(),
        broker: Some(broker.url.clone()),
        ..Said::default()
    };
    let places = Places::start(said, &Access::Local, Some(parameters.timeline)).unwrap();
    let asked = [1, 2, 3].map(NodeId).to_vec();
    let config = ProposerConfig {
        safekeepers: places,
        safekeepers_to_ask: asked,
        ..cluster.config(&parameters)
    };
    cluster.lead_with(config, true)
}

fn lose(cluster: &mut Cluster, count: usize) {
    for node in &mut cluster.nodes[..count] {
        node.kill();
        std::fs::remove_dir_all(&node.dir).unwrap();
    }
}

fn of_timeline() -> String {
    let parameters = parameters(START);
    format!("tenant_id={}&timeline_id={}", parameters.tenant, parameters.timeline)
}

fn recover(cluster: &Cluster, by: u64, asked: &str) -> (u16, String) {
    let path = format!("/v1/recover?{}&{asked}", of_timeline());
    let (status, answer) = cluster.nodes[by as usize - 1].post(&path);
    (status, answer.to_string())
}

fn catch_up(cluster: &Cluster, by: u64) -> Value {
    let (status, answer) =
        cluster.nodes[by as usize - 1].post(&format!("/v1/catch-up?{}", of_timeline()));
    assert_eq!(status, 200, "{answer}");
    answer
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "not {what} in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many segments are archived.
fn segments(cluster: &Cluster) -> usize {
    let parameters = parameters(START);
    let of = format!("tenants/{}/timelines/{}/wal", parameters.tenant, parameters.timeline);
    let Ok(found) = std::fs::read_dir(cluster.dir.path().join("objects").join(of)) else {
        return 0;
    };
    let names = found.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".zst")).count()
}

#[test]
fn an_idle_branch_goes_on_though_all_its_members_are_lost() {
    let (mut cluster, _broker) = start(6, &["--archive-tail-after", "1"]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let end = writer.commit(20, 10_000);
    for node in &cluster.nodes[..3] {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=4,5,6");
    assert!(status == 409 && answer.contains("nothing needs to be given up"), "{answer}");
    proposing.stop().unwrap();
    for node in &mut cluster.nodes[..3] {
        node.kill();
    }
    for lost in [2, 3] {
        std::fs::remove_dir_all(&cluster.nodes[lost - 1].dir).unwrap();
    }
    assert_eq!(catch_up(&cluster, 5)["archived_lsn"], end.to_string());
    assert_eq!(catch_up(&cluster, 5)["commit_lsn"], Value::Null);
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=4");
    assert!(status == 409 && answer.contains("start more safekeepers"), "{answer}");
    let (status, answer) = recover(&cluster, 4, "survivors=1&after=0&newcomers=4,5,6");
    assert!(status == 409 && answer.contains("others answer"), "{answer}");
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=4,5,6");
    assert!(status == 200 && answer.contains("done"), "{answer}");
    for node in &cluster.nodes[3..] {
        assert_eq!(node.timeline_lsn("flush_lsn"), end);
        assert_eq!(node.timeline_lsn("commit_lsn"), end);
        assert!(node.read_all(first, end) == writer.bytes());
    }
    // It is elected, and goes on; also after everything has been started again.
    let (more, proposing) = lead(&cluster, &[4, 5, 6]);
    let next = more.commit(20, 1000);
    proposing.stop().unwrap();
    for node in &mut cluster.nodes[3..] {
        node.kill();
        node.start();
    }
    cluster.nodes[4].wait_lsn("commit_lsn", next, LONG);
    let all = cluster.nodes[4].read_all(first, next);
    assert!(all.starts_with(&writer.bytes()) && all.ends_with(&more.bytes()));
    // One that was given up comes back: it is not heard, and keeps what it has.
    cluster.nodes[0].start();
    cluster.nodes[0].post(&format!("/v1/catch-up?{}", of_timeline()));
    let (_, proposing) = lead(&cluster, &[1, 4, 5, 6]);
    assert_eq!(proposing.commit_lsn() - next, 24);
}

/// Everything was lost but full segments, the last of which ends in the middle of a record; other WAL takes its place there.
#[test]
fn what_goes_on_from_the_last_whole_record_is_archived_in_its_place() {
    let (mut cluster, _broker) = start(6, &[]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    writer.commit(250, 9_000);
    wait_until("archived", || segments(&cluster) == 2);
    drop(proposing);
    for node in &mut cluster.nodes[..3] {
        node.kill();
        std::fs::remove_dir_all(&node.dir).unwrap();
    }
    let archived: Lsn = catch_up(&cluster, 4)["archived_lsn"].as_str().unwrap().parse().unwrap();
    assert!(START + SEGMENT_SIZE < archived && archived < START + 2 * SEGMENT_SIZE, "{archived}");
    let (status, answer) = recover(&cluster, 5, "survivors=&after=0&newcomers=6,5,4");
    assert_eq!(status, 200, "{answer}");
    let (more, proposing) = lead(&cluster, &[4, 5, 6]);
    assert_eq!(proposing.commit_lsn() - archived, 24);
    let end = more.commit(250, 10_000);
    for node in &cluster.nodes[3..] {
        node.wait_lsn("archived_lsn", end.segment_start(SEGMENT_SIZE), 3 * LONG);
        assert_eq!(node.status()["timelines"][0]["archiving_error"], Value::Null);
    }
    proposing.stop().unwrap();
}

/// Those who keep nothing else get from a member what is damaged in object storage, while that one still has it.
#[test]
fn what_is_damaged_in_object_storage_comes_from_a_member() {
    let args = ["--archive-tail-after", "1", "--rest-after", "3", "--archive-only-after", "1"];
    let (mut cluster, _broker) = start(3, &args);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let end = writer.commit(10, 1000);
    for node in &cluster.nodes {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    proposing.stop().unwrap();
    cluster.nodes[2].kill();
    let parameters = parameters(START);
    let of = PathBuf::from(parameters.tenant.to_string()).join(parameters.timeline.to_string());
    let kept = |cluster: &Cluster, node: usize| {
        let names = std::fs::read_dir(cluster.nodes[node].dir.join(&of)).unwrap();
        names.filter(|name| name.as_ref().unwrap().file_name().len() == 24).count()
    };
    wait_until("away", || kept(&cluster, 0) + kept(&cluster, 1) == 0);
    assert!(kept(&cluster, 2) > 0);
    let of = format!("tenants/{}/timelines/{}/wal/tail", parameters.tenant, parameters.timeline);
    let mut tails = std::fs::read_dir(cluster.dir.path().join("objects").join(of)).unwrap();
    let tail = tails.next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&tail).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&tail, bytes).unwrap();

    cluster.nodes[2].start();
    let (more, proposing) = lead(&cluster, &[1, 2, 3]);
    let next = more.commit(10, 1000);
    for node in &cluster.nodes {
        node.wait_lsn("commit_lsn", next, LONG);
        let all = node.read_all(first, next);
        assert!(all.starts_with(&writer.bytes()) && all.ends_with(&more.bytes()));
    }
    proposing.stop().unwrap();
}

/// An object that can't be found for a moment is no reason to give up what it holds.
#[test]
fn what_is_gone_from_object_storage_for_a_moment_is_had_when_it_is_back() {
    let args = ["--archive-tail-after", "1", "--rest-after", "1", "--archive-only-after", "1"];
    let (cluster, _broker) = start(1, &args);
    let (writer, proposing) = lead(&cluster, &[1]);
    let first = proposing.commit_lsn();
    let end = writer.commit(10, 1000);
    cluster.nodes[0].wait_lsn("archived_lsn", end, LONG);
    proposing.stop().unwrap();
    let parameters = parameters(START);
    let of = PathBuf::from(parameters.tenant.to_string()).join(parameters.timeline.to_string());
    let files = cluster.nodes[0].dir.join(of);
    let has_wal = || {
        let mut names = std::fs::read_dir(&files).unwrap();
        names.any(|name| name.unwrap().file_name().len() == 24)
    };
    wait_until("away", || !has_wal());
    let of = format!("tenants/{}/timelines/{}/wal/tail", parameters.tenant, parameters.timeline);
    let tails = cluster.dir.path().join("objects").join(of);
    let hidden = tails.with_extension("hidden");
    std::fs::rename(&tails, &hidden).unwrap();
    let open = || {
        let mut client =
            SafekeeperClient::connect(&cluster.nodes[0].wal, None, None, LONG).unwrap();
        client.open(parameters.tenant, parameters.timeline)
    };
    let error = open().unwrap_err();
    assert!(matches!(refusal_of(&error), Some(RefusedReason::Unavailable(_))), "{error}");
    std::fs::rename(&hidden, &tails).unwrap();
    wait_until("had again", || open().is_ok());
    assert!(cluster.nodes[0].read_all(first, end) == writer.bytes());
}

/// Members of a branch that began anew with what is archived are lost too, and who is left of them goes on.
#[test]
fn who_is_left_of_those_who_began_anew_goes_on() {
    let (mut cluster, _broker) = start(6, &["--archive-tail-after", "1"]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(20, 10_000);
    for node in &cluster.nodes[..3] {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    proposing.stop().unwrap();
    lose(&mut cluster, 3);
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=4,5,6");
    assert_eq!(status, 200, "{answer}");
    let (more, proposing) = lead(&cluster, &[4, 5, 6]);
    let first = proposing.commit_lsn();
    let end = more.commit(20, 10_000);
    cluster.nodes[3].wait_lsn("commit_lsn", end, LONG);
    drop(proposing);
    for node in &mut cluster.nodes[4..] {
        node.kill();
        std::fs::remove_dir_all(&node.dir).unwrap();
    }
    let (status, answer) = recover(&cluster, 4, "survivors=4&after=2");
    assert_eq!(status, 200, "{answer}");
    let (last, proposing) = lead(&cluster, &[4]);
    last.commit(10, 1000);
    assert!(cluster.nodes[3].read_all(first, end) == more.bytes());
    proposing.stop().unwrap();
}

/// Who was given up has a log that others may not have, and is not one of those who begin with nothing, though it serves nothing.
#[test]
fn who_was_given_up_does_not_begin_anew_with_others() {
    let (mut cluster, _broker) = start(4, &["--archive-tail-after", "1"]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let end = writer.commit(10, 1000);
    for node in &cluster.nodes[..3] {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    proposing.stop().unwrap();
    cluster.nodes[0].kill();
    cluster.nodes[1].kill();
    let (status, answer) = recover(&cluster, 3, "survivors=3&after=1");
    assert_eq!(status, 200, "{answer}");
    for _ in 0..2 {
        // It hears of it, and is not served any more from its next start on.
        cluster.nodes[0].start();
        let open = || {
            let parameters = parameters(START);
            let wal = &cluster.nodes[0].wal;
            let mut client = SafekeeperClient::connect(wal, None, None, LONG).unwrap();
            client.open(parameters.tenant, parameters.timeline)
        };
        wait_until("known", || match open() {
            Ok(status) => status.configuration.number() == 2,
            Err(error) => matches!(refusal_of(&error), Some(RefusedReason::Storage(_))),
        });
        cluster.nodes[0].kill();
    }
    cluster.nodes[0].start();
    cluster.nodes[2].kill();
    std::fs::remove_dir_all(&cluster.nodes[2].dir).unwrap();
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=1,4");
    assert_eq!(status, 200, "{answer}");
    let parameters = parameters(START);
    let name = Quorum::object_name(parameters.tenant, parameters.timeline);
    let object = std::fs::read(cluster.dir.path().join("objects").join(name)).unwrap();
    assert_eq!(Quorum::decode(&object).unwrap().chain.newest().nodes(), [NodeId(4)]);
}

/// Those who are given up may live on, and archive what they have before they hear of it: nothing of that is believed, whether
/// or not anything was archived before.
#[test]
fn who_was_given_up_is_not_believed_though_nothing_was_archived() {
    let (mut cluster, _broker) = start(3, &["--archive-tail-after", "3600"]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let some = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", some, LONG);
    cluster.nodes[2].kill();
    writer.commit(10, 1000);
    drop(proposing);
    for node in &mut cluster.nodes[..2] {
        node.kill();
    }
    cluster.nodes[2].start();
    assert_eq!(catch_up(&cluster, 3)["archived_lsn"], Value::Null);
    let (status, answer) = recover(&cluster, 3, "survivors=3&after=1");
    assert_eq!(status, 200, "{answer}");
    let parameters = parameters(START);
    let name = Quorum::object_name(parameters.tenant, parameters.timeline);
    let object = std::fs::read(cluster.dir.path().join("objects").join(name)).unwrap();
    let given_up = Quorum::decode(&object).unwrap().given_up;
    assert!(given_up.denies(1, some + 1).is_some(), "{given_up:?}");
    assert!(given_up.denies(2, some + 1).is_none(), "{given_up:?}");
}

#[test]
fn who_is_left_has_what_is_archived_before_it_goes_on() {
    let (mut cluster, _broker) = start(3, &["--archive-tail-after", "1"]);
    let (writer, proposing) = lead(&cluster, &[1, 2, 3]);
    let first = proposing.commit_lsn();
    let some = writer.commit(10, 1000);
    cluster.nodes[2].wait_lsn("flush_lsn", some, LONG);
    // It may have more by the time that it says so after its start.
    let had = cluster.nodes[2].timeline_lsn("flush_lsn");
    cluster.nodes[2].kill();
    let end = writer.commit(300, 9_000);
    assert!(had < end);
    for node in &cluster.nodes[..2] {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    drop(proposing);
    for node in &mut cluster.nodes[..2] {
        node.kill();
        std::fs::remove_dir_all(&node.dir).unwrap();
    }
    cluster.nodes[2].start();
    // By itself, as others said what there is; or when it is told to.
    wait_until("caught up", || {
        let has = catch_up(&cluster, 3);
        assert_eq!(has["archived_lsn"], end.to_string());
        has["commit_lsn"] == end.to_string()
    });
    let (status, answer) = recover(&cluster, 3, "survivors=3&after=1");
    assert_eq!(status, 200, "{answer}");
    assert!(cluster.nodes[2].read_all(first, end) == writer.bytes());
    let (more, proposing) = lead(&cluster, &[3]);
    assert_eq!(proposing.commit_lsn() - end, 24);
    more.commit(10, 1000);
    proposing.stop().unwrap();
}

/// It knew of nobody but those who were lost, and goes on with the others, who have all that it has written.
#[test]
fn a_compute_goes_on_with_those_who_took_the_place_of_all_its_members() {
    let (mut cluster, broker) = start(6, &["--archive-tail-after", "1"]);
    let (writer, proposing) = lead_by_broker(&cluster, &broker);
    let end = writer.commit(20, 10_000);
    for node in &cluster.nodes[..3] {
        node.wait_lsn("archived_lsn", end, LONG);
    }
    lose(&mut cluster, 3);
    let (status, answer) = recover(&cluster, 4, "survivors=&after=0&newcomers=4,5,6");
    assert!(status == 200 && answer.contains("done"), "{answer}");
    let next = writer.commit(20, 1000);
    cluster.nodes[4].wait_lsn("commit_lsn", next, LONG);
    assert!(writer.bytes().ends_with(&cluster.nodes[4].read_all(end, next)));
    proposing.stop().unwrap();
    // One that is started after that was told of the lost ones only, too.
    let (more, proposing) = lead_by_broker(&cluster, &broker);
    assert_eq!(proposing.commit_lsn() - next, 24);
    more.commit(10, 1000);
    proposing.stop().unwrap();
}

/// The others go on with less than it has seen committed: it must not go on with what it has.
#[test]
fn a_compute_ends_when_those_who_took_the_place_of_its_members_have_less() {
    let (mut cluster, broker) = start(6, &[]);
    let (writer, proposing) = lead_by_broker(&cluster, &broker);
    writer.commit(250, 9_000);
    wait_until("archived", || segments(&cluster) == 2);
    lose(&mut cluster, 3);
    let (status, answer) = recover(&cluster, 5, "survivors=&after=0&newcomers=6,5,4");
    assert_eq!(status, 200, "{answer}");
    wait_until("ended", || proposing.is_finished());
    let ended = proposing.stop().unwrap_err().to_string();
    assert!(ended.contains("not the log that was written here"), "{ended}");
}
