//! The oracle: WAL made with `wal_consistency_checking` carries, with every change of a block, the page as it is after
//! the change. The checker replays natively, and compares. This is a check by one thread; one of several makes a
//! [`Planner`] and as many [`Replayer`]s itself.

use crate::control::ControlState;
use crate::plan::{Batch, Planner};
use crate::replayer::Replayer;
use crate::report::Report;
use crate::store::PageStore;
use pgstrata_pg_wal::{Record, WalError};

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
    planner: Planner,
    batch: Batch,
    replayer: Replayer<S>,
}

impl<S: PageStore> Checker<S> {
    /// A checker that starts at the position of `control`, with the pages in `store`. A strict one compares visibility
    /// maps and all-visible flags too, which PostgreSQL's own comparison does not.
    pub fn new(store: S, control: ControlState, strict: bool) -> Checker<S> {
        let replayer = Replayer::new(store, strict);
        Checker { planner: Planner::new(control), batch: Batch::new(1), replayer }
    }

    /// What was found so far.
    pub fn report(&self) -> Report {
        let mut report = self.planner.report().clone();
        report.merge(self.replayer.report());
        report
    }

    /// The store, for further use.
    pub fn into_store(self) -> S {
        self.replayer.into_store()
    }

    /// Replays one record.
    pub fn feed(&mut self, record: Record<'_>) -> Result<(), CheckError<S::Error>> {
        self.batch.clear();
        self.planner.feed(record, &mut self.batch).map_err(CheckError::Wal)?;
        self.replayer.run(&self.batch, 0).map_err(CheckError::Store)
    }
}
