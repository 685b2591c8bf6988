//! Names of branches, from records whose fields are where PostgreSQL's headers have them.
#![allow(clippy::unwrap_used)]

use super::*;
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::Record;

/// The branch of a record with main data only, by a server of 17.
fn branch(rmgr: u8, info: u8, main: &[u8]) -> String {
    branch_of(PgVersion::V17, rmgr, info, main)
}

fn branch_of(version: PgVersion, rmgr: u8, info: u8, main: &[u8]) -> String {
    let mut bytes = vec![0; 24];
    bytes[0] = (24 + 2 + main.len()) as u8;
    (bytes[16], bytes[17]) = (info, rmgr);
    bytes.extend_from_slice(&[255, main.len() as u8]);
    bytes.extend_from_slice(main);
    let record = Record { lsn: Lsn(8), end: Lsn(64), bytes: &bytes };
    let record = DecodedRecord::decode(record).unwrap_or_else(|error| panic!("{error}"));
    describe(RecordKind::new(version, rmgr, info), of(version, &record))
}

#[test]
fn flags_are_named() {
    assert_eq!(branch(rmgr::HEAP, 0x00, &[1, 0, 1 | 32]), "all-visible cleared, all-frozen set");
    assert_eq!(branch(rmgr::HEAP, 0x00, &[1, 0, 0]), "");
    assert_eq!(branch(rmgr::HEAP2, 0x10, &[0, 0x44]), "cleanup lock, dead items");
    assert_eq!(branch(rmgr::BTREE, 0xC0, &[0, 0, 3, 0]), "updated");
    let commit = [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0];
    assert_eq!(branch(rmgr::TRANSACTION, 0x80, &commit), "subtransactions");
    assert_eq!(branch(rmgr::TRANSACTION, 0x00, &commit), "");
}

/// The name of each byte that is set alone, in a record of zeros: position, value, name.
fn assert_names(version: PgVersion, rmgr: u8, info: u8, parts: &[(usize, u8, &str)]) {
    let zeros = [0; 90];
    assert_eq!(branch_of(version, rmgr, info, &zeros), "", "{rmgr} {info:x}");
    for (at, byte, name) in parts {
        let mut main = zeros;
        main[*at] = *byte;
        assert_eq!(branch_of(version, rmgr, info, &main), *name, "{rmgr} {info:x} {at}");
    }
}

#[test]
fn heap_records() {
    let insert: &[(usize, u8, &str)] = &[
        (2, 1, "all-visible cleared"),
        (2, 2, ""),
        (2, 4, "speculative"),
        (2, 8, "tuple for decoding"),
        (2, 16, "toast"),
        (2, 32, "all-frozen set"),
        (2, 64, ""),
        (1, 255, ""),
        (3, 255, ""),
    ];
    let names = |rmgr, info, parts| assert_names(PgVersion::V15, rmgr, info, parts);
    names(rmgr::HEAP, 0x00, insert);
    names(rmgr::HEAP, 0x80, insert);
    names(
        rmgr::HEAP2,
        0x50,
        &[(0, 1, "all-visible cleared"), (0, 32, "all-frozen set"), (2, 1, "")],
    );
    let delete: &[(usize, u8, &str)] = &[
        (7, 1, "all-visible cleared"),
        (7, 2, "old tuple"),
        (7, 4, "old key"),
        (7, 8, "super"),
        (7, 16, "partition move"),
        (6, 1, ""),
    ];
    names(rmgr::HEAP, 0x10, delete);
    for info in [0x20, 0x40, 0xA0, 0xC0] {
        let parts: &[(usize, u8, &str)] = &[
            (7, 1, "old all-visible cleared"),
            (7, 2, "new all-visible cleared"),
            (7, 32, "prefix"),
            (7, 64, "suffix"),
            (7, 0x63, "old all-visible cleared, new all-visible cleared, prefix, suffix"),
        ];
        names(rmgr::HEAP, info, parts);
    }
    names(rmgr::HEAP, 0x30, &[(8, 1, "cascade"), (8, 2, "restart sequences")]);
    names(rmgr::HEAP, 0x60, &[(7, 1, "all-frozen cleared")]);
    names(rmgr::HEAP2, 0x60, &[(7, 1, "all-frozen cleared")]);
    names(rmgr::HEAP2, 0x40, &[(4, 1, "all visible"), (4, 2, "all frozen"), (4, 4, "catalog")]);
}

#[test]
fn pruning_has_flags_from_17_on_and_counts_before() {
    let counts: &[(usize, u8, &str)] = &[
        (4, 1, "redirections"),
        (5, 1, "redirections"),
        (6, 1, "dead items"),
        (7, 1, "dead items"),
        (1, 8, ""),
    ];
    let flags: &[(usize, u8, &str)] = &[
        (1, 2, "catalog"),
        (1, 4, "cleanup lock"),
        (1, 8, "conflict horizon"),
        (1, 16, "freeze plans"),
        (1, 32, "redirections"),
        (1, 64, "dead items"),
        (1, 128, "unused items"),
        (4, 1, ""),
    ];
    for version in [PgVersion::V15, PgVersion::V16] {
        assert_names(version, rmgr::HEAP2, 0x10, counts);
        assert_names(version, rmgr::HEAP2, 0x20, &[(1, 8, ""), (4, 1, "")]);
    }
    for version in [PgVersion::V17, PgVersion::V18] {
        for info in [0x10, 0x20, 0x30] {
            assert_names(version, rmgr::HEAP2, info, flags);
        }
    }
}

