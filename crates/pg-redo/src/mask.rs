//! What `wal_consistency_checking` does not compare (the `*_mask` functions, access/common/bufmask.c).
//!
//! A *strict* mask keeps what PostgreSQL hides although redo determines it: the contents of visibility map pages, and
//! the all-visible flag.

use crate::heap_tuple::{self, XMIN_COMMITTED, XMIN_INVALID};
use crate::page::{self, ALL_VISIBLE, HAS_FREE_LINES, HEADER_SIZE, Line, PAGE_FULL, Page};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::rmgr;

const TUPLE_XACT_BITS: u16 = 0xFFF0;
const XMAX_COMMITTED: u16 = 0x0400;
const XMAX_INVALID: u16 = 0x0800;
const SPECULATIVE_OFFSET: u16 = 0xFFFE;

/// Which page a mask is for.
#[derive(Clone, Copy, Debug)]
pub struct MaskTarget {
    /// Resource manager of the record.
    pub rmgr: u8,
    /// Block number.
    pub block: u32,
    /// The page is a visibility map's.
    pub is_visibility_map: bool,
    /// Keep what only PostgreSQL's own comparison hides.
    pub strict: bool,
}

/// Hides from a page what need not be equal after redo. Does nothing to resource managers without a mask.
pub fn mask(page: &mut Page, target: MaskTarget) {
    page[..10].fill(0);
    match target.rmgr {
        rmgr::HEAP | rmgr::HEAP2 if target.is_visibility_map && target.strict => {}
        rmgr::HEAP | rmgr::HEAP2 => mask_heap(page, target),
        rmgr::BTREE => mask_btree(page),
        rmgr::HASH => mask_hash(page),
        rmgr::GIN => mask_gin(page),
        rmgr::GIST => mask_gist(page),
        rmgr::SPGIST => {
            mask_hints(page);
            if usize::from(page::lower(page)) >= HEADER_SIZE {
                mask_hole(page);
            }
        }
        rmgr::BRIN => mask_brin(page),
        rmgr::SEQUENCE | rmgr::GENERIC => mask_hole(page),
        _ => {}
    }
}

fn mask_hints(page: &mut Page) {
    page::set_prune_xid(page, 0);
    let flags = page::flags(page);
    page::set_flags(page, flags & !(PAGE_FULL | HAS_FREE_LINES | ALL_VISIBLE));
}

fn mask_hole(page: &mut Page) {
    let (lower, upper) = (usize::from(page::lower(page)), usize::from(page::upper(page)));
    if lower <= upper && upper <= PAGE_SIZE {
        page[lower..upper].fill(0);
    }
}

fn mask_content(page: &mut Page) {
    page[HEADER_SIZE..].fill(0);
    page[12..16].fill(0);
}

fn mask_line_flags(page: &mut Page) {
    for number in 1..=page::line_count(page) {
        if let Ok(line) = page::line(page, number) {
            let _ = page::set_line(page, number, Line { flags: 0, ..line });
        }
    }
}

fn special_u16(page: &Page, from_end: usize) -> u16 {
    u16::from_le_bytes([page[PAGE_SIZE - from_end], page[PAGE_SIZE - from_end + 1]])
}

fn set_special_u16(page: &mut Page, from_end: usize, value: u16) {
    let at = PAGE_SIZE - from_end;
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn mask_heap(page: &mut Page, target: MaskTarget) {
    let all_visible = page::flags(page) & ALL_VISIBLE;
    mask_hints(page);
    if target.strict {
        page::set_flag(page, ALL_VISIBLE, all_visible != 0);
    }
    mask_hole(page);
    for number in 1..=page::line_count(page) {
        let Ok(line) = page::line(page, number) else { continue };
        if line.is_normal() {
            mask_tuple(page, target.block, number);
        }
        if line.has_storage() {
            let end = line.range().end;
            if let Some(padding) = page.get_mut(end..page::max_align(end)) {
                padding.fill(0);
            }
        }
    }
}

fn mask_tuple(page: &mut Page, block: u32, number: u16) {
    let Ok(bytes) = page::item_mut(page, number) else { return };
    if bytes.len() < heap_tuple::HEADER_SIZE {
        return;
    }
    let infomask = u16::from_le_bytes([bytes[20], bytes[21]]);
    let frozen = XMIN_COMMITTED | XMIN_INVALID;
    let hidden =
        if infomask & frozen == frozen { XMAX_COMMITTED | XMAX_INVALID } else { TUPLE_XACT_BITS };
    bytes[20..22].copy_from_slice(&(infomask & !hidden).to_le_bytes());
    bytes[8..12].fill(0);
    if u16::from_le_bytes([bytes[16], bytes[17]]) == SPECULATIVE_OFFSET {
        bytes[12..18].copy_from_slice(&heap_tuple::tid(block, number));
    }
}

fn mask_btree(page: &mut Page) {
    const LEAF: u16 = 1;
    const SPLIT_END: u16 = 32;
    const HAS_GARBAGE: u16 = 64;
    mask_hints(page);
    mask_hole(page);
    let flags = special_u16(page, 4);
    if flags & LEAF != 0 {
        mask_line_flags(page);
    }
    set_special_u16(page, 4, flags & !(SPLIT_END | HAS_GARBAGE));
    set_special_u16(page, 2, 0);
}

fn mask_hash(page: &mut Page) {
    const PAGE_TYPE: u16 = 0x0F;
    const OVERFLOW_OR_BUCKET: u16 = 3;
    const HAS_DEAD_TUPLES: u16 = 128;
    mask_hints(page);
    mask_hole(page);
    let flags = special_u16(page, 4);
    if flags & PAGE_TYPE == 0 {
        mask_content(page);
    } else if flags & OVERFLOW_OR_BUCKET != 0 {
        mask_line_flags(page);
    }
    let flags = special_u16(page, 4);
    set_special_u16(page, 4, flags & !HAS_DEAD_TUPLES);
}

fn mask_gin(page: &mut Page) {
    const DELETED: u16 = 4;
    mask_hints(page);
    if special_u16(page, 2) & DELETED != 0 {
        mask_content(page);
    } else if usize::from(page::lower(page)) > HEADER_SIZE {
        mask_hole(page);
    }
}

fn mask_gist(page: &mut Page) {
    const LEAF: u16 = 1;
    // Minor versions differ in whether deleting sets it, and up to 15.18 redo of DELETE sets it where the primary does
    // not, so that stock recovery fails its own check. PostgreSQL reads it nowhere; its own mask leaves it.
    const TUPLES_DELETED: u16 = 4;
    const FOLLOW_RIGHT: u16 = 8;
    const HAS_GARBAGE: u16 = 16;
    mask_hints(page);
    mask_hole(page);
    page[PAGE_SIZE - 16..PAGE_SIZE - 8].fill(0);
    let flags = special_u16(page, 4);
    if flags & LEAF != 0 {
        mask_line_flags(page);
    }
    set_special_u16(page, 4, (flags | FOLLOW_RIGHT) & !(HAS_GARBAGE | TUPLES_DELETED));
}

fn mask_brin(page: &mut Page) {
    const EVACUATE: u16 = 1;
    const META: u16 = 0xF091;
    const REGULAR: u16 = 0xF093;
    mask_hints(page);
    let kind = special_u16(page, 2);
    if kind == REGULAR || (kind == META && usize::from(page::lower(page)) > HEADER_SIZE) {
        mask_hole(page);
    }
    let flags = special_u16(page, 4);
    set_special_u16(page, 4, flags & !EVACUATE);
}
