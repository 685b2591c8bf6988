//! Differences in the words of PostgreSQL's headers, on pages made by hand.

use super::*;

/// An index page with a special space and two tuples of 16 bytes.
fn index_page(special: usize) -> Page {
    let mut page = [0; PAGE_SIZE];
    page::init(&mut page, special);
    for number in [1, 2] {
        assert!(page::add_item(&mut page, &[number as u8; 16], number, page::Add::Insert).is_ok());
    }
    page
}

fn told(rmgr: u8, block: u32, change: impl Fn(&mut Page)) -> String {
    let expected = index_page(16);
    let mut found = expected;
    change(&mut found);
    let kind = PageKind { rmgr, block, is_visibility_map: block == 9 };
    assert_eq!(compare_pages(kind, &expected, &expected), None);
    compare_pages(kind, &expected, &found).unwrap_or_default()
}

#[test]
fn special_fields_are_named_by_access_method() {
    let at = PAGE_SIZE - 16;
    let text = told(rmgr::BTREE, 3, |page| page[at + 12] = 0x81);
    assert_eq!(text, "special space: btpo_flags is 0x0081, expected 0x0000");
    let text = told(rmgr::HASH, 3, |page| page[at + 4] = 7);
    assert_eq!(text, "special space: hasho_nextblkno is 0x00000007, expected 0x00000000");
    let text = told(rmgr::GIST, 3, |page| page[at + 8] = 7);
    assert_eq!(text, "special space: rightlink is 0x00000007, expected 0x00000000");
}

#[test]
fn tuples_and_line_pointers_are_named() {
    // The second tuple lies below the first.
    let tuple = PAGE_SIZE - 16 - 32;
    let text = told(rmgr::BTREE, 3, |page| page[tuple + 6] = 0x40);
    assert_eq!(text, "line pointer 2: t_info is 0x0240, expected 0x0202");
    let text = told(rmgr::BTREE, 3, |page| page[tuple + 9] = 0x40);
    assert_eq!(
        text,
        "line pointer 2: data: 1 bytes differ from 8153 to 8153; byte 8153 is 0x40, expected 0x02"
    );
    let text = told(rmgr::BTREE, 3, |page| {
        let line = Line { flags: 3, ..Line::normal(8144, 16) };
        assert!(page::set_line(page, 2, line).is_ok());
    });
    assert_eq!(text, "line pointer 2 is dead at 8144, 16 bytes, expected normal at 8144, 16 bytes");
    let text = told(rmgr::BTREE, 3, |page| page::set_lower(page, 28));
    assert_eq!(text, "pd_lower is 0x001c, expected 0x0020; there are 1 line pointers, expected 2");
}

#[test]
fn metapages_maps_and_the_rest_are_named() {
    let text = told(rmgr::BTREE, 0, |page| page[HEADER_SIZE + 8] = 9);
    assert!(text.starts_with("metapage: btm_root is 0x"), "{text}");
    let text = told(rmgr::HEAP2, 9, |page| page[HEADER_SIZE + 100] ^= 0x30);
    let block = 9 * (8192 - 24) * 4 + 402;
    assert_eq!(text, format!("heap block {block} is all visible and frozen, expected none"));
    // In the hole nothing has a name.
    let text = told(rmgr::BTREE, 3, |page| page[4000] = 1);
    assert_eq!(text, "1 bytes differ from 4000 to 4000; byte 4000 is 0x01, expected 0x00");
}

/// With another special space.
fn told_with(special: usize, kind: PageKind, change: impl Fn(&mut Page)) -> String {
    let expected = index_page(special);
    let mut found = expected;
    change(&mut found);
    compare_pages(kind, &expected, &found).unwrap_or_default()
}

fn kind(rmgr: u8, block: u32) -> PageKind {
    PageKind { rmgr, block, is_visibility_map: false }
}

