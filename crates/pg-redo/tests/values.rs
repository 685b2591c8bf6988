//! Stored values: what of a record each block keeps, byte by byte, and how values that this code did not write are
//! refused. `value.rs` has the form; what each record's main data are is in PostgreSQL's headers of each access method.
#![allow(clippy::unwrap_used)]

mod support;

use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{
    Effect, Effects, Page, Reads, RecordKind, RedoError, ValueKind, apply_block, is_complete, page,
    reads, value_kind,
};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record};
use support::{Block, Fields, Piece, control, page_of, put_u16, record_bytes, with};

const XLOG: u8 = 0;
const HEAP2: u8 = 9;
const HEAP: u8 = 10;
const BTREE: u8 = 11;
const HASH: u8 = 12;
const GIN: u8 = 13;
const GIST: u8 = 14;
const SPGIST: u8 = 16;
const END: Lsn = Lsn(0x1080);

fn block(id: u8) -> Block {
    Block {
        id,
        number: 3 + u32::from(id),
        fork: 0,
        init: false,
        data: vec![0xD0 + id],
        image: None,
    }
}

/// Fork, block, value.
type Values = Vec<(Fork, u32, Vec<u8>)>;

/// Values of the blocks of relation 16384.
fn derive_record(version: PgVersion, bytes: &[u8]) -> Result<Values, &'static str> {
    let record = Record { lsn: Lsn(0x1000), end: END, bytes };
    let decoded = DecodedRecord::decode(record).unwrap();
    let mut effects = Effects::new();
    match effects.derive(&decoded, &mut control(version)) {
        Ok(()) => {}
        Err(RedoError::Record { reason, .. }) => return Err(reason),
        Err(other) => panic!("{other}"),
    }
    let blocks = effects.items.iter().filter_map(|effect| match *effect {
        Effect::Block { rel, block, value, complete, extends } => {
            assert_eq!(
                rel.with_fork(Fork::Main),
                RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main }
            );
            let value = effects.value(value).to_vec();
            assert_eq!((is_complete(&value), extends), (complete, true));
            Some((rel.fork, block, value))
        }
        _ => None,
    });
    Ok(blocks.collect())
}

fn derive((rmgr, info): (u8, u8), blocks: &[Block], main: &[u8]) -> Result<Values, &'static str> {
    derive_record(PgVersion::V17, &record_bytes(rmgr, info, blocks, main))
}

/// The flag "applied" of the image of a record's only block.
fn applied(mut record: Vec<u8>) -> Vec<u8> {
    record[32] |= 2;
    record
}

#[test]
fn a_piece_has_all_that_redo_of_its_block_reads() {
    let blocks = [block(0), Block { init: true, ..block(1) }, Block { data: vec![], ..block(5) }];
    let main = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
    let found = derive((BTREE, 0x30), &blocks, &main).unwrap();
    // 17 is the third version; checksums are on.
    let value = |tag: u8, role: u8, others: [(u8, u32); 2], data: &[u8]| {
        let fields = Fields::new().u8(tag).u8(BTREE).u8(0x30).u8(role).u32(700).u8(2);
        let add = |fields: Fields, (id, block)| fields.u8(id).u32(block);
        others.into_iter().fold(fields, add).u8(10).bytes(&main).bytes(data).0
    };
    let expected = vec![
        (Fork::Main, 3, value(2 | 2 << 4 | 0x40, 0, [(1, 4), (5, 8)], &[0xD0])),
        (Fork::Main, 4, value(2 | 2 << 4 | 0xC8, 1, [(0, 3), (5, 8)], &[0xD1])),
        (Fork::Main, 8, value(2 | 2 << 4 | 0x40, 5, [(0, 3), (1, 4)], &[])),
    ];
    assert_eq!(found, expected);
    for version in PgVersion::ALL {
        let bytes = record_bytes(BTREE, 0x30, &blocks[..1], &main);
        let found = derive_record(version, &bytes).unwrap();
        assert_eq!(u32::from(found[0].2[0] >> 4 & 3), version.major() - 15);
    }
}

#[test]
fn main_data_have_a_length_of_one_byte_or_five() {
    let length = |length: usize| {
        let main = vec![7; length];
        let value = derive((BTREE, 0x70), &[block(0)], &main).unwrap().remove(0).2;
        assert!(value.ends_with(&[7, 0xD0]) || length == 0);
        (value[9..14].to_vec(), value.len() - 10 - length)
    };
    assert_eq!(length(254), (vec![254, 7, 7, 7, 7], 1));
    assert_eq!(length(255), (vec![255, 255, 0, 0, 0], 5));
    assert_eq!(length(256), (vec![255, 0, 1, 0, 0], 5));
    // No record that changes blocks has more than this.
    assert_eq!(length(256 * 1024), (vec![255, 0, 0, 4, 0], 5));
    let longer = "main data is longer than that of any record that changes blocks";
    assert_eq!(derive((BTREE, 0x70), &[block(0)], &vec![7; 256 * 1024 + 1]), Err(longer));
}

