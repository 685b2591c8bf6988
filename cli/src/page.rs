//! `page`, `layers`, `compact`.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use pgstrata_ids::Lsn;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::{http, table};

const PAGESERVER: &str = "the page server";

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
    let mut query =
        vec![("name", branch.clone()), ("rel", rel.clone()), ("block", block.to_string())];
    if let Some(lsn) = at {
        query.push(("lsn", lsn.to_string()));
    }
    let page = http::block_on(async {
        let client = http::client(Duration::from_secs(90))?;
        let url = format!("http://{}/v1/branch/page", cluster.pageserver_http());
        http::send_bytes(PAGESERVER, client.get(url).query(&query)).await
    })?;
    std::io::stdout().write_all(&page)?;
    Ok(())
}

/// `compact`.
pub fn compact(cluster: &Cluster, branch: &str) -> Result<()> {
    let answer: Value = http::block_on(async {
        let client = http::client(Duration::from_secs(600))?;
        let url = format!("http://{}/v1/branch/compact", cluster.pageserver_http());
        http::send(PAGESERVER, client.post(url).query(&[("name", branch)])).await
    })?;
    println!("{} layers compacted", answer.get("compacted").unwrap_or(&Value::Null));
    Ok(())
}

/// `layers`.
pub fn layers(cluster: &Cluster, branch: &str, as_json: bool) -> Result<()> {
    let address = cluster.pageserver_http();
    let rows: Vec<Value> =
        http::get(PAGESERVER, &address, "/v1/branch/layers", &[("name", branch)])?;
    match as_json {
        true => println!("{}", Value::Array(rows)),
        false => table::print(&["kind", "level", "start_lsn", "end_lsn", "size", "name"], &rows),
    }
    Ok(())
}
