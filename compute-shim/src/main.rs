//! The compute shim's process.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use pgstrata_compute_shim::branch::Branch;
use pgstrata_compute_shim::compute::{ComputeConfig, Outcome, Shared, run};
use pgstrata_compute_shim::data_directory::read_some;
use pgstrata_compute_shim::http;
use pgstrata_compute_shim::places::{Pageserver, Places, Said};
use pgstrata_compute_shim::pulse::Pulse;
use pgstrata_env::DirectoryLock;
use pgstrata_http_client::Access;
use pgstrata_identity::Role;
use pgstrata_ids::{Lsn, NodeId, SystemId, TenantId, TimelineId, TimelineParameters};
use pgstrata_listen::{Listening, Security, SecurityArguments, address, raise_descriptor_limit};
use pgstrata_wire::http::compute::State;

/// Exit status of a compute whose branch has a newer compute.
const EXIT_FENCED: u8 = 3;

/// Pauses before a compute that ran is started again: the first, and the longest after several that did not last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A run that lasted so long had a good start.
const LONG_RUN: Duration = Duration::from_secs(60);

/// Runs a stock PostgreSQL on a branch.
///
/// The data directory is a cache: pages come from the page server, and a commit is durable when a
/// majority of the safekeepers has it. Starting a second compute on the same branch fences this
/// one, which then ends with status 3.
#[derive(Parser)]
#[command(version, name = "compute-shim")]
struct Arguments {
    /// Directory of this compute; its data directory is emptied
    #[arg(long)]
    dir: PathBuf,
    /// Directory of PostgreSQL's programs
    #[arg(long, env = "PGSTRATA_PG_BIN")]
    pg_bin: PathBuf,
    /// The preload library [default: beside this program]
    #[arg(long)]
    preload: Option<PathBuf>,
    /// Port for PostgreSQL, on 127.0.0.1 unless listen_addresses is set to something else, in its files or with --set
    #[arg(long)]
    port: u16,
    /// Addresses of the HTTP interface, comma-separated; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    listen_http: Vec<SocketAddr>,
    /// Name of the branch. The page server is asked what it is, unless all of it is given
    #[arg(long)]
    branch: String,
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    security: SecurityArguments,
    /// URL of the storage broker, such as http://broker:50051, which knows where safekeepers and the page server are now:
    /// asked when one of them is not where it was said or heard to be
    #[arg(long)]
    broker: Option<String>,
    /// The safekeepers that are members, comma-separated: ids, of those that the broker knows, or id=host:port of their
    /// WAL ports. All computes of a branch name the same ones
    #[arg(long, value_name = "ID[=HOST:PORT]", value_delimiter = ',', value_parser = safekeeper)]
    safekeepers: Vec<(NodeId, Option<String>)>,
    /// Page service of the page server [default: the broker knows it]
    #[arg(
        long,
        value_name = "HOST:PORT",
        required_unless_present = "broker",
        requires = "pageserver_http"
    )]
    pageserver: Option<String>,
    /// HTTP interface of the page server [default: the broker knows it]
    #[arg(
        long,
        value_name = "HOST:PORT",
        required_unless_present = "broker",
        requires = "pageserver"
    )]
    pageserver_http: Option<String>,
    /// Only answer queries, as of this LSN
    #[arg(long)]
    read_only_at: Option<Lsn>,
    /// Once a newer compute owns the branch, stay, not ready, until told to end, and when started again in this directory.
    /// For whoever would start this one again at once, as containers' restart policies do: it would take the branch back
    #[arg(long)]
    stay_when_fenced: bool,
    /// A PostgreSQL setting, name=value; may be repeated
    #[arg(long = "set", value_parser = setting)]
    settings: Vec<(String, String)>,
}

/// A branch described by whoever starts this, so that a name needs no asking.
#[derive(clap::Args)]
struct Given {
    /// Timeline id, and with it everything else about the branch
    #[arg(
        long,
        requires_all = ["tenant", "system_id", "pg_version", "segment_size", "start_lsn", "start_prev"]
    )]
    timeline: Option<TimelineId>,
    /// Tenant id
    #[arg(long, requires = "timeline")]
    tenant: Option<TenantId>,
    /// PostgreSQL's database system identifier
    #[arg(long, requires = "timeline")]
    system_id: Option<u64>,
    /// PostgreSQL's major version
    #[arg(long, requires = "timeline")]
    pg_version: Option<u32>,
    /// Bytes of a WAL segment
    #[arg(long, requires = "timeline")]
    segment_size: Option<u32>,
    /// First LSN of the timeline
    #[arg(long, requires = "timeline")]
    start_lsn: Option<Lsn>,
    /// Start of the last record before it
    #[arg(long, requires = "timeline")]
    start_prev: Option<Lsn>,
    /// Timeline that it branched off from
    #[arg(long, requires = "timeline")]
    ancestor: Option<TimelineId>,
}

