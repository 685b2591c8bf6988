//! Values of SLRU pages, applied: where PostgreSQL keeps each entry (clog.c, multixact.c, commit_ts.c), and which
//! segments a truncation removes (slru.c).
#![allow(clippy::unwrap_used)]

mod support;

use pgstrata_ids::{Lsn, PAGE_SIZE, SlruKind};
use pgstrata_pg_redo::{
    CLOG_XACTS_PER_PAGE, COMMIT_TS_PER_PAGE, MEMBERS_PER_PAGE, OFFSETS_PER_PAGE, Page, RedoError,
    apply_slru, is_complete_slru, is_truncated,
};
use support::Fields;

fn apply(page: &mut Page, value: Fields) -> Result<(), RedoError> {
    apply_slru(page, &value.0, Lsn(0x80))
}

/// The bytes of a page that are not zero.
fn content(page: &Page) -> Vec<(usize, u8)> {
    page.iter().copied().enumerate().filter(|(_, byte)| *byte != 0).collect()
}

fn refused(value: Fields) -> &'static str {
    match apply(&mut [0; PAGE_SIZE], value) {
        Err(RedoError::Value { end_lsn: Lsn(0x80), reason }) => reason,
        other => panic!("{other:?}"),
    }
}

const OUTSIDE: &str = "an SLRU entry is outside of its page";
const CUT_OFF: &str = "the record's data ends too early";

#[test]
fn entries_per_page() {
    assert_eq!((CLOG_XACTS_PER_PAGE, OFFSETS_PER_PAGE), (32_768, 2_048));
    assert_eq!((MEMBERS_PER_PAGE, COMMIT_TS_PER_PAGE), (1_636, 819));
}

#[test]
fn a_status_is_two_bits() {
    let mut page = [0; PAGE_SIZE];
    page[1] = 0b11_10_01_00;
    // Committed, as the sixth and the last transaction of the page; the others' bits stay.
    apply(&mut page, Fields::new().u8(2).u8(1).u16(6).u16(32_767)).unwrap();
    assert_eq!(content(&page), [(1, 0b11_01_01_00), (8191, 0b01_00_00_00)]);
    apply(&mut page, Fields::new().u8(2).u8(2).u16(4).u16(32_767)).unwrap();
    assert_eq!(content(&page), [(1, 0b11_01_01_10), (8191, 0b10_00_00_00)]);
    // No more than two bits.
    apply(&mut page, Fields::new().u8(2).u8(0xFC).u16(4)).unwrap();
    assert_eq!(content(&page), [(1, 0b11_01_01_00), (8191, 0b10_00_00_00)]);
    assert_eq!(refused(Fields::new().u8(2).u8(1).u16(32_768)), OUTSIDE);
    assert_eq!(refused(Fields::new().u8(2).u8(1).u8(0)), CUT_OFF);
}

#[test]
fn an_offset_that_is_set_stays() {
    let mut page = [0; PAGE_SIZE];
    page[4..8].copy_from_slice(&[9, 0, 0, 0]);
    apply(&mut page, Fields::new().u8(3).u16(1).u32(10).u16(2).u32(0x0102).u16(2047).u32(7))
        .unwrap();
    assert_eq!(content(&page), [(4, 9), (8, 2), (9, 1), (8188, 7)]);
    // On a page of zeros nothing is set.
    apply(&mut page, Fields::new().u8(4).u16(1).u32(10)).unwrap();
    assert_eq!(content(&page), [(4, 10)]);
    apply(&mut page, Fields::new().u8(1)).unwrap();
    assert_eq!(content(&page), []);
    assert_eq!(refused(Fields::new().u8(3).u16(2048).u32(1)), OUTSIDE);
    assert_eq!(refused(Fields::new().u8(3).u16(1).u16(1)), CUT_OFF);
}

#[test]
fn members_are_in_groups_of_four() {
    // A group is four bytes of flags, then four transactions.
    let mut page = [0; PAGE_SIZE];
    let member = |index, status, xid| Fields::new().u8(5).u16(index).u8(status).u32(xid);
    apply(&mut page, member(6, 5, 0x0102)).unwrap();
    assert_eq!(content(&page), [(22, 5), (32, 2), (33, 1)]);
    let mut page = [0; PAGE_SIZE];
    apply(&mut page, member(1635, 1, 3)).unwrap();
    assert_eq!(content(&page), [(8163, 1), (8176, 3)]);
    // Behind the last group there are 12 bytes, of which the flags would still be on the page.
    assert_eq!(refused(member(1639, 1, 3)), OUTSIDE);
}

#[test]
fn commit_timestamps_are_ten_bytes() {
    let mut page = [0; PAGE_SIZE];
    let value = Fields::new().u8(6).u64(0x0A09_0807_0605_0403).u16(0x0201);
    apply(&mut page, value.clone().u16(1).u16(818)).unwrap();
    let entry = [3, 4, 5, 6, 7, 8, 9, 10, 1, 2];
    assert_eq!(page[10..20], entry);
    assert_eq!(page[8180..8190], entry);
    assert_eq!(content(&page).len(), 20);
    assert_eq!(refused(value.u16(819)), OUTSIDE);
    assert_eq!(refused(Fields::new().u8(6).u64(1).u8(0)), CUT_OFF);
}

#[test]
fn values_that_need_no_older_page_are_known() {
    for (kind, complete) in [(1, true), (2, false), (3, false), (4, true), (5, false), (6, false)] {
        assert_eq!(is_complete_slru(&[kind]), complete);
    }
    assert!(!is_complete_slru(&[]));
    assert_eq!(refused(Fields::new().u8(7)), "unknown kind of SLRU value");
    assert_eq!(refused(Fields::new()), CUT_OFF);
}

#[test]
fn a_truncation_removes_segments_that_are_all_before_the_cutoff() {
    use SlruKind::{Clog, CommitTs, MultiXactMembers, MultiXactOffsets};
    for kind in [Clog, CommitTs, MultiXactOffsets, MultiXactMembers] {
        // 32 pages per segment: the cutoff's own segment stays.
        assert!(is_truncated(kind, 31, 32), "{kind:?}");
        assert!(is_truncated(kind, 0, 63));
        assert!(!is_truncated(kind, 32, 63));
        assert!(!is_truncated(kind, 0, 31));
        assert!(!is_truncated(kind, 64, 63), "after it");
    }
    // pg_xact wraps after 131072 pages; what is more than half of the ids away is after the cutoff, not before.
    assert!(is_truncated(Clog, 131_071, 0));
    assert!(!is_truncated(Clog, 0, 131_071));
    assert!(is_truncated(Clog, 131_072 - 65_504, 0));
    assert!(!is_truncated(Clog, 65_536, 0));
    assert!(!is_truncated(Clog, 65_536 - 32, 0));
    // A segment that reaches over the half is kept: its pages are partly not before the cutoff.
    assert!(!is_truncated(Clog, 65_568, 32));
    assert!(is_truncated(Clog, 65_600, 32));
    // pg_multixact/offsets has 2097152 pages.
    assert!(is_truncated(MultiXactOffsets, 2_097_151, 0));
    assert!(is_truncated(MultiXactOffsets, 1_048_608, 0));
    assert!(!is_truncated(MultiXactOffsets, 1_048_576, 0));
}
