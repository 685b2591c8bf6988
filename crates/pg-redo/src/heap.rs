//! Heap records other than pruning (access/heap/heapam.c, heapam_xlog.c; access/heapam_xlog.h).

use crate::apply::Reads;
use crate::control::xid_precedes;
use crate::error::{Bad, Step};
use crate::heap_prune;
use crate::heap_tuple::{HEADER_SIZE, LoggedHeader, Tuple};
use crate::page::{self, ALL_VISIBLE, Add, Page};
use crate::value::Piece;
use crate::visibility::{self, ALL_FROZEN, BOTH};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::{Reader, u8_at, u16_at, u32_at};
use pgstrata_pg_wal::rmgr;
use std::ops::Range;

const INSERT: u8 = 0x00;
const DELETE: u8 = 0x10;
const UPDATE: u8 = 0x20;
const HOT_UPDATE: u8 = 0x40;
const CONFIRM: u8 = 0x50;
const LOCK: u8 = 0x60;
const INPLACE: u8 = 0x70;

const HEAP2_PRUNE: u8 = 0x10;
const HEAP2_VACUUM: u8 = 0x20;
const HEAP2_FREEZE: u8 = 0x30;
const HEAP2_VISIBLE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const HEAP2_LOCK_UPDATED: u8 = 0x60;

const ALL_VISIBLE_CLEARED: u8 = 0x01;
const INSERT_ALL_FROZEN: u8 = 0x20;
const DELETE_IS_SUPER: u8 = 0x08;
const DELETE_PARTITION_MOVE: u8 = 0x10;
const UPDATE_NEW_ALL_VISIBLE_CLEARED: u8 = 0x02;
const UPDATE_PREFIX: u8 = 0x20;
const UPDATE_SUFFIX: u8 = 0x40;

/// The ctid of a tuple that moved to another partition.
const MOVED_PARTITIONS: (u32, u16) = (0xFFFF_FFFF, 0xFFFD);

/// Is this block the visibility map's, rather than the heap's?
pub(crate) fn is_visibility_map(piece: &Piece<'_>) -> bool {
    match (piece.rmgr, piece.opcode()) {
        (rmgr::HEAP, UPDATE | HOT_UPDATE) => piece.role >= 2,
        (rmgr::HEAP2, HEAP2_VISIBLE) => piece.role == 0,
        (rmgr::HEAP | rmgr::HEAP2, _) => piece.role == 1,
        _ => false,
    }
}

/// What redo of a heap page reads; of others, nothing in particular is known.
#[inline]
pub(crate) fn reads(rmgr: u8, opcode: u8, main: &[u8]) -> Reads {
    match (rmgr, opcode) {
        (rmgr::HEAP, DELETE | UPDATE | HOT_UPDATE | LOCK) => {
            u16_at(main, 4).map_or(Reads::FreeSpace, Reads::Item)
        }
        (rmgr::HEAP2, HEAP2_PRUNE) => Reads::Page,
        _ => Reads::FreeSpace,
    }
}

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    if is_visibility_map(piece) {
        return redo_visibility(page, piece);
    }
    if piece.init {
        page::init(page, 0);
    }
    match piece.opcode() {
        INSERT => insert(page, piece)?,
        DELETE => delete(page, piece)?,
        UPDATE | HOT_UPDATE => update(page, piece)?,
        CONFIRM => {
            let offset = u16_at(piece.main, 0)?;
            tuple(page, offset)?.set_ctid(piece.block, offset);
        }
        LOCK => lock(page, piece)?,
        INPLACE => inplace(page, piece)?,
        _ => return Err(Bad("this kind of record does not change blocks")),
    }
    Ok(true)
}

