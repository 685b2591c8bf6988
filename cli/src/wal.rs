//! `wal dump`, `wal verify`, `wal check-redo`.

use std::cell::RefCell;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgstrata_blob::{Location, Store};
use pgstrata_cli::wal_offline::{check_redo, dump};
use pgstrata_compute_shim::proposer::SafekeeperClient;
use pgstrata_format::archived::MAX_SIZE as MAX_EXTENT;
use pgstrata_ids::{Lsn, TenantId, Term, TimelineId};
use pgstrata_pg_wal::{PgVersion, WalDecoder};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cluster_file::Archive;
use crate::out::Out;
use crate::services::{Services, WalPlaces};
use crate::{branch, http, wal_copies};

const TIMEOUT: Duration = Duration::from_secs(30);
/// WAL asked for at once.
const PIECE: u64 = 4 << 20;

/// Verbs of `wal`.
#[derive(clap::Subcommand)]
pub enum WalVerb {
    /// Print decoded records, of a branch or of a directory of segments
    Dump {
        /// Branch
        #[arg(long, default_value = "main", conflicts_with = "wal")]
        branch: String,
        /// Directory of WAL segments, instead of a branch
        #[arg(long, value_name = "DIR")]
        wal: Option<PathBuf>,
        /// First position [default: the start of the last segment]
        #[arg(long)]
        from: Option<Lsn>,
        /// Stop before this position [default: the end]
        #[arg(long)]
        to: Option<Lsn>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check a branch's WAL end to end: every checksum, every back link
    Verify {
        /// Branch [default: main; with --all, every branch]
        #[arg(long)]
        branch: Option<String>,
        /// Look at every copy: that of each safekeeper, and the archive's
        #[arg(long, conflicts_with_all = ["from", "to"])]
        all: bool,
        /// First position [default: the branch's first]
        #[arg(long)]
        from: Option<Lsn>,
        /// Last position [default: the end]
        #[arg(long)]
        to: Option<Lsn>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Replay a backup natively and compare with the images that PostgreSQL put into its WAL
    CheckRedo(check_redo::CheckRedoArgs),
}

/// The name of a segment's file, on PostgreSQL's timeline 1.
fn segment_name(number: u64, segment_size: u64) -> String {
    let per_high = (1u64 << 32) / segment_size;
    format!("{:08X}{:08X}{:08X}", 1, number / per_high, number % per_high)
}

/// The object of a timeline's segment.
pub fn object_name(
    (tenant, timeline): (TenantId, TimelineId),
    number: u64,
    segment_size: u64,
) -> String {
    format!("tenants/{tenant}/timelines/{timeline}/wal/{}.zst", segment_name(number, segment_size))
}

/// A segment's object; `None` if it is not there.
pub fn fetch_object(archive: &Archive, object: &str, segment_size: u64) -> Result<Option<Vec<u8>>> {
    let (location, endpoint) = archive;
    let location: Location = location.parse()?;
    // A frame of a segment that can't be compressed, its checksum, and what it says of itself.
    let limit = zstd::zstd_safe::compress_bound(segment_size as usize) as u64 + 4 + MAX_EXTENT;
    http::block_on(async {
        let store = Store::open(&location, endpoint.as_deref())?;
        match store.get(object, limit).await {
            Ok(bytes) => Ok(Some(bytes.to_vec())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
}

/// The object of the beginning of a segment, up to `end`.
pub fn tail_name(
    (tenant, timeline): (TenantId, TimelineId),
    end: Lsn,
    segment_size: u64,
) -> String {
    let segment = object_name((tenant, timeline), end.segment_number(segment_size), segment_size);
    let (directory, name) = segment.rsplit_once('/').unwrap_or_default();
    format!("{directory}/tail/{}.{:016X}.zst", name.trim_end_matches(".zst"), end.0)
}

/// The WAL in the object of a tail, which has so many bytes; an error says that it is damaged.
pub fn unpack_tail(object: &str, packed: &[u8], length: usize) -> Result<Vec<u8>> {
    let tail = zstd::bulk::decompress(packed, length)
        .with_context(|| format!("'{object}' is damaged: restore it from a copy"))?;
    ensure!(tail.len() == length, "'{object}' is damaged: {} bytes, not {length}", tail.len());
    Ok(tail)
}

/// The segment in an object; an error says that it is damaged.
pub fn unpack(object: &str, packed: &[u8], segment_size: u64) -> Result<Vec<u8>> {
    let segment = zstd::bulk::decompress(packed, segment_size as usize)
        .with_context(|| format!("'{object}' is damaged: restore it from a copy"))?;
    ensure!(
        segment.len() as u64 == segment_size,
        "'{object}' is damaged: {} bytes, not {segment_size}; restore it from a copy",
        segment.len(),
    );
    Ok(segment)
}

/// A branch's committed WAL, as safekeepers and the archive have it.
struct BranchWal {
    tenant: TenantId,
    timeline: TimelineId,
    start: Lsn,
    start_prev: Lsn,
    end: Lsn,
    segment_size: u64,
    version: PgVersion,
    places: Rc<WalPlaces>,
    /// The last segment fetched from there, and its number.
    fetched: RefCell<Option<(u64, Vec<u8>)>>,
    /// Whose WAL is before `start`.
    ancestor: Option<Box<BranchWal>>,
}

impl BranchWal {
    fn open(services: &dyn Services, name: &str) -> Result<BranchWal> {
        let places = Rc::new(services.wal_places()?);
        BranchWal::open_in(services, &places, name)
    }

    fn open_in(services: &dyn Services, places: &Rc<WalPlaces>, name: &str) -> Result<BranchWal> {
        let row = branch::get(services, name)?;
        let committed = services.committed(&row)?;
        let ancestor = match &row.ancestor {
            Some(ancestor) => Some(Box::new(BranchWal::open_in(services, places, ancestor)?)),
            None => None,
        };
        Ok(BranchWal {
            ancestor,
            tenant: row.tenant_id,
            timeline: row.timeline_id,
            start: row.start_lsn,
            start_prev: row.start_prev,
            end: row.last_record_lsn.max(committed.unwrap_or_default()),
            segment_size: row.segment_size,
            version: PgVersion::from_major(row.pg_version)
                .context("the branch has no supported version")?,
            places: Rc::clone(places),
            fetched: RefCell::default(),
        })
    }

    /// Reads `[from, to)`; from the ancestor what is its.
    fn read(&self, from: Lsn, to: Lsn) -> Result<Vec<u8>> {
        if let Some(ancestor) = &self.ancestor
            && from < self.start
        {
            let mut bytes = ancestor.read(from, to.min(self.start))?;
            if to > self.start {
                bytes.extend(self.read(self.start, to)?);
            }
            return Ok(bytes);
        }
        let mut bytes = Vec::new();
        let mut at = from;
        while at < to {
            let next = (at.segment_start(self.segment_size) + self.segment_size).min(to);
            bytes.extend(self.read_within_segment(at, next)?);
            at = next;
        }
        Ok(bytes)
    }

    /// Reads from the first safekeeper that has it, else from the archive.
    fn read_within_segment(&self, from: Lsn, to: Lsn) -> Result<Vec<u8>> {
        let number = from.segment_number(self.segment_size);
        let of_segment = |segment: &[u8]| {
            let at = from.segment_offset(self.segment_size) as usize;
            segment[at..at + (to - from) as usize].to_vec()
        };
        if let Some((fetched, segment)) = &*self.fetched.borrow()
            && *fetched == number
        {
            return Ok(of_segment(segment));
        }
        let mut reasons = Vec::new();
        for (node, address) in &self.places.safekeepers {
            let read = || -> std::io::Result<Vec<u8>> {
                let identity = self.places.identity.as_ref();
                let mut client = SafekeeperClient::connect(address, *node, identity, TIMEOUT)?;
                client.open(self.tenant, self.timeline)?;
                let mut bytes = Vec::new();
                let end = client.read_wal(from, to, Term(0), &mut bytes)?;
                match end == to {
                    true => Ok(bytes),
                    false => Err(std::io::Error::other(format!("it has WAL only up to {end}"))),
                }
            };
            match read() {
                Ok(bytes) => return Ok(bytes),
                Err(error) => reasons.push(format!("{address}: {error}")),
            }
        }
        let Some(archive) = &self.places.archive else {
            bail!(
                "no safekeeper has WAL from {from} to {to} ({}): what they no longer keep is in the object store, which the                  cluster's file can name ('object_store')",
                reasons.join("; ")
            );
        };
        match self.fetch_segment(archive, number)? {
            Some(segment) => {
                let bytes = of_segment(&segment);
                *self.fetched.borrow_mut() = Some((number, segment));
                Ok(bytes)
            }
            None => bail!(
                "neither a safekeeper nor {} has WAL from {from} to {to} ({})",
                archive.0,
                reasons.join("; ")
            ),
        }
    }

    /// A full segment from object storage; `None` if it is not there.
    fn fetch_segment(&self, archive: &Archive, number: u64) -> Result<Option<Vec<u8>>> {
        let object = object_name((self.tenant, self.timeline), number, self.segment_size);
        let packed = fetch_object(archive, &object, self.segment_size)?;
        packed.map(|packed| unpack(&object, &packed, self.segment_size)).transpose()
    }

    fn pieces(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = (Lsn, Lsn)> {
        let mut at = from;
        std::iter::from_fn(move || {
            let next = Lsn((at.0 + PIECE).min(to.0));
            let piece = (at, next);
            at = next;
            (piece.0 < piece.1).then_some(piece)
        })
    }

    /// Writes `[from, to)` into segment files.
    fn save(&self, from: Lsn, to: Lsn, directory: &Path) -> Result<()> {
        for (start, end) in self.pieces(from, to) {
            let bytes = self.read(start, end)?;
            let mut at = start;
            while at < end {
                let number = at.segment_number(self.segment_size);
                let next = (at.segment_start(self.segment_size) + self.segment_size).min(end);
                let name = segment_name(number, self.segment_size);
                let file = fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(directory.join(name))?;
                file.set_len(self.segment_size)?;
                let slice = &bytes[(at - start) as usize..(next - start) as usize];
                file.write_all_at(slice, at.segment_offset(self.segment_size))?;
                at = next;
            }
        }
        Ok(())
    }
}

/// `wal`. Returns whether everything was right.
pub fn run(verb: WalVerb, open: impl FnOnce() -> Result<Box<dyn Services>>) -> Result<bool> {
    let mut out = BufWriter::new(Out);
    let right = run_to(verb, open, &mut out)?;
    out.flush().context("can't write the answer")?;
    Ok(right)
}

fn run_to(
    verb: WalVerb,
    open: impl FnOnce() -> Result<Box<dyn Services>>,
    out: &mut impl Write,
) -> Result<bool> {
    match verb {
        WalVerb::CheckRedo(args) => check_redo::run(&args, out),
        WalVerb::Dump { wal: Some(wal), from, to, json, .. } => {
            dump::run(&dump::DumpArgs { wal, from, to, json }, out)?;
            Ok(true)
        }
        WalVerb::Dump { branch, from, to, json, .. } => {
            let wal = BranchWal::open(open()?.as_ref(), &branch)?;
            let to = to.unwrap_or(wal.end);
            ensure!(
                to <= wal.end,
                "{to} is in the future of branch '{branch}', which ends at {}",
                wal.end
            );
            let first = from.unwrap_or(wal.end.segment_start(wal.segment_size));
            let directory = TempDir::with_prefix("pgstrata-wal-")?;
            wal.save(first.segment_start(wal.segment_size), wal.end, directory.path())?;
            let args = dump::DumpArgs {
                wal: directory.path().to_owned(),
                from: Some(first),
                to: Some(to),
                json,
            };
            dump::run(&args, out)?;
            Ok(true)
        }
        WalVerb::Verify { branch, all: true, json, .. } => {
            let copies = wal_copies::look(open()?.as_ref(), branch.as_deref())?;
            wal_copies::write(&copies, json, out)?;
            Ok(copies.iter().all(|copy| copy.state != wal_copies::State::Damaged))
        }
        WalVerb::Verify { branch, from, to, json, .. } => {
            let branch = branch.unwrap_or_else(|| "main".to_owned());
            let wal = BranchWal::open(open()?.as_ref(), &branch)?;
            let report = verify(&wal, from, to)?;
            match json {
                true => writeln!(out, "{report}")?,
                false => writeln!(
                    out,
                    "{} records from {} to {}: every checksum and back link is right",
                    report["records"],
                    report["from"].as_str().unwrap_or_default(),
                    report["to"].as_str().unwrap_or_default()
                )?,
            }
            Ok(true)
        }
    }
}

fn verify(wal: &BranchWal, from: Option<Lsn>, to: Option<Lsn>) -> Result<Value> {
    let end = to.unwrap_or(wal.end);
    ensure!(end <= wal.end, "{end} is in the future of the branch, which ends at {}", wal.end);
    let (start, mut decoder) = match from {
        // From the segment's start, where the decoder finds the first record by itself.
        Some(from) => {
            let start = from.segment_start(wal.segment_size);
            (start, WalDecoder::new(start, wal.segment_size))
        }
        None => {
            let decoder = WalDecoder::new(wal.start, wal.segment_size).with_prev(wal.start_prev);
            (wal.start, decoder)
        }
    };
    decoder = decoder.with_version(wal.version);
    let mut records = 0u64;
    for (at, next) in wal.pieces(start, end) {
        decoder.feed(&wal.read(at, next)?);
        while decoder.poll()?.is_some() {
            records += 1;
        }
    }
    // What was given as the end need not be a record's; the branch's own end is.
    let reached = decoder.position();
    ensure!(
        to.is_some() || reached == end,
        "the last whole record ends at {reached}, but WAL is committed up to {end}"
    );
    Ok(json!({
        "records": records,
        "from": start.to_string(),
        "to": reached.to_string(),
        "ok": true,
    }))
}
