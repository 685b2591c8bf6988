//! The page server's process.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use pgstrata_blob::{Location, Store, claim};
use pgstrata_listen::loopback;
use pgstrata_pageserver::layer::{BlockCache, Descriptors, LayerSource, raise_limit};
use pgstrata_pageserver::metrics::Metrics;
use pgstrata_pageserver::remote::take_generation;
use pgstrata_pageserver::repository::Repository;
use pgstrata_pageserver::safekeepers::{self, Discovery};
use pgstrata_pageserver::serve::service::Service;
use pgstrata_pageserver::serve::{http, pages, pg};
use pgstrata_pageserver::timeline::Limits;
use pgstrata_wire::broker::Addresses;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

/// Serves pages of PostgreSQL clusters at any LSN of their past.
///
/// Reads committed WAL from safekeepers, keeps layers in object storage, and answers computes.
/// The local directory is a cache: delete it at any time.
#[derive(Parser)]
#[command(version, name = "pageserver")]
struct Arguments {
    /// Directory of local copies of layers (a cache)
    #[arg(long)]
    dir: PathBuf,
    /// Object storage: a directory, or s3://bucket/prefix with the usual AWS_* variables
    #[arg(long)]
    object_store: Location,
    /// Token of the claim on the object store: if that is another's, this page server does not start
    #[arg(long)]
    claim: Option<String>,
    /// Endpoint of an S3 server other than AWS, such as http://127.0.0.1:9000
    #[arg(long)]
    s3_endpoint: Option<String>,
    /// Address for the HTTP interface; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0", value_parser = loopback)]
    listen_http: SocketAddr,
    /// Address for computes' page requests
    #[arg(long, default_value = "127.0.0.1:0", value_parser = loopback)]
    listen_pages: SocketAddr,
    /// Address for PostgreSQL's protocol: pg_basebackup
    #[arg(long, default_value = "127.0.0.1:0", value_parser = loopback)]
    listen_pg: SocketAddr,
    /// Replication addresses of safekeepers, comma-separated, used beside the broker's
    #[arg(long, value_delimiter = ',')]
    safekeepers: Vec<String>,
    /// URL of the storage broker, which knows the safekeepers
    #[arg(long)]
    broker: Option<String>,
    /// An open layer is written out at this many MiB
    #[arg(long, default_value_t = 64)]
    open_layer_mib: usize,
    /// An open layer is written out after this many seconds
    #[arg(long, default_value_t = 30)]
    open_layer_seconds: u64,
    /// Memory for unpacked blocks of layers, in MiB
    #[arg(long, default_value_t = 256)]
    cache_mib: u64,
}

/// Longest wait at the end for work on other threads.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("PGSTRATA_LOG")
                .unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    if let Err(error) = pgstrata_blob::hide_credentials() {
        eprintln!("pageserver: can't keep the object store's credentials to itself: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pageserver: can't start the asynchronous runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(arguments));
    // What hangs in the object store would be waited for without end.
    runtime.shutdown_timeout(STOP_PATIENCE);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pageserver: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("can't listen on {address}"))
}

fn asynchronous(listener: TcpListener) -> Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    Ok(tokio::net::TcpListener::from_std(listener)?)
}

/// One page server a directory; the lock ends with its holder, however that ends.
fn lock(dir: &std::path::Path) -> Result<std::fs::File> {
    let path = dir.join("lock");
    let file = open_lock_file(&path).with_context(|| format!("can't open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another page server is running in {}", dir.display())
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

async fn run(arguments: Arguments) -> Result<()> {
    let limit = raise_limit().context("can't raise the limit on open files")?;
    let http_listener = bind(arguments.listen_http)?;
    let pages_listener = bind(arguments.listen_pages)?;
    let pg_listener = bind(arguments.listen_pg)?;
    std::fs::create_dir_all(&arguments.dir)
        .with_context(|| format!("can't create the directory {}", arguments.dir.display()))?;
    let _lock = lock(&arguments.dir)?;
    ensure!(arguments.open_layer_mib > 0, "--open-layer-mib must be at least 1");

    let store = Store::open(&arguments.object_store, arguments.s3_endpoint.as_deref())?;
    if !store.check().await? {
        tracing::warn!(
            "{} ignores conditional writes: nothing stops two page servers from overwriting each \
             other's indexes there. Run one only.",
            store.name()
        );
    }
    // Before anything is taken from whoever has it.
    if let Some(token) = &arguments.claim {
        claim::check(&store, token).await?;
    }
    let generation = take_generation(&store).await?;
    let source = Arc::new(LayerSource {
        store,
        runtime: Handle::current(),
        cache: BlockCache::new(arguments.cache_mib << 20),
        descriptors: Descriptors::for_limit(limit),
        directory: arguments.dir.join("layers"),
        downloaded: AtomicU64::new(0),
    });
    let limits = Limits {
        open_layer_bytes: arguments.open_layer_mib << 20,
        open_layer_seconds: arguments.open_layer_seconds,
        ..Limits::default()
    };
    let discovery = Arc::new(Discovery::new(arguments.safekeepers, arguments.broker));
    let repository =
        Repository::open(source, generation, limits, Arc::clone(&discovery) as _).await?;
    let metrics = Arc::new(Metrics::new()?);
    let addresses = Addresses {
        wal: None,
        pg: Some(pg_listener.local_addr()?.to_string()),
        http: Some(http_listener.local_addr()?.to_string()),
        pages: Some(pages_listener.local_addr()?.to_string()),
    };
    discovery.start(&repository, safekeepers::node(generation), addresses)?;

    let addresses = serde_json::json!({
        "ready": true,
        "http": http_listener.local_addr()?.to_string(),
        "pages": pages_listener.local_addr()?.to_string(),
        "pg": pg_listener.local_addr()?.to_string(),
    });
    tokio::spawn(pages::serve(
        asynchronous(pages_listener)?,
        Arc::clone(&repository),
        Arc::clone(&metrics),
    ));
    tokio::spawn(pg::serve(asynchronous(pg_listener)?, Arc::clone(&repository)));
    let listener = asynchronous(http_listener)?;
    let service = Service::new(Arc::clone(&repository), metrics);
    println!("{addresses}");
    tracing::info!(%generation, "serving: {addresses}");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = http::serve(listener, service) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down");
    tokio::task::spawn_blocking(move || repository.shut_down()).await?;
    Ok(())
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
