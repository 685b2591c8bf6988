//! The metapage of hash indexes (access/hash.h, access/hash/hashpage.c, access/hash/hashutil.c).
//!
//! ```text
//! offset  field                      offset  field
//!     24  magic u32                      56  low mask u32
//!     28  version u32                    60  current splitpoint phase u32
//!     32  tuples f64                     64  first free overflow page u32
//!     40  fill factor u16                68  number of bitmaps u32
//!     42  bitmap bytes, most u16         72  hash function oid u32
//!     44  bitmap bytes u16               76  98 overflow page counts, one per phase, u32
//!     46  log2 of bitmap bits u16       468  1024 bitmap blocks, u32
//!     48  highest bucket u32           4568  (end)
//!     52  high mask u32
//! ```

use crate::error::{Bad, Step};
use crate::hash;
use crate::page::{self, Page};
use pgstrata_pg_wal::bytes::{Reader, u32_at};

const MAGIC: u32 = 0x0644_0640;
const VERSION: u32 = 4;
const META_PAGE: u16 = 8;
const INVALID: u32 = u32::MAX;

const TUPLES: usize = 32;
const MAX_BUCKET: usize = 48;
const PHASE: usize = 60;
const FIRST_FREE: usize = 64;
const BITMAP_COUNT: usize = 68;
const SPARES: usize = 76;
const BITMAPS: usize = 468;
const END: u16 = 4568;

const PHASES: u32 = 98;
const BITMAPS_MAX: u32 = 1024;
const SINGLE_PHASE_GROUPS: u32 = 10;
const MAX_BUCKETS: u32 = 0x4000_0000;

const UPDATE_MASKS: u8 = 1;
const UPDATE_SPLITPOINT: u8 = 2;

/// `_hash_spareindex`: the splitpoint phase that a bucket count belongs to.
fn phase_of(buckets: u32) -> u32 {
    let group = buckets.max(1).next_power_of_two().trailing_zeros();
    if group < SINGLE_PHASE_GROUPS {
        return group;
    }
    let before = SINGLE_PHASE_GROUPS + (group - SINGLE_PHASE_GROUPS) * 4;
    before + ((buckets - 1) >> (group - 3) & 3)
}

/// `_hash_get_totalbuckets`: the buckets allocated once a phase is complete.
fn buckets_of(phase: u32) -> u32 {
    if phase < SINGLE_PHASE_GROUPS {
        return 1 << phase;
    }
    let group = SINGLE_PHASE_GROUPS + (phase - SINGLE_PHASE_GROUPS) / 4;
    let half = 1u32 << (group - 1);
    half + half / 4 * ((phase - SINGLE_PHASE_GROUPS) % 4 + 1)
}

/// `_hash_init_metabuffer`.
pub(crate) fn init_meta(page: &mut Page, main: &[u8]) -> Step<()> {
    let mut reader = Reader::new(main);
    let tuples = f64::from_bits(reader.u64()?);
    let function = reader.u32()?;
    let fill_factor = reader.u16()?;

    let quotient = tuples / f64::from(fill_factor);
    let buckets = if quotient >= f64::from(MAX_BUCKETS) {
        MAX_BUCKETS
    } else if quotient > 2.0 {
        buckets_of(phase_of(quotient as u32))
    } else {
        2
    };
    let phase = phase_of(buckets);
    hash::init(page, INVALID, INVALID, META_PAGE)?;
    let high_mask = (buckets + 1).next_power_of_two() - 1;
    page::put_u32(page, 24, MAGIC)?;
    page::put_u32(page, 28, VERSION)?;
    page::put_u16(page, 40, fill_factor)?;
    page::put_u16(page, 42, 8152)?;
    page::put_u16(page, 44, 4096)?;
    page::put_u16(page, 46, 15)?;
    page::put_u32(page, MAX_BUCKET, buckets - 1)?;
    page::put_u32(page, 52, high_mask)?;
    page::put_u32(page, 56, high_mask >> 1)?;
    page::put_u32(page, PHASE, phase)?;
    page::put_u32(page, 72, function)?;
    page::put_u32(page, spare(phase)?, 1)?;
    page::set_lower(page, END);
    Ok(())
}

