//! Computes of the release before, which speak version 2 of the WAL protocol: they go on with what they have begun, until a compute
//! of this release has it decided who the members are.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::io::Write;
use std::net::TcpStream;

use common::cluster::Cluster;
use common::played::{PATIENCE, START, one_safekeeper, play, wait_alone};
use common::wal::parameters;
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Incarnation, Member, NodeId};
use pgstrata_quorum::{Chain, ProposerId};
use pgstrata_sim::conversation::{Side, read};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason, WAL, decode, encode, version2};

const COMPUTE: &str = include_str!("recorded/2-compute.txt");
const READER: &str = include_str!("recorded/2-reader.txt");
const REFUSED: &str = include_str!("recorded/2-refused.txt");
const CONTROL: &str = include_str!("recorded/2-control.txt");

/// A safekeeper that has the timeline, as the release before has left it.
fn upgraded() -> Cluster {
    let mut cluster = one_safekeeper();
    let node = &mut cluster.nodes[0];
    node.kill();
    let parameters = parameters(START);
    let of = node.dir.join(parameters.tenant.to_string());
    let of = of.join(parameters.timeline.to_string());
    std::fs::create_dir_all(&of).unwrap();
    let control = read(CONTROL).unwrap().pop().unwrap().1;
    std::fs::write(of.join("control"), control).unwrap();
    node.start();
    cluster
}

/// Why what is said next is refused, in the form that version 2 has.
fn refused(stream: &mut TcpStream, said: &[u8]) -> RefusedReason {
    stream.write_all(said).unwrap();
    let mut input = FrameBuffer::new(1 << 16);
    loop {
        if let Some(frame) = input.next().unwrap() {
            assert_eq!(frame.version, version2::VERSION);
            match decode(frame.kind, frame.body).unwrap() {
                Message::Refused(reason) => return reason,
                other => panic!("{other:?}"),
            }
        }
        assert!(input.fill(stream).unwrap(), "it was closed without a word");
    }
}

fn connect(cluster: &Cluster) -> TcpStream {
    let stream = TcpStream::connect(&cluster.nodes[0].wal).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A compute that has led up to where it only asks whether the safekeeper is there. Also how it greeted, and how it asks.
fn begun(cluster: &Cluster) -> (TcpStream, Vec<u8>, Vec<u8>) {
    let mut turns = read(COMPUTE).unwrap();
    let end = turns.split_off(turns.len() - 2);
    assert_eq!((turns[0].0, end[0].0), (Side::Client, Side::Client));
    let stream = play(&cluster.nodes[0].wal, &turns);
    (stream, turns[0].1.clone(), end[0].1.clone())
}

/// Has the timeline founded, as a compute of this release does before it asks for votes.
fn found(cluster: &Cluster) {
    let mut newer = connect(cluster);
    let (parameters, proposer) = (parameters(START), ProposerId([7; 16]));
    let greeting = Greeting { parameters, known: 0, addresses: Vec::new(), proposer };
    let first = Message::Found(vec![(NodeId(1), Some(Incarnation([0xAB; 16])))]);
    let stamps = [Stamp::First(WAL.speaks), Stamp::In(WAL.speaks.highest())];
    let mut input = FrameBuffer::new(1 << 16);
    for (said, stamp) in [Message::Greeting(greeting), first].iter().zip(stamps) {
        let mut bytes = Vec::new();
        encode(said, stamp, &mut bytes);
        newer.write_all(&bytes).unwrap();
        while input.next().unwrap().is_none() {
            assert!(input.fill(&mut newer).unwrap(), "it was closed without a word");
        }
        let frame = input.next().unwrap().unwrap();
        let Message::GreetingReply(reply) = decode(frame.kind, frame.body).unwrap() else {
            panic!("kind {}", frame.kind)
        };
        let known = reply.configuration.unwrap().is_known();
        assert_eq!(known, matches!(said, Message::Found(_)));
        let size = frame.size;
        input.consume(size);
    }
}

#[test]
fn it_is_answered_as_it_was_by_the_release_before() {
    let cluster = upgraded();
    play(&cluster.nodes[0].wal, &read(COMPUTE).unwrap());
    wait_alone(&cluster.nodes[0].wal);
    for conversation in [READER, REFUSED] {
        play(&cluster.nodes[0].wal, &read(conversation).unwrap());
    }
}

#[test]
fn it_is_refused_once_it_is_decided_who_the_members_are() {
    let cluster = upgraded();
    let (mut stream, greeting, ping) = begun(&cluster);
    // All that it has acknowledged is there for the compute that comes after it.
    let had = cluster.nodes[0].timeline_lsn("flush_lsn");
    assert!(had > START);
    let (writer, proposing) = cluster.lead(&parameters(START), true);
    assert_eq!(proposing.commit_lsn() - had, 24);
    let reason = refused(&mut stream, &ping);
    let RefusedReason::Quorum(fenced) = &reason else { panic!("{reason}") };
    assert!(fenced.to_string().contains("term"), "{fenced}");
    let reason = refused(&mut connect(&cluster), &greeting);
    assert!(reason.to_string().contains("upgrade the compute"), "{reason}");
    writer.commit(3, 100);
    proposing.stop().unwrap();
}

/// Founded by somebody who was not elected then: the older one was promised nothing less, and has to go all the same, since it would
/// not hear of other members.
#[test]
fn it_is_refused_also_by_whom_nobody_newer_has_asked_for_a_vote() {
    let cluster = upgraded();
    let (mut stream, _, ping) = begun(&cluster);
    found(&cluster);
    let reason = refused(&mut stream, &ping);
    assert!(reason.to_string().contains("upgrade the compute"), "{reason}");
}

#[test]
fn it_begins_nothing() {
    let cluster = one_safekeeper();
    let greeting = read(COMPUTE).unwrap().swap_remove(0).1;
    let reason = refused(&mut connect(&cluster), &greeting);
    assert!(reason.to_string().contains("upgrade the compute first"), "{reason}");
    let status = cluster.nodes[0].status();
    assert!(status["timelines"].as_array().unwrap().is_empty(), "{status}");
}

/// It was founded with others, by whoever was told nothing of these: neither those who come nor who is there may go on beside them.
#[test]
fn it_is_refused_also_where_others_are_the_members() {
    let cluster = upgraded();
    let (mut stream, greeting, ping) = begun(&cluster);
    let parameters = parameters(START);
    let name = Quorum::object_name(parameters.tenant, parameters.timeline);
    let other = Member { node: NodeId(4), incarnation: Incarnation([4; 16]) };
    let founded = Quorum::founded(parameters, Chain::found(vec![other]).unwrap());
    let path = cluster.dir.path().join("objects").join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, founded.encode()).unwrap();
    let reason = refused(&mut connect(&cluster), &greeting).to_string();
    assert!(reason.contains("other members"), "{reason}");
    let reason = refused(&mut stream, &ping);
    assert!(reason.to_string().contains("upgrade the compute"), "{reason}");
}
