//! Round trips of every message, and any bytes at all.

use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, SystemId, TenantId, Term, TimelineId, TimelineParameters,
};
use pgstrata_quorum::{
    Ack, Append, Configuration, Elected, ProposerId, Refusal, TermHistory, TermStart, Vote,
    VoteRequest,
};
use proptest::prelude::*;

use super::*;
use crate::field::DecodeError;
use crate::frame::{self, Stamp};

/// In every version that is spoken a message says the same: none leaves out what another has.
fn round_trip(message: Message<'_>) {
    for version in WAL.speaks.all() {
        let mut bytes = vec![0xAA];
        encode(&message, Stamp::In(version), &mut bytes);
        let frame = frame::split(&bytes[1..]).unwrap().unwrap();
        assert_eq!((frame.size, frame.version), (bytes.len() - 1, version));
        assert_eq!(decode(frame.kind, frame.body).as_ref(), Ok(&message));
    }
}

fn stamp() -> Stamp {
    Stamp::In(WAL.speaks.highest())
}

fn history() -> impl Strategy<Value = TermHistory> {
    prop::collection::vec((1u64..100, 1u64..1000), 0..5).prop_map(|steps| {
        let (mut term, mut lsn) = (0, 0);
        let entries = steps.into_iter().map(|(term_step, bytes)| {
            term += term_step;
            lsn += bytes;
            TermStart { term: Term(term), lsn: Lsn(lsn) }
        });
        TermHistory::new(entries.collect()).unwrap()
    })
}

fn configuration() -> impl Strategy<Value = Configuration> {
    (any::<u64>(), 1u64..6, 0u64..6).prop_map(|(number, members, incoming)| {
        let member =
            |node: u64| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) };
        let group = |first: u64, count: u64| (first..first + count).map(member).collect();
        Configuration::joint(number, group(1, members), group(3, incoming)).unwrap()
    })
}

fn parameters() -> impl Strategy<Value = TimelineParameters> {
    (any::<[u8; 16]>(), any::<u64>(), 15u32..19, 20u32..31, 1u64..1000, any::<bool>()).prop_map(
        |(id, system, pg_version, size, segment, branch)| TimelineParameters {
            tenant: TenantId(id),
            timeline: TimelineId(id),
            system_id: SystemId(system),
            pg_version,
            pg_timeline: 1,
            segment_size: 1 << size,
            start_lsn: Lsn(segment << size),
            ancestor: branch.then_some(TimelineId([7; 16])),
        },
    )
}

proptest! {
    #[test]
    fn proposers_messages(
        parameters in parameters(),
        configuration in configuration(),
        history in history(),
        id: [u8; 16],
        numbers: [u64; 4],
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let [term, start, record_end, commit] = numbers;
        let proposer = ProposerId(id);
        round_trip(Message::Greeting(Greeting {
            parameters,
            known: start,
            addresses: vec![(NodeId(term), "127.0.0.1:5454".into())],
            proposer,
        }));
        let term = Term(term);
        round_trip(Message::VoteRequest(VoteRequest { term, proposer, configuration }));
        round_trip(Message::Elected(Elected { term, history }));
        let append = Append {
            term,
            start: Lsn(start),
            length: payload.len() as u64,
            record_end: Lsn(record_end),
            commit_lsn: Lsn(commit),
        };
        round_trip(Message::Append(append, &payload));
        let head = AppendHead::new(&append, &payload);
        for version in WAL.speaks.all() {
            let mut whole = Vec::new();
            encode(&Message::Append(append, &payload), Stamp::In(version), &mut whole);
            prop_assert_eq!(whole, [&head.in_version(version).0[..], &payload].concat());
        }
        round_trip(Message::Ping);
        round_trip(Message::Open(TenantId(id), TimelineId(id)));
        round_trip(Message::ReadWal(Lsn(start), Lsn(commit), term));
        round_trip(Message::LastRecord(Lsn(start)));
    }

    #[test]
    fn safekeepers_messages(
        parameters in parameters(),
        configuration in configuration(),
        history in history(),
        numbers: [u64; 5],
        granted: bool,
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let [node, term, flush, commit, other] = numbers;
        let (node, term, flush_lsn, commit_lsn) =
            (NodeId(node), Term(term), Lsn(flush), Lsn(commit));
        let incarnation = Incarnation([7; 16]);
        round_trip(Message::Learn(parameters.tenant, parameters.timeline, other));
        round_trip(Message::Configuration(configuration.clone(), vec![(node, "h:1".into())]));
        round_trip(Message::Found(vec![(node, Some(incarnation)), (NodeId(other), None)]));
        for configuration in [None, Some(configuration.clone())] {
            round_trip(Message::GreetingReply(GreetingReply {
                node, incarnation, configuration, addresses: vec![(node, "h:1".into())], term, flush_lsn,
                commit_lsn,
            }));
        }
        let member = Member { node, incarnation };
        let asked = Term(other);
        let vote = Vote { asked, granted, term, flush_lsn, commit_lsn, history: history.clone() };
        round_trip(Message::Vote(vote));
        round_trip(Message::Ack(Ack { term, flush_lsn, commit_lsn }));
        let available_lsn = Lsn(other);
        round_trip(Message::Status(Status {
            member, parameters, configuration, configured_in: Term(other), has_proposer: granted, term,
            available_lsn, flush_lsn, commit_lsn, history,
        }));
        round_trip(Message::WalChunk(flush_lsn, &payload));
        round_trip(Message::LastRecordReply(flush_lsn));
        for refusal in [
            Refusal::Fenced { promised: term },
            Refusal::StaleConfiguration { current: other },
            Refusal::NotMember,
            Refusal::TermTooFar { asked: Term(other), promised: term },
            Refusal::OtherMembers { number: other },
            Refusal::Undecided { number: other, current: flush },
            Refusal::CommittedDiffers { divergence: flush_lsn, commit_lsn },
        ] {
            round_trip(Message::Refused(RefusedReason::Quorum(refusal)));
        }
        round_trip(Message::Refused(RefusedReason::UnknownTimeline));
        for reason in [
            RefusedReason::Mismatch,
            RefusedReason::Storage,
            RefusedReason::Unavailable,
            RefusedReason::InvalidWal,
            RefusedReason::Forbidden,
            RefusedReason::Version,
        ] {
            round_trip(Message::Refused(reason("because".into())));
        }
    }

    #[test]
    fn any_body_is_survived(kind: u8, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(kind % 80, &body);
    }

    #[test]
    fn a_cut_body_is_refused(history in history(), term: u64) {
        let mut bytes = Vec::new();
        encode(&Message::Elected(Elected { term: Term(term), history }), stamp(), &mut bytes);
        let body = &bytes[frame::HEADER_SIZE..];
        for end in 0..body.len() {
            prop_assert!(decode(3, &body[..end]).is_err());
        }
        prop_assert!(decode(3, &[body, &[0]].concat()).is_err());
    }
}

