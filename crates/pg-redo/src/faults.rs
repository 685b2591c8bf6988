//! Rules broken on purpose, one at a time: what the oracle does not notice, it does not prove.
//!
//! Only with the feature `redo-faults`. A fault undoes, after redo of one block of one kind of record, what one rule did
//! to the page. [`set`] chooses the fault of the calling thread.

use crate::page::{self, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::u16_at;
use pgstrata_pg_wal::rmgr;
use std::cell::Cell;

/// What is left as it was before the record.
#[derive(Clone, Copy, Debug)]
enum Kept {
    /// The whole page: the record is skipped.
    Page,
    /// Bytes from a position in the page.
    At(usize, usize),
    /// Bytes from a distance to the page's end: a field of the special space.
    FromEnd(usize, usize),
    /// `pd_lower` and the line pointers.
    Lines,
    /// All between the line pointers of before and the special space.
    Content,
    /// Bytes of the heap tuple whose line pointer's number is at the first position in the main data.
    Tuple(usize, usize, usize),
}

/// A broken rule.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// What it is called.
    pub name: &'static str,
    rmgr: u8,
    opcode: u8,
    role: u8,
    kept: Kept,
}

const fn fault(name: &'static str, rmgr: u8, opcode: u8, role: u8, kept: Kept) -> Fault {
    Fault { name, rmgr, opcode, role, kept }
}

impl Fault {
    /// True of the records whose redo has the rule.
    pub fn may_show(&self, rmgr: u8, info: u8) -> bool {
        self.rmgr == rmgr && self.opcode == opcode(rmgr, info)
    }
}

fn opcode(rmgr: u8, info: u8) -> u8 {
    match rmgr {
        // The highest bit says that the page is rebuilt, which the piece knows.
        rmgr::HEAP | rmgr::HEAP2 | rmgr::BRIN => info & 0x70,
        rmgr::GENERIC => 0,
        _ => info & 0xF0,
    }
}

use Kept::{At, Content, FromEnd, Lines, Tuple};

const HEAP: u8 = rmgr::HEAP;
const HEAP2: u8 = rmgr::HEAP2;
const BTREE: u8 = rmgr::BTREE;
const HASH: u8 = rmgr::HASH;
const GIN: u8 = rmgr::GIN;
const GIST: u8 = rmgr::GIST;
const SPGIST: u8 = rmgr::SPGIST;
const BRIN: u8 = rmgr::BRIN;

