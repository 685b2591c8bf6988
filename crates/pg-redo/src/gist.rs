//! GiST records (access/gist/gistxlog.c, access/gistxlog.h).
//!
//! Special space: NSN as a page LSN, right link u32, flags u16, page id u16.

use crate::btree_posting::tuple_size;
use crate::error::{Bad, Step};
use crate::page::{self, Add, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::u16_at;

const PAGE_UPDATE: u8 = 0x00;
const DELETE: u8 = 0x10;
const PAGE_SPLIT: u8 = 0x30;
const PAGE_DELETE: u8 = 0x60;

const SPECIAL_SIZE: usize = 16;
const NSN: usize = PAGE_SIZE - SPECIAL_SIZE;
const RIGHT_LINK: usize = NSN + 8;
const FLAGS: usize = NSN + 12;
const PAGE_ID: u16 = 0xFF81;

const LEAF: u16 = 1;
const DELETED: u16 = 2;
const TUPLES_DELETED: u16 = 4;
const FOLLOW_RIGHT: u16 = 8;
const HAS_GARBAGE: u16 = 16;

const ROOT: u32 = 0;
const INVALID_BLOCK: u32 = u32::MAX;

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    match (piece.info & 0xF0, piece.role) {
        (PAGE_UPDATE, 0) => update(page, piece),
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => finish_left_child(page, piece.end_lsn),
        (DELETE, 0) => delete(page, piece),
        (PAGE_SPLIT, role) => split(page, piece, role),
        (PAGE_DELETE, 0) => {
            change_flags(page, 0, DELETED)?;
            let full_xid = piece.main.get(..8).ok_or(Bad("the record's data ends too early"))?;
            page::put(page, HEADER_SIZE, full_xid)?;
            page::set_lower(page, (HEADER_SIZE + 8) as u16);
            Ok(())
        }
        (PAGE_DELETE, 1) => page::delete_item(page, u16_at(piece.main, 8)?),
        _ => Err(Bad("the record does not change this block")),
    }
}

fn change_flags(page: &mut Page, clear: u16, set: u16) -> Step<()> {
    let flags = page::get_u16(page, FLAGS)?;
    page::put_u16(page, FLAGS, flags & !clear | set)
}

fn set_nsn(page: &mut Page, nsn: Lsn) -> Step<()> {
    page::put_u32(page, NSN, (nsn.0 >> 32) as u32)?;
    page::put_u32(page, NSN + 4, nsn.0 as u32)
}

/// `gistRedoClearFollowRight`: the downlink of the page's right half is in the parent now.
fn finish_left_child(page: &mut Page, end_lsn: Lsn) -> Step<()> {
    set_nsn(page, end_lsn)?;
    change_flags(page, FOLLOW_RIGHT, 0)
}

/// Adds the tuples behind those that the page has.
fn append(page: &mut Page, mut tuples: &[u8]) -> Step<()> {
    while !tuples.is_empty() {
        let size = tuple_size(tuples)?.max(1);
        let (tuple, rest) =
            tuples.split_at_checked(size).ok_or(Bad("an index tuple is cut off"))?;
        let number = page::line_count(page) + 1;
        page::add_item(page, tuple, number, Add::Insert)?;
        tuples = rest;
    }
    Ok(())
}

fn update(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let deleted = usize::from(u16_at(piece.main, 0)?);
    let inserted = u16_at(piece.main, 2)?;
    let mut data = piece.data_reader();
    let offsets = data.take(deleted * 2)?;
    if deleted == 1 && inserted == 1 {
        // As the primary does, so that tuples lie in the same places.
        return page::overwrite_item(page, u16_at(offsets, 0)?, data.rest());
    }
    if deleted > 0 {
        page::delete_items(page, |at| u16_at(offsets, at * 2).unwrap_or(0), deleted)?;
        if page::get_u16(page, FLAGS)? & LEAF != 0 {
            change_flags(page, 0, TUPLES_DELETED)?;
        }
    }
    append(page, data.rest())
}

fn delete(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let count = usize::from(u16_at(piece.main, 4)?);
    let start = if piece.version >= PgVersion::V16 { 8 } else { 6 };
    let offsets = piece.main.get(start..).filter(|offsets| offsets.len() >= count * 2);
    let offsets = offsets.ok_or(Bad("the record's data ends too early"))?;
    page::delete_items(page, |at| u16_at(offsets, at * 2).unwrap_or(0), count)?;
    change_flags(page, HAS_GARBAGE, TUPLES_DELETED)
}

fn split(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<()> {
    let mut main = piece.main_reader();
    let original_right = main.u32()?;
    main.u32()?;
    let original_nsn = Lsn(main.u64()?);
    let was_leaf = main.u8()? != 0;
    main.u8()?;
    let pages = main.u16()?;
    let mark_follow_right = main.u8()? != 0;

    let is_root = piece.block == ROOT;
    let first = if role == 1 { piece.block } else { piece.needed_block(1)? };
    let is_last = u16::from(role) >= pages;
    let mut flags = if was_leaf && !is_root { LEAF } else { 0 };
    if !is_last && first != ROOT && mark_follow_right {
        flags |= FOLLOW_RIGHT;
    }
    let right_link = match (is_root, is_last) {
        (true, _) => INVALID_BLOCK,
        (false, true) => original_right,
        // A stored value may claim any role; no record has block 255.
        (false, false) => piece.needed_block(role.saturating_add(1))?,
    };

    page::init(page, SPECIAL_SIZE);
    set_nsn(page, original_nsn)?;
    page::put_u32(page, RIGHT_LINK, right_link)?;
    page::put_u16(page, FLAGS, flags)?;
    page::put_u16(page, FLAGS + 2, PAGE_ID)?;
    append(page, piece.data.get(4..).ok_or(Bad("the record's data ends too early"))?)
}
