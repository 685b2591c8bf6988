//! Index tuples, and the posting lists of B-tree leaf pages (access/itup.h, access/nbtree.h, access/nbtree/nbtdedup.c).
//!
//! ```text
//! offset  size  field
//!      0     4  block number, high half first; of a posting tuple: where its TIDs start
//!      4     2  offset number; of a posting tuple: 0x2000 | number of TIDs
//!      6     2  size (13 bits) | 0x2000 the first six bytes are not a heap TID | 0x4000 variable width | 0x8000 nulls
//! ```

use crate::error::{Bad, Step};
use crate::page::{Page, max_align};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::{u16_at, u32_at};

pub(crate) const TUPLE_HEADER: usize = 8;
pub(crate) const TID_SIZE: usize = 6;
const SIZE_MASK: u16 = 0x1FFF;
pub(crate) const ALT_TID: u16 = 0x2000;
const IS_POSTING: u16 = 0x2000;
const POSTING_COUNT: u16 = 0x0FFF;

/// `IndexTupleSize`.
pub(crate) fn tuple_size(tuple: &[u8]) -> Step<usize> {
    Ok(usize::from(u16_at(tuple, 6)? & SIZE_MASK))
}

/// The block number in a tuple's first bytes.
pub(crate) fn block_number(tuple: &[u8]) -> Step<u32> {
    let word = u32_at(tuple, 0)?;
    Ok(word.rotate_left(16))
}

/// A block number as it is stored there.
pub(crate) fn block_bytes(block: u32) -> [u8; 4] {
    block.rotate_left(16).to_le_bytes()
}

/// The TIDs of a tuple: of its posting list, or its own.
pub(crate) fn tids(tuple: &[u8]) -> Step<&[u8]> {
    let Some((start, count)) = posting(tuple)? else {
        return tuple.get(..TID_SIZE).ok_or(Bad("an index tuple is too short"));
    };
    let list = tuple.get(start..start + count * TID_SIZE);
    list.ok_or(Bad("a posting list is longer than its tuple"))
}

/// Where a posting tuple's TIDs start, and their number.
fn posting(tuple: &[u8]) -> Step<Option<(usize, usize)>> {
    let offset = u16_at(tuple, 4)?;
    if u16_at(tuple, 6)? & ALT_TID == 0 || offset & IS_POSTING == 0 {
        return Ok(None);
    }
    Ok(Some((block_number(tuple)? as usize, usize::from(offset & POSTING_COUNT))))
}

/// Bytes of the tuple before its TIDs.
fn key_size(tuple: &[u8]) -> Step<usize> {
    Ok(match posting(tuple)? {
        Some((start, _)) => start,
        None => tuple_size(tuple)?,
    })
}

/// A tuple that is being made.
pub(crate) struct NewTuple {
    bytes: [u8; PAGE_SIZE],
    length: usize,
}

impl NewTuple {
    pub fn copy(tuple: &[u8]) -> Step<NewTuple> {
        let mut bytes = [0; PAGE_SIZE];
        let place = bytes.get_mut(..tuple.len());
        place.ok_or(Bad("an index tuple is longer than a page"))?.copy_from_slice(tuple);
        Ok(NewTuple { bytes, length: tuple.len() })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

/// `_bt_form_posting`: the key of `base` with these TIDs. A single TID makes a plain tuple.
pub(crate) fn form_posting(base: &[u8], tids: &[u8]) -> Step<NewTuple> {
    let key = key_size(base)?;
    let count = tids.len() / TID_SIZE;
    let length = if count > 1 { max_align(key + tids.len()) } else { key };
    let key_bytes = base.get(..key).filter(|_| (TUPLE_HEADER..=length).contains(&key));
    let mut bytes = [0; PAGE_SIZE];
    // A tuple of a possible size has no more TIDs than can be counted.
    if length > usize::from(SIZE_MASK) || count == 0 {
        return Err(Bad("a posting list has an impossible size"));
    }
    bytes[..key].copy_from_slice(key_bytes.ok_or(Bad("an index tuple is too short"))?);
    let mut info = u16_at(&bytes, 6)? & !SIZE_MASK | length as u16;
    if count > 1 {
        info |= ALT_TID;
        bytes[0..4].copy_from_slice(&block_bytes(key as u32));
        bytes[4..6].copy_from_slice(&(count as u16 | IS_POSTING).to_le_bytes());
        bytes[key..key + tids.len()].copy_from_slice(tids);
    } else {
        info &= !ALT_TID;
        bytes[..TID_SIZE].copy_from_slice(tids);
    }
    bytes[6..8].copy_from_slice(&info.to_le_bytes());
    Ok(NewTuple { bytes, length })
}

/// `_bt_update_posting`: the tuple without the TIDs whose indexes are listed, ascending, as u16.
pub(crate) fn remove_tids(tuple: &[u8], deleted: &[u8]) -> Step<NewTuple> {
    let mut left = [0; PAGE_SIZE];
    let mut length = 0;
    let mut deleted = deleted.chunks_exact(2).map(|raw| u16::from_le_bytes([raw[0], raw[1]]));
    let mut next = deleted.next();
    if posting(tuple)?.is_none() {
        return Err(Bad("the tuple to update has no posting list"));
    }
    for (at, tid) in tids(tuple)?.chunks_exact(TID_SIZE).enumerate() {
        if next.is_some_and(|gone| usize::from(gone) == at) {
            next = deleted.next();
            continue;
        }
        left[length..length + TID_SIZE].copy_from_slice(tid);
        length += TID_SIZE;
    }
    if next.is_some() {
        return Err(Bad("TIDs to remove are missing or out of order"));
    }
    form_posting(tuple, &left[..length])
}

/// `_bt_swap_posting`: the new item's TID goes into the posting list at `at`, and the list's last TID into the new item.
/// Returns the new posting tuple, of the old one's size.
pub(crate) fn swap_posting(new_item: &mut [u8], old_posting: &[u8], at: usize) -> Step<NewTuple> {
    let Some((start, count)) = posting(old_posting)? else {
        return Err(Bad("the tuple to split has no posting list"));
    };
    if at == 0 || at >= count || new_item.len() < TUPLE_HEADER {
        return Err(Bad("a posting list cannot be split there"));
    }
    let mut result = NewTuple::copy(old_posting)?;
    let (from, end) = (start + at * TID_SIZE, start + count * TID_SIZE);
    let list = result.bytes_mut().get_mut(from..end);
    let list = list.ok_or(Bad("a posting list is longer than its tuple"))?;
    let mut last = [0; TID_SIZE];
    last.copy_from_slice(&list[list.len() - TID_SIZE..]);
    list.copy_within(..list.len() - TID_SIZE, TID_SIZE);
    list[..TID_SIZE].copy_from_slice(&new_item[..TID_SIZE]);
    new_item[..TID_SIZE].copy_from_slice(&last);
    Ok(result)
}

/// Heap TIDs of tuples that are being merged.
pub(crate) struct TidList {
    bytes: Page,
    length: usize,
}

impl TidList {
    pub fn new() -> TidList {
        TidList { bytes: [0; PAGE_SIZE], length: 0 }
    }

    pub fn clear(&mut self) {
        self.length = 0;
    }

    pub fn push(&mut self, tids: &[u8]) -> Step<()> {
        let place = self.bytes.get_mut(self.length..self.length + tids.len());
        place.ok_or(Bad("merged posting lists are longer than a page"))?.copy_from_slice(tids);
        self.length += tids.len();
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests;
