//! `doctor`: what about this machine and this cluster endangers a promise.
//!
//! Each check is a function from facts to findings, in a file of its own. Facts are gathered by `here` (a cluster of this
//! machine, or none) and `elsewhere` (one that a file tells of), on threads that are left behind where they hang, in a process
//! that is left behind where these can't be (`child`). Nothing is changed: what is written to measure a disk has no name, and
//! the object store is probed as `up` does.

mod branches;
mod certificates;
mod child;
mod clocks;
mod disks;
mod elsewhere;
mod finding;
mod here;
mod later;
mod limits;
mod machine;
mod mounts;
mod place;
mod processes;
mod programs;
mod services;
mod space;
mod store;
mod syncs;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::Where;
use finding::Report;

/// Longest wait for everything: what has not answered by then does not.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether colours are wanted: by people at a terminal, unless they say so (https://no-color.org).
fn has_colours() -> bool {
    let is_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !is_refused
}

/// Looks, and prints what was found as JSON.
fn look(place: &Where) -> Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    let findings = match place {
        Where::Here(dir) => here::check(dir, deadline)?,
        Where::Elsewhere(file) => elsewhere::check(file, deadline)?,
    };
    let report = Report::of(findings);
    report.print(true, false)?;
    Ok(report.danger == 0)
}

/// `doctor`. False if a promise is in danger. `looks` is whether this is the process that is to look.
pub fn doctor(place: &Where, as_json: bool, looks: bool) -> Result<bool> {
    if looks {
        return look(place);
    }
    let Some(report) = child::report(place)? else { return Ok(false) };
    report.print(as_json, has_colours())?;
    Ok(report.danger == 0)
}
