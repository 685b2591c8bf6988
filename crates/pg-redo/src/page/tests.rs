//! Pages made by hand: exact results, and errors at the exact bounds.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

/// A page whose items lie in the given order of their numbers, each behind a gap.
fn page_of(items: &[(usize, usize)], order: &[usize]) -> Page {
    let mut page = [0; PAGE_SIZE];
    set_lower(&mut page, (HEADER_SIZE + items.len() * LINE_SIZE) as u16);
    put_u32(&mut page, 16, (8192 | 4) << 16 | 8192).unwrap();
    let mut at = PAGE_SIZE;
    for &index in order {
        let (length, gap) = items[index];
        at -= max_align(length) + max_align(gap);
        page[at..at + max_align(length)].fill(index as u8 + 1);
        let line = Line::normal(at as u16, length as u16);
        put_u32(&mut page, HEADER_SIZE + index * LINE_SIZE, line.to_word()).unwrap();
    }
    set_upper(&mut page, at as u16);
    page
}

fn item_of(length: usize, byte: u8) -> Vec<u8> {
    vec![byte; length]
}

/// A page with a special space of 16 bytes and items of these lengths, each filled with its number.
fn filled(lengths: &[usize]) -> Page {
    let mut page = [0; PAGE_SIZE];
    init(&mut page, 16);
    for (index, length) in lengths.iter().enumerate() {
        let number = index as u16 + 1;
        add_item(&mut page, &item_of(*length, number as u8), number, Add::Insert).unwrap();
    }
    page
}

/// Header fields: lower, upper, special, flags.
fn bounds(page: &Page) -> (u16, u16, u16, u16) {
    (lower(page), upper(page), special(page), flags(page))
}

