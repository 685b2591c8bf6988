//! What PostgreSQL does not compare, byte by byte (the `*_mask` functions of each access method). A mask that hid more
//! would let mistakes of redo pass the oracle.

use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_redo::{MaskTarget, Page, mask};

const HEAP: u8 = 10;
const HEAP2: u8 = 9;
const BTREE: u8 = 11;
const HASH: u8 = 12;
const GIN: u8 = 13;
const GIST: u8 = 14;
const SEQUENCE: u8 = 15;
const SPGIST: u8 = 16;
const BRIN: u8 = 17;
const GENERIC: u8 = 20;

fn put(page: &mut Page, at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put_line(page: &mut Page, number: usize, offset: u32, flags: u32, length: u32) {
    let word = offset | flags << 15 | length << 17;
    page[20 + number * 4..24 + number * 4].copy_from_slice(&word.to_le_bytes());
}

/// A page on which every byte is 0x55, with two line pointers of heap tuples and a hole of eight bytes.
fn full_page() -> Page {
    let mut page = [0x55; PAGE_SIZE];
    for (at, value) in [(10, 7), (12, 32), (14, 40), (16, 8176), (18, 0x2004)] {
        put(&mut page, at, value);
    }
    put_line(&mut page, 1, 1000, 1, 30);
    put_line(&mut page, 2, 2000, 3, 0);
    page
}

fn target(rmgr: u8) -> MaskTarget {
    MaskTarget { rmgr, block: 0x0001_0203, is_visibility_map: false, strict: false }
}

/// Bytes that a mask changed, and what they are then; runs of zeros as their range.
#[derive(Debug, PartialEq)]
struct Changed {
    zeros: Vec<(usize, usize)>,
    others: Vec<(usize, u8)>,
}

fn changed(target: MaskTarget, change: impl Fn(&mut Page)) -> Changed {
    let mut page = full_page();
    change(&mut page);
    let before = page;
    mask(&mut page, target);
    let mut found = Changed { zeros: Vec::new(), others: Vec::new() };
    for at in (0..PAGE_SIZE).filter(|at| page[*at] != before[*at]) {
        match (page[at], found.zeros.last_mut()) {
            (0, Some((_, end))) if *end == at => *end += 1,
            (0, _) => found.zeros.push((at, at + 1)),
            (byte, _) => found.others.push((at, byte)),
        }
    }
    found
}

/// True if a mask makes zeros of these ranges and does nothing else.
fn hides(target: MaskTarget, change: impl Fn(&mut Page), ranges: &[(usize, usize)]) -> bool {
    let mut expected = full_page();
    change(&mut expected);
    let mut found = expected;
    mask(&mut found, target);
    ranges.iter().for_each(|(start, end)| expected[*start..*end].fill(0));
    found == expected
}

fn zeros(ranges: &[(usize, usize)]) -> Changed {
    Changed { zeros: ranges.to_vec(), others: Vec::new() }
}

fn with(ranges: &[(usize, usize)], others: &[(usize, u8)]) -> Changed {
    Changed { zeros: ranges.to_vec(), others: others.to_vec() }
}

/// LSN and checksum; the flags for hints; the transaction for pruning.
const HINTS: [(usize, usize); 2] = [(0, 11), (20, 24)];

#[test]
fn other_resource_managers_have_no_mask() {
    assert_eq!(changed(target(0), |_| {}), zeros(&[(0, 10)]));
    for rmgr in [SEQUENCE, GENERIC] {
        assert_eq!(changed(target(rmgr), |_| {}), zeros(&[(0, 10), (32, 40)]));
        let none = |page: &mut Page| put(page, 14, 31);
        assert_eq!(changed(target(rmgr), none), zeros(&[(0, 10)]), "no hole");
        let all = |page: &mut Page| put(page, 14, 8192);
        assert_eq!(changed(target(rmgr), all), zeros(&[(0, 10), (32, 8192)]));
        let outside = |page: &mut Page| put(page, 14, 8193);
        assert_eq!(changed(target(rmgr), outside), zeros(&[(0, 10)]));
    }
}

#[test]
fn heap_tuples_lose_hints_and_commands() {
    // t_cid, infomask: all transaction bits of 0x5555. Padding of 30 bytes is two.
    for rmgr in [HEAP, HEAP2] {
        let found = changed(target(rmgr), |_| {});
        let hidden = [(0, 11), (20, 24), (32, 40), (1008, 1012), (1021, 1022), (1030, 1032)];
        assert_eq!(found, with(&hidden, &[(1020, 0x05)]));
    }
    // A frozen tuple keeps all but the hints about xmax.
    let frozen = changed(target(HEAP), |page| put(page, 1020, 0xFFFF));
    let hidden = [(0, 11), (20, 24), (32, 40), (1008, 1012), (1030, 1032)];
    assert_eq!(frozen, with(&hidden, &[(1021, 0xF3)]));
    for half in [0x0100, 0x0200] {
        let found = changed(target(HEAP), |page| put(page, 1020, half | 0x000F));
        let all = [(0, 11), (20, 24), (32, 40), (1008, 1012), (1021, 1022), (1030, 1032)];
        assert_eq!(found, zeros(&all));
    }
}

#[test]
fn a_speculative_token_becomes_the_tuples_own_id() {
    let found = changed(target(HEAP), |page| {
        put(page, 1020, 0x0302);
        put(page, 1016, 0xFFFE);
    });
    let hidden =
        [(0, 11), (20, 24), (32, 40), (1008, 1012), (1013, 1014), (1017, 1018), (1030, 1032)];
    assert_eq!(found, with(&hidden, &[(1012, 1), (1014, 3), (1015, 2), (1016, 1)]));
    // The neighbouring number is an offset like others.
    let found = changed(target(HEAP), |page| {
        put(page, 1020, 0x0302);
        put(page, 1016, 0xFFFD);
    });
    assert_eq!(found, zeros(&[(0, 11), (20, 24), (32, 40), (1008, 1012), (1030, 1032)]));
}

#[test]
fn what_is_no_tuple_is_left_alone() {
    // Shorter than a header; not used as a tuple; outside of the page. Padding is hidden all the same.
    let short = changed(target(HEAP), |page| put_line(page, 1, 1000, 1, 22));
    assert_eq!(short, zeros(&[(0, 11), (20, 24), (32, 40), (1022, 1024)]));
    let exact = changed(target(HEAP), |page| put_line(page, 1, 1000, 1, 23));
    let hidden = [(0, 11), (20, 24), (32, 40), (1008, 1012), (1021, 1022), (1023, 1024)];
    assert_eq!(exact, with(&hidden, &[(1020, 0x05)]));
    let dead = changed(target(HEAP), |page| put_line(page, 1, 1000, 3, 30));
    assert_eq!(dead, zeros(&[(0, 11), (20, 24), (32, 40), (1030, 1032)]));
    let empty = changed(target(HEAP), |page| put_line(page, 1, 1001, 3, 0));
    assert_eq!(empty, zeros(&[(0, 11), (20, 24), (32, 40)]));
    let outside = changed(target(HEAP), |page| put_line(page, 1, 8190, 1, 30));
    assert_eq!(outside, zeros(&[(0, 11), (20, 24), (32, 40)]));
}

#[test]
fn a_strict_mask_keeps_what_redo_determines() {
    let strict = MaskTarget { strict: true, ..target(HEAP) };
    let found = changed(strict, |page| page[1000..1032].fill(0));
    assert_eq!(found, with(&[(0, 10), (20, 24), (32, 40)], &[(10, 4)]));
    let found = changed(strict, |page| {
        page[1000..1032].fill(0);
        put(page, 10, 3);
    });
    assert_eq!(found, zeros(&[(0, 11), (20, 24), (32, 40)]));
    let map = MaskTarget { is_visibility_map: true, ..strict };
    assert_eq!(changed(map, |_| {}), zeros(&[(0, 10)]));
    // For PostgreSQL a map is a heap page whose content is a hole.
    let lax = MaskTarget { strict: false, ..map };
    let empty = |page: &mut Page| {
        put(page, 12, 24);
        put(page, 14, 8192);
    };
    assert!(hides(lax, empty, &[(0, 11), (20, 8192)]));
    // The strictness is the heap's alone.
    let btree = MaskTarget { strict: true, ..target(BTREE) };
    assert_eq!(changed(btree, |_| {}), changed(target(BTREE), |_| {}));
}

#[test]
fn btree_pages() {
    let flags = |flags: u16| move |page: &mut Page| put(page, 8188, flags);
    // btpo_flags loses SPLIT_END and HAS_GARBAGE, the cycle id all.
    let hidden = [(0, 11), (20, 24), (32, 40), (8190, 8192)];
    assert_eq!(changed(target(BTREE), flags(0xFFFE)), with(&hidden, &[(8188, 0x9E)]));
    assert_eq!(changed(target(BTREE), flags(0)), zeros(&hidden));
    // A leaf's line pointers lose their flags: 1000 | 1 << 15 | 30 << 17, and 2000 | 3 << 15.
    let leaf = changed(target(BTREE), flags(1));
    let lines = [(0, 11), (20, 24), (30, 31), (32, 40), (8190, 8192)];
    assert_eq!(leaf, with(&lines, &[(25, 0x03), (29, 0x07)]));
}

#[test]
fn hash_pages() {
    let flags = |flags: u16| move |page: &mut Page| put(page, 8188, flags);
    // An unused page's content does not count, its special space included.
    assert!(hides(target(HASH), flags(0x0080), &[(0, 11), (12, 16), (20, 8192)]));
    let lines = [(0, 11), (20, 24), (30, 31), (32, 40)];
    for bucket in [1, 2] {
        let found = changed(target(HASH), flags(bucket));
        assert_eq!(found, with(&lines, &[(25, 0x03), (29, 0x07)]));
    }
    let found = changed(target(HASH), flags(0x00C2));
    assert_eq!(found, with(&lines, &[(25, 0x03), (29, 0x07), (8188, 0x42)]));
    for other in [4, 8] {
        assert_eq!(changed(target(HASH), flags(other)), zeros(&[(0, 11), (20, 24), (32, 40)]));
    }
}

#[test]
fn gin_pages() {
    let flags = |flags: u16| move |page: &mut Page| put(page, 8190, flags);
    assert!(hides(target(GIN), flags(4), &[(0, 11), (12, 16), (20, 8192)]));
    let hole = zeros(&[(0, 11), (20, 24), (32, 40)]);
    assert_eq!(changed(target(GIN), flags(0xFFFB)), hole);
    // Pages whose lower bound was never set, of before PostgreSQL 9.4.
    let unset = changed(target(GIN), |page| {
        flags(0)(page);
        put(page, 12, 24);
    });
    assert_eq!(unset, zeros(&HINTS));
}

#[test]
fn gist_pages() {
    let flags = |flags: u16| move |page: &mut Page| put(page, 8188, flags);
    // The NSN; FOLLOW_RIGHT is set, HAS_GARBAGE and TUPLES_DELETED are not.
    let hidden = [(0, 11), (20, 24), (32, 40), (8176, 8184)];
    assert_eq!(changed(target(GIST), flags(0)), with(&hidden, &[(8188, 8)]));
    assert_eq!(changed(target(GIST), flags(0xFFFE)), with(&hidden, &[(8188, 0xEA)]));
    let leaf = changed(target(GIST), flags(9));
    let lines = [(0, 11), (20, 24), (30, 31), (32, 40), (8176, 8184)];
    assert_eq!(leaf, with(&lines, &[(25, 0x03), (29, 0x07)]));
}

#[test]
fn spgist_and_brin_pages() {
    assert_eq!(changed(target(SPGIST), |_| {}), zeros(&[(0, 11), (20, 24), (32, 40)]));
    let least = |page: &mut Page| put(page, 12, 24);
    assert!(hides(target(SPGIST), least, &[(0, 11), (20, 40)]));
    let below = changed(target(SPGIST), |page| put(page, 12, 23));
    assert_eq!(below, zeros(&HINTS));

    let kind = |kind: u16, lower: u16| {
        move |page: &mut Page| {
            put(page, 8190, kind);
            put(page, 8188, 0xFFFF);
            put(page, 12, lower);
        }
    };
    // Only regular pages may be on their way out; the flag is hidden on all.
    let hidden = [(0, 11), (20, 24), (32, 40)];
    assert_eq!(changed(target(BRIN), kind(0xF093, 32)), with(&hidden, &[(8188, 0xFE)]));
    assert_eq!(changed(target(BRIN), kind(0xF091, 32)), with(&hidden, &[(8188, 0xFE)]));
    let unset = changed(target(BRIN), kind(0xF091, 24));
    assert_eq!(unset, with(&HINTS, &[(8188, 0xFE)]));
    let map = changed(target(BRIN), kind(0xF092, 32));
    assert_eq!(map, with(&HINTS, &[(8188, 0xFE)]));
}
