//! A data directory as of an LSN: as a skeleton without relation data, or whole.
//!
//! Both look as if PostgreSQL had been shut down cleanly at that LSN. The skeleton leaves the
//! control file and the WAL to the compute shim, which appends the checkpoint that they point to.

use anyhow::{Context, Result};
use pgstrata_ids::{Fork, Key, Lsn, RelTag, SlruKind};
use pgstrata_pg_redo::ControlState;
use pgstrata_pg_wal::{PgVersion, WalWriter};

use crate::origins::{self, ORIGINS_FILE};
use crate::timeline::Timeline;

const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;
/// Pages of an SLRU segment file.
const SLRU_SEGMENT_PAGES: u64 = 32;
/// Blocks of a relation segment file.
const RELATION_SEGMENT_BLOCKS: u32 = 131_072;

/// Name of the skeleton's file with the encoded control state.
pub const CONTROL_STATE_FILE: &str = "pgstrata.control_state";

/// Directories that PostgreSQL expects and that hold nothing of ours.
const EMPTY_DIRECTORIES: &[&str] = &[
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_xact",
];

/// More of them that only some versions have.
fn directories_of_version(version: PgVersion) -> &'static [&'static str] {
    match version {
        PgVersion::V15 | PgVersion::V16 => &[],
        // `summarize_wal`.
        PgVersion::V17 | PgVersion::V18 => &["pg_wal/summaries"],
    }
}

/// One thing of a directory, paths below the data directory.
pub enum Entry<'a> {
    /// A directory.
    Directory(String),
    /// A file in memory.
    File(String, Vec<u8>),
    /// A segment of a relation: `blocks` blocks from `first` on.
    Relation {
        /// Path.
        path: String,
        /// Relation fork.
        rel: RelTag,
        /// First block.
        first: u32,
        /// Number of blocks.
        blocks: u32,
        /// Where the blocks come from.
        timeline: &'a Timeline,
        /// As of when.
        lsn: Lsn,
    },
}

/// What goes into the directory besides the skeleton.
pub enum Contents<'a> {
    /// The control state, for the shim.
    Skeleton,
    /// Relations, control file and the WAL of the checkpoint. `wal` has the true bytes of the
    /// segment before the LSN, if they could be had.
    Whole {
        /// What to put into `pg_wal`; `None` where the client streams it.
        wal: Option<&'a CleanShutdown>,
        /// The clean shutdown at the LSN.
        shutdown: &'a CleanShutdown,
    },
}

/// A checkpoint that says: shut down cleanly here.
pub struct CleanShutdown {
    /// Where the record starts.
    pub checkpoint: Lsn,
    /// Where it ends.
    pub end: Lsn,
    /// The control file that points to it.
    pub control_file: Vec<u8>,
    /// The start of `segment`.
    pub segment_start: Lsn,
    /// Segments from `segment_start` to the end of the record, and zeros to the segment's end.
    pub segment: Vec<u8>,
}

impl CleanShutdown {
    /// At `lsn`, where the last record started at `record_start`.
    pub fn new(state: &ControlState, segment_size: u64, lsn: Lsn, record_start: Lsn) -> Self {
        let writer = WalWriter {
            version: state.version(),
            tli: state.tli,
            system_identifier: state.control.system_identifier,
            segment_size,
        };
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        let checkpoint = state.checkpoint(writer.record_start(lsn), time);
        let placed = writer.checkpoint_shutdown(lsn, record_start, &checkpoint);
        let segment_start = lsn.segment_start(segment_size);
        let mut segment =
            if lsn == segment_start { Vec::new() } else { writer.skipped_prefix(lsn) };
        segment.extend_from_slice(&placed.bytes);
        segment.resize(segment.len().next_multiple_of(segment_size as usize), 0);
        CleanShutdown {
            checkpoint: placed.start,
            end: placed.end,
            control_file: state.to_pg_control(placed.start, time).encode().to_vec(),
            segment_start,
            segment,
        }
    }
}

/// `PG_15_202209061`: the directory of a version below a tablespace's location.
pub fn tablespace_version_directory(version: PgVersion) -> String {
    format!("PG_{}_{}", version.major(), version.catalog_version())
}

/// The name of the WAL segment that starts at `start`.
pub fn wal_segment_name(tli: u32, start: Lsn, segment_size: u64) -> String {
    let number = start.segment_number(segment_size);
    let per_id = (1u64 << 32) / segment_size;
    format!("{tli:08X}{:08X}{:08X}", number / per_id, number % per_id)
}