#[test]
fn each_access_method_has_its_fields() {
    for (rmgr, special, at, text) in [
        (rmgr::SEQUENCE, 8, 8184, "special space: magic is 0x00000007, expected 0x00000000"),
        (rmgr::GIN, 8, 8188, "special space: maxoff is 0x0007, expected 0x0000"),
        (rmgr::SPGIST, 8, 8186, "special space: nRedirection is 0x0007, expected 0x0000"),
        (rmgr::BRIN, 8, 8188, "special space: flags is 0x0007, expected 0x0000"),
        // Bytes without a name.
        (
            rmgr::BTREE,
            24,
            8184,
            "special space: 1 bytes differ from 8184 to 8184; byte 8184 is 0x07, expected 0x00",
        ),
        (
            rmgr::HEAP,
            8,
            8184,
            "special space: 1 bytes differ from 8184 to 8184; byte 8184 is 0x07, expected 0x00",
        ),
    ] {
        assert_eq!(told_with(special, kind(rmgr, 3), |page| page[at] = 7), text, "{rmgr}");
    }
    // A special space that is shorter than its fields, or that only one page has, is content.
    let short = told_with(8, kind(rmgr::BTREE, 3), |page| page[8184] = 7);
    assert_eq!(short, "1 bytes differ from 8184 to 8184; byte 8184 is 0x07, expected 0x00");
}

#[test]
fn tuples_are_named_by_access_method() {
    // The first tuple is 16 bytes below the special space of 8: its bytes are 1.
    let told = |rmgr, at: usize| told_with(8, kind(rmgr, 3), |page| page[8168 + at] = 7);
    assert_eq!(told(rmgr::SPGIST, 4), "line pointer 1: t_info is 0x0107, expected 0x0101");
    assert_eq!(told(rmgr::BRIN, 0), "line pointer 1: bt_blkno is 0x01010107, expected 0x01010101");
    assert_eq!(
        told(rmgr::SEQUENCE, 4),
        "line pointer 1: t_xmax is 0x01010107, expected 0x01010101"
    );
    assert_eq!(told(rmgr::HEAP2, 0), "line pointer 1: t_xmin is 0x01010107, expected 0x01010101");
    assert_eq!(told(rmgr::GIN, 6), "line pointer 1: t_info is 0x0107, expected 0x0101");
    assert_eq!(told(rmgr::HEAP, 8), "line pointer 1: t_cid is 0x01010107, expected 0x01010101");
    // t_ctid would end behind the tuple.
    assert_eq!(
        told(rmgr::HEAP, 12),
        "line pointer 1: data: 1 bytes differ from 8180 to 8180; byte 8180 is 0x07, expected 0x01"
    );
}

#[test]
fn pages_without_line_pointers_are_content() {
    // A page of the given type, by its last bytes, whose second tuple differs.
    let told = |rmgr, special: usize, from_end: usize, kind_byte: u8| {
        let mut expected = index_page(special);
        expected[PAGE_SIZE - from_end] = kind_byte;
        let mut found = expected;
        found[PAGE_SIZE - special - 16] = 7;
        let text = compare_pages(kind(rmgr, 3), &expected, &found).unwrap_or_default();
        text.starts_with("line pointer 1: ")
    };
    // Hash: bitmap pages (4) among the types in four bits.
    assert_eq!(
        [4, 0x14, 2, 6, 0].map(|kind| told(rmgr::HASH, 16, 4, kind)),
        [false, false, true, true, true]
    );
    // GIN: data pages (1). BRIN: the map from ranges to tuples (0xF092).
    assert_eq!([1, 3, 2, 0].map(|kind| told(rmgr::GIN, 8, 2, kind)), [false, false, true, true]);
    assert_eq!([0x92, 0x93, 0].map(|kind| told(rmgr::BRIN, 8, 2, kind)), [false, true, true]);
    assert!(!told(rmgr::GENERIC, 16, 1, 0));
    // The same byte says nothing elsewhere.
    assert!(
        told(rmgr::BTREE, 16, 2, 1) && told(rmgr::HEAP, 8, 2, 0x92) && told(rmgr::GIST, 16, 4, 4)
    );
    // A metapage has its own fields.
    let meta = |rmgr| told_with(16, kind(rmgr, 0), |page| page[24] = 7);
    for rmgr in [rmgr::BTREE, rmgr::HASH, rmgr::GIN, rmgr::BRIN] {
        assert!(meta(rmgr).starts_with("metapage: "), "{}", meta(rmgr));
    }
    for rmgr in [rmgr::GIST, rmgr::SPGIST, rmgr::HEAP] {
        assert!(meta(rmgr).starts_with("line pointer 1 "), "{}", meta(rmgr));
    }
    assert!(
        told_with(16, kind(rmgr::BTREE, 1), |page| page[24] = 7).starts_with("line pointer 1 ")
    );
}

