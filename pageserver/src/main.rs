//! The page server's process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pgstrata_blob::{Location, Store};
use pgstrata_env::DirectoryLock;
use pgstrata_identity::Kind;
use pgstrata_listen::{Advertised, Listening, Security, SecurityArguments, address};
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
    /// Another cluster wrote the object store after this one, which took it over: what safekeepers have and what is in
    /// the store need not be one history, so no branch that is there now takes in WAL any more, for good. Each can be
    /// read, and branched off
    #[arg(long)]
    parted: bool,
    /// Endpoint of an S3 server other than AWS, such as http://127.0.0.1:9000
    #[arg(long)]
    s3_endpoint: Option<String>,
    /// Addresses for the HTTP interface, comma-separated; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    listen_http: Vec<SocketAddr>,
    /// Addresses for computes' page requests
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    listen_pages: Vec<SocketAddr>,
    /// Addresses for PostgreSQL's protocol: pg_basebackup
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    listen_pg: Vec<SocketAddr>,
    /// Where computes find the HTTP interface; the broker tells them. A name is looked up anew for each connection, port 0
    /// is the one that is listened on [default: the first address of --listen-http]
    #[arg(long, value_name = "HOST:PORT")]
    advertise_http: Option<Advertised>,
    /// Where computes find the page service [default: the first address of --listen-pages]
    #[arg(long, value_name = "HOST:PORT")]
    advertise_pages: Option<Advertised>,
    /// Where PostgreSQL's protocol is found [default: the first address of --listen-pg]
    #[arg(long, value_name = "HOST:PORT")]
    advertise_pg: Option<Advertised>,
    #[command(flatten)]
    security: SecurityArguments,
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
    pgstrata_listen::log("PGSTRATA_LOG");
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

async fn run(arguments: Arguments) -> Result<()> {
    let limit = raise_limit().context("can't raise the limit on open files")?;
    let security = Security::open(&arguments.security)?;
    security.check_role("a page server", |role| role.kind() == Kind::Pageserver)?;
    let http_port = Listening::bind(&arguments.listen_http, &security)?;
    let pages_port = Listening::bind(&arguments.listen_pages, &security)?;
    let pg_port = Listening::bind(&arguments.listen_pg, &security)?;
    std::fs::create_dir_all(&arguments.dir)
        .with_context(|| format!("can't create the directory {}", arguments.dir.display()))?;
    let _lock = DirectoryLock::take(&arguments.dir, "lock", "page server")?;
    ensure!(arguments.open_layer_mib > 0, "--open-layer-mib must be at least 1");

    let store = Store::open_under(
        &arguments.object_store,
        arguments.s3_endpoint.as_deref(),
        arguments.claim.as_deref(),
    )?;
    if !store.check().await? {
        tracing::warn!(
            "{} ignores conditional writes: nothing stops two page servers from overwriting each \
             other's indexes there. Run one only.",
            store.name()
        );
    }
    // Before anything is taken from whoever has it.
    store.check_claim().await?;
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
    let discovery =
        Arc::new(Discovery::new(arguments.safekeepers, arguments.broker, security.clone()));
    let repository = Repository::open_as(
        source,
        generation,
        limits,
        Arc::clone(&discovery) as _,
        arguments.parted,
    )
    .await?;
    let metrics = Arc::new(Metrics::new()?);
    let addresses = Addresses {
        wal: None,
        pg: Some(pg_port.advertised("pg", arguments.advertise_pg.as_ref())?),
        http: Some(http_port.advertised("http", arguments.advertise_http.as_ref())?),
        pages: Some(pages_port.advertised("pages", arguments.advertise_pages.as_ref())?),
    };
    discovery.start(&repository, safekeepers::node(generation), addresses)?;

    let addresses = serde_json::json!({
        "ready": true,
        "http": http_port.first.to_string(),
        "pages": pages_port.first.to_string(),
        "pg": pg_port.first.to_string(),
    });
    tokio::spawn(pages::serve(
        pages_port.asynchronous()?,
        Arc::clone(&repository),
        Arc::clone(&metrics),
        security.clone(),
    ));
    tokio::spawn(pg::serve(pg_port.asynchronous()?, Arc::clone(&repository), security.clone()));
    let listeners = http_port.asynchronous()?;
    let service = Service::new(Arc::clone(&repository), metrics);
    println!("{addresses}");
    tracing::info!(%generation, "serving: {addresses}");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = http::serve(listeners, service, security) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down");
    tokio::task::spawn_blocking(move || repository.shut_down()).await?;
    Ok(())
}
