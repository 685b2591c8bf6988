//! SP-GiST records (access/spgist/spgxlog.c, access/spgxlog.h). All tuples are in the main data, unaligned.

use crate::error::{Bad, Step};
use crate::page::{self, Add, Page};
use crate::spgist_tuple::{
    self as tuple, DEAD, Dead, PLACEHOLDER, REDIRECT, count_placeholders, count_redirections,
    delete_leaving, replace, take_inner, take_leaf,
};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::{Reader, u8_at, u16_at};

const ADD_LEAF: u8 = 0x10;
const MOVE_LEAFS: u8 = 0x20;
const ADD_NODE: u8 = 0x30;
const SPLIT_TUPLE: u8 = 0x40;
const PICKSPLIT: u8 = 0x50;
const VACUUM_LEAF: u8 = 0x60;
const VACUUM_ROOT: u8 = 0x70;
const VACUUM_REDIRECT: u8 = 0x80;

const ADD_LEAF_SIZE: usize = 10;
const MOVE_LEAFS_SIZE: usize = 20;
const ADD_NODE_SIZE: usize = 20;
const SPLIT_TUPLE_SIZE: usize = 6;
const PICKSPLIT_SIZE: usize = 28;
const VACUUM_ROOT_SIZE: usize = 12;

const SPECIAL_SIZE: usize = 8;
const FLAGS: usize = PAGE_SIZE - SPECIAL_SIZE;
const PAGE_ID: u16 = 0xFF82;
const LEAF: u16 = 4;
const NULLS: u16 = 8;

/// The tuple's page is not the parent's: no block has the parent.
const NO_PARENT: u8 = u8::MAX;

/// How much of the main data the redo of one block reads: leaf tuples are left out for parents and sources.
pub(crate) fn main_length(opcode: u8, role: u8, main: &[u8]) -> Step<usize> {
    Ok(match (opcode, role) {
        (ADD_LEAF, 1) => ADD_LEAF_SIZE,
        (MOVE_LEAFS, 0 | 2) => {
            let moves = usize::from(u16_at(main, 0)?);
            MOVE_LEAFS_SIZE + 2 * (moves + move_insert_count(main)?)
        }
        (ADD_NODE, 0) if u8_at(main, 5)? != NO_PARENT => ADD_NODE_SIZE,
        (ADD_NODE, 2) => ADD_NODE_SIZE,
        (PICKSPLIT, 2) => {
            let deleted = usize::from(u16_at(main, 2)?);
            let inserted = usize::from(u16_at(main, 4)?);
            let inner_at = PICKSPLIT_SIZE + deleted * 2 + inserted * 3;
            let inner = main.get(inner_at..).ok_or(Bad("main data is cut off"))?;
            inner_at + tuple::inner_size(inner)?
        }
        (PICKSPLIT, 3) => PICKSPLIT_SIZE,
        _ => main.len(),
    })
}

pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    if !piece.init {
        page::special_at(page, SPECIAL_SIZE)?;
    }
    match piece.info & 0xF0 {
        ADD_LEAF => add_leaf(page, piece),
        MOVE_LEAFS => move_leafs(page, piece),
        ADD_NODE => add_node(page, piece),
        SPLIT_TUPLE => split_tuple(page, piece),
        PICKSPLIT => pick_split(page, piece),
        VACUUM_LEAF => vacuum_leaf(page, piece),
        VACUUM_ROOT => {
            let count = usize::from(u16_at(piece.main, 0)?);
            let offset = |at: usize| u16_at(piece.main, VACUUM_ROOT_SIZE + at * 2).unwrap_or(0);
            page::delete_items(page, offset, count)
        }
        VACUUM_REDIRECT => vacuum_redirect(page, piece),
        _ => Err(Bad("this kind of record does not change blocks")),
    }
}

fn init(page: &mut Page, flags: u16) -> Step<()> {
    page::init(page, SPECIAL_SIZE);
    page::put_u16(page, FLAGS, flags)?;
    page::put_u16(page, FLAGS + 6, PAGE_ID)
}

fn init_leaf(page: &mut Page, stores_nulls: bool) -> Step<()> {
    init(page, LEAF | if stores_nulls { NULLS } else { 0 })
}

/// `addOrReplaceTuple`: an existing tuple there must be a placeholder.
fn add_or_replace(page: &mut Page, bytes: &[u8], offset: u16) -> Step<()> {
    if offset <= page::line_count(page) {
        if tuple::state(page::item(page, offset)?)? != PLACEHOLDER {
            return Err(Bad("the tuple to replace is not a placeholder"));
        }
        count_placeholders(page, -1)?;
        page::delete_item(page, offset)?;
    }
    page::add_item(page, bytes, offset, Add::Insert)
}

