//! Pruning, vacuuming and freezing of heap pages: three records in 15 and 16, one form for all in 17 and 18
//! (access/heap/heapam_xlog.c, access/heapam_xlog.h).
//!
//! ```text
//! freeze entry   15: xmax u32, offset u16, infomask2 u16, infomask u16, flags u8, pad       per tuple
//! freeze plan    16 and later: xmax u32, infomask2 u16, infomask u16, flags u8, pad, tuples u16; offsets of all plans'
//!                tuples follow one after the other
//! ```

use crate::error::{Bad, Step};
use crate::heap_tuple::Tuple;
use crate::page::{self, Line, Page};
use crate::value::Piece;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::{Reader, u8_at, u16_at};

const FREEZE_XVAC: u8 = 0x02;
const INVALID_XVAC: u8 = 0x04;
const FROZEN_XID: u32 = 2;

const CLEANUP_LOCK: u8 = 0x04;
const HAS_FREEZE_PLANS: u8 = 0x10;
const HAS_REDIRECTIONS: u8 = 0x20;
const HAS_DEAD: u8 = 0x40;
const HAS_NOW_UNUSED: u8 = 0x80;

struct FreezePlan {
    xmax: u32,
    infomask2: u16,
    infomask: u16,
    flags: u8,
}

impl FreezePlan {
    /// A plan, and its number of tuples.
    fn read(reader: &mut Reader<'_>) -> Step<(FreezePlan, u16)> {
        let xmax = reader.u32()?;
        let infomask2 = reader.u16()?;
        let infomask = reader.u16()?;
        let flags = reader.u8()?;
        reader.u8()?;
        Ok((FreezePlan { xmax, infomask2, infomask, flags }, reader.u16()?))
    }

    fn execute(&self, page: &mut Page, offset: u16) -> Step<()> {
        if !page::line(page, offset)?.is_normal() {
            return Err(Bad("the line pointer to freeze holds no tuple"));
        }
        let mut tuple = Tuple::new(page::item_mut(page, offset)?)?;
        tuple.set_xmax(self.xmax);
        if self.flags & FREEZE_XVAC != 0 {
            tuple.set_xvac(FROZEN_XID);
        }
        if self.flags & INVALID_XVAC != 0 {
            tuple.set_xvac(0);
        }
        tuple.set_infomask(self.infomask);
        tuple.set_infomask2(self.infomask2);
        Ok(())
    }
}

fn redirect(page: &mut Page, pairs: &mut Reader<'_>, count: usize) -> Step<()> {
    for _ in 0..count {
        let from = pairs.u16()?;
        let to = pairs.u16()?;
        page::set_line(page, from, Line::redirect(to))?;
    }
    Ok(())
}

fn set_lines(page: &mut Page, offsets: &mut Reader<'_>, count: usize, line: Line) -> Step<()> {
    for _ in 0..count {
        page::set_line(page, offsets.u16()?, line)?;
    }
    Ok(())
}

/// `PRUNE` of 15 and 16.
pub(crate) fn prune(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let redirected = usize::from(u16_at(piece.main, 4)?);
    let dead = usize::from(u16_at(piece.main, 6)?);
    let mut data = piece.data_reader();
    redirect(page, &mut data, redirected)?;
    set_lines(page, &mut data, dead, Line::DEAD)?;
    let unused = data.rest().len() / 2;
    set_lines(page, &mut data, unused, Line::UNUSED)?;
    page::repair_fragmentation(page)
}

/// `VACUUM` of 15 and 16.
pub(crate) fn vacuum(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let mut data = piece.data_reader();
    set_lines(page, &mut data, piece.data.len() / 2, Line::UNUSED)?;
    page::truncate_lines(page)
}

/// `FREEZE_PAGE` of 15 and 16.
pub(crate) fn freeze(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let count = usize::from(u16_at(piece.main, 4)?);
    let mut data = piece.data_reader();
    if piece.version >= PgVersion::V16 {
        let mut plans = Reader::new(data.take(count * 12)?);
        return execute_plans(page, &mut plans, &mut data);
    }
    for _ in 0..count {
        let xmax = data.u32()?;
        let offset = data.u16()?;
        let infomask2 = data.u16()?;
        let infomask = data.u16()?;
        let flags = data.u8()?;
        data.u8()?;
        FreezePlan { xmax, infomask2, infomask, flags }.execute(page, offset)?;
    }
    Ok(())
}

fn execute_plans(page: &mut Page, plans: &mut Reader<'_>, offsets: &mut Reader<'_>) -> Step<()> {
    while !plans.is_empty() {
        let (plan, tuples) = FreezePlan::read(plans)?;
        for _ in 0..tuples {
            plan.execute(page, offsets.u16()?)?;
        }
    }
    Ok(())
}

/// The three `PRUNE_*` records of 17 and 18, which are replayed alike.
pub(crate) fn prune_freeze(page: &mut Page, piece: &Piece<'_>) -> Step<()> {
    let flags = u8_at(piece.main, 1)?;
    let mut data = piece.data_reader();
    let mut plans = Reader::new(&[]);
    if flags & HAS_FREEZE_PLANS != 0 {
        let count = usize::from(data.u16()?);
        data.u16()?;
        plans = Reader::new(data.take(count * 12)?);
    }
    if flags & HAS_REDIRECTIONS != 0 {
        let count = usize::from(data.u16()?);
        redirect(page, &mut data, count)?;
    }
    if flags & HAS_DEAD != 0 {
        let count = usize::from(data.u16()?);
        set_lines(page, &mut data, count, Line::DEAD)?;
    }
    if flags & HAS_NOW_UNUSED != 0 {
        let count = usize::from(data.u16()?);
        set_lines(page, &mut data, count, Line::UNUSED)?;
    }
    if flags & (HAS_REDIRECTIONS | HAS_DEAD | HAS_NOW_UNUSED) != 0 {
        if flags & CLEANUP_LOCK != 0 {
            page::repair_fragmentation(page)?;
        } else {
            page::truncate_lines(page)?;
        }
    }
    execute_plans(page, &mut plans, &mut data)
}
