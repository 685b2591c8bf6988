//! Pages of the SLRUs: transaction status, multixacts, commit timestamps. They have no header, LSN or checksum.
//!
//! ```text
//! value  1 zero page                                            (complete)
//!        2 transaction status   status u8, {index u16}...
//!        3 multixact offsets    {index u16, offset u32}...      an entry that is set already stays
//!        4 zero page, then multixact offsets as in 3            (complete)
//!        5 multixact members    {index u16, status u8, xid u32}...
//!        6 commit timestamps    time i64, origin u16, {index u16}...
//! ```
//! An index is an entry's number within its page.

use crate::error::{Bad, RedoError, Step};
use crate::page::Page;
use pgstrata_ids::{Lsn, PAGE_SIZE, SlruKind};
use pgstrata_pg_wal::bytes::Reader;

const ZERO: u8 = 1;
const CLOG: u8 = 2;
const OFFSETS: u8 = 3;
const ZERO_THEN_OFFSETS: u8 = 4;
const MEMBERS: u8 = 5;
const COMMIT_TS: u8 = 6;

/// Transactions per page of `pg_xact`.
pub const CLOG_XACTS_PER_PAGE: u32 = PAGE_SIZE as u32 * 4;
/// Multixacts per page of `pg_multixact/offsets`.
pub const OFFSETS_PER_PAGE: u32 = PAGE_SIZE as u32 / 4;
/// Members per page of `pg_multixact/members`: 409 groups of four flag bytes and four xids.
pub const MEMBERS_PER_PAGE: u32 = 409 * 4;
/// Transactions per page of `pg_commit_ts`.
pub const COMMIT_TS_PER_PAGE: u32 = PAGE_SIZE as u32 / 10;
/// Pages per segment file.
pub const PAGES_PER_SEGMENT: u64 = 32;

/// Transaction status in `pg_xact`.
pub(crate) const COMMITTED: u8 = 1;
pub(crate) const ABORTED: u8 = 2;

/// True if the value gives the page whatever it held before.
pub fn is_complete_slru(value: &[u8]) -> bool {
    matches!(value.first(), Some(&(ZERO | ZERO_THEN_OFFSETS)))
}

pub(crate) fn encode_zero(out: &mut Vec<u8>) {
    out.push(ZERO);
}

/// Begins a list of transactions' status; indexes follow with [`encode_index`].
pub(crate) fn encode_status(out: &mut Vec<u8>, status: u8) {
    out.extend_from_slice(&[CLOG, status]);
}

/// Begins a list of commit timestamps; indexes follow with [`encode_index`].
pub(crate) fn encode_commit_ts(out: &mut Vec<u8>, time: i64, origin: u16) {
    out.push(COMMIT_TS);
    out.extend_from_slice(&time.to_le_bytes());
    out.extend_from_slice(&origin.to_le_bytes());
}

pub(crate) fn encode_index(out: &mut Vec<u8>, index: u16) {
    out.extend_from_slice(&index.to_le_bytes());
}

/// Begins a list of multixact offsets, on a page of zeros if `zero`.
pub(crate) fn encode_offsets(out: &mut Vec<u8>, zero: bool) {
    out.push(if zero { ZERO_THEN_OFFSETS } else { OFFSETS });
}