fn add_leaf(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    main.u8()?;
    let stores_nulls = main.u8()? != 0;
    let leaf_offset = main.u16()?;
    let head_offset = main.u16()?;
    let parent_offset = main.u16()?;
    let node = main.u16()?;
    if piece.role == 1 {
        return tuple::link(page, parent_offset, node, piece.needed_block(0)?, leaf_offset);
    }
    if piece.init {
        init_leaf(page, stores_nulls)?;
    }
    let leaf = take_leaf(&mut main)?;
    if leaf_offset == head_offset {
        return replace(page, leaf, leaf_offset);
    }
    add_or_replace(page, leaf, leaf_offset)?;
    if head_offset != 0 {
        tuple::set_next(page, head_offset, leaf_offset)?;
    }
    Ok(())
}

fn move_insert_count(main: &[u8]) -> Step<usize> {
    let replaces_dead = u8_at(main, 3)? != 0;
    Ok(if replaces_dead { 1 } else { usize::from(u16_at(main, 0)?) + 1 })
}

fn move_leafs(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let moves = usize::from(main.u16()?);
    main.take(2)?;
    let stores_nulls = main.u8()? != 0;
    main.u8()?;
    let parent_offset = main.u16()?;
    let node = main.u16()?;
    main.take(2)?;
    let xid = main.u32()?;
    let is_build = main.u8()? != 0;
    main.take(3)?;
    let deleted = main.take(moves * 2)?;
    let count = move_insert_count(piece.main)?;
    let inserted = main.take(count * 2)?;
    let last = u16_at(inserted, (count - 1) * 2)?;
    match piece.role {
        0 => {
            let destination = piece.needed_block(1)?;
            let first = if is_build { PLACEHOLDER } else { REDIRECT };
            let dead = Dead { block: destination, offset: last, xid };
            delete_leaving(page, deleted, first, PLACEHOLDER, &dead)
        }
        1 => {
            if piece.init {
                init_leaf(page, stores_nulls)?;
            }
            for at in 0..count {
                add_or_replace(page, take_leaf(&mut main)?, u16_at(inserted, at * 2)?)?;
            }
            Ok(())
        }
        2 => tuple::link(page, parent_offset, node, piece.needed_block(1)?, last),
        _ => Err(Bad("the record does not change this block")),
    }
}

fn add_node(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let offset = main.u16()?;
    let new_offset = main.u16()?;
    main.u8()?;
    let parent_role = main.u8()?;
    let parent_offset = main.u16()?;
    let node = main.u16()?;
    main.take(2)?;
    let xid = main.u32()?;
    let is_build = main.u8()? != 0;
    main.take(3)?;
    let new_block = if piece.role == 1 { Some(piece.block) } else { piece.other_block(1) };
    let Some(new_block) = new_block else {
        return replace(page, take_inner(&mut main)?, offset);
    };
    match piece.role {
        0 => {
            let state = if is_build { PLACEHOLDER } else { REDIRECT };
            let dead = Dead { block: new_block, offset: new_offset, xid };
            replace(page, &dead.tuple(state), offset)?;
            if is_build {
                count_placeholders(page, 1)?;
            } else {
                count_redirections(page, 1)?;
            }
        }
        1 => {
            if piece.init {
                init(page, 0)?;
            }
            add_or_replace(page, take_inner(&mut main)?, new_offset)?;
        }
        _ => {}
    }
    // The parent is one of the two pages, or a third.
    if parent_role == piece.role {
        tuple::link(page, parent_offset, node, new_block, new_offset)?;
    }
    Ok(())
}

fn split_tuple(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = Reader::new(piece.main.get(SPLIT_TUPLE_SIZE..).unwrap_or(&[]));
    let prefix_offset = u16_at(piece.main, 0)?;
    let postfix_offset = u16_at(piece.main, 2)?;
    let same_page = u8_at(piece.main, 5)? != 0;
    let prefix = take_inner(&mut main)?;
    if piece.role == 1 {
        if piece.init {
            init(page, 0)?;
        }
        return add_or_replace(page, take_inner(&mut main)?, postfix_offset);
    }
    replace(page, prefix, prefix_offset)?;
    if same_page {
        add_or_replace(page, take_inner(&mut main)?, postfix_offset)?;
    }
    Ok(())
}

/// `spgxlogPickSplit`.
struct PickSplit<'a> {
    inner_offset: u16,
    stores_nulls: bool,
    inner_is_parent: bool,
    parent_offset: u16,
    node: u16,
    xid: u32,
    is_build: bool,
    deleted: &'a [u8],
    inserted: &'a [u8],
    /// Per inserted tuple: 0 goes to the source page, 1 to the destination.
    selectors: &'a [u8],
}

