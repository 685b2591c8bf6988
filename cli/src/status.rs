//! `status`.

use anyhow::Result;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::process::Process;
use crate::{branch, compute, http, table};

fn process_row(cluster: &Cluster, name: &str, role: &str, listen: u16, http: u16) -> Value {
    let process = Process::new(&cluster.dir, name);
    json!({
        "name": name,
        "role": role,
        "pid": process.pid(),
        "state": if process.pid().is_some() { "running" } else { "dead" },
        "listen": format!("127.0.0.1:{listen}"),
        "http": format!("127.0.0.1:{http}"),
        "log": process.log().display().to_string(),
    })
}

/// What a running safekeeper can't serve, and why.
fn damaged(port: u16) -> Option<String> {
    let status = http::try_get(&format!("127.0.0.1:{port}"), "/v1/status")?;
    let entries = status.get("damaged")?.as_array()?;
    let reasons: Vec<_> = entries.iter().filter_map(|entry| entry.get("error")?.as_str()).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// Everything that belongs to the cluster.
pub fn processes(cluster: &Cluster) -> Vec<Value> {
    let state = &cluster.state;
    let mut rows =
        vec![process_row(cluster, "storage-broker", "storage-broker", state.broker, state.broker)];
    for place in &state.safekeepers {
        let name = format!("safekeeper-{}", place.id);
        let mut row = process_row(cluster, &name, "safekeeper", place.wal, place.http);
        row["pg"] = json!(format!("127.0.0.1:{}", place.pg));
        row["zone"] = json!(place.zone);
        row["failure"] = json!(damaged(place.http));
        rows.push(row);
    }
    let (http, pages, pg) = state.pageserver;
    let mut row = process_row(cluster, "pageserver", "pageserver", pages, http);
    row["pg"] = json!(format!("127.0.0.1:{pg}"));
    row["local_dir"] = json!(cluster.dir.join("pageserver").display().to_string());
    rows.push(row);
    for (branch, place) in &state.computes {
        let name = format!("compute-{branch}");
        rows.push(process_row(cluster, &name, "compute", place.port, place.http));
    }
    rows
}

/// `status`.
pub fn status(cluster: &Cluster, as_json: bool) -> Result<()> {
    let processes = processes(cluster);
    let computes = compute::rows(cluster);
    // A cluster whose page server is down still has a status.
    let branches = branch::rows(cluster);
    if as_json {
        let document = json!({
            "dir": cluster.dir.display().to_string(),
            "object_store": cluster.state.object_store,
            "processes": processes,
            "branches": branches.unwrap_or_default(),
            "computes": computes,
        });
        println!("{document}");
        return Ok(());
    }
    table::print(&["name", "state", "pid", "listen", "http"], &processes);
    for row in &processes {
        if let (Some(name), Some(failure)) = (row["name"].as_str(), row["failure"].as_str()) {
            table::line(&format!("{name}: {failure}"));
        }
    }
    table::line("");
    match branches {
        Ok(rows) => {
            let columns =
                ["name", "ancestor", "ancestor_lsn", "last_record_lsn", "commit_lsn", "failure"];
            table::print(&columns, &rows);
        }
        Err(error) => table::line(&format!("branches: {error:#}")),
    }
    table::line("");
    table::print(&["branch", "state", "uri", "start_ms"], &computes);
    Ok(())
}
