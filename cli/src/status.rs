//! `status`.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use pgstrata_ids::NodeId;
use pgstrata_wire::http::compute::Report;
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::members::short::{self, Safekeepers};
use crate::process::Process;
use crate::{branch, compute, http, out, table, zones};

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
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Processes that are asked at once, at most.
const ASKED_AT_ONCE: usize = 64;

/// What a process said.
enum Said {
    Safekeeper(safekeeper::Status),
    Compute(Box<Report>),
    /// No more than that it is well.
    Well,
}

/// How a process is asked.
#[derive(Clone, Copy)]
enum Kind {
    Safekeeper,
    Compute,
    Service,
}

impl Kind {
    fn ask(self, port: u16) -> Option<Said> {
        let address = format!("127.0.0.1:{port}");
        match self {
            Kind::Safekeeper => http::try_get(&address, STATUS, PATIENCE).map(Said::Safekeeper),
            Kind::Compute => http::try_get(&address, STATUS, PATIENCE).map(Said::Compute),
            Kind::Service => http::is_well(&address, PATIENCE).then_some(Said::Well),
        }
    }
}

/// Where safekeepers and computes tell of themselves.
pub const STATUS: &str = "/v1/status";

/// What the processes of a cluster say of themselves, all asked at the same time.
#[derive(Default)]
pub struct Answers {
    by_process: HashMap<String, Said>,
}

