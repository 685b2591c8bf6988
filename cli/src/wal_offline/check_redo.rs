//! `wal check-redo --data DIR --wal DIR`: replays WAL natively over a base backup's files, and compares every page with
//! the image that `wal_consistency_checking` put into the WAL.

use super::overlay::Overlay;
use super::segments::{SegmentDirectory, Stop, stop_error};
use anyhow::{Context as _, bail};
use pgstrata_ids::Lsn;
use pgstrata_pg_redo::{CheckError, Checker, ControlState, Report};
use pgstrata_pg_wal::ControlFile;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
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
    /// made by CREATE DATABASE differ then: their contents are not in the WAL. Bits that the server had already cleared
    /// for a record that comes later are counted apart.
    #[arg(long)]
    pub strict: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct CountsRow {
    records: u64,
    compared: u64,
    mismatches: u64,
}

#[derive(Serialize)]
struct ReportRow {
    start_lsn: String,
    end_lsn: String,
    records: u64,
    pages_compared: u64,
    pages_without_base: u64,
    mismatches: u64,
    visibility_pending: u64,
    unsupported: u64,
    by_record: BTreeMap<String, CountsRow>,
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
    let store =
        Overlay::new(&args.data, control.version).context("cannot make a temporary file")?;
    let mut checker = Checker::new(store, ControlState::from_pg_control(&control), args.strict);
    if is_backup {
        checker = checker.with_fuzzy_base();
    }
    let (end, stop) = directory.reader(Some(start))?.for_each(|record| {
        if record.lsn >= start {
            checker.feed(record).map_err(|error| match error {
                CheckError::Wal(error) => anyhow::Error::from(error),
                CheckError::Store(error) => {
                    anyhow::Error::from(error).context("cannot keep a page")
                }
            })?;
        }
        Ok(true)
    })?;
    let report = checker.report();
    if report.records == 0 {
        bail!("{} holds no WAL from {start} on", args.wal.display());
    }
    print(args, &report, start, end, out)?;
    if let Stop::Error(error) = stop {
        return Err(stop_error(&error));
    }
    Ok(report.mismatches == 0 && report.unsupported == 0)
}

fn print(
    args: &CheckRedoArgs,
    report: &Report,
    start: Lsn,
    end: Lsn,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    if args.json {
        let by_record = report.by_record.iter().map(|(name, counts)| {
            let (records, compared) = (counts.records, counts.compared);
            (name.clone(), CountsRow { records, compared, mismatches: counts.mismatches })
        });
        let row = ReportRow {
            start_lsn: start.to_string(),
            end_lsn: end.to_string(),
            records: report.records,
            pages_compared: report.compared,
            pages_without_base: report.without_base,
            mismatches: report.mismatches,
            visibility_pending: report.visibility_pending,
            unsupported: report.unsupported,
            by_record: by_record.collect(),
            mismatch_list: report.mismatch_list.iter().map(ToString::to_string).collect(),
            unsupported_list: report.unsupported_list.clone(),
        };
        serde_json::to_writer(&mut *out, &row)?;
        writeln!(out)?;
    } else {
        for (name, counts) in &report.by_record {
            let (records, compared) = (counts.records, counts.compared);
            write!(out, "{name:32} {records:>10} records {compared:>10} compared")?;
            match counts.mismatches {
                0 => writeln!(out)?,
                mismatches => writeln!(out, " {mismatches:>8} MISMATCHES")?,
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
