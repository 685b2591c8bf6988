//! The oracle: WAL made with `wal_consistency_checking` carries, with every change of a block, the page as it is after
//! the change. The checker replays natively, and compares.
//!
//! A page that was compared goes on as our redo left it; only after a mismatch (or where there was no earlier content)
//! does it go on from the image, so that one wrong byte is reported once.

use crate::apply::apply_block;
use crate::compare::compare;
use crate::control::ControlState;
use crate::effects::{Effect, Effects};
use crate::error::{RecordKind, RedoError};
use crate::mask::{MaskTarget, mask};
use crate::page::{self, Page};
use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_wal::{BlockRef, DecodedRecord, Record, WalError, rmgr};
use std::collections::BTreeMap;
use std::fmt;

/// Mismatches and unsupported records that are described; all are counted.
const DESCRIBED: usize = 100;

/// What a store knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Its content was written to the buffer.
    Page,
    /// It does not exist: zeros.
    Missing,
    /// It may exist, but its content is not known.
    Unknown,
}

/// Where the checker keeps pages.
pub trait PageStore {
    /// Errors of the store itself.
    type Error;
    /// Reads a block.
    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Self::Error>;
    /// Keeps a block.
    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Self::Error>;
    /// Forgets blocks from `blocks` on.
    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Self::Error>;
    /// Forgets a relation.
    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> Result<(), Self::Error>;
    /// Forgets a database in a tablespace.
    fn drop_database(&mut self, spc: u32, db: u32) -> Result<(), Self::Error>;
    /// Copies a database: `from` and `to` are tablespace and database.
    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> Result<(), Self::Error>;
}

/// Counts of one kind of record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records.
    pub records: u64,
    /// Blocks compared.
    pub compared: u64,
    /// Blocks that differ.
    pub mismatches: u64,
}

/// A block that differs.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// The record after which it differs.
    pub record: RecordKind,
    /// Start of the record.
    pub lsn: Lsn,
    /// Relation and fork.
    pub rel: RelTag,
    /// Block number.
    pub block: u32,
    /// The block's id in the record.
    pub role: u8,
    /// How it differs.
    pub difference: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { record, lsn, rel, block, role, difference } = self;
        write!(f, "{record} at {lsn}, block reference {role}, {rel} block {block}: {difference}")
    }
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Records read.
    pub records: u64,
    /// Blocks compared.
    pub compared: u64,
    /// Blocks that could not be compared, because their earlier content is not known.
    pub without_base: u64,
    /// Blocks that differ.
    pub mismatches: u64,
    /// Visibility map pages, compared strictly, on which the image lacks bits that replay still has.
    pub visibility_pending: u64,
    /// Records that cannot be replayed.
    pub unsupported: u64,
    /// By record kind, as `Heap/INSERT`.
    pub by_record: BTreeMap<String, Counts>,
    /// The first mismatches.
    pub mismatch_list: Vec<Mismatch>,
    /// The first records that cannot be replayed, and why.
    pub unsupported_list: Vec<String>,
}

/// Why checking stopped.
#[derive(Debug)]
pub enum CheckError<E> {
    /// The WAL cannot be read.
    Wal(WalError),
    /// The store failed.
    Store(E),
}

/// Replays records and compares pages with the images in them.
#[derive(Debug)]
pub struct Checker<S> {
    store: S,
    control: ControlState,
    effects: Effects,
    strict: bool,
    consistent: bool,
    report: Report,
    by_info: Vec<Option<(RecordKind, Counts)>>,
}

/// Indexes of `by_info`: resource manager and the high half of info.
fn slot(kind: RecordKind) -> usize {
    usize::from(kind.rmgr) << 4 | usize::from(kind.info >> 4)
}

impl<S: PageStore> Checker<S> {
    /// A checker that starts at the position of `control`, with the pages in `store`. A strict one compares visibility
    /// maps and all-visible flags too, which PostgreSQL's own comparison does not.
    pub fn new(store: S, control: ControlState, strict: bool) -> Checker<S> {
        let (effects, report) = (Effects::new(), Report::default());
        let by_info = vec![None; 256 * 16];
        Checker { store, control, effects, strict, consistent: true, report, by_info }
    }

    /// The pages are those of a backup that was taken while the cluster ran: until the record of its end, changes of
    /// blocks that a later record drops or truncates may meet no page.
    pub fn with_fuzzy_base(mut self) -> Checker<S> {
        self.consistent = false;
        self
    }

    /// What was found so far.
    pub fn report(&self) -> Report {
        let mut report = self.report.clone();
        for (kind, counts) in self.by_info.iter().flatten() {
            let total = report.by_record.entry(kind.to_string()).or_default();
            total.records += counts.records;
            total.compared += counts.compared;
            total.mismatches += counts.mismatches;
        }
        report
    }

    /// The store, for further use.
    pub fn into_store(self) -> S {
        self.store
    }

