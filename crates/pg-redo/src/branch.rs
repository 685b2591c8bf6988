//! What of a record kind a record is: the blocks it refers to, and its flags. A kind of record is several changes in one;
//! a check that met the kind has proved only those that it met.

use crate::error::RecordKind;
use pgstrata_pg_wal::{DecodedRecord, PgVersion, rmgr};
use std::fmt::Write as _;

/// Block ids that are told apart; more only occur where all are treated alike.
const BLOCKS: u8 = 8;

/// A branch of a record kind, comparable within the kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Branch {
    /// Two bits for each block id: 0 none, 1 changed, 2 rebuilt from zeros, 3 restored from an image.
    blocks: u16,
    /// Bits in the order of the kind's parts.
    flags: u32,
}

/// A part of the main data that decides what redo does.
enum Part {
    /// A flag for each bit: position, bytes, names from the lowest bit on (empty: of no importance).
    Bits(usize, usize, &'static [&'static str]),
    /// A number, of which only counts whether it is zero.
    NonZero(usize, usize, &'static str),
}

use Part::{Bits, NonZero};

const HEAP_INSERT: &[&str] =
    &["all-visible cleared", "", "speculative", "tuple for decoding", "toast", "all-frozen set"];
const HEAP_LOCK: &[&str] = &["all-frozen cleared"];
const XACT_INFO: &[&str] = &[
    "database",
    "subtransactions",
    "dropped relations",
    "invalidations",
    "two-phase",
    "origin",
    "locks",
    "gid",
    "dropped statistics",
];
const PRUNE: &[&str] = &[
    "",
    "catalog",
    "cleanup lock",
    "conflict horizon",
    "freeze plans",
    "redirections",
    "dead items",
    "unused items",
];

fn parts(version: PgVersion, rmgr: u8, opcode: u8) -> &'static [Part] {
    let new = version >= PgVersion::V17;
    let horizon = version >= PgVersion::V16;
    match (rmgr, opcode) {
        // Without the highest bit, the end of a transaction has no such word.
        (rmgr::TRANSACTION, 0x80..) => &[Bits(8, 4, XACT_INFO)],
        (rmgr::STORAGE, 0x20) => &[Bits(16, 4, &["heap", "visibility map", "free space map"])],
        (rmgr::HEAP, 0x00 | 0x80) => &[Bits(2, 1, HEAP_INSERT)],
        (rmgr::HEAP, 0x10) => &[Bits(
            7,
            1,
            &["all-visible cleared", "old tuple", "old key", "super", "partition move"],
        )],
        (rmgr::HEAP, 0x20 | 0x40 | 0xA0 | 0xC0) => &[Bits(
            7,
            1,
            &[
                "old all-visible cleared",
                "new all-visible cleared",
                "old tuple",
                "old key",
                "new tuple",
                "prefix",
                "suffix",
            ],
        )],
        (rmgr::HEAP, 0x30) => &[Bits(8, 1, &["cascade", "restart sequences"])],
        (rmgr::HEAP, 0x60) | (rmgr::HEAP2, 0x60) => &[Bits(7, 1, HEAP_LOCK)],
        (rmgr::HEAP2, 0x50 | 0xD0) => &[Bits(0, 1, HEAP_INSERT)],
        (rmgr::HEAP2, 0x40) => &[Bits(4, 1, &["all visible", "all frozen", "catalog"])],
        (rmgr::HEAP2, 0x10..=0x30) if new => &[Bits(1, 1, PRUNE)],
        (rmgr::HEAP2, 0x10) => &[NonZero(4, 2, "redirections"), NonZero(6, 2, "dead items")],
        (rmgr::BTREE, 0x30 | 0x40) => &[NonZero(0, 4, "inner"), NonZero(8, 2, "posting list")],
        (rmgr::BTREE, 0x70) => &[NonZero(4, 2, "deleted"), NonZero(6, 2, "updated")],
        (rmgr::BTREE, 0x80 | 0x90) => &[NonZero(0, 4, "left sibling"), NonZero(8, 4, "inner")],
        (rmgr::BTREE, 0xA0) => &[NonZero(4, 4, "above leaves")],
        (rmgr::BTREE, 0xC0) => &[NonZero(0, 2, "deleted"), NonZero(2, 2, "updated")],
        (rmgr::HASH, 0x20) => &[Bits(2, 1, &["bitmap page found"])],
        (rmgr::HASH, 0x40) => &[Bits(8, 1, &["masks", "split point"])],
        (rmgr::HASH, 0x70) => &[Bits(2, 1, &["primary bucket is written"])],
        (rmgr::HASH, 0x80) => &[
            NonZero(8, 2, "tuples"),
            Bits(10, 1, &["primary bucket is written"]),
            Bits(11, 1, &["previous page is written"]),
        ],
        (rmgr::HASH, 0x90) => {
            &[Bits(0, 1, &["clears dead marks"]), Bits(1, 1, &["primary bucket"])]
        }
        (rmgr::GIN, 0x20) => &[Bits(0, 2, &["data", "leaf"])],
        (rmgr::GIN, 0x30) => &[Bits(24, 2, &["data", "leaf", "root"])],
        (rmgr::GIN, 0x60) => &[NonZero(80, 4, "tuples")],
        (rmgr::GIST, 0x00) => &[NonZero(0, 2, "deletes"), NonZero(2, 2, "inserts")],
        (rmgr::GIST, 0x30) => &[Bits(18, 1, &["leaf"]), Bits(20, 1, &["follow right"])],
        (rmgr::SPGIST, 0x10) => {
            &[Bits(0, 1, &["new page"]), Bits(1, 1, &["nulls"]), NonZero(6, 2, "parent")]
        }
        (rmgr::SPGIST, 0x20) => {
            &[Bits(2, 1, &["new page"]), Bits(3, 1, &["replaces dead"]), Bits(4, 1, &["nulls"])]
        }
        (rmgr::SPGIST, 0x30) => &[Bits(4, 1, &["new page"]), NonZero(6, 2, "parent")],
        (rmgr::SPGIST, 0x40) => &[Bits(4, 1, &["new page"]), Bits(5, 1, &["postfix on same page"])],
        (rmgr::SPGIST, 0x50) => &[
            Bits(0, 1, &["root"]),
            Bits(6, 1, &["source rebuilt"]),
            Bits(7, 1, &["destination rebuilt"]),
            Bits(10, 1, &["inner rebuilt"]),
            Bits(11, 1, &["nulls"]),
            Bits(12, 1, &["inner is parent"]),
        ],
        (rmgr::SPGIST, 0x60) => &[
            NonZero(0, 2, "dead"),
            NonZero(2, 2, "placeholders"),
            NonZero(4, 2, "moves"),
            NonZero(6, 2, "chains"),
        ],
        (rmgr::SPGIST, 0x80) if horizon => &[NonZero(0, 2, "redirects"), Bits(8, 1, &["catalog"])],
        (rmgr::SPGIST, 0x80) => &[NonZero(0, 2, "redirects")],
        _ => &[],
    }
}