/// Where the count of a phase's overflow pages lies.
fn spare(phase: u32) -> Step<usize> {
    if phase < PHASES {
        Ok(SPARES + phase as usize * 4)
    } else {
        Err(Bad("the metapage's splitpoint phase is corrupt"))
    }
}

fn add_bitmap(page: &mut Page, block: u32) -> Step<()> {
    let count = page::get_u32(page, BITMAP_COUNT)?;
    if count >= BITMAPS_MAX {
        return Err(Bad("the metapage has too many bitmaps"));
    }
    page::put_u32(page, BITMAPS + count as usize * 4, block)?;
    page::put_u32(page, BITMAP_COUNT, count + 1)
}

/// The first bitmap follows the buckets.
pub(crate) fn add_first_bitmap(page: &mut Page) -> Step<()> {
    let last = page::get_u32(page, MAX_BUCKET)?;
    add_bitmap(page, last.wrapping_add(2))
}

pub(crate) fn add_tuples(page: &mut Page, count: f64) -> Step<()> {
    let low = u64::from(page::get_u32(page, TUPLES)?);
    let high = u64::from(page::get_u32(page, TUPLES + 4)?);
    let tuples = f64::from_bits(high << 32 | low) + count;
    page::put(page, TUPLES, &tuples.to_bits().to_le_bytes())
}

pub(crate) fn set_tuples(page: &mut Page, main: &[u8]) -> Step<()> {
    let tuples = main.get(..8).ok_or(Bad("the record's data ends too early"))?;
    page::put(page, TUPLES, tuples)
}

pub(crate) fn set_first_free(page: &mut Page, first_free: u32) -> Step<()> {
    page::put_u32(page, FIRST_FREE, first_free)
}

/// An overflow page was added, and perhaps a bitmap page for it.
pub(crate) fn add_overflow(
    page: &mut Page,
    first_free: u32,
    bitmap_bit_found: bool,
    new_bitmap: Option<u32>,
) -> Step<()> {
    set_first_free(page, first_free)?;
    if bitmap_bit_found {
        return Ok(());
    }
    let count_at = spare(page::get_u32(page, PHASE)?)?;
    let mut count = page::get_u32(page, count_at)?.wrapping_add(1);
    if let Some(block) = new_bitmap {
        add_bitmap(page, block)?;
        count = count.wrapping_add(1);
    }
    page::put_u32(page, count_at, count)
}

/// A bucket was added. The data has the masks first, then the splitpoint, each if flagged.
pub(crate) fn split(page: &mut Page, new_bucket: u32, updates: u8, data: &[u8]) -> Step<()> {
    page::put_u32(page, MAX_BUCKET, new_bucket)?;
    let mut at = 0;
    if updates & UPDATE_MASKS != 0 {
        page::put_u32(page, 56, u32_at(data, 0)?)?;
        page::put_u32(page, 52, u32_at(data, 4)?)?;
        at = 8;
    }
    if updates & UPDATE_SPLITPOINT != 0 {
        let phase = u32_at(data, at)?;
        page::put_u32(page, spare(phase)?, u32_at(data, at + 4)?)?;
        page::put_u32(page, PHASE, phase)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_and_bucket_counts_agree() {
        // From the comments of hashpage.c: groups 0..9 are one phase each, later ones grow in four steps.
        assert_eq!(buckets_of(0), 1);
        assert_eq!(buckets_of(9), 512);
        assert_eq!([10, 11, 12, 13].map(buckets_of), [640, 768, 896, 1024]);
        for phase in 0..60 {
            assert_eq!(phase_of(buckets_of(phase)), phase);
            assert_eq!(phase_of(buckets_of(phase) + 1), phase + 1);
        }
    }
}
