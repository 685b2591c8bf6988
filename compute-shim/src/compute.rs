//! The life of a compute: election, clean start, running, end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use parking_lot::Mutex;
use pgstrata_http_client::Access;
use pgstrata_ids::{Lsn, NodeId, TimelineParameters};
use pgstrata_listen::Security;
use pgstrata_pg_redo::ControlState;
use pgstrata_pg_wal::{PgVersion, WalWriter};
use pgstrata_quorum::ProposerId;
use pgstrata_wire::http::compute::{Report, State};
use pgstrata_wire::http::pageserver::Branch;
use rustix::process::{Resource, getrlimit};

use crate::ask::{self, Patience};
use crate::data_directory::{DataDirectory, read_some};
use crate::dynamic_memory::DynamicMemory;
use crate::memory::Memory;
use crate::pages::PageClient;
use crate::places::Places;
use crate::postgres::{Postgres, Settings};
use crate::proposer::{Leader, ProposerConfig, ProposerError, Proposing, elect_again};
use crate::segments::Segments;
use crate::wal_source::PgWal;
use crate::{access, conf, leftover, settings, socket};

/// Files in it are in memory.
const MEMORY_DIRECTORY: &str = "/dev/shm";
const ELECTION_TIMEOUT: Duration = Duration::from_secs(30);
const ELECTION_RETRY: Duration = Duration::from_secs(5);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// The same while nothing can be committed: what a server writes as it ends is not needed.
const STALLED_STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Relation segments that are open at once, however many may be.
const MAX_OPEN: usize = 8192;
/// The longest path that a Unix socket can have.
const SOCKET_PATH_LIMIT: usize = 100;

/// What a compute is started with.
#[derive(Clone, Debug)]
pub struct ComputeConfig {
    /// Directory of the compute; the data directory and the log are below it.
    pub dir: PathBuf,
    /// Directory of PostgreSQL's programs.
    pub pg_bin: PathBuf,
    /// The preload library.
    pub preload: PathBuf,
    /// Port for PostgreSQL.
    pub port: u16,
    /// The branch's name, for people.
    pub branch: String,
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Start of the last record before the timeline's first own LSN.
    pub start_prev: Lsn,
    /// The members of its quorum.
    pub members: Vec<NodeId>,
    /// Where they are, and the page server.
    pub places: Arc<Places>,
    /// Who this compute is to others.
    pub security: Security,
    /// Serve queries only, as of this LSN, without proposing anything.
    pub read_only_at: Option<Lsn>,
    /// More PostgreSQL settings, by name and value.
    pub settings: Vec<(String, String)>,
}

/// Shared with the HTTP interface.
#[derive(Default)]
pub struct Shared {
    /// The report, but for the commit LSN.
    pub report: Mutex<Report>,
    /// See [`Report::commit_lsn`]. The proposer's own, raised before any client hears of a commit:
    /// who was told of one and asks afterwards finds it in here.
    pub commit_lsn: Arc<AtomicU64>,
    /// End cleanly.
    pub stop: AtomicBool,
    /// End at once.
    pub abort: AtomicBool,
    /// A newer compute was elected.
    pub fenced: Arc<AtomicBool>,
    /// It has accepted connections once.
    pub was_running: AtomicBool,
    /// The highest term that it asked for, or 0.
    pub asked_term: Arc<AtomicU64>,
}

impl Shared {
    /// Whether it was told to end.
    pub fn is_told_to_end(&self) -> bool {
        self.stop.load(Ordering::Acquire) || self.abort.load(Ordering::Acquire)
    }
}

/// How a compute ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was told to.
    Stopped,
    /// A newer compute owns the branch.
    Fenced,
    /// PostgreSQL ended by itself: start again from the quorum.
    PostgresDied,
}

/// A clean start: where PostgreSQL begins, and what pages are as of.
struct CleanStart {
    /// Pages are as of here.
    pages_lsn: Lsn,
    /// Start of the checkpoint record.
    checkpoint: Lsn,
    /// End of the checkpoint record.
    end: Lsn,
}

