//! An object store that is slow, refuses or cuts connections, and processes that hang: what does not need them goes on,
//! and what does recovers by itself.
//!
//! `make test` does it for seconds, `make test-all` for as long as real outages last, and prints what it measured.

#![allow(clippy::unwrap_used)]

mod processes;
mod store;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgstrata_tests::installation::Installation;
use pgstrata_tests::{Cluster, programs, thorough};
use postgres::Client;

/// Nobody waits longer for a commit while one process hangs or the object store is away.
const LONGEST_STALL: Duration = Duration::from_secs(2);
/// Of 100 requests that need no object store, 99 are answered within this. Programs that are not optimised, beside
/// other tests, are only held to what tells a request that waits for the store from one that doesn't: less than half of
/// what the store takes, or stays away.
fn longest_p99() -> Duration {
    Duration::from_millis(if optimised() { 100 } else { 2000 })
}

/// How long anything may take to recover that has no figure of its own: above the longest pause between two attempts to
/// archive WAL (60 s), with what an attempt itself may take (30 s).
const RECOVERY: Duration = Duration::from_secs(150);

/// Those who measure do it alone: tests run two at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the programs are those that users run; others start more slowly.
fn optimised() -> bool {
    match std::env::var_os("PGSTRATA_TEST_PROGRAMS").map(PathBuf::from) {
        Some(path) => path.file_name().is_some_and(|name| name == "release"),
        None => !cfg!(debug_assertions),
    }
}

/// How long a start may take that one hung process does not concern.
fn longest_start() -> Duration {
    Duration::from_millis(if optimised() { 1000 } else { 4500 })
}

fn versions(test: fn(&Installation)) {
    let _alone = alone();
    test(&Installation::of(15));
    if thorough() {
        test(&Installation::of(18));
    }
}

/// A table of one row a page, that nobody has read since main's compute was started again.
fn cold_table(client: &mut Client, pages: usize) {
    let text = format!(
        "create table cold (number int, filler text) with (fillfactor = 10);
         insert into cold select g, repeat(md5(g::text), 27) from generate_series(0, {pages} - 1) g;
         vacuum cold; checkpoint"
    );
    text.split(';').for_each(|text| client.batch_execute(text).unwrap());
}

/// The command, to be run on any thread.
fn cluster_command(cluster: &Cluster, arguments: &[&str]) -> Command {
    let mut command = Command::new(programs().join("pgstrata"));
    command.arg("--dir").arg(cluster.dir()).args(arguments);
    command
}
