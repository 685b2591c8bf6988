//! The `pgstrata` command.

mod auth;
mod branch;
mod claim;
mod cluster;
mod cluster_file;
mod compute;
mod doctor;
mod export;
mod files;
mod found;
mod http;
mod locks;
mod members;
mod out;
mod owner;
mod page;
mod place;
mod process;
mod remote;
mod remote_status;
mod services;
mod status;
mod table;
mod up;
mod wal;
mod wal_copies;
mod way;
mod zones;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use cluster::{Cluster, Lock};
use nix::sys::stat::Mode;
use remote::Remote;
use services::Services;

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
    /// File of a cluster on other machines, as 'cluster export' writes it, instead of a local one
    ///
    /// It says where the broker is, and names a certificate or has a token that is shown to services. With it every command works
    /// but those about processes on this machine: up, down and compute. In the environment it counts less than --dir on the
    /// command line.
    #[arg(long, global = true, value_name = "FILE", env = "PGSTRATA_CLUSTER", value_parser = any_path())]
    cluster: Option<PathBuf>,
    #[command(subcommand)]
    command: Verb,
}

/// A path, or an empty text: that is how a variable is set to nothing.
fn any_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

#[derive(Subcommand)]
enum Verb {
    /// Start what is not running: broker, safekeepers, page server, computes
    Up(up::UpArguments),
    /// Stop everything, cleanly
    Down,
    /// Make the first branch of a page server, by initdb, unless it is there: for services that
    /// were not started by 'up'
    ///
    /// The superuser is 'postgres'. His password is that of the environment variable POSTGRES_PASSWORD; without it he has
    /// none, and connects only where none is asked for.
    Found(found::FoundArguments),
    /// Write a file by which this command finds a cluster from another machine
    #[command(subcommand)]
    Cluster(export::ClusterVerb),
    /// Show processes, branches and computes
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Tell what about this machine and this cluster endangers a promise; exit 1 if anything does
    ///
    /// The promises: nothing is lost that a client was told is committed, there are branches of any moment of the past, a
    /// compute starts anywhere, and what is kept can be taken away as a plain data directory. Looked at are
    ///
    ///   mounts        what a directory is on: memory, an overlay, a network, read-only, without barriers
    ///   disks         whether a majority of the safekeepers is on one
    ///   write caches  what the kernel knows of them; syncs: how long one takes, measured with some hundred small writes
    ///   space         free bytes and files
    ///   clocks        those of services against this machine's
    ///   zones         of safekeepers
    ///   certificates  until when they are valid, and who can read their keys; tokens
    ///   limits        of running services, and of the kernel
    ///   programs      PostgreSQL 15 to 18, its user, the services
    ///   services, store, branches, settings: what 'status' knows, and whether the object store takes writes
    ///
    /// Each finding is a 'danger' (a promise is broken, or will be by a restart, a full disk or a date), a 'warning' (it
    /// holds, with less behind it than there could be: all safekeepers on one disk, as 'up' has them on a laptop), 'unknown'
    /// (not looked at, or not to be seen from here) or 'ok'. It exits with 1 where there is a danger, whatever else there is,
    /// and with 0 otherwise.
    ///
    /// With --cluster it looks at what services elsewhere say, and at those of them that run on this machine: run it on each
    /// machine. Where no cluster is in --dir, it looks at the machine and that directory only.
    #[command(verbatim_doc_comment)]
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// This is the process that looks, of another that reads its report
        #[arg(long, hide = true)]
        look: bool,
    },
    /// List, create, delete, reset and rename branches
    #[command(subcommand)]
    Branch(BranchVerb),
    /// List safekeepers, and change who keeps the WAL
    ///
    /// Every branch has members that keep its WAL, three at first. A change is made branch by branch, while computes write:
    /// newcomers get what is committed, then both groups commit together, then the new one does. A command that was
    /// interrupted is given again, and goes on.
    #[command(subcommand)]
    Safekeeper(members::SafekeeperVerb),
    /// Show who keeps a branch's WAL
    #[command(subcommand)]
    Quorum(members::QuorumVerb),
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

/// Where the cluster is that a command is about.
#[derive(Debug, PartialEq)]
enum Where {
    /// In this directory.
    Here(PathBuf),
    /// This file tells.
    Elsewhere(PathBuf),
}

