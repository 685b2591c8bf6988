//! Compressed posting lists of GIN leaf pages (access/gin/ginpostinglist.c, `ginRedoRecompress`).
//!
//! ```text
//! segment  first TID (6), number of bytes u16, deltas to the TID before as varbytes, zero byte to even length
//! actions  count u16, then {segment number u8, action u8} with
//!          1 delete; 2 insert, 3 replace: a segment; 4 add items: count u16, TIDs (6 each)
//! ```
//! A TID counts as `block << 11 | offset`. Segment numbers are those of the page before the record. Encoding must give
//! the very bytes that the server's does.

use crate::error::{Bad, Step};
use crate::gin::{self, COMPRESSED, DATA_START};
use crate::heap_tuple::tid;
use crate::page::{self, Page};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::bytes::{Reader, u16_at};

const DELETE: u8 = 1;
const INSERT: u8 = 2;
const REPLACE: u8 = 3;
const ADD_ITEMS: u8 = 4;

const TID_SIZE: usize = 6;
const SEGMENT_HEADER: usize = 8;
const OFFSET_BITS: u32 = 11;
/// An encoded delta has at most this many bytes.
const VARBYTE_MAX: usize = 7;

/// Segments that are being written.
struct Output {
    bytes: [u8; PAGE_SIZE],
    length: usize,
}

impl Output {
    fn push(&mut self, data: &[u8]) -> Step<()> {
        let place = self.bytes.get_mut(self.length..self.length + data.len());
        place.ok_or(Bad("posting lists are longer than the page"))?.copy_from_slice(data);
        self.length += data.len();
        Ok(())
    }
}

fn tid_number(raw: &[u8]) -> Step<u64> {
    let [a, b, c, d, e, f] = *raw else {
        return Err(Bad("a posting list is cut off"));
    };
    let block = u64::from(u16::from_le_bytes([a, b])) << 16 | u64::from(u16::from_le_bytes([c, d]));
    Ok(block << OFFSET_BITS | u64::from(u16::from_le_bytes([e, f])))
}

fn number_tid(number: u64) -> [u8; TID_SIZE] {
    tid((number >> OFFSET_BITS) as u32, (number & ((1 << OFFSET_BITS) - 1)) as u16)
}

/// Splits off the first segment, padding included.
fn split_segment(bytes: &[u8]) -> Step<(&[u8], &[u8])> {
    let length = SEGMENT_HEADER + usize::from(u16_at(bytes, 6)?).next_multiple_of(2);
    bytes.split_at_checked(length).ok_or(Bad("a posting list is cut off"))
}

/// TIDs of a segment.
struct Decoder<'a> {
    next: Option<u64>,
    deltas: Reader<'a>,
}

impl<'a> Decoder<'a> {
    fn new(segment: &'a [u8]) -> Step<Decoder<'a>> {
        let mut reader = Reader::new(segment);
        let first = tid_number(reader.take(TID_SIZE)?)?;
        let length = usize::from(reader.u16()?);
        Ok(Decoder { next: Some(first), deltas: Reader::new(reader.take(length)?) })
    }

    fn advance(&mut self) -> Step<()> {
        let Some(before) = self.next else { return Ok(()) };
        if self.deltas.is_empty() {
            self.next = None;
            return Ok(());
        }
        let mut delta = 0u64;
        for byte_number in 0..VARBYTE_MAX {
            let byte = self.deltas.u8()?;
            delta |= u64::from(byte & 0x7F) << (7 * byte_number);
            if byte & 0x80 == 0 {
                self.next = Some(before.wrapping_add(delta));
                return Ok(());
            }
        }
        Err(Bad("a posting list has an endless number"))
    }
}

/// Writes one segment (`ginCompressPostingList`).
struct Encoder {
    start: usize,
    before: Option<u64>,
}

impl Encoder {
    fn new(out: &Output) -> Encoder {
        Encoder { start: out.length, before: None }
    }

