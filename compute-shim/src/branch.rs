//! What a branch is, asked of the page server by its name.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pgstrata_ids::{Lsn, SystemId, TimelineParameters};
use serde_json::Value;

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
        let row: Value = serde_json::from_slice(&body)?;
        Branch::from_row(&row)
            .with_context(|| format!("page server {pageserver} does not describe '{name}'"))
    }

    /// From the page server's row of it.
    fn from_row(row: &Value) -> Result<Branch> {
        let text = |field: &'static str| row.get(field).and_then(Value::as_str).context(field);
        let number = |field: &'static str| row.get(field).and_then(Value::as_u64).context(field);
        let ancestor = row.get("ancestor_timeline_id").and_then(Value::as_str);
        Ok(Branch {
            parameters: TimelineParameters {
                tenant: text("tenant_id")?.parse()?,
                timeline: text("timeline_id")?.parse()?,
                system_id: SystemId(number("system_id")?),
                pg_version: u32::try_from(number("pg_version")?)?,
                pg_timeline: 1,
                segment_size: u32::try_from(number("segment_size")?)?,
                start_lsn: text("start_lsn")?.parse()?,
                ancestor: ancestor.map(str::parse).transpose()?,
            },
            start_prev: text("start_prev")?.parse()?,
        })
    }
}
