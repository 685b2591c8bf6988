//! BRIN records (access/brin/brin_xlog.c, access/brin_xlog.h).

use crate::error::{Bad, Step};
use crate::heap_tuple::tid;
use crate::page::{self, Add, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::{Reader, u16_at, u32_at};

const CREATE_INDEX: u8 = 0x00;
const INSERT: u8 = 0x10;
const UPDATE: u8 = 0x20;
const SAMEPAGE_UPDATE: u8 = 0x30;
const REVMAP_EXTEND: u8 = 0x40;
const DESUMMARIZE: u8 = 0x50;

const SPECIAL_SIZE: usize = 8;
const TYPE_AT: usize = PAGE_SIZE - 2;
const TYPE_META: u16 = 0xF091;
const TYPE_REVMAP: u16 = 0xF092;
const TYPE_REGULAR: u16 = 0xF093;
const META_MAGIC: u32 = 0xA810_9CFA;
const META_SIZE: usize = 16;
const LAST_REVMAP_PAGE: usize = HEADER_SIZE + 12;
/// TIDs of a revmap page.
const REVMAP_ENTRIES: u32 = ((PAGE_SIZE - HEADER_SIZE - SPECIAL_SIZE) / 6) as u32;
const INVALID_BLOCK: u32 = u32::MAX;

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    let main = piece.main;
    match (piece.opcode(), piece.role) {
        (CREATE_INDEX, 0) => create_index(page, main),
        (INSERT, 0) => insert(page, piece, main),
        (UPDATE, 0) => insert(page, piece, update_insert_part(main)?),
        (INSERT, 1) => point_revmap(page, piece, main),
        (UPDATE, 1) => point_revmap(page, piece, update_insert_part(main)?),
        (UPDATE, 2) => page::delete_item_keeping_numbers(page, u16_at(main, 0)?),
        (SAMEPAGE_UPDATE, 0) => page::overwrite_item(page, u16_at(main, 0)?, piece.data),
        (REVMAP_EXTEND, 0) => {
            page::put_u32(page, LAST_REVMAP_PAGE, u32_at(main, 0)?)?;
            page::set_lower(page, (HEADER_SIZE + META_SIZE) as u16);
            Ok(())
        }
        (REVMAP_EXTEND, 1) => init(page, TYPE_REVMAP),
        (DESUMMARIZE, 0) => set_revmap(page, u32_at(main, 4)?, u32_at(main, 0)?, INVALID_BLOCK, 0),
        (DESUMMARIZE, 1) => page::delete_item_keeping_numbers(page, u16_at(main, 8)?),
        _ => Err(Bad("the record does not change this block")),
    }
}

fn init(page: &mut Page, kind: u16) -> Step<()> {
    page::init(page, SPECIAL_SIZE);
    page::put_u16(page, TYPE_AT, kind)
}

fn create_index(page: &mut Page, main: &[u8]) -> Step<()> {
    let mut reader = Reader::new(main);
    let pages_per_range = reader.u32()?;
    let version = reader.u16()?;
    init(page, TYPE_META)?;
    page::put_u32(page, HEADER_SIZE, META_MAGIC)?;
    page::put_u32(page, HEADER_SIZE + 4, u32::from(version))?;
    page::put_u32(page, HEADER_SIZE + 8, pages_per_range)?;
    page::put_u32(page, LAST_REVMAP_PAGE, 0)?;
    page::set_lower(page, (HEADER_SIZE + META_SIZE) as u16);
    Ok(())
}

/// The `xl_brin_insert` inside an `xl_brin_update`.
fn update_insert_part(main: &[u8]) -> Step<&[u8]> {
    main.get(4..).ok_or(Bad("the record's data ends too early"))
}

fn insert(page: &mut Page, piece: &Piece<'_>, fields: &[u8]) -> Step<()> {
    if piece.init {
        init(page, TYPE_REGULAR)?;
    }
    page::add_item(page, piece.data, u16_at(fields, 8)?, Add::Overwrite)
}

fn point_revmap(page: &mut Page, piece: &Piece<'_>, fields: &[u8]) -> Step<()> {
    let heap_block = u32_at(fields, 0)?;
    let pages_per_range = u32_at(fields, 4)?;
    let offset = u16_at(fields, 8)?;
    set_revmap(page, heap_block, pages_per_range, piece.needed_block(0)?, offset)
}

/// `brinSetHeapBlockItemptr`.
fn set_revmap(
    page: &mut Page,
    heap_block: u32,
    pages_per_range: u32,
    block: u32,
    offset: u16,
) -> Step<()> {
    let range = heap_block.checked_div(pages_per_range).ok_or(Bad("ranges have no pages"))?;
    let entry = (range % REVMAP_ENTRIES) as usize;
    page::put(page, HEADER_SIZE + entry * 6, &tid(block, offset))
}