    fn push(&mut self, number: u64, out: &mut Output) -> Step<()> {
        match self.before {
            None => {
                out.push(&number_tid(number))?;
                out.push(&[0; 2])?;
            }
            Some(before) => {
                let mut delta = number.checked_sub(before).ok_or(Bad("TIDs are out of order"))?;
                while delta > 0x7F {
                    out.push(&[delta as u8 | 0x80])?;
                    delta >>= 7;
                }
                out.push(&[delta as u8])?;
            }
        }
        self.before = Some(number);
        Ok(())
    }

    fn finish(self, out: &mut Output) -> Step<()> {
        if self.before.is_none() {
            return Ok(());
        }
        let length = out.length - self.start - SEGMENT_HEADER;
        out.bytes[self.start + 6..self.start + 8].copy_from_slice(&(length as u16).to_le_bytes());
        if !length.is_multiple_of(2) {
            out.push(&[0])?;
        }
        Ok(())
    }
}

/// The segment with more TIDs: both lists are sorted.
fn add_items(segment: &[u8], items: &[u8], out: &mut Output) -> Step<()> {
    let mut old = Decoder::new(segment)?;
    let mut encoder = Encoder::new(out);
    for raw in items.chunks(TID_SIZE) {
        let new = tid_number(raw)?;
        while let Some(number) = old.next.filter(|number| *number <= new) {
            if number != new {
                encoder.push(number, out)?;
            }
            old.advance()?;
        }
        encoder.push(new, out)?;
    }
    while let Some(number) = old.next {
        encoder.push(number, out)?;
        old.advance()?;
    }
    encoder.finish(out)
}

/// Pages of before PostgreSQL 9.4, brought along by `pg_upgrade`, hold plain TIDs.
fn compress_old_page(page: &mut Page) -> Step<()> {
    let count = usize::from(page::get_u16(page, gin::MAX_OFFSET)?);
    let old = *page;
    let items = old.get(DATA_START..DATA_START + count * TID_SIZE);
    let mut out = Output { bytes: [0; PAGE_SIZE], length: 0 };
    let mut encoder = Encoder::new(&out);
    for raw in items.ok_or(Bad("items are longer than the page"))?.chunks(TID_SIZE) {
        encoder.push(tid_number(raw)?, &mut out)?;
    }
    encoder.finish(&mut out)?;
    gin::set_data(page, &out.bytes[..out.length])?;
    let flags = page::get_u16(page, gin::FLAGS)?;
    page::put_u16(page, gin::FLAGS, flags | COMPRESSED)?;
    page::put_u16(page, gin::MAX_OFFSET, 0)
}

/// `ginRedoRecompress`.
pub(crate) fn recompress(page: &mut Page, data: &[u8]) -> Step<()> {
    if page::get_u16(page, gin::FLAGS)? & COMPRESSED == 0 {
        compress_old_page(page)?;
    }
    let old = *page;
    let end = usize::from(page::lower(page));
    let mut rest = old.get(DATA_START..end).ok_or(Bad("the page header's bounds are corrupt"))?;
    let mut out = Output { bytes: [0; PAGE_SIZE], length: 0 };
    let mut actions = Reader::new(data);
    let mut segment_number = 0;
    for _ in 0..actions.u16()? {
        let number = actions.u8()?;
        let action = actions.u8()?;
        while segment_number < number {
            let (segment, tail) = split_segment(rest)?;
            out.push(segment)?;
            rest = tail;
            segment_number += 1;
        }
        if matches!(action, INSERT | REPLACE) {
            let (segment, _) = split_segment(actions.rest())?;
            out.push(actions.take(segment.len())?)?;
        }
        match action {
            INSERT => continue,
            DELETE | REPLACE => rest = split_segment(rest)?.1,
            ADD_ITEMS => {
                let count = usize::from(actions.u16()?);
                let (segment, tail) = split_segment(rest)?;
                add_items(segment, actions.take(count * TID_SIZE)?, &mut out)?;
                rest = tail;
            }
            _ => return Err(Bad("unknown action on a posting list")),
        }
        segment_number = segment_number.saturating_add(1);
    }
    out.push(rest)?;
    gin::set_data(page, &out.bytes[..out.length])
}

#[cfg(test)]
mod tests;
