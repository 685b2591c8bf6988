//! The first half of a check: records to steps, in the order of the WAL, for those who hold the pages.
//!
//! Pages do not depend on each other (rule R1), so they can be shared out: every block belongs to one of a number of
//! partitions, and its steps go to that partition in order. What is done to whole relations and databases goes to all.
//! A [`Batch`] owns what its steps need of the records, so that another thread can take it.

use crate::branch::{self, Branch};
use crate::control::ControlState;
use crate::effects::{Effect, Effects};
use crate::error::{RecordKind, RedoError};
use crate::report::{Counts, Report};
use pgstrata_ids::{Fork, Lsn, RelTag};
use pgstrata_pg_wal::{BlockImage, BlockRef, DecodedRecord, Record, WalError};
use std::ops::Range;

/// The partition of a block, out of `count`. It does not depend on database and tablespace, so that a copied database's
/// pages are in the partition of those that they are copies of.
pub fn partition(rel: RelTag, block: u32, count: usize) -> usize {
    let mixed = (u64::from(rel.rel) << 32 | u64::from(block)) ^ (rel.fork as u64) << 62;
    (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % count.max(1)
}

/// A full-page image, its bytes in the batch.
#[derive(Clone, Debug)]
struct ImageAt {
    info: u8,
    hole_offset: u16,
    hole_length: u16,
    bytes: Range<usize>,
}

/// A block's value, its bytes in the batch.
#[derive(Clone, Debug)]
pub(crate) struct ValueAt {
    bytes: Range<usize>,
    pub complete: bool,
    pub extends: bool,
}

/// What a record does to one block, and the image to compare with.
#[derive(Clone, Debug)]
pub(crate) struct BlockStep {
    pub kind: RecordKind,
    pub branch: Branch,
    pub lsn: Lsn,
    pub end: Lsn,
    pub rel: RelTag,
    pub block: u32,
    /// The block's id in the record; `None` if the record does not refer to it.
    pub role: Option<u8>,
    /// `None` if the block is only looked at.
    pub value: Option<ValueAt>,
    image: Option<ImageAt>,
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Block(BlockStep),
    Truncate {
        rel: RelTag,
        blocks: u32,
    },
    DropRelation {
        spc: u32,
        db: u32,
        rel: u32,
    },
    DropDatabase {
        spc: u32,
        db: u32,
    },
    CopyDatabase {
        from: (u32, u32),
        to: (u32, u32),
    },
    /// The end of a base backup: from here on every page is what it should be.
    Consistent,
}

/// Steps of some records, by partition.
#[derive(Clone, Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    steps: Vec<Vec<Step>>,
}

impl Batch {
    /// An empty one for so many partitions.
    pub fn new(partitions: usize) -> Batch {
        Batch { bytes: Vec::new(), steps: vec![Vec::new(); partitions.max(1)] }
    }

    /// Bytes of values and images in it.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.iter().all(Vec::is_empty)
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.steps.iter_mut().for_each(Vec::clear);
    }

    pub(crate) fn steps(&self, partition: usize) -> &[Step] {
        self.steps.get(partition).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn value(&self, value: &ValueAt) -> &[u8] {
        self.bytes.get(value.bytes.clone()).unwrap_or(&[])
    }

    pub(crate) fn image(&self, step: &BlockStep) -> Option<BlockImage<'_>> {
        let image = step.image.as_ref()?;
        let bytes = self.bytes.get(image.bytes.clone())?;
        BlockImage::from_parts(image.info, image.hole_offset, image.hole_length, bytes).ok()
    }

    fn keep(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    fn push_to_all(&mut self, step: &Step) {
        self.steps.iter_mut().for_each(|steps| steps.push(step.clone()));
    }

    fn push(&mut self, step: BlockStep) {
        let place = partition(step.rel, step.block, self.steps.len());
        self.steps[place].push(Step::Block(step));
    }
}

