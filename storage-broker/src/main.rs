//! Soft state: who has which timeline, how far.
//!
//! Owns nothing that can't be lost: nodes publish every second, and go on from what they last knew
//! when the broker is gone.

mod registry;
mod serve;

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Parser;
use pgstrata_identity::Kind;
use pgstrata_listen::{
    HttpLimits, Listening, Security, SecurityArguments, address, raise_descriptor_limit, serve_http,
};
use tokio::signal::unix::{SignalKind, signal};

/// Tells safekeepers and page servers of each other.
///
/// Keeps everything in memory; start and stop it at any time. When the port is bound, one line of
/// JSON goes to standard output: {"ready":true,"http":"127.0.0.1:50051"}
#[derive(Clone, Debug, Parser)]
#[command(name = "storage-broker", version)]
struct Args {
    /// Addresses to listen on, comma-separated. Port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:50051", value_delimiter = ',', value_parser = address)]
    listen: Vec<SocketAddr>,

    #[command(flatten)]
    security: SecurityArguments,
}

fn main() -> ExitCode {
    let args = Args::parse();
    pgstrata_listen::log("PGSTRATA_LOG");
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storage-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        raise_descriptor_limit();
        let security = Security::open(&args.security)?;
        security.check_role("a broker", |role| role.kind() == Kind::Broker)?;
        let listening = Listening::bind(&args.listen, &security)?;
        let ready = serde_json::json!({ "ready": true, "http": listening.first.to_string() });
        println!("{ready}");
        std::io::stdout().flush()?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let limits = HttpLimits::default();
        let served = serve_http(listening.asynchronous()?, limits, security, serve::router());
        tokio::select! {
            () = served => Ok(()),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}
