//! The safekeeper: durable WAL, one member of a quorum.

use std::process::ExitCode;

use clap::Parser;
use pgstrata_safekeeper::args::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    pgstrata_listen::log("RUST_LOG");
    if let Err(error) = pgstrata_blob::hide_credentials() {
        eprintln!("safekeeper: can't keep the object store's credentials to itself: {error}");
        return ExitCode::FAILURE;
    }
    match pgstrata_safekeeper::run::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("safekeeper: {error:#}");
            ExitCode::FAILURE
        }
    }
}