    fn counts(&mut self, kind: RecordKind) -> &mut Counts {
        &mut self.by_info[slot(kind)].get_or_insert((kind, Counts::default())).1
    }

    /// Replays one record.
    pub fn feed(&mut self, record: Record<'_>) -> Result<(), CheckError<S::Error>> {
        let record = DecodedRecord::decode(record).map_err(CheckError::Wal)?;
        let kind = RecordKind {
            version: self.control.version(),
            rmgr: record.header.rmgr,
            info: record.header.info & 0xF0,
        };
        self.report.records += 1;
        self.counts(kind).records += 1;
        let mut effects = std::mem::take(&mut self.effects);
        let result = match effects.derive(&record, &mut self.control) {
            Ok(()) => self.replay(&effects, &record, kind).map_err(CheckError::Store),
            Err(error) => {
                self.unsupported(&error);
                Ok(())
            }
        };
        self.effects = effects;
        result
    }

    fn unsupported(&mut self, error: &RedoError) {
        self.report.unsupported += 1;
        if self.report.unsupported_list.len() < DESCRIBED {
            self.report.unsupported_list.push(error.to_string());
        }
    }

    fn replay(
        &mut self,
        effects: &Effects,
        record: &DecodedRecord<'_>,
        kind: RecordKind,
    ) -> Result<(), S::Error> {
        for effect in &effects.items {
            match *effect {
                Effect::Block { rel, block, value, complete, extends } => {
                    let image = record
                        .blocks
                        .iter()
                        .find(|reference| reference.rel == rel && reference.block == block);
                    let value = Value { bytes: effects.value(value), complete, extends };
                    self.replay_block(record, kind, (rel, block), value, image)?;
                }
                Effect::RelTruncate { rel, blocks } => self.store.truncate(rel, blocks)?,
                Effect::RelDrop { spc, db, rel } => self.store.drop_relation(spc, db, rel)?,
                Effect::DatabaseCreate { spc, db, copy_from } => {
                    self.store.drop_database(spc, db)?;
                    if let Some(from) = copy_from {
                        self.store.copy_database(from, (spc, db))?;
                    }
                }
                Effect::BackupEnd { .. } => self.consistent = true,
                Effect::DatabaseDrop { spc, db } => self.store.drop_database(spc, db)?,
                _ => {}
            }
        }
        self.compare_untouched(effects, record, kind)
    }

    fn replay_block(
        &mut self,
        record: &DecodedRecord<'_>,
        kind: RecordKind,
        (rel, block): (RelTag, u32),
        value: Value<'_>,
        reference: Option<&BlockRef<'_>>,
    ) -> Result<(), S::Error> {
        let mut page = [0; PAGE_SIZE];
        let loaded = self.store.load(rel, block, &mut page)?;
        if loaded == Loaded::Missing && !value.extends {
            return Ok(());
        }
        if loaded == Loaded::Unknown && !value.complete {
            return self.adopt(record, (rel, block), reference);
        }
        let already_there = loaded == Loaded::Page && page::lsn(&page) >= record.end;
        let before = page;
        match apply_block(&mut page, value.bytes, block, record.end) {
            Ok(()) => {}
            Err(_) if !self.consistent && page::is_new(&before) => {
                return self.adopt(record, (rel, block), reference);
            }
            Err(error) => {
                self.mismatch(kind, record, (rel, block), reference, error.to_string());
                return self.adopt(record, (rel, block), reference);
            }
        }
        self.store.store(rel, block, &page)?;
        // A page of a fuzzy backup may be ahead of the record; only the image of a later record is comparable.
        match reference {
            Some(reference) if !already_there => self.check(record, kind, reference, &page),
            _ => Ok(()),
        }
    }

    /// Blocks that the record only locks carry images too.
    fn compare_untouched(
        &mut self,
        effects: &Effects,
        record: &DecodedRecord<'_>,
        kind: RecordKind,
    ) -> Result<(), S::Error> {
        for reference in &record.blocks {
            let touched = effects.items.iter().any(|effect| {
                matches!(effect, Effect::Block { rel, block, .. }
                    if *rel == reference.rel && *block == reference.block)
            });
            if touched || reference.rel.fork == Fork::FreeSpace || reference.image.is_none() {
                continue;
            }
            let mut page = [0; PAGE_SIZE];
            match self.store.load(reference.rel, reference.block, &mut page)? {
                Loaded::Page => self.check(record, kind, reference, &page)?,
                _ => self.adopt(record, (reference.rel, reference.block), Some(reference))?,
            }
        }
        Ok(())
    }

    /// Goes on from the image, if there is one, because our own page is not known or wrong.
    fn adopt(
        &mut self,
        record: &DecodedRecord<'_>,
        (rel, block): (RelTag, u32),
        reference: Option<&BlockRef<'_>>,
    ) -> Result<(), S::Error> {
        self.report.without_base += 1;
        let mut page = [0; PAGE_SIZE];
        let image = reference.and_then(|reference| reference.image);
        if image.is_some_and(|image| image.restore(&mut page).is_ok()) {
            page::set_lsn(&mut page, record.end);
            self.store.store(rel, block, &page)?;
        }
        Ok(())
    }