/// The one that was given most plainly: on the command line, where only one of the two is; then in the environment.
fn find(matches: &ArgMatches, arguments: &Arguments) -> Result<Where, clap::Error> {
    let is_typed = |name| matches.value_source(name) == Some(ValueSource::CommandLine);
    let refused = "the argument '--cluster <FILE>' cannot be used with '--dir <DIR>'";
    match (is_typed("dir"), is_typed("cluster"), &arguments.cluster) {
        (true, true, _) => Err(Arguments::command().error(ErrorKind::ArgumentConflict, refused)),
        (false, _, Some(file)) if !file.as_os_str().is_empty() => {
            Ok(Where::Elsewhere(file.clone()))
        }
        _ => Ok(Where::Here(arguments.dir.clone())),
    }
}

impl Where {
    /// For what starts, stops or looks at processes.
    fn here(&self, what: &str) -> Result<&Path> {
        match self {
            Where::Here(dir) => Ok(dir),
            Where::Elsewhere(file) => bail!(
                "'{what}' is about processes on this machine, and {} is a cluster elsewhere: leave out --cluster, and unset \
                 PGSTRATA_CLUSTER",
                file.display()
            ),
        }
    }

    fn services(&self) -> Result<Box<dyn Services>> {
        Ok(match self {
            Where::Here(dir) => Box::new(Cluster::open(dir)?),
            Where::Elsewhere(file) => Box::new(Remote::open(file)?),
        })
    }
}

fn branch(verb: BranchVerb, place: &Where) -> Result<()> {
    let change = |dir| Cluster::change(dir);
    match (verb, place) {
        (BranchVerb::List { json }, place) => branch::list(place.services()?.as_ref(), json),
        (BranchVerb::Create { name, from, at, json }, Where::Here(dir)) => {
            let cluster = Cluster::open(dir)?;
            branch::make_room(&cluster, &name)?;
            branch::create(&cluster, &name, &from, at.as_ref(), json)
        }
        (BranchVerb::Create { name, from, at, json }, Where::Elsewhere(file)) => {
            branch::create(&Remote::open(file)?, &name, &from, at.as_ref(), json)
        }
        (BranchVerb::Delete { name }, Where::Here(dir)) => {
            let (mut cluster, _lock) = change(dir)?;
            branch::delete(&mut cluster, &name)
        }
        (BranchVerb::Delete { name }, Where::Elsewhere(file)) => {
            branch::delete_remote(&Remote::open(file)?, &name)
        }
        (BranchVerb::Reset { name, at }, Where::Here(dir)) => {
            let (cluster, _lock) = change(dir)?;
            branch::reset(&cluster, &name, at.as_ref())
        }
        (BranchVerb::Reset { name, at }, Where::Elsewhere(file)) => {
            branch::reset_remote(&Remote::open(file)?, &name, at.as_ref())
        }
        (BranchVerb::Rename { old, new }, Where::Here(dir)) => {
            let (mut cluster, _lock) = change(dir)?;
            branch::rename(&mut cluster, &old, &new)
        }
        (BranchVerb::Rename { old, new }, Where::Elsewhere(file)) => {
            branch::rename_remote(&Remote::open(file)?, &old, &new)
        }
    }
}

fn compute(verb: ComputeVerb, place: &Where) -> Result<()> {
    match verb {
        ComputeVerb::Start(start) => {
            let (mut cluster, _lock) = Cluster::change(place.here("compute start")?)?;
            compute::start(&mut cluster, &start)
        }
        ComputeVerb::Stop { branch, immediate } => {
            let (mut cluster, _lock) = Cluster::change(place.here("compute stop")?)?;
            compute::stop(&mut cluster, &branch, immediate)
        }
        ComputeVerb::List { json } => {
            let cluster = Cluster::open(place.here("compute list")?)?;
            let rows = compute::rows(&cluster, &status::Answers::ask(&cluster));
            match json {
                true => out::line(&serde_json::Value::Array(rows).to_string()),
                false => table::print(&["branch", "state", "uri", "start_ms"], &rows),
            }
        }
    }
}

