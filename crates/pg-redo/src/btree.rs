//! B-tree records (access/nbtree/nbtxlog.c, access/nbtxlog.h).
//!
//! Special space: previous u32, next u32, level u32, flags u16, cycle id u16.

use crate::btree_posting::{
    self, ALT_TID, TUPLE_HEADER, TidList, block_bytes, block_number, form_posting, remove_tids,
    swap_posting, tuple_size,
};
use crate::error::{Bad, Step};
use crate::page::{self, Add, HEADER_SIZE, Page, max_align};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::{Reader, u16_at, u32_at};

const INSERT_LEAF: u8 = 0x00;
const INSERT_UPPER: u8 = 0x10;
const INSERT_META: u8 = 0x20;
const SPLIT_L: u8 = 0x30;
const SPLIT_R: u8 = 0x40;
const INSERT_POST: u8 = 0x50;
const DEDUP: u8 = 0x60;
const DELETE: u8 = 0x70;
const UNLINK_PAGE: u8 = 0x80;
const UNLINK_PAGE_META: u8 = 0x90;
const NEWROOT: u8 = 0xA0;
const MARK_PAGE_HALFDEAD: u8 = 0xB0;
const VACUUM: u8 = 0xC0;
const META_CLEANUP: u8 = 0xE0;

const SPECIAL_SIZE: usize = 16;
const SPECIAL: usize = PAGE_SIZE - SPECIAL_SIZE;
const PREV: usize = SPECIAL;
const NEXT: usize = SPECIAL + 4;
const LEVEL: usize = SPECIAL + 8;
const FLAGS: usize = SPECIAL + 12;
const CYCLE_ID: usize = SPECIAL + 14;

const LEAF: u16 = 1;
const ROOT: u16 = 2;
const DELETED: u16 = 4;
const META: u16 = 8;
const HALF_DEAD: u16 = 16;
const HAS_GARBAGE: u16 = 64;
const INCOMPLETE_SPLIT: u16 = 128;
const HAS_FULL_XID: u16 = 256;

const MAGIC: u32 = 0x0005_3162;
const META_SIZE: usize = 48;
const HIGH_KEY: u16 = 1;
/// `MaxIndexTuplesPerPage`.
const MAX_TUPLES: usize = 408;

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    match (piece.info & 0xF0, piece.role) {
        (INSERT_LEAF | INSERT_UPPER | INSERT_META, 0) => {
            page::add_item(page, piece.data, u16_at(piece.main, 0)?, Add::Insert)
        }
        (INSERT_UPPER | INSERT_META | NEWROOT, 1) | (SPLIT_L | SPLIT_R, 3) => {
            let flags = page::get_u16(page, FLAGS)?;
            page::put_u16(page, FLAGS, flags & !INCOMPLETE_SPLIT)
        }
        (INSERT_META | NEWROOT, 2) | (UNLINK_PAGE_META, 4) | (META_CLEANUP, 0) => {
            restore_meta(page, piece.data)
        }
        (INSERT_POST, 0) => insert_post(page, piece),
        (SPLIT_L | SPLIT_R, 0) => split_left(page, piece),
        (SPLIT_L | SPLIT_R, 1) => split_right(page, piece),
        (SPLIT_L | SPLIT_R, 2) => page::put_u32(page, PREV, piece.needed_block(1)?),
        (DEDUP, 0) => dedup(page, piece),
        (DELETE | VACUUM, 0) => delete(page, piece),
        (UNLINK_PAGE | UNLINK_PAGE_META, role) => unlink(page, piece, role),
        (NEWROOT, 0) => new_root(page, piece),
        (MARK_PAGE_HALFDEAD, role) => mark_half_dead(page, piece, role),
        _ => Err(Bad("the record does not change this block")),
    }
}

fn init(page: &mut Page, prev: u32, next: u32, level: u32, flags: u16) -> Step<()> {
    page::init(page, SPECIAL_SIZE);
    page::put_u32(page, PREV, prev)?;
    page::put_u32(page, NEXT, next)?;
    page::put_u32(page, LEVEL, level)?;
    page::put_u16(page, FLAGS, flags)
}