fn number(main: &[u8], at: usize, width: usize) -> u64 {
    let bytes = main.get(at..at + width).unwrap_or(&[]);
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The branch of a record.
pub(crate) fn of(version: PgVersion, record: &DecodedRecord<'_>) -> Branch {
    let mut blocks = 0;
    for block in record.blocks.iter().filter(|block| block.id < BLOCKS) {
        let form = if block.has_applied_image() {
            3
        } else if block.will_init {
            2
        } else {
            1
        };
        blocks |= form << (block.id * 2);
    }
    let (rmgr, info) = (record.header.rmgr, record.header.opcode());
    let parts = parts(version, rmgr, info);
    let mut flags = 0;
    let mut shift = 0;
    for part in parts {
        match *part {
            Bits(at, width, names) => {
                for (bit, name) in names.iter().enumerate() {
                    let set = number(record.main_data, at, width) >> bit & 1 != 0;
                    flags |= u32::from(set && !name.is_empty()) << shift;
                    shift += 1;
                }
            }
            NonZero(at, width, _) => {
                flags |= u32::from(number(record.main_data, at, width) != 0) << shift;
                shift += 1;
            }
        }
    }
    Branch { blocks, flags }
}

/// As `blocks 0 1+init; all-visible cleared`; empty for a record that refers to no block and has no flags set.
pub(crate) fn describe(kind: RecordKind, branch: Branch) -> String {
    let mut text = String::new();
    for id in 0..BLOCKS {
        let form = branch.blocks >> (id * 2) & 3;
        if form > 0 {
            let suffix = ["", "", "+init", "+image"][usize::from(form)];
            let separator = if text.is_empty() { "blocks " } else { " " };
            let _ = write!(text, "{separator}{id}{suffix}");
        }
    }
    let parts = parts(kind.version, kind.rmgr, kind.info);
    let names = parts.iter().flat_map(|part| match part {
        Bits(_, _, names) => names.iter(),
        NonZero(_, _, name) => std::slice::from_ref(name).iter(),
    });
    let set = names.enumerate().filter(|(bit, _)| branch.flags >> bit & 1 != 0);
    for (at, (_, name)) in set.enumerate() {
        let separator = match (at, text.is_empty()) {
            (0, true) => "",
            (0, false) => "; ",
            _ => ", ",
        };
        text.push_str(separator);
        text.push_str(name);
    }
    text
}

#[cfg(test)]
mod tests;
