//! Round trip, golden bytes, and every kind of damage.

use proptest::prelude::*;

use super::*;

fn member(node: u64) -> Member {
    Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) }
}

fn control(term: u64, branch: bool, entries: u64) -> TimelineControl {
    let start_lsn = Lsn(16 << 20);
    let history = (0..entries)
        .map(|n| TermStart { term: Term(n + 1), lsn: start_lsn + 8 * n })
        .collect::<Vec<_>>();
    TimelineControl {
        node: NodeId(3),
        parameters: TimelineParameters {
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            system_id: SystemId(7),
            pg_version: 17,
            pg_timeline: 1,
            segment_size: 16 << 20,
            start_lsn,
            ancestor: branch.then_some(TimelineId([4; 16])),
        },
        state: ControlState {
            start_lsn,
            configuration: Configuration::new(5, vec![member(1), member(2), member(3)]).unwrap(),
            configured_in: Term(term / 2),
            term: Term(term),
            voted_for: branch.then_some(ProposerId([9; 16])),
            history: TermHistory::new(history).unwrap(),
            commit_lsn: start_lsn + 8,
        },
        flush_lsn: start_lsn + 16,
        available_lsn: start_lsn,
        archived_lsn: start_lsn,
        remote_consistent_lsn: start_lsn,
        addresses: vec![(NodeId(1), "127.0.0.1:5".into())],
    }
}

#[test]
fn golden_identity() {
    let incarnation = Incarnation([9; 16]);
    let bytes = encode_identity(NodeId(0x0102), incarnation);
    assert_eq!(bytes[..16], *b"pgsSKid\n\x03\0\0\0\x18\0\0\0");
    assert_eq!(bytes[24..32], [2, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[32..], [9; 16]);
    let expected =
        Identity { node: NodeId(0x0102), incarnation: Some(incarnation), has_list: true };
    assert_eq!(decode_identity(&bytes), Ok(expected));
    let second = Kind { version: 2, ..IDENTITY }.encode(&bytes[24..]);
    assert_eq!(decode_identity(&second), Ok(Identity { has_list: false, ..expected }));
    let first = Kind { version: 1, ..IDENTITY }.encode(&3u64.to_le_bytes());
    let expected = Identity { node: NodeId(3), incarnation: None, has_list: false };
    assert_eq!(decode_identity(&first), Ok(expected));
}

#[test]
fn golden_members() {
    let body = [&[1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0][..], &[8; 16]].concat();
    let bytes = MEMBERS.encode(&body);
    assert_eq!(bytes[..16], *b"pgsSKmem\x01\0\0\0\x1c\0\0\0");
    let members = BTreeMap::from([(NodeId(3), Incarnation([8; 16]))]);
    assert_eq!(decode_members(&bytes), Ok(members));
}

#[test]
fn golden_timelines() {
    let one = (TenantId([1; 16]), TimelineId([2; 16]));
    let timelines = BTreeSet::from([one, (TenantId([1; 16]), TimelineId([3; 16]))]);
    let bytes = encode_timelines(&timelines);
    assert_eq!(bytes[..16], *b"pgsSKtml\x01\0\0\0\x44\0\0\0");
    assert_eq!(bytes[24..44], [&[2, 0, 0, 0][..], &[1; 16]].concat());
    assert_eq!(decode_timelines(&bytes), Ok(timelines));
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        // Bytes that are kept for later mean nothing.
        assert!(decode_timelines(&broken).is_err() || (10..12).contains(&at), "byte {at}");
    }
}

/// What versions 1 and 2 wrote: members, of which there are three, by their nodes only.
fn of_nodes(version: u16, control: &TimelineControl, number: u64, incoming: &[u64]) -> Vec<u8> {
    let bytes = control.encode();
    let body = &bytes[HEADER_SIZE..];
    // The number, the term, the count, and each member in 24 bytes; then the count of the other group.
    let (before, after) = (&body[..148], &body[148 + 20 + 3 * 24 + 4..]);
    let mut body = before.to_vec();
    body.extend_from_slice(&number.to_le_bytes());
    for group in [&[1, 2, 3][..], incoming] {
        body.extend_from_slice(&(group.len() as u32).to_le_bytes());
        group.iter().for_each(|node: &u64| body.extend_from_slice(&node.to_le_bytes()));
    }
    body.extend_from_slice(after);
    Kind { version, ..CONTROL }.encode(&body)
}