impl Answers {
    /// Asks those that run; of the broker and the page server it is known only whether they answer.
    pub fn ask(cluster: &Cluster) -> Answers {
        let state = &cluster.state;
        let safekeepers = state.safekeepers.iter();
        let safekeepers = safekeepers
            .map(|place| (format!("safekeeper-{}", place.id), place.http, Kind::Safekeeper));
        let computes = state.computes.iter();
        let computes = computes
            .map(|(branch, place)| (format!("compute-{branch}"), place.http, Kind::Compute));
        let services = [("storage-broker", state.broker), ("pageserver", state.pageserver.0)];
        let services = services.map(|(name, port)| (name.to_owned(), port, Kind::Service));
        let asked: Vec<_> = safekeepers
            .chain(computes)
            .chain(services)
            .filter(|(name, ..)| Process::new(&cluster.dir, name).pid().is_some())
            .collect();
        let mut answers = Answers::default();
        for some in asked.chunks(ASKED_AT_ONCE) {
            let said: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = some
                    .iter()
                    .map(|&(_, port, kind)| scope.spawn(move || kind.ask(port)))
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

    /// What safekeepers elsewhere said.
    pub fn of_safekeepers(said: impl Iterator<Item = (NodeId, safekeeper::Status)>) -> Answers {
        let named = |(node, said)| (format!("safekeeper-{node}"), Said::Safekeeper(said));
        Answers { by_process: said.map(named).collect() }
    }

    /// Whether a process answered, by its name.
    pub fn answered(&self, process: &str) -> bool {
        self.by_process.contains_key(process)
    }

    /// What safekeepers said.
    pub fn safekeepers(&self) -> impl Iterator<Item = &safekeeper::Status> {
        self.by_process.values().filter_map(|said| match said {
            Said::Safekeeper(status) => Some(status),
            _ => None,
        })
    }

    /// What a safekeeper said, by its process's name; `None` if it does not run, or did not answer in time.
    fn safekeeper(&self, process: &str) -> Option<&safekeeper::Status> {
        match self.by_process.get(process)? {
            Said::Safekeeper(status) => Some(status),
            _ => None,
        }
    }

    /// The same of a branch's compute.
    pub fn compute(&self, branch: &str) -> Option<&Report> {
        match self.by_process.get(&format!("compute-{branch}"))? {
            Said::Compute(report) => Some(report),
            _ => None,
        }
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
fn archiving_errors(said: &safekeeper::Status, of_damage: bool) -> Vec<String> {
    let chosen = said.timelines.iter().filter(|entry| entry.committed_wal_damaged == of_damage);
    let described = chosen.filter_map(|entry| {
        let error = entry.archiving_error.as_ref()?;
        Some(format!("timeline {} can't be archived: {error}", entry.timeline_id))
    });
    described.collect()
}

/// What a safekeeper said that it can't serve, or not all of it, and why.
fn damages(said: &safekeeper::Status) -> Vec<String> {
    let unserved = said.damaged.iter().map(|damaged| damaged.error.clone());
    unserved.chain(archiving_errors(said, true)).collect()
}

/// What is damaged on a running safekeeper. An archive that fails is none of it, nor is a copy that its branch went on without:
/// that one is not missed.
pub fn damage(answers: &Answers, safekeeper: &str) -> Option<String> {
    let said = answers.safekeeper(safekeeper)?;
    let unserved = said.damaged.iter().filter(|damaged| !damaged.kept);
    let unserved = unserved.map(|damaged| damaged.error.clone());
    summary(&unserved.chain(archiving_errors(said, true)).collect::<Vec<_>>())
}

/// What is wrong with a running safekeeper: damage first; or that it does not answer.
fn failure(said: Option<&safekeeper::Status>) -> Option<String> {
    said.map_or_else(|| Some(no_answer()), trouble)
}

/// What is wrong with a safekeeper that answers.
pub fn trouble(said: &safekeeper::Status) -> Option<String> {
    let mut troubles = damages(said);
    troubles.extend(said.disk_warning.clone().filter(|_| refuses(said)));
    troubles.extend(archiving_errors(said, false));
    summary(&troubles)
}

/// Whether a safekeeper takes no WAL for lack of space.
fn refuses(said: &safekeeper::Status) -> bool {
    said.disk_state == Some(safekeeper::DiskState::Refuses)
}

/// What safekeepers warn of while they work: disks that run out of space. One that takes no WAL any more fails.
pub fn warnings(answers: &Answers) -> Vec<String> {
    let warns = |said: &safekeeper::Status| {
        let warning = said.disk_warning.as_ref().filter(|_| !refuses(said))?;
        Some((said.id, format!("safekeeper-{}: {warning}", said.id)))
    };
    let mut warnings: Vec<_> = answers.safekeepers().filter_map(warns).collect();
    warnings.sort_unstable();
    warnings.into_iter().map(|(_, warning)| warning).collect()
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
        (row["pid"].is_u64() && !answers.by_process.contains_key(name)).then(no_answer)
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
            row["failure"] = json!(failure(answers.safekeeper(&name)));
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

/// Branches, or why they are not known.
pub fn print_branches(branches: &Result<Vec<Branch>>, answers: &Answers) -> Result<()> {
    let rows = match branches {
        Ok(rows) => rows,
        Err(error) => return out::line(&format!("branches: {error:#}")),
    };
    let columns = ["name", "ancestor", "ancestor_lsn", "last_record_lsn", "commit_lsn", "failure"];
    table::print(&columns, &branch::listed_all(rows, answers))?;
    for row in rows {
        for trouble in branch::troubles(row) {
            out::line(&format!("{}: {trouble}", row.name))?;
        }
    }
    Ok(())
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
    let safekeepers = &cluster.state.safekeepers;
    let mut warnings =
        Vec::from_iter(zones::warning(safekeepers).into_iter().chain(warnings(&answers)));
    if let Ok(rows) = &branches {
        let all = Safekeepers::here(cluster, answers.safekeepers(), &short::lost_here(cluster));
        warnings.extend(short::warnings(rows, answers.safekeepers(), &all));
    }
    // A cluster whose page server is down still has a status.
    if as_json {
        let listed = |rows: &Vec<Branch>| branch::listed_all(rows, &answers);
        let document = json!({
            "dir": cluster.dir.display().to_string(),
            "object_store": cluster.object_store(),
            "processes": processes,
            "warnings": warnings,
            "branches": branches.as_ref().map(listed).unwrap_or_default(),
            "branches_failure": branches.as_ref().err().map(|error| format!("{error:#}")),
            "computes": computes,
        });
        return out::line(&document.to_string());
    }
    let mut columns = vec!["name", "state", "pid", "listen", "http"];
    if safekeepers.iter().any(|place| !place.zone.is_empty()) {
        columns.push("zone");
    }
    table::print(&columns, &processes)?;
    for row in &processes {
        if let (Some(name), Some(failure)) = (row["name"].as_str(), row["failure"].as_str()) {
            out::line(&format!("{name}: {failure}"))?;
        }
    }
    for warning in warnings {
        out::line(&format!("warning: {warning}"))?;
    }
    out::line("")?;
    print_branches(&branches, &answers)?;
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
    use pgstrata_ids::{Lsn, TenantId, TimelineId};

    use super::*;

    fn entry(timeline: u16, error: Option<&str>, is_damage: bool) -> safekeeper::Timeline {
        let mut id = [0; 16];
        id[14..].copy_from_slice(&timeline.to_be_bytes());
        safekeeper::Timeline {
            tenant_id: TenantId([1; 16]),
            timeline_id: TimelineId(id),
            ancestor_id: None,
            system_id: "1".to_owned(),
            pg_version: 15,
            segment_size: 1 << 24,
            start_lsn: Lsn(8),
            term: 1,
            flush_lsn: Lsn(8),
            commit_lsn: Lsn(8),
            available_lsn: Lsn(8),
            archived_lsn: Lsn(8),
            remote_consistent_lsn: Lsn(8),
            away: false,
            archiving_error: error.map(str::to_owned),
            committed_wal_damaged: is_damage,
            majority_in_one_zone: None,
            proposer_connected: false,
            quorum: None,
        }
    }

    fn answer(timelines: &[safekeeper::Timeline]) -> (Option<String>, Option<String>) {
        let said = safekeeper::Status { timelines: timelines.to_vec(), ..Default::default() };
        let by_process = [("safekeeper-1".to_owned(), Said::Safekeeper(said))].into();
        let answers = Answers { by_process };
        let damage = damage(&answers, "safekeeper-1");
        (damage, failure(answers.safekeeper("safekeeper-1")))
    }

    #[test]
    fn h18_rot_in_a_timeline_that_is_served_is_damage() {
        let rot = entry(0xaa, Some("committed WAL is damaged here: at 0/8"), true);
        let (damage, failure) = answer(&[entry(0xbb, None, false), rot]);
        let damage = damage.unwrap();
        assert!(damage.contains("00aa can't be archived") && damage.contains("at 0/8"), "{damage}");
        assert_eq!(failure.unwrap(), damage);
    }

    #[test]
    fn h18_an_archive_that_fails_is_shown_and_is_no_damage() {
        let (damage, failure) = answer(&[entry(0xaa, Some("it does not answer"), false)]);
        assert_eq!(damage, None);
        assert!(failure.unwrap().contains("00aa can't be archived: it does not answer"));
        let (damage, failure) = answer(&[entry(0xaa, None, false)]);
        assert_eq!((damage, failure), (None, None));
    }

    #[test]
    fn a_disk_that_runs_out_is_warned_of_and_one_that_has_is_a_failure() {
        use safekeeper::DiskState::{Refuses, Slows};
        let said = |id, disk_state| safekeeper::Status {
            id,
            disk_state: Some(disk_state),
            disk_warning: Some("1.0 GiB of 9.0 GiB are free".to_owned()),
            ..Default::default()
        };
        let said = [
            (NodeId(3), said(3, Slows)),
            (NodeId(1), said(1, Slows)),
            (NodeId(2), said(2, Refuses)),
        ];
        let answers = Answers::of_safekeepers(said.into_iter());
        let warning = |id: u64| format!("safekeeper-{id}: 1.0 GiB of 9.0 GiB are free");
        assert_eq!(warnings(&answers), [warning(1), warning(3)]);
        let failures = [1, 2].map(|id| failure(answers.safekeeper(&format!("safekeeper-{id}"))));
        assert_eq!(failures, [None, Some("1.0 GiB of 9.0 GiB are free".to_owned())]);
        assert_eq!(damage(&answers, "safekeeper-2"), None);
    }

    #[test]
    fn h18_what_fails_for_all_timelines_is_one_line() {
        let entries: Vec<_> = (0..1000).map(|n| entry(n, Some("no"), n == 999)).collect();
        let failure = answer(&entries).1.unwrap();
        let first = format!("timeline {:032x} ", 999);
        assert!(failure.starts_with(&first), "damage comes first: {failure}");
        assert!(failure.ends_with("and 997 more like these"), "{failure}");
    }
}