/// Runs one compute from election to end.
pub fn run(config: &ComputeConfig, shared: &Shared) -> Result<Outcome> {
    let ended = run_once(config, shared);
    // At whatever step it hears of it: a compute that was outranked must not campaign again.
    let is_fenced = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(ProposerError::Fenced(_)))
    };
    match ended {
        Err(error) if error.chain().any(is_fenced) => {
            shared.report.lock().state = State::Fenced;
            Ok(Outcome::Fenced)
        }
        Ok(Outcome::Stopped) => Ok(Outcome::Stopped),
        // It was heard while something else went wrong.
        _ if shared.fenced.load(Ordering::Acquire) => {
            shared.report.lock().state = State::Fenced;
            Ok(Outcome::Fenced)
        }
        ended => ended,
    }
}

/// The file that is read in the place of `postgresql.conf`, if another one was given.
fn config_file(config: &ComputeConfig) -> Option<&str> {
    let given = config.settings.iter().rev().find(|(name, _)| name == "config_file");
    given.map(|(_, value)| value.as_str())
}

/// What the files of an earlier start say, which this one keeps.
fn present(config: &ComputeConfig, data_path: &Path) -> Result<Vec<conf::Entry>> {
    match data_path.exists() || config_file(config).is_some() {
        true => conf::read(data_path, config_file(config)),
        false => Ok(Vec::new()),
    }
}