pub(crate) fn encode_offset(out: &mut Vec<u8>, index: u16, offset: u32) {
    out.extend_from_slice(&index.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
}

pub(crate) fn encode_members(out: &mut Vec<u8>) {
    out.push(MEMBERS);
}

pub(crate) fn encode_member(out: &mut Vec<u8>, index: u16, status: u8, xid: u32) {
    out.extend_from_slice(&index.to_le_bytes());
    out.push(status);
    out.extend_from_slice(&xid.to_le_bytes());
}

/// Applies a value to an SLRU page (zeros if the page did not exist).
pub fn apply_slru(page: &mut Page, value: &[u8], end_lsn: Lsn) -> Result<(), RedoError> {
    apply(page, value).map_err(|bad| RedoError::Value { end_lsn, reason: bad.0 })
}

fn apply(page: &mut Page, value: &[u8]) -> Step<()> {
    let mut reader = Reader::new(value);
    match reader.u8()? {
        ZERO => page.fill(0),
        CLOG => apply_status(page, &mut reader)?,
        OFFSETS => apply_offsets(page, &mut reader)?,
        ZERO_THEN_OFFSETS => {
            page.fill(0);
            apply_offsets(page, &mut reader)?;
        }
        MEMBERS => apply_members(page, &mut reader)?,
        COMMIT_TS => apply_commit_ts(page, &mut reader)?,
        _ => return Err(Bad("unknown kind of SLRU value")),
    }
    Ok(())
}

fn place(page: &mut Page, at: usize, length: usize) -> Step<&mut [u8]> {
    page.get_mut(at..at + length).ok_or(Bad("an SLRU entry is outside of its page"))
}

fn apply_status(page: &mut Page, reader: &mut Reader<'_>) -> Step<()> {
    let status = reader.u8()? & 3;
    while !reader.is_empty() {
        let index = reader.u16()?;
        let shift = index % 4 * 2;
        let byte = &mut place(page, usize::from(index / 4), 1)?[0];
        *byte = *byte & !(3 << shift) | status << shift;
    }
    Ok(())
}

fn apply_offsets(page: &mut Page, reader: &mut Reader<'_>) -> Step<()> {
    while !reader.is_empty() {
        let index = usize::from(reader.u16()?);
        let offset = reader.u32()?;
        let entry = place(page, index * 4, 4)?;
        // RecordNewMultiXact: already set by the neighbouring multixact, to the same value, or still zero.
        if entry == [0; 4] {
            entry.copy_from_slice(&offset.to_le_bytes());
        }
    }
    Ok(())
}

fn apply_members(page: &mut Page, reader: &mut Reader<'_>) -> Step<()> {
    while !reader.is_empty() {
        let index = usize::from(reader.u16()?);
        let status = reader.u8()?;
        let xid = reader.u32()?;
        let group = index / 4 * 20;
        place(page, group + index % 4, 1)?[0] = status;
        place(page, group + 4 + index % 4 * 4, 4)?.copy_from_slice(&xid.to_le_bytes());
    }
    Ok(())
}

fn apply_commit_ts(page: &mut Page, reader: &mut Reader<'_>) -> Step<()> {
    let entry: [u8; 10] = reader.array()?;
    while !reader.is_empty() {
        let index = usize::from(reader.u16()?);
        place(page, index * 10, 10)?.copy_from_slice(&entry);
    }
    Ok(())
}

/// True if truncating at `cutoff_page` removes the segment file that holds `page`: all its pages are before the
/// cutoff's segment, in the wrap-around order of the SLRU (`SimpleLruTruncate` and the `*PagePrecedes` functions).
pub fn is_truncated(kind: SlruKind, page: u64, cutoff_page: u64) -> bool {
    let cutoff = cutoff_page - cutoff_page % PAGES_PER_SEGMENT;
    let first = page - page % PAGES_PER_SEGMENT;
    let last = first + PAGES_PER_SEGMENT - 1;
    precedes(kind, first, cutoff) && precedes(kind, last, cutoff)
}

fn precedes(kind: SlruKind, page: u64, other: u64) -> bool {
    // Ids below 3 are special; multixact 0 is invalid. Only the order of ids matters.
    let (per_page, first_normal) = match kind {
        SlruKind::Clog => (CLOG_XACTS_PER_PAGE, 4),
        SlruKind::CommitTs => (COMMIT_TS_PER_PAGE, 4),
        SlruKind::MultiXactOffsets => (OFFSETS_PER_PAGE, 2),
        SlruKind::MultiXactMembers => (MEMBERS_PER_PAGE, 0),
    };
    let first = (page as u32).wrapping_mul(per_page).wrapping_add(first_normal);
    let other_first = (other as u32).wrapping_mul(per_page).wrapping_add(first_normal);
    let before = |a: u32, b: u32| (a.wrapping_sub(b) as i32) < 0;
    before(first, other_first) && before(first, other_first.wrapping_add(per_page - 1))
}