/// What no recording has: it is said when members change.
#[test]
fn golden_configuration() {
    let member =
        |node: u64| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) };
    let joint = Configuration::joint(2, vec![member(1)], vec![member(3)]).unwrap();
    let mut bytes = Vec::new();
    encode(&Message::Configuration(joint, vec![(NodeId(3), "h:1".into())]), stamp(), &mut bytes);
    let number = |value: u64| value.to_le_bytes().to_vec();
    let count = |value: u32| value.to_le_bytes().to_vec();
    let body = [
        number(2),
        count(1),
        number(1),
        vec![1; 16],
        count(1),
        number(3),
        vec![3; 16],
        count(1),
        number(3),
        vec![3, 0],
        b"h:1".to_vec(),
    ];
    assert_eq!((bytes[0], &bytes[16..]), (72, &body.concat()[..]));
}

#[test]
fn golden_ack() {
    let mut bytes = Vec::new();
    let ack = Ack { term: Term(3), flush_lsn: Lsn(0x0102), commit_lsn: Lsn(0x01) };
    encode(&Message::Ack(ack), Stamp::In(Version(2)), &mut bytes);
    assert_eq!(bytes[..8], [67, 2, 0, 0, 24, 0, 0, 0]);
    let body = [3, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes[frame::HEADER_SIZE..], body);
}

#[test]
fn a_client_takes_the_version_that_it_is_answered_in_once() {
    let answer = |version| {
        let mut bytes = Vec::new();
        let refused = Message::Refused(RefusedReason::UnknownTimeline);
        encode(&refused, Stamp::In(version), &mut bytes);
        let mut input = FrameBuffer::new(1000);
        assert_eq!(chosen(&mut input), Ok(None), "nothing has come");
        assert!(input.fill(&mut &bytes[..]).unwrap());
        (chosen(&mut input), input)
    };
    let highest = WAL.speaks.highest();
    let (found, mut input) = answer(highest);
    assert_eq!(found, Ok(Some(highest)));
    assert_eq!((chosen(&mut input), input.agreed()), (Ok(None), Some(highest)));
    let (found, input) = answer(Version(highest.0 + 1));
    assert!(matches!(found, Err(AnswerError::Version(VersionError::NotOffered { .. }))));
    assert_eq!(input.agreed(), None);
}

/// A greeting and a vote request as version 2 has them are read; what it never said is not.
#[test]
fn version_2_is_read() {
    let of_nodes = |number: u64, nodes: &[u64], incoming: &[u64], out: &mut Vec<u8>| {
        out.extend_from_slice(&number.to_le_bytes());
        for group in [nodes, incoming] {
            out.extend_from_slice(&(group.len() as u32).to_le_bytes());
            group.iter().for_each(|node| out.extend_from_slice(&node.to_le_bytes()));
        }
    };
    let vote = |number: u64, nodes: &[u64], incoming: &[u64]| {
        let mut body = 7u64.to_le_bytes().to_vec();
        body.extend_from_slice(&[9; 16]);
        of_nodes(number, nodes, incoming, &mut body);
        body
    };
    let read = |body: &[u8]| match version2::decode(2, body) {
        Ok(version2::Said::VoteRequest(request)) => Some(request),
        _ => None,
    };
    let (term, proposer) = (Term(7), ProposerId([9; 16]));
    let nodes = [1, 2, 3].map(NodeId).to_vec();
    let request = version2::VoteRequest { term, proposer, nodes };
    assert_eq!(read(&vote(1, &[1, 2, 3], &[])), Some(request));
    for (number, nodes, incoming) in
        [(2, &[1, 2, 3][..], &[][..]), (1, &[1, 2, 3], &[4]), (1, &[1, 1], &[]), (1, &[], &[])]
    {
        assert_eq!(read(&vote(number, nodes, incoming)), None);
    }
    for kind in [10, 11, 65, 72] {
        assert!(matches!(version2::decode(kind, &[]), Err(DecodeError::Kind(_))));
    }
}

proptest! {
    #[test]
    fn any_bytes_of_version_2_are_survived(kind in 0u8..75, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = version2::decode(kind, &bytes);
    }
}