/// Derives effects, record by record, and counts.
#[derive(Debug)]
pub struct Planner {
    control: ControlState,
    effects: Effects,
    report: Report,
}

impl Planner {
    /// Starts at the position of `control`.
    pub fn new(control: ControlState) -> Planner {
        Planner { control, effects: Effects::new(), report: Report::default() }
    }

    /// Records read, and those that cannot be replayed.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Adds a record's steps to `batch`.
    pub fn feed(&mut self, record: Record<'_>, batch: &mut Batch) -> Result<(), WalError> {
        let record = DecodedRecord::decode(record)?;
        let version = self.control.version();
        let kind = RecordKind::new(version, record.header.rmgr, record.header.info);
        let branch = branch::of(version, &record);
        self.report.records += 1;
        self.report.count(kind, branch, Counts { records: 1, ..Counts::default() });
        let mut effects = std::mem::take(&mut self.effects);
        match effects.derive(&record, &mut self.control) {
            Ok(()) => plan(&effects, &record, kind, branch, batch),
            Err(error) => self.unsupported(&error),
        }
        self.effects = effects;
        Ok(())
    }

    fn unsupported(&mut self, error: &RedoError) {
        self.report.unsupported += 1;
        self.report.describe_unsupported(error.to_string());
    }
}

fn plan(
    effects: &Effects,
    record: &DecodedRecord<'_>,
    kind: RecordKind,
    branch: Branch,
    batch: &mut Batch,
) {
    let (lsn, end) = (record.lsn, record.end);
    let mut touched: Vec<(RelTag, u32)> = Vec::new();
    for effect in &effects.items {
        match *effect {
            Effect::Block { rel, block, value, complete, extends } => {
                let reference = record
                    .blocks
                    .iter()
                    .find(|reference| reference.rel == rel && reference.block == block);
                let bytes = batch.keep(effects.value(value));
                let value = Some(ValueAt { bytes, complete, extends });
                touched.push((rel, block));
                let at = Place { lsn, end, kind, branch, rel, block };
                block_step(at, reference, value, batch);
            }
            Effect::RelTruncate { rel, blocks } => {
                batch.push_to_all(&Step::Truncate { rel, blocks })
            }
            Effect::RelDrop { spc, db, rel } => {
                batch.push_to_all(&Step::DropRelation { spc, db, rel })
            }
            Effect::DatabaseCreate { spc, db, copy_from } => {
                batch.push_to_all(&Step::DropDatabase { spc, db });
                if let Some(from) = copy_from {
                    batch.push_to_all(&Step::CopyDatabase { from, to: (spc, db) });
                }
            }
            Effect::DatabaseDrop { spc, db } => batch.push_to_all(&Step::DropDatabase { spc, db }),
            Effect::BackupEnd { .. } => batch.push_to_all(&Step::Consistent),
            _ => {}
        }
    }
    // Blocks that the record only locks carry images too.
    for reference in &record.blocks {
        let (rel, block) = (reference.rel, reference.block);
        let kept = rel.fork != Fork::FreeSpace && reference.image.is_some();
        if kept && !touched.contains(&(rel, block)) {
            block_step(Place { lsn, end, kind, branch, rel, block }, Some(reference), None, batch);
        }
    }
}

struct Place {
    lsn: Lsn,
    end: Lsn,
    kind: RecordKind,
    branch: Branch,
    rel: RelTag,
    block: u32,
}

fn block_step(
    Place { lsn, end, kind, branch, rel, block }: Place,
    reference: Option<&BlockRef<'_>>,
    value: Option<ValueAt>,
    batch: &mut Batch,
) {
    let image = reference.and_then(|reference| reference.image).map(|image| ImageAt {
        info: image.info(),
        hole_offset: image.hole_offset,
        hole_length: image.hole_length,
        bytes: batch.keep(image.bytes),
    });
    let role = reference.map(|reference| reference.id);
    batch.push(BlockStep { kind, branch, lsn, end, rel, block, role, value, image });
}
