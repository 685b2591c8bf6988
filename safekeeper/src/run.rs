//! The process: binds ports, starts services, waits for the end.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use pgstrata_blob::Location;
use pgstrata_env::{Disk, RealDisk};
use pgstrata_ids::NodeId;
use pgstrata_wire::broker::Addresses;
use tokio::signal::unix::{SignalKind, signal};

use crate::archive::Archive;
use crate::args::Args;
use crate::background::{Background, Known};
use crate::http::HttpState;
use crate::latch::{Latch, throw_on_panic};
use crate::members::Members;
use crate::pg::PgState;
use crate::segment::Preparer;
use crate::timeline::OpenContext;
use crate::timelines::Timelines;
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
    let disk = Arc::new(RealDisk);
    // Before anything in it is read or made: another process may be about to make the same.
    let lock = lock_directory(&args)?;
    let own = identity::load_or_create(disk.as_ref(), &args.dir, args.id.map(NodeId))?;
    let node = own.node;
    let latch = Latch::default();
    throw_on_panic(&latch);
    let members = Members::open(own, Arc::clone(&disk) as Arc<dyn Disk>, &args.dir, latch.clone())?;
    let members = Arc::new(members);
    let preparer = Preparer::start(latch.clone()).context("can't start a thread")?;
    let context = OpenContext { node, members, disk, preparer, latch: latch.clone() };
    let timelines = Arc::new(Timelines::open(context, &args.dir)?);

    let bind =
        |address| TcpListener::bind(address).with_context(|| format!("can't listen on {address}"));
    let wal_listener = bind(args.listen_wal)?;
    let pg_listener = bind(args.listen_pg)?;
    let http_listener = bind(args.listen_http)?;
    let wal_address = wal_listener.local_addr()?.to_string();
    let ready = serde_json::json!({
        "ready": true,
        "id": node.0,
        "wal": wal_address,
        "pg": pg_listener.local_addr()?.to_string(),
        "http": http_listener.local_addr()?.to_string(),
    });

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    wal::serve(wal_listener, Arc::clone(&timelines), wal::Limits::default())
        .context("can't start a thread")?;
    let archive = open_archive(&args)?;
    let known = Arc::new(Known::default());
    let background = Background {
        timelines: Arc::clone(&timelines),
        archive: archive.clone(),
        broker: args.broker.clone(),
        known: Arc::clone(&known),
        zone: args.zone.clone(),
        addresses: Addresses {
            wal: Some(wal_address),
            pg: Some(pg_listener.local_addr()?.to_string()),
            http: Some(http_listener.local_addr()?.to_string()),
            pages: None,
        },
    };
    let state = HttpState::new(Arc::clone(&timelines), known, args.zone.clone());
    let pg_state = PgState { timelines: Arc::clone(&timelines), archive };
    let result = runtime.block_on(async {
        pg_listener.set_nonblocking(true)?;
        let pg_listener = tokio::net::TcpListener::from_std(pg_listener)?;
        tokio::spawn(pg::serve(pg_listener, pg_state));
        http_listener.set_nonblocking(true)?;
        let http_listener = tokio::net::TcpListener::from_std(http_listener)?;
        tokio::spawn(http::serve(http_listener, state));
        background.start();
        println!("{ready}");
        std::io::stdout().flush()?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            reason = latch.thrown() => bail!("{reason}"),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        for timeline in timelines.all() {
            timeline.checkpoint()?;
        }
        tracing::info!("stopped");
        anyhow::Ok(())
    });
    // What hangs in the object store would be waited for without end.
    runtime.shutdown_timeout(STOP_PATIENCE);
    drop(lock);
    result
}

fn open_archive(args: &Args) -> anyhow::Result<Option<Arc<Archive>>> {
    let Some(location) = &args.object_store else { return Ok(None) };
    let location: Location = location.parse().context("--object-store")?;
    let archive = Archive::open(&location, args.s3_endpoint.as_deref());
    let archive = archive.context("can't open the object store")?;
    Ok(Some(Arc::new(archive.under(args.claim.clone()))))
}

/// Keeps a second process out of the directory.
fn lock_directory(args: &Args) -> anyhow::Result<std::fs::File> {
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("can't create {}", args.dir.display()))?;
    let path = args.dir.join("lock");
    let file = open_lock_file(&path).with_context(|| format!("can't open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another safekeeper is running in {}", args.dir.display())
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("can't lock {}", path.display()))
        }
    }
}

/// Whoever put a pipe or a link in its place gets a refusal: a pipe would be waited for, and what a
/// link names is not ours to lock.
fn open_lock_file(path: &std::path::Path) -> std::io::Result<std::fs::File> {
    use rustix::fs::OFlags;
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).custom_flags(flags.bits() as i32);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::other("it is no regular file: remove it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s4_a_pipe_in_the_place_of_the_lock_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        // Also one that somebody reads, which can be opened.
        for is_read in [false, true] {
            let reader = is_read.then(|| reader_of(&path));
            let (done, answer) = std::sync::mpsc::channel();
            let to_open = path.clone();
            std::thread::spawn(move || done.send(open_lock_file(&to_open).is_err()));
            assert!(answer.recv_timeout(Duration::from_secs(20)).unwrap(), "read: {is_read}");
            drop(reader);
        }
        std::fs::remove_file(&path).unwrap();
        open_lock_file(&path).unwrap();
    }

    fn reader_of(path: &std::path::Path) -> std::fs::File {
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        std::fs::OpenOptions::new().read(true).custom_flags(nonblock).open(path).unwrap()
    }
}