/// `_bt_restore_page`: tuples were logged in physical order, which is the reverse of their numbers' order.
fn restore_tuples(page: &mut Page, data: &[u8]) -> Step<()> {
    let mut starts = [0usize; MAX_TUPLES];
    let mut count = 0;
    let mut at = 0;
    while at < data.len() {
        *starts.get_mut(count).ok_or(Bad("the page has too many tuples"))? = at;
        count += 1;
        at += aligned_tuple(data, at)?.len();
    }
    for (number, start) in starts[..count].iter().rev().enumerate() {
        let tuple = aligned_tuple(data, *start)?;
        page::add_item(page, tuple, number as u16 + 1, Add::Insert)?;
    }
    Ok(())
}

/// The tuple that starts there, with its alignment padding.
fn aligned_tuple(data: &[u8], at: usize) -> Step<&[u8]> {
    let rest = data.get(at..).ok_or(Bad("an index tuple is cut off"))?;
    let size = max_align(tuple_size(rest)?);
    if size < TUPLE_HEADER {
        return Err(Bad("an index tuple is too short"));
    }
    rest.get(..size).ok_or(Bad("an index tuple is cut off"))
}

/// `_bt_restore_meta`.
fn restore_meta(page: &mut Page, data: &[u8]) -> Step<()> {
    let mut reader = Reader::new(data);
    let fields: [u8; 24] = reader.array()?;
    let all_equal_image = reader.u8()?;
    init(page, 0, 0, 0, META)?;
    page::put_u32(page, HEADER_SIZE, MAGIC)?;
    page::put(page, HEADER_SIZE + 4, &fields)?;
    // last_cleanup_num_heap_tuples is not used any more.
    page::put(page, HEADER_SIZE + 32, &(-1.0f64).to_le_bytes())?;
    page::put(page, HEADER_SIZE + 40, &[all_equal_image])?;
    page::set_lower(page, (HEADER_SIZE + META_SIZE) as u16);
    Ok(())
}

fn insert_post(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let offset = u16_at(piece.main, 0)?;
    let mut data = piece.data_reader();
    let posting_offset = usize::from(data.u16()?);
    let mut new_item = btree_posting::NewTuple::copy(data.rest())?;
    let before = offset.checked_sub(1).ok_or(Bad("no tuple before the first one"))?;
    let old = page::item_mut(page, before)?;
    let swapped = swap_posting(new_item.bytes_mut(), old, posting_offset)?;
    old.copy_from_slice(swapped.bytes());
    page::add_item(page, new_item.bytes(), offset, Add::Insert)
}

fn split_right(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let level = u32_at(piece.main, 0)?;
    let prev = piece.needed_block(0)?;
    let next = piece.other_block(2).unwrap_or(0);
    init(page, prev, next, level, if level == 0 { LEAF } else { 0 })?;
    restore_tuples(page, piece.data)
}

/// Adds items to a page one after the other.
struct Appender<'a> {
    page: &'a mut Page,
    next: u16,
}

impl Appender<'_> {
    fn add(&mut self, tuple: &[u8]) -> Step<()> {
        page::add_item(self.page, tuple, self.next, Add::Insert)?;
        self.next += 1;
        Ok(())
    }
}