fn set_bounds(page: &mut Page, lower: u16, upper: u16, special: u16) {
    for (at, value) in [(12, lower), (14, upper), (16, special)] {
        page[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
}

/// Where the items are, by number: offset and length.
fn layout(page: &Page) -> Vec<(u16, u16)> {
    (1..=line_count(page))
        .map(|number| line(page, number).unwrap())
        .map(|line| (line.offset, line.length))
        .collect()
}

/// The first byte of each item, by number; 0 without storage.
fn contents(page: &Page) -> Vec<u8> {
    (1..=line_count(page))
        .map(|number| item(page, number).unwrap().first().map_or(0, |b| *b))
        .collect()
}

const OUTSIDE: Bad = Bad("an offset points outside of the page");
const NO_LINE: Bad = Bad("the page has no line pointer of that number");
const LINE_OUTSIDE: Bad = Bad("a line pointer points outside of the page");
const CORRUPT: Bad = Bad("the page header's bounds are corrupt");
const NO_ROOM: Bad = Bad("the page has no room for the item");
const TOO_LONG: Bad = Bad("items are longer than the page");

#[test]
fn numbers_are_read_and_written_within_the_page() {
    let mut page = [0; PAGE_SIZE];
    assert_eq!(put_u16(&mut page, 8190, 0x0201), Ok(()));
    assert_eq!(page[8189..], [0, 1, 2]);
    assert_eq!(get_u16(&page, 8190), Ok(0x0201));
    assert_eq!(get_u16(&page, 8191), Err(OUTSIDE));
    assert_eq!(put_u16(&mut page, 8191, 1), Err(OUTSIDE));
    assert_eq!(put_u32(&mut page, 8188, 0x0403_0201), Ok(()));
    assert_eq!(page[8187..], [0, 1, 2, 3, 4]);
    assert_eq!(get_u32(&page, 8188), Ok(0x0403_0201));
    assert_eq!(get_u32(&page, 8187), Ok(0x0302_0100));
    assert_eq!(get_u32(&page, 8189), Err(OUTSIDE));
    assert_eq!(put_u32(&mut page, 8189, 1), Err(OUTSIDE));
    assert_eq!(put(&mut page, 8192, &[]), Ok(()));
    assert_eq!(put(&mut page, 8192, &[1]), Err(OUTSIDE));
}

#[test]
fn the_header_has_its_fields_where_postgresql_has_them() {
    let mut page = [0; PAGE_SIZE];
    init(&mut page, 16);
    assert_eq!(
        page[..24],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0xF0, 0x1F, 0xF0, 0x1F, 4, 0x20, 0, 0, 0, 0]
    );
    // The special space is aligned.
    init(&mut page, 9);
    assert_eq!(bounds(&page), (24, 8176, 8176, 0));
    init(&mut page, 0);
    assert_eq!(bounds(&page), (24, 8192, 8192, 0));

    set_lsn(&mut page, Lsn(0x0102_0304_0506_0708));
    assert_eq!(page[..8], [4, 3, 2, 1, 8, 7, 6, 5], "the high half comes first");
    assert_eq!(lsn(&page), Lsn(0x0102_0304_0506_0708));
    set_prune_xid(&mut page, 0x0403_0201);
    assert_eq!((&page[20..25], prune_xid(&page)), (&[1, 2, 3, 4, 0][..], 0x0403_0201));
    set_flags(&mut page, 0x0105);
    assert_eq!(page[10..12], [5, 1]);
    set_flag(&mut page, ALL_VISIBLE, false);
    assert_eq!(flags(&page), 0x0101);
    set_flag(&mut page, HAS_FREE_LINES, false);
    set_flag(&mut page, PAGE_FULL, true);
    set_flag(&mut page, PAGE_FULL, true);
    assert_eq!(flags(&page), 0x0102);

    assert!(!is_new(&page));
    set_upper(&mut page, 0x0100);
    assert!(!is_new(&page));
    set_upper(&mut page, 0);
    assert!(is_new(&page));
    assert_eq!([0, 1, 7, 8, 9].map(max_align), [0, 8, 8, 8, 16]);
}

#[test]
fn a_line_pointer_is_a_word() {
    let word = 0x1FF8 | 2 << 15 | 0x1234 << 17;
    let line = Line { offset: 0x1FF8, flags: 2, length: 0x1234 };
    assert_eq!(Line::from_word(word), line);
    assert_eq!(line.to_word(), word);
    assert_eq!(line.range(), 0x1FF8..0x1FF8 + 0x1234);
    let all = Line { offset: 0x7FFF, flags: 3, length: 0x7FFF };
    assert_eq!((Line::from_word(u32::MAX), all.to_word()), (all, u32::MAX));
    // An offset that is too long does not spill into the flags.
    assert_eq!(Line { offset: 0x8001, flags: 0, length: 0 }.to_word(), 1);
    let told = |line: Line| (line.is_used(), line.is_normal(), line.has_storage());
    assert_eq!(told(Line::normal(8000, 8)), (true, true, true));
    assert_eq!(told(Line::redirect(5)), (true, false, false));
    assert_eq!(told(Line::DEAD), (true, false, false));
    assert_eq!(told(Line::UNUSED), (false, false, false));
    assert_eq!(Line::redirect(5).to_word(), 5 | 2 << 15);
    assert_eq!(Line::normal(8000, 8).to_word(), 8000 | 1 << 15 | 8 << 17);
    assert_eq!(Line::DEAD.to_word(), 3 << 15);
}

#[test]
fn line_pointers_are_counted_from_one() {
    let mut page = filled(&[8, 8]);
    assert_eq!(line_count(&page), 2);
    assert_eq!(line(&page, 0), Err(NO_LINE));
    assert_eq!(line(&page, 1), Ok(Line::normal(8168, 8)));
    assert_eq!(line(&page, 2), Ok(Line::normal(8160, 8)));
    assert_eq!(line(&page, 3), Err(NO_LINE));
    assert_eq!(set_line(&mut page, 0, Line::DEAD), Err(NO_LINE));
    assert_eq!(set_line(&mut page, 3, Line::DEAD), Err(NO_LINE));
    assert_eq!(set_line(&mut page, 2, Line::DEAD), Ok(()));
    assert_eq!(page[28..32], (3u32 << 15).to_le_bytes());
    // A lower bound that cuts a line pointer, or is none.
    for (bound, count) in
        [(0, 0), (23, 0), (24, 0), (27, 0), (28, 1), (8191, 2041), (8192, 2042), (65_535, 2042)]
    {
        set_lower(&mut page, bound);
        assert_eq!(line_count(&page), count, "{bound}");
    }
}

#[test]
fn items_end_within_the_page() {
    let mut page = filled(&[8]);
    set_line(&mut page, 1, Line::normal(8188, 4)).unwrap();
    assert_eq!(item(&page, 1).map(<[u8]>::len), Ok(4));
    assert_eq!(item_mut(&mut page, 1).map(|item| item.len()), Ok(4));
    set_line(&mut page, 1, Line::normal(8188, 5)).unwrap();
    assert_eq!(item(&page, 1), Err(LINE_OUTSIDE));
    assert_eq!(item_mut(&mut page, 1), Err(LINE_OUTSIDE));
    assert_eq!(item(&page, 2), Err(NO_LINE));
    assert_eq!(item_mut(&mut page, 2), Err(NO_LINE));
}

#[test]
fn bounds_that_contradict_each_other_are_refused() {
    let try_add = |lower, upper, special| {
        let mut page = [0; PAGE_SIZE];
        set_bounds(&mut page, lower, upper, special);
        add_item(&mut page, &[], 1, Add::Insert)
    };
    assert_eq!(try_add(24, 8192, 8192), Ok(()));
    assert_eq!(try_add(24, 28, 28), Ok(()), "room for the line pointer");
    assert_eq!(try_add(24, 27, 28), Err(NO_ROOM));
    assert_eq!(try_add(24, 24, 24), Err(NO_ROOM));
    assert_eq!(try_add(23, 8192, 8192), Err(CORRUPT));
    assert_eq!(try_add(8001, 8000, 8192), Err(CORRUPT));
    assert_eq!(try_add(24, 8185, 8184), Err(CORRUPT));
    assert_eq!(try_add(24, 8192, 8193), Err(CORRUPT));
    let mut page = [0; PAGE_SIZE];
    assert_eq!(repair_fragmentation(&mut page), Err(CORRUPT));
    assert_eq!(truncate_lines(&mut page), Err(CORRUPT));
    assert_eq!(delete_item(&mut page, 1), Err(CORRUPT));
    assert_eq!(delete_items(&mut page, |_| 1, 3), Err(CORRUPT));
    assert_eq!(delete_item_keeping_numbers(&mut page, 1), Err(CORRUPT));
    assert_eq!(overwrite_item(&mut page, 1, &[]), Err(CORRUPT));
    assert_eq!(empty_copy(&page).err(), Some(CORRUPT));
}

#[test]
fn items_are_added_below_the_others() {
    let mut page = filled(&[5, 8]);
    assert_eq!(layout(&page), [(8168, 5), (8160, 8)]);
    assert_eq!(bounds(&page), (32, 8160, 8176, 0));
    // Padding keeps what was there.
    page[8152 + 3] = 0xAA;
    add_item(&mut page, &[9; 3], 1, Add::Insert).unwrap();
    assert_eq!(layout(&page), [(8152, 3), (8168, 5), (8160, 8)]);
    assert_eq!((contents(&page), page[8155]), (vec![9, 1, 2], 0xAA));
    assert_eq!(bounds(&page), (36, 8152, 8176, 0));
    let gap = Bad("the item would leave a gap in the line pointers");
    assert_eq!(add_item(&mut page, &[1], 0, Add::Insert), Err(gap));
    assert_eq!(add_item(&mut page, &[1], 5, Add::Insert), Err(gap));
    let used = Bad("the line pointer is in use");
    assert_eq!(add_item(&mut page, &[1], 3, Add::Heap), Err(used));
    assert_eq!(add_item(&mut page, &[1], 3, Add::Overwrite), Err(used));
    set_line(&mut page, 3, Line { flags: 0, ..Line::normal(8160, 8) }).unwrap();
    assert_eq!(add_item(&mut page, &[1], 3, Add::Heap), Err(used), "it has storage");
    set_line(&mut page, 3, Line::DEAD).unwrap();
    assert_eq!(add_item(&mut page, &[1], 3, Add::Heap), Err(used));
    set_line(&mut page, 3, Line::UNUSED).unwrap();
    assert_eq!(add_item(&mut page, &[7], 3, Add::Heap), Ok(()));
    assert_eq!(layout(&page), [(8152, 3), (8168, 5), (8144, 1)]);
    assert_eq!(bounds(&page), (36, 8144, 8176, 0), "no line pointer was added");
    assert_eq!(add_item(&mut page, &[8], 4, Add::Overwrite), Ok(()));
    assert_eq!(bounds(&page), (40, 8136, 8176, 0));
}

#[test]
fn an_item_takes_the_last_room() {
    let mut page = [0; PAGE_SIZE];
    set_bounds(&mut page, 24, 8192, 8192);
    assert_eq!(add_item(&mut page, &item_of(8165, 1), 1, Add::Insert), Err(NO_ROOM));
    assert_eq!(add_item(&mut page, &item_of(8193, 1), 1, Add::Insert), Err(NO_ROOM));
    assert_eq!(add_item(&mut page, &item_of(8160, 1), 1, Add::Insert), Ok(()));
    assert_eq!(bounds(&page), (28, 32, 8192, 0));
    assert_eq!(add_item(&mut page, &[], 2, Add::Insert), Ok(()));
    assert_eq!(add_item(&mut page, &[], 3, Add::Insert), Err(NO_ROOM));
}

#[test]
fn a_heap_page_has_at_most_291_line_pointers() {
    let mut page = [0; PAGE_SIZE];
    init(&mut page, 0);
    set_lower(&mut page, 24 + 290 * 4);
    assert_eq!(add_item(&mut page, &[1], 291, Add::Heap), Ok(()));
    let many = Bad("the page has too many line pointers");
    assert_eq!(add_item(&mut page, &[1], 292, Add::Heap), Err(many));
    assert_eq!(add_item(&mut page, &[1], 292, Add::Overwrite), Ok(()));
    assert_eq!(add_item(&mut page, &[1], 293, Add::Insert), Ok(()));
}

#[test]
fn repair_cuts_trailing_unused_line_pointers() {
    let repaired = |unused: &[u16]| {
        let mut page = filled(&[8, 16, 8, 24]);
        for number in unused {
            set_line(&mut page, *number, Line { offset: 5, flags: 0, length: 3 }).unwrap();
        }
        set_line(&mut page, 1, Line::redirect(2)).unwrap();
        repair_fragmentation(&mut page).unwrap();
        (layout(&page), bounds(&page))
    };
    // The first of them has no storage.
    let all = vec![(2, 0), (8160, 16), (8152, 8), (8128, 24)];
    assert_eq!(repaired(&[]), (all, (40, 8128, 8176, 0)));
    let one = vec![(2, 0), (0, 0), (8168, 8), (8144, 24)];
    assert_eq!(repaired(&[2]), (one, (40, 8144, 8176, HAS_FREE_LINES)));
    assert_eq!(repaired(&[4]), (vec![(2, 0), (8160, 16), (8152, 8)], (36, 8152, 8176, 0)));
    assert_eq!(repaired(&[3, 4]), (vec![(2, 0), (8160, 16)], (32, 8160, 8176, 0)));
    let both = vec![(2, 0), (0, 0), (8168, 8)];
    assert_eq!(repaired(&[2, 4]), (both, (36, 8168, 8176, HAS_FREE_LINES)));
    assert_eq!(repaired(&[2, 3, 4]), (vec![(2, 0)], (28, 8176, 8176, 0)));
}

#[test]
fn compaction_keeps_to_the_page() {
    // Items of 24 bytes are from 8152 to 8176, where the special space begins.
    let repaired = |upper: u16, lines: &[Line]| {
        let mut page = filled(&vec![8; lines.len()]);
        for (index, line) in lines.iter().enumerate() {
            set_line(&mut page, index as u16 + 1, *line).unwrap();
        }
        set_upper(&mut page, upper);
        repair_fragmentation(&mut page)
    };
    let not_an_item = Err(Bad("a line pointer points outside of the items"));
    assert_eq!(repaired(8160, &[Line::normal(8160, 8)]), Ok(()));
    assert_eq!(repaired(8160, &[Line::normal(8152, 8)]), not_an_item, "before all items");
    assert_eq!(repaired(8160, &[Line::normal(8160, 17)]), not_an_item, "into the special space");
    assert_eq!(repaired(8160, &[Line::normal(8184, 8)]), not_an_item, "in the special space");
    assert_eq!(repaired(8160, &[Line::normal(8184, 9)]), not_an_item, "outside of the page");
    // The first is where it belongs, and no other may be there.
    let (rest, other) = (Line::normal(8160, 16), Line::normal(8160, 8));
    assert_eq!(repaired(8144, &[rest, Line::normal(8144, 8)]), Ok(()));
    assert_eq!(repaired(8144, &[rest, other]), not_an_item);
    assert_eq!(repaired(8144, &[other, rest]), Ok(()), "none of them is where it belongs");
    // Above the line pointers there is room for 8148 bytes.
    assert_eq!(repaired(32, &[Line::normal(32, 8136)]), Ok(()));
    assert_eq!(repaired(32, &[Line::normal(32, 8144)]), Ok(()));
    assert_eq!(repaired(28, &[Line::normal(24, 8152)]), Err(TOO_LONG));
    // Two line pointers end at 32, and so may items begin.
    assert_eq!(repaired(32, &[Line::normal(40, 8128), Line::normal(32, 16)]), Ok(()));
    assert_eq!(repaired(32, &[Line::normal(40, 8128), Line::normal(32, 17)]), Err(TOO_LONG));
    let half = Line::normal(4000, 4080);
    assert_eq!(repaired(32, &[half, half]), Err(TOO_LONG), "the same bytes twice");
    assert_eq!(repaired(32, &[Line::normal(4000, 4072), Line::normal(4000, 4064)]), Ok(()));
}

#[test]
fn items_are_copied_as_they_were() {
    // Each would overwrite the next, if it were moved before.
    for lengths in [[600, 504, 400], [1600, 1400, 1000], [3000, 2504, 2400]] {
        let mut page = filled(&lengths);
        let old = contents(&page);
        let lines = [3, 1, 2].map(|number| line(&page, number).unwrap());
        for (number, line) in (1..).zip(lines) {
            set_line(&mut page, number, line).unwrap();
        }
        repair_fragmentation(&mut page).unwrap();
        assert_eq!(contents(&page), [old[2], old[0], old[1]]);
        for (number, byte) in [(1, 3), (2, 1), (3, 2)] {
            assert!(item(&page, number).unwrap().iter().all(|found| *found == byte));
        }
        assert_eq!(usize::from(upper(&page)), 8176 - lengths.iter().sum::<usize>());
    }
}

#[test]
fn truncation_keeps_the_first_line_pointer() {
    let truncated = |unused: &[u16]| {
        let mut page = filled(&[8, 8, 8]);
        unused.iter().for_each(|number| set_line(&mut page, *number, Line::UNUSED).unwrap());
        truncate_lines(&mut page).unwrap();
        bounds(&page)
    };
    assert_eq!(truncated(&[]), (36, 8152, 8176, 0));
    assert_eq!(truncated(&[3]), (32, 8152, 8176, 0));
    assert_eq!(truncated(&[2]), (36, 8152, 8176, HAS_FREE_LINES));
    assert_eq!(truncated(&[2, 3]), (28, 8152, 8176, 0));
    assert_eq!(truncated(&[1, 3]), (32, 8152, 8176, HAS_FREE_LINES));
    assert_eq!(truncated(&[1, 2, 3]), (28, 8152, 8176, HAS_FREE_LINES));
    let mut page = filled(&[]);
    truncate_lines(&mut page).unwrap();
    assert_eq!(bounds(&page), (24, 8176, 8176, 0));
}

#[test]
fn an_item_is_deleted_with_its_line_pointer() {
    let mut page = filled(&[8, 15, 24]);
    delete_item(&mut page, 2).unwrap();
    assert_eq!(layout(&page), [(8168, 8), (8144, 24)]);
    assert_eq!((contents(&page), bounds(&page)), (vec![1, 3], (32, 8144, 8176, 0)));
    assert_eq!(delete_item(&mut page, 3), Err(NO_LINE));
    delete_item(&mut page, 2).unwrap();
    delete_item(&mut page, 1).unwrap();
    assert_eq!(bounds(&page), (24, 8176, 8176, 0));

    // Line pointers without storage do not move.
    let mut page = filled(&[8, 8, 8]);
    set_line(&mut page, 1, Line { offset: 100, flags: 3, length: 0 }).unwrap();
    delete_item(&mut page, 2).unwrap();
    assert_eq!(layout(&page), [(100, 0), (8160, 8)]);
}

#[test]
fn an_item_is_deleted_and_the_others_keep_their_numbers() {
    let mut page = filled(&[8, 16, 24]);
    delete_item_keeping_numbers(&mut page, 2).unwrap();
    assert_eq!(layout(&page), [(8168, 8), (0, 0), (8144, 24)]);
    assert_eq!((contents(&page), lower(&page)), (vec![1, 0, 3], 36));
    delete_item_keeping_numbers(&mut page, 3).unwrap();
    assert_eq!((layout(&page), lower(&page)), (vec![(8168, 8), (0, 0)], 32));
    assert_eq!(delete_item_keeping_numbers(&mut page, 3), Err(NO_LINE));
}

#[test]
fn more_than_two_items_are_deleted_by_compaction() {
    // The items lie against the order of their numbers.
    let mut page = filled(&[]);
    for byte in 1..=5 {
        add_item(&mut page, &[byte; 8], 1, Add::Insert).unwrap();
    }
    assert_eq!(contents(&page), [5, 4, 3, 2, 1]);
    let delete = |numbers: &[u16]| {
        let mut page = page;
        delete_items(&mut page, |at| numbers[at], numbers.len()).unwrap();
        (contents(&page), layout(&page))
    };
    assert_eq!(delete(&[]), (vec![5, 4, 3, 2, 1], layout(&page)));
    assert_eq!(delete(&[2]).0, [5, 3, 2, 1]);
    // Two: the physical order stays. Three: it becomes that of the numbers.
    assert_eq!(delete(&[1, 2]), (vec![3, 2, 1], vec![(8152, 8), (8160, 8), (8168, 8)]));
    assert_eq!(delete(&[1, 2, 3]), (vec![2, 1], vec![(8168, 8), (8160, 8)]));
    assert_eq!(delete(&[1, 3, 5]), (vec![4, 2], vec![(8168, 8), (8160, 8)]));
    assert_eq!(delete(&[1, 2, 3, 4, 5]), (vec![], vec![]));
    for numbers in [[3, 2, 1], [1, 2, 6], [2, 2, 3], [0, 1, 2]] {
        let mut page = page;
        let missing = Bad("items to delete are missing or out of order");
        assert_eq!(delete_items(&mut page, |at| numbers[at], 3), Err(missing), "{numbers:?}");
    }
}

#[test]
fn an_overwritten_item_moves_what_is_below() {
    let mut page = filled(&[8, 16, 8]);
    set_line(&mut page, 2, Line { flags: 3, ..Line::normal(8152, 16) }).unwrap();
    overwrite_item(&mut page, 2, &[7; 14]).unwrap();
    assert_eq!(layout(&page), [(8168, 8), (8152, 14), (8144, 8)], "the same room");
    assert_eq!(line(&page, 2).map(|line| line.flags), Ok(3));
    assert_eq!(page[8152..8168], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 2, 2]);
    overwrite_item(&mut page, 2, &[6; 17]).unwrap();
    assert_eq!(layout(&page), [(8168, 8), (8144, 17), (8136, 8)]);
    assert_eq!((contents(&page), upper(&page)), (vec![1, 6, 3], 8136));
    overwrite_item(&mut page, 2, &[5; 8]).unwrap();
    assert_eq!(layout(&page), [(8168, 8), (8160, 8), (8152, 8)]);
    assert_eq!((contents(&page), upper(&page)), (vec![1, 5, 3], 8152));
    assert_eq!(overwrite_item(&mut page, 4, &[]), Err(NO_LINE));
    // It may grow down to the line pointers.
    let grow = |length| overwrite_item(&mut { page }, 1, &item_of(length, 1));
    assert_eq!(grow(8 + 8152 - 40), Ok(()));
    assert_eq!(grow(8 + 8152 - 39), Err(LINE_OUTSIDE));
    assert_eq!(grow(16 * 1024), Err(TOO_LONG));
    let two = filled(&[8, 8]);
    let grow = |length| overwrite_item(&mut { two }, 1, &item_of(length, 1));
    assert_eq!(grow(8 + 8160 - 32), Ok(()));
    assert_eq!(grow(8 + 8160 - 24), Err(LINE_OUTSIDE));
}

