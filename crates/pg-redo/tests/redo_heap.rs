//! Heap records by hand, where real servers' records cannot tell two rules apart: flags that are not set, hints that the
//! oracle's masks hide, and records that no server writes (heapam.c, heapam_xlog.c, htup_details.h).
#![allow(clippy::unwrap_used)]

mod support;

use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{Page, page};
use pgstrata_pg_wal::PgVersion;
use support::{Fields, Piece, page_of, put_u16, put_u32, with};

const HEAP: u8 = 10;
const HEAP2: u8 = 9;
const INSERT: u8 = 0x00;
const DELETE: u8 = 0x10;
const UPDATE: u8 = 0x20;
const LOCK: u8 = 0x60;
const INPLACE: u8 = 0x70;
const PRUNE: u8 = 0x10;
const FREEZE: u8 = 0x30;
const MULTI_INSERT: u8 = 0x50;
const LOCK_UPDATED: u8 = 0x60;

/// Where the tuple of [`page`] is.
const TUPLE: usize = PAGE_SIZE - 32;
const ALL_VISIBLE: u8 = 4;

/// A tuple with a different byte everywhere, without state: hoff 24, two bytes of data.
fn tuple() -> Vec<u8> {
    let header =
        Fields::new().u32(650).u32(660).u32(9).u16(0).u16(7).u16(7).u16(0x4002).u16(0x0020);
    header.u8(24).u8(0).bytes(&[0xA1, 0xA2]).0
}

/// An all-visible page with that tuple.
fn page() -> Page {
    with(&page_of(0, &[&tuple()]), |page| page[10] = ALL_VISIBLE)
}

/// The page with that tuple changed, and the transaction for pruning set.
fn changed(prune: bool, change: impl FnOnce(&mut Page)) -> Page {
    with(&page(), |page| {
        change(page);
        if prune {
            put_u32(page, 20, 700);
        }
    })
}

fn delete(infobits: u8, flags: u8) -> Piece {
    Piece::new((HEAP, DELETE), Fields::new().u32(701).u16(1).u8(infobits).u8(flags))
}

#[test]
fn a_deleted_tuple_points_to_itself() {
    // The command id is the first; COMBO_CID and HOT_UPDATED go; block 3, offset 1.
    let deleted = |page: &mut Page| {
        put_u32(page, TUPLE + 4, 701);
        put_u32(page, TUPLE + 8, 0);
        page[TUPLE + 12..TUPLE + 18].copy_from_slice(&[0, 0, 3, 0, 1, 0]);
        put_u16(page, TUPLE + 18, 2);
        put_u16(page, TUPLE + 20, 0);
    };
    assert!(delete(0, 0).after(&page()) == Ok(changed(true, deleted)), "all-visible stays");
    let visible = changed(true, |page| {
        deleted(page);
        page[10] = 0;
    });
    assert!(delete(0, 1).after(&page()) == Ok(visible));
    // A speculative insertion that was given up has no inserter; its xmax stays.
    let given_up = changed(true, |page| {
        deleted(page);
        put_u32(page, TUPLE, 0);
        put_u32(page, TUPLE + 4, 660);
    });
    assert!(delete(0, 8).after(&page()) == Ok(given_up));
    let moved = changed(true, |page| {
        deleted(page);
        page[TUPLE + 12..TUPLE + 18].copy_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFD, 0xFF]);
    });
    assert!(delete(0, 16).after(&page()) == Ok(moved));
}

#[test]
fn the_oldest_transaction_for_pruning_stays() {
    for (before, after) in
        [(0, 700), (800, 700), (700, 700), (600, 600), (0xFFFF_FFF0, 0xFFFF_FFF0)]
    {
        let old = with(&page(), |page| put_u32(page, 20, before));
        let found = delete(0, 0).after(&old).unwrap();
        assert_eq!(found[20..24], u32::to_le_bytes(after), "{before}");
    }
}

#[test]
fn infobits_replace_all_state_of_xmax() {
    // Any state before: committed, invalid, a multixact, locks, moved; hints about xmin and sizes stay.
    let old = with(&page(), |page| {
        put_u16(page, TUPLE + 20, 0xFFDF);
        put_u16(page, TUPLE + 18, 0xFFFF);
    });
    for (infobits, infomask, infomask2) in [
        (0x00, 0x230F, 0x9FFF),
        (0x01, 0x330F, 0x9FFF),
        (0x02, 0x238F, 0x9FFF),
        (0x04, 0x234F, 0x9FFF),
        (0x08, 0x231F, 0x9FFF),
        (0x10, 0x230F, 0xBFFF),
    ] {
        let found = delete(infobits, 0).after(&old).unwrap();
        assert_eq!(found[TUPLE + 20..TUPLE + 22], u16::to_le_bytes(infomask), "{infobits:x}");
        assert_eq!(found[TUPLE + 18..TUPLE + 20], u16::to_le_bytes(infomask2), "{infobits:x}");
    }
}