/// All faults.
pub const FAULTS: &[Fault] = &[
    fault("heap-insert-xmin", HEAP, 0x00, 0, Tuple(0, 0, 4)),
    fault("heap-insert-ctid", HEAP, 0x00, 0, Tuple(0, 12, 6)),
    fault("heap-insert-all-visible", HEAP, 0x00, 0, At(10, 2)),
    fault("heap-delete-xmax", HEAP, 0x10, 0, Tuple(4, 4, 4)),
    fault("heap-delete-keys-updated", HEAP, 0x10, 0, Tuple(4, 18, 2)),
    fault("heap-update-old-ctid", HEAP, 0x20, 1, Tuple(4, 12, 6)),
    fault("heap-update-new-infomask2", HEAP, 0x20, 0, Tuple(12, 18, 2)),
    fault("heap-hot-update-old-infomask2", HEAP, 0x40, 0, Tuple(4, 18, 2)),
    fault("heap-lock-xmax", HEAP, 0x60, 0, Tuple(4, 4, 4)),
    fault("heap-inplace", HEAP, 0x70, 0, Kept::Page),
    fault("heap2-multi-insert-lower", HEAP2, 0x50, 0, At(12, 2)),
    fault("heap2-prune-lines", HEAP2, 0x10, 0, Lines),
    fault("heap2-prune-upper", HEAP2, 0x10, 0, At(14, 2)),
    fault("heap2-vacuum-lines", HEAP2, 0x20, 0, Lines),
    fault("heap2-freeze", HEAP2, 0x30, 0, Kept::Page),
    fault("heap2-visible-map", HEAP2, 0x40, 0, Kept::Page),
    fault("heap2-visible-flag", HEAP2, 0x40, 1, At(10, 2)),
    fault("heap2-lock-updated-xmax", HEAP2, 0x60, 0, Tuple(4, 4, 4)),
    fault("btree-insert-lines", BTREE, 0x00, 0, Lines),
    fault("btree-insert-upper-incomplete-split", BTREE, 0x10, 1, FromEnd(4, 2)),
    fault("btree-split-left-next", BTREE, 0x40, 0, FromEnd(12, 4)),
    fault("btree-split-right-prev", BTREE, 0x40, 1, FromEnd(16, 4)),
    fault("btree-split-sibling-prev", BTREE, 0x40, 2, FromEnd(16, 4)),
    fault("btree-split-left-high-key", BTREE, 0x30, 0, Content),
    fault("btree-insert-post", BTREE, 0x50, 0, Content),
    fault("btree-dedup", BTREE, 0x60, 0, Content),
    fault("btree-delete-lines", BTREE, 0x70, 0, Lines),
    fault("btree-unlink-left-next", BTREE, 0x80, 1, FromEnd(12, 4)),
    fault("btree-unlink-right-prev", BTREE, 0x80, 2, FromEnd(16, 4)),
    fault("btree-newroot-level", BTREE, 0xA0, 0, FromEnd(8, 4)),
    fault("btree-newroot-meta-root", BTREE, 0xA0, 2, At(HEADER_SIZE + 8, 4)),
    fault("btree-halfdead-flags", BTREE, 0xB0, 0, FromEnd(4, 2)),
    fault("btree-halfdead-parent", BTREE, 0xB0, 1, Lines),
    fault("btree-vacuum", BTREE, 0xC0, 0, Lines),
    fault("hash-insert-count", HASH, 0x20, 1, At(HEADER_SIZE + 8, 8)),
    fault("hash-add-overflow-next", HASH, 0x30, 1, FromEnd(12, 4)),
    fault("hash-split-complete-flags", HASH, 0x60, 0, FromEnd(4, 2)),
    fault("hash-delete-lines", HASH, 0x90, 1, Lines),
    fault("gin-insert", GIN, 0x20, 0, Content),
    fault("gin-meta-pending", GIN, 0x60, 0, At(HEADER_SIZE + 16, 8)),
    fault("gin-delete-list-flags", GIN, 0x80, 1, FromEnd(2, 2)),
    fault("gin-vacuum-leaf", GIN, 0x90, 0, Content),
    fault("gist-update-lines", GIST, 0x00, 0, Lines),
    fault("gist-split-rightlink", GIST, 0x30, 1, FromEnd(8, 4)),
    fault("gist-delete-page-flags", GIST, 0x60, 0, FromEnd(4, 2)),
    fault("spgist-add-leaf", SPGIST, 0x10, 0, Content),
    fault("spgist-move-leafs-placeholders", SPGIST, 0x20, 0, Lines),
    fault("spgist-picksplit-inner", SPGIST, 0x50, 2, Content),
    fault("spgist-vacuum-leaf-placeholders", SPGIST, 0x60, 0, FromEnd(4, 2)),
    fault("spgist-vacuum-redirect-count", SPGIST, 0x80, 0, FromEnd(6, 2)),
    fault("brin-create-pages-per-range", BRIN, 0x00, 0, At(HEADER_SIZE + 8, 4)),
    fault("brin-insert-revmap", BRIN, 0x10, 1, Content),
    fault("brin-samepage-update", BRIN, 0x30, 0, Content),
    fault("brin-desummarize-revmap", BRIN, 0x50, 0, Content),
    fault("sequence-log", rmgr::SEQUENCE, 0x00, 0, Content),
    fault("generic-delta", rmgr::GENERIC, 0x00, 0, Content),
];

thread_local! {
    static ACTIVE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The fault of this thread's redo from now on, by its place in [`FAULTS`]; or none.
pub fn set(fault: Option<usize>) {
    ACTIVE.set(fault);
}

/// Breaks the chosen rule, if the piece is of its record and block.
pub(crate) fn inject(before: &Page, page: &mut Page, piece: &Piece<'_>) {
    let Some(fault) = ACTIVE.get().and_then(|index| FAULTS.get(index)) else { return };
    if fault.may_show(piece.rmgr, piece.info) && fault.role == piece.role {
        keep(fault.kept, before, page, piece);
    }
}

fn keep(kept: Kept, before: &Page, page: &mut Page, piece: &Piece<'_>) {
    let range = match kept {
        Kept::Page => 8..PAGE_SIZE,
        At(at, length) => at..at + length,
        FromEnd(distance, length) => PAGE_SIZE - distance..PAGE_SIZE - distance + length,
        Lines => {
            page[12..14].copy_from_slice(&before[12..14]);
            HEADER_SIZE..HEADER_SIZE + usize::from(page::line_count(before)) * 4
        }
        Content => {
            let lines = HEADER_SIZE + usize::from(page::line_count(before)) * 4;
            let special = usize::from(page::special(page)).clamp(HEADER_SIZE, PAGE_SIZE);
            // Pages without line pointers have pd_lower at the end of their content.
            let start = if piece.rmgr == rmgr::BTREE { lines } else { HEADER_SIZE };
            start.min(special)..special
        }
        Tuple(number_at, at, length) => {
            let number = u16_at(piece.main, number_at).unwrap_or(0);
            let Ok(line) = page::line(page, number) else { return };
            let start = usize::from(line.offset) + at;
            start.min(PAGE_SIZE)..(start + length).min(PAGE_SIZE)
        }
    };
    page[range.clone()].copy_from_slice(&before[range]);
}
