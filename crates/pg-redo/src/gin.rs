//! GIN records other than posting-list recompression (access/gin/ginxlog.c, access/ginxlog.h).
//!
//! Special space: right link u32, highest offset u16, flags u16.

use crate::btree_posting::tuple_size;
use crate::error::{Bad, Step};
use crate::gin_posting;
use crate::heap_tuple::tid;
use crate::page::{self, Add, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::{Reader, u8_at, u16_at, u32_at};

const CREATE_PTREE: u8 = 0x10;
const INSERT: u8 = 0x20;
const SPLIT: u8 = 0x30;
const DELETE_PAGE: u8 = 0x50;
const UPDATE_META_PAGE: u8 = 0x60;
const INSERT_LISTPAGE: u8 = 0x70;
const DELETE_LISTPAGE: u8 = 0x80;
const VACUUM_DATA_LEAF_PAGE: u8 = 0x90;

const SPECIAL_SIZE: usize = 8;
const RIGHT_LINK: usize = PAGE_SIZE - SPECIAL_SIZE;
pub(crate) const MAX_OFFSET: usize = RIGHT_LINK + 4;
pub(crate) const FLAGS: usize = RIGHT_LINK + 6;

const DATA: u16 = 1;
const LEAF: u16 = 2;
const DELETED: u16 = 4;
const META: u16 = 8;
const LIST: u16 = 16;
const LIST_FULLROW: u16 = 32;
const INCOMPLETE_SPLIT: u16 = 64;
pub(crate) const COMPRESSED: u16 = 128;

const INSERT_IS_DATA: u16 = 1;
const INSERT_IS_LEAF: u16 = 2;

/// Where the items of data pages start: behind the page's right bound.
pub(crate) const DATA_START: usize = HEADER_SIZE + 8;
/// Child block and highest key.
const POSTING_ITEM: usize = 10;
const META_SIZE: usize = 56;
const META_IN_UPDATE: usize = 16;
const INVALID_BLOCK: u32 = u32::MAX;

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    let main = piece.main;
    match (piece.info & 0xF0, piece.role) {
        (CREATE_PTREE, 0) => {
            init(page, DATA | LEAF | COMPRESSED)?;
            let size = u32_at(main, 0)? as usize;
            let segments = main.get(4..).filter(|segments| segments.len() == size);
            set_data(page, segments.ok_or(Bad("the posting tree's size is wrong"))?)
        }
        (INSERT, 0) => insert(page, piece),
        (INSERT, 1) | (SPLIT, 3) => change_flags(page, INCOMPLETE_SPLIT, 0),
        (DELETE_PAGE, 0) => {
            page::set_prune_xid(page, u32_at(main, 8)?);
            change_flags(page, 0, DELETED)
        }
        (DELETE_PAGE, 1) => delete_posting_item(page, u16_at(main, 0)?),
        (DELETE_PAGE, 2) => page::put_u32(page, RIGHT_LINK, u32_at(main, 4)?),
        (UPDATE_META_PAGE, 0) => meta(page, main.get(META_IN_UPDATE..).unwrap_or(&[])),
        (UPDATE_META_PAGE, 1) => update_tail(page, piece),
        (INSERT_LISTPAGE, 0) => insert_list_page(page, piece),
        (DELETE_LISTPAGE, 0) => meta(page, main),
        (DELETE_LISTPAGE, _) => init(page, DELETED),
        (VACUUM_DATA_LEAF_PAGE, 0) => gin_posting::recompress(page, piece.data),
        _ => Err(Bad("the record does not change this block")),
    }
}

fn init(page: &mut Page, flags: u16) -> Step<()> {
    page::init(page, SPECIAL_SIZE);
    page::put_u32(page, RIGHT_LINK, INVALID_BLOCK)?;
    page::put_u16(page, FLAGS, flags)
}

fn change_flags(page: &mut Page, clear: u16, set: u16) -> Step<()> {
    let flags = page::get_u16(page, FLAGS)?;
    page::put_u16(page, FLAGS, flags & !clear | set)
}

/// Replaces a data page's items.
pub(crate) fn set_data(page: &mut Page, items: &[u8]) -> Step<()> {
    let end = DATA_START + items.len();
    let place = page.get_mut(DATA_START..end).filter(|_| end <= RIGHT_LINK);
    place.ok_or(Bad("items are longer than the page"))?.copy_from_slice(items);
    page::set_lower(page, end as u16);
    Ok(())
}

fn meta(page: &mut Page, metadata: &[u8]) -> Step<()> {
    let metadata = metadata.get(..META_SIZE).ok_or(Bad("the record's data ends too early"))?;
    init(page, META)?;
    page::put(page, HEADER_SIZE, metadata)?;
    page::set_lower(page, (HEADER_SIZE + META_SIZE) as u16);
    Ok(())
}

