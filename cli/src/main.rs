//! The `pgstrata` command.

mod auth;
mod branch;
mod claim;
mod cluster;
mod compute;
mod files;
mod found;
mod http;
mod locks;
mod out;
mod owner;
mod page;
mod place;
mod process;
mod status;
mod table;
mod up;
mod wal;
mod way;
mod zones;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use cluster::Cluster;
use nix::sys::stat::Mode;

/// Stock PostgreSQL on a quorum and a page server, with branches of any moment of the past.
///
/// Start with `pgstrata up`, connect to the URI that it prints, and branch with
/// `pgstrata branch create NAME --at LSN-or-TIME`.
#[derive(Parser)]
#[command(name = "pgstrata", version, propagate_version = true)]
struct Arguments {
    /// Directory of the local cluster; with 'auth' that of certificates and keys, and pgstrata-auth unless it is named
    #[arg(long, global = true, env = "PGSTRATA_DIR", default_value = ".pgstrata")]
    dir: PathBuf,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start what is not running: broker, safekeepers, page server, computes
    Up(up::UpArguments),
    /// Stop everything, cleanly
    Down,
    /// Make the first branch of a page server, by initdb, unless it is there: for services that
    /// were not started by 'up'
    Found(found::FoundArguments),
    /// Show processes, branches and computes
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List, create, delete, reset and rename branches
    #[command(subcommand)]
    Branch(BranchVerb),
    /// Start, stop and list computes: stateless stock PostgreSQL servers, one per branch
    #[command(subcommand)]
    Compute(ComputeVerb),
    /// Show a branch's committed end, or the last LSN committed at or before a time
    Lsn {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
        /// A time, such as 2026-01-31T12:00:00Z
        #[arg(long, value_parser = branch::parse_at)]
        at: Option<branch::At>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read single pages as of any LSN
    #[command(subcommand)]
    Page(page::PageVerb),
    /// Make certificates and tokens, by which services, computes and people on several machines know each other
    ///
    /// Everything is kept in the directory that --dir names, pgstrata-auth by default. First of all make a CA in it with
    /// 'init'. Then issue a certificate for each who takes part, and copy its directory to where it runs:
    ///
    ///   pgstrata auth init --dir pki
    ///   pgstrata auth issue --dir pki --role safekeeper --name 1 --host sk1.example.com
    ///   pgstrata auth issue --dir pki --role pageserver --name one --host 10.0.0.7
    ///   pgstrata auth issue --dir pki --role broker --name one --host broker.example.com
    ///   pgstrata auth issue --dir pki --role compute --name TENANT-ID
    ///   pgstrata auth issue --dir pki --role admin --name alice
    ///
    /// A certificate says who its owner is, by a URI such as pgstrata://safekeeper/1, and those who connect verify that, the
    /// host, and that it is of this CA. Certificates of another CA with such URIs do as well.
    #[command(subcommand, verbatim_doc_comment)]
    Auth(auth::AuthVerb),
    /// Decode, verify and check write-ahead log
    #[command(subcommand)]
    Wal(wal::WalVerb),
    /// Compact a branch's layers now
    Compact {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
    },
    /// List a branch's layers
    Layers {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum BranchVerb {
    /// List branches
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Create a branch at a moment of another's past (default: now)
    Create {
        /// Name of the new branch
        name: String,
        /// Branch to start from
        #[arg(long, default_value = "main")]
        from: String,
        /// LSN (0/1A2B3C8) or time (2026-01-31T12:00:00Z)
        #[arg(long, value_parser = branch::parse_at)]
        at: Option<branch::At>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete a branch that has no children and no compute
    Delete {
        /// Branch
        name: String,
    },
    /// Make a branch what its ancestor is, or was at a moment
    Reset {
        /// Branch
        name: String,
        /// LSN or time
        #[arg(long, value_parser = branch::parse_at)]
        at: Option<branch::At>,
    },
    /// Rename a branch
    Rename {
        /// Its name
        old: String,
        /// Its new name
        new: String,
    },
}

#[derive(Subcommand)]
enum ComputeVerb {
    /// Start a PostgreSQL on a branch
    Start(compute::StartArguments),
    /// Stop a branch's PostgreSQL
    Stop {
        /// Branch
        branch: String,
        /// At once: nothing is lost, but clients are cut off
        #[arg(long)]
        immediate: bool,
    },
    /// List computes
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `dir_is_given` is whether the command line names the directory.
fn run(arguments: Arguments, dir_is_given: bool) -> Result<bool> {
    let dir = &arguments.dir;
    let open = || Cluster::open(dir);
    let change = || Cluster::change(dir);
    let done = match arguments.command {
        Verb::Wal(verb) => return wal::run(verb, open),
        // Its directory is no cluster's: what says where that is says nothing of this.
        Verb::Auth(verb) => auth::run(dir_is_given.then_some(dir.as_path()), &verb),
        Verb::Up(up_arguments) => up::up(dir, &up_arguments),
        Verb::Down => up::down(dir),
        Verb::Found(arguments) => found::found(&arguments),
        Verb::Status { json } => status::status(&open()?, json),
        Verb::Branch(verb) => match verb {
            BranchVerb::List { json } => branch::list(&open()?, json),
            BranchVerb::Create { name, from, at, json } => {
                branch::create(&open()?, &name, &from, at.as_ref(), json)
            }
            BranchVerb::Delete { name } => {
                let (mut cluster, _lock) = change()?;
                branch::delete(&mut cluster, &name)
            }
            BranchVerb::Reset { name, at } => {
                let (cluster, _lock) = change()?;
                branch::reset(&cluster, &name, at.as_ref())
            }
            BranchVerb::Rename { old, new } => {
                let (mut cluster, _lock) = change()?;
                branch::rename(&mut cluster, &old, &new)
            }
        },
        Verb::Compute(verb) => match verb {
            ComputeVerb::Start(start) => {
                let (mut cluster, _lock) = change()?;
                compute::start(&mut cluster, &start)
            }
            ComputeVerb::Stop { branch, immediate } => {
                let (mut cluster, _lock) = change()?;
                compute::stop(&mut cluster, &branch, immediate)
            }
            ComputeVerb::List { json } => {
                let cluster = open()?;
                let rows = compute::rows(&cluster, &status::Answers::ask(&cluster));
                match json {
                    true => out::line(&serde_json::Value::Array(rows).to_string()),
                    false => table::print(&["branch", "state", "uri", "start_ms"], &rows),
                }
            }
        },
        Verb::Lsn { branch, at, json } => branch::lsn(&open()?, &branch, at.as_ref(), json),
        Verb::Page(verb) => page::run(&open()?, &verb),
        Verb::Compact { branch } => page::compact(&open()?, &branch),
        Verb::Layers { branch, json } => page::layers(&open()?, &branch, json),
    };
    done.map(|()| true)
}

fn main() -> ExitCode {
    // What this makes, and all that it starts, is for its user alone, as in a data directory of PostgreSQL: layers and WAL
    // are what is in tables. Where another user must get to something, its mode is set.
    nix::sys::stat::umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let matches = Arguments::command().get_matches();
    let dir_is_given = matches.value_source("dir") == Some(ValueSource::CommandLine);
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(arguments, dir_is_given) {
        Ok(true) => ExitCode::SUCCESS,
        // What is wrong was printed.
        Ok(false) => ExitCode::FAILURE,
        // Who reads no more wants no more.
        Err(_) if out::reader_left() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgstrata: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
