//! Generic records, of extensions that describe their changes as bytes (access/transam/generic_xlog.c).

use crate::error::{Bad, Step};
use crate::page::{self, HEADER_SIZE, Page};
use crate::value::Piece;
use pgstrata_ids::PAGE_SIZE;

/// Copies in the changed pieces, then zeroes the hole that the new header describes.
pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut data = piece.data_reader();
    while !data.is_empty() {
        let offset = usize::from(data.u16()?);
        let length = usize::from(data.u16()?);
        page::put(page, offset, data.take(length)?)?;
    }
    let (lower, upper) = (usize::from(page::lower(page)), usize::from(page::upper(page)));
    if lower < HEADER_SIZE || upper < lower || upper > PAGE_SIZE {
        return Err(Bad("the page header's bounds are corrupt"));
    }
    page[lower..upper].fill(0);
    Ok(())
}
