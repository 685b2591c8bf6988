//! Values of the blocks that a record changes: those it refers to, and the visibility map blocks it does not.

use super::{Effect, Effects};
use crate::control::ControlState;
use crate::error::{Bad, Step};
use crate::value::{self, PieceParts};
use crate::visibility::{self, ALL_FROZEN, BOTH};
use pgstrata_ids::{Fork, RelTag};
use pgstrata_pg_wal::bytes::{u8_at, u16_at};
use pgstrata_pg_wal::{BlockRef, DecodedRecord, rmgr};
use smallvec::SmallVec;

/// Main data that a block's redo reads, at most, in bytes. The longest that PostgreSQL writes are a few arrays of a
/// page's line pointers; the bound is there because the data are kept for each of up to 33 blocks.
const MAIN_LIMIT: usize = 256 * 1024;

/// What redo does with a block besides or instead of restoring its applied image.
enum Need {
    /// Nothing: the image, if any, is the result.
    Image,
    /// The record's change, or its image.
    PieceOrImage,
    /// The change also where an image was restored (rule R5).
    PieceAfterImage,
    /// The block is only there for its lock.
    Nothing,
}

fn need(record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Need {
    let opcode = record.header.opcode();
    match (record.header.rmgr, opcode, block.id) {
        (rmgr::XLOG, _, _) => Need::Image,
        // Hash MOVE_PAGE_CONTENTS, SQUEEZE_PAGE, DELETE: the primary bucket page, unchanged.
        (rmgr::HASH, 0x70..=0x90, 0) => Need::Nothing,
        (rmgr::HASH, 0x40, 0) | (rmgr::HASH, 0x60, 0 | 1) => Need::PieceAfterImage,
        // GiST PAGE_UPDATE and PAGE_SPLIT: the left child's image was taken before its links were changed.
        (rmgr::GIST, 0x00, 1) | (rmgr::GIST, 0x30, 0) => Need::PieceAfterImage,
        _ => Need::PieceOrImage,
    }
}

/// The part of the main data that this block's redo reads: all of it, unless the record has large parts for others.
fn main_for<'a>(record: &DecodedRecord<'a>, block: &BlockRef<'_>) -> Step<&'a [u8]> {
    let main = record.main_data;
    let opcode = record.header.opcode();
    let length = match (record.header.rmgr, opcode & 0x70, block.id) {
        // Behind the fixed part there may be old tuples for logical decoding, or invalidation messages.
        (rmgr::HEAP, 0x00, _) => 3,
        (rmgr::HEAP, 0x10 | 0x60, _) => 8,
        (rmgr::HEAP, 0x20 | 0x40, _) => 14,
        (rmgr::HEAP, 0x70, _) => 2,
        (rmgr::HEAP2, 0x50, 1..) => 4,
        (rmgr::HASH, _, 1) if opcode == 0xC0 => 8,
        (rmgr::GIN, _, 1..) if opcode == 0x80 => 0,
        (rmgr::SPGIST, ..) => crate::spgist::main_length(opcode, block.id, main)?,
        _ => main.len(),
    };
    match main.get(..length.min(main.len())) {
        Some(main) if main.len() <= MAIN_LIMIT => Ok(main),
        Some(_) => Err(Bad("main data is longer than that of any record that changes blocks")),
        None => Err(Bad("main data is cut off")),
    }
}

impl Effects {
    pub(super) fn blocks(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &ControlState,
    ) -> Step<()> {
        for block in &record.blocks {
            if block.rel.fork != Fork::FreeSpace {
                self.block(record, block, control)?;
            }
        }
        match record.header.rmgr {
            rmgr::HEAP | rmgr::HEAP2 => self.implicit_clears(record),
            _ => Ok(()),
        }
    }

    fn block(
        &mut self,
        record: &DecodedRecord<'_>,
        block: &BlockRef<'_>,
        control: &ControlState,
    ) -> Step<()> {
        let applied = block.image.filter(|image| image.is_applied());
        let start = self.buf.len();
        match (need(record, block), &applied) {
            (Need::Image | Need::PieceOrImage, Some(image)) => {
                value::encode_image(&mut self.buf, image);
            }
            (Need::Nothing, Some(image)) => value::encode_image(&mut self.buf, image),
            (Need::Nothing, None) => return Ok(()),
            // A hint bit was set while full-page writes were off: the page did not change.
            (Need::Image, None) if record.header.opcode() == 0xA0 => return Ok(()),
            (Need::Image, None) => return Err(Bad("a full-page image is missing")),
            (Need::PieceOrImage | Need::PieceAfterImage, _) => {
                self.piece(record, block, control)?;
            }
        }
        let value = self.since(start);
        let complete = value::is_complete(&self.buf[start..]);
        let (rel, block) = (block.rel, block.block);
        self.items.push(Effect::Block { rel, block, value, complete, extends: true });
        Ok(())
    }

    fn piece(
        &mut self,
        record: &DecodedRecord<'_>,
        block: &BlockRef<'_>,
        control: &ControlState,
    ) -> Step<()> {
        let applied = block.image.filter(|image| image.is_applied());
        let parts = PieceParts {
            version: control.version(),
            rmgr: record.header.rmgr,
            info: record.header.info,
            role: block.id,
            xid: record.header.xid,
            init: block.will_init,
            hints_logged: control.hint_bits_are_logged(),
            main: main_for(record, block)?,
            // Data beside an applied image is for logical decoding (rule R3).
            data: if applied.is_some() { &[] } else { block.data },
        };
        let others = record.blocks.iter().filter(|other| other.id != block.id);
        let others = others.map(|other| (other.id, other.block));
        value::encode_piece(&mut self.buf, &parts, applied.as_ref(), others);
        Ok(())
    }

    /// Visibility bits that a heap change clears. From 17.11 and 18.6 on the map's block is referred to if a bit was
    /// set; the form of the record itself decides, since a timeline may hold WAL of several minor versions.
    fn implicit_clears(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        let main = record.main_data;
        let opcode = record.header.opcode() & 0x70;
        let heap2 = record.header.rmgr == rmgr::HEAP2;
        let (flags, bits) = match (heap2, opcode) {
            (false, 0x00) => (u8_at(main, 2)?, BOTH),
            (false, 0x10) => (u8_at(main, 7)?, BOTH),
            (false, 0x20 | 0x40) => return self.implicit_update_clears(record),
            (false, 0x60) | (true, 0x60) => (u8_at(main, 7)?, ALL_FROZEN),
            (true, 0x50) => (u16_at(main, 0)? as u8, BOTH),
            _ => return Ok(()),
        };
        let Some(heap) = record.block(0) else {
            return Err(Bad("the record lacks a block reference"));
        };
        if flags & 1 != 0 && record.block(1).is_none() {
            self.visibility_clear(heap.rel, &[(heap.block, bits)]);
        }
        Ok(())
    }

    fn implicit_update_clears(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        const OLD_CLEARED: u8 = 1;
        const NEW_CLEARED: u8 = 2;
        let flags = u8_at(record.main_data, 7)?;
        let Some(new) = record.block(0) else {
            return Err(Bad("the record lacks a block reference"));
        };
        if record.block(2).is_some() || record.block(3).is_some() {
            return Ok(());
        }
        let old = record.block(1).unwrap_or(new);
        let mut clears: SmallVec<[(u32, u8); 2]> = SmallVec::new();
        if flags & OLD_CLEARED != 0 {
            clears.push((old.block, BOTH));
        }
        if flags & NEW_CLEARED != 0 && !clears.contains(&(new.block, BOTH)) {
            clears.push((new.block, BOTH));
        }
        self.visibility_clear(new.rel, &clears);
        Ok(())
    }

    /// One value per map page, as there may be only one per block and record.
    fn visibility_clear(&mut self, heap: RelTag, clears: &[(u32, u8)]) {
        let rel = heap.with_fork(Fork::Visibility);
        for (at, (heap_block, _)) in clears.iter().enumerate() {
            let (block, _) = visibility::place(*heap_block);
            let on_same_page = |clear: &&(u32, u8)| visibility::place(clear.0).0 == block;
            if clears[..at].iter().any(|before| on_same_page(&before)) {
                continue;
            }
            let entries: SmallVec<[(u16, u8); 2]> = clears
                .iter()
                .filter(on_same_page)
                .map(|(heap_block, bits)| (visibility::place(*heap_block).1, *bits))
                .collect();
            let start = self.buf.len();
            value::encode_visibility_clear(&mut self.buf, &entries);
            let value = self.since(start);
            self.items.push(Effect::Block { rel, block, value, complete: false, extends: true });
        }
    }
}
