//! A safekeeper's HTTP interface: `GET /v1/status` answers a [`Status`].

use pgstrata_ids::{Lsn, NodeId, TenantId, TimelineId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{self, form};

/// What a safekeeper says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Node id.
    pub id: u64,
    /// Which life of its directory this is.
    #[schemars(with = "form::Id")]
    pub incarnation: String,
    /// Failure zone; empty if it has none.
    pub zone: String,
    /// Bytes that are free on the disk of its directory; null where that can't be told.
    #[serde(default)]
    pub free_bytes: Option<u64>,
    /// What that means for WAL; null of programs that don't say.
    #[serde(default)]
    pub disk_state: Option<DiskState>,
    /// What is to be said of it, for people; null while there is enough space.
    #[serde(default)]
    pub disk_warning: Option<String>,
    /// Why it has not registered in object storage yet, before which it is made a member of nothing. It goes on trying. Null once
    /// it has.
    #[serde(default)]
    pub registration_error: Option<String>,
    /// Timelines that it serves.
    pub timelines: Vec<Timeline>,
    /// Timelines that it can't serve.
    #[serde(default)]
    pub damaged: Vec<Damaged>,
}

/// What the space that is left on a safekeeper's disk means for WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// There is enough.
    Fine,
    /// There is little, and it is said.
    Warns,
    /// Appends are taken more slowly.
    Slows,
    /// New WAL is refused. It still votes, and others commit.
    Refuses,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

/// How far a safekeeper is with a timeline that it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Timeline {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// The one that it came from.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Id>")]
    pub ancestor_id: Option<TimelineId>,
    /// Database system identifier, as text: JSON's numbers lose some of its digits in some programs.
    pub system_id: String,
    /// PostgreSQL major version.
    pub pg_version: u32,
    /// Bytes of a WAL segment.
    pub segment_size: u32,
    /// First LSN of its own.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub start_lsn: Lsn,
    /// Highest promised term.
    pub term: u64,
    /// End of the durable log.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub flush_lsn: Lsn,
    /// Known to be committed.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub commit_lsn: Lsn,
    /// First LSN whose WAL is on this disk.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub available_lsn: Lsn,
    /// Whole segments before it are in object storage.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub archived_lsn: Lsn,
    /// The page server needs no WAL before it.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub remote_consistent_lsn: Lsn,
    /// Whether none of its WAL is on this disk: all of it is in object storage, and is fetched when it is needed.
    #[serde(default)]
    pub away: bool,
    /// Why the last attempt to archive WAL failed, if it did.
    #[serde(default)]
    pub archiving_error: Option<String>,
    /// Whether that was no fault of the archive, but of the WAL on this disk.
    #[serde(default)]
    pub committed_wal_damaged: bool,
    /// The zone that has a majority of the timeline's members, if one has; null where that is not known.
    #[serde(default)]
    pub majority_in_one_zone: Option<String>,
    /// Whether a compute is connected that proposes WAL.
    #[serde(default)]
    pub proposer_connected: bool,
    /// Who keeps its WAL, as far as this safekeeper has heard; null before that was written down.
    #[serde(default)]
    pub quorum: Option<Quorum>,
}

/// Who keeps a timeline's WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Quorum {
    /// Number of the configuration: a higher one replaces a lower one.
    pub number: u64,
    /// Its members; while they are being changed, those before the change.
    pub members: Vec<Member>,
    /// While they are being changed: those after it.
    #[serde(default)]
    pub incoming: Vec<Member>,
}

impl Quorum {
    /// As those count who are asked for votes; `None` if it is none that could be.
    pub fn configuration(&self) -> Option<pgstrata_quorum::Configuration> {
        let member = |one: &Member| {
            let incarnation = one.incarnation.parse().ok()?;
            Some(pgstrata_ids::Member { node: NodeId(one.id), incarnation })
        };
        let group = |group: &[Member]| group.iter().map(member).collect::<Option<Vec<_>>>();
        let (members, incoming) = (group(&self.members)?, group(&self.incoming)?);
        pgstrata_quorum::Configuration::joint(self.number, members, incoming).ok()
    }
}

/// Which members a timeline is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeMembers {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// Node ids of all members after the change, with commas between them. One whose directory was replaced is named like
    /// any other.
    pub nodes: String,
    /// Even if a majority of them is in one zone.
    #[serde(default)]
    pub force: bool,
    /// Number of the configuration from which the change was thought out. What others began after it is not undone or
    /// changed back, but refused. 0 (as when it is left out): from whichever there is.
    #[serde(default)]
    pub after: u64,
}

/// Has who is left of a timeline's members go on alone, and gives up what only the others had.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Recover {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// Node ids of all members that answer, with commas between them: fewer than a majority. Empty if none does.
    pub survivors: String,
    /// Number of the configuration that they are members of. 0 if none of them is left to say it.
    pub after: u64,
    /// Where no member answers: node ids of those who may become members, the most wanted first. As many are made members as
    /// there were, and go on with what is in object storage.
    #[serde(default)]
    pub newcomers: String,
}

/// What there is of a timeline in object storage, and what the safekeeper that is asked has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Archived {
    /// End of the last record that is whole in object storage; null if nothing is there.
    #[serde(with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub archived_lsn: Option<Lsn>,
    /// What this safekeeper knows to be committed; null if it has nothing of the timeline.
    #[serde(with = "text::optional")]
    #[schemars(with = "Option<form::Lsn>")]
    pub commit_lsn: Option<Lsn>,
    /// Who the members are, as it is decided, whether or not any of them answers; null of programs that don't say.
    #[serde(default)]
    pub quorum: Option<Quorum>,
}

/// Which timeline.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct OfTimeline {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
}

/// How far a change of members is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Newcomers get what is committed.
    CatchingUp,
    /// Both groups have to commit something together.
    Joint,
    /// These are the members, and no others.
    Done,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

/// How far a change of members is. Ask again until it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Change {
    /// The step that is under way.
    pub step: Step,
    /// What is decided.
    pub quorum: Option<Quorum>,
    /// WAL that the members lack who have least of it, in bytes.
    pub behind_bytes: u64,
    /// What is waited for, for people; empty if nothing.
    #[serde(default)]
    pub waits_for: String,
}

/// A safekeeper in one life of its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Member {
    /// Node id.
    pub id: u64,
    /// Which life of its directory.
    #[schemars(with = "form::Id")]
    pub incarnation: String,
}

/// A timeline that a safekeeper can't serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Damaged {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// Why.
    pub error: String,
    /// True while others are asked for what is damaged: it may be served again by and by.
    #[serde(default)]
    pub mending: bool,
    /// True where the branch went on without this copy, which is kept for what others lack: nothing of it is served again.
    #[serde(default)]
    pub kept: bool,
}
