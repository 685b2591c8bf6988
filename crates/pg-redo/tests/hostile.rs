//! No record and no stored value, however wrong, makes redo panic; and a seeded fault never passes the checker.
#![allow(clippy::expect_used)]

mod support;

use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{
    Checker, ControlState, Effect, Effects, MemoryStore, Page, apply_block, apply_slru, compare,
    is_complete, page, pd_checksum, set_checksum,
};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record};
use proptest::prelude::*;
use support::{Block, control, record_bytes};

/// Small numbers are what offsets and counts look like, so they get furthest.
fn data(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![3 => 0u8..4, 2 => 0u8..40, 1 => any::<u8>()], 0..longest)
}

fn block() -> impl Strategy<Value = Block> {
    let number = prop_oneof![0u32..4, any::<u32>()];
    let fork = prop_oneof![4 => Just(0u8), 1 => 0u8..4];
    (number, fork, any::<bool>(), data(120)).prop_map(|(number, fork, init, data)| Block {
        id: 0,
        number,
        fork,
        init,
        data,
        image: None,
    })
}

/// Mostly small bytes.
fn noise(seed: u64) -> Box<Page> {
    let mut state = seed | 1;
    let mut page = Box::new([0u8; PAGE_SIZE]);
    for byte in page.iter_mut() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = if state & 0x300 == 0 { state as u8 } else { state as u8 & 7 };
    }
    page
}

