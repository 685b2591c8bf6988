//! Round trip, golden bytes, and every kind of damage.

use proptest::prelude::*;

use super::*;

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
            configuration: Configuration::new(5, vec![NodeId(1), NodeId(2), NodeId(3)]).unwrap(),
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
    assert_eq!(bytes[..16], *b"pgsSKid\n\x02\0\0\0\x18\0\0\0");
    assert_eq!(bytes[24..32], [2, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[32..], [9; 16]);
    assert_eq!(decode_identity(&bytes), Ok((NodeId(0x0102), Some(incarnation))));
    let first = Kind { version: 1, ..IDENTITY }.encode(&3u64.to_le_bytes());
    assert_eq!(decode_identity(&first), Ok((NodeId(3), None)));
}

#[test]
fn golden_members() {
    let members = BTreeMap::from([(NodeId(3), Incarnation([8; 16]))]);
    let bytes = encode_members(&members);
    assert_eq!(bytes[..16], *b"pgsSKmem\x01\0\0\0\x1c\0\0\0");
    assert_eq!(bytes[24..36], [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(decode_members(&bytes), Ok(members));
}

#[test]
fn golden_flushed() {
    let bytes = encode_flushed(Lsn(0x0102));
    assert_eq!(bytes[..16], *b"pgsSKflu\x02\x01\0\0\0\0\0\0");
    assert_eq!(decode_flushed(&bytes), Some(Lsn(0x0102)));
    for at in 0..bytes.len() {
        let mut damaged = bytes;
        damaged[at] ^= 1;
        assert_eq!(decode_flushed(&damaged), None);
        assert_eq!(decode_flushed(&bytes[..at]), None);
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
    newer[8] = 3;
    let crc = crc32c::crc32c(&newer[..20]);
    newer[20..24].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(decode(&newer), Err(FormatError::NewerVersion { found: 3, .. })));
}

#[test]
fn l9_positions_of_the_first_version_are_not_believed() {
    let mut believed = control(4, false, 2);
    believed.archived_lsn = Lsn::MAX;
    believed.remote_consistent_lsn = Lsn::MAX;
    let mut bytes = believed.encode();
    bytes[8] = 1;
    let crc = crc32c::crc32c(&bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
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
