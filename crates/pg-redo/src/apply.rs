//! Applies a stored value to a block: the shared rules, and the way to each resource manager's own redo.

use crate::error::{Bad, RecordKind, RedoError, Step};
use crate::page::{self, Page};
use crate::value::{self, Piece, Value, ValueKind};
use crate::{brin, btree, generic, gin, gist, hash, heap, sequence, spgist, visibility};
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::rmgr;

/// Applies a value to a block's content.
///
/// `page` holds the block as it was before (zeros if it did not exist), `block` is its number in the fork, and
/// `end_lsn` the end of the record, by which the value is keyed. A page that already has the change (its LSN is at or
/// past `end_lsn`, as in a fuzzy base backup) is left alone, except by complete values and visibility clears, which may
/// be repeated.
pub fn apply_block(
    page: &mut Page,
    value: &[u8],
    block: u32,
    end_lsn: Lsn,
) -> Result<(), RedoError> {
    let malformed = |bad: Bad| RedoError::Value { end_lsn, reason: bad.0 };
    match Value::decode(value, block, end_lsn).map_err(malformed)? {
        Value::Image(image) => {
            image.restore(page).map_err(|error| malformed(error.into()))?;
            stamp_image(page, end_lsn);
            Ok(())
        }
        Value::ImageThenPiece(image, piece) => {
            image.restore(page).map_err(|error| malformed(error.into()))?;
            stamp_image(page, end_lsn);
            redo(page, &piece)
        }
        Value::Piece(piece) => {
            if !piece.init && !page::is_new(page) && end_lsn <= page::lsn(page) {
                return Ok(());
            }
            redo(page, &piece)
        }
        Value::VisibilityClear(clears) => visibility::clear_all(page, clears).map_err(malformed),
        Value::VisibilityTruncate(first) => visibility::truncate(page, first).map_err(malformed),
    }
}

/// What a value is, for people.
pub fn value_kind(value: &[u8]) -> Result<ValueKind, RedoError> {
    let malformed = |bad: Bad| RedoError::Value { end_lsn: Lsn::INVALID, reason: bad.0 };
    Ok(match Value::decode(value, 0, Lsn::INVALID).map_err(malformed)? {
        Value::Image(_) => ValueKind::Image,
        Value::Piece(piece) | Value::ImageThenPiece(_, piece) => ValueKind::Piece(kind(&piece)),
        Value::VisibilityClear(_) => ValueKind::VisibilityClear,
        Value::VisibilityTruncate(_) => ValueKind::VisibilityTruncate,
    })
}

/// What of an older page a change reads, beside its header and line pointers: a hint for those who want to have it in
/// the caches before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Most of it.
    Page,
    /// The item of that number, and where the next item goes.
    Item(u16),
    /// Where the next item goes.
    FreeSpace,
}

/// What applying a value reads.
#[inline]
pub fn reads(value: &[u8]) -> Reads {
    match value::peek(value) {
        Some((rmgr, info, main)) => heap::reads(rmgr, info & 0x70, main),
        None => Reads::FreeSpace,
    }
}

/// Rule R3: an image of a page that was never initialised stays all zeros.
fn stamp_image(page: &mut Page, end_lsn: Lsn) {
    if !page::is_new(page) {
        page::set_lsn(page, end_lsn);
    }
}

fn kind(piece: &Piece<'_>) -> RecordKind {
    RecordKind { version: piece.version, rmgr: piece.rmgr, info: piece.info }
}

fn redo(page: &mut Page, piece: &Piece<'_>) -> Result<(), RedoError> {
    #[cfg(feature = "redo-faults")]
    let before = if piece.init { [0; pgstrata_ids::PAGE_SIZE] } else { *page };
    let changed = redo_piece(page, piece).map_err(|bad| RedoError::Apply {
        record: kind(piece),
        end_lsn: piece.end_lsn,
        block: piece.block,
        reason: bad.0,
    })?;
    #[cfg(feature = "redo-faults")]
    crate::faults::inject(&before, page, piece);
    if changed {
        page::set_lsn(page, piece.end_lsn);
    }
    Ok(())
}

/// True if the page changed and so gets the record's LSN.
fn redo_piece(page: &mut Page, piece: &Piece<'_>) -> Step<bool> {
    // Rule R9. Visibility map pages come into being as they are needed.
    if !piece.init && page::is_new(page) && !heap::is_visibility_map(piece) {
        return Err(Bad("the page was never initialised"));
    }
    if piece.init {
        // Nothing of what was there may matter: a complete value is applied without looking for older content.
        page.fill(0);
    }
    match piece.rmgr {
        rmgr::HEAP => heap::redo(page, piece),
        rmgr::HEAP2 => heap::redo_heap2(page, piece),
        rmgr::BTREE => btree::redo(page, piece).map(|()| true),
        rmgr::BRIN => brin::redo(page, piece).map(|()| true),
        rmgr::GENERIC => generic::redo(page, piece).map(|()| true),
        rmgr::HASH => hash::redo(page, piece),
        rmgr::GIN => gin::redo(page, piece).map(|()| true),
        rmgr::GIST => gist::redo(page, piece).map(|()| true),
        rmgr::SPGIST => spgist::redo(page, piece).map(|()| true),
        rmgr::SEQUENCE => sequence::redo(page, piece).map(|()| true),
        _ => Err(Bad("records of this resource manager do not change blocks")),
    }
}