pub(crate) fn redo_heap2(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    let is_map = is_visibility_map(piece);
    if piece.init {
        page::init(page, 0);
    }
    match piece.opcode() {
        HEAP2_VISIBLE if is_map => return visibility::redo_visible(page, piece),
        HEAP2_VISIBLE => {
            page::set_flag(page, ALL_VISIBLE, true);
            return Ok(piece.hints_logged);
        }
        _ if is_map => return redo_visibility(page, piece),
        HEAP2_PRUNE | HEAP2_VACUUM | HEAP2_FREEZE if piece.version >= PgVersion::V17 => {
            heap_prune::prune_freeze(page, piece)?;
        }
        HEAP2_PRUNE => heap_prune::prune(page, piece)?,
        HEAP2_VACUUM => heap_prune::vacuum(page, piece)?,
        HEAP2_FREEZE => heap_prune::freeze(page, piece)?,
        HEAP2_MULTI_INSERT => multi_insert(page, piece)?,
        HEAP2_LOCK_UPDATED => lock_updated(page, piece)?,
        _ => return Err(Bad("this kind of record does not change blocks")),
    }
    Ok(true)
}

fn tuple(page: &mut Page, offset: u16) -> Step<Tuple<'_>> {
    if !page::line(page, offset)?.is_normal() {
        return Err(Bad("the line pointer holds no tuple"));
    }
    Tuple::new(page::item_mut(page, offset)?)
}

/// `PageSetPrunable`.
fn set_prunable(page: &mut Page, xid: u32) {
    let before = page::prune_xid(page);
    if before == 0 || xid_precedes(xid, before) {
        page::set_prune_xid(page, xid);
    }
}

/// The visibility map's side of a heap change, where the record refers to its block (17.11, 18.6 and later).
fn redo_visibility(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    let (opcode, flags_at) = (piece.opcode(), 7);
    let mut changed = false;
    let mut clear = |page: &mut Page, heap_block: u32, bits: u8| -> Step<()> {
        let (map_block, index) = visibility::place(heap_block);
        if map_block != piece.block {
            return Err(Bad("the visibility map block is not that of the heap block"));
        }
        changed |= visibility::clear(page, index, bits)?;
        Ok(())
    };
    let heap_block = piece.needed_block(0)?;
    match (piece.rmgr, opcode) {
        (rmgr::HEAP, UPDATE | HOT_UPDATE) => {
            let flags = u8_at(piece.main, flags_at)?;
            let old = piece.other_block(1).unwrap_or(heap_block);
            if piece.role == 3 {
                clear(page, old, BOTH)?;
            } else {
                if flags & UPDATE_NEW_ALL_VISIBLE_CLEARED != 0 {
                    clear(page, heap_block, BOTH)?;
                }
                // One map page for both heap blocks is referred to once.
                if flags & ALL_VISIBLE_CLEARED != 0 && visibility::place(old).0 == piece.block {
                    clear(page, old, BOTH)?;
                }
            }
        }
        (rmgr::HEAP, LOCK) | (rmgr::HEAP2, HEAP2_LOCK_UPDATED) => {
            clear(page, heap_block, ALL_FROZEN)?;
        }
        _ => clear(page, heap_block, BOTH)?,
    }
    Ok(changed)
}

/// A tuple of which parts are still to be written, where it lies on its page.
struct Unfinished {
    at: usize,
    end: usize,
}

impl Unfinished {
    /// Makes room for a tuple of `length` bytes and writes its header.
    fn new(
        page: &mut Page,
        header: &[u8; HEADER_SIZE],
        length: usize,
        offset: u16,
    ) -> Step<Unfinished> {
        if length > PAGE_SIZE {
            return Err(Bad("the tuple is longer than a page"));
        }
        let at = page::reserve_item(page, length, offset, Add::Heap)?;
        let mut tuple = Unfinished { at, end: at + length };
        tuple.push(page, header)?;
        Ok(tuple)
    }

    fn room(&mut self, length: usize) -> Step<Range<usize>> {
        let range = self.at..self.at + length;
        if range.end > self.end {
            return Err(Bad("the tuple's parts are longer than the tuple"));
        }
        self.at = range.end;
        Ok(range)
    }

    fn push(&mut self, page: &mut Page, data: &[u8]) -> Step<()> {
        let range = self.room(data.len())?;
        page[range].copy_from_slice(data);
        Ok(())
    }