#[test]
fn a_tuple_that_is_only_locked_points_to_itself() {
    // HEAP_XMAX_IS_LOCKED_ONLY: said so, or an exclusive lock and neither a multixact nor a key-share lock.
    for (infobits, locked_only) in [
        (0x00, false),
        (0x02, true),
        (0x04, true),
        (0x05, false),
        (0x08, false),
        (0x0C, false),
        (0x01, false),
        (0x03, true),
        (0x0E, true),
    ] {
        let main = || Fields::new().u32(701).u16(1).u8(infobits).u8(0);
        let found = Piece::new((HEAP, LOCK), main()).after(&page()).unwrap();
        let own = if locked_only { [0, 0, 3, 0, 1, 0] } else { [0, 0, 7, 0, 7, 0] };
        assert_eq!(found[TUPLE + 12..TUPLE + 18], own, "{infobits:x}");
        assert_eq!(found[TUPLE + 19] & 0x40 == 0, locked_only);
        assert_eq!(
            found[TUPLE + 4..TUPLE + 12],
            [0xBD, 2, 0, 0, 0, 0, 0, 0],
            "xmax, first command"
        );
        assert_eq!(found[TUPLE + 20] & 0x20, 0);
        // The lock of an updated version touches neither.
        let found = Piece::new((HEAP2, LOCK_UPDATED), main()).after(&page()).unwrap();
        assert_eq!(found[TUPLE + 4..TUPLE + 18], [0xBD, 2, 0, 0, 9, 0, 0, 0, 0, 0, 7, 0, 7, 0]);
        assert_eq!((found[TUPLE + 19], found[TUPLE + 20] & 0x20), (0x40, 0x20));
    }
    let nothing = Piece::new((HEAP, LOCK), Fields::new().u32(701).u16(2).u8(0).u8(0));
    let missing = "the page has no line pointer of that number";
    assert_eq!(nothing.after(&page()).err(), Some(missing));
    let dead = with(&page(), |page| put_u32(page, 24, 3 << 15));
    assert_eq!(delete(0, 0).after(&dead).err(), Some("the line pointer holds no tuple"));
    let short = with(&page(), |page| put_u32(page, 24, 8160 | 1 << 15 | 22 << 17));
    assert_eq!(delete(0, 0).after(&short).err(), Some("the line pointer holds no tuple"));
    let least = with(&page(), |page| put_u32(page, 24, 8160 | 1 << 15 | 23 << 17));
    assert!(delete(0, 0).after(&least).is_ok());
}

/// `xl_heap_header`, padding, and a byte of data.
fn new_tuple() -> Fields {
    Fields::new().u16(1).u16(0x0820).u8(24).u8(0).u8(7)
}

#[test]
fn an_insertion_changes_all_visible_as_its_flags_say() {
    for (before, flags, after) in
        [(4, 0, 4), (4, 1, 0), (0, 0, 0), (0, 0x20, 4), (4, 0x20, 4), (4, 0x21, 4)]
    {
        let old = with(&page(), |page| page[10] = before);
        let single = Piece::new((HEAP, INSERT), Fields::new().u16(2).u8(flags)).data(new_tuple());
        let found = single.after(&old).unwrap();
        assert_eq!(found[10], after, "{before} {flags:x}");
        // Below the other one: xmin, block 3 offset 2, without COMBO_CID.
        let bytes = Fields::new().u32(700).u32(0).u32(0).u16(0).u16(3).u16(2).u16(1).u16(0x0800);
        assert_eq!(found[TUPLE - 32..TUPLE - 7], bytes.u8(24).u8(0).u8(7).0);
        let main = Fields::new().u8(flags).u8(0).u16(1).u16(2);
        let data = Fields::new().u16(2).bytes(&new_tuple().0);
        let several = Piece::new((HEAP2, MULTI_INSERT), main).data(data);
        assert!(several.after(&old) == Ok(found));
    }
}