/// Bytes of main data that the value of a block keeps, of 60 that are zeros but for `bytes`.
fn kept(kind: (u8, u8), role: u8, bytes: &[(usize, u8)]) -> usize {
    let mut main = vec![0; 60];
    bytes.iter().for_each(|(at, byte)| main[*at] = *byte);
    let mut blocks = vec![block(0)];
    if role > 0 {
        blocks.push(block(role));
    }
    let values = derive(kind, &blocks, &main).unwrap();
    let at = 3 + u32::from(role);
    let value = &values.iter().find(|(_, block, _)| *block == at).unwrap().2;
    let others = usize::from(value[8]);
    usize::from(value[9 + others * 5])
}

#[test]
fn blocks_keep_the_main_data_that_they_read() {
    // Behind xl_heap_insert, _delete, _lock, _update and _inplace are old tuples, or messages.
    assert_eq!(kept((HEAP, 0x00), 0, &[]), 3);
    assert_eq!(kept((HEAP, 0x80), 0, &[]), 3);
    assert_eq!(kept((HEAP, 0x10), 0, &[]), 8);
    assert_eq!(kept((HEAP, 0x60), 0, &[]), 8);
    assert_eq!(kept((HEAP, 0x20), 1, &[]), 14);
    assert_eq!(kept((HEAP, 0x40), 0, &[]), 14);
    assert_eq!(kept((HEAP, 0x70), 0, &[]), 2);
    assert_eq!(kept((HEAP, 0x50), 0, &[]), 60);
    // A map page reads no offsets of the tuples.
    assert_eq!(kept((HEAP2, 0x50), 0, &[]), 60);
    assert_eq!(kept((HEAP2, 0x50), 1, &[]), 4);
    assert_eq!(kept((HEAP2, 0x60), 1, &[]), 60);
    // Hash VACUUM_ONE_PAGE: the metapage, without the offsets. GIN DELETE_LISTPAGE: pages that become empty.
    assert_eq!(kept((HASH, 0xC0), 0, &[]), 60);
    assert_eq!(kept((HASH, 0xC0), 1, &[]), 8);
    assert_eq!(kept((HASH, 0x20), 1, &[]), 60);
    assert_eq!(kept((GIN, 0x80), 0, &[]), 60);
    assert_eq!(kept((GIN, 0x80), 1, &[]), 0);
    assert_eq!(kept((GIN, 0x20), 1, &[]), 60);
    // What is shorter is kept whole, and found wanting by redo.
    let short = derive((HASH, 0xC0), &[block(0), block(1)], &[1, 2, 3]).unwrap();
    assert_eq!(short[1].2[14..18], [3, 1, 2, 3]);
}

#[test]
fn spgist_blocks_keep_no_leaf_tuples_of_others() {
    // ADD_LEAF: the parent. The page of the tuple, block 0, needs all.
    assert_eq!(kept((SPGIST, 0x10), 0, &[]), 60);
    assert_eq!(kept((SPGIST, 0x10), 1, &[]), 10);
    // MOVE_LEAFS, three moves: the fixed part, offsets to delete and to insert, one more than moved unless a dead tuple
    // is replaced. The destination, block 1, needs the tuples.
    assert_eq!(kept((SPGIST, 0x20), 1, &[(0, 3)]), 60);
    assert_eq!(kept((SPGIST, 0x20), 0, &[(0, 3)]), 20 + 2 * (3 + 4));
    assert_eq!(kept((SPGIST, 0x20), 2, &[(0, 3), (3, 1)]), 20 + 2 * (3 + 1));
    // ADD_NODE: if the tuple moves, the old page needs no tuple, and neither does a parent on a third page.
    assert_eq!(kept((SPGIST, 0x30), 0, &[(5, 0xFF)]), 60);
    assert_eq!(kept((SPGIST, 0x30), 0, &[(5, 0)]), 20);
    assert_eq!(kept((SPGIST, 0x30), 1, &[(5, 0)]), 60);
    assert_eq!(kept((SPGIST, 0x30), 2, &[(5, 2)]), 20);
    // PICKSPLIT, two deleted and three inserted: the inner page needs the inner tuple (12 bytes), the parent nothing.
    let main = [(2, 2), (4, 3), (28 + 4 + 9 + 4, 12)];
    assert_eq!(kept((SPGIST, 0x50), 0, &main), 60);
    assert_eq!(kept((SPGIST, 0x50), 1, &main), 60);
    assert_eq!(kept((SPGIST, 0x50), 2, &main), 28 + 4 + 9 + 12);
    assert_eq!(kept((SPGIST, 0x50), 3, &main), 28);
    let cut = derive((SPGIST, 0x50), &[block(2)], &[0, 0, 0, 0, 9, 0]);
    assert_eq!(cut, Err("main data is cut off"));
}

