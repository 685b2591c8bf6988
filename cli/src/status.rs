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

/// Troubles of one process that are shown, at most: one cause can give each timeline its own.
const SHOWN: usize = 3;

/// The first of them, in one line; `None` if there are none.
fn summary(troubles: &[String]) -> Option<String> {
    let shown = troubles[..troubles.len().min(SHOWN)].join("; ");
    match troubles.len() {
        0 => None,
        count if count > SHOWN => Some(format!("{shown}; and {} more like these", count - SHOWN)),
        _ => Some(shown),
    }
}

/// Archiving errors of a safekeeper, those of damaged WAL or the others, each with its timeline.
fn archiving_errors(said: &Value, of_damage: bool) -> Vec<String> {
    let entries = said.get("timelines").and_then(Value::as_array).into_iter().flatten();
    let chosen = entries.filter(|entry| {
        let is_damage = entry.get("committed_wal_damaged").and_then(Value::as_bool);
        is_damage.unwrap_or_default() == of_damage
    });
    chosen
        .filter_map(|entry| {
            let error = entry.get("archiving_error")?.as_str()?;
            let timeline = entry.get("timeline_id").and_then(Value::as_str).unwrap_or_default();
            Some(format!("timeline {timeline} can't be archived: {error}"))
        })
        .collect()
}

/// What a safekeeper said that it can't serve, or not all of it, and why.
fn damages(said: &Value) -> Vec<String> {
    let entries = said.get("damaged").and_then(Value::as_array).into_iter().flatten();
    let unserved = entries.filter_map(|entry| entry.get("error")?.as_str().map(str::to_owned));
    unserved.chain(archiving_errors(said, true)).collect()
}

/// What is damaged on a running safekeeper. An archive that fails is none of it.
pub fn damage(answers: &Answers, safekeeper: &str) -> Option<String> {
    summary(&damages(answers.of(safekeeper)?))
}

/// What is wrong with a running safekeeper: damage first; or that it does not answer.
fn failure(said: Option<&Value>) -> Option<String> {
    let Some(said) = said else { return Some(no_answer()) };
    let mut troubles = damages(said);
    troubles.extend(archiving_errors(said, false));
    summary(&troubles)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(timeline: &str, error: Option<&str>, is_damage: bool) -> Value {
        json!({
            "timeline_id": timeline,
            "archiving_error": error,
            "committed_wal_damaged": is_damage,
        })
    }

    fn answer(timelines: &[Value]) -> (Answers, Option<String>, Option<String>) {
        let said = json!({ "damaged": [], "timelines": timelines });
        let by_process = [("safekeeper-1".to_owned(), said)].into();
        let answers = Answers { by_process };
        let damage = damage(&answers, "safekeeper-1");
        let failure = failure(answers.of("safekeeper-1"));
        (answers, damage, failure)
    }

    #[test]
    fn h18_rot_in_a_timeline_that_is_served_is_damage() {
        let rot = entry("aa", Some("committed WAL is damaged here: at 0/8"), true);
        let (_, damage, failure) = answer(&[entry("bb", None, false), rot]);
        let damage = damage.unwrap();
        assert!(damage.contains("timeline aa") && damage.contains("at 0/8"), "{damage}");
        assert_eq!(failure.unwrap(), damage);
    }

    #[test]
    fn h18_an_archive_that_fails_is_shown_and_is_no_damage() {
        let (_, damage, failure) = answer(&[entry("aa", Some("it does not answer"), false)]);
        assert_eq!(damage, None);
        assert!(failure.unwrap().contains("timeline aa can't be archived: it does not answer"));
        let (_, damage, failure) = answer(&[entry("aa", None, false)]);
        assert_eq!((damage, failure), (None, None));
    }

    #[test]
    fn h18_what_fails_for_all_timelines_is_one_line() {
        let entries: Vec<_> =
            (0..1000).map(|n| entry(&n.to_string(), Some("no"), n == 999)).collect();
        let failure = answer(&entries).2.unwrap();
        assert!(failure.starts_with("timeline 999 "), "damage comes first: {failure}");
        assert!(failure.ends_with("and 997 more like these"), "{failure}");
    }
}