#[test]
fn several_tuples_begin_at_even_bytes() {
    let main = |offsets: &[u16]| {
        let fields = Fields::new().u8(0).u8(0).u16(2);
        offsets.iter().fold(fields, |fields, offset| fields.u16(*offset))
    };
    let one = || Fields::new().u16(2).bytes(&new_tuple().0);
    let data = || Fields(one().0.into_iter().chain([0xEE]).chain(one().0).collect());
    let several = |main, data| Piece::new((HEAP2, MULTI_INSERT), main).data(data);
    assert_eq!(one().0.len() % 2, 1);
    assert!(several(main(&[2, 3]), data()).after(&page()).is_ok());
    let wrong = "tuples are longer or shorter than their lengths say";
    assert_eq!(several(main(&[2, 3]), data().u8(0)).after(&page()).err(), Some(wrong));
    // A page that is rebuilt from zeros has them from its first line pointer on, and the record no offsets.
    let rebuilt = several(main(&[]), data()).init().after(&[0; PAGE_SIZE]).unwrap();
    assert_eq!(rebuilt[12..14], [32, 0]);
}

#[test]
fn an_update_changes_all_visible_of_either_page() {
    // Role 0 is the new tuple's page, role 1 the old one's, if it is another.
    let main = |flags: u8| Fields::new().u32(701).u16(1).u8(0).u8(flags).u32(0).u16(2);
    let run = |role: u8, flags: u8| {
        let others = if role == 1 { [(0, 8)] } else { [(1, 8)] };
        let piece = Piece::new((HEAP, UPDATE), main(flags)).role(role).others(&others);
        piece.data(new_tuple()).after(&page()).unwrap()[10]
    };
    assert_eq!([0, 1, 2, 3].map(|flags| run(1, flags)), [4, 0, 4, 0]);
    assert_eq!([0, 1, 2, 3].map(|flags| run(0, flags)), [4, 4, 0, 0]);
    // The old tuple leads to the new one, on block 8.
    let old = Piece::new((HEAP, UPDATE), main(0)).role(1).others(&[(0, 8)]).after(&page()).unwrap();
    assert_eq!(old[TUPLE + 12..TUPLE + 18], [0, 0, 8, 0, 2, 0]);
    assert_eq!(old[TUPLE + 4..TUPLE + 12], [0xBD, 2, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn shared_parts_come_from_the_old_tuple() {
    let main = |flags: u8| Fields::new().u32(701).u16(1).u8(0).u8(flags).u32(0).u16(2);
    let run =
        |flags: u8, data: Fields| Piece::new((HEAP, UPDATE), main(flags)).data(data).after(&page());
    let header = |hoff: u8| Fields::new().u16(1).u16(0).u8(hoff);
    let data = |page: Page| page[TUPLE - 32 + 23..TUPLE].to_vec();
    let prefix = |length: u16| Fields::new().u16(length).bytes(&header(24).0).u8(0).u8(0xB1);
    assert_eq!(run(0x20, prefix(2)).map(data).unwrap()[..4], [0, 0xA1, 0xA2, 0xB1]);
    let missing = "the old tuple is shorter than the part it shares";
    assert_eq!(run(0x20, prefix(3)).err(), Some(missing));
    let suffix = |length: u16| Fields::new().u16(length).bytes(&header(24).0).u8(0).u8(0xB1);
    assert_eq!(run(0x40, suffix(1)).map(data).unwrap()[..3], [0, 0xB1, 0xA2]);
    assert_eq!(run(0x40, suffix(3)).err(), Some(missing));
    let both = Fields::new().u16(1).u16(1).bytes(&header(24).0).u8(0).u8(0xB1);
    assert_eq!(run(0x60, both).map(data).unwrap()[..4], [0, 0xA1, 0xB1, 0xA2]);
    let short = Fields::new().u16(1).bytes(&header(22).0);
    assert_eq!(run(0x20, short).err(), Some("the tuple's header is too short"));
    let with_header = |length: u8| {
        let old = with(&page(), |page| page[TUPLE + 22] = length);
        Piece::new((HEAP, UPDATE), main(0x20)).data(prefix(1)).after(&old).err()
    };
    assert_eq!(with_header(27), Some("the tuple's header is longer than the tuple"));
    assert_eq!(with_header(26), Some(missing));
}

#[test]
fn an_update_in_place_keeps_the_length() {
    let inplace = |data: &[u8]| {
        Piece::new((HEAP, INPLACE), Fields::new().u16(1)).data(Fields(data.to_vec())).after(&page())
    };
    assert!(inplace(&[1, 2]) == Ok(changed(false, |page| put_u16(page, TUPLE + 24, 0x0201))));
    let wrong = "an in-place update changes the tuple's length";
    assert_eq!(inplace(&[1]).err(), Some(wrong));
    assert_eq!(inplace(&[1, 2, 3]).err(), Some(wrong));
}

/// Two plans, or two tuples: xmax 0, infomask2 2, infomask 0x0B00; xvac as the flags say.
fn frozen(xvac: u32) -> Page {
    changed(false, |page| {
        put_u32(page, TUPLE + 4, 0);
        put_u32(page, TUPLE + 8, xvac);
        put_u16(page, TUPLE + 18, 2);
        put_u16(page, TUPLE + 20, 0x0B00);
    })
}

#[test]
fn freezing_sets_xvac_as_the_flags_say() {
    // 2 makes xvac the frozen transaction, 4 the invalid one; anything else leaves it.
    for (flags, xvac) in [(0, 9), (1, 9), (2, 2), (4, 0)] {
        let fields = |fields: Fields| fields.u16(2).u16(0x0B00).u8(flags).u8(0);
        let tuple = fields(Fields::new().u32(0).u16(1));
        let data = Fields::new().bytes(&tuple.0).bytes(&tuple.0);
        let piece = Piece::new((HEAP2, FREEZE), Fields::new().u32(0).u16(2)).data(data);
        assert!(piece.after(&page()) == Ok(frozen(xvac)), "{flags}");
        let plan = fields(Fields::new().u32(0)).u16(1);
        let plans = Fields::new().bytes(&plan.0).bytes(&plan.0).u16(1).u16(1);
        let piece = Piece { data: plans.clone().0, version: PgVersion::V16, ..piece };
        assert!(piece.after(&page()) == Ok(frozen(xvac)), "{flags}");
        // From 17 on with its own counts. Nothing else is done: the page is not compacted.
        let main = Fields::new().u8(0).u8(0x10 | 0x04);
        let data = Fields::new().u16(2).u16(0).bytes(&plans.0);
        let piece = Piece::new((HEAP2, FREEZE), main).data(data).version(PgVersion::V17);
        let loose = |page: &Page| with(page, |page| put_u16(page, 14, 8000));
        assert!(piece.after(&loose(&page())) == Ok(loose(&frozen(xvac))), "{flags}");
    }
    let dead = with(&page(), |page| put_u32(page, 24, 3 << 15));
    let main = Fields::new().u32(0).u16(1);
    let piece = Piece::new((HEAP2, FREEZE), main).data(Fields::new().u32(0).u16(1).u32(0).u16(0));
    assert_eq!(piece.after(&dead).err(), Some("the line pointer to freeze holds no tuple"));
}

#[test]
fn pruning_compacts_only_with_the_cleanup_lock() {
    let two =
        |first: u32| with(&page_of(0, &[&tuple(), &tuple()]), |page| put_u32(page, 24, first));
    let line = 8160 | 1 << 15 | 26 << 17;
    let run = |flags: u8, data: Fields| {
        let main = Fields::new().u8(0).u8(flags);
        let piece = Piece::new((HEAP2, PRUNE), main).data(data).version(PgVersion::V18);
        piece
            .after(&two(line))
            .map(|page| [12, 14, 24].map(|at| u16::from_le_bytes([page[at], page[at + 1]])))
    };
    // Lower and upper bound, and the first line pointer's low half.
    let low = |line: u32| line as u16;
    assert_eq!(run(0x04, Fields::new()), Ok([32, 8128, low(line)]));
    let one = || Fields::new().u16(1).u16(1);
    assert_eq!(run(0x84, one()), Ok([32, 8160, 0]));
    assert_eq!(run(0x80, one()), Ok([32, 8128, 0]));
    assert_eq!(run(0x44, one()), Ok([32, 8160, low(3 << 15)]));
    assert_eq!(run(0x40, one()), Ok([32, 8128, low(3 << 15)]));
    assert_eq!(run(0x24, one().u16(2)), Ok([32, 8160, low(2 | 2 << 15)]));
    assert_eq!(run(0x20, one().u16(2)), Ok([32, 8128, low(2 | 2 << 15)]));
}

/// A map page on which all is set.
fn map() -> Page {
    let mut page = page_of(0, &[]);
    page[24..].fill(0xFF);
    page
}

#[test]
fn r10_roles_of_map_pages_follow_the_block_ids() {
    let byte = |at: u32| 24 + (at / 4) as usize;
    let main = |flags: u8| Fields::new().u32(701).u16(1).u8(0).u8(flags).u32(0).u16(2);
    // Blocks 3 (0 in byte 0) and 9 (1 in byte 2) of the heap. Role 2 is the new tuple's map page, 3 the old one's.
    let run = |role: u8, flags: u8| {
        let piece = Piece::new((HEAP, UPDATE), main(flags)).role(role).others(&[(0, 3), (1, 9)]);
        let mut page = map();
        // The map's own block is 0.
        pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), 0, Lsn(0x80)).unwrap();
        (page[byte(3)], page[byte(9)], page::lsn(&page))
    };
    let set = Lsn(0x80);
    assert_eq!(run(2, 0), (0xFF, 0xFF, Lsn(0)), "nothing changed, so the LSN stays");
    assert_eq!(run(2, 1), (0xFF, 0xF3, set));
    assert_eq!(run(2, 2), (0x3F, 0xFF, set));
    assert_eq!(run(2, 3), (0x3F, 0xF3, set));
    assert_eq!(run(3, 1), (0xFF, 0xF3, set));
    // An old tuple whose map page is another.
    let piece = Piece::new((HEAP, UPDATE), main(3)).role(2).others(&[(0, 3), (1, 40_000)]);
    let mut page = map();
    pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), 0, Lsn(0x80)).unwrap();
    assert_eq!((page[byte(3)], page[byte(40_000 - 32_672)]), (0x3F, 0xFF));
}

