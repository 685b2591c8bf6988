//! The page server's HTTP interface: rows of branches, and what changes them.

use std::collections::BTreeMap;

use pgstrata_ids::{Lsn, TenantId, TimelineId};
use serde::{Deserialize, Serialize};

use crate::text;

/// A branch, as listings show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Name.
    pub name: String,
    /// Timeline id.
    #[serde(with = "text")]
    pub timeline_id: TimelineId,
    /// Tenant id.
    #[serde(with = "text")]
    pub tenant_id: TenantId,
    /// Name of the branch that it came from.
    pub ancestor: Option<String>,
    /// Timeline that it came from.
    #[serde(default, with = "text::optional")]
    pub ancestor_timeline_id: Option<TimelineId>,
    /// Where it left its ancestor.
    #[serde(default, with = "text::optional")]
    pub ancestor_lsn: Option<Lsn>,
    /// First LSN of its own.
    #[serde(with = "text")]
    pub start_lsn: Lsn,
    /// Start of the last record before `start_lsn`.
    #[serde(with = "text")]
    pub start_prev: Lsn,
    /// End of the last record ingested.
    #[serde(with = "text")]
    pub last_record_lsn: Lsn,
    /// Everything up to here is in object storage.
    #[serde(with = "text")]
    pub remote_lsn: Lsn,
    /// Bytes of all relations at the last record, or a little earlier; null if they are not asked for or not known.
    pub logical_size: Option<u64>,
    /// Database system identifier.
    pub system_id: u64,
    /// PostgreSQL major version; 0 of a branch that could not be read.
    pub pg_version: u32,
    /// Bytes of a WAL segment.
    pub segment_size: u64,
    /// Creation time, RFC 3339.
    pub created: String,
    /// Why ingest stopped, or why the branch is not served, if so.
    pub failure: Option<String>,
    /// Why the last upload failed, if it did.
    #[serde(default)]
    pub upload_failure: Option<String>,
    /// Why the last compaction failed, if it did.
    #[serde(default)]
    pub compaction_failure: Option<String>,
    /// Pages that can't be made, as far as they are known.
    #[serde(default)]
    pub unreadable_pages: usize,
    /// Why one of them can't.
    #[serde(default)]
    pub unreadable_page: Option<String>,
    /// Safekeepers that sent what is no WAL, and what it was.
    #[serde(default)]
    pub bad_safekeepers: BTreeMap<String, String>,
}

impl Branch {
    /// Whether more than its ids and its failure is known.
    pub fn is_read(&self) -> bool {
        self.pg_version != 0
    }
}

/// A request for a branch, `POST /v1/branches`. At most one of `lsn` and `time`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateBranch {
    /// Name of the new branch.
    pub name: String,
    /// Branch to start from.
    pub from: String,
    /// The moment.
    #[serde(default, with = "text::optional")]
    pub lsn: Option<Lsn>,
    /// The moment, RFC 3339.
    #[serde(default)]
    pub time: Option<String>,
    /// Wait until this LSN, known to be committed, is ingested (for "now").
    #[serde(default, with = "text::optional")]
    pub at_least: Option<Lsn>,
    /// Take the place of the branch that has the name now.
    #[serde(default)]
    pub replace: bool,
}

/// An LSN and the time of its commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LsnAnswer {
    /// LSN.
    #[serde(with = "text")]
    pub lsn: Lsn,
    /// Time of the last commit up to there, RFC 3339, if there is one.
    pub time: Option<String>,
}

/// How far a branch is ingested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// End of the last record ingested.
    #[serde(with = "text")]
    pub last_record_lsn: Lsn,
}

/// A branch that was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// Its name.
    pub deleted: String,
}

/// What a compaction did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compacted {
    /// Layers that were merged.
    pub compacted: usize,
}
