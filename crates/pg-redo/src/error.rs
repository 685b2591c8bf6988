//! What redo can fail with.

use pgstrata_ids::Lsn;
use pgstrata_pg_wal::bytes::Truncated;
use pgstrata_pg_wal::{ImageError, PgVersion, record_name, rmgr_name};

/// A page or a record that contradicts what redo expects: the reason only. [`RedoError`] says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bad(pub &'static str);

impl From<Truncated> for Bad {
    fn from(_: Truncated) -> Bad {
        Bad("the record's data ends too early")
    }
}

impl From<ImageError> for Bad {
    fn from(error: ImageError) -> Bad {
        Bad(error.0)
    }
}

pub(crate) type Step<T> = Result<T, Bad>;

/// Redo that cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedoError {
    /// A record of a resource manager that is not built in. Its effects cannot be known, and skipping it would lose
    /// data silently.
    #[error(
        "record at {lsn} is of resource manager {rmgr}, which belongs to an extension and cannot be replayed"
    )]
    UnknownRmgr {
        /// Start of the record.
        lsn: Lsn,
        /// Resource manager.
        rmgr: u8,
    },
    /// A record that this version of the resource manager does not write.
    #[error("record at {lsn} is of unknown kind {info:#04x} of resource manager {rmgr_name}")]
    UnknownRecord {
        /// Start of the record.
        lsn: Lsn,
        /// Resource manager.
        rmgr_name: &'static str,
        /// Info bits.
        info: u8,
    },
    /// A record whose parts contradict each other.
    #[error("{record} at {lsn}: {reason}")]
    Record {
        /// Resource manager and record, as `Heap/INSERT`.
        record: RecordKind,
        /// Start of the record.
        lsn: Lsn,
        /// What is wrong.
        reason: &'static str,
    },
    /// A change that does not fit the page it is to be applied to.
    #[error("{record} ending at {end_lsn} does not apply to block {block}: {reason}")]
    Apply {
        /// Resource manager and record.
        record: RecordKind,
        /// End of the record.
        end_lsn: Lsn,
        /// Block number.
        block: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// A stored value that this code did not write.
    #[error("stored value ending at {end_lsn} is malformed: {reason}")]
    Value {
        /// End of the record it came from.
        end_lsn: Lsn,
        /// What is wrong.
        reason: &'static str,
    },
}

/// A kind of record, printed as `Heap/INSERT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKind {
    /// Version whose names are used.
    pub version: PgVersion,
    /// Resource manager.
    pub rmgr: u8,
    /// Info bits.
    pub info: u8,
}

impl RecordKind {
    /// Without the info bits that are not the resource manager's.
    pub fn new(version: PgVersion, rmgr: u8, info: u8) -> RecordKind {
        RecordKind { version, rmgr, info: info & 0xF0 }
    }
}

impl std::fmt::Display for RecordKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match rmgr_name(self.rmgr) {
            Some(name) => write!(f, "{name}/")?,
            None => write!(f, "custom{}/", self.rmgr)?,
        }
        match record_name(self.version, self.rmgr, self.info) {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#04x}", self.info & 0xF0),
        }
    }
}
