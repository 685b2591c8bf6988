//! The process: binds ports, starts services, waits for the end.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use pgstrata_blob::{Location, Store};
use pgstrata_env::{DirectoryLock, Disk, RealDisk};
use pgstrata_format::registration::Registration;
use pgstrata_identity::Role;
use pgstrata_ids::{NodeId, SMALLEST_SEGMENT};
use pgstrata_listen::{Listening, Security, raise_descriptor_limit};
use pgstrata_wire::broker::Addresses;
use tokio::signal::unix::{SignalKind, signal};

use crate::archive::Archive;
use crate::args::Args;
use crate::background::{Background, Known, Lags};
use crate::decisions::Decisions;
use crate::disk_space::DiskSpace;
use crate::http::HttpState;
use crate::latch::{Latch, throw_on_panic};
use crate::meters::Meters;
use crate::pace::Pace;
use crate::pg::PgState;
use crate::registering::Registering;
use crate::segment::Preparer;
use crate::steward::Steward;
use crate::steward::reach::Connections;
use crate::timeline::OpenContext;
use crate::timelines::{Timelines, TimelinesContext};
use crate::{http, identity, pg, wal};

/// Longest name of a zone that the broker takes, in bytes.
const MAX_ZONE: usize = 255;

/// Longest wait at the end for work on other threads.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT, or until writing fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.zone.len() > MAX_ZONE {
        bail!("--zone has {} bytes, at most {MAX_ZONE} are possible", args.zone.len());
    }
    args.space.check()?;
    raise_descriptor_limit();
    let security = Security::open(&args.security)?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    // Before anything in it is read or made: another process may be about to make the same.
    let lock = lock_directory(&args)?;
    let identity =
        identity::load_or_create(disk.as_ref(), &args.dir, args.id.map(NodeId), identity::draw)?;
    let own = identity.member;
    let node = own.node;
    security.check_role(&format!("safekeeper {node}"), |role| *role == Role::Safekeeper(node))?;
    let latch = Latch::default();
    throw_on_panic(&latch);
    let met = Arc::new(identity::met(disk.as_ref(), &args.dir)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let store = open_store(&args)?;
    let decisions = Decisions::new(store.clone(), runtime.handle().clone());
    let preparer = Preparer::start(latch.clone()).context("can't start a thread")?;
    let files: Arc<dyn Disk> = disk;
    let shared = OpenContext {
        own,
        disk: Arc::clone(&files),
        preparer,
        latch: latch.clone(),
        space: DiskSpace::new(Arc::clone(&files), &args.dir, args.space),
        meters: Meters::new().context("can't count")?,
    };
    let archive = Arc::new(Archive::new(store));
    let context = TimelinesContext {
        shared,
        decisions: decisions.clone(),
        archive: Some(Arc::clone(&archive)),
        met,
        has_list: identity.has_list,
        smallest_segment: SMALLEST_SEGMENT,
    };
    let timelines = Arc::new(Timelines::open(context, &args.dir)?);
    if !identity.has_list {
        identity::write(files.as_ref(), &args.dir, own)?;
    }
    if args.forget_peers {
        timelines.forget_peers()?;
    }

    let wal_port = Listening::bind(&args.listen_wal, &security)?;
    let pg_port = Listening::bind(&args.listen_pg, &security)?;
    let http_port = Listening::bind(&args.listen_http, &security)?;
    let ready = serde_json::json!({
        "ready": true,
        "id": node.0,
        "wal": wal_port.first.to_string(),
        "pg": pg_port.first.to_string(),
        "http": http_port.first.to_string(),
    });

    let addresses = Addresses {
        wal: Some(wal_port.advertised("wal", args.advertise_wal.as_ref())?),
        pg: Some(pg_port.advertised("pg", args.advertise_pg.as_ref())?),
        http: Some(http_port.advertised("http", args.advertise_http.as_ref())?),
        pages: None,
    };
    let registration = Registration {
        member: own,
        zone: args.zone.clone(),
        wal: addresses.wal.clone().unwrap_or_default(),
        http: addresses.http.clone().unwrap_or_default(),
    };
    let pace = Arc::new(Pace::new(args.catch_up));
    let served = wal::Served {
        timelines: Arc::clone(&timelines),
        security: security.clone(),
        limits: wal::Limits::default(),
        pace: Arc::clone(&pace),
    };
    wal::serve(wal_port.blocking(), served).context("can't start a thread")?;
    let known = Arc::new(Known::default());
    let lags = Arc::new(Lags::default());
    let background = Background {
        timelines: Arc::clone(&timelines),
        archive: Some(Arc::clone(&archive)),
        broker: args.broker.clone(),
        known: Arc::clone(&known),
        lags: Arc::clone(&lags),
        zone: args.zone.clone(),
        rest_after: Duration::from_secs(args.rest_after),
        tail_after: Duration::from_secs(args.archive_tail_after),
        away_after: Some(args.archive_only_after).filter(|&s| s > 0).map(Duration::from_secs),
        addresses,
        security: security.clone(),
        scrub: args.scrub,
        pace,
    };
    let reach = Connections::new(decisions.clone(), Arc::clone(&known), security.clone());
    let steward = Steward {
        decisions: decisions.clone(),
        archive: Arc::clone(&archive),
        reach: Arc::new(reach),
    };
    let registering = Registering::default();
    let zone = args.zone.clone();
    let state =
        HttpState::new(Arc::clone(&timelines), known, lags, zone, steward, registering.clone());
    let pg_state = PgState {
        timelines: Arc::clone(&timelines),
        archive: Some(archive),
        security: security.clone(),
    };
    let result = runtime.block_on(async {
        tokio::spawn(pg::serve(pg_port.asynchronous()?, pg_state));
        tokio::spawn(http::serve(http_port.asynchronous()?, state, security));
        background.start().context("can't start a thread")?;
        registering.begin(decisions, registration, Arc::clone(&timelines)).await;
        // Whoever reads that it is ready may tell it to end.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        println!("{ready}");
        std::io::stdout().flush()?;
        tokio::select! {
            reason = latch.thrown() => bail!("{reason}"),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::task::spawn_blocking(move || timelines.end()).await??;
        tracing::info!("stopped");
        anyhow::Ok(())
    });
    // What hangs in the object store would be waited for without end.
    runtime.shutdown_timeout(STOP_PATIENCE);
    drop(lock);
    result
}

fn open_store(args: &Args) -> anyhow::Result<Store> {
    let location: Location = args.object_store.parse().context("--object-store")?;
    let store = Store::open_under(&location, args.s3_endpoint.as_deref(), args.claim.as_deref());
    store.context("can't open the object store")
}

/// Keeps a second process out of the directory.
fn lock_directory(args: &Args) -> anyhow::Result<DirectoryLock> {
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("can't create {}", args.dir.display()))?;
    Ok(DirectoryLock::take(&args.dir, "lock", "safekeeper")?)
}