fn run_once(config: &ComputeConfig, shared: &Shared) -> Result<Outcome> {
    let mut steps = Steps { since: Instant::now(), shared };
    let data_path = config.dir.join("data");
    {
        let mut report = shared.report.lock();
        let was_running = shared.was_running.load(Ordering::Acquire);
        *report = Report {
            state: if was_running { State::Restarting } else { State::Starting },
            failure: report.failure.take(),
            branch: config.branch.clone(),
            timeline_id: config.parameters.timeline.to_string(),
            uri: format!("postgresql://postgres@127.0.0.1:{}/postgres", config.port),
            data_dir: data_path.display().to_string(),
            pid: std::process::id(),
            read_only: config.read_only_at.is_some(),
            ..Report::default()
        };
    }
    if leftover::end(&data_path)? {
        tracing::warn!("a server that outlived its shim was ended");
    }
    // A port in use, or an address that is not ours, is found here, before anybody is fenced.
    access::check_free(
        &settings::listen(&config.settings, &present(config, &data_path)?),
        config.port,
    )?;
    let version = PgVersion::from_major(config.parameters.pg_version)
        .with_context(|| format!("PostgreSQL {} is not supported", config.parameters.pg_version))?;

    let mut leader = match config.read_only_at {
        Some(_) => None,
        None => match campaign(config, shared) {
            Ok(leader) => Some(leader),
            Err(ProposerError::Fenced(_)) => return Ok(Outcome::Fenced),
            Err(error) => return Err(error.into()),
        },
    };
    steps.done("elected");
    if let Some(leader) = &leader {
        refuse_lost_wal(config, leader.elected().start_lsn)?;
    }
    let (barrier_start, barrier_end) = match (&mut leader, config.read_only_at) {
        (Some(leader), _) => append_barrier(config, leader, version)?,
        (None, Some(lsn)) => (Lsn::INVALID, lsn),
        (None, None) => bail!("a compute needs a term, or an LSN to read at"),
    };
    steps.done("barrier");

    let data = DataDirectory::create(&data_path)?;
    let skeleton = std::thread::scope(|scope| {
        let fetch = scope.spawn(|| fetch_skeleton(config, barrier_end));
        if let Some(leader) = &mut leader {
            // The page server may read from a member that lags.
            leader.drive_until(|| fetch.is_finished())?;
        }
        fetch.join().unwrap_or_else(|_| bail!("fetching the skeleton panicked"))
    })?;
    let state = data.unpack(&skeleton[..])?;
    let dynamic_memory = DynamicMemory::new(Path::new(MEMORY_DIRECTORY))
        .and_then(|memory| memory.place(&data_path).map(|()| memory));
    if let Err(error) = &dynamic_memory {
        tracing::warn!("dynamic shared memory is on disk: {MEMORY_DIRECTORY}: {error}");
    }
    steps.done("skeleton");
    let start = clean_start(config, &data, leader.as_mut(), &state, barrier_start, barrier_end)?;
    steps.done("checkpoint");

    let memory = Memory::new(config.parameters.segment_size.into())?;
    let pages = Arc::new(PageClient::new(
        Arc::clone(&config.places),
        config.security.identity().cloned(),
        config.parameters.tenant,
        config.parameters.timeline,
        start.pages_lsn,
    ));
    let catalog_directory = format!("PG_{}_{}", version.major(), version.catalog_version());
    let segments = Segments::new(memory.map, pages, &data_path, catalog_directory, max_open())
        .with_context(|| format!("can't open {}", data_path.display()))?;
    let segments = Arc::new(segments);
    let socket_path = socket_path(&config.dir);
    remove_stale_sockets(&config.dir, &socket_path)?;
    let _backends = socket::Backends::start(socket_path.clone(), segments)
        .with_context(|| format!("can't listen on {}", socket_path.display()))?;

    let mut proposing = None;
    if let Some(leader) = leader {
        shared.report.lock().term = leader.elected().term.0;
        let source = PgWal::new(
            data_path.join("pg_wal"),
            config.parameters.clone(),
            version,
            memory.map,
            start.end,
            start.checkpoint,
            Arc::clone(&shared.fenced),
        );
        let wake = rustix::io::dup(&memory.event).context("can't duplicate an eventfd")?;
        proposing = Some(leader.run(source, wake, Arc::clone(&shared.commit_lsn))?);
    } else {
        // Nothing of a read-only compute's WAL is ever anybody's: its flushes need no quorum.
        memory.map.control().durable_sequence.store(u64::MAX, Ordering::SeqCst);
    }
    shared.report.lock().start_lsn = start.pages_lsn;
    let sizes = settings::sizes(&state.control);
    let mut decided = settings::decide(&settings::Situation {
        version,
        read_only: config.read_only_at.is_some(),
        sizes,
        prepared: data.has_prepared_transactions()?,
        files: &data.settings(sizes, config_file(config))?,
        given: &config.settings,
    });
    let own = data_path.join(access::FILE);
    // PostgreSQL takes a relative one to be relative to where it is started.
    let other = decided.hba_file.as_ref().map(PathBuf::from);
    let other = other.filter(|other| other.canonicalize().ok() != own.canonicalize().ok());
    let who = match other {
        None => data.who_may_connect(&decided.listen)?,
        Some(other) => read_some(&other)?,
    };
    if access::is_open(&decided.listen) {
        tracing::info!("PostgreSQL listens on {}, beyond this machine", decided.listen);
        decided.warnings.extend(access::warnings(&who, &decided.listen));
    }
    {
        let mut report = shared.report.lock();
        report.uri = access::uri(&decided.listen, config.port, &config.dir);
        report.warnings.clone_from(&decided.warnings);
    }
    let settings = Settings {
        bin: config.pg_bin.clone(),
        data: data_path,
        preload: config.preload.clone(),
        socket: socket_path.clone(),
        log: config.dir.join("postgres.log"),
        port: config.port,
        read_only: config.read_only_at.is_some(),
        given: config.settings.clone(),
        decided,
    };
    let mut postgres = Postgres::start(&settings, &memory)?;
    postgres.wait_ready(READY_TIMEOUT)?;
    steps.done("ready");
    drop(data);
    {
        let mut report = shared.report.lock();
        report.state = State::Running;
        report.failure = None;
        shared.was_running.store(true, Ordering::Release);
        report.postgres_pid = Some(postgres.pid());
        report.start_ms = steps.since.elapsed().as_millis() as u64;
    }
    let outcome = supervise(&mut postgres, proposing, shared);
    postgres.kill();
    drop(dynamic_memory);
    outcome
}

/// Relation segments that are open at once: the rest of the descriptors are for backends and the page server.
fn max_open() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 4).unwrap_or(MAX_OPEN).clamp(16, MAX_OPEN)
}

/// Notes when the steps of the start were done.
struct Steps<'a> {
    since: Instant,
    shared: &'a Shared,
}