/// A page that looks sane enough for redo to go on: header, line pointers, tuples of small numbers, special space.
fn some_page() -> impl Strategy<Value = Box<Page>> {
    let special = prop_oneof![Just(0u16), Just(8), Just(16)];
    (special, 0u16..12, any::<u64>(), 8u16..120, prop::bool::weighted(0.9)).prop_map(
        |(special, lines, seed, length, sane)| {
            let mut page = noise(seed);
            if !sane {
                return page;
            }
            let step = length.next_multiple_of(8);
            let end = PAGE_SIZE as u16 - special;
            let upper = end - lines * step;
            page[..24].fill(0);
            for (at, value) in [(12, 24 + lines * 4), (14, upper), (16, end), (18, 0x2004)] {
                page[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            for line in 0..lines {
                let word = u32::from(upper + line * step) | 1 << 15 | u32::from(length) << 17;
                let at = 24 + usize::from(line) * 4;
                page[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            page
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_record_panics(
        version in prop::sample::select(&PgVersion::ALL[..]),
        rmgr in 0u8..22,
        info in (0u8..16).prop_map(|info| info << 4),
        mut blocks in prop::collection::vec(block(), 0..6),
        main in data(160),
        base in some_page(),
    ) {
        for (id, block) in blocks.iter_mut().enumerate() {
            block.id = id as u8;
        }
        let bytes = record_bytes(rmgr, info, &blocks, &main);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1_0000_2000), bytes: &bytes };
        let decoded = DecodedRecord::decode(record)?;
        let mut effects = Effects::new();
        let mut state = control(version);
        if effects.derive(&decoded, &mut state).is_err() {
            return Ok(());
        }
        for effect in &effects.items {
            match *effect {
                Effect::Block { block, value, complete, .. } => {
                    let value = effects.value(value);
                    prop_assert_eq!(is_complete(value), complete);
                    for mut page in [*base, [0; PAGE_SIZE]] {
                        let _ = apply_block(&mut page, value, block, record.end);
                    }
                }
                Effect::SlruPage { value, .. } => {
                    let applied = apply_slru(&mut base.clone(), effects.value(value), record.end);
                    prop_assert!(applied.is_ok());
                }
                _ => {}
            }
        }
    }

    #[test]
    fn no_value_panics(value in data(300), block: u32, base in some_page()) {
        let mut page = *base;
        let _ = apply_block(&mut page, &value, block, Lsn(0x1_0000_2000));
        let _ = apply_slru(&mut page, &value, Lsn(8));
        let _ = ControlState::decode(&value);
    }

    #[test]
    fn stored_state_round_trips(next_xid: u64, next_multi: u32, offset: u32, wal_log_hints: bool) {
        let mut state = control(PgVersion::V17);
        state.next_xid = next_xid;
        state.next_multi = next_multi;
        state.next_multi_offset = offset;
        state.control.wal_log_hints = wal_log_hints;
        let decoded = ControlState::decode(&state.encode());
        prop_assert_eq!(decoded, Ok(state));
        let mut other = control(PgVersion::V17);
        other.control.wal_log_hints = wal_log_hints;
        prop_assert_eq!(other.apply_counters(&state.encode_counters()), Ok(()));
        prop_assert_eq!(other, state);
    }
}

/// An insert of a tuple on an empty page, with the image of the page after it.
fn insert_record(image: Page) -> Vec<u8> {
    let data = [1, 0, 2, 8, 24, 0, 7, 7, 7, 7];
    let block =
        Block { id: 0, number: 3, fork: 0, init: true, data: data.to_vec(), image: Some(image) };
    record_bytes(10, 0x80, &[block], &[1, 0, 0])
}

fn inserted_page() -> Page {
    let bytes = insert_record([0; PAGE_SIZE]);
    let record = Record { lsn: Lsn(0x1000), end: Lsn(0x2000), bytes: &bytes };
    let decoded = DecodedRecord::decode(record).expect("well formed");
    let mut effects = Effects::new();
    effects.derive(&decoded, &mut control(PgVersion::V15)).expect("known");
    let mut page = [0; PAGE_SIZE];
    for effect in &effects.items {
        if let Effect::Block { value, block, .. } = *effect {
            apply_block(&mut page, effects.value(value), block, record.end).expect("applies");
        }
    }
    page
}

#[test]
fn an_inserted_tuple_is_where_postgresql_puts_it() {
    let page = inserted_page();
    assert_eq!(page::lsn(&page), Lsn(0x2000));
    // 28 bytes of tuple, aligned to 32, at the end; xmin 700; ctid (3,1); hoff 24.
    assert_eq!(&page[24..28], &(8160u32 | 1 << 15 | 28 << 17).to_le_bytes());
    assert_eq!(&page[8160..8164], &700u32.to_le_bytes());
    assert_eq!(&page[8172..8178], &[0, 0, 3, 0, 1, 0]);
    assert_eq!(&page[8182..8188], &[24, 0, 7, 7, 7, 7]);
}

/// Bytes that PostgreSQL's mask of heap pages hides on that page.
fn is_masked(at: usize) -> bool {
    let header = at < 10 || (20..24).contains(&at);
    let hole = (28..8160).contains(&at);
    let command_id_or_hints = (8168..8172).contains(&at) || (8180..8182).contains(&at);
    header || hole || command_id_or_hints || at >= 8188
}

#[test]
fn no_seeded_fault_passes_the_checker() {
    let good = inserted_page();
    let check = |image: Page| {
        let bytes = insert_record(image);
        let mut checker = Checker::new(MemoryStore::default(), control(PgVersion::V15), true);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x2000), bytes: &bytes };
        checker.feed(record).expect("replays");
        let report = checker.report();
        assert_eq!(report.compared, 1);
        report.mismatches
    };
    assert_eq!(check(good), 0);
    for at in (0..PAGE_SIZE).filter(|at| !is_masked(*at)) {
        let mut image = good;
        image[at] ^= 0x40;
        assert_eq!(check(image), 1, "a wrong byte at {at}");
    }
}

#[test]
fn differences_are_told_by_field() {
    let good = inserted_page();
    let mut wrong = good;
    wrong[8164] = 9;
    let text = compare(10, &good, &wrong).expect("they differ");
    assert_eq!(text, "line pointer 1: t_xmax is 0x00000009, expected 0x00000000");
    assert_eq!(compare(10, &good, &good), None);
}

#[test]
fn checksums_depend_on_everything_but_themselves() {
    let mut page = inserted_page();
    let checksum = pd_checksum(&page, 3);
    set_checksum(&mut page, 3);
    assert_eq!(pd_checksum(&page, 3), checksum);
    assert_ne!(pd_checksum(&page, 4), checksum);
    page[8191] ^= 1;
    assert_ne!(pd_checksum(&page, 3), checksum);
    let mut new = [0; PAGE_SIZE];
    set_checksum(&mut new, 3);
    assert_eq!(new, [0; PAGE_SIZE]);
}
