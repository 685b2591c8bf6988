//! Which visibility bits a heap change clears: implied by flags in older minor versions, by references to the map's
//! blocks from 17.11 and 18.6 on. The form of the record decides.
#![allow(clippy::expect_used)]

mod support;

use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{Effect, Effects, apply_block, page};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record};
use std::collections::BTreeMap;
use support::{Block, control, record_bytes};

const HEAP: u8 = 10;
const HEAP2: u8 = 9;
const INSERT: u8 = 0x00;
const UPDATE: u8 = 0x20;
const HOT_UPDATE: u8 = 0x40;
const LOCK: u8 = 0x60;
/// Heap blocks per map page.
const PER_PAGE: u32 = 32_672;
const END: Lsn = Lsn(0x2000);

fn heap(id: u8, number: u32) -> Block {
    Block { id, number, fork: 0, init: false, data: vec![1], image: None }
}

fn map(id: u8, number: u32) -> Block {
    Block { id, number, fork: 2, init: false, data: Vec::new(), image: None }
}

/// `xl_heap_update` with these flags.
fn update(flags: u8) -> Vec<u8> {
    vec![0, 0, 0, 0, 1, 0, 0, flags, 0, 0, 0, 0, 2, 0]
}

/// What is left of full maps after a record: the bits of the given heap blocks, and the map pages' LSNs.
fn after(
    (rmgr, info): (u8, u8),
    blocks: &[Block],
    main: &[u8],
    heap_blocks: &[u32],
) -> (Vec<u8>, BTreeMap<u32, Lsn>) {
    let bytes = record_bytes(rmgr, info, blocks, main);
    let record = Record { lsn: Lsn(0x1000), end: END, bytes: &bytes };
    let decoded = DecodedRecord::decode(record).expect("well formed");
    let mut effects = Effects::new();
    effects.derive(&decoded, &mut control(PgVersion::V17)).expect("known");
    let mut full = [0xFF; PAGE_SIZE];
    full[..24].fill(0);
    full[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
    let mut maps: BTreeMap<u32, _> = [(0, full), (1, full)].into();
    let mut touched = BTreeMap::new();
    let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Visibility };
    for effect in &effects.items {
        let Effect::Block { rel: found, block, value, extends, .. } = *effect else { continue };
        if found != rel {
            continue;
        }
        assert!(extends);
        let page = maps.get_mut(&block).expect("a map page");
        apply_block(page, effects.value(value), block, END).expect("applies");
        assert_eq!(touched.insert(block, page::lsn(page)), None, "one value per block");
    }
    let bits = |heap_block: &u32| {
        let index = heap_block % PER_PAGE;
        let byte = maps[&(heap_block / PER_PAGE)][24 + (index / 4) as usize];
        byte >> (index % 4 * 2) & 3
    };
    (heap_blocks.iter().map(bits).collect(), touched)
}

#[test]
fn implied_clears_leave_the_map_page_lsn() {
    let (bits, lsns) = after((HEAP, INSERT), &[heap(0, 6)], &[1, 0, 1], &[5, 6, 7]);
    assert_eq!(bits, [3, 0, 3]);
    assert_eq!(lsns, [(0, Lsn(0))].into());
    let (bits, lsns) = after((HEAP, INSERT), &[heap(0, 6)], &[1, 0, 0], &[6]);
    assert_eq!((bits, lsns), (vec![3], BTreeMap::new()), "no flag, no clear");
}

#[test]
fn a_referenced_map_page_is_changed_as_a_block() {
    let blocks = [heap(0, PER_PAGE + 6), map(1, 1)];
    let (bits, lsns) = after((HEAP, INSERT), &blocks, &[1, 0, 1], &[PER_PAGE + 6, 6]);
    assert_eq!(bits, [0, 3]);
    assert_eq!(lsns, [(1, END)].into());
}

#[test]
fn locks_clear_all_frozen_only() {
    let main = [0, 0, 0, 0, 1, 0, 0, 1];
    assert_eq!(after((HEAP, LOCK), &[heap(0, 6)], &main, &[6]).0, [1]);
    assert_eq!(after((HEAP, LOCK), &[heap(0, 6), map(1, 0)], &main, &[6]).0, [1]);
    assert_eq!(after((HEAP2, 0x60), &[heap(0, 6)], &main, &[6, 7]).0, [1, 3]);
}

#[test]
fn updates_clear_both_blocks_as_flags_imply() {
    let far = PER_PAGE + 1;
    let cases = [(0, [3, 3], 0), (1, [0, 3], 1), (2, [3, 0], 1), (3, [0, 0], 1)];
    for (flags, expected, pages) in cases {
        let (bits, lsns) =
            after((HEAP, UPDATE), &[heap(0, 9), heap(1, 4)], &update(flags), &[4, 9]);
        assert_eq!((bits, lsns.len()), (expected.to_vec(), pages), "flags {flags}");
        let far_apart = [heap(0, far), heap(1, 4)];
        let (bits, _) = after((HEAP, UPDATE), &far_apart, &update(flags), &[4, far]);
        assert_eq!(bits, expected, "flags {flags}, two map pages");
    }
    let (bits, _) = after((HEAP, HOT_UPDATE), &[heap(0, 9)], &update(1), &[9]);
    assert_eq!(bits, [0]);
}

#[test]
fn updates_with_references_clear_nothing_else() {
    let far = PER_PAGE + 1;
    // Both heap blocks on one map page: one reference covers both.
    let blocks = [heap(0, 9), heap(1, 4), map(2, 0)];
    assert_eq!(after((HEAP, UPDATE), &blocks, &update(3), &[4, 9]).0, [0, 0]);
    // Only the old block's map page is referred to: the new block's bits were clear already.
    let blocks = [heap(0, far), heap(1, 4), map(3, 0)];
    assert_eq!(after((HEAP, UPDATE), &blocks, &update(3), &[4, far]).0, [0, 3]);
    // Only the new block's, on another map page.
    let blocks = [heap(0, far), heap(1, 4), map(2, 1)];
    assert_eq!(after((HEAP, UPDATE), &blocks, &update(3), &[4, far]).0, [3, 0]);
    // Both, on two map pages.
    let blocks = [heap(0, far), heap(1, 4), map(2, 1), map(3, 0)];
    let (bits, lsns) = after((HEAP, UPDATE), &blocks, &update(3), &[4, far]);
    assert_eq!(bits, [0, 0]);
    assert_eq!(lsns, [(0, END), (1, END)].into());
    // A HOT update refers to its page and to the old block's map page.
    let blocks = [heap(0, 9), map(3, 0)];
    assert_eq!(after((HEAP, HOT_UPDATE), &blocks, &update(1), &[9]).0, [0]);
}