impl Steps<'_> {
    fn done(&mut self, step: &str) {
        let at = self.since.elapsed().as_millis() as u64;
        self.shared.report.lock().steps.push((step.to_owned(), at));
    }
}

/// Sockets and their lock files outlive a killed server, and the process ids in them may be
/// anybody's by now. The directory's lock says that nobody else is here.
fn remove_stale_sockets(dir: &Path, own: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let stale = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(".s.PGSQL.") || path == own);
        if stale {
            std::fs::remove_file(&path)
                .with_context(|| format!("can't remove the stale {}", path.display()))?;
        }
    }
    let _ = std::fs::remove_file(own);
    Ok(())
}

fn socket_path(dir: &Path) -> PathBuf {
    let path = dir.join("shim.sock");
    match path.as_os_str().len() < SOCKET_PATH_LIMIT {
        true => path,
        false => std::env::temp_dir().join(format!("pgstrata-shim-{}.sock", std::process::id())),
    }
}

fn campaign(config: &ComputeConfig, shared: &Shared) -> Result<Leader, ProposerError> {
    // One that ran before goes on trying.
    let timeout = match shared.was_running.load(Ordering::Acquire) {
        true => ELECTION_RETRY,
        false => ELECTION_TIMEOUT,
    };
    let proposer = ProposerConfig {
        parameters: config.parameters.clone(),
        safekeepers_to_ask: config.members.clone(),
        safekeepers: Arc::clone(&config.places) as _,
        identity: config.security.identity().cloned(),
        id: ProposerId(rand::random()),
        seed: rand::random(),
        asked_term: Arc::clone(&shared.asked_term),
        limits: Default::default(),
    };
    elect_again(proposer, timeout)
}

fn writer(config: &ComputeConfig, version: PgVersion) -> WalWriter {
    WalWriter {
        version,
        tli: config.parameters.pg_timeline,
        system_identifier: config.parameters.system_id.0,
        segment_size: config.parameters.segment_size.into(),
    }
}

/// The term's first record changes nothing, but once it is committed, so is everything before
/// it: what earlier terms left behind becomes history, and the page server can say what the
/// cluster looks like there. Returns where the record starts and ends.
fn append_barrier(
    config: &ComputeConfig,
    leader: &mut Leader,
    version: PgVersion,
) -> Result<(Lsn, Lsn)> {
    let elected = leader.elected().clone();
    let prev = elected.prev_record_lsn.unwrap_or(config.start_prev);
    let placed = writer(config, version).noop(elected.start_lsn, prev);
    let end = leader
        .append_record(Bytes::from(placed.bytes), COMMIT_TIMEOUT)
        .context("can't commit the first record of the new term")?;
    anyhow::ensure!(end == placed.end, "the barrier ends at {end}, not at {}", placed.end);
    Ok((placed.start, placed.end))
}

/// GET from the page server.
fn ask_pageserver(config: &ComputeConfig, path: &str, what: &str) -> Result<Bytes> {
    let answer = Duration::from_secs(90);
    let patience = Patience { answer, reach: Duration::ZERO };
    let access = Access::of(config.security.identity());
    ask::pageserver(&config.places, &access, path, &[], what, patience).map(Bytes::from)
}

/// The page server takes in committed WAL only. If it has more than the log that was elected,
/// committed WAL is gone from a majority of the safekeepers, and to go on from `start_lsn` would
/// serve the past as if it were the present.
fn refuse_lost_wal(config: &ComputeConfig, start_lsn: Lsn) -> Result<()> {
    let path = format!("/v1/timelines/{}", config.parameters.timeline);
    let row: Branch = serde_json::from_slice(&ask_pageserver(config, &path, "such timeline")?)
        .context("the page server answered something unexpected")?;
    let ingested = row.last_record_lsn;
    anyhow::ensure!(
        ingested <= start_lsn,
        "the safekeepers' WAL ends at {start_lsn}, but WAL up to {ingested} was committed: a \
         majority of them has lost its directories; put them back (a branch at {ingested} has all \
         that the page server has)"
    );
    Ok(())
}

