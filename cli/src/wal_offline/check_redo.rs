//! `wal check-redo --data DIR --wal DIR`: replays WAL natively over a base backup's files, and compares every page with
//! the image that `wal_consistency_checking` put into the WAL.
//!
//! One thread reads records and derives their effects; the pages are shared out among others, in batches of bounded size
//! through queues of bounded length, so that memory does not depend on how much WAL there is.

use super::jobs::Jobs;
use super::overlay::Overlay;
use super::segments::{SegmentDirectory, Stop, stop_error};
use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pgstrata_ids::Lsn;
use pgstrata_pg_redo::{Batch, ControlState, Counts, Planner, RecordKind, Replayer, Report};
use pgstrata_pg_wal::{ControlFile, PgVersion, record_name};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal as _, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Check native redo against WAL made with `wal_consistency_checking=all`.
#[derive(clap::Args, Debug)]
pub struct CheckRedoArgs {
    /// Data directory: a base backup, or a copy of a stopped cluster. It is only read.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Directory with the WAL segments from the backup's start on.
    #[arg(long, value_name = "DIR")]
    pub wal: PathBuf,
    /// Also compare visibility maps and all-visible flags, which PostgreSQL's own check does not. The maps of databases
    /// made by CREATE DATABASE are not in the WAL: they have no base until a record shows them. Bits that the server had
    /// already cleared for a record that comes later are counted apart.
    #[arg(long)]
    pub strict: bool,
    /// Threads that replay pages; one more reads the WAL. Default: one for each processor.
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// Tell records of a kind apart by the blocks that they refer to and by their flags.
    #[arg(long)]
    pub branches: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// A batch goes to the threads when it has so many bytes of values and images. One record may exceed it.
const BATCH_SIZE: usize = 1 << 20;

#[derive(Serialize)]
struct CountsRow {
    records: u64,
    compared: u64,
    restored: u64,
    mismatches: u64,
}

impl From<Counts> for CountsRow {
    fn from(counts: Counts) -> CountsRow {
        let Counts { records, compared, restored, mismatches } = counts;
        CountsRow { records, compared, restored, mismatches }
    }
}

#[derive(Serialize)]
struct ReportRow {
    version: u32,
    start_lsn: String,
    end_lsn: String,
    records: u64,
    pages_compared: u64,
    pages_without_base: u64,
    mismatches: u64,
    visibility_pending: u64,
    unsupported: u64,
    by_record: BTreeMap<String, CountsRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by_branch: Option<BTreeMap<String, BTreeMap<String, CountsRow>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kinds: Option<Vec<String>>,
    mismatch_list: Vec<String>,
    unsupported_list: Vec<String>,
}

/// Where replay starts: a backup's label says, else the control file.
fn start_lsn(data: &Path, control: &ControlFile) -> anyhow::Result<(Lsn, bool)> {
    let label = data.join("backup_label");
    let text = match std::fs::read_to_string(&label) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((control.checkpoint_copy.redo, false));
        }
        Err(error) => return Err(error).context("cannot read backup_label"),
    };
    let start = text
        .lines()
        .find_map(|line| line.strip_prefix("START WAL LOCATION: "))
        .and_then(|rest| rest.split(' ').next())
        .and_then(|lsn| lsn.parse().ok());
    match start {
        Some(start) => Ok((start, true)),
        None => bail!("{} does not say where the backup starts", label.display()),
    }
}