/// A bucket page of a hash index; most kinds of pages with this special size will do.
fn bucket() -> Page {
    with(&page_of(16, &[]), |page| {
        page[24..8176].fill(0);
        put_u16(page, 8188, 2);
    })
}

/// The kind of value that a block with an image, applied, gets; 0 for none.
fn kind_with_image(kind: (u8, u8), role: u8) -> u8 {
    let block = Block { image: Some(bucket()), ..block(role) };
    let bytes = applied(record_bytes(kind.0, kind.1, &[block], &[0; 60]));
    let values = derive_record(PgVersion::V17, &bytes).unwrap();
    values.first().map_or(0, |(_, _, value)| value[0] & 7)
}

#[test]
fn r5_some_pages_change_further_after_their_image() {
    for (kind, role) in [
        ((GIST, 0x00), 1),
        ((GIST, 0x30), 0),
        ((HASH, 0x40), 0),
        ((HASH, 0x60), 0),
        ((HASH, 0x60), 1),
    ] {
        assert_eq!(kind_with_image(kind, role), 3, "{kind:?} {role}");
    }
    for (kind, role) in [
        ((GIST, 0x00), 0),
        ((GIST, 0x30), 1),
        ((HASH, 0x40), 1),
        ((HASH, 0x60), 2),
        ((HASH, 0x20), 0),
        ((HASH, 0x70), 0),
        ((HASH, 0x90), 1),
        ((XLOG, 0xB0), 0),
        ((XLOG, 0xA0), 0),
        ((BTREE, 0x00), 0),
    ] {
        assert_eq!(kind_with_image(kind, role), 1, "{kind:?} {role}");
    }
    // SPLIT_COMPLETE: the image, then its flags, and the block's data only once.
    let block = Block { image: Some(bucket()), ..block(0) };
    let bytes = applied(record_bytes(HASH, 0x60, &[block], &[0x42, 0, 0x12, 0]));
    let (_, _, value) = derive_record(PgVersion::V17, &bytes).unwrap().remove(0);
    assert!(value.ends_with(&[4, 0x42, 0, 0x12, 0]));
    let mut page = [0; PAGE_SIZE];
    apply_block(&mut page, &value, 3, END).unwrap();
    let mut expected = with(&bucket(), |page| put_u16(page, 8188, 0x42));
    page::set_lsn(&mut expected, END);
    assert!(page == expected);
    let kind = RecordKind { version: PgVersion::V17, rmgr: HASH, info: 0x60 };
    assert_eq!(value_kind(&value), Ok(ValueKind::Piece(kind)));
}

#[test]
fn what_a_change_reads_is_known_before_it_is_applied() {
    let reads_of = |kind, main: &[u8]| reads(&derive(kind, &[block(0)], main).unwrap()[0].2);
    // HOT update and delete of tuple 7; what lies behind it does not matter.
    assert_eq!(reads_of((HEAP, 0x40), &[1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0]), Reads::Item(7));
    assert_eq!(reads_of((HEAP, 0x10), &[1, 0, 0, 0, 7, 0, 0, 0]), Reads::Item(7));
    assert_eq!(reads_of((HEAP2, 0x10), &[0; 9]), Reads::Page);
    assert_eq!(reads_of((HEAP, 0x00), &[7, 0, 0]), Reads::FreeSpace);
    assert_eq!(reads_of((BTREE, 0x00), &[7, 0]), Reads::FreeSpace);
    // Whatever the bytes are: it is a hint.
    let update = &derive((HEAP, 0x40), &[block(0)], &[0; 14]).unwrap()[0].2;
    for length in 0..update.len() {
        let cut = reads(&update[..length]);
        assert!(cut == Reads::FreeSpace || cut == Reads::Item(0), "{length}: {cut:?}");
    }
    // The old tuple's page of an update to another one: the number of that page comes before the main data.
    let main = [1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0];
    let both = derive((HEAP, 0x20), &[block(0), block(1)], &main).unwrap();
    assert_eq!(both.iter().map(|value| reads(&value.2)).collect::<Vec<_>>(), [Reads::Item(7); 2]);
    // An image whose bytes would do for a delete.
    let image = [9, HEAP, 0x10, 0, 0, 0, 0, 0, 0, 8, 1, 0, 0, 0, 7, 0, 0, 0];
    assert_eq!(reads(&image), Reads::FreeSpace);
    assert_eq!(reads(&[&[2], &image[1..]].concat()), Reads::Item(7));
}