fn insert(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let flags = main.u16()?;
    let right_child = if flags & INSERT_IS_LEAF == 0 {
        // Left child, then right child; block numbers have their high half first.
        main.u32()?;
        Some(main.u32()?.rotate_left(16))
    } else {
        None
    };
    match (flags & INSERT_IS_DATA != 0, right_child) {
        (true, None) => gin_posting::recompress(page, piece.data),
        (true, Some(right)) => insert_posting_item(page, piece.data, right),
        (false, right) => insert_entry(page, piece.data, right),
    }
}

fn insert_entry(page: &mut Page, data: &[u8], right_child: Option<u32>) -> Step<()> {
    let offset = u16_at(data, 0)?;
    let is_delete = u8_at(data, 2)? != 0;
    let rest = data.get(4..).ok_or(Bad("the record's data ends too early"))?;
    let tuple = rest.get(..tuple_size(rest)?).ok_or(Bad("an index tuple is cut off"))?;
    if let Some(right) = right_child {
        // The existing downlink now leads to the right half of the split child.
        let downlink = page::item_mut(page, offset)?.first_chunk_mut::<6>();
        *downlink.ok_or(Bad("an index tuple is too short"))? = tid(right, 0);
    }
    if is_delete {
        page::delete_item(page, offset)?;
    }
    page::add_item(page, tuple, offset, Add::Insert)
}

/// Where a posting item of an internal data page lies.
fn posting_item(page: &Page, offset: u16, count: u16) -> Step<usize> {
    let at = DATA_START + usize::from(offset.wrapping_sub(1)) * POSTING_ITEM;
    let end = DATA_START + usize::from(count) * POSTING_ITEM;
    if offset == 0 || at > end || end > usize::from(page::special(page)) {
        return Err(Bad("the posting item is not on the page"));
    }
    Ok(at)
}

fn set_posting_count(page: &mut Page, count: u16) -> Step<()> {
    page::put_u16(page, MAX_OFFSET, count)?;
    page::set_lower(page, (DATA_START + usize::from(count) * POSTING_ITEM) as u16);
    Ok(())
}

fn insert_posting_item(page: &mut Page, data: &[u8], right_child: u32) -> Step<()> {
    let offset = u16_at(data, 0)?;
    let item = data.get(2..2 + POSTING_ITEM).ok_or(Bad("the record's data ends too early"))?;
    let count = page::get_u16(page, MAX_OFFSET)?;
    let at = posting_item(page, offset, count)?;
    let end = DATA_START + usize::from(count) * POSTING_ITEM;
    if end + POSTING_ITEM > RIGHT_LINK {
        return Err(Bad("the page has no room for the item"));
    }
    page::put_u32(page, at, right_child.rotate_left(16))?;
    page.copy_within(at..end, at + POSTING_ITEM);
    page::put(page, at, item)?;
    set_posting_count(page, count + 1)
}

fn delete_posting_item(page: &mut Page, offset: u16) -> Step<()> {
    let count = page::get_u16(page, MAX_OFFSET)?;
    let at = posting_item(page, offset, count)?;
    if offset > count {
        return Err(Bad("the posting item is not on the page"));
    }
    let end = DATA_START + usize::from(count) * POSTING_ITEM;
    page.copy_within(at + POSTING_ITEM..end, at);
    set_posting_count(page, count - 1)
}

fn append(page: &mut Page, data: &[u8], count: u32) -> Step<()> {
    let mut rest = data;
    for _ in 0..count {
        let (tuple, tail) =
            rest.split_at_checked(tuple_size(rest)?).ok_or(Bad("an index tuple is cut off"))?;
        let number = page::line_count(page) + 1;
        page::add_item(page, tuple, number, Add::Insert)?;
        rest = tail;
    }
    Ok(())
}

/// The pending list's tail gets tuples, or a successor.
fn update_tail(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = Reader::new(piece.main);
    main.take(META_IN_UPDATE + META_SIZE)?;
    let previous_tail = main.u32()?;
    let new_right_link = main.u32()?;
    let count = main.u32()?;
    if count > 0 {
        append(page, piece.data, count)?;
        let heap_tuples = page::get_u16(page, MAX_OFFSET)?;
        return page::put_u16(page, MAX_OFFSET, heap_tuples.wrapping_add(1));
    }
    if previous_tail != INVALID_BLOCK {
        page::put_u32(page, RIGHT_LINK, new_right_link)?;
    }
    Ok(())
}

fn insert_list_page(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let right_link = u32_at(piece.main, 0)?;
    let count = u32_at(piece.main, 4)?;
    if right_link == INVALID_BLOCK {
        // The sublist's tail: it holds whole rows.
        init(page, LIST | LIST_FULLROW)?;
        page::put_u16(page, MAX_OFFSET, 1)?;
    } else {
        init(page, LIST)?;
        page::put_u32(page, RIGHT_LINK, right_link)?;
    }
    append(page, piece.data, count)
}