/// The tablespaces other than the built-in ones: oid and location.
pub fn tablespaces(timeline: &Timeline, lsn: Lsn) -> Result<Vec<(u32, String)>> {
    let found = timeline.present(Key::tablespace(0), Key::tablespace(u32::MAX), lsn)?;
    Ok(found
        .into_iter()
        .map(|(key, path)| (key.a(), String::from_utf8_lossy(&path).into_owned()))
        .collect())
}

/// The directory of a database in a tablespace. Below a tablespace's own root if `in_tablespace`.
fn database_directory(version: PgVersion, spc: u32, db: u32) -> String {
    match spc {
        GLOBAL_TABLESPACE => "global".into(),
        DEFAULT_TABLESPACE => format!("base/{db}"),
        spc => format!("pg_tblspc/{spc}/{}/{db}", tablespace_version_directory(version)),
    }
}

/// Calls `each` with everything in the directory, directories before what is in them. Paths of
/// tablespaces begin with `pg_tblspc/<oid>/`.
pub fn walk<'a>(
    timeline: &'a Timeline,
    lsn: Lsn,
    contents: &Contents<'_>,
    each: &mut dyn FnMut(Entry<'a>) -> Result<()>,
) -> Result<()> {
    let version = timeline.info.version;
    let state = timeline.control_state(lsn)?;
    let version_file = || format!("{}\n", version.major()).into_bytes();
    each(Entry::File("PG_VERSION".into(), version_file()))?;
    for directory in EMPTY_DIRECTORIES.iter().chain(directories_of_version(version)) {
        each(Entry::Directory((*directory).into()))?;
    }
    for (oid, _) in tablespaces(timeline, lsn)? {
        each(Entry::Directory(format!("pg_tblspc/{oid}")))?;
        let below = format!("pg_tblspc/{oid}/{}", tablespace_version_directory(version));
        each(Entry::Directory(below))?;
    }
    let whole = matches!(contents, Contents::Whole { .. });
    let mut databases = timeline.databases(lsn)?;
    databases.push((GLOBAL_TABLESPACE, 0));
    for (spc, db) in databases {
        let directory = database_directory(version, spc, db);
        if db != 0 {
            each(Entry::Directory(directory.clone()))?;
            each(Entry::File(format!("{directory}/PG_VERSION"), version_file()))?;
        }
        if let Some(map) = timeline.relmap(spc, db, lsn)? {
            each(Entry::File(format!("{directory}/pg_filenode.map"), map))?;
        }
        if whole {
            relations(timeline, lsn, spc, db, &directory, each)?;
        }
    }
    for (spc, db) in timeline.implicit_databases(lsn)? {
        let directory = database_directory(version, spc, db);
        each(Entry::Directory(directory.clone()))?;
        if whole {
            relations(timeline, lsn, spc, db, &directory, each)?;
        }
    }
    for kind in SlruKind::ALL {
        slru(timeline, lsn, kind, &state, each)?;
    }
    for (key, file) in timeline.present(Key::two_phase(0), Key::two_phase(u64::MAX), lsn)? {
        let name = match version {
            PgVersion::V15 | PgVersion::V16 => format!("pg_twophase/{:08X}", key.wide() as u32),
            PgVersion::V17 | PgVersion::V18 => format!("pg_twophase/{:016X}", key.wide()),
        };
        each(Entry::File(name, file))?;
    }
    let origins = timeline.origins(0..=u16::MAX, lsn)?;
    let origins = origins.into_iter().map(|(node, remote_lsn)| (node, remote_lsn.0));
    each(Entry::File(ORIGINS_FILE.into(), origins::encode(origins)))?;
    match contents {
        Contents::Skeleton => each(Entry::File(CONTROL_STATE_FILE.into(), state.encode()))?,
        Contents::Whole { wal, shutdown } => {
            if let Some(wal) = wal {
                let size = timeline.info.segment_size;
                for (number, bytes) in wal.segment.chunks(size as usize).enumerate() {
                    let start = wal.segment_start + number as u64 * size;
                    let name = wal_segment_name(state.tli, start, size);
                    each(Entry::File(format!("pg_wal/{name}"), bytes.to_vec()))?;
                }
            }
            // Last, as PostgreSQL's own base backup has it: a directory without it can't start.
            let file = shutdown.control_file.clone();
            each(Entry::File("global/pg_control".into(), file))?;
        }
    }
    Ok(())
}

