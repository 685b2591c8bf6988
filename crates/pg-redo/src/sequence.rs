//! Sequences: one page with one tuple (commands/sequence.c).

use crate::error::{Bad, Step};
use crate::page::{self, Add, Page};
use crate::value::Piece;

const MAGIC: u32 = 0x1717;
const SPECIAL_SIZE: usize = 8;
const LOCATOR_SIZE: usize = 12;

/// `LOG`: the page from scratch. The tuple holds the sequence's state ahead of use, not as it is on the primary.
pub(crate) fn redo(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let tuple = piece.main.get(LOCATOR_SIZE..).ok_or(Bad("the record has no tuple"))?;
    page::init(page, SPECIAL_SIZE);
    let special = page::special_at(page, SPECIAL_SIZE)?;
    page::put_u32(page, special, MAGIC)?;
    page::add_item(page, tuple, 1, Add::Insert)
}
