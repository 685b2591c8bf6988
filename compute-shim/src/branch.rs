//! What a branch is, asked of the page server by its name.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pgstrata_ids::{Lsn, SystemId, TimelineParameters};
use pgstrata_wire::http::pageserver::Branch as Row;

use crate::compute::error_text;

/// A page server that can't be reached is asked again for so long: it may be about to start.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a compute must know of its branch before it can ask safekeepers.
#[derive(Clone, Debug)]
pub struct Branch {
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Start of the last record before the timeline's first own LSN.
    pub start_prev: Lsn,
}

impl Branch {
    /// The branch of that name at the page server whose HTTP interface is at `pageserver`.
    pub fn find(pageserver: &str, name: &str) -> Result<Branch> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        let url = format!("http://{pageserver}/v1/branch");
        let deadline = Instant::now() + PATIENCE;
        let mut response = loop {
            match agent.get(&url).query("name", name).call() {
                Ok(response) => break response,
                Err(_) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("page server {pageserver} can't be asked"));
                }
            }
        };
        let (status, body) = (response.status(), response.body_mut().read_to_vec()?);
        if !status.is_success() {
            let text = error_text(&body);
            bail!("page server {pageserver} has no branch '{name}': {text}");
        }
        let row: Row = serde_json::from_slice(&body)
            .with_context(|| format!("page server {pageserver} does not describe '{name}'"))?;
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
