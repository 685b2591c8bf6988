//! Tuples of SP-GiST pages (access/spgist_private.h).
//!
//! ```text
//! inner   state 2 bits, all the same 1 bit, nodes 13 bits, prefix size 16 bits; size u16; pad; prefix; nodes
//! leaf    state 2 bits, size 30 bits; next offset 14 bits and two flags; heap TID; datum
//! dead    state 2 bits, size 30 bits; next offset u16; TID of what replaces it; xid u32
//! ```
//! A node is an index tuple whose TID is the downlink.

use crate::btree_posting::tuple_size;
use crate::error::{Bad, Step};
use crate::heap_tuple::tid;
use crate::page::{self, Add, Page};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::{Reader, u16_at, u32_at};

pub(crate) const REDIRECT: u32 = 1;
pub(crate) const DEAD: u32 = 2;
pub(crate) const PLACEHOLDER: u32 = 3;
const STATE_MASK: u32 = 3;

const DEAD_SIZE: usize = 16;
const INNER_HEADER: usize = 8;
const LEAF_HEADER: usize = 12;
const NEXT_OFFSET: u16 = 0x3FFF;
const POINTER: usize = 6;

const REDIRECTION_COUNT: usize = PAGE_SIZE - 6;
const PLACEHOLDER_COUNT: usize = PAGE_SIZE - 4;
/// `MaxIndexTuplesPerPage`.
const MAX_TUPLES: usize = 408;

pub(crate) fn state(tuple: &[u8]) -> Step<u32> {
    Ok(u32_at(tuple, 0)? & STATE_MASK)
}

pub(crate) fn inner_size(tuple: &[u8]) -> Step<usize> {
    Ok(usize::from(u16_at(tuple, 4)?))
}

/// The next inner tuple of a record.
pub(crate) fn take_inner<'a>(reader: &mut Reader<'a>) -> Step<&'a [u8]> {
    let size = inner_size(reader.rest())?;
    if size < INNER_HEADER {
        return Err(Bad("an inner tuple is too short"));
    }
    Ok(reader.take(size)?)
}

/// The next leaf tuple of a record.
pub(crate) fn take_leaf<'a>(reader: &mut Reader<'a>) -> Step<&'a [u8]> {
    let size = (u32_at(reader.rest(), 0)? >> 2) as usize;
    if size < LEAF_HEADER {
        return Err(Bad("a leaf tuple is too short"));
    }
    Ok(reader.take(size)?)
}

fn count(page: &mut Page, at: usize, by: i32) -> Step<()> {
    let old = i32::from(page::get_u16(page, at)?);
    let new = u16::try_from(old + by).map_err(|_| Bad("the page's tuple counts are corrupt"))?;
    page::put_u16(page, at, new)
}

pub(crate) fn count_placeholders(page: &mut Page, by: i32) -> Step<()> {
    count(page, PLACEHOLDER_COUNT, by)
}

pub(crate) fn count_redirections(page: &mut Page, by: i32) -> Step<()> {
    count(page, REDIRECTION_COUNT, by)
}

/// Puts another tuple in a tuple's place.
pub(crate) fn replace(page: &mut Page, tuple: &[u8], offset: u16) -> Step<()> {
    page::delete_item(page, offset)?;
    page::add_item(page, tuple, offset, Add::Insert)
}

/// `SGLT_SET_NEXTOFFSET`.
pub(crate) fn set_next(page: &mut Page, offset: u16, next: u16) -> Step<()> {
    let tuple = page::item_mut(page, offset)?;
    let info = u16_at(tuple, 4)? & !NEXT_OFFSET | next & NEXT_OFFSET;
    tuple[4..6].copy_from_slice(&info.to_le_bytes());
    Ok(())
}

/// `spgUpdateNodeLink`: node number `node` of the inner tuple now leads to (`block`, `target`).
pub(crate) fn link(page: &mut Page, offset: u16, node: u16, block: u32, target: u16) -> Step<()> {
    let tuple = page::item_mut(page, offset)?;
    let header = u32_at(tuple, 0)?;
    let nodes = header >> 3 & 0x1FFF;
    if u32::from(node) >= nodes {
        return Err(Bad("the inner tuple has no node of that number"));
    }
    let mut at = INNER_HEADER + (header >> 16) as usize;
    for _ in 0..node {
        let rest = tuple.get(at..).ok_or(Bad("an inner tuple is cut off"))?;
        at += tuple_size(rest)?;
    }
    let downlink = tuple.get_mut(at..at + 6).ok_or(Bad("an inner tuple is cut off"))?;
    downlink.copy_from_slice(&tid(block, target));
    Ok(())
}

/// Where a redirect leads, and who made it.
pub(crate) struct Dead {
    pub block: u32,
    pub offset: u16,
    pub xid: u32,
}

impl Dead {
    /// For tuples that are no redirects.
    pub const NOWHERE: Dead = Dead { block: u32::MAX, offset: 0, xid: 0 };

    /// `spgFormDeadTuple`.
    pub fn tuple(&self, state: u32) -> [u8; DEAD_SIZE] {
        let target = if state == REDIRECT { self } else { &Dead::NOWHERE };
        let mut bytes = [0; DEAD_SIZE];
        bytes[0..4].copy_from_slice(&(state | (DEAD_SIZE as u32) << 2).to_le_bytes());
        bytes[POINTER..POINTER + 6].copy_from_slice(&tid(target.block, target.offset));
        bytes[12..16].copy_from_slice(&target.xid.to_le_bytes());
        bytes
    }
}

/// The tuple stays, with its xid, but leads nowhere.
pub(crate) fn redirect_to_placeholder(tuple: &mut [u8]) -> Step<()> {
    let header = u32_at(tuple, 0)? & !STATE_MASK | PLACEHOLDER;
    if tuple.len() < POINTER + 6 {
        return Err(Bad("a redirect is too short"));
    }
    tuple[0..4].copy_from_slice(&header.to_le_bytes());
    tuple[POINTER..POINTER + 6].copy_from_slice(&tid(u32::MAX, 0));
    Ok(())
}

/// `spgPageIndexMultiDelete`: deletes the listed tuples and leaves a dead tuple at each of their offsets: in state
/// `first` for the one listed first, in state `rest` for the others.
pub(crate) fn delete_leaving(
    page: &mut Page,
    offsets: &[u8],
    first: u32,
    rest: u32,
    dead: &Dead,
) -> Step<()> {
    let total = offsets.len() / 2;
    if total == 0 {
        return Ok(());
    }
    let first_offset = u16_at(offsets, 0)?;
    let mut storage = [0; MAX_TUPLES];
    let sorted = storage.get_mut(..total).ok_or(Bad("the page has too many tuples"))?;
    for (at, place) in sorted.iter_mut().enumerate() {
        *place = u16_at(offsets, at * 2)?;
    }
    sorted.sort_unstable();
    page::delete_items(page, |at| sorted.get(at).copied().unwrap_or(0), total)?;
    for offset in sorted {
        let state = if *offset == first_offset { first } else { rest };
        page::add_item(page, &dead.tuple(state), *offset, Add::Insert)?;
        match state {
            REDIRECT => count_redirections(page, 1)?,
            PLACEHOLDER => count_placeholders(page, 1)?,
            _ => {}
        }
    }
    Ok(())
}