fn fetch_skeleton(config: &ComputeConfig, lsn: Lsn) -> Result<Bytes> {
    let path = format!("/v1/timelines/{}/skeleton?lsn={lsn}", config.parameters.timeline);
    ask_pageserver(config, &path, &format!("skeleton at {lsn}"))
}

/// Appends the checkpoint that says "shut down cleanly", and writes a control file that points
/// to it, and the WAL before it.
fn clean_start(
    config: &ComputeConfig,
    data: &DataDirectory,
    leader: Option<&mut Leader>,
    state: &ControlState,
    prev: Lsn,
    at: Lsn,
) -> Result<CleanStart> {
    let writer = writer(config, state.version());
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    let record = writer.record_start(at);
    // A read-only compute's record is its own, and never leaves it.
    let prev = if prev.is_valid() { prev } else { Lsn(at.0.saturating_sub(8)) };
    let placed = writer.checkpoint_shutdown(at, prev, &state.checkpoint(record, time));
    let segment_size = u64::from(config.parameters.segment_size);
    let segment_start = at.segment_start(segment_size);
    let mut wal = Vec::new();
    if leader.is_none() {
        data.make_standby()?;
    }
    if let Some(leader) = leader {
        leader
            .append_record(Bytes::from(placed.bytes.clone()), COMMIT_TIMEOUT)
            .context("can't commit the checkpoint of the clean start")?;
        // The true bytes, so that a standby of this compute can start at the segment's start.
        match leader.read_wal(segment_start, at) {
            Ok(bytes) => wal = bytes,
            Err(error) => {
                tracing::warn!("no WAL before {at} for followers of this compute: {error}")
            }
        }
    }
    if wal.is_empty() && at > segment_start {
        wal = writer.segment_prefix(at);
    }
    wal.extend_from_slice(&placed.bytes);
    let name = |number| config.parameters.segment_name(number);
    data.write_wal(segment_start, &wal, segment_size, name)?;
    data.write_control_file(&state.to_pg_control(placed.start, time).encode())?;
    Ok(CleanStart { pages_lsn: at, checkpoint: placed.start, end: placed.end })
}

/// Says in the report what keeps commits waiting; once in the log.
fn report_problem(shared: &Shared, problem: Option<String>) {
    let mut report = shared.report.lock();
    match (&report.failure, &problem) {
        (None, None) => return,
        (None, Some(text)) => tracing::warn!("{text}"),
        (Some(_), None) => tracing::info!("commits are possible again"),
        (Some(_), Some(_)) => {}
    }
    report.failure = problem;
}

fn supervise(
    postgres: &mut Postgres,
    proposing: Option<Proposing>,
    shared: &Shared,
) -> Result<Outcome> {
    let mut stopping: Option<Instant> = None;
    loop {
        if proposing.as_ref().is_some_and(Proposing::is_finished) {
            break;
        }
        if shared.abort.load(Ordering::Acquire) {
            return Ok(Outcome::Stopped);
        }
        let problem = proposing.as_ref().and_then(Proposing::problem);
        let patience = if problem.is_some() { STALLED_STOP_TIMEOUT } else { STOP_TIMEOUT };
        report_problem(shared, problem);
        if let Some(status) = postgres.try_wait()? {
            if stopping.is_some() {
                return Ok(Outcome::Stopped);
            }
            tracing::error!("postgres ended: {status}");
            return Ok(Outcome::PostgresDied);
        }
        match stopping {
            None if shared.stop.load(Ordering::Acquire) => {
                shared.report.lock().state = State::Stopping;
                stopping = Some(Instant::now());
                postgres.stop_fast();
            }
            Some(since) if since.elapsed() > patience => {
                tracing::warn!("postgres did not end in {patience:?}: it is killed");
                return Ok(Outcome::Stopped);
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if shared.fenced.load(Ordering::Acquire) {
        shared.report.lock().state = State::Fenced;
        return Ok(Outcome::Fenced);
    }
    match proposing.map(Proposing::stop) {
        Some(Err(ProposerError::Fenced(_))) => Ok(Outcome::Fenced),
        Some(Err(error)) => Err(error.into()),
        _ => bail!("the proposer ended without a reason"),
    }
}
