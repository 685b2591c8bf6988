//! The page server's HTTP interface: rows of branches, what changes them, and what requests have in their queries.

use std::collections::BTreeMap;

use pgstrata_ids::{Lsn, TenantId, TimelineId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{self, form};

/// A branch, as listings show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Branch {
    /// Name.
    pub name: String,
    /// Timeline id.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// Tenant id.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Name of the branch that it came from.
    pub ancestor: Option<String>,
    /// Timeline that it came from.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Id>")]
    pub ancestor_timeline_id: Option<TimelineId>,
    /// Where it left its ancestor.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub ancestor_lsn: Option<Lsn>,
    /// First LSN of its own.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub start_lsn: Lsn,
    /// Start of the last record before `start_lsn`.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub start_prev: Lsn,
    /// End of the last record ingested.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub last_record_lsn: Lsn,
    /// Everything up to here is in object storage.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub remote_lsn: Lsn,
    /// Bytes of all relations at the last record, or a little earlier; null if they are not asked for or not known.
    pub logical_size: Option<u64>,
    /// Database system identifier.
    pub system_id: u64,
    /// PostgreSQL major version; 0 of a branch that could not be read.
    pub pg_version: u32,
    /// Bytes of a WAL segment.
    pub segment_size: u64,
    /// Creation time, RFC 3339; empty of a branch that could not be read.
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CreateBranch {
    /// Name of the new branch.
    #[schemars(with = "form::BranchName")]
    pub name: String,
    /// Branch to start from.
    pub from: String,
    /// The moment.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub lsn: Option<Lsn>,
    /// The moment, RFC 3339.
    #[serde(default)]
    #[schemars(with = "Option<form::Time>")]
    pub time: Option<String>,
    /// Wait until this LSN, known to be committed, is ingested (for "now").
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub at_least: Option<Lsn>,
    /// Take the place of the branch that has the name now.
    #[serde(default)]
    pub replace: bool,
}

/// An LSN and the time of its commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LsnAnswer {
    /// LSN.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub lsn: Lsn,
    /// Time of the last commit up to there, RFC 3339, if there is one.
    #[schemars(with = "Option<form::Time>")]
    pub time: Option<String>,
}

/// How far a branch is ingested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reached {
    /// End of the last record ingested.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub last_record_lsn: Lsn,
}

/// A branch that was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Deleted {
    /// Its name.
    pub deleted: String,
}

/// What a compaction did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Compacted {
    /// Layers that were merged.
    pub compacted: usize,
}

/// What a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Changes of a range of LSNs.
    Delta,
    /// Whole pages as of one LSN.
    Image,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

/// A layer of a branch, one object in the object store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Layer {
    /// Object name below the timeline's `layers/`.
    pub name: String,
    /// What it holds.
    pub kind: LayerKind,
    /// 0 for a layer as frozen, 1 for a compacted one.
    pub level: u8,
    /// Changes after this LSN.
    #[schemars(with = "form::Lsn")]
    pub start_lsn: String,
    /// Changes up to this LSN.
    #[schemars(with = "form::Lsn")]
    pub end_lsn: String,
    /// Least key, hexadecimal.
    pub min_key: String,
    /// Greatest key, hexadecimal.
    pub max_key: String,
    /// Bytes of the object.
    pub size: u64,
}

/// What a listing is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Listed {
    /// Whether sizes are wanted, as far as they are known.
    #[serde(default)]
    pub sizes: bool,
}

/// The branch that a request is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Named {
    /// Its name.
    pub name: String,
}

/// The same, by its timeline: two branches may have one name for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OfTimeline {
    /// Timeline id.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub id: TimelineId,
}

/// The new name of a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct To {
    /// The new name.
    #[schemars(with = "form::BranchName")]
    pub to: String,
}

/// Both names of a branch that gets another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rename {
    /// The name that it has.
    pub name: String,
    /// The new name.
    #[schemars(with = "form::BranchName")]
    pub to: String,
}

/// A moment of a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LsnAt {
    /// The branch.
    pub name: String,
    /// The moment, RFC 3339; now, if absent.
    #[schemars(with = "Option<form::Time>")]
    pub time: Option<String>,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wait {
    /// The branch.
    pub name: String,
    /// Until it is ingested up to here.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub lsn: Lsn,
    /// For so long at most; a minute, if absent or more than that.
    pub seconds: Option<u64>,
}

/// A page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PageAt {
    /// The branch.
    pub name: String,
    /// Its relation: `TABLESPACE/DATABASE/RELATION[.fork]`, such as `1663/5/16384.vm`.
    #[schemars(with = "form::Relation")]
    pub rel: String,
    /// Its number.
    pub block: u32,
    /// As of when; now, if absent.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub lsn: Option<Lsn>,
    /// Wait until this LSN, known to be committed, is ingested (for "now").
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub at_least: Option<Lsn>,
}

/// What a data directory becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Import {
    /// Whose.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant: TenantId,
    /// Timeline id of the branch.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline: TimelineId,
    /// Its name.
    #[schemars(with = "form::BranchName")]
    pub name: String,
}

/// A position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AsOf {
    /// As of when.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub lsn: Lsn,
}
