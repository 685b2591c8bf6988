//! Records of indexes by hand, where real servers' records cannot tell two rules apart: what the oracle's masks hide,
//! errors at exact bounds, and differences between versions (nbtxlog.c, hash_xlog.c, ginxlog.c, gistxlog.c, spgxlog.c,
//! generic_xlog.c).
#![allow(clippy::unwrap_used)]

mod support;

use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{Page, page};
use pgstrata_pg_wal::PgVersion;
use support::{Fields, Piece, page_of, put_u16, put_u32, with};

const BTREE: u8 = 11;
const HASH: u8 = 12;
const GIN: u8 = 13;
const GIST: u8 = 14;
const SPGIST: u8 = 16;
const BRIN: u8 = 17;
const GENERIC: u8 = 20;

const CUT_OFF: &str = "the record's data ends too early";

fn u16_of(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn u32_of(page: &Page, at: usize) -> u32 {
    u32::from(u16_of(page, at)) | u32::from(u16_of(page, at + 2)) << 16
}

/// An index tuple of 16 bytes, with a TID of this offset.
fn tuple(number: u8) -> Vec<u8> {
    vec![
        0, 0, 0, 0, number, 0, 16, 0, number, number, number, number, number, number, number,
        number,
    ]
}

fn tuples(count: u8, special: usize) -> Page {
    let all: Vec<_> = (1..=count).map(tuple).collect();
    page_of(special, &all.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// The offsets in the TIDs of a page's tuples.
fn numbers(page: &Page) -> Vec<u8> {
    let count = (usize::from(u16_of(page, 12)) - 24) / 4;
    (0..count).map(|at| page[(u32_of(page, 24 + at * 4) & 0x7FFF) as usize + 4]).collect()
}

#[test]
fn generic_records_are_bytes_and_a_hole() {
    let before = page_of(16, &[&[7; 8]]);
    let run = |data: Fields| Piece::new((GENERIC, 0), Fields::new()).data(data).after(&before);
    let bounds = |lower: u16, upper: u16| run(Fields::new().u16(12).u16(4).u16(lower).u16(upper));
    let corrupt = Err("the page header's bounds are corrupt");
    let zeroed = |from: usize, to: usize| {
        Ok(with(&before, |page| {
            page[from..to].fill(0);
            put_u16(page, 12, from as u16);
            put_u16(page, 14, to as u16);
        }))
    };
    assert!(run(Fields::new()) == zeroed(28, 8168));
    assert!(bounds(24, 8192) == zeroed(24, 8192));
    assert!(bounds(100, 100) == zeroed(100, 100));
    assert!(bounds(23, 100) == corrupt);
    assert!(bounds(101, 100) == corrupt);
    assert!(bounds(24, 8193) == corrupt);
    assert!(bounds(9000, 9001) == corrupt);
    assert!(bounds(23, 8192) == corrupt);
    let outside = Fields::new().u16(8191).u16(2).u16(0);
    assert!(run(outside) == Err("an offset points outside of the page"));
    assert!(run(Fields::new().u16(8190).u16(2).u8(0)) == Err(CUT_OFF));
}

#[test]
fn vacuum_clears_the_cycle_id_from_18_on() {
    let before = with(&tuples(3, 16), |page| {
        put_u16(page, 8188, 1 | 64);
        put_u16(page, 8190, 9);
    });
    for (info, version, cycle) in [
        (0xC0, PgVersion::V15, 9),
        (0xC0, PgVersion::V17, 9),
        (0xC0, PgVersion::V18, 0),
        (0x70, PgVersion::V18, 9),
    ] {
        let counts = Fields::new().u16(1).u16(0);
        let main = if info == 0xC0 { counts } else { Fields::new().u32(0).bytes(&counts.0).u8(0) };
        let piece = Piece::new((BTREE, info), main).data(Fields::new().u16(2)).version(version);
        let found = piece.after(&before).unwrap();
        // Garbage is gone; the flag for it with it.
        assert_eq!(
            (u16_of(&found, 8188), u16_of(&found, 8190)),
            (1, cycle),
            "{info:x} {version:?}"
        );
        assert_eq!(numbers(&found), [1, 3]);
    }
}

#[test]
fn a_new_root_that_is_a_leaf_is_empty() {
    let root = |level: u32| {
        let data = Fields::new().bytes(&tuple(2)).bytes(&tuple(1));
        let piece = Piece::new((BTREE, 0xA0), Fields::new().u32(3).u32(level)).data(data).init();
        piece.after(&[0; PAGE_SIZE]).unwrap()
    };
    // ROOT, and LEAF at level 0.
    assert_eq!((u16_of(&root(0), 8188), numbers(&root(0))), (3, vec![]));
    assert_eq!((u16_of(&root(1), 8188), numbers(&root(1))), (2, vec![1, 2]));
    assert_eq!(u32_of(&root(5), 8184), 5);
}

#[test]
fn intervals_to_deduplicate_are_on_the_page() {
    let before = with(&tuples(3, 16), |page| put_u16(page, 8188, 1));
    let run = |intervals: &[(u16, u16)]| {
        let data =
            intervals.iter().fold(Fields::new(), |data, (base, items)| data.u16(*base).u16(*items));
        let main = Fields::new().u16(intervals.len() as u16);
        Piece::new((BTREE, 0x60), main).data(data).after(&before)
    };
    // The rightmost page has no high key.
    assert_eq!(run(&[(1, 3)]).map(|page| numbers(&page)), Ok(vec![3]));
    assert_eq!(run(&[(2, 2)]).map(|page| numbers(&page)), Ok(vec![1, 2]));
    let missing = "an interval to deduplicate is not on the page";
    assert_eq!(run(&[(4, 2)]).err(), Some(missing));
    assert_eq!(run(&[(0, 2)]).err(), Some(missing));
    assert_eq!(run(&[(2, 2), (1, 2)]).err(), Some(missing));
    assert_eq!(run(&[(2, 2), (5, 2)]).err(), Some(missing));
}

/// An internal page of a posting tree, with items of 10 bytes that are filled with their number.
fn posting_tree(count: u16) -> Page {
    with(&page_of(8, &[]), |page| {
        for number in 0..usize::from(count).min(816) {
            page[32 + number * 10..42 + number * 10].fill((number + 1) as u8);
        }
        put_u16(page, 12, 32 + count * 10);
        put_u16(page, 8188, count);
        put_u16(page, 8190, 1);
    })
}

fn insert_item(offset: u16) -> Piece {
    // GIN_INSERT_ISDATA; the left child is 5, the right one 0x00060007, both with the high half first.
    let main = Fields::new().u16(1).u32(5 << 16).u32(0x0007_0006);
    Piece::new((GIN, 0x20), main).data(Fields::new().u16(offset).bytes(&[0xEE; 10]))
}

#[test]
fn items_of_posting_trees_move_up() {
    let inserted = |offset: u16| insert_item(offset).after(&posting_tree(2));
    let expected = |at: usize| {
        with(&posting_tree(2), |page| {
            // The downlink that was there leads to the right child now.
            put_u32(page, 32 + at * 10, 0x0006_0007_u32.rotate_left(16));
            page.copy_within(32 + at * 10..52, 42 + at * 10);
            page[32 + at * 10..42 + at * 10].fill(0xEE);
            put_u16(page, 8188, 3);
            put_u16(page, 12, 62);
        })
    };
    assert!(inserted(1) == Ok(expected(0)));
    assert!(inserted(2) == Ok(expected(1)));
    assert_eq!(inserted(3).map(|page| page[52..62].to_vec()), Ok(vec![0xEE; 10]));
    let not_there = Some("the posting item is not on the page");
    assert_eq!((inserted(0).err(), inserted(4).err()), (not_there, not_there));
    // 815 items fill the page up to two bytes.
    assert!(insert_item(1).after(&posting_tree(814)).is_ok());
    let full = insert_item(1).after(&posting_tree(815)).err();
    assert_eq!(full, Some("the page has no room for the item"));
    let corrupt = insert_item(1).after(&posting_tree(816)).err();
    assert_eq!(corrupt, not_there);
}

#[test]
fn items_of_posting_trees_move_down() {
    let deleted = |offset: u16| {
        let main = Fields::new().u16(offset).u16(0).u32(0).u32(0);
        Piece::new((GIN, 0x50), main).role(1).after(&posting_tree(3))
    };
    let expected = |at: usize| {
        with(&posting_tree(3), |page| {
            page.copy_within(42 + at * 10..62, 32 + at * 10);
            put_u16(page, 8188, 2);
            put_u16(page, 12, 52);
        })
    };
    for at in 0..3 {
        assert!(deleted(at + 1) == Ok(expected(usize::from(at))), "{at}");
    }
    let not_there = Some("the posting item is not on the page");
    assert_eq!(
        (deleted(0).err(), deleted(4).err(), deleted(5).err()),
        (not_there, not_there, not_there)
    );
}

#[test]
fn pages_of_the_pending_list_say_what_they_hold() {
    let page = |right: u32| {
        let piece = Piece::new((GIN, 0x70), Fields::new().u32(right).u32(1)).init();
        piece.data(Fields(tuple(1))).after(&[0; PAGE_SIZE]).unwrap()
    };
    // Right link, number of heap tuples, flags: the tail holds whole rows.
    let special = |page: &Page| (u32_of(page, 8184), u16_of(page, 8188), u16_of(page, 8190));
    assert_eq!(special(&page(u32::MAX)), (u32::MAX, 1, 16 | 32));
    assert_eq!(special(&page(7)), (7, 0, 16));
    assert_eq!(numbers(&page(7)), [1]);
    let other = Piece::new((GIN, 0x70), Fields::new().u32(7).u32(1)).after(&page_of(16, &[])).err();
    assert_eq!(other, Some("the page is not of the expected access method"));
}

#[test]
fn left_halves_get_the_positions_of_their_parents() {
    // PAGE_UPDATE: the left child's NSN becomes the record's end, high half first; FOLLOW_RIGHT (8) goes.
    let before = with(&tuples(1, 16), |page| put_u16(page, 8188, 1 | 8));
    let mut page = before;
    let piece = Piece::new((GIST, 0x00), Fields::new().u16(0).u16(0)).role(1);
    piece.apply_at(&mut page, Lsn(0x0000_0005_0000_0009)).unwrap();
    assert_eq!((u32_of(&page, 8176), u32_of(&page, 8180), u16_of(&page, 8188)), (5, 9, 1));
}

#[test]
fn split_pages_follow_right_if_the_parent_is_not_told_yet() {
    // Old right link 77, NSN 0x500000009, leaf, pages, mark follow right.
    let main = |leaf: u8, pages: u16, mark: u8| {
        Fields::new().u32(77).u32(0).u32(9).u32(5).u8(leaf).u8(0).u16(pages).u8(mark)
    };
    let run = |block: u32, role: u8, others: &[(u8, u32)], main: Fields| {
        let data = Fields::new().u32(1).bytes(&tuple(1));
        let piece = Piece::new((GIST, 0x30), main).role(role).others(others).data(data).init();
        let mut page = [0; PAGE_SIZE];
        pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), block, Lsn(0x80)).unwrap();
        assert_eq!((u16_of(&page, 8190), numbers(&page)), (0xFF81, vec![1]));
        // The high half of an NSN comes first on the page, but the record has a plain number.
        assert_eq!((u32_of(&page, 8176), u32_of(&page, 8180)), (5, 9));
        (u32_of(&page, 8184), u16_of(&page, 8188))
    };
    let others = [(1, 4), (2, 5), (3, 6)];
    // All but the last lead to the next one.
    assert_eq!(run(4, 1, &others[1..], main(1, 3, 1)), (5, 1 | 8));
    assert_eq!(run(5, 2, &others, main(1, 3, 1)), (6, 1 | 8));
    assert_eq!(run(6, 3, &others, main(1, 3, 1)), (77, 1));
    assert_eq!(run(5, 2, &others, main(0, 3, 1)), (6, 8));
    assert_eq!(run(5, 2, &others, main(1, 3, 0)), (6, 1));
    // A split of the root: the first page is the root itself, which is no leaf then and leads nowhere.
    let root = [(1, 0), (2, 5), (3, 6)];
    assert_eq!(run(0, 1, &root[1..], main(1, 3, 1)), (u32::MAX, 0));
    assert_eq!(run(5, 2, &root, main(1, 3, 1)), (6, 1));
    assert_eq!(run(6, 3, &root, main(1, 3, 1)), (77, 1));
}

#[test]
fn updates_of_gist_leaves_note_that_tuples_went() {
    let run = |flags: u16, main: Fields, data: Fields| {
        let before = with(&tuples(4, 16), |page| put_u16(page, 8188, flags));
        let found = Piece::new((GIST, 0x00), main).data(data).after(&before).unwrap();
        (numbers(&found), u16_of(&found, 8188))
    };
    let delete = |flags: u16| run(flags, Fields::new().u16(1).u16(0), Fields::new().u16(2)).1;
    assert_eq!([delete(1), delete(0), delete(1 | 4), delete(8)], [1 | 4, 0, 1 | 4, 8]);
    // One for one is an overwrite, and an insertion alone takes nothing away.
    let data = Fields::new().u16(2).bytes(&tuple(9));
    assert_eq!(run(1, Fields::new().u16(1).u16(1), data), (vec![1, 9, 3, 4], 1));
    let data = Fields::new().bytes(&tuple(9));
    assert_eq!(run(1, Fields::new().u16(0).u16(1), data), (vec![1, 2, 3, 4, 9], 1));
}

#[test]
fn deletions_from_gist_list_as_many_as_they_say() {
    let before = with(&tuples(4, 16), |page| put_u16(page, 8188, 1 | 16));
    let run = |version: PgVersion, main: Fields| {
        let found = Piece::new((GIST, 0x10), main).version(version).after(&before)?;
        Ok::<_, &str>((numbers(&found), u16_of(&found, 8188)))
    };
    let old = |count: u16| Fields::new().u32(0).u16(count).u16(1).u16(2).u16(4);
    assert_eq!(run(PgVersion::V15, old(3)), Ok((vec![3], 1 | 4)));
    assert_eq!(run(PgVersion::V15, old(2)), Ok((vec![3, 4], 1 | 4)));
    assert_eq!(run(PgVersion::V15, old(4)), Err(CUT_OFF));
    let new = |count: u16| Fields::new().u32(0).u16(count).u16(0).u16(1).u16(2).u16(4);
    assert_eq!(run(PgVersion::V16, new(3)), Ok((vec![3], 1 | 4)));
    assert_eq!(run(PgVersion::V16, new(4)), Err(CUT_OFF));
}

/// A metapage of a hash index: 100 tuples, phase 10, one bitmap.
fn hash_meta(phase: u32) -> Page {
    with(&page_of(16, &[]), |page| {
        page[24..8176].fill(0);
        page[32..40].copy_from_slice(&100.0f64.to_le_bytes());
        put_u32(page, 60, phase);
        put_u32(page, 68, 1);
        put_u32(page, 468, 17);
        put_u16(page, 8188, 8);
    })
}

#[test]
fn vacuumed_tuples_are_counted_in_four_or_two_bytes() {
    let run = |version: PgVersion, main: Fields| {
        let piece = Piece::new((HASH, 0xC0), main).role(1).version(version);
        piece.after(&hash_meta(10)).map(|page| page[32..40].to_vec())
    };
    let left = |tuples: f64| Ok(tuples.to_le_bytes().to_vec());
    assert_eq!(run(PgVersion::V15, Fields::new().u32(0).u32(3)), left(97.0));
    assert_eq!(run(PgVersion::V15, Fields::new().u32(0).u32(0x1_0000)), left(100.0 - 65_536.0));
    // Behind the two bytes is a flag.
    assert_eq!(run(PgVersion::V16, Fields::new().u32(0).u16(3).u16(1)), left(97.0));
    assert_eq!(run(PgVersion::V18, Fields::new().u32(0).u16(3).u16(1)), left(97.0));
}

#[test]
fn a_vacuumed_bucket_has_no_dead_tuples_if_the_record_says_so() {
    let before = with(&tuples(3, 16), |page| put_u16(page, 8188, 2 | 128));
    for (clears, flags) in [(0, 2 | 128), (1, 2)] {
        let main = Fields::new().u8(clears).u8(1);
        let piece = Piece::new((HASH, 0x90), main).role(1).data(Fields::new().u16(2));
        let found = piece.after(&before).unwrap();
        assert_eq!((u16_of(&found, 8188), numbers(&found)), (flags, vec![1, 3]));
    }
}

#[test]
fn range_maps_have_1360_entries() {
    // (8192 - 24 - 8) / 6; an entry is a TID. INSERT: heap block, pages per range, offset; block 0 has the tuple.
    let run = |heap_block: u32, pages_per_range: u32| {
        let main = Fields::new().u32(heap_block).u32(pages_per_range).u16(9);
        let piece = Piece::new((BRIN, 0x10), main).role(1).others(&[(0, 0x0006_0007)]);
        piece.after(&page_of(8, &[]))
    };
    let expected = |at: usize| {
        Ok(with(&page_of(8, &[]), |page| page[at..at + 6].copy_from_slice(&[6, 0, 7, 0, 9, 0])))
    };
    assert!(run(0, 1) == expected(24));
    assert!(run(1359, 1) == expected(8178));
    assert!(run(1360, 1) == expected(24));
    assert!(run(1361 * 128 + 127, 128) == expected(30));
    assert!(run(5, 0) == Err("ranges have no pages"));
}

#[test]
fn bitmaps_end_before_the_special_space() {
    let bitmap =
        |size: u16| Piece::new((HASH, 0x10), Fields::new().u16(size)).init().after(&[0; PAGE_SIZE]);
    let page = bitmap(4096).unwrap();
    assert!(page[24..4120].iter().all(|byte| *byte == 0xFF));
    assert!(page[4120..8176].iter().all(|byte| *byte == 0));
    assert_eq!((u16_of(&page, 12), u16_of(&page, 8188)), (4120, 4));
    let page = bitmap(8168).unwrap();
    assert!(page[24..8176].iter().all(|byte| *byte == 0xFF));
    assert_eq!((u16_of(&page, 8188), u16_of(&page, 8190)), (4, 0xFF80));
    assert_eq!((u32_of(&page, 8176), u32_of(&page, 8180)), (u32::MAX, u32::MAX));

    // A new bitmap page with an overflow page is the same.
    let added = Piece::new((HASH, 0x30), Fields::new().u16(4096).u8(0)).role(3).init();
    assert!(added.after(&[0; PAGE_SIZE]) == bitmap(4096));

    let full = bitmap(8152).unwrap();
    let free = |bit: u32| {
        let piece = Piece::new((HASH, 0x80), Fields::new().u64(0).u32(0)).role(5);
        piece.data(Fields::new().u32(bit)).after(&full)
    };
    assert!(free(0) == Ok(with(&full, |page| page[24] = 0xFE)));
    assert!(free(65_215) == Ok(with(&full, |page| page[8175] = 0x7F)));
    let outside = Some("the bit is outside of the bitmap");
    assert_eq!((free(65_216).err(), free(65_472).err()), (outside, outside));
    let empty = with(&full, |page| page[24..8176].fill(0));
    let take = |bit: u32, before: &Page| {
        let piece = Piece::new((HASH, 0x30), Fields::new().u16(0).u8(1)).role(2);
        piece.data(Fields::new().u32(bit)).after(before)
    };
    assert!(take(9, &empty) == Ok(with(&empty, |page| page[25] = 2)));
    assert!(take(9, &full) == Ok(full), "it is taken already");
}

#[test]
fn an_overflow_page_may_come_with_a_bitmap() {
    let run = |phase: u32, found: u8, others: &[(u8, u32)], before: &dyn Fn(&mut Page)| {
        let main = Fields::new().u16(4096).u8(found);
        let piece =
            Piece::new((HASH, 0x30), main).role(4).others(others).data(Fields::new().u32(55));
        let after = piece.after(&with(&hash_meta(phase), before))?;
        let spare = u32_of(&after, 76 + phase as usize * 4);
        // First free bit, spares of the phase, bitmaps, the second of them.
        Ok::<_, &str>((u32_of(&after, 64), spare, u32_of(&after, 68), u32_of(&after, 472)))
    };
    assert_eq!(run(10, 1, &[], &|_| {}), Ok((55, 0, 1, 0)));
    assert_eq!(run(10, 0, &[], &|_| {}), Ok((55, 1, 1, 0)));
    assert_eq!(run(10, 0, &[(3, 99)], &|_| {}), Ok((55, 2, 2, 99)));
    assert_eq!(run(97, 0, &[], &|_| {}), Ok((55, 1, 1, 0)));
    let corrupt = Err("the metapage's splitpoint phase is corrupt");
    assert_eq!(run(98, 0, &[], &|_| {}), corrupt);
    let many = "the metapage has too many bitmaps";
    let bitmaps = |count: u32| move |page: &mut Page| put_u32(page, 68, count);
    assert_eq!(run(10, 0, &[(3, 99)], &bitmaps(1024)), Err(many));
    assert_eq!(run(10, 0, &[(3, 99)], &bitmaps(1023)), Ok((55, 2, 1024, 0)));
}

#[test]
fn r12_a_page_that_is_only_locked_gets_the_lsn_before_17() {
    // SQUEEZE_PAGE without tuples, on a page to write to that is not the previous one.
    let before = with(&tuples(1, 16), |page| put_u16(page, 8188, 2));
    let run = |version: PgVersion, count: u16, is_prev: u8| {
        let main = Fields::new().u32(5).u32(6).u16(count).u8(0).u8(is_prev);
        let data = if count == 0 { Fields::new() } else { Fields::new().u16(2).bytes(&tuple(2)) };
        let mut page = before;
        let piece = Piece::new((HASH, 0x80), main).role(1).data(data).version(version);
        piece.apply_at(&mut page, Lsn(0x80)).unwrap();
        (page::lsn(&page), numbers(&page).len(), u32_of(&page, 8180))
    };
    let (set, old) = (Lsn(0x80), Lsn(0));
    assert_eq!(run(PgVersion::V16, 0, 0), (set, 1, 0));
    assert_eq!(run(PgVersion::V17, 0, 0), (old, 1, 0));
    assert_eq!(run(PgVersion::V17, 1, 0), (set, 2, 0));
    assert_eq!(run(PgVersion::V17, 0, 1), (set, 1, 6));
    assert_eq!(run(PgVersion::V18, 0, 0), (old, 1, 0));
    // The page behind the freed one leads back to the one before.
    let main = || Fields::new().u32(5).u32(6).u16(0).u8(0).u8(0);
    let link = |role: u8| Piece::new((HASH, 0x80), main()).role(role).after(&before);
    assert_eq!(link(3).map(|page| (u32_of(&page, 8176), u32_of(&page, 8180))), Ok((0, 6)));
    assert_eq!(link(4).map(|page| (u32_of(&page, 8176), u32_of(&page, 8180))), Ok((5, 0)));
    assert_eq!(link(7).err(), Some("the record does not change this block"));
}

#[test]
fn the_end_of_a_split_sets_the_flags_of_both_buckets() {
    let before = with(&tuples(1, 16), |page| put_u16(page, 8188, 0x22));
    for (role, flags) in [(0, 0x12), (1, 0x42)] {
        let piece = Piece::new((HASH, 0x60), Fields::new().u16(0x12).u16(0x42)).role(role);
        assert_eq!(piece.after(&before).map(|page| u16_of(&page, 8188)), Ok(flags));
    }
}

/// An inner tuple of SP-GiST: two nodes of 8 bytes behind a prefix of 8.
fn inner() -> Vec<u8> {
    // State 0; all the same 0; 2 nodes; prefix of 8 bytes; size 8 + 8 + 16.
    let header = Fields::new().u32(2 << 3 | 8 << 16).u16(32).u16(0).bytes(&[0xAA; 8]);
    header.u16(0).u16(1).u16(1).u16(8).u16(0).u16(2).u16(2).u16(8).0
}

/// A placeholder, as `spgFormDeadTuple` makes it.
fn placeholder() -> Vec<u8> {
    Fields::new().u32(3 | 16 << 2).u16(0).u16(0xFFFF).u16(0xFFFF).u16(0).u32(0).0
}

fn inner_page() -> Page {
    with(&page_of(8, &[&inner(), &placeholder()]), |page| {
        put_u16(page, 8188, 1);
        put_u16(page, 8190, 0xFF82);
    })
}

#[test]
fn an_inner_tuple_is_split_into_two() {
    // Prefix offset, postfix offset, new page, postfix on the same page; then both tuples.
    let run = |role: u8, same: u8, postfix_at: u16, init: bool| {
        let mut small = inner();
        small[0] = 1 << 3;
        small[4] = 24;
        small.truncate(24);
        let main = Fields::new().u16(1).u16(postfix_at).u8(u8::from(init)).u8(same);
        let piece = Piece::new((SPGIST, 0x40), main.bytes(&small).bytes(&inner())).role(role);
        let piece = if init { piece.init() } else { piece };
        let found = piece.after(&if init { [0; PAGE_SIZE] } else { inner_page() })?;
        let count = (usize::from(u16_of(&found, 12)) - 24) / 4;
        let lengths: Vec<_> = (0..count).map(|at| u32_of(&found, 24 + at * 4) >> 17).collect();
        // Lengths of the tuples, and the number of placeholders.
        Ok::<_, &str>((lengths, u16_of(&found, 8188)))
    };
    assert_eq!(run(0, 0, 2, false), Ok((vec![24, 16], 1)));
    assert_eq!(run(0, 1, 2, false), Ok((vec![24, 32], 0)), "the placeholder is replaced");
    assert_eq!(run(0, 1, 3, false), Ok((vec![24, 16, 32], 1)));
    assert_eq!(run(1, 0, 2, false), Ok((vec![32, 32], 0)));
    assert_eq!(run(1, 0, 1, true), Ok((vec![32], 0)));
    let other = "the tuple to replace is not a placeholder";
    assert_eq!(run(1, 0, 1, false), Err(other));
}

#[test]
fn downlinks_are_found_behind_prefix_and_nodes() {
    // ADD_LEAF for a parent on another page: flags, leaf offset, head offset, parent offset, node.
    let run = |node: u16, before: &Page| {
        let main = Fields::new().u8(0).u8(0).u16(4).u16(0).u16(1).u16(node);
        Piece::new((SPGIST, 0x10), main).role(1).others(&[(0, 0x0006_0007)]).after(before)
    };
    let at = 8184 - 32;
    for (node, link) in [(0, at + 16), (1, at + 24)] {
        let bytes = [6, 0, 7, 0, 4, 0];
        let expected = with(&inner_page(), |page| page[link..link + 6].copy_from_slice(&bytes));
        assert!(run(node, &inner_page()) == Ok(expected), "{node}");
    }
    let none = "the inner tuple has no node of that number";
    assert_eq!(run(2, &inner_page()).err(), Some(none));
    // State and the "all the same" flag are below the number of nodes.
    let flagged = with(&inner_page(), |page| page[at] |= 7);
    assert!(run(1, &flagged).is_ok());
    assert_eq!(run(2, &flagged).err(), Some(none));
    let prefix = |size: u16| with(&inner_page(), |page| put_u16(page, at + 2, size));
    let cut = Some("an inner tuple is cut off");
    assert_eq!((run(0, &prefix(18)).err(), run(0, &prefix(19)).err()), (None, cut));
    assert_eq!((run(1, &prefix(17)).err(), run(1, &prefix(25)).err()), (Some(CUT_OFF), cut));
}

#[test]
fn tuples_of_spgist_have_a_least_size() {
    let before = with(&page_of(8, &[]), |page| put_u16(page, 8190, 0xFF82));
    let leaf = |size: u32, length: usize| {
        let mut tuple = Fields::new().u32(size << 2).0;
        tuple.resize(length, 0);
        let main = Fields::new().u8(0).u8(0).u16(1).u16(0).u16(0).u16(0).bytes(&tuple);
        Piece::new((SPGIST, 0x10), main).after(&before).map(|page| u32_of(&page, 24) >> 17)
    };
    assert_eq!(leaf(12, 12), Ok(12));
    assert_eq!(leaf(16, 16), Ok(16));
    assert_eq!(leaf(11, 12), Err("a leaf tuple is too short"));
    assert_eq!(leaf(16, 15), Err(CUT_OFF));
    let inner = |size: u16, length: usize| {
        let mut tuple = Fields::new().u32(0).u16(size).u16(0).0;
        tuple.resize(length, 0);
        let main = Fields::new().u16(1).u16(1).u8(0).u8(0).bytes(&tuple).bytes(&inner_tuple());
        Piece::new((SPGIST, 0x40), main).after(&inner_page()).map(|page| u32_of(&page, 24) >> 17)
    };
    assert_eq!(inner(8, 8), Ok(8));
    assert_eq!(inner(7, 8), Err("an inner tuple is too short"));
}

/// Another inner tuple, behind the first in a record.
fn inner_tuple() -> Vec<u8> {
    inner()
}

#[test]
fn redirects_become_placeholders_that_lead_nowhere() {
    // A redirect of transaction 9 to block 5, offset 6.
    let redirect = Fields::new().u32(1 | 16 << 2).u16(0).u16(0).u16(5).u16(6).u32(9).0;
    let run = |length: usize, version: PgVersion| {
        let before = with(&page_of(8, &[&redirect[..length]]), |page| {
            put_u16(page, 8186, 1);
            put_u16(page, 8190, 0xFF82);
        });
        // Redirects to placeholders, the first placeholder to remove, the newest transaction.
        let main = Fields::new().u16(1).u16(0).u32(0);
        let main = if version >= PgVersion::V16 { main.u8(0).u8(0) } else { main };
        let piece = Piece::new((SPGIST, 0x80), main.u16(1)).version(version);
        piece.after(&before).map(|page| {
            let at = (u32_of(&page, 24) & 0x7FFF) as usize;
            (page[at..at + 12].to_vec(), u16_of(&page, 8186), u16_of(&page, 8188))
        })
    };
    let nowhere = Fields::new().u32(3 | 16 << 2).u16(0).u16(0xFFFF).u16(0xFFFF).u16(0).0;
    assert_eq!(run(16, PgVersion::V15), Ok((nowhere.clone(), 0, 1)));
    assert_eq!(run(16, PgVersion::V16), Ok((nowhere, 0, 1)));
    assert!(run(12, PgVersion::V15).is_ok());
    assert_eq!(run(11, PgVersion::V15), Err("a redirect is too short"));
}
