//! From one record to everything that it implies, page by page and outside of pages.
//!
//! Deliberately not derived: the free space map. Its pages depend on other pages' contents (rule R7 of `docs/redo.md`),
//! and PostgreSQL takes a missing map for "no free space known" and repairs it; so images of FSM pages and the
//! fork itself are dropped here. Of no effect on pages, and ignored: Standby, LogicalMessage, and what serves logical
//! decoding only.

mod blocks;
mod outside;
mod slru;

use crate::control::{Changed, ControlState};
use crate::error::{Bad, RecordKind, RedoError, Step};
use pgstrata_ids::{Lsn, RelTag, SlruKind};
use pgstrata_pg_wal::{DecodedRecord, record_name, rmgr, rmgr_name};

/// Where a value lies in [`Effects::buf`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueRange {
    /// First byte.
    pub start: u32,
    /// Behind the last byte.
    pub end: u32,
}

/// One thing that a record implies. Values are keyed by the record's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A block changes. There is at most one value per block and record.
    Block {
        /// Relation and fork.
        rel: RelTag,
        /// Block number.
        block: u32,
        /// For [`crate::apply_block`].
        value: ValueRange,
        /// The value needs no older content.
        complete: bool,
        /// The fork grows to hold the block. If not, a block past the end is left alone.
        extends: bool,
    },
    /// A fork exists from here on, empty if it did not exist.
    RelCreate {
        /// Relation and fork.
        rel: RelTag,
    },
    /// A fork is cut; never grows. The main fork is created if it is missing.
    RelTruncate {
        /// Relation and fork.
        rel: RelTag,
        /// Blocks that stay.
        blocks: u32,
    },
    /// All forks of a relation go away.
    RelDrop {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
        /// Relation file number.
        rel: u32,
    },
    /// A database appears in a tablespace; anything that was there before is gone.
    DatabaseCreate {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
        /// Tablespace and database whose files as of this record are copied; else it is empty.
        copy_from: Option<(u32, u32)>,
    },
    /// A database's files in one tablespace go away (which need not be the whole database).
    DatabaseDrop {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
    },
    /// A tablespace appears.
    TablespaceCreate {
        /// Oid.
        oid: u32,
        /// Its location, without a terminating zero; empty if in place.
        path: ValueRange,
    },
    /// A tablespace goes away.
    TablespaceDrop {
        /// Oid.
        oid: u32,
    },
    /// A relation map is replaced.
    RelMap {
        /// Tablespace (1664 for the shared one).
        spc: u32,
        /// Database (0 for the shared one).
        db: u32,
        /// The whole file, with its checksum.
        file: ValueRange,
    },
    /// An SLRU page changes. The page exists from here on. At most one value per page and record.
    SlruPage {
        /// Which SLRU.
        kind: SlruKind,
        /// Page number.
        page: u64,
        /// For [`crate::apply_slru`].
        value: ValueRange,
        /// The value needs no older content.
        complete: bool,
    },
    /// Segments before the one that holds `cutoff_page` go away, as [`crate::is_truncated`] says.
    SlruTruncate {
        /// Which SLRU.
        kind: SlruKind,
        /// First page that is needed.
        cutoff_page: u64,
    },
    /// Whole segments go away, from that of `first_page` up to but without that of `end_page`, wrapping around.
    SlruRemove {
        /// Which SLRU.
        kind: SlruKind,
        /// A page in the first segment that goes.
        first_page: u64,
        /// A page in the first segment that stays.
        end_page: u64,
        /// The last page number before the SLRU wraps to page 0.
        max_page: u64,
    },
    /// All pages go away.
    SlruClear {
        /// Which SLRU.
        kind: SlruKind,
    },
    /// A transaction is prepared.
    TwoPhasePut {
        /// Transaction with epoch.
        full_xid: u64,
        /// The state file, with its checksum.
        file: ValueRange,
    },
    /// A prepared transaction ends.
    TwoPhaseRemove {
        /// Transaction with epoch.
        full_xid: u64,
    },
    /// A replication origin's progress.
    OriginProgress {
        /// Origin.
        node: u16,
        /// Position at the origin.
        remote_lsn: Lsn,
        /// Position here: the record's end.
        local_lsn: Lsn,
        /// May go backwards.
        force: bool,
    },
    /// A replication origin goes away.
    OriginDrop {
        /// Origin.
        node: u16,
    },
    /// A transaction committed.
    Commit {
        /// Transaction.
        xid: u32,
        /// Microseconds since 2000-01-01, UTC.
        time: i64,
    },
    /// A named restore point.
    RestorePoint {
        /// Microseconds since 2000-01-01, UTC.
        time: i64,
        /// Its name.
        name: ValueRange,
    },
    /// A base backup that started there is complete: its pages are consistent from here on.
    BackupEnd {
        /// Where the backup started.
        start: Lsn,
    },
    /// The control state changed.
    Control(Changed),
}

