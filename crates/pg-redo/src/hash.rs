//! Hash index records (access/hash/hash_xlog.c, access/hash_xlog.h).
//!
//! Special space: previous u32, next u32, bucket u32, flags u16, page id u16.

use crate::btree_posting::tuple_size;
use crate::error::{Bad, Step};
use crate::hash_meta;
use crate::page::{self, Add, HEADER_SIZE, Page, max_align};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::{u8_at, u16_at, u32_at};

const INIT_META_PAGE: u8 = 0x00;
const INIT_BITMAP_PAGE: u8 = 0x10;
const INSERT: u8 = 0x20;
const ADD_OVFL_PAGE: u8 = 0x30;
const SPLIT_ALLOCATE_PAGE: u8 = 0x40;
const SPLIT_COMPLETE: u8 = 0x60;
const MOVE_PAGE_CONTENTS: u8 = 0x70;
const SQUEEZE_PAGE: u8 = 0x80;
const DELETE: u8 = 0x90;
const SPLIT_CLEANUP: u8 = 0xA0;
const UPDATE_META_PAGE: u8 = 0xB0;
const VACUUM_ONE_PAGE: u8 = 0xC0;

pub(crate) const SPECIAL_SIZE: usize = 16;
const PREV: usize = PAGE_SIZE - SPECIAL_SIZE;
const NEXT: usize = PREV + 4;
const FLAGS: usize = PREV + 12;
const PAGE_ID: u16 = 0xFF80;

const OVERFLOW_PAGE: u16 = 1;
const BITMAP_PAGE: u16 = 4;
const NEEDS_SPLIT_CLEANUP: u16 = 64;
const HAS_DEAD_TUPLES: u16 = 128;

const INVALID: u32 = u32::MAX;

/// True if the page changed and so gets the record's LSN.
pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    let (main, data) = (piece.main, piece.data);
    match (piece.info & 0xF0, piece.role) {
        (INIT_META_PAGE, 0) => hash_meta::init_meta(page, main)?,
        (INIT_BITMAP_PAGE, 0) => init_bitmap(page, u16_at(main, 0)?)?,
        (INIT_BITMAP_PAGE, 1) => hash_meta::add_first_bitmap(page)?,
        (INSERT, 0) => page::add_item(page, data, u16_at(main, 0)?, Add::Insert)?,
        (INSERT, 1) => hash_meta::add_tuples(page, 1.0)?,
        (ADD_OVFL_PAGE, role) => add_overflow(page, piece, role)?,
        (SPLIT_ALLOCATE_PAGE, role) => split_allocate(page, piece, role)?,
        (SPLIT_COMPLETE, 0) => page::put_u16(page, FLAGS, u16_at(main, 0)?)?,
        (SPLIT_COMPLETE, 1) => page::put_u16(page, FLAGS, u16_at(main, 2)?)?,
        (MOVE_PAGE_CONTENTS, 1) => insert_tuples(page, data, u16_at(main, 0)?)?,
        (MOVE_PAGE_CONTENTS, 2) => delete_listed(page, data)?,
        (SQUEEZE_PAGE, role) => return squeeze(page, piece, role),
        (DELETE, 1) => {
            delete_listed(page, data)?;
            if u8_at(main, 0)? != 0 {
                clear_flags(page, HAS_DEAD_TUPLES)?;
            }
        }
        (SPLIT_CLEANUP, 0) => clear_flags(page, NEEDS_SPLIT_CLEANUP)?,
        (UPDATE_META_PAGE, 0) => hash_meta::set_tuples(page, main)?,
        (VACUUM_ONE_PAGE, 0) => {
            delete_listed(page, main.get(8..).unwrap_or(&[]))?;
            clear_flags(page, HAS_DEAD_TUPLES)?;
        }
        (VACUUM_ONE_PAGE, 1) => hash_meta::add_tuples(page, -vacuumed_tuples(piece)?)?,
        _ => return Err(Bad("the record does not change this block")),
    }
    Ok(true)
}

/// The count is four bytes in 15, two from 16 on.
fn vacuumed_tuples(piece: &Piece<'_>) -> Step<f64> {
    Ok(if piece.version >= PgVersion::V16 {
        f64::from(u16_at(piece.main, 4)?)
    } else {
        f64::from(u32_at(piece.main, 4)?)
    })
}