#[test]
fn what_slides_stays_within_the_page() {
    let delete = |change: Line| {
        let mut page = filled(&[8, 8]);
        set_line(&mut page, 2, change).unwrap();
        delete_item(&mut page, 2)
    };
    assert_eq!(delete(Line::normal(8160, 8)), Ok(()));
    // Above the special space there is no end of it; nothing is copied past the page.
    assert_eq!(delete(Line::normal(8160, 24)), Ok(()));
    assert_eq!(delete(Line::normal(8160, 32)), Ok(()));
    assert_eq!(delete(Line::normal(8160, 40)), Err(LINE_OUTSIDE));
    assert_eq!(delete(Line::normal(8159, 8)), Err(LINE_OUTSIDE), "above the others");
}

#[test]
fn a_copy_has_the_special_space_only() {
    let mut page = filled(&[8]);
    page[8176..].fill(7);
    let copy = empty_copy(&page).unwrap();
    let mut expected = [0; PAGE_SIZE];
    init(&mut expected, 16);
    expected[8176..].fill(7);
    assert!(copy == expected);
    set_bounds(&mut page, 24, 8180, 8180);
    assert_eq!(empty_copy(&page).err(), Some(CORRUPT), "it is not aligned");

    assert_eq!(special_at(&copy, 16), Ok(8176));
    let other = Bad("the page is not of the expected access method");
    assert_eq!(special_at(&copy, 8), Err(other));
    assert_eq!(special_at(&copy, 24), Err(other));
}

