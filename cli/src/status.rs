//! `status`.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::process::Process;
use crate::{branch, compute, http, out, table};

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

/// Longest wait for what a process says of itself. All are asked at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// Processes that are asked at once, at most.
const ASKED_AT_ONCE: usize = 64;

/// What the processes of a cluster say of themselves, all asked at the same time.
#[derive(Default)]
pub struct Answers {
    by_process: HashMap<String, Value>,
}

impl Answers {
    /// Asks those that run; of the broker and the page server it is known only whether they answer.
    pub fn ask(cluster: &Cluster) -> Answers {
        let state = &cluster.state;
        let safekeepers = state.safekeepers.iter();
        let safekeepers = safekeepers.map(|place| (format!("safekeeper-{}", place.id), place.http));
        let computes = state.computes.iter();
        let computes = computes.map(|(branch, place)| (format!("compute-{branch}"), place.http));
        let said = |(name, port)| (name, port, "/v1/status");
        let services = [("storage-broker", state.broker), ("pageserver", state.pageserver.0)];
        let services = services.map(|(name, port)| (name.to_owned(), port, "/healthz"));
        let asked: Vec<_> = safekeepers
            .chain(computes)
            .map(said)
            .chain(services)
            .filter(|(name, ..)| Process::new(&cluster.dir, name).pid().is_some())
            .collect();
        let mut answers = Answers::default();
        for some in asked.chunks(ASKED_AT_ONCE) {
            let said: Vec<_> = std::thread::scope(|scope| {
                let ask = |port: u16, path: &str| {
                    http::try_get(&format!("127.0.0.1:{port}"), path, PATIENCE)
                };
                let threads: Vec<_> = some
                    .iter()
                    .map(|(_, port, path)| scope.spawn(move || ask(*port, path)))
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap_or(None)).collect()
            });
            let named = some.iter().zip(said);
            answers
                .by_process
                .extend(named.filter_map(|((name, ..), said)| Some((name.clone(), said?))));
        }
        answers
    }

    /// What anybody said.
    pub fn all(&self) -> impl Iterator<Item = &Value> {
        self.by_process.values()
    }

    /// What a process said; `None` if it does not run, or did not answer in time.
    pub fn of(&self, process: &str) -> Option<&Value> {
        self.by_process.get(process)
    }
}

/// What a running safekeeper can't serve, and why; or that it does not answer.
fn failure(said: Option<&Value>) -> Option<String> {
    let Some(said) = said else { return Some(no_answer()) };
    let entries = said.get("damaged")?.as_array()?;
    let reasons: Vec<_> = entries.iter().filter_map(|entry| entry.get("error")?.as_str()).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// For a process that runs.
pub fn no_answer() -> String {
    format!("it does not answer within {} s", PATIENCE.as_secs())
}

/// Everything that belongs to the cluster.
pub fn processes(cluster: &Cluster, answers: &Answers) -> Vec<Value> {
    let state = &cluster.state;
    // Of one that runs.
    let silence = |row: &Value, name: &str| {
        (row["pid"].is_u64() && answers.of(name).is_none()).then(no_answer)
    };
    let mut row =
        process_row(cluster, "storage-broker", "storage-broker", state.broker, state.broker);
    row["failure"] = json!(silence(&row, "storage-broker"));
    let mut rows = vec![row];
    for place in &state.safekeepers {
        let name = format!("safekeeper-{}", place.id);
        let mut row = process_row(cluster, &name, "safekeeper", place.wal, place.http);
        row["pg"] = json!(format!("127.0.0.1:{}", place.pg));
        row["zone"] = json!(place.zone);
        if row["pid"].is_u64() {
            row["failure"] = json!(failure(answers.of(&name)));
        }
        rows.push(row);
    }
    let (http, pages, pg) = state.pageserver;
    let mut row = process_row(cluster, "pageserver", "pageserver", pages, http);
    row["pg"] = json!(format!("127.0.0.1:{pg}"));
    row["failure"] = json!(silence(&row, "pageserver"));
    row["local_dir"] = json!(cluster.dir.join("pageserver").display().to_string());
    rows.push(row);
    for (branch, place) in &state.computes {
        let name = format!("compute-{branch}");
        let mut row = process_row(cluster, &name, "compute", place.port, place.http);
        row["failure"] = json!(silence(&row, &name));
        rows.push(row);
    }
    rows
}

/// `status`.
pub fn status(cluster: &Cluster, as_json: bool) -> Result<()> {
    // The page server is asked while the others are, with the same deadline.
    let (answers, branches) = std::thread::scope(|scope| {
        let rows = scope.spawn(|| branch::rows_of_pageserver(cluster, Some(PATIENCE)));
        let answers = Answers::ask(cluster);
        (answers, rows.join().unwrap_or_else(|_| anyhow::bail!("asking for branches panicked")))
    });
    let processes = processes(cluster, &answers);
    let computes = compute::rows(cluster, &answers);
    // A cluster whose page server is down still has a status.
    let branches = branches.map(|rows| branch::listed_all(&rows, &answers));
    if as_json {
        let document = json!({
            "dir": cluster.dir.display().to_string(),
            "object_store": cluster.object_store(),
            "processes": processes,
            "branches": branches.as_deref().unwrap_or_default(),
            "branches_failure": branches.as_ref().err().map(|error| format!("{error:#}")),
            "computes": computes,
        });
        return out::line(&document.to_string());
    }
    table::print(&["name", "state", "pid", "listen", "http"], &processes)?;
    for row in &processes {
        if let (Some(name), Some(failure)) = (row["name"].as_str(), row["failure"].as_str()) {
            out::line(&format!("{name}: {failure}"))?;
        }
    }
    out::line("")?;
    match branches {
        Ok(rows) => {
            let columns =
                ["name", "ancestor", "ancestor_lsn", "last_record_lsn", "commit_lsn", "failure"];
            table::print(&columns, &rows)?;
            for row in &rows {
                for trouble in branch::troubles(row) {
                    out::line(&format!("{}: {trouble}", row["name"].as_str().unwrap_or_default()))?;
                }
            }
        }
        Err(error) => out::line(&format!("branches: {error:#}"))?,
    }
    out::line("")?;
    table::print(&["branch", "state", "uri", "start_ms"], &computes)?;
    for row in &computes {
        let Some(branch) = row["branch"].as_str() else { continue };
        if let Some(failure) = row["failure"].as_str() {
            out::line(&format!("{branch}: {failure}"))?;
        }
        for warning in row["warnings"].as_array().into_iter().flatten() {
            out::line(&format!("{branch}: {}", warning.as_str().unwrap_or_default()))?;
        }
    }
    Ok(())
}