/// `_hash_initbuf` and its likes: an empty page.
pub(crate) fn init(page: &mut Page, prev: u32, bucket: u32, flags: u16) -> Step<()> {
    page::init(page, SPECIAL_SIZE);
    page::put_u32(page, PREV, prev)?;
    page::put_u32(page, NEXT, INVALID)?;
    page::put_u32(page, PREV + 8, bucket)?;
    page::put_u16(page, FLAGS, flags)?;
    page::put_u16(page, FLAGS + 2, PAGE_ID)
}

/// All pages taken.
fn init_bitmap(page: &mut Page, size: u16) -> Step<()> {
    init(page, INVALID, INVALID, BITMAP_PAGE)?;
    let end = HEADER_SIZE + usize::from(size);
    let bits = page.get_mut(HEADER_SIZE..end.min(PAGE_SIZE - SPECIAL_SIZE));
    bits.ok_or(Bad("the bitmap is longer than the page"))?.fill(0xFF);
    page::set_lower(page, end as u16);
    Ok(())
}

fn set_bit(page: &mut Page, bit: u32, on: bool) -> Step<()> {
    let at = HEADER_SIZE + (bit / 8) as usize;
    if at >= PAGE_SIZE - SPECIAL_SIZE {
        return Err(Bad("the bit is outside of the bitmap"));
    }
    let mask = 1 << (bit % 8);
    page[at] = if on { page[at] | mask } else { page[at] & !mask };
    Ok(())
}

fn clear_flags(page: &mut Page, flags: u16) -> Step<()> {
    let old = page::get_u16(page, FLAGS)?;
    page::put_u16(page, FLAGS, old & !flags)
}

fn add_overflow(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<()> {
    match role {
        0 => init(page, piece.needed_block(1)?, u32_at(piece.data, 0)?, OVERFLOW_PAGE),
        1 => page::put_u32(page, NEXT, piece.needed_block(0)?),
        2 => set_bit(page, u32_at(piece.data, 0)?, true),
        3 => init_bitmap(page, u16_at(piece.main, 0)?),
        4 => {
            let found = u8_at(piece.main, 2)? != 0;
            hash_meta::add_overflow(page, u32_at(piece.data, 0)?, found, piece.other_block(3))
        }
        _ => Err(Bad("the record does not change this block")),
    }
}

fn split_allocate(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<()> {
    let mut main = piece.main_reader();
    let new_bucket = main.u32()?;
    let (old_flags, new_flags) = (main.u16()?, main.u16()?);
    let updates = main.u8()?;
    match role {
        0 => {
            page::put_u16(page, FLAGS, old_flags)?;
            page::put_u32(page, PREV, new_bucket)
        }
        1 => init(page, new_bucket, new_bucket, new_flags),
        2 => hash_meta::split(page, new_bucket, updates, piece.data),
        _ => Err(Bad("the record does not change this block")),
    }
}

/// Offsets, then the tuples that go there.
fn insert_tuples(page: &mut Page, data: &[u8], count: u16) -> Step<()> {
    let offsets = usize::from(count) * 2;
    let mut rest = data.get(offsets..).ok_or(Bad("the record's data ends too early"))?;
    for at in 0..usize::from(count) {
        let length = max_align(tuple_size(rest)?);
        let (tuple, tail) =
            rest.split_at_checked(length).ok_or(Bad("an index tuple is cut off"))?;
        page::add_item(page, tuple, u16_at(data, at * 2)?, Add::Insert)?;
        rest = tail;
    }
    Ok(())
}

fn delete_listed(page: &mut Page, offsets: &[u8]) -> Step<()> {
    page::delete_items(page, |at| u16_at(offsets, at * 2).unwrap_or(0), offsets.len() / 2)
}

fn squeeze(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<bool> {
    let mut main = piece.main_reader();
    let (prev, next) = (main.u32()?, main.u32()?);
    let count = main.u16()?;
    main.u8()?;
    let write_page_is_prev = main.u8()? != 0;
    match role {
        1 => {
            insert_tuples(page, piece.data, count)?;
            if write_page_is_prev {
                page::put_u32(page, NEXT, next)?;
            }
            // From 17 on a write page that is only locked keeps its LSN; before, it gets the record's.
            let changed = count > 0 || write_page_is_prev;
            return Ok(changed || piece.version < PgVersion::V17);
        }
        2 => init(page, INVALID, INVALID, 0)?,
        3 => page::put_u32(page, NEXT, next)?,
        4 => page::put_u32(page, PREV, prev)?,
        5 => set_bit(page, u32_at(piece.data, 0)?, false)?,
        6 => hash_meta::set_first_free(page, u32_at(piece.data, 0)?)?,
        _ => return Err(Bad("the record does not change this block")),
    }
    Ok(true)
}