#[test]
fn locks_clear_all_frozen_and_other_changes_both_bits() {
    for (kind, left) in [
        ((HEAP2, LOCK_UPDATED), 0x7F),
        ((HEAP, LOCK), 0x7F),
        ((HEAP2, MULTI_INSERT), 0x3F),
        ((HEAP, DELETE), 0x3F),
    ] {
        let piece = Piece::new(kind, Fields::new().u64(0)).role(1).others(&[(0, 3)]);
        let mut page = map();
        pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), 0, Lsn(0x80)).unwrap();
        assert_eq!(page[24], left, "{kind:?}");
        // Of a heap block that this map page does not hold.
        let piece = piece.others(&[(0, 32_672)]);
        assert!(pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), 0, Lsn(0x81)).is_err());
        let none = Piece { others: Vec::new(), ..piece };
        assert!(pgstrata_pg_redo::apply_block(&mut page, &none.encode(), 0, Lsn(0x81)).is_err());
    }
}

#[test]
fn r9_map_pages_come_into_being() {
    let visible = |flags: u8, heap: u32| {
        Piece::new((HEAP2, 0x40), Fields::new().u32(0).u8(flags)).others(&[(1, heap)])
    };
    let run = |piece: &Piece, page: &Page| {
        let mut page = *page;
        let found = pgstrata_pg_redo::apply_block(&mut page, &piece.encode(), 0, Lsn(0x80));
        found.map(|()| (page[24], page[12..20].to_vec(), page::lsn(&page))).ok()
    };
    let header = vec![24, 0, 0, 32, 0, 32, 4, 32];
    let new = [0; PAGE_SIZE];
    assert_eq!(run(&visible(1, 1), &new), Some((0x04, header.clone(), Lsn(0x80))));
    assert_eq!(run(&visible(3, 3), &new), Some((0xC0, header.clone(), Lsn(0x80))));
    // The flag for catalogs is not a bit of the map. Bits that are so already change nothing.
    assert_eq!(run(&visible(0x07, 0), &map()), Some((0xFF, header.clone(), Lsn(0))));
    assert_eq!(run(&visible(0x07, 1), &map()), Some((0xFF, header.clone(), Lsn(0))));
    assert_eq!(run(&visible(0x05, 0), &map()), Some((0xFF, header.clone(), Lsn(0x80))));
    assert_eq!(run(&visible(1, 32_672), &map()), None);
    let clear = Piece::new((HEAP, DELETE), Fields::new().u64(0)).role(1).others(&[(0, 3)]);
    assert_eq!(run(&clear, &new), Some((0, header, Lsn(0))), "nothing was set");
    // Other pages do not: a change of a page that does not exist is an error.
    let error = Piece::new((HEAP, DELETE), Fields::new().u64(0)).after(&new).err();
    assert_eq!(error, Some("the page was never initialised"));
}

#[test]
fn r8_the_flag_moves_the_lsn_if_hints_are_logged() {
    let piece = Piece::new((HEAP2, 0x40), Fields::new().u32(0).u8(1)).role(1).others(&[(0, 0)]);
    for (logged, lsn) in [(0x40, Lsn(0x80)), (0, Lsn(0))] {
        let mut value = piece.encode();
        value[0] = value[0] & !0x40 | logged;
        let mut page = with(&page(), |page| page[10] = 0);
        pgstrata_pg_redo::apply_block(&mut page, &value, 3, Lsn(0x80)).unwrap();
        assert_eq!((page[10], page::lsn(&page)), (ALL_VISIBLE, lsn));
    }
}
