//! What a branch is, asked of the page server by its name.

use std::time::Duration;

use anyhow::{Context, Result};
use pgstrata_http_client::Access;
use pgstrata_ids::{Lsn, SystemId, TimelineParameters};
use pgstrata_wire::http::pageserver::Branch as Row;

use crate::ask::{self, Patience};
use crate::places::Places;

/// The page server may be about to start.
const PATIENCE: Patience =
    Patience { answer: Duration::from_secs(10), reach: Duration::from_secs(30) };

/// What a compute must know of its branch before it can ask safekeepers.
#[derive(Clone, Debug)]
pub struct Branch {
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Start of the last record before the timeline's first own LSN.
    pub start_prev: Lsn,
}

impl Branch {
    /// The branch of that name.
    pub fn find(places: &Places, access: &Access, name: &str) -> Result<Branch> {
        let what = format!("branch '{name}'");
        let row =
            ask::pageserver(places, access, "/v1/branch", &[("name", name)], &what, PATIENCE)?;
        let row: Row = serde_json::from_slice(&row)
            .with_context(|| format!("the page server does not describe {what}"))?;
        Branch::from_row(row)
    }

    /// From the page server's row of it.
    fn from_row(row: Row) -> Result<Branch> {
        let segment_size = u32::try_from(row.segment_size)
            .with_context(|| format!("its segments have {} bytes", row.segment_size))?;
        Ok(Branch {
            parameters: TimelineParameters {
                tenant: row.tenant_id,
                timeline: row.timeline_id,
                system_id: SystemId(row.system_id),
                pg_version: row.pg_version,
                pg_timeline: 1,
                segment_size,
                start_lsn: row.start_lsn,
                ancestor: row.ancestor_timeline_id,
            },
            start_prev: row.start_prev,
        })
    }
}