/// Replays and compares; prints the result to `out`. True if there was no mismatch and nothing unsupported.
pub fn run(args: &CheckRedoArgs, out: &mut dyn Write) -> anyhow::Result<bool> {
    let path = args.data.join("global/pg_control");
    let bytes = std::fs::read(&path)
        .with_context(|| format!("cannot read {}: is it a data directory?", path.display()))?;
    let control = ControlFile::decode(&bytes)?;
    let directory = SegmentDirectory::open(&args.wal)?;
    if directory.version() != control.version {
        bail!("the WAL is of PostgreSQL {}, the data of {}", directory.version(), control.version);
    }
    let (start, is_backup) = start_lsn(&args.data, &control)?;
    let jobs = args.jobs.or_else(|| std::thread::available_parallelism().ok());
    let jobs = jobs.map_or(1, NonZeroUsize::get);
    let mut replayers = Vec::with_capacity(jobs);
    for index in 0..jobs {
        let store = Overlay::new(&args.data, control.version, (index, jobs))
            .context("cannot make a temporary file")?;
        let replayer = Replayer::new(store, args.strict);
        replayers.push(if is_backup { replayer.with_fuzzy_base() } else { replayer });
    }
    let mut planner = Planner::new(ControlState::from_pg_control(&control));
    let progress = progress_bar(directory.bytes_from(start));
    let (jobs, (end, stop)) = Jobs::run(replayers, |jobs| {
        let mut batch = Batch::new(jobs.count());
        let mut reader = directory.reader(Some(start))?;
        let read = reader.for_each(|record| {
            if record.lsn >= start {
                planner.feed(record, &mut batch)?;
            }
            if batch.size() >= BATCH_SIZE {
                progress.set_position(record.end.saturating_sub(start));
                let full = std::mem::replace(&mut batch, Batch::new(jobs.count()));
                return Ok(jobs.send(full));
            }
            Ok(true)
        })?;
        jobs.send(batch);
        Ok(read)
    })?;
    progress.finish_and_clear();
    let mut report = planner.report().clone();
    for replayer in jobs {
        report.merge(replayer.context("cannot keep a page")?.report());
    }
    if report.records == 0 {
        bail!("{} holds no WAL from {start} on", args.wal.display());
    }
    print(args, control.version, &report, start, end, out)?;
    if let Stop::Error(error) = stop {
        return Err(stop_error(&error));
    }
    Ok(report.mismatches == 0 && report.unsupported == 0)
}

/// The kinds of records that a version writes.
fn kinds(version: PgVersion) -> Vec<String> {
    let all = (0..=u8::MAX).flat_map(|rmgr| (0..16).map(move |info| (rmgr, info << 4)));
    all.filter(|(rmgr, info)| record_name(version, *rmgr, *info).is_some())
        .map(|(rmgr, info)| RecordKind::new(version, rmgr, info).to_string())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// On standard error, and only if that is a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{wide_bar} {bytes}/{total_bytes} of WAL, {bytes_per_sec}, {eta} left",
    );
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style)
}

fn print(
    args: &CheckRedoArgs,
    version: PgVersion,
    report: &Report,
    start: Lsn,
    end: Lsn,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    if args.json {
        let rows = |counts: BTreeMap<String, Counts>| {
            counts.into_iter().map(|(name, counts)| (name, counts.into())).collect()
        };
        let by_branch = args.branches.then(|| {
            let by_branch = report.by_branch().into_iter();
            by_branch.map(|(name, branches)| (name, rows(branches))).collect()
        });
        let row = ReportRow {
            version: version.major(),
            start_lsn: start.to_string(),
            end_lsn: end.to_string(),
            records: report.records,
            pages_compared: report.compared,
            pages_without_base: report.without_base,
            mismatches: report.mismatches,
            visibility_pending: report.visibility_pending,
            unsupported: report.unsupported,
            by_record: rows(report.by_record()),
            by_branch,
            kinds: args.branches.then(|| kinds(version)),
            mismatch_list: report.mismatch_list.iter().map(ToString::to_string).collect(),
            unsupported_list: report.unsupported_list.clone(),
        };
        serde_json::to_writer(&mut *out, &row)?;
        writeln!(out)?;
    } else {
        let mut by_branch = report.by_branch();
        for (name, counts) in report.by_record() {
            print_counts(&name, counts, out)?;
            if args.branches {
                let branches = by_branch.remove(&name).unwrap_or_default();
                for (branch, counts) in branches {
                    print_counts(&format!("  {branch}"), counts, out)?;
                }
            }
        }
        for line in &report.unsupported_list {
            writeln!(out, "unsupported: {line}")?;
        }
        for mismatch in &report.mismatch_list {
            writeln!(out, "mismatch: {mismatch}")?;
        }
        writeln!(
            out,
            "{start} to {end}: {} records, {} pages compared, {} without a base, {} mismatches, {} unsupported",
            report.records,
            report.compared,
            report.without_base,
            report.mismatches,
            report.unsupported
        )?;
    }
    out.flush()?;
    Ok(())
}

fn print_counts(name: &str, counts: Counts, out: &mut dyn Write) -> std::io::Result<()> {
    let (records, compared) = (counts.records, counts.compared);
    write!(out, "{name:32} {records:>10} records {compared:>10} compared")?;
    match counts.mismatches {
        0 => writeln!(out),
        mismatches => writeln!(out, " {mismatches:>8} MISMATCHES"),
    }
}
