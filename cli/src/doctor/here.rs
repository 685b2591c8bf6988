//! A cluster in a directory of this machine, or the directory that one would go in.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use jiff::Timestamp;
use pgstrata_blob::Location;
use pgstrata_http_client::Access;
use pgstrata_wire::http::pageserver::Branch;

use super::clocks::{self, Dated};
use super::finding::{Finding, Severity};
use super::later::Later;
use super::place::{Keeps, Place};
use super::processes::Running;
use super::services::{self, Role, State};
use super::{branches, certificates, limits, machine, programs, store};
use crate::cluster::Cluster;
use crate::http::Service;
use crate::members::short::{self, Safekeepers};
use crate::process::Process;
use crate::remote::ask_each;
use crate::status::{self, Answers, PATIENCE};
use crate::{branch, locks, owner, place};

/// Longest wait for what services are asked beside their status.
const SERVICES_PATIENCE: Duration = Duration::from_secs(8);

const STARTS: &str = "'pgstrata up' starts it";

/// What is in a directory.
enum Found {
    /// No cluster.
    Nothing,
    /// One that can be looked at.
    Cluster(Box<Cluster>),
    /// One that can't be looked at, how much that matters, and why.
    Unusable(Severity, String),
}

/// What it means that a cluster can't be looked at: that it is closed to us says nothing of it.
fn severity(error: &anyhow::Error) -> Severity {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    match cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied) {
        true => Severity::Unknown,
        false => Severity::Danger,
    }
}

fn find(dir: &Path) -> Found {
    match Cluster::find(dir) {
        Ok(Some(cluster)) => match place::check(&cluster) {
            Ok(()) => Found::Cluster(Box::new(cluster)),
            // It is a copy, or was moved: what it says of its processes is not so.
            Err(error) => Found::Unusable(Severity::Warning, format!("{error:#}")),
        },
        Ok(None) => Found::Nothing,
        Err(error) => Found::Unusable(severity(&error), format!("not looked at: {error:#}")),
    }
}

/// Everything about what is in `dir`.
pub fn check(dir: &Path, deadline: Instant) -> Result<Vec<Finding>> {
    let missing = programs::missing();
    owner::become_owner(dir)?;
    let mut findings = programs::check_own(&missing);
    findings.push(limits::check_kernel());
    let looked = Later::start({
        let dir = dir.to_owned();
        move || find(&dir)
    });
    let silent = || {
        let text = format!("{} does not answer: see its disk (dmesg)", dir.display());
        Found::Unusable(Severity::Danger, text)
    };
    match looked.wait(deadline).unwrap_or_else(silent) {
        Found::Cluster(cluster) => findings.extend(check_cluster(Arc::new(*cluster), deadline)),
        Found::Nothing => findings.extend(check_empty(dir, deadline)),
        Found::Unusable(severity, why) => {
            findings.push(Finding::new("cluster", "cluster", severity, &why));
            findings.extend(check_empty(dir, deadline));
        }
    }
    Ok(findings)
}

/// A directory that no cluster is in.
fn check_empty(dir: &Path, deadline: Instant) -> Vec<Finding> {
    let asked = std::env::var_os("PGSTRATA_PG_BIN").map(PathBuf::from);
    let postgres = Later::start(move || programs::postgres(asked.as_deref()));
    let places = vec![Place::new("directory", dir, Keeps::Wal), machine::memory()];
    let mut findings = machine::check(places, 0, deadline);
    findings.extend(programs::check_user(None));
    findings.push(programs::check_postgres(postgres.wait(deadline), None));
    findings
}

/// Where a local cluster keeps what it has.
fn places(cluster: &Cluster) -> Vec<Place> {
    let named = |name: &str, keeps| Place::new(name, cluster.dir.join(name), keeps);
    let safekeepers = cluster.state.safekeepers.iter();
    let mut places: Vec<_> =
        safekeepers.map(|place| named(&format!("safekeeper-{}", place.id), Keeps::Wal)).collect();
    if let Ok(Location::Directory(path)) = cluster.object_store().parse() {
        places.push(Place::new("objects", path, Keeps::Objects));
    }
    places.extend([named("pageserver", Keeps::Cache), named("computes", Keeps::Cache)]);
    places.push(machine::memory());
    places
}

