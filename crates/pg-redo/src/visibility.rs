//! The visibility map: two bits per heap block, all-visible and all-frozen (access/heap/visibilitymap.c).

use crate::error::{Bad, Step};
use crate::page::{self, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;

/// Heap blocks per map page.
pub(crate) const BLOCKS_PER_PAGE: u32 = ((PAGE_SIZE - HEADER_SIZE) * 4) as u32;
/// Both bits.
pub(crate) const BOTH: u8 = 3;
/// All-frozen alone.
pub(crate) const ALL_FROZEN: u8 = 2;

/// Flags in `xl_heap_visible` above the bits of the map (16 and later: catalog relation).
const VISIBLE_BITS: u8 = 3;

/// The map page of a heap block, and the block's index in it.
pub(crate) fn place(heap_block: u32) -> (u32, u16) {
    (heap_block / BLOCKS_PER_PAGE, (heap_block % BLOCKS_PER_PAGE) as u16)
}

fn byte_and_shift(index: u16) -> Step<(usize, u32)> {
    let byte = HEADER_SIZE + usize::from(index / 4);
    if byte >= PAGE_SIZE {
        return Err(Bad("heap block is outside of the visibility map page"));
    }
    Ok((byte, u32::from(index % 4) * 2))
}

fn ensure_initialised(page: &mut Page) {
    if page::is_new(page) {
        page::init(page, 0);
    }
}

/// Clears bits of one heap block; true if any was set.
pub(crate) fn clear(page: &mut Page, index: u16, bits: u8) -> Step<bool> {
    ensure_initialised(page);
    let (byte, shift) = byte_and_shift(index)?;
    let mask = (bits & BOTH) << shift;
    let changed = page[byte] & mask != 0;
    page[byte] &= !mask;
    Ok(changed)
}

/// A stored list of clears. Does not touch the page's LSN, as the server's redo does not.
pub(crate) fn clear_all(page: &mut Page, clears: &[u8]) -> Step<()> {
    for entry in clears.chunks(3) {
        let [low, high, bits] = entry else {
            return Err(Bad("a list of visibility clears is cut off"));
        };
        clear(page, u16::from_le_bytes([*low, *high]), *bits)?;
    }
    Ok(())
}

/// `visibilitymap_prepare_truncate`: clears all bits from `first_index` on. Does not touch the page's LSN.
pub(crate) fn truncate(page: &mut Page, first_index: u16) -> Step<()> {
    if page::is_new(page) {
        return Ok(());
    }
    let (byte, shift) = byte_and_shift(first_index)?;
    page[byte] &= ((1u16 << shift) - 1) as u8;
    page[byte + 1..].fill(0);
    Ok(())
}

/// The map's side of `Heap2/VISIBLE`: sets bits unless they are exactly so already. True if the page changed.
pub(crate) fn redo_visible(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    let flags = pgstrata_pg_wal::bytes::u8_at(piece.main, 4)? & VISIBLE_BITS;
    let (map_block, index) = place(piece.needed_block(1)?);
    if map_block != piece.block {
        return Err(Bad("the visibility map block is not that of the heap block"));
    }
    ensure_initialised(page);
    let (byte, shift) = byte_and_shift(index)?;
    if page[byte] >> shift & BOTH == flags {
        return Ok(false);
    }
    page[byte] |= flags << shift;
    Ok(true)
}
