//! `wal dump --wal DIR`: decoded records, one a line or as JSON.

use super::segments::{SegmentDirectory, Stop, stop_error};
use pgstrata_ids::Lsn;
use pgstrata_pg_redo::RecordKind;
use pgstrata_pg_wal::{DecodedRecord, PgVersion, record_name, rmgr_name};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

/// Decode WAL segments from a directory.
#[derive(clap::Args, Debug)]
pub struct DumpArgs {
    /// Directory of WAL segments, such as `pg_wal` or an archive.
    #[arg(long, value_name = "DIR")]
    pub wal: PathBuf,
    /// First position.
    #[arg(long, value_name = "LSN")]
    pub from: Option<Lsn>,
    /// Stop before this position.
    #[arg(long, value_name = "LSN")]
    pub to: Option<Lsn>,
    /// Print one JSON array.
    #[arg(long)]
    pub json: bool,
}

/// A record in JSON.
#[derive(Serialize)]
struct RecordRow<'a> {
    lsn: String,
    end: String,
    prev: String,
    rmgr: &'a str,
    record: &'a str,
    xid: u32,
    length: u32,
    record_length: u32,
    main_length: usize,
    fpi_length: usize,
    blocks: Vec<BlockRow>,
}

/// A block reference in JSON.
#[derive(Serialize)]
struct BlockRow {
    id: u8,
    rel: String,
    block: u32,
    data_length: usize,
    will_init: bool,
    fpi_length: Option<usize>,
    fpi_applied: bool,
}

impl<'a> RecordRow<'a> {
    fn new(version: PgVersion, record: &DecodedRecord<'_>) -> RecordRow<'a> {
        let header = &record.header;
        let fpi_length = record.images_length();
        let blocks = record.blocks.iter().map(|block| BlockRow {
            id: block.id,
            rel: block.rel.to_string(),
            block: block.block,
            data_length: block.data.len(),
            will_init: block.will_init,
            fpi_length: block.image.map(|image| image.bytes.len()),
            fpi_applied: block.has_applied_image(),
        });
        RecordRow {
            lsn: record.lsn.to_string(),
            end: record.end.to_string(),
            prev: header.prev.to_string(),
            rmgr: rmgr_name(header.rmgr).unwrap_or("custom"),
            record: record_name(version, header.rmgr, header.info).unwrap_or("unknown"),
            xid: header.xid,
            length: header.total_length,
            record_length: header.total_length - fpi_length as u32,
            main_length: record.main_data.len(),
            fpi_length,
            blocks: blocks.collect(),
        }
    }
}

fn print_line(
    version: PgVersion,
    record: &DecodedRecord<'_>,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let header = &record.header;
    let kind = RecordKind { version, rmgr: header.rmgr, info: header.info };
    let (images, total) = (record.images_length(), header.total_length);
    write!(
        out,
        "{} prev {} {kind} xid {} len {}/{total} main {}",
        record.lsn,
        header.prev,
        header.xid,
        total as usize - images,
        record.main_data.len(),
    )?;
    for block in &record.blocks {
        write!(out, " #{} {}:{}", block.id, block.rel, block.block)?;
        if let Some(image) = block.image {
            let purpose = if image.is_applied() { "fpi" } else { "check" };
            write!(out, " {purpose} {}", image.bytes.len())?;
        }
    }
    writeln!(out)
}

/// Prints the records to `out`.
pub fn run(args: &DumpArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let directory = SegmentDirectory::open(&args.wal)?;
    let version = directory.version();
    let mut count = 0u64;
    if args.json {
        out.write_all(b"[")?;
    }
    let (_, stop) = directory.reader(args.from)?.for_each(|record| {
        if args.to.is_some_and(|to| record.lsn >= to) {
            return Ok(false);
        }
        if args.from.is_some_and(|from| record.lsn < from) {
            return Ok(true);
        }
        let decoded = DecodedRecord::decode(record)?;
        if args.json {
            out.write_all(if count > 0 { b",\n" } else { b"\n" })?;
            serde_json::to_writer(&mut *out, &RecordRow::new(version, &decoded))?;
        } else {
            print_line(version, &decoded, out)?;
        }
        count += 1;
        Ok(true)
    })?;
    if args.json {
        out.write_all(b"\n]\n")?;
    }
    out.flush()?;
    match stop {
        Stop::End | Stop::NoSegment => Ok(()),
        Stop::Error(error) => Err(stop_error(&error)),
    }
}
