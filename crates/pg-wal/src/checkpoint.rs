//! The `CheckPoint` struct (catalog/pg_control.h): the data of checkpoint records, and a part of `pg_control`.
//!
//! ```text
//! offset  size  field                     offset  size  field
//!      0     8  redo                          44     4  oldestXid
//!      8     4  ThisTimeLineID                48     4  oldestXidDB
//!     12     4  PrevTimeLineID                52     4  oldestMulti
//!     16     1  fullPageWrites                56     4  oldestMultiDB
//!     20     4  wal_level (17 and later)      64     8  time
//!     24     8  nextXid (with epoch)          72     4  oldestCommitTsXid
//!     32     4  nextOid                       76     4  newestCommitTsXid
//!     36     4  nextMulti                     80     4  oldestActiveXid
//!     40     4  nextMultiOffset               84     4  (padding)
//! ```

use crate::PgVersion;
use crate::bytes::{Truncated, i64_at, u8_at, u32_at, u64_at};
use pgstrata_ids::Lsn;

/// State of the cluster at a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckPoint {
    /// Where recovery from this checkpoint starts.
    pub redo: Lsn,
    /// Timeline of the checkpoint.
    pub this_tli: u32,
    /// Timeline before, if this record begins a new one; else the same.
    pub prev_tli: u32,
    /// Were full-page writes on?
    pub full_page_writes: bool,
    /// `wal_level` at the redo point. Stored since PostgreSQL 17; 0 before.
    pub wal_level: u32,
    /// Next transaction, with its epoch.
    pub next_xid: u64,
    /// Next oid.
    pub next_oid: u32,
    /// Next multixact.
    pub next_multi: u32,
    /// Next multixact member offset.
    pub next_multi_offset: u32,
    /// Oldest transaction that may still be in a tuple.
    pub oldest_xid: u32,
    /// Database with that transaction.
    pub oldest_xid_db: u32,
    /// Oldest multixact that may still be in a tuple.
    pub oldest_multi: u32,
    /// Database with that multixact.
    pub oldest_multi_db: u32,
    /// When, in seconds since 1970.
    pub time: i64,
    /// Oldest transaction with a commit timestamp, or 0.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction with a commit timestamp, or 0.
    pub newest_commit_ts_xid: u32,
    /// Oldest running transaction at an online checkpoint; 0 in a shutdown checkpoint.
    pub oldest_active_xid: u32,
}

impl CheckPoint {
    /// Bytes of the struct in every supported version.
    pub const SIZE: usize = 88;

    /// Reads the struct.
    pub fn decode(version: PgVersion, bytes: &[u8]) -> Result<CheckPoint, Truncated> {
        let bytes = bytes.get(..CheckPoint::SIZE).ok_or(Truncated)?;
        let wal_level = if version >= PgVersion::V17 { u32_at(bytes, 20)? } else { 0 };
        Ok(CheckPoint {
            redo: Lsn(u64_at(bytes, 0)?),
            this_tli: u32_at(bytes, 8)?,
            prev_tli: u32_at(bytes, 12)?,
            full_page_writes: u8_at(bytes, 16)? != 0,
            wal_level,
            next_xid: u64_at(bytes, 24)?,
            next_oid: u32_at(bytes, 32)?,
            next_multi: u32_at(bytes, 36)?,
            next_multi_offset: u32_at(bytes, 40)?,
            oldest_xid: u32_at(bytes, 44)?,
            oldest_xid_db: u32_at(bytes, 48)?,
            oldest_multi: u32_at(bytes, 52)?,
            oldest_multi_db: u32_at(bytes, 56)?,
            time: i64_at(bytes, 64)?,
            oldest_commit_ts_xid: u32_at(bytes, 72)?,
            newest_commit_ts_xid: u32_at(bytes, 76)?,
            oldest_active_xid: u32_at(bytes, 80)?,
        })
    }

    /// The struct's bytes. `wal_level` is left out before PostgreSQL 17.
    pub fn encode(&self, version: PgVersion) -> [u8; CheckPoint::SIZE] {
        let mut bytes = [0; CheckPoint::SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.redo.0.to_le_bytes());
        put(8, &self.this_tli.to_le_bytes());
        put(12, &self.prev_tli.to_le_bytes());
        put(16, &[u8::from(self.full_page_writes)]);
        if version >= PgVersion::V17 {
            put(20, &self.wal_level.to_le_bytes());
        }
        put(24, &self.next_xid.to_le_bytes());
        put(32, &self.next_oid.to_le_bytes());
        put(36, &self.next_multi.to_le_bytes());
        put(40, &self.next_multi_offset.to_le_bytes());
        put(44, &self.oldest_xid.to_le_bytes());
        put(48, &self.oldest_xid_db.to_le_bytes());
        put(52, &self.oldest_multi.to_le_bytes());
        put(56, &self.oldest_multi_db.to_le_bytes());
        put(64, &self.time.to_le_bytes());
        put(72, &self.oldest_commit_ts_xid.to_le_bytes());
        put(76, &self.newest_commit_ts_xid.to_le_bytes());
        put(80, &self.oldest_active_xid.to_le_bytes());
        bytes
    }
}
