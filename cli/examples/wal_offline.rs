//! `wal dump` and `wal check-redo` alone, without the services that the `pgstrata` binary carries.

use clap::Parser;
use pgstrata_cli::wal_offline::{check_redo, dump};
use std::process::ExitCode;

#[derive(Parser)]
enum Command {
    Dump(dump::DumpArgs),
    CheckRedo(check_redo::CheckRedoArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    let out = &mut std::io::BufWriter::new(std::io::stdout().lock());
    Ok(match Command::parse() {
        Command::Dump(args) => dump::run(&args, out).map(|()| ExitCode::SUCCESS)?,
        Command::CheckRedo(args) if check_redo::run(&args, out)? => ExitCode::SUCCESS,
        Command::CheckRedo(_) => ExitCode::FAILURE,
    })
}
