//! Page checksums of pages that `initdb` of 18 wrote, and rule R14.
#![allow(clippy::unwrap_used)]

use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_redo::{Page, pd_checksum, set_checksum};

/// Pages of template databases: block, checksum, bytes that are not zero.
type Known = (u32, u16, &'static [(usize, u8)]);
const KNOWN: [Known; 3] = [
    // A visibility map.
    (
        0,
        0xBB32,
        &[(5, 223), (6, 110), (7, 1), (12, 24), (15, 32), (17, 32), (18, 4), (19, 32), (24, 255)],
    ),
    // A leaf of a btree.
    (
        1,
        0x6924,
        &[
            (4, 248),
            (5, 107),
            (6, 71),
            (7, 1),
            (12, 28),
            (14, 224),
            (15, 31),
            (16, 240),
            (17, 31),
            (18, 4),
            (19, 32),
            (24, 224),
            (25, 159),
            (26, 32),
            (8164, 1),
            (8166, 16),
            (8168, 182),
            (8169, 52),
            (8188, 3),
        ],
    ),
    // A free space map.
    (
        2,
        0x9B8F,
        &[
            (5, 14),
            (6, 113),
            (7, 1),
            (12, 24),
            (15, 32),
            (17, 32),
            (18, 4),
            (19, 32),
            (28, 251),
            (29, 251),
            (31, 251),
            (35, 251),
            (43, 251),
            (59, 251),
            (91, 251),
            (155, 251),
            (283, 251),
            (539, 251),
            (1051, 251),
            (2075, 251),
            (4123, 251),
        ],
    ),
];

fn page(bytes: &[(usize, u8)]) -> Page {
    let mut page = [0; PAGE_SIZE];
    bytes.iter().for_each(|(at, byte)| page[*at] = *byte);
    page
}

#[test]
fn checksums_are_those_of_the_server() {
    for (block, checksum, bytes) in KNOWN {
        let mut page = page(bytes);
        assert_eq!(pd_checksum(&page, block), checksum);
        assert_ne!(pd_checksum(&page, block + 1), checksum);
        // What is there as a checksum does not count.
        page[8..10].copy_from_slice(&[0xAB, 0xCD]);
        assert_eq!(pd_checksum(&page, block), checksum);
        page[10] ^= 1;
        assert_ne!(pd_checksum(&page, block), checksum);
    }
}

#[test]
fn r14_a_page_that_leaves_gets_its_checksum() {
    let (block, checksum, bytes) = KNOWN[1];
    let mut found = page(bytes);
    set_checksum(&mut found, block);
    let mut expected = page(bytes);
    expected[8..10].copy_from_slice(&checksum.to_le_bytes());
    assert!(found == expected);
    // A page that was never initialised stays all zeros.
    let mut new = [0; PAGE_SIZE];
    set_checksum(&mut new, block);
    assert!(new == [0; PAGE_SIZE]);
}
