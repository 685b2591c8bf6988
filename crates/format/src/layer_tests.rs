use super::*;
use pgstrata_ids::{Fork, RelTag};
use proptest::prelude::*;

fn header() -> LayerHeader {
    LayerHeader {
        kind: LayerKind::Delta,
        tenant: TenantId([1; 16]),
        timeline: TimelineId([2; 16]),
        generation: Generation(3),
        start_lsn: Lsn(100),
        end_lsn: Lsn(5000),
        min_key: Key::MAX,
        max_key: Key::MIN,
    }
}

fn key(block: u32) -> Key {
    Key::rel_block(RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main }, block)
}

fn read_all(file: &[u8]) -> Result<Vec<(Key, Lsn, Vec<u8>)>, FormatError> {
    let (_, _, index) = verify(file)?;
    let mut all = Vec::new();
    for handle in index {
        let start = handle.offset as usize;
        let block = decode_block(&file[start..start + handle.length as usize])?;
        for entry in entries(&block) {
            let entry = entry?;
            all.push((entry.key, entry.lsn, block[entry.value].to_vec()));
        }
    }
    Ok(all)
}

fn sample(entries: &[(Key, Lsn, Vec<u8>)]) -> Vec<u8> {
    packed(entries, Codec::small())
}

fn packed(entries: &[(Key, Lsn, Vec<u8>)], codec: Codec) -> Vec<u8> {
    let mut writer = LayerWriter::new(header(), codec);
    for (key, lsn, value) in entries {
        writer.push(*key, *lsn, value);
    }
    writer.finish().1
}

proptest! {
    #[test]
    fn entries_round_trip(mut input in prop::collection::vec(
        (0..50u32, 0..5000u64, prop::collection::vec(any::<u8>(), 0..3000)), 0..100))
    {
        input.sort();
        let input: Vec<_> =
            input.into_iter().map(|(block, lsn, value)| (key(block), Lsn(lsn), value)).collect();
        prop_assert_eq!(&read_all(&sample(&input)).unwrap(), &input);
        prop_assert_eq!(&read_all(&packed(&input, Codec::Lz4)).unwrap(), &input);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = verify(&bytes);
        let _ = decode_block(&bytes);
        entries(&bytes).for_each(drop);
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let input: Vec<_> = (0..20).map(|n| (key(n), Lsn(u64::from(n)), vec![n as u8; 60])).collect();
    let file = sample(&input);
    for byte in 0..file.len() {
        let mut broken = file.clone();
        broken[byte] ^= 0x10;
        assert!(verify(&broken).is_err(), "byte {byte} of {}", file.len());
    }
}

#[test]
fn every_cut_is_found() {
    let file = sample(&[(key(1), Lsn(2), vec![3; 10])]);
    for length in 0..file.len() {
        assert!(verify(&file[..length]).is_err(), "{length}");
    }
    assert_eq!(verify(&[]).unwrap_err(), FormatError::Unwritten { what: WHAT });
}

#[test]
fn newer_version_is_named() {
    let mut file = sample(&[(key(1), Lsn(2), vec![3; 10])]);
    file[8] = 9;
    assert!(matches!(
        verify(&file).unwrap_err(),
        FormatError::NewerVersion { found: 9, known: 1, .. }
    ));
}

#[test]
fn header_bytes_are_pinned() {
    // Changing these bytes breaks every layer ever written: bump VERSION instead.
    let (header, file) = {
        let mut writer = LayerWriter::new(header(), Codec::Lz4);
        writer.push(key(7), Lsn(200), b"v");
        writer.finish()
    };
    assert_eq!(header.min_key, key(7));
    assert_eq!(header.max_key, key(7));
    assert_eq!(&file[..16], b"PGSLAYER\x01\x00\x01\0\0\0\0\0");
    assert_eq!(file[56..64], 100u64.to_le_bytes());
    assert_eq!(LayerHeader::decode(&file).unwrap(), header);
}