#[test]
fn index_records() {
    let names = |rmgr, info, parts| assert_names(PgVersion::V16, rmgr, info, parts);
    for info in [0x30, 0x40] {
        names(rmgr::BTREE, info, &[(3, 1, "inner"), (9, 1, "posting list"), (4, 1, "")]);
    }
    names(rmgr::BTREE, 0x70, &[(5, 1, "deleted"), (7, 1, "updated"), (8, 1, "")]);
    for info in [0x80, 0x90] {
        names(rmgr::BTREE, info, &[(3, 1, "left sibling"), (8, 1, "inner"), (4, 1, "")]);
    }
    names(rmgr::BTREE, 0xA0, &[(4, 1, "above leaves"), (0, 1, "")]);
    names(rmgr::BTREE, 0xC0, &[(0, 1, "deleted"), (2, 1, "updated")]);
    names(rmgr::HASH, 0x20, &[(2, 1, "bitmap page found")]);
    names(rmgr::HASH, 0x40, &[(8, 1, "masks"), (8, 2, "split point")]);
    names(rmgr::HASH, 0x70, &[(2, 1, "primary bucket is written")]);
    let squeeze: &[(usize, u8, &str)] = &[
        (8, 1, "tuples"),
        (10, 1, "primary bucket is written"),
        (11, 1, "previous page is written"),
    ];
    names(rmgr::HASH, 0x80, squeeze);
    names(rmgr::HASH, 0x90, &[(0, 1, "clears dead marks"), (1, 1, "primary bucket")]);
    names(rmgr::GIN, 0x20, &[(0, 1, "data"), (0, 2, "leaf")]);
    names(rmgr::GIN, 0x30, &[(24, 1, "data"), (24, 2, "leaf"), (24, 4, "root")]);
    names(rmgr::GIN, 0x60, &[(80, 1, "tuples"), (83, 1, "tuples")]);
    names(rmgr::GIST, 0x00, &[(0, 1, "deletes"), (2, 1, "inserts")]);
    names(rmgr::GIST, 0x30, &[(18, 1, "leaf"), (20, 1, "follow right"), (16, 1, "")]);
    names(rmgr::SPGIST, 0x10, &[(0, 1, "new page"), (1, 1, "nulls"), (6, 1, "parent")]);
    names(rmgr::SPGIST, 0x20, &[(2, 1, "new page"), (3, 1, "replaces dead"), (4, 1, "nulls")]);
    names(rmgr::SPGIST, 0x30, &[(4, 1, "new page"), (6, 1, "parent")]);
    names(rmgr::SPGIST, 0x40, &[(4, 1, "new page"), (5, 1, "postfix on same page")]);
    let split: &[(usize, u8, &str)] = &[
        (0, 1, "root"),
        (6, 1, "source rebuilt"),
        (7, 1, "destination rebuilt"),
        (10, 1, "inner rebuilt"),
        (11, 1, "nulls"),
        (12, 1, "inner is parent"),
    ];
    names(rmgr::SPGIST, 0x50, split);
    let vacuum: &[(usize, u8, &str)] =
        &[(0, 1, "dead"), (2, 1, "placeholders"), (4, 1, "moves"), (6, 1, "chains")];
    names(rmgr::SPGIST, 0x60, vacuum);
    // The flag came with 16.
    names(rmgr::SPGIST, 0x80, &[(0, 1, "redirects"), (8, 1, "catalog")]);
    assert_names(PgVersion::V15, rmgr::SPGIST, 0x80, &[(0, 1, "redirects"), (8, 1, "")]);
    names(rmgr::BRIN, 0x10, &[(0, 1, "")]);
}

#[test]
fn other_records() {
    let names = |rmgr, info, parts| assert_names(PgVersion::V18, rmgr, info, parts);
    names(
        rmgr::STORAGE,
        0x20,
        &[(16, 1, "heap"), (16, 2, "visibility map"), (16, 4, "free space map")],
    );
    let ends: &[(usize, u8, &str)] = &[
        (8, 1, "database"),
        (8, 4, "dropped relations"),
        (8, 8, "invalidations"),
        (8, 16, "two-phase"),
        (8, 32, "origin"),
        (8, 64, "locks"),
        (8, 128, "gid"),
        (9, 1, "dropped statistics"),
    ];
    for info in [0x80, 0xA0, 0xB0, 0xC0] {
        names(rmgr::TRANSACTION, info, ends);
    }
    names(rmgr::TRANSACTION, 0x10, &[(8, 1, "")]);
    // Short main data have no flags.
    assert_eq!(branch(rmgr::TRANSACTION, 0x80, &[0; 8]), "");
}

#[test]
fn r10_blocks_are_named_by_their_ids() {
    let mut bytes = vec![0; 24];
    (bytes[16], bytes[17]) = (0, rmgr::HEAP);
    for (id, flags) in [(0, 0), (1, 0x40), (7, 0), (9, 0)] {
        bytes.extend_from_slice(&[id, flags, 0, 0]);
        bytes.extend_from_slice(&[0; 16]);
    }
    bytes.extend_from_slice(&[255, 3, 1, 0, 33]);
    bytes[0] = bytes.len() as u8;
    let record = Record { lsn: Lsn(8), end: Lsn(64), bytes: &bytes };
    let branch = of(PgVersion::V15, &DecodedRecord::decode(record).unwrap());
    let kind = RecordKind::new(PgVersion::V15, rmgr::HEAP, 0);
    assert_eq!(describe(kind, branch), "blocks 0 1+init 7; all-visible cleared, all-frozen set");
    assert_eq!(describe(kind, Branch { blocks: 3 << 4, flags: 0 }), "blocks 2+image");
}