    /// From elsewhere on the page.
    fn push_within(&mut self, page: &mut Page, from: Range<usize>) -> Step<()> {
        let range = self.room(from.len())?;
        page.copy_within(from, range.start);
        Ok(())
    }
}

/// Adds a tuple of which `data` is what follows the header.
fn add_tuple(page: &mut Page, header: &[u8; HEADER_SIZE], data: &[u8], offset: u16) -> Step<()> {
    Unfinished::new(page, header, HEADER_SIZE + data.len(), offset)?.push(page, data)
}

fn insert(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let offset = u16_at(piece.main, 0)?;
    let flags = u8_at(piece.main, 2)?;
    let mut data = piece.data_reader();
    let header = LoggedHeader::read(&mut data)?;
    let header = header.expand(piece.xid, 0, piece.block, offset);
    add_tuple(page, &header, data.rest(), offset)?;
    set_visibility_flag(page, flags);
    Ok(())
}

fn set_visibility_flag(page: &mut Page, flags: u8) {
    if flags & ALL_VISIBLE_CLEARED != 0 {
        page::set_flag(page, ALL_VISIBLE, false);
    }
    if flags & INSERT_ALL_FROZEN != 0 {
        page::set_flag(page, ALL_VISIBLE, true);
    }
}

fn multi_insert(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let flags = u8_at(piece.main, 0)?;
    let count = usize::from(u16_at(piece.main, 2)?);
    let mut data = piece.data_reader();
    for at in 0..count {
        let offset = if piece.init { at as u16 + 1 } else { u16_at(piece.main, 4 + at * 2)? };
        // Headers are aligned to 2 bytes from the start of the data.
        if !(piece.data.len() - data.rest().len()).is_multiple_of(2) {
            data.u8()?;
        }
        let length = usize::from(data.u16()?);
        let header = LoggedHeader::read(&mut data)?;
        let header = header.expand(piece.xid, 0, piece.block, offset);
        add_tuple(page, &header, data.take(length)?, offset)?;
    }
    if !data.is_empty() {
        return Err(Bad("tuples are longer or shorter than their lengths say"));
    }
    set_visibility_flag(page, flags);
    Ok(())
}

fn delete(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let xmax = u32_at(piece.main, 0)?;
    let offset = u16_at(piece.main, 4)?;
    let infobits = u8_at(piece.main, 6)?;
    let flags = u8_at(piece.main, 7)?;
    let mut tuple = tuple(page, offset)?;
    tuple.replace_xmax_bits(infobits);
    tuple.set_hot_updated(false);
    if flags & DELETE_IS_SUPER != 0 {
        tuple.set_xmin(0);
    } else {
        tuple.set_xmax(xmax);
    }
    tuple.reset_cmax();
    if flags & DELETE_PARTITION_MOVE != 0 {
        tuple.set_ctid(MOVED_PARTITIONS.0, MOVED_PARTITIONS.1);
    } else {
        tuple.set_ctid(piece.block, offset);
    }
    set_prunable(page, piece.xid);
    if flags & ALL_VISIBLE_CLEARED != 0 {
        page::set_flag(page, ALL_VISIBLE, false);
    }
    Ok(())
}

/// `xl_heap_update`.
struct UpdateRecord {
    old_xmax: u32,
    old_offset: u16,
    old_infobits: u8,
    flags: u8,
    new_xmax: u32,
    new_offset: u16,
}

fn update(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let record = UpdateRecord {
        old_xmax: main.u32()?,
        old_offset: main.u16()?,
        old_infobits: main.u8()?,
        flags: main.u8()?,
        new_xmax: main.u32()?,
        new_offset: main.u16()?,
    };
    let same_page = piece.role == 0 && piece.other_block(1).is_none();
    if piece.role == 1 || same_page {
        let new_block = if same_page { piece.block } else { piece.needed_block(0)? };
        update_old(page, piece, &record, new_block)?;
    }
    if piece.role == 0 {
        update_new(page, piece, &record)?;
    }
    Ok(())
}

