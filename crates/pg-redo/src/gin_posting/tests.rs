//! Posting lists of GIN by hand (ginpostinglist.c): a TID is a number with 11 bits of offset; a segment is its first TID
//! (6 bytes), the length of what follows (2), and differences in bytes of 7 bits, lowest first, padded to an even length.
#![allow(clippy::unwrap_used)]

use super::*;

/// A page of items: `lower` behind them.
fn leaf(flags: u16, items: &[u8]) -> Page {
    let mut page = [0; PAGE_SIZE];
    page::init(&mut page, 8);
    page::put_u16(&mut page, gin::FLAGS, flags).unwrap();
    gin::set_data(&mut page, items).unwrap();
    page
}

const DATA: u16 = 1;
const LEAF: u16 = 2;

fn items(page: &Page) -> &[u8] {
    &page[DATA_START..usize::from(page::lower(page))]
}

fn after(before: &[u8], actions: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut page = leaf(DATA | LEAF | COMPRESSED, before);
    recompress(&mut page, actions).map_err(|bad| bad.0)?;
    Ok(items(&page).to_vec())
}

/// A segment that begins with block 1, offset 1.
fn segment(deltas: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 1, 0, 1, 0, deltas.len() as u8, 0];
    bytes.extend_from_slice(deltas);
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    bytes
}

#[test]
fn a_tid_is_a_number() {
    // Block 0x00030005, offset 7; the block's high half comes first.
    let raw = [3, 0, 5, 0, 7, 0];
    assert_eq!(tid_number(&raw).unwrap(), 0x0003_0005 << 11 | 7);
    assert_eq!(number_tid(0x0003_0005 << 11 | 7), raw);
    assert_eq!(number_tid(0xFFFF_FFFF << 11 | 0x7FF), [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 7]);
    assert_eq!(tid_number(&raw[..5]).unwrap_err().0, "a posting list is cut off");
}

#[test]
fn added_items_are_merged() {
    let add = |numbers: &[[u8; 6]]| {
        let mut actions = vec![1, 0, 0, ADD_ITEMS, numbers.len() as u8, 0];
        numbers.iter().for_each(|number| actions.extend_from_slice(number));
        after(&segment(&[4, 2]), &actions)
    };
    // (1,1), (1,5), (1,7).
    let tid = |block: u8, offset: u8| [0, 0, block, 0, offset, 0];
    assert_eq!(add(&[tid(1, 3)]), Ok(segment(&[2, 2, 2])));
    assert_eq!(add(&[tid(1, 5)]), Ok(segment(&[4, 2])), "it is there already");
    assert_eq!(add(&[tid(1, 6), tid(1, 8)]), Ok(segment(&[4, 1, 1, 1])));
    // A difference of 127 is one byte, of 128 two.
    assert_eq!(add(&[tid(1, 134)]), Ok(segment(&[4, 2, 0x7F])));
    assert_eq!(add(&[tid(1, 135)]), Ok(segment(&[4, 2, 0x80, 1])));
    // The next block: 2048 further.
    assert_eq!(add(&[tid(2, 7)]), Ok(segment(&[4, 2, 0x80, 0x10])));
    let first = add(&[tid(0, 9)]).unwrap();
    assert_eq!(first, [0, 0, 0, 0, 9, 0, 4, 0, 0xF8, 0x0F, 4, 2]);
    assert_eq!(add(&[tid(1, 9), tid(1, 3)]), Err("TIDs are out of order"));
}

#[test]
fn segments_are_inserted_replaced_and_deleted() {
    let (a, b, c) = (segment(&[1]), segment(&[2, 2]), segment(&[3]));
    let before = [a.clone(), b.clone()].concat();
    let act = |actions: &[u8]| after(&before, actions);
    assert_eq!(act(&[0, 0]), Ok(before.clone()));
    assert_eq!(act(&[1, 0, 0, DELETE]), Ok(b.clone()));
    assert_eq!(act(&[1, 0, 1, DELETE]), Ok(a.clone()));
    let with = |actions: &[u8], segment: &[u8]| [actions, segment].concat();
    assert_eq!(act(&with(&[1, 0, 1, INSERT], &c)), Ok([&a[..], &c, &b].concat()));
    assert_eq!(act(&with(&[1, 0, 1, REPLACE], &c)), Ok([&a[..], &c].concat()));
    // An inserted segment is not one of those that are counted.
    let both = [&with(&[2, 0, 0, INSERT], &c)[..], &[0, DELETE]].concat();
    assert_eq!(act(&both), Ok([&c[..], &b].concat()));
    assert_eq!(act(&[2, 0, 0, DELETE, 1, DELETE]), Ok(vec![]));
    let cut = "a posting list is cut off";
    assert_eq!(act(&[1, 0, 3, DELETE]), Err("the record's data ends too early"));
    assert_eq!(act(&with(&[1, 0, 0, INSERT], &b[..9])), Err(cut));
    assert_eq!(act(&[1, 0, 0, 5]), Err("unknown action on a posting list"));
}

#[test]
fn old_pages_are_compressed_first() {
    // Of before PostgreSQL 9.4: plain TIDs, their number in maxoff.
    let plain = [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 5, 0], [0, 0, 1, 0, 7, 0]].concat();
    let mut page = leaf(DATA | LEAF, &plain);
    page::put_u16(&mut page, gin::MAX_OFFSET, 3).unwrap();
    recompress(&mut page, &[0, 0]).unwrap();
    assert_eq!(items(&page), segment(&[4, 2]));
    assert_eq!(page::get_u16(&page, gin::FLAGS), Ok(DATA | LEAF | COMPRESSED));
    assert_eq!(page::get_u16(&page, gin::MAX_OFFSET), Ok(0));
    // 1360 TIDs are as many as the page's 8160 bytes hold.
    let mut page = leaf(DATA | LEAF, &[]);
    page::put_u16(&mut page, gin::MAX_OFFSET, 1361).unwrap();
    assert_eq!(recompress(&mut page, &[0, 0]).unwrap_err().0, "items are longer than the page");
    // Without any there is no segment.
    let mut page = leaf(DATA | LEAF, &[]);
    recompress(&mut page, &[0, 0]).unwrap();
    assert_eq!(items(&page), [0; 0]);
}

#[test]
fn a_number_has_at_most_seven_bytes() {
    let add = |deltas: &[u8]| after(&segment(deltas), &[1, 0, 0, ADD_ITEMS, 0, 0]);
    let seven = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1];
    assert_eq!(add(&seven[1..]), Ok(segment(&seven[1..])));
    assert_eq!(add(&[0xFF; 7]), Err("a posting list has an endless number"));
    assert_eq!(add(&[0x80]), Err("the record's data ends too early"));
    assert_eq!(add(&[]), Ok(segment(&[])));
}