impl Given {
    /// The branch, if it is given; clap has seen to it that it is whole then.
    fn branch(&self) -> Option<Branch> {
        Some(Branch {
            parameters: TimelineParameters {
                tenant: self.tenant?,
                timeline: self.timeline?,
                system_id: SystemId(self.system_id?),
                pg_version: self.pg_version?,
                pg_timeline: 1,
                segment_size: self.segment_size?,
                start_lsn: self.start_lsn?,
                ancestor: self.ancestor,
            },
            start_prev: self.start_prev?,
        })
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected name=value")?;
    // PostgreSQL takes both for the same, on its command line.
    Ok((name.trim().to_ascii_lowercase().replace('-', "_"), value.to_owned()))
}

fn safekeeper(text: &str) -> Result<(NodeId, Option<String>), String> {
    let (id, address) = match text.split_once('=') {
        Some((id, address)) => (id, Some(address.to_owned())),
        None => (text, None),
    };
    let id = id.parse().map_err(|_| format!("'{id}' is not a node id"))?;
    Ok((NodeId(id), address))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    pgstrata_listen::log("PGSTRATA_LOG");
    match start(arguments) {
        Ok(Outcome::Fenced) => {
            eprintln!("compute-shim: a newer compute owns this branch; this one ended");
            ExitCode::from(EXIT_FENCED)
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compute-shim: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// What the command line says of where others are.
fn said(arguments: &Arguments) -> Result<Said> {
    let mut safekeepers = BTreeMap::new();
    for (node, address) in &arguments.safekeepers {
        ensure!(
            address.is_some() || arguments.broker.is_some(),
            "where is safekeeper {node}? Say --safekeepers {node}=HOST:PORT, or --broker URL"
        );
        safekeepers.extend(address.clone().map(|address| (*node, address)));
    }
    let pageserver = arguments.pageserver.clone().zip(arguments.pageserver_http.clone());
    let pageserver = pageserver.map(|(pages, http)| Pageserver { pages, http });
    Ok(Said { safekeepers, pageserver, broker: arguments.broker.clone() })
}

fn config(arguments: Arguments, security: Security) -> Result<ComputeConfig> {
    let preload = match arguments.preload.clone() {
        Some(preload) => preload,
        None => std::env::current_exe()?.with_file_name("libpgstrata_preload.so"),
    };
    for path in [&preload, &arguments.pg_bin.join("postgres")] {
        if !path.is_file() {
            bail!("{} does not exist", path.display());
        }
    }
    std::fs::create_dir_all(&arguments.dir)
        .with_context(|| format!("can't create {}", arguments.dir.display()))?;
    let said = said(&arguments)?;
    let access = Access::of(security.identity());
    let (branch, places) = match arguments.given.branch() {
        Some(branch) => {
            let places = Places::start(said, &access, Some(branch.parameters.timeline))?;
            (branch, places)
        }
        None => {
            // Any page server knows branches by name; pages are those of the one that has the timeline.
            let branch = Branch::find(
                &*Places::start(said.clone(), &access, None)?,
                &access,
                &arguments.branch,
            )?;
            let places = Places::start(said, &access, Some(branch.parameters.timeline))?;
            (branch, places)
        }
    };
    let tenant = branch.parameters.tenant;
    let what = format!("a compute of tenant {tenant}, which branch '{}' is of", arguments.branch);
    security.check_role(&what, |role| *role == Role::Compute(tenant))?;
    Ok(ComputeConfig {
        dir: arguments.dir.canonicalize()?,
        pg_bin: arguments.pg_bin,
        preload: preload.canonicalize()?,
        port: arguments.port,
        branch: arguments.branch,
        parameters: branch.parameters,
        start_prev: branch.start_prev,
        members: arguments.safekeepers.iter().map(|(node, _)| *node).collect(),
        places,
        security,
        read_only_at: arguments.read_only_at,
        settings: arguments.settings,
    })
}

fn start(arguments: Arguments) -> Result<Outcome> {
    // PostgreSQL's too.
    raise_descriptor_limit();
    let security = Security::open(&arguments.security)?;
    let http_port = Listening::bind(&arguments.listen_http, &security)?;
    let address = http_port.first;
    let stay_when_fenced = arguments.stay_when_fenced;
    let config = config(arguments, security.clone())?;
    // One shim a directory: it empties the data directory.
    let _lock = DirectoryLock::take(&config.dir, "shim.lock", "compute")?;
    let shared = Arc::new(Shared::default());
    watch_signals(&shared)?;
    http::serve(http_port, security.clone(), Arc::clone(&shared))?;
    println!("{}", serde_json::json!({ "ready": true, "http": address.to_string() }));
    let fence = Fence::of(&config);
    match stay_when_fenced {
        true if fence.is_there()? => {
            fence.stay(&shared, &config);
            return Ok(Outcome::Stopped);
        }
        true => {}
        false => fence.remove()?,
    }

    let pulse = Pulse::start().context("can't start a thread")?;
    let mut pause = FIRST_PAUSE;
    loop {
        let since = Instant::now();
        // PostgreSQL's own crash recovery is never used: the next start is from the quorum.
        let failure = match run(&config, &shared) {
            Ok(Outcome::PostgresDied) => "postgres ended by itself; its log says why".to_owned(),
            Ok(Outcome::Fenced) if stay_when_fenced => {
                // Also where this process is started again: it would take the branch back. Which it does at once if it ends
                // now, because that can't be written.
                if let Err(error) = fence.put() {
                    tracing::error!(
                        "this compute will take the branch back when it is started again: {error:#}"
                    );
                }
                fence.stay(&shared, &config);
                return Ok(Outcome::Stopped);
            }
            Ok(outcome) => return Ok(outcome),
            // Whoever started it hears of a first start that fails, unless it was this process that was away: everybody
            // else has given it up meanwhile, and answers when asked again.
            Err(error) if !shared.was_running.load(Ordering::Acquire) && !pulse.take_hang() => {
                return Err(error);
            }
            Err(error) => format!("{error:#}").replace('\n', " "),
        };
        if since.elapsed() > LONG_RUN {
            pause = FIRST_PAUSE;
        }
        tracing::error!("{failure}; the compute starts again in {pause:?}");
        {
            let mut report = shared.report.lock();
            report.state = State::Restarting;
            report.failure = Some(failure);
            report.postgres_pid = None;
        }
        let deadline = Instant::now() + pause;
        while Instant::now() < deadline {
            if shared.is_told_to_end() {
                return Ok(Outcome::Stopped);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// The file that says that this compute was fenced, and from which branch.
struct Fence {
    path: PathBuf,
    timeline: String,
}

impl Fence {
    fn of(config: &ComputeConfig) -> Fence {
        let timeline = config.parameters.timeline.to_string();
        Fence { path: config.dir.join("fenced"), timeline }
    }

    fn is_there(&self) -> Result<bool> {
        match self.path.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            _ => Ok(read_some(&self.path)?.trim() == self.timeline),
        }
    }

    fn put(&self) -> Result<()> {
        std::fs::write(&self.path, format!("{}\n", self.timeline))
            .with_context(|| format!("can't write {}", self.path.display()))
    }

    fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("can't remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Does nothing any more, until it is told to end.
    fn stay(&self, shared: &Shared, config: &ComputeConfig) {
        let failure = format!(
            "a newer compute owns branch '{}', and this one does nothing; to have it take the branch back, end it, remove \
             {}, and start it",
            config.branch,
            self.path.display()
        );
        tracing::error!("{failure}");
        {
            let mut report = shared.report.lock();
            report.state = State::Fenced;
            report.branch.clone_from(&config.branch);
            report.failure = Some(failure);
            report.postgres_pid = None;
        }
        while !shared.is_told_to_end() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// SIGTERM and SIGINT end the compute cleanly; SIGQUIT at once.
fn watch_signals(shared: &Arc<Shared>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt, mut quit) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::quit())?,
        )
    };
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => shared.stop.store(true, Ordering::Release),
                    _ = interrupt.recv() => shared.stop.store(true, Ordering::Release),
                    _ = quit.recv() => shared.abort.store(true, Ordering::Release),
                }
                if matches!(shared.report.lock().state, State::Starting | State::Restarting) {
                    // Nobody was told of a commit yet, and a start waits for others: for a quorum, the page server,
                    // postgres, which the kernel ends with us.
                    std::process::exit(0);
                }
            }
        });
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_fence_is_of_one_branch_and_lasts_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let fence = |timeline: &str| Fence {
            path: directory.path().join("fenced"),
            timeline: timeline.to_owned(),
        };
        let (own, other) = (fence("11"), fence("22"));
        assert!(!own.is_there().unwrap());
        own.remove().unwrap();
        own.put().unwrap();
        assert!(own.is_there().unwrap() && !other.is_there().unwrap());
        own.remove().unwrap();
        assert!(!own.is_there().unwrap());
        // What can't be read is no reason to take a branch back.
        std::fs::create_dir(directory.path().join("fenced")).unwrap();
        assert!(own.is_there().is_err());
    }

    #[test]
    fn a_setting_has_one_name_however_it_is_spelled() {
        let expected = Ok(("listen_addresses".to_owned(), "a-b".to_owned()));
        assert_eq!(setting("Listen-Addresses=a-b"), expected);
        assert_eq!(setting("listen_addresses=a-b"), expected);
        assert!(setting("listen_addresses").is_err());
    }
}