proptest! {
    /// Whatever the order in which items lie, whatever is dead.
    #[test]
    fn compaction_keeps_what_is_alive(
        items in prop::collection::vec((1..250usize, 0..60usize, 0..6), 1..25),
        seed in any::<u64>(),
        shuffle in any::<bool>(),
    ) {
        let mut order: Vec<usize> = (0..items.len()).collect();
        if shuffle {
            order.sort_by_key(|index| (*index as u64 + 1).wrapping_mul(seed | 1));
        }
        let sizes: Vec<(usize, usize)> = items.iter().map(|(length, gap, _)| (*length, *gap)).collect();
        let mut page = page_of(&sizes, &order);
        for (number, (_, _, kind)) in (1..).zip(&items) {
            match kind {
                0 => set_line(&mut page, number, Line::UNUSED).unwrap(),
                1 => set_line(&mut page, number, Line::DEAD).unwrap(),
                2 => set_line(&mut page, number, Line::redirect(7)).unwrap(),
                _ => {}
            }
        }
        repair_fragmentation(&mut page).unwrap();
        let mut end = PAGE_SIZE;
        let last_used = items.iter().rposition(|(_, _, kind)| *kind != 0).map_or(0, |at| at + 1);
        prop_assert_eq!(usize::from(line_count(&page)), last_used);
        for (number, (length, _, kind)) in (1..).zip(&items).take(last_used) {
            let found = line(&page, number).unwrap();
            match kind {
                0 => prop_assert_eq!(found, Line::UNUSED),
                1 => prop_assert_eq!(found, Line::DEAD),
                2 => prop_assert_eq!(found, Line::redirect(7)),
                _ => {
                    end -= max_align(*length);
                    prop_assert_eq!(found, Line::normal(end as u16, *length as u16));
                    prop_assert!(page[end..end + length].iter().all(|&byte| byte == number as u8));
                }
            }
        }
        prop_assert_eq!(end, usize::from(upper(&page)));
        let unused = items[..last_used].iter().any(|(_, _, kind)| *kind == 0);
        prop_assert_eq!(flags(&page) & HAS_FREE_LINES != 0, unused);
    }
}