fn update_old(
    page: &mut Page,
    piece: &Piece<'_>,
    record: &UpdateRecord,
    new_block: u32,
) -> Step<()> {
    let mut tuple = tuple(page, record.old_offset)?;
    tuple.replace_xmax_bits(record.old_infobits);
    tuple.set_hot_updated(piece.opcode() == HOT_UPDATE);
    tuple.set_xmax(record.old_xmax);
    tuple.reset_cmax();
    tuple.set_ctid(new_block, record.new_offset);
    set_prunable(page, piece.xid);
    if record.flags & ALL_VISIBLE_CLEARED != 0 {
        page::set_flag(page, ALL_VISIBLE, false);
    }
    Ok(())
}

fn update_new(page: &mut Page, piece: &Piece<'_>, record: &UpdateRecord) -> Step<()> {
    let mut data = piece.data_reader();
    let prefix = if record.flags & UPDATE_PREFIX != 0 { data.u16()? } else { 0 };
    let suffix = if record.flags & UPDATE_SUFFIX != 0 { data.u16()? } else { 0 };
    let header = LoggedHeader::read(&mut data)?;
    // Prefix and suffix are those of the old tuple's data, which is on this page.
    let (prefix, suffix) = (usize::from(prefix), usize::from(suffix));
    let mut old = 0..0;
    if prefix != 0 || suffix != 0 {
        let start = usize::from(u8_at(page::item(page, record.old_offset)?, 22)?);
        old = page::line(page, record.old_offset)?.range();
        old.start += start;
        if old.start > old.end {
            return Err(Bad("the tuple's header is longer than the tuple"));
        }
        if prefix.max(suffix) > old.len() {
            return Err(Bad("the old tuple is shorter than the part it shares"));
        }
    }
    // The null bitmap and padding come before the prefix.
    let mut bitmap: &[u8] = &[];
    if prefix != 0 {
        let length = usize::from(header.hoff).checked_sub(HEADER_SIZE);
        bitmap = data.take(length.ok_or(Bad("the tuple's header is too short"))?)?;
    }
    let own = data.rest();
    let length = HEADER_SIZE + bitmap.len() + prefix + own.len() + suffix;
    let offset = record.new_offset;
    let header = header.expand(piece.xid, record.new_xmax, piece.block, offset);
    let mut new = Unfinished::new(page, &header, length, offset)?;
    new.push(page, bitmap)?;
    new.push_within(page, old.start..old.start + prefix)?;
    new.push(page, own)?;
    new.push_within(page, old.end - suffix..old.end)?;
    if record.flags & UPDATE_NEW_ALL_VISIBLE_CLEARED != 0 {
        page::set_flag(page, ALL_VISIBLE, false);
    }
    Ok(())
}

/// Offset and infobits of `xl_heap_lock` and `xl_heap_lock_updated`, behind xmax.
fn lock_fields(piece: &Piece<'_>) -> Step<(u32, u16, u8)> {
    let mut main = Reader::new(piece.main);
    Ok((main.u32()?, main.u16()?, main.u8()?))
}

fn lock(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let (xmax, offset, infobits) = lock_fields(piece)?;
    let block = piece.block;
    let mut tuple = tuple(page, offset)?;
    tuple.replace_xmax_bits(infobits);
    if tuple.is_locked_only() {
        tuple.set_hot_updated(false);
        tuple.set_ctid(block, offset);
    }
    tuple.set_xmax(xmax);
    tuple.reset_cmax();
    Ok(())
}

fn lock_updated(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let (xmax, offset, infobits) = lock_fields(piece)?;
    let mut tuple = tuple(page, offset)?;
    tuple.replace_xmax_bits(infobits);
    tuple.set_xmax(xmax);
    Ok(())
}

fn inplace(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut tuple = tuple(page, u16_at(piece.main, 0)?)?;
    let data = tuple.data()?;
    if data.len() != piece.data.len() {
        return Err(Bad("an in-place update changes the tuple's length"));
    }
    data.copy_from_slice(piece.data);
    Ok(())
}