#[test]
fn blocks_that_are_only_locked_have_no_value() {
    for opcode in [0x70, 0x80, 0x90] {
        let values = derive((HASH, opcode), &[block(0), block(1)], &[0; 12]).unwrap();
        assert_eq!(values.len(), 1, "{opcode:x}");
        assert_eq!(values[0].1, 4);
    }
    assert_eq!(derive((HASH, 0xA0), &[block(0)], &[0; 12]).unwrap().len(), 1);
}

#[test]
fn r13_images_are_there_where_nothing_else_is() {
    let bare = || [Block { data: Vec::new(), ..block(0) }];
    assert_eq!(derive((XLOG, 0xB0), &bare(), &[]), Err("a full-page image is missing"));
    // A hint bit was set while full-page writes were off: the page did not change.
    assert_eq!(derive((XLOG, 0xA0), &bare(), &[]), Ok(vec![]));
}

#[test]
fn r4_an_image_for_comparison_is_no_input() {
    let with_image = Block { image: Some(bucket()), ..block(0) };
    let main = [0; 3];
    let found = derive((HEAP, 0x00), &[with_image], &main).unwrap();
    assert_eq!(found, derive((HEAP, 0x00), &[block(0)], &main).unwrap());
}

#[test]
fn r7_blocks_of_free_space_maps_are_dropped() {
    let map = Block { fork: 1, ..block(0) };
    assert_eq!(derive((BTREE, 0x00), &[map], &[0; 2]), Ok(vec![]));
}

#[test]
fn r6_heap_changes_clear_bits_of_maps_they_do_not_refer_to() {
    // Flags of a deletion are in byte 7, of several insertions in the first two.
    let clear = |found: Values| {
        let clears = found.into_iter().filter(|(fork, ..)| *fork == Fork::Visibility);
        clears.map(|(_, block, value)| (block, value)).collect::<Vec<_>>()
    };
    let both = vec![(0, vec![4, 3, 0, 3])];
    let delete = |flags: u8| {
        clear(derive((HEAP, 0x10), &[block(0)], &[0, 0, 0, 0, 1, 0, 0, flags]).unwrap())
    };
    assert_eq!((delete(1), delete(0xFE)), (both.clone(), vec![]));
    let several = |flags: u8| clear(derive((HEAP2, 0x50), &[block(0)], &[flags, 0, 0, 0]).unwrap());
    assert_eq!((several(1), several(0xFE)), (both, vec![]));
    // A later block: 40000 is the 7329th of the second map page.
    let far = Block { number: 40_000, ..block(0) };
    let found = clear(derive((HEAP, 0x60), &[far], &[0, 0, 0, 0, 1, 0, 0, 1]).unwrap());
    assert_eq!(found, [(1, vec![4, 0xA0, 0x1C, 2])]);
    let lacks = Err("the record lacks a block reference");
    assert_eq!(derive((HEAP, 0x10), &[], &[0; 8]), lacks);
    assert_eq!(derive((HEAP, 0x20), &[], &[0; 14]), lacks);
    assert_eq!(derive((HEAP2, 0x40), &[], &[0; 14]), Ok(vec![]));
}