fn split_left(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let level = main.u32()?;
    let first_right = main.u16()?;
    let new_offset = main.u16()?;
    let posting_offset = usize::from(main.u16()?);
    let new_on_left = piece.info & 0xF0 == SPLIT_L;

    let mut data = piece.data;
    let mut new_item = None;
    let mut replacement = None;
    if new_on_left || posting_offset != 0 {
        let tuple = aligned_tuple(data, 0)?;
        data = &data[tuple.len()..];
        let mut tuple = btree_posting::NewTuple::copy(tuple)?;
        if posting_offset != 0 {
            // The logged item is the original one; its TID is swapped into the posting list before it.
            let number = new_offset.checked_sub(1).ok_or(Bad("no tuple before the first one"))?;
            let old = page::item(page, number)?;
            replacement = Some((number, swap_posting(tuple.bytes_mut(), old, posting_offset)?));
        }
        new_item = Some(tuple);
    }
    let new_item = new_item.as_ref().filter(|_| new_on_left);
    let high_key = aligned_tuple(data, 0)?;

    let mut left = page::empty_copy(page)?;
    let mut out = Appender { page: &mut left, next: HIGH_KEY };
    out.add(high_key)?;
    for number in first_data_key(page)?..first_right {
        if let Some((_, posting)) = replacement.as_ref().filter(|(at, _)| *at == number) {
            out.add(posting.bytes())?;
            continue;
        }
        if let Some(item) = new_item.filter(|_| number == new_offset) {
            out.add(item.bytes())?;
        }
        out.add(page::item(page, number)?)?;
    }
    if let Some(item) = new_item.filter(|_| first_right == new_offset) {
        out.add(item.bytes())?;
    }
    restore_temporary(page, left);

    let leaf = if level == 0 { LEAF } else { 0 };
    page::put_u16(page, FLAGS, INCOMPLETE_SPLIT | leaf)?;
    page::put_u32(page, NEXT, piece.needed_block(1)?)?;
    page::put_u16(page, CYCLE_ID, 0)
}

/// `PageRestoreTempPage`: the page is all of the temporary one. Its LSN is set afterwards.
fn restore_temporary(page: &mut Page, temporary: Page) {
    *page = temporary;
}

fn is_rightmost(page: &Page) -> Step<bool> {
    Ok(page::get_u32(page, NEXT)? == 0)
}

fn first_data_key(page: &Page) -> Step<u16> {
    Ok(if is_rightmost(page)? { HIGH_KEY } else { HIGH_KEY + 1 })
}

/// Tuples that are being merged into one posting tuple.
struct Pending {
    base: u16,
    items: u16,
    tids: TidList,
}

fn dedup(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let count = u16_at(piece.main, 0)?;
    let mut intervals = piece.data_reader();
    let mut rest = count;
    let mut next_interval = || -> Step<Option<(u16, u16)>> {
        if rest == 0 {
            return Ok(None);
        }
        rest -= 1;
        Ok(Some((intervals.u16()?, intervals.u16()?)))
    };
    let first = first_data_key(page)?;
    let mut new = page::empty_copy(page)?;
    let mut out = Appender { page: &mut new, next: HIGH_KEY };
    if first != HIGH_KEY {
        out.add(page::item(page, HIGH_KEY)?)?;
    }
    let mut interval = next_interval()?;
    let mut pending = Pending { base: 0, items: 0, tids: TidList::new() };
    for number in first..=page::line_count(page) {
        let tuple = page::item(page, number)?;
        let merges = interval.is_some_and(|(base, items)| {
            pending.items > 0 && base == pending.base && pending.items < items
        });
        if !merges {
            if finish(page, &pending, &mut out)? {
                interval = next_interval()?;
            }
            pending.base = number;
            pending.items = 0;
            pending.tids.clear();
        }
        pending.items += 1;
        pending.tids.push(btree_posting::tids(tuple)?)?;
    }
    if finish(page, &pending, &mut out)? {
        interval = next_interval()?;
    }
    if interval.is_some() {
        return Err(Bad("an interval to deduplicate is not on the page"));
    }
    restore_temporary(page, new);
    clear_garbage(page)
}

/// `_bt_dedup_finish_pending`; true if tuples were merged.
fn finish(page: &Page, pending: &Pending, out: &mut Appender<'_>) -> Step<bool> {
    if pending.items == 0 {
        return Ok(false);
    }
    let base = page::item(page, pending.base)?;
    if pending.items == 1 {
        let size = tuple_size(base)?;
        out.add(base.get(..size).ok_or(Bad("an index tuple is longer than its item"))?)?;
        return Ok(false);
    }
    out.add(form_posting(base, pending.tids.bytes())?.bytes())?;
    Ok(true)
}