#[test]
fn line_pointers_of_one_page_only_are_told_once() {
    let text = told_with(16, kind(rmgr::BTREE, 3), |page| {
        page::set_lower(page, 28);
        page[28..32].fill(0);
    });
    assert_eq!(text, "pd_lower is 0x001c, expected 0x0020; there are 1 line pointers, expected 2");
    // The bytes of a line pointer that was told of are no content.
    let text = told_with(16, kind(rmgr::BTREE, 3), |page| page[28..32].copy_from_slice(&[0; 4]));
    assert_eq!(text, "line pointer 2 is unused at 0, 0 bytes, expected normal at 8144, 16 bytes");
    let more = told_with(16, kind(rmgr::BTREE, 3), |page| {
        page[28..32].copy_from_slice(&[0; 4]);
        page[4000] = 1;
    });
    assert!(more.starts_with(&text) && more.contains("content: "), "{more}");
    let three = told_with(16, kind(rmgr::BTREE, 3), |page| {
        page[10] = 1;
        page[28..32].copy_from_slice(&[0; 4]);
        page[4000] = 1;
    });
    assert!(three.starts_with("pd_flags is 0x") && three.contains("content: "), "{three}");
    let more = told_with(16, kind(rmgr::BTREE, 3), |page| {
        page[8160] = 7;
        page[4000] = 1;
    });
    assert!(
        more.starts_with("line pointer 1: t_tid is 0x") && more.contains("; content: 2 bytes"),
        "{more}"
    );
}

#[test]
fn tuples_are_within_the_content() {
    // A line pointer of both pages that leads into the header, or over the special space: what differs there is content.
    let told = |offset: u16, length: u16, at: usize| {
        let mut expected = index_page(16);
        let _ = page::set_line(&mut expected, 2, Line::normal(offset, length));
        let mut found = expected;
        found[at] ^= 0x80;
        compare_pages(kind(rmgr::BTREE, 3), &expected, &found).unwrap_or_default()
    };
    let tuple = "line pointer 2: t_tid is";
    assert!(told(8144, 16, 8144).starts_with(tuple));
    assert!(told(24, 40, 32).starts_with("line pointer 2: data: "), "{}", told(24, 40, 32));
    assert!(told(23, 40, 40).starts_with("1 bytes differ"), "{}", told(23, 40, 40));
    assert!(told(8144, 32, 8145).starts_with(tuple), "up to the special space");
    assert!(told(8144, 33, 8145).starts_with("1 bytes differ"), "{}", told(8144, 33, 8145));
    assert!(told(8190, 33, 8145).starts_with("1 bytes differ"));
}

#[test]
fn maps_tell_each_heap_block() {
    let map = PageKind { rmgr: rmgr::HEAP2, block: 0, is_visibility_map: true };
    let (mut expected, mut found) = (index_page(0), index_page(0));
    (expected[24], found[24]) = (0b11_10_01_00, 0b00_10_11_00);
    let text = compare_pages(map, &expected, &found);
    let all = "heap block 1 is all visible and frozen, expected all visible; heap block 3 is none, expected all visible \
               and frozen";
    assert_eq!(text.as_deref(), Some(all));
    expected[25] = 0b01_00_00_10;
    (expected[24], found[24]) = (0, 0);
    found[25] = 0;
    let text = compare_pages(map, &expected, &found);
    let both =
        "heap block 4 is none, expected all frozen; heap block 7 is none, expected all visible";
    assert_eq!(text.as_deref(), Some(both));
    // Other resource managers have no such maps.
    let other = PageKind { rmgr: rmgr::BTREE, ..map };
    assert!(!compare_pages(other, &expected, &found).unwrap_or_default().contains("heap block"));
}

#[test]
fn eight_differences_are_listed() {
    let told = |count: usize| {
        let map = PageKind { rmgr: rmgr::HEAP2, block: 0, is_visibility_map: true };
        let (expected, mut found) = (index_page(0), index_page(0));
        found[100..100 + count].fill(1);
        compare_pages(map, &expected, &found).unwrap_or_default()
    };
    let seven = told(7);
    assert_eq!((seven.matches("; ").count(), seven.contains("more")), (6, false));
    let eight = told(8);
    assert_eq!((eight.matches("; ").count(), eight.contains("more")), (7, false));
    assert!(told(9).starts_with(&eight) && told(9).ends_with("; and 1 more"));
    assert!(told(11).ends_with("; and 3 more"));
}