fn relations<'a>(
    timeline: &'a Timeline,
    lsn: Lsn,
    spc: u32,
    db: u32,
    directory: &str,
    each: &mut dyn FnMut(Entry<'a>) -> Result<()>,
) -> Result<()> {
    let relations = timeline.relations(spc, db, lsn)?;
    for (rel, blocks) in &relations {
        let mut emit = |rel: RelTag, name: &str, first: u32| {
            let segment = first / RELATION_SEGMENT_BLOCKS;
            let path = match segment {
                0 => format!("{directory}/{name}"),
                segment => format!("{directory}/{name}.{segment}"),
            };
            let blocks = (blocks - first).min(RELATION_SEGMENT_BLOCKS);
            each(Entry::Relation { path, rel, first, blocks, timeline, lsn })
        };
        let name = format!("{}{}", rel.rel, rel.fork.suffix());
        let mut first = 0;
        loop {
            emit(*rel, &name, first)?;
            first = match first.checked_add(RELATION_SEGMENT_BLOCKS) {
                Some(next) if next < *blocks => next,
                _ => break,
            };
        }
        // A clean start does not reset unlogged relations, so they are delivered reset.
        let main = rel.with_fork(Fork::Main);
        if rel.fork == Fork::Init && !relations.iter().any(|(other, _)| *other == main) {
            emit(*rel, &rel.rel.to_string(), 0)?;
        }
    }
    Ok(())
}

fn slru<'a>(
    timeline: &Timeline,
    lsn: Lsn,
    kind: SlruKind,
    state: &ControlState,
    each: &mut dyn FnMut(Entry<'a>) -> Result<()>,
) -> Result<()> {
    let mut extent = timeline.slru_extent(kind, lsn)?;
    // PostgreSQL reads the pages of the next ids when it starts, written or not.
    match kind {
        SlruKind::Clog => {
            extent.add(u64::from(state.next_xid as u32) / 32_768);
        }
        SlruKind::MultiXactOffsets => {
            extent.add(u64::from(state.next_multi) / 2048);
        }
        SlruKind::MultiXactMembers => {
            extent.add(u64::from(state.next_multi_offset) / 1636);
        }
        SlruKind::CommitTs => {}
    }
    let mut segment: Option<(u64, Vec<u8>)> = None;
    let mut page = [0; 8192];
    for number in extent.pages() {
        let this = number / SLRU_SEGMENT_PAGES;
        if let Some((previous, bytes)) = segment.take_if(|(previous, _)| *previous != this) {
            each(slru_file(kind, previous, bytes))?;
        }
        timeline
            .slru_page(kind, number, lsn, &mut page)
            .with_context(|| format!("page {number} of {}", kind.directory()))?;
        let (_, bytes) = segment.get_or_insert_with(|| (this, Vec::new()));
        bytes.resize((number % SLRU_SEGMENT_PAGES) as usize * page.len(), 0);
        bytes.extend_from_slice(&page);
    }
    match segment {
        Some((number, bytes)) => each(slru_file(kind, number, bytes)),
        None => Ok(()),
    }
}

fn slru_file<'a>(kind: SlruKind, segment: u64, bytes: Vec<u8>) -> Entry<'a> {
    Entry::File(format!("{}/{segment:04X}", kind.directory()), bytes)
}

/// Reads a relation segment, page by page.
pub struct RelationReader<'a> {
    timeline: &'a Timeline,
    rel: RelTag,
    next: u32,
    end: u32,
    lsn: Lsn,
    checksums: bool,
    page: [u8; 8192],
    at: usize,
}

impl<'a> RelationReader<'a> {
    /// Of `blocks` blocks from `first` on.
    pub fn new(
        timeline: &'a Timeline,
        rel: RelTag,
        first: u32,
        blocks: u32,
        lsn: Lsn,
        checksums: bool,
    ) -> RelationReader<'a> {
        let end = first + blocks;
        let page = [0; 8192];
        RelationReader { timeline, rel, next: first, end, lsn, checksums, page, at: 8192 }
    }
}

impl std::io::Read for RelationReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.page.len() {
            if self.next == self.end {
                return Ok(0);
            }
            self.timeline
                .existing_block(self.rel, self.next, self.lsn, &mut self.page)
                .map_err(|error| std::io::Error::other(format!("{error:#}")))?;
            if self.checksums {
                pgstrata_pg_redo::set_checksum(&mut self.page, self.next);
            }
            self.next += 1;
            self.at = 0;
        }
        let count = buffer.len().min(self.page.len() - self.at);
        buffer[..count].copy_from_slice(&self.page[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