    fn check(
        &mut self,
        record: &DecodedRecord<'_>,
        kind: RecordKind,
        reference: &BlockRef<'_>,
        page: &Page,
    ) -> Result<(), S::Error> {
        let Some(image) = reference.image.filter(|image| !image.is_applied()) else {
            return Ok(());
        };
        let at = (reference.rel, reference.block);
        let mut expected = [0; PAGE_SIZE];
        if let Err(error) = image.restore(&mut expected) {
            self.mismatch(kind, record, at, Some(reference), error.to_string());
            return Ok(());
        }
        self.report.compared += 1;
        self.counts(kind).compared += 1;
        let image_page = expected;
        let mut found = *page;
        let target = MaskTarget {
            rmgr: kind.rmgr,
            block: reference.block,
            is_visibility_map: reference.rel.fork == Fork::Visibility,
            strict: self.strict,
        };
        mask(&mut expected, target);
        mask(&mut found, target);
        let stock_bug = is_gist_delete(kind);
        if stock_bug {
            ignore_tuples_deleted(&mut expected);
            ignore_tuples_deleted(&mut found);
        }
        let Some(difference) = compare(kind.rmgr, &expected, &found) else {
            if stock_bug {
                // The primary did not set the flag, and later images are without it.
                self.go_on_from(at, image_page, record.end)?;
            }
            return Ok(());
        };
        if target.is_visibility_map && has_only_more_bits(&found, &expected) {
            // A backend clears bits before it writes the record that says so; others' records may come in between.
            self.report.visibility_pending += 1;
            return Ok(());
        }
        self.mismatch(kind, record, at, Some(reference), difference);
        self.go_on_from(at, image_page, record.end)
    }

    fn go_on_from(
        &mut self,
        (rel, block): (RelTag, u32),
        mut page: Page,
        end: Lsn,
    ) -> Result<(), S::Error> {
        page::set_lsn(&mut page, end);
        self.store.store(rel, block, &page)
    }

    fn mismatch(
        &mut self,
        kind: RecordKind,
        record: &DecodedRecord<'_>,
        (rel, block): (RelTag, u32),
        reference: Option<&BlockRef<'_>>,
        difference: String,
    ) {
        self.report.mismatches += 1;
        self.counts(kind).mismatches += 1;
        if self.report.mismatch_list.len() < DESCRIBED {
            let role = reference.map_or(u8::MAX, |reference| reference.id);
            let lsn = record.lsn;
            let mismatch = Mismatch { record: kind, lsn, rel, block, role, difference };
            self.report.mismatch_list.push(mismatch);
        }
    }
}

struct Value<'a> {
    bytes: &'a [u8],
    complete: bool,
    extends: bool,
}

fn has_only_more_bits(found: &Page, expected: &Page) -> bool {
    found.iter().zip(expected).all(|(found, expected)| expected & !found == 0)
}

/// In every version the primary leaves out a flag that redo of Gist/DELETE sets, and PostgreSQL's mask does not hide it:
/// stock recovery itself fails its own check on that record.
fn is_gist_delete(kind: RecordKind) -> bool {
    kind.rmgr == rmgr::GIST && kind.info == 0x10
}

fn ignore_tuples_deleted(page: &mut Page) {
    const TUPLES_DELETED: u8 = 4;
    page[PAGE_SIZE - 4] &= !TUPLES_DELETED;
}

/// Pages in memory, for tests and small checks. What it does not have is unknown, except after a truncation or drop.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    pages: BTreeMap<(RelTag, u32), Box<Page>>,
}

impl PageStore for MemoryStore {
    type Error = std::convert::Infallible;

    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Self::Error> {
        Ok(match self.pages.get(&(rel, block)) {
            Some(found) => {
                *page = **found;
                Loaded::Page
            }
            None => Loaded::Unknown,
        })
    }

    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Self::Error> {
        self.pages.insert((rel, block), Box::new(*page));
        Ok(())
    }

    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, block), _| *other != rel || *block < blocks);
        Ok(())
    }

    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, _), _| (other.spc, other.db, other.rel) != (spc, db, rel));
        Ok(())
    }

    fn drop_database(&mut self, spc: u32, db: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, _), _| (other.spc, other.db) != (spc, db));
        Ok(())
    }

    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> Result<(), Self::Error> {
        let copies: Vec<_> = self
            .pages
            .iter()
            .filter(|((rel, _), _)| (rel.spc, rel.db) == from)
            .map(|((rel, block), page)| {
                ((RelTag { spc: to.0, db: to.1, ..*rel }, *block), page.clone())
            })
            .collect();
        self.pages.extend(copies);
        Ok(())
    }
}