impl<'a> PickSplit<'a> {
    fn read(main: &mut Reader<'a>) -> Step<PickSplit<'a>> {
        main.take(2)?;
        let delete_count = usize::from(main.u16()?);
        let insert_count = usize::from(main.u16()?);
        main.take(2)?;
        let inner_offset = main.u16()?;
        main.u8()?;
        let stores_nulls = main.u8()? != 0;
        let inner_is_parent = main.u8()? != 0;
        main.u8()?;
        let parent_offset = main.u16()?;
        let node = main.u16()?;
        main.take(2)?;
        let xid = main.u32()?;
        let is_build = main.u8()? != 0;
        let mut rest = *main;
        // The parent's piece ends here.
        let (mut deleted, mut inserted, mut selectors): (&[u8], &[u8], &[u8]) = (&[], &[], &[]);
        if rest.rest().len() > 3 {
            rest.take(3)?;
            deleted = rest.take(delete_count * 2)?;
            inserted = rest.take(insert_count * 2)?;
            selectors = rest.take(insert_count)?;
        }
        *main = rest;
        Ok(PickSplit {
            inner_offset,
            stores_nulls,
            inner_is_parent,
            parent_offset,
            node,
            xid,
            is_build,
            deleted,
            inserted,
            selectors,
        })
    }
}

fn pick_split(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let split = PickSplit::read(&mut main)?;
    match piece.role {
        0 | 1 => pick_split_leaf(page, piece, &split, main),
        2 => {
            if piece.init {
                init(page, if split.stores_nulls { NULLS } else { 0 })?;
            }
            add_or_replace(page, take_inner(&mut main)?, split.inner_offset)?;
            if split.inner_is_parent {
                let (parent, inner) = (split.parent_offset, split.inner_offset);
                tuple::link(page, parent, split.node, piece.block, inner)?;
            }
            Ok(())
        }
        3 => {
            let inner_block = piece.needed_block(2)?;
            tuple::link(page, split.parent_offset, split.node, inner_block, split.inner_offset)
        }
        _ => Err(Bad("the record does not change this block")),
    }
}

fn pick_split_leaf(
    page: &mut Page,
    piece: &Piece<'_>,
    split: &PickSplit<'_>,
    mut main: Reader<'_>,
) -> Step<()> {
    if piece.init {
        init_leaf(page, split.stores_nulls)?;
    } else if piece.role == 0 {
        let (first, dead) = if split.is_build {
            (PLACEHOLDER, Dead::NOWHERE)
        } else {
            let block = piece.needed_block(2)?;
            (REDIRECT, Dead { block, offset: split.inner_offset, xid: split.xid })
        };
        delete_leaving(page, split.deleted, first, PLACEHOLDER, &dead)?;
    }
    take_inner(&mut main)?;
    for (at, selector) in split.selectors.iter().enumerate() {
        let leaf = take_leaf(&mut main)?;
        if (*selector != 0) == (piece.role == 1) {
            add_or_replace(page, leaf, u16_at(split.inserted, at * 2)?)?;
        }
    }
    Ok(())
}

fn vacuum_leaf(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut main = piece.main_reader();
    let dead = usize::from(main.u16()?);
    let placeholders = usize::from(main.u16()?);
    let moves = usize::from(main.u16()?);
    let chains = usize::from(main.u16()?);
    main.take(8)?;
    let to_dead = main.take(dead * 2)?;
    let to_placeholder = main.take(placeholders * 2)?;
    let move_from = main.take(moves * 2)?;
    let move_to = main.take(moves * 2)?;
    let chain_from = main.take(chains * 2)?;
    let chain_to = main.take(chains * 2)?;

    delete_leaving(page, to_dead, DEAD, DEAD, &Dead::NOWHERE)?;
    delete_leaving(page, to_placeholder, PLACEHOLDER, PLACEHOLDER, &Dead::NOWHERE)?;
    for at in 0..moves {
        let (from, to) = (u16_at(move_from, at * 2)?, u16_at(move_to, at * 2)?);
        let (line_from, line_to) = (page::line(page, from)?, page::line(page, to)?);
        page::set_line(page, from, line_to)?;
        page::set_line(page, to, line_from)?;
    }
    delete_leaving(page, move_from, PLACEHOLDER, PLACEHOLDER, &Dead::NOWHERE)?;
    for at in 0..chains {
        tuple::set_next(page, u16_at(chain_from, at * 2)?, u16_at(chain_to, at * 2)?)?;
    }
    Ok(())
}

fn vacuum_redirect(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let count = u16_at(piece.main, 0)?;
    let first_placeholder = u16_at(piece.main, 2)?;
    let offsets = if piece.version >= PgVersion::V16 { 10 } else { 8 };
    for at in 0..usize::from(count) {
        let offset = u16_at(piece.main, offsets + at * 2)?;
        tuple::redirect_to_placeholder(page::item_mut(page, offset)?)?;
    }
    let count = i32::from(count);
    count_redirections(page, -count)?;
    count_placeholders(page, count)?;
    let lines = page::line_count(page);
    if first_placeholder != 0 && first_placeholder <= lines {
        let trailing = lines - first_placeholder + 1;
        count_placeholders(page, -i32::from(trailing))?;
        let number = |at: usize| first_placeholder + at as u16;
        page::delete_items(page, number, usize::from(trailing))?;
    }
    Ok(())
}
