//! `compute start`, `stop`, `list`.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use pgstrata_wire::http::compute::{Report, State};
use serde_json::{Value, json};

use crate::cluster::{Cluster, ComputePlace, SafekeeperPlace, free_ports, is_free};
use crate::process::{DYING_PATIENCE, Process};
use crate::status::{self, Answers};
use crate::{branch, http, locks, out, up};

const START_PATIENCE: Duration = Duration::from_secs(120);
/// Longest wait for a port that is still taken.
const PORT_PATIENCE: Duration = Duration::from_secs(3);
const STOP_PATIENCE: Duration = Duration::from_secs(90);

/// The URI of a compute.
pub fn uri(port: u16) -> String {
    format!("postgresql://postgres@127.0.0.1:{port}/postgres")
}

/// The process of a branch's compute.
pub fn process(cluster: &Cluster, branch: &str) -> Process {
    Process::new(&cluster.dir, &format!("compute-{branch}"))
}

/// What a running compute says about itself.
pub fn report(cluster: &Cluster, branch: &str) -> Option<Report> {
    let place = cluster.state.computes.get(branch)?;
    process(cluster, branch).pid()?;
    http::try_get(&format!("127.0.0.1:{}", place.http), status::STATUS, Duration::from_secs(2))
}

/// Whether a port is free, or soon will be: a server whose shim was killed is about to end.
fn gets_free(port: u16) -> bool {
    let deadline = Instant::now() + PORT_PATIENCE;
    while !is_free(port) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Ends a server of the branch that outlived its shim, before its port is missed. Where a shim runs that we don't see,
/// the server is that one's.
fn end_leftover(cluster: &Cluster, branch: &str) -> Result<()> {
    if process(cluster, branch).pid().is_some() {
        return Ok(());
    }
    locks::refuse_compute_elsewhere(cluster, branch)?;
    let data = cluster.compute_path(branch)?.join("data");
    if pgstrata_compute_shim::leftover::end(&data)? {
        eprintln!("pgstrata: a server of branch '{branch}' that outlived its compute was ended");
    }
    Ok(())
}

/// Refuses what is no port that can be asked for.
pub fn check_port_number(port: u16) -> Result<()> {
    ensure!(port != 0, "--port 0 names no port: leave out --port, and a free one is taken");
    Ok(())
}

/// What else of the cluster a port belongs to, whether that runs now or is only about to be started again.
fn holder(cluster: &Cluster, branch: &str, port: u16) -> Option<String> {
    let state = &cluster.state;
    if state.broker == port {
        return Some("storage-broker".to_owned());
    }
    let (http, pages, pg) = state.pageserver;
    if [http, pages, pg].contains(&port) {
        return Some("pageserver".to_owned());
    }
    if let Some(place) =
        state.safekeepers.iter().find(|place| [place.wal, place.pg, place.http].contains(&port))
    {
        return Some(format!("safekeeper-{}", place.id));
    }
    // A shim that does not run takes any port when it is started again.
    let of_shim = |name: &str, http: u16| http == port && process(cluster, name).pid().is_some();
    let others = state.computes.iter().filter(|&(name, _)| name != branch);
    let mut holders =
        others.filter(|(name, place)| place.port == port || of_shim(name, place.http));
    holders.next().map(|(name, _)| format!("the compute of branch '{name}'"))
}

/// Refuses a port that the branch's compute, which does not run, can't have.
pub fn check_port(cluster: &Cluster, branch: &str, port: u16) -> Result<()> {
    check_port_number(port)?;
    if let Some(holder) = holder(cluster, branch, port) {
        bail!("port {port} is that of {holder} in this cluster: name another with --port");
    }
    end_leftover(cluster, branch)?;
    ensure!(
        gets_free(port),
        "port {port} is in use by another program, or not for us: name another with --port"
    );
    Ok(())
}

/// Refuses to start the branch's compute anew where somebody has taken its port meanwhile: its clients know that one, so
/// that another one is chosen by who tells them. `remedy` is the command for that.
pub fn check_remembered_port(cluster: &Cluster, branch: &str, remedy: &str) -> Result<()> {
    let Some(place) = cluster.state.computes.get(branch) else { return Ok(()) };
    let port = place.port;
    end_leftover(cluster, branch)?;
    let taken = match holder(cluster, branch, port) {
        // A cluster of an earlier version, which let one be given twice.
        Some(holder) => format!("is that of {holder} as well"),
        None if process(cluster, branch).pid().is_some() || gets_free(port) => return Ok(()),
        None => "is in use by another program: end that one".to_owned(),
    };
    bail!(
        "port {port} of the compute of branch '{branch}' {taken}; or give the branch another one: \
         '{remedy}'"
    );
}

/// Starts the branch's compute unless it runs. Returns what it says about itself.
pub fn ensure(
    cluster: &mut Cluster,
    name: &str,
    port: Option<u16>,
    read_only_at: Option<String>,
) -> Result<Report> {
    let process = process(cluster, name);
    process.wait_while_dying(Instant::now() + DYING_PATIENCE);
    if process.pid().is_some() {
        return wait_running(cluster, name, &process);
    }
    let row = branch::get(cluster, name)?;
    let version = row.pg_version;
    if let Some(major) = cluster.state.pg_major
        && version != major
    {
        // Found by postgres itself only after the branch's running compute was fenced.
        bail!(
            "branch '{name}' is of PostgreSQL {version}, and this cluster's programs in {} are of \
             {major}",
            cluster.state.pg_bin.display()
        );
    }
    end_leftover(cluster, name)?;
    let ports = free_ports(2)?;
    // Clients know the port that it had, which somebody else may have taken meanwhile.
    let state = &cluster.state;
    let had = state.computes.get(name).map(|place| place.port);
    let before = had.or(state.ports.get(name).copied()).filter(|port| gets_free(*port));
    let port = port.or(before).unwrap_or(ports[0]);
    let place = ComputePlace { port, http: ports[1], read_only_at };
    let directory = cluster.compute_directory(name)?;
    let shim = up::readable_copy(cluster, &up::program("compute-shim")?)?;
    let preload = up::readable_copy(cluster, &up::program("libpgstrata_preload.so")?)?;
    let places = &cluster.state.safekeepers;
    let is_there = |place: &&SafekeeperPlace| !up::has_lost_directory(&cluster.dir, place);
    // Who has lost its directory would be one of those who begin a branch, and has nothing to tell of any other one.
    let none_is = !places.iter().any(|place| is_there(&place));
    let safekeepers: Vec<_> = places
        .iter()
        .filter(|place| none_is || is_there(place))
        .map(|place| format!("{}=127.0.0.1:{}", place.id, place.wal))
        .collect();
    let (pageserver_http, pages, _) = cluster.state.pageserver;
    let mut command = Command::new(shim);
    command
        .arg("--dir")
        .arg(&directory)
        .arg("--pg-bin")
        .arg(&cluster.state.pg_bin)
        .arg("--preload")
        .arg(preload)
        .args(["--port", &place.port.to_string()])
        .args(["--listen-http", &format!("127.0.0.1:{}", place.http)])
        .args(["--branch", name])
        .args(["--tenant", &row.tenant_id.to_string()])
        .args(["--timeline", &row.timeline_id.to_string()])
        .args(["--system-id", &row.system_id.to_string()])
        .args(["--pg-version", &row.pg_version.to_string()])
        .args(["--segment-size", &row.segment_size.to_string()])
        .args(["--start-lsn", &row.start_lsn.to_string()])
        .args(["--start-prev", &row.start_prev.to_string()])
        .args(["--safekeepers", &safekeepers.join(",")])
        .args(["--broker", &format!("http://127.0.0.1:{}", cluster.state.broker)])
        .args(["--pageserver", &format!("127.0.0.1:{pages}")])
        .args(["--pageserver-http", &format!("127.0.0.1:{pageserver_http}")])
        .current_dir("/");
    if let Some(ancestor) = row.ancestor_timeline_id {
        command.args(["--ancestor", &ancestor.to_string()]);
    }
    if let Some(lsn) = &place.read_only_at {
        command.args(["--read-only-at", lsn]);
    }
    up::as_postgres(cluster, &mut command)?;
    cluster.state.computes.insert(name.to_owned(), place);
    cluster.state.ports.remove(name);
    cluster.save()?;
    process.start(&mut command)?;
    wait_running(cluster, name, &process)
}

fn wait_running(cluster: &Cluster, name: &str, process: &Process) -> Result<Report> {
    process.wait_ready(START_PATIENCE)?;
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        if let Some(report) = report(cluster, name)
            && report.state == State::Running
        {
            return Ok(report);
        }
        if process.pid().is_none() {
            bail!("the compute of branch '{name}' did not start: {}", process.last_words());
        }
        ensure!(
            Instant::now() < deadline,
            "the compute of branch '{name}' did not start in {START_PATIENCE:?}{}; see {}",
            report(cluster, name)
                .and_then(|report| Some(format!(": {}", report.failure?)))
                .unwrap_or_default(),
            process.log().display()
        );
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Arguments of `compute start`.
#[derive(clap::Args)]
pub struct StartArguments {
    /// Branch
    branch: String,
    /// Port for PostgreSQL [default: a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Only answer queries
    #[arg(long)]
    read_only: bool,
    /// As of this LSN or time (read-only computes)
    #[arg(long, requires = "read_only", value_parser = branch::parse_at)]
    at: Option<branch::At>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `compute start`.
pub fn start(cluster: &mut Cluster, arguments: &StartArguments) -> Result<()> {
    let name = &arguments.branch;
    ensure!(
        process(cluster, name).pid().is_none(),
        "branch '{name}' has a compute already: 'pgstrata compute list' shows it"
    );
    if let Some(port) = arguments.port {
        // Before anything of it is remembered.
        check_port(cluster, name, port)?;
    }
    let read_only_at = match (arguments.read_only, &arguments.at) {
        (false, _) => None,
        (true, Some(at)) => Some(branch::resolve(cluster, name, at)?),
        (true, None) => Some(branch::get(cluster, name)?.last_record_lsn),
    };
    let read_only_at = read_only_at.map(|lsn| lsn.to_string());
    let report = ensure(cluster, name, arguments.port, read_only_at)?;
    let row = json!({
        "branch": name,
        "uri": report.uri,
        "pid": report.pid,
        "postgres_pid": report.postgres_pid,
        "data_dir": report.data_dir,
        "start_ms": report.start_ms,
    });
    match arguments.json {
        true => out::line(&row.to_string()),
        false => out::line(&report.uri),
    }
}

/// `compute stop`.
pub fn stop(cluster: &mut Cluster, branch: &str, immediate: bool) -> Result<()> {
    let process = process(cluster, branch);
    let known = cluster.state.computes.contains_key(branch);
    let signal = if immediate { Signal::SIGQUIT } else { Signal::SIGTERM };
    let ran = process.end(signal, STOP_PATIENCE)?;
    if !ran && !known {
        bail!("branch '{branch}' has no compute");
    }
    if let Some(place) = cluster.state.computes.remove(branch) {
        cluster.state.ports.insert(branch.to_owned(), place.port);
    }
    cluster.save()
}

/// The computes that were started and not stopped.
pub fn rows(cluster: &Cluster, answers: &Answers) -> Vec<Value> {
    cluster
        .state
        .computes
        .iter()
        .map(|(name, place)| {
            let process = process(cluster, name);
            let report = answers.compute(name);
            let state = match (process.pid(), report) {
                (None, _) => "dead".to_owned(),
                (Some(_), Some(report)) => report.state.to_string(),
                // One that is just being started listens already.
                (Some(_), None) => "silent".to_owned(),
            };
            json!({
                "branch": name,
                "uri": report.map_or_else(|| uri(place.port), |report| report.uri.clone()),
                "pid": process.pid(),
                "postgres_pid": report.map(|report| json!(report.postgres_pid)),
                "data_dir": report.map(|report| json!(report.data_dir)),
                "state": state,
                "start_ms": report.map(|report| json!(report.start_ms)),
                "steps": report.map(|report| json!(report.steps)),
                "commit_lsn": report.map(|report| report.commit_lsn.to_string()),
                "start_lsn": report.map(|report| report.start_lsn.to_string()),
                "term": report.map(|report| json!(report.term)),
                "read_only": place.read_only_at.is_some(),
                "failure": match (process.pid(), report) {
                    (Some(_), None) => Some(status::no_answer()),
                    _ => report.and_then(|report| report.failure.clone()),
                },
                "warnings": report.map(|report| json!(report.warnings)),
            })
        })
        .collect()
}
