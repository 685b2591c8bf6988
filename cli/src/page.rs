//! `page`, `layers`, `compact`.

use anyhow::Result;
use pgstrata_ids::Lsn;
use pgstrata_wire::http::pageserver::Compacted;
use serde_json::Value;

use crate::services::Services;
use crate::{branch, out, table};

/// Verbs of `page`.
#[derive(clap::Subcommand)]
pub enum PageVerb {
    /// Write one page's 8192 bytes to standard output
    Get {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
        /// TABLESPACE/DATABASE/RELATION[.fork], such as 1663/5/16384 or 1663/5/16384.vm
        #[arg(long)]
        rel: String,
        /// Block number
        #[arg(long)]
        block: u32,
        /// As of this LSN [default: now]
        #[arg(long)]
        at: Option<Lsn>,
    },
}

/// `page`.
pub fn run(services: &dyn Services, verb: &PageVerb) -> Result<()> {
    let PageVerb::Get { branch, rel, block, at } = verb;
    let (block, at) = (block.to_string(), at.map(|lsn| lsn.to_string()));
    let mut query = vec![("name", branch.as_str()), ("rel", rel), ("block", &block)];
    // What is committed now, and not what the page server has ingested so far.
    let committed = match at {
        Some(_) => None,
        None => branch::committed_now(services, branch)?.map(|lsn| lsn.to_string()),
    };
    query.extend(at.as_deref().map(|lsn| ("lsn", lsn)));
    query.extend(committed.as_deref().map(|lsn| ("at_least", lsn)));
    out::bytes(&services.pageserver()?.patient()?.get_bytes("/v1/branch/page", &query)?)
}

/// `compact`.
pub fn compact(services: &dyn Services, branch: &str) -> Result<()> {
    let pageserver = services.pageserver()?.patient()?;
    let answer: Compacted = pageserver.post("/v1/branch/compact", &[("name", branch)], &[])?;
    out::line(&format!("{} layers compacted", answer.compacted))
}

/// `layers`.
pub fn layers(services: &dyn Services, branch: &str, as_json: bool) -> Result<()> {
    let rows: Vec<Value> = services.pageserver()?.get("/v1/branch/layers", &[("name", branch)])?;
    match as_json {
        true => out::line(&Value::Array(rows).to_string()),
        false => table::print(&["kind", "level", "start_lsn", "end_lsn", "size", "name"], &rows),
    }
}