/// A process of the cluster, as it is seen.
fn service(cluster: &Cluster, answers: &Answers, row: &serde_json::Value) -> services::Service {
    let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let object = text("name");
    let role = match text("role").as_str() {
        "storage-broker" => Role::Broker,
        "safekeeper" => Role::Safekeeper,
        "pageserver" => Role::Pageserver,
        _ => Role::Compute,
    };
    let lock = locks::file_of(&cluster.dir, &object.replace('/', "%"));
    let state = match (row["pid"].is_u64(), answers.answered(&object)) {
        (true, true) => State::Answers,
        (true, false) => State::Silent,
        (false, _) if lock.is_some_and(|lock| locks::is_held(&lock)) => State::Unseen,
        (false, _) => State::Down,
    };
    let of_compute = || answers.compute(object.strip_prefix("compute-")?)?.failure.clone();
    let trouble = match role {
        Role::Compute if state == State::Answers => of_compute(),
        _ => row["failure"].as_str().map(str::to_owned),
    };
    let damage = (role == Role::Safekeeper).then(|| status::damage(answers, &object)).flatten();
    services::Service { object, role, state, damage, trouble }
}

/// Safekeepers that have lost what they promised: `up` starts none on an empty directory.
fn check_lost(dir: &Path, lost: &BTreeSet<u64>) -> Vec<Finding> {
    let finding = |id: &u64| {
        let name = format!("safekeeper-{id}");
        let directory = dir.join(&name);
        let text = format!(
            "it has lost its directory {}: put it back; it can't start without what it promised",
            directory.display()
        );
        Finding::new("services", &name, Severity::Danger, &text)
    };
    lost.iter().map(finding).collect()
}

/// What the clocks of services say, by their names.
type Clocks = Vec<(String, Result<Dated, String>)>;

/// The clocks of those that run, by their HTTP interfaces.
fn ask_clocks(rows: &[serde_json::Value]) -> Later<Clocks> {
    let running = rows.iter().filter(|row| row["pid"].is_u64());
    let named = running.filter_map(|row| {
        let (name, address) = (row["name"].as_str()?.to_owned(), row["http"].as_str()?);
        let service = Service { timeout: PATIENCE, ..Service::local(address, &Access::Local) };
        Some((name, service))
    });
    let named = Vec::from_iter(named);
    Later::start(move || ask_each(&named, |(name, service)| (name.clone(), date(service))))
}

/// Asks a service for the time.
pub fn date(service: &Service) -> Result<Dated, String> {
    let asked = Timestamp::now();
    let date = service.date().map_err(|error| format!("{error:#}"))?;
    Ok(Dated { asked, answered: Timestamp::now(), date })
}

/// What was found of services; that nothing came back in time is a finding too.
pub fn in_time(found: Option<Vec<Finding>>, check: &'static str) -> Vec<Finding> {
    let text =
        "not looked at: they can't be looked at in time; see the disks of this machine (dmesg)";
    found.unwrap_or_else(|| vec![Finding::new(check, "services", Severity::Unknown, text)])
}

/// Limits and certificates of services that run here.
pub fn check_running(running: &[(String, Option<Running>)], now: Timestamp) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (object, running) in running {
        findings.extend(limits::check(object, running.as_ref().and_then(Running::limits)));
        let Some(running) = running.as_ref().filter(|running| !running.is_contained()) else {
            continue;
        };
        if let Some(tls) = running.directory("--tls") {
            let read = certificates::Directory::read(&tls);
            findings.extend(certificates::directory(object, &read, now));
        }
        if let Some(keys) = running.directory("--token-keys") {
            findings.push(certificates::token_keys(object, &keys));
        }
    }
    findings
}

