//! What nodes tell the storage broker, and what it tells them: JSON over HTTP.
//!
//! `POST /v1/publish` takes a [`Publication`]; `GET /v1/nodes?tenant=..&timeline=..`, a [`Which`], answers a
//! [`Listing`]. All of it is soft state: gone when its node was silent for [`TTL_S`].

use pgstrata_ids::{Lsn, NodeId, TenantId, Term, TimelineId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{self, form};

/// A node that published nothing for this long is forgotten, in seconds.
pub const TTL_S: u64 = 10;

/// Longest listing that is read, in bytes; the broker remembers no more than what fits into it.
pub const MAX_LISTING: usize = 256 << 20;

/// Longest that one timeline can be in a listing, in bytes, with what separates it from the next.
pub const LONGEST_TIMELINE: usize = 270;

/// Longest wait for a broker that says nothing, in seconds.
pub const SILENCE_S: u64 = 3;

/// Longest wait for a whole listing, in seconds: a node that waits longer is forgotten before it
/// publishes again.
pub const LISTING_S: u64 = TTL_S - 2;

/// Nodes publish this often, in seconds; one with thousands of timelines less often, so that it is not all that it does.
pub const PUBLISH_INTERVAL_S: u64 = 1;

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Keeps WAL.
    Safekeeper,
    /// Keeps pages.
    Pageserver,
    /// One that this program does not know: a listing with a newer kind of node is read all the same.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// Where a node listens, as `address:port`; absent where it doesn't.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Addresses {
    /// WAL port of a safekeeper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal: Option<String>,
    /// PostgreSQL port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg: Option<String>,
    /// HTTP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Page service of a page server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<String>,
}

/// How far one node is with one timeline. A page server leaves 0/0 what it doesn't have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TimelineProgress {
    /// Whose timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub tenant_id: TenantId,
    /// Which timeline.
    #[serde(with = "text")]
    #[schemars(with = "form::Id")]
    pub timeline_id: TimelineId,
    /// Highest promised term.
    pub term: u64,
    /// End of the durable log; of a page server: last record ingested.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub flush_lsn: Lsn,
    /// Known to be committed.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub commit_lsn: Lsn,
    /// Whole segments before it are in object storage.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub archived_lsn: Lsn,
    /// WAL before it isn't needed by the page server any more.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub remote_consistent_lsn: Lsn,
}

impl TimelineProgress {
    /// The term, typed.
    pub fn term(&self) -> Term {
        Term(self.term)
    }
}

/// Everything that one node says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Publication {
    /// Who speaks.
    pub node: u64,
    /// What it does.
    pub role: Role,
    /// Its failure zone; empty if unknown.
    #[serde(default)]
    pub zone: String,
    /// Where it listens.
    pub addresses: Addresses,
    /// Its timelines.
    pub timelines: Vec<TimelineProgress>,
}

impl Publication {
    /// The node, typed.
    pub fn node(&self) -> NodeId {
        NodeId(self.node)
    }
}

/// Which timelines are asked for: all, those of a tenant, or one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Which {
    /// Timelines of this tenant only.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Id>")]
    pub tenant: Option<TenantId>,
    /// This timeline only.
    #[serde(default, with = "text::optional")]
    #[schemars(with = "Option<form::Id>")]
    pub timeline: Option<TimelineId>,
}

/// The broker's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Listing {
    /// All nodes that were heard of lately, with those of their timelines that were asked for.
    pub nodes: Vec<Publication>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_timeline_is_longer_than_the_longest() {
        let last = Lsn(u64::MAX);
        let longest = TimelineProgress {
            tenant_id: TenantId([0xFF; 16]),
            timeline_id: TimelineId([0xFF; 16]),
            term: u64::MAX,
            flush_lsn: last,
            commit_lsn: last,
            archived_lsn: last,
            remote_consistent_lsn: last,
        };
        assert!(serde_json::to_string(&longest).unwrap().len() < LONGEST_TIMELINE);
    }

    #[test]
    fn json_form() {
        let publication = Publication {
            node: 3,
            role: Role::Safekeeper,
            zone: "a".into(),
            addresses: Addresses { wal: Some("127.0.0.1:5".into()), ..Addresses::default() },
            timelines: vec![TimelineProgress {
                tenant_id: TenantId([0x11; 16]),
                timeline_id: TimelineId([0x22; 16]),
                term: 4,
                flush_lsn: Lsn(0x0100_0028),
                commit_lsn: Lsn(0x0100_0000),
                archived_lsn: Lsn(0),
                remote_consistent_lsn: Lsn(0),
            }],
        };
        let json = serde_json::to_string(&publication).unwrap();
        let expected = concat!(
            r#"{"node":3,"role":"safekeeper","zone":"a","addresses":{"wal":"127.0.0.1:5"},"#,
            r#""timelines":[{"tenant_id":"11111111111111111111111111111111","#,
            r#""timeline_id":"22222222222222222222222222222222","term":4,"flush_lsn":"0/1000028","#,
            r#""commit_lsn":"0/1000000","archived_lsn":"0/0","remote_consistent_lsn":"0/0"}]}"#
        );
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_str::<Publication>(&json).unwrap(), publication);
        assert!(serde_json::from_str::<Publication>(&json.replace("0/0", "x")).is_err());
    }
}
