//! `page`, `layers`, `compact`.

use anyhow::Result;
use pgstrata_ids::Lsn;
use pgstrata_wire::http::pageserver::Compacted;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::http::Service;
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
pub fn run(cluster: &Cluster, verb: &PageVerb) -> Result<()> {
    let PageVerb::Get { branch, rel, block, at } = verb;
    let (block, at) = (block.to_string(), at.map(|lsn| lsn.to_string()));
    let mut query = vec![("name", branch.as_str()), ("rel", rel), ("block", &block)];
    // What is committed now, and not what the page server has ingested so far.
    let committed = match at {
        Some(_) => None,
        None => branch::committed_now(cluster, branch)?.map(|lsn| lsn.to_string()),
    };
    query.extend(at.as_deref().map(|lsn| ("lsn", lsn)));
    query.extend(committed.as_deref().map(|lsn| ("at_least", lsn)));
    let address = cluster.pageserver_http()?;
    out::bytes(&Service::patient_pageserver(&address)?.get_bytes("/v1/branch/page", &query)?)
}

/// `compact`.
pub fn compact(cluster: &Cluster, branch: &str) -> Result<()> {
    let address = cluster.pageserver_http()?;
    let answer: Compacted = Service::patient_pageserver(&address)?.post(
        "/v1/branch/compact",
        &[("name", branch)],
        &[],
    )?;
    out::line(&format!("{} layers compacted", answer.compacted))
}

/// `layers`.
pub fn layers(cluster: &Cluster, branch: &str, as_json: bool) -> Result<()> {
    let address = cluster.pageserver_http()?;
    let rows: Vec<Value> =
        Service::pageserver(&address).get("/v1/branch/layers", &[("name", branch)])?;
    match as_json {
        true => out::line(&Value::Array(rows).to_string()),
        false => table::print(&["kind", "level", "start_lsn", "end_lsn", "size", "name"], &rows),
    }
}