/// A record's effects. Reuse one of these: it is cleared, not freed, for each record.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// Values that items refer to.
    pub buf: Vec<u8>,
    /// What the record implies, in order.
    pub items: Vec<Effect>,
}

/// The buffer is given back above this capacity, in bytes: one huge commit must not hold memory for ever.
const KEEP_CAPACITY: usize = 1024 * 1024;

impl Effects {
    /// No effects.
    pub fn new() -> Effects {
        Effects::default()
    }

    /// The bytes of a value.
    pub fn value(&self, range: ValueRange) -> &[u8] {
        self.buf.get(range.start as usize..range.end as usize).unwrap_or(&[])
    }

    /// Replaces the content by the effects of `record`, and lets `control` follow it.
    pub fn derive(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &mut ControlState,
    ) -> Result<(), RedoError> {
        self.clear_values();
        self.derive_next(record, control)
    }

    /// Drops the values of all records so far.
    pub fn clear_values(&mut self) {
        self.buf.clear();
        if self.buf.capacity() > KEEP_CAPACITY {
            self.buf = Vec::new();
        }
    }

    /// As [`Effects::derive`], but keeps earlier records' values where they are: only the items are replaced. Refused
    /// once there is more than a `u32` can address.
    pub fn derive_next(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &mut ControlState,
    ) -> Result<(), RedoError> {
        self.items.clear();
        let version = control.version();
        let (rmgr, info) = (record.header.rmgr, record.header.info);
        let Some(rmgr_name) = rmgr_name(rmgr) else {
            return Err(RedoError::UnknownRmgr { lsn: record.lsn, rmgr });
        };
        if record_name(version, rmgr, info).is_none() {
            return Err(RedoError::UnknownRecord { lsn: record.lsn, rmgr_name, info });
        }
        let commit_ts_was_active = control.control.track_commit_timestamp;
        let mut changed = control.observe(record)?;
        self.derive_record(record, control, commit_ts_was_active, &mut changed).map_err(|bad| {
            RedoError::Record {
                record: RecordKind { version, rmgr, info },
                lsn: record.lsn,
                reason: bad.0,
            }
        })?;
        if changed != Changed::Nothing {
            self.items.push(Effect::Control(changed));
        }
        Ok(())
    }

    fn derive_record(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &mut ControlState,
        commit_ts_was_active: bool,
        changed: &mut Changed,
    ) -> Step<()> {
        if u32::try_from(self.buf.len() + record.header.total_length as usize * 2).is_err() {
            return Err(Bad("the record is too long"));
        }
        match record.header.rmgr {
            rmgr::XLOG => self.xlog(record, control, commit_ts_was_active)?,
            rmgr::TRANSACTION => self.transaction(record, control)?,
            rmgr::STORAGE => self.storage(record)?,
            rmgr::CLOG => self.clog(record, control.version())?,
            rmgr::DATABASE => self.database(record)?,
            rmgr::TABLESPACE => self.tablespace(record)?,
            rmgr::MULTIXACT => {
                self.multixact(record, control)?;
                *changed = (*changed).max(Changed::Counters);
            }
            rmgr::RELMAP => self.relmap(record, control.version())?,
            rmgr::COMMIT_TS => self.commit_ts(record, control.version())?,
            rmgr::REPLICATION_ORIGIN => self.origin(record)?,
            _ => {}
        }
        self.blocks(record, control)
    }

    /// The range from `start` to the buffer's end.
    fn since(&self, start: usize) -> ValueRange {
        ValueRange { start: start as u32, end: self.buf.len() as u32 }
    }
}