fn check_cluster(cluster: Arc<Cluster>, deadline: Instant) -> Vec<Finding> {
    let asked = Later::start({
        let cluster = Arc::clone(&cluster);
        move || {
            let answers = Answers::ask(&cluster);
            let rows = status::processes(&cluster, &answers);
            (answers, rows)
        }
    });
    let branches = Later::start({
        let cluster = Arc::clone(&cluster);
        move || {
            let rows = branch::rows_of_pageserver(cluster.as_ref(), Some(PATIENCE));
            rows.map_err(|error| format!("{error:#}"))
        }
    });
    let probed = Later::start({
        let cluster = Arc::clone(&cluster);
        move || store::probe(&cluster)
    });
    let postgres = Later::start({
        let pg_bin = cluster.state.pg_bin.clone();
        move || programs::postgres(Some(&pg_bin))
    });
    let lost = Later::start({
        let cluster = Arc::clone(&cluster);
        move || short::lost_here(&cluster)
    });
    let safekeepers = &cluster.state.safekeepers;
    let mut findings = machine::check(places(&cluster), safekeepers.len(), deadline);
    findings.extend(programs::check_user(cluster.state.pg_user.as_deref()));
    findings.push(programs::check_postgres(postgres.wait(deadline), cluster.state.pg_major));
    let lost = lost.wait(deadline);
    let found = lost.as_ref().map(|lost| check_lost(&cluster.dir, lost));
    findings.extend(in_time(found, "services"));
    let lost = lost.unwrap_or_default();
    findings.push(store::check(&cluster.object_store(), probed.wait(deadline)));
    let zones =
        safekeepers.iter().map(|place| (format!("safekeeper-{}", place.id), place.zone.clone()));
    findings.extend(services::check_zones(&Vec::from_iter(zones)));
    match asked.wait(deadline) {
        Some((answers, rows)) => {
            findings.extend(check_services(&cluster, &answers, &rows, (branches, &lost), deadline));
        }
        None => {
            let text = "not looked at: its processes can't be told in time";
            findings.push(Finding::new("services", "cluster", Severity::Unknown, text));
        }
    }
    findings
}

/// What runs of it.
fn check_services(
    cluster: &Arc<Cluster>,
    answers: &Answers,
    rows: &[serde_json::Value],
    (branches, lost): (Later<Result<Vec<Branch>, String>>, &BTreeSet<u64>),
    deadline: Instant,
) -> Vec<Finding> {
    // Of their own: a disk that hangs may have taken all of the others'.
    let deadline = deadline.max(Instant::now() + SERVICES_PATIENCE);
    let clocks = ask_clocks(rows);
    let running = Later::start({
        let (dir, rows) = (cluster.dir.clone(), rows.to_vec());
        move || {
            let names = rows.iter().filter_map(|row| row["name"].as_str());
            let pids =
                names.filter_map(|name| Some((name.to_owned(), Process::new(&dir, name).pid()?)));
            let running: Vec<_> = pids.map(|(name, pid)| (name, Running::of(pid))).collect();
            check_running(&running, Timestamp::now())
        }
    });
    let seen: Vec<_> = rows.iter().map(|row| service(cluster, answers, row)).collect();
    let mut findings = services::check(&seen, STARTS);
    if seen.iter().any(|service| service.state != State::Down) {
        let rows =
            branches.wait(deadline).unwrap_or_else(|| Err("it was not told in time".to_owned()));
        let said: Vec<_> = answers.safekeepers().cloned().collect();
        let counted = short::counted(rows.as_deref().unwrap_or_default(), &said);
        findings.extend(services::check_majorities(&seen, &counted));
        findings.extend(branches::check(&rows, &said));
        let safekeepers = Safekeepers::here(cluster, &said, lost);
        findings.extend(branches::check_members(&rows, &said, &safekeepers));
    }
    for branch in cluster.state.computes.keys() {
        let warnings = answers.compute(branch).map(|report| report.warnings.as_slice());
        let object = format!("compute-{branch}");
        findings.extend(branches::check_settings(&object, warnings.unwrap_or_default()));
    }
    let clocks = clocks.wait(deadline).map(|clocks| {
        let said = clocks.iter().map(|(object, dated)| (object, dated.as_ref()));
        said.map(|(object, dated)| clocks::check(object, dated.map_err(String::as_str))).collect()
    });
    findings.extend(in_time(clocks, "clocks"));
    findings.extend(in_time(running.wait(deadline), "limits"));
    findings
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn what_is_closed_to_us_is_not_known() {
        let failed = |kind: io::ErrorKind| {
            let failed: Result<(), io::Error> = Err(kind.into());
            severity(&failed.context("can't read it").unwrap_err())
        };
        assert_eq!(failed(io::ErrorKind::PermissionDenied), Severity::Unknown);
        assert_eq!(failed(io::ErrorKind::InvalidData), Severity::Danger);
        assert_eq!(severity(&anyhow::anyhow!("it is damaged")), Severity::Danger);
    }

    #[test]
    fn a_directory_has_a_cluster_or_none_or_a_damaged_one() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(find(directory.path()), Found::Nothing));
        std::fs::write(directory.path().join("cluster.json"), "{").unwrap();
        let Found::Unusable(Severity::Danger, why) = find(directory.path()) else {
            panic!("it is taken");
        };
        assert!(why.contains("cluster.json is damaged"), "{why}");
    }
}