fn refused(value: &[u8]) -> &'static str {
    let mut page = [0; PAGE_SIZE];
    match apply_block(&mut page, value, 3, END) {
        Err(RedoError::Value { end_lsn, reason }) => {
            assert_eq!(end_lsn, END);
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn values_that_this_code_did_not_write_are_refused() {
    let cut = "the record's data ends too early";
    for value in [&[][..], &[2], &[2, 10, 0, 0, 1, 2, 3], &[1, 0, 0], &[5], &[5, 1]] {
        assert_eq!(refused(value), cut, "{value:?}");
    }
    let piece = |others: u8, rest: &[u8]| [&[2, 10, 0, 0, 1, 2, 3, 4, others], rest].concat();
    assert_eq!(refused(&piece(1, &[0, 0, 0, 0])), cut);
    assert_eq!(refused(&piece(0, &[2, 0])), cut);
    assert_eq!(refused(&piece(0, &[255, 1, 0, 0, 0])), cut);
    for kind in [0, 6, 7] {
        assert_eq!(refused(&[kind]), "unknown kind of value");
    }
    assert_eq!(refused(&[4, 0, 0]), "a list of visibility clears is cut off");
    let outside = "heap block is outside of the visibility map page";
    assert_eq!(refused(&[4, 0xA0, 0x7F, 3]), outside);
    let mut page = page_of(0, &[]);
    assert!(apply_block(&mut page, &[5, 0xA0, 0x7F], 3, END).is_err());
    assert!(apply_block(&mut page, &[5, 0x9F, 0x7F], 3, END).is_ok());
    assert!(apply_block(&mut page, &[4, 0x9F, 0x7F, 3], 3, END).is_ok());
}

#[test]
fn kinds_of_values_are_told() {
    assert_eq!(value_kind(&[4]), Ok(ValueKind::VisibilityClear));
    assert_eq!(value_kind(&[5, 0, 0]), Ok(ValueKind::VisibilityTruncate));
    assert_eq!(value_kind(&[9, 0, 0, 0, 0, 0, 0, 0]), Ok(ValueKind::Image));
    let kind = RecordKind { version: PgVersion::V18, rmgr: GIST, info: 0x30 };
    let piece = Piece::new((GIST, 0x30), Fields::new()).version(PgVersion::V18).encode();
    assert_eq!(value_kind(&piece), Ok(ValueKind::Piece(kind)));
    assert!(value_kind(&[0]).is_err());
    assert_eq!((is_complete(&[]), is_complete(&[2]), is_complete(&[0x0A])), (false, false, true));
}

#[test]
fn truncation_clears_bits_from_a_block_on() {
    let mut page = page_of(0, &[]);
    page[24..].fill(0xFF);
    page::set_lsn(&mut page, Lsn(7));
    let cut = |index: u16| {
        let mut page = page;
        let [low, high] = index.to_le_bytes();
        apply_block(&mut page, &[5, low, high], 0, END).unwrap();
        assert_eq!(page::lsn(&page), Lsn(7), "the LSN stays");
        let ones: u32 = page[24..].iter().map(|byte| byte.count_ones()).sum();
        (ones, page[25], page[26])
    };
    assert_eq!(cut(4), (8, 0x00, 0));
    assert_eq!(cut(5), (10, 0x03, 0));
    assert_eq!(cut(6), (12, 0x0F, 0));
    assert_eq!(cut(7), (14, 0x3F, 0));
    assert_eq!(cut(8), (16, 0xFF, 0));
    assert_eq!(cut(32_671), (65_342, 0xFF, 0xFF));
    let mut new = [0; PAGE_SIZE];
    apply_block(&mut new, &[5, 8, 0], 0, END).unwrap();
    assert!(new == [0; PAGE_SIZE]);
    // A clear makes the page exist; bits other than the two are not of the block.
    apply_block(&mut new, &[4, 5, 0, 3], 0, END).unwrap();
    assert_eq!(new[12..20], [24, 0, 0, 32, 0, 32, 4, 32]);
    let mut some = page;
    apply_block(&mut some, &[4, 5, 0, 0xFD, 8, 0, 2], 0, END).unwrap();
    assert_eq!(some[24..28], [0xFF, 0xFB, 0xFD, 0xFF]);
    assert_eq!(page::lsn(&some), Lsn(7));
}

#[test]
fn r2_pieces_are_skipped_where_the_page_has_the_change() {
    let piece = Piece::new((HASH, 0x60), Fields::new().u16(0x42).u16(0)).encode();
    for (lsn, flags) in [(0x107F, 0x42), (0x1080, 2), (0x1081, 2)] {
        let mut page = bucket();
        page::set_lsn(&mut page, Lsn(lsn));
        apply_block(&mut page, &piece, 3, END).unwrap();
        assert_eq!((page[8188], page::lsn(&page)), (flags, Lsn(lsn.max(0x1080))));
    }
    // Not so pages that are rebuilt from zeros.
    let rebuilt = Piece::new((HASH, 0x80), Fields::new().u64(0).u64(0)).role(2).init().encode();
    let mut page = with(&bucket(), |page| page::set_lsn(page, Lsn(0x5000)));
    apply_block(&mut page, &rebuilt, 3, END).unwrap();
    assert_eq!((page[8188], page::lsn(&page)), (0, END));
    let unknown = Piece::new((XLOG, 0), Fields::new()).after(&bucket()).err();
    assert_eq!(unknown, Some("records of this resource manager do not change blocks"));
}
