//! The second half of a check: the pages of one partition, and the steps that change them.
//!
//! A page that was compared goes on as our redo left it; only after a mismatch (or where there was no earlier content)
//! does it go on from the image, so that one wrong byte is reported once.

use crate::apply::apply_block;
use crate::compare::{PageKind, compare_pages};
use crate::mask::{MaskTarget, mask};
use crate::page::{self, Page};
use crate::plan::{Batch, BlockStep, Step};
use crate::report::{Counts, Mismatch, Report};
use crate::store::{Loaded, PageStore};
use pgstrata_ids::{Fork, PAGE_SIZE, RelTag};
use pgstrata_pg_wal::BlockImage;
use rustc_hash::FxHashSet;

/// Replays steps, and compares pages with the images in them.
#[derive(Debug)]
pub struct Replayer<S> {
    store: S,
    strict: bool,
    consistent: bool,
    /// Visibility map pages whose bits are not in the WAL: CREATE DATABASE logs an image of them that takes their content
    /// for a hole. Replay has zeros there, as PostgreSQL's has, until an image of a heap record shows the bits.
    hollow: FxHashSet<(RelTag, u32)>,
    report: Report,
}

impl<S: PageStore> Replayer<S> {
    /// With the pages in `store`. A strict one compares visibility maps and all-visible flags too, which PostgreSQL's
    /// own comparison does not.
    pub fn new(store: S, strict: bool) -> Replayer<S> {
        Replayer {
            store,
            strict,
            consistent: true,
            hollow: FxHashSet::default(),
            report: Report::default(),
        }
    }

    /// The pages are those of a backup that was taken while the cluster ran: until the record of its end, changes of
    /// blocks that a later record drops or truncates may meet no page.
    pub fn with_fuzzy_base(mut self) -> Replayer<S> {
        self.consistent = false;
        self
    }

    /// Pages compared, and those that differ.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The store, for further use.
    pub fn into_store(self) -> S {
        self.store
    }

    /// Replays the steps of one partition.
    pub fn run(&mut self, batch: &Batch, partition: usize) -> Result<(), S::Error> {
        for step in batch.steps(partition) {
            match *step {
                Step::Block(ref step) => self.block(batch, step)?,
                Step::Truncate { rel, blocks } => self.store.truncate(rel, blocks)?,
                Step::DropRelation { spc, db, rel } => self.store.drop_relation(spc, db, rel)?,
                Step::DropDatabase { spc, db } => self.store.drop_database(spc, db)?,
                Step::CopyDatabase { from, to } => self.store.copy_database(from, to)?,
                Step::Consistent => self.consistent = true,
            }
        }
        Ok(())
    }

    fn block(&mut self, batch: &Batch, step: &BlockStep) -> Result<(), S::Error> {
        let mut page = [0; PAGE_SIZE];
        let loaded = self.store.load(step.rel, step.block, &mut page)?;
        let image = batch.image(step);
        let Some(value) = &step.value else {
            return match loaded {
                Loaded::Page => self.check(step, image, &page),
                _ => self.adopt(step, image),
            };
        };
        if loaded == Loaded::Missing && !value.extends {
            return Ok(());
        }
        if loaded == Loaded::Unknown && !value.complete {
            return self.adopt(step, image);
        }
        let already_there = loaded == Loaded::Page && page::lsn(&page) >= step.end;
        let was_new = page::is_new(&page);
        match apply_block(&mut page, batch.value(value), step.block, step.end) {
            Ok(()) => {}
            Err(_) if !self.consistent && was_new => return self.adopt(step, image),
            Err(error) => {
                self.mismatch(step, error.to_string());
                return self.adopt(step, image);
            }
        }
        self.store.store(step.rel, step.block, &page)?;
        let is_hollow = |image: BlockImage<'_>| image.is_applied() && image.hole_length > 0;
        if step.rel.fork == Fork::Visibility && image.is_some_and(is_hollow) {
            self.hollow.insert((step.rel, step.block));
        }
        // A page of a fuzzy backup may be ahead of the record; only the image of a later record is comparable.
        if already_there { Ok(()) } else { self.check(step, image, &page) }
    }

    /// Goes on from the image, if there is one, because our own page is not known or wrong.
    fn adopt(&mut self, step: &BlockStep, image: Option<BlockImage<'_>>) -> Result<(), S::Error> {
        self.report.without_base += 1;
        let mut page = [0; PAGE_SIZE];
        if image.is_some_and(|image| image.restore(&mut page).is_ok()) {
            self.go_on_from(step, page)?;
        }
        Ok(())
    }

    fn check(
        &mut self,
        step: &BlockStep,
        image: Option<BlockImage<'_>>,
        page: &Page,
    ) -> Result<(), S::Error> {
        let Some(image) = image else { return Ok(()) };
        if image.is_applied() {
            let restored = Counts { restored: 1, ..Counts::default() };
            self.report.count(step.kind, step.branch, restored);
            return Ok(());
        }
        let mut expected = [0; PAGE_SIZE];
        if let Err(error) = image.restore(&mut expected) {
            self.mismatch(step, error.to_string());
            return Ok(());
        }
        self.report.compared += 1;
        let compared = Counts { compared: 1, ..Counts::default() };
        self.report.count(step.kind, step.branch, compared);
        let image_page = expected;
        let mut found = *page;
        let is_visibility_map = step.rel.fork == Fork::Visibility;
        let target = MaskTarget {
            rmgr: step.kind.rmgr,
            block: step.block,
            is_visibility_map,
            strict: self.strict,
        };
        mask(&mut expected, target);
        mask(&mut found, target);
        let page_kind = PageKind { rmgr: step.kind.rmgr, block: step.block, is_visibility_map };
        let Some(difference) = compare_pages(page_kind, &expected, &found) else { return Ok(()) };
        if is_visibility_map && has_only_more_bits(&found, &expected) {
            // A backend clears bits before it writes the record that says so; others' records may come in between.
            self.report.visibility_pending += 1;
            return Ok(());
        }
        if self.hollow.remove(&(step.rel, step.block)) && has_only_more_bits(&expected, &found) {
            return self.adopt(step, Some(image));
        }
        self.mismatch(step, difference);
        self.go_on_from(step, image_page)
    }

    fn go_on_from(&mut self, step: &BlockStep, mut page: Page) -> Result<(), S::Error> {
        page::set_lsn(&mut page, step.end);
        self.store.store(step.rel, step.block, &page)
    }

    fn mismatch(&mut self, step: &BlockStep, difference: String) {
        self.report.mismatches += 1;
        let one = Counts { mismatches: 1, ..Counts::default() };
        self.report.count(step.kind, step.branch, one);
        let BlockStep { kind: record, lsn, rel, block, role, .. } = *step;
        self.report.describe_mismatch(Mismatch { record, lsn, rel, block, role, difference });
    }
}

/// A map page has all the bits of another one.
fn has_only_more_bits(page: &Page, other: &Page) -> bool {
    page.iter().zip(other).all(|(page, other)| other & !page == 0)
}