#[test]
fn members_of_the_second_version_are_not_known() {
    let now = control(4, false, 2);
    let of = |number: u64, incoming: &[u64]| {
        TimelineControl::decode(&of_nodes(2, &now, number, incoming), NodeId(3))
    };
    let read = of(1, &[]).unwrap();
    let configuration = Configuration::unknown(&[NodeId(1), NodeId(2), NodeId(3)]).unwrap();
    let state = ControlState { configuration, configured_in: Term(0), ..now.state.clone() };
    assert_eq!(read, TimelineControl { state, ..now.clone() });
    assert!(of(2, &[]).is_err() && of(1, &[1, 2]).is_err());
}

#[test]
fn golden_flushed() {
    let bytes = encode_flushed(Lsn(0x0102), Lsn(0x0101));
    assert_eq!(bytes[..16], *b"pgsSKflu\x02\x01\0\0\0\0\0\0");
    assert_eq!(bytes[20..36], *b"pgsSKcom\x01\x01\0\0\0\0\0\0");
    let both = |bytes: &[u8]| (decode_flushed(bytes), decode_committed(bytes));
    assert_eq!(both(&bytes), (Some(Lsn(0x0102)), Some(Lsn(0x0101))));
    // Of an older release.
    assert_eq!(both(&bytes[..20]), (Some(Lsn(0x0102)), None));
    for at in 0..bytes.len() {
        let mut damaged = bytes;
        damaged[at] ^= 1;
        let is_first = at < 20;
        assert_eq!(decode_flushed(&damaged).is_none(), is_first);
        assert_eq!(decode_committed(&damaged).is_none(), !is_first);
        assert_eq!(decode_flushed(&bytes[..at]).is_none(), is_first);
        assert_eq!(decode_committed(&bytes[..at]), None);
    }
}

#[test]
fn each_damage_has_its_own_error() {
    let bytes = control(4, true, 2).encode();
    let decode = |bytes: &[u8]| TimelineControl::decode(bytes, NodeId(3));
    assert!(matches!(decode(&[0; 100]), Err(FormatError::Unwritten { .. })));
    assert!(matches!(decode(&[]), Err(FormatError::Unwritten { .. })));
    assert!(matches!(decode(&bytes[..10]), Err(FormatError::Torn { .. })));
    assert!(matches!(decode(&bytes[..60]), Err(FormatError::Torn { .. })));
    assert!(matches!(
        decode(&encode_identity(NodeId(3), Incarnation([1; 16]))),
        Err(FormatError::Corrupt { .. })
    ));
    let other = TimelineControl::decode(&bytes, NodeId(4));
    assert!(matches!(other, Err(FormatError::WrongOwner { .. })));
    let mut newer = bytes.clone();
    newer[8] = 4;
    let crc = crc32c::crc32c(&newer[..20]);
    newer[20..24].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(decode(&newer), Err(FormatError::NewerVersion { found: 4, .. })));
}

#[test]
fn l9_positions_of_the_first_version_are_not_believed() {
    let mut believed = control(4, false, 2);
    believed.archived_lsn = Lsn::MAX;
    believed.remote_consistent_lsn = Lsn::MAX;
    let bytes = of_nodes(1, &believed, 1, &[]);
    let read = TimelineControl::decode(&bytes, NodeId(3)).unwrap();
    assert_eq!(read.archived_lsn, read.available_lsn);
    assert_eq!(read.remote_consistent_lsn, read.state.commit_lsn);
}

proptest! {
    #[test]
    fn round_trip(term: u64, branch: bool, entries in 0u64..10) {
        let control = control(term, branch, entries);
        prop_assert_eq!(TimelineControl::decode(&control.encode(), NodeId(3)), Ok(control));
    }

    #[test]
    fn a_flipped_bit_is_found(at in 0usize..200, bit in 0u8..8) {
        let mut bytes = control(4, true, 2).encode();
        bytes[at] ^= 1 << bit;
        prop_assert!(TimelineControl::decode(&bytes, NodeId(3)).is_err());
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = TimelineControl::decode(&CONTROL.encode(&bytes), NodeId(3));
        let _ = decode_identity(&bytes);
    }
}
