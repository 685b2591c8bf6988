//! A compute's HTTP interface: `GET /v1/status` answers a [`Report`].

use std::fmt;

use pgstrata_ids::Lsn;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{self, form};

/// What a compute does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being elected, or PostgreSQL is about to start.
    #[default]
    Starting,
    /// It accepts connections.
    Running,
    /// It was told to end.
    Stopping,
    /// A newer compute was elected; this one ends.
    Fenced,
    /// It ran, and something failed.
    Restarting,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for State {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Fenced => "fenced",
            State::Restarting => "restarting",
            State::Unknown => "unknown",
        })
    }
}

/// What a compute says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// What it does.
    pub state: State,
    /// The branch's name.
    pub branch: String,
    /// Timeline id.
    #[schemars(with = "form::Id")]
    pub timeline_id: String,
    /// Where to connect.
    pub uri: String,
    /// Data directory.
    pub data_dir: String,
    /// Process id of the shim.
    pub pid: u32,
    /// Process id of the postmaster.
    pub postgres_pid: Option<u32>,
    /// Term of the proposer.
    pub term: u64,
    /// LSN of the clean start: pages are fetched as of here. 0/0 until it is known.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub start_lsn: Lsn,
    /// Everything up to here is on a quorum. 0/0 until it is known.
    #[serde(with = "text")]
    #[schemars(with = "form::Lsn")]
    pub commit_lsn: Lsn,
    /// From the start of the shim until PostgreSQL accepted connections, in milliseconds.
    pub start_ms: u64,
    /// Steps of the start, in milliseconds since it began.
    pub steps: Vec<(String, u64)>,
    /// Whether it only answers queries.
    pub read_only: bool,
    /// Settings that are not followed, and why; a line each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Why it does not run, or can't commit, if so.
    #[serde(default)]
    pub failure: Option<String>,
}