/// `auth_dir` is the directory that the command line names, if it does.
fn run(command: Verb, place: &Where, auth_dir: Option<&Path>) -> Result<bool> {
    let services = || place.services();
    let done = match command {
        Verb::Wal(verb) => return wal::run(verb, services),
        Verb::Doctor { json, look } => return doctor::doctor(place, json, look),
        // Its directory is no cluster's: what says where that is says nothing of this.
        Verb::Auth(verb) => auth::run(auth_dir, &verb),
        Verb::Cluster(export::ClusterVerb::Export(arguments)) => {
            export::export(&arguments, || Cluster::open(place.here("cluster export")?))
        }
        Verb::Up(up_arguments) => up::up(place.here("up")?, &up_arguments),
        Verb::Down => up::down(place.here("down")?),
        Verb::Found(arguments) => match (place, &arguments.pageserver_http) {
            (Where::Elsewhere(file), None) => found::found(&arguments, Some(&Remote::open(file)?)),
            (Where::Here(_), None) => {
                let missing =
                    "a page server is needed: --pageserver-http <HOST:PORT>, or --cluster <FILE>";
                Arguments::command().error(ErrorKind::MissingRequiredArgument, missing).exit()
            }
            _ => found::found(&arguments, None),
        },
        Verb::Status { json } => match place {
            Where::Here(dir) => status::status(&Cluster::open(dir)?, json),
            Where::Elsewhere(file) => remote_status::status(&Remote::open(file)?, json),
        },
        Verb::Branch(verb) => branch(verb, place),
        Verb::Compute(verb) => compute(verb, place),
        Verb::Safekeeper(members::SafekeeperVerb::List { json }) => {
            members::list(services()?.as_ref(), json)
        }
        Verb::Safekeeper(verb) => match place {
            Where::Here(dir) => members::run_here(dir, verb),
            Where::Elsewhere(file) => members::run_elsewhere(&Remote::open(file)?, &verb),
        },
        Verb::Quorum(members::QuorumVerb::Show { branch, json }) => {
            members::show(services()?.as_ref(), &branch, json)
        }
        Verb::Quorum(members::QuorumVerb::Recover { branch, accept_loss }) => match place {
            Where::Here(dir) => {
                Cluster::open(dir)?;
                let _members = Lock::take_for_members(dir)?;
                // To its end, unlike changes of members: nobody who is about to be given up is to be started meanwhile.
                let (mut cluster, _lock) = Cluster::change(dir)?;
                members::recover_here(&mut cluster, &branch, accept_loss)
            }
            Where::Elsewhere(file) => members::recover(&Remote::open(file)?, &branch, accept_loss),
        },
        Verb::Lsn { branch, at, json } => {
            branch::lsn(services()?.as_ref(), &branch, at.as_ref(), json)
        }
        Verb::Page(verb) => page::run(services()?.as_ref(), &verb),
        Verb::Compact { branch } => page::compact(services()?.as_ref(), &branch),
        Verb::Layers { branch, json } => page::layers(services()?.as_ref(), &branch, json),
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
    let place = find(&matches, &arguments).unwrap_or_else(|error| error.exit());
    let auth_dir = dir_is_given.then_some(arguments.dir.as_path());
    match run(arguments.command, &place, auth_dir) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn found(arguments: &[&str]) -> Result<Where, clap::Error> {
        let matches =
            Arguments::command().try_get_matches_from([&["pgstrata"], arguments].concat())?;
        find(&matches, &Arguments::from_arg_matches(&matches)?)
    }

    #[test]
    fn a_cluster_is_here_or_elsewhere() {
        let here = |dir: &str| Where::Here(dir.into());
        let elsewhere = || Where::Elsewhere("x.toml".into());
        for (arguments, expected) in [
            (&["lsn"][..], here(".pgstrata")),
            (&["--dir", "d", "lsn"], here("d")),
            (&["--cluster", "x.toml", "lsn"], elsewhere()),
            (&["branch", "list", "--cluster", "x.toml"], elsewhere()),
            (&["--cluster", "", "lsn"], here(".pgstrata")),
        ] {
            assert_eq!(found(arguments).unwrap(), expected, "{arguments:?}");
        }
        let both = found(&["--cluster", "x.toml", "lsn", "--dir", "d"]).unwrap_err();
        assert_eq!((both.kind(), both.exit_code()), (ErrorKind::ArgumentConflict, 2));
        let error = elsewhere().here("up").unwrap_err().to_string();
        assert!(
            error.starts_with("'up' is about") && error.contains("leave out --cluster"),
            "{error}"
        );
    }
}