fn clear_garbage(page: &mut Page) -> Step<()> {
    let flags = page::get_u16(page, FLAGS)?;
    page::put_u16(page, FLAGS, flags & !HAS_GARBAGE)
}

/// `DELETE` and `VACUUM`: posting lists are updated first, then whole tuples deleted.
fn delete(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let is_vacuum = piece.info & 0xF0 == VACUUM;
    let counts_at = if is_vacuum { 0 } else { 4 };
    let deleted = usize::from(u16_at(piece.main, counts_at)?);
    let updated = usize::from(u16_at(piece.main, counts_at + 2)?);
    let mut data = piece.data_reader();
    let deleted_offsets = data.take(deleted * 2)?;
    let mut updated_offsets = Reader::new(data.take(updated * 2)?);
    while !updated_offsets.is_empty() {
        let offset = updated_offsets.u16()?;
        let count = usize::from(data.u16()?);
        let tuple = remove_tids(page::item(page, offset)?, data.take(count * 2)?)?;
        page::overwrite_item(page, offset, tuple.bytes())?;
    }
    let number = |at: usize| u16_at(deleted_offsets, at * 2).unwrap_or(0);
    page::delete_items(page, number, deleted)?;
    clear_garbage(page)?;
    // Earlier versions keep the cycle id on redo, although the primary clears it.
    if is_vacuum && piece.version >= PgVersion::V18 {
        page::put_u16(page, CYCLE_ID, 0)?;
    }
    Ok(())
}

/// A page whose only tuple is a dummy high key that points to the top of the subtree that is being deleted.
fn half_dead(page: &mut Page, prev: u32, next: u32, top_parent: u32) -> Step<()> {
    init(page, prev, next, 0, HALF_DEAD | LEAF)?;
    let mut tuple = [0; TUPLE_HEADER];
    tuple[0..4].copy_from_slice(&block_bytes(top_parent));
    tuple[6..8].copy_from_slice(&(TUPLE_HEADER as u16 | ALT_TID).to_le_bytes());
    page::add_item(page, &tuple, HIGH_KEY, Add::Insert)
}

fn mark_half_dead(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<()> {
    let mut main = piece.main_reader();
    let parent_offset = main.u16()?;
    main.take(6)?;
    let (left, right, top_parent) = (main.u32()?, main.u32()?, main.u32()?);
    if role == 0 {
        return half_dead(page, left, right, top_parent);
    }
    let next = parent_offset.checked_add(1).ok_or(Bad("no such tuple"))?;
    let right_sibling = block_number(page::item(page, next)?)?;
    let downlink = page::item_mut(page, parent_offset)?.first_chunk_mut::<4>();
    *downlink.ok_or(Bad("an index tuple is too short"))? = block_bytes(right_sibling);
    page::delete_item(page, next)
}

fn unlink(page: &mut Page, piece: &Piece<'_>, role: u8) -> Step<()> {
    let mut main = piece.main_reader();
    let (left, right, level) = (main.u32()?, main.u32()?, main.u32()?);
    main.u32()?;
    let safe_xid = main.u64()?;
    match role {
        0 => {
            let leaf = if level == 0 { LEAF } else { 0 };
            init(page, left, right, level, DELETED | HAS_FULL_XID | leaf)?;
            page::put(page, HEADER_SIZE, &safe_xid.to_le_bytes())?;
            page::set_lower(page, (HEADER_SIZE + 8) as u16);
            Ok(())
        }
        1 => page::put_u32(page, NEXT, right),
        2 => page::put_u32(page, PREV, left),
        3 => {
            let (leaf_left, leaf_right, top_parent) = (main.u32()?, main.u32()?, main.u32()?);
            half_dead(page, leaf_left, leaf_right, top_parent)
        }
        _ => Err(Bad("the record does not change this block")),
    }
}

fn new_root(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let level = u32_at(piece.main, 4)?;
    let leaf = if level == 0 { LEAF } else { 0 };
    init(page, 0, 0, level, ROOT | leaf)?;
    if level > 0 {
        restore_tuples(page, piece.data)?;
    }
    Ok(())
}
