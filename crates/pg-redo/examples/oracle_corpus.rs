//! Makes `tests/oracle_corpus.zst`: of every kind and branch of record some small ones, with the pages they are for.
//!
//! `oracle_corpus OUT WAL...`: each WAL is a directory of segments that `scripts/redo-wal` made with the suites
//! `workload`, `rare` and `minimal`, of PostgreSQL 15 and 18. The images in it are the pages that later records are
//! replayed on, and the pages that they must give.
#![allow(clippy::expect_used)]

#[path = "../tests/support/corpus.rs"]
mod corpus;
#[path = "../tests/support/mod.rs"]
mod support;
use support::control;

use corpus::{Case, write_all};
use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::Page;
use pgstrata_pg_wal::{BlockImage, BlockRef, DecodedRecord, PgVersion, WalDecoder, rmgr};
use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

type PageAt = HashMap<(RelTag, u32), Box<Page>>;

/// Cases of one shape that are looked at, in the order of the WAL.
const TRIES: u32 = 12;
/// Shapes of one branch that are kept, at most: of the version that the WAL comes from first, and of others.
const SHAPES: [usize; 2] = [14, 5];

/// The smallest case of each shape.
type Shapes = BTreeMap<u64, Vec<u8>>;

#[derive(Default)]
struct Found {
    tries: HashMap<u64, u32>,
    by_branch: BTreeMap<(u32, String), Shapes>,
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let out = PathBuf::from(arguments.next().expect("usage: oracle_corpus OUT WAL..."));
    let mut found = Found::default();
    for directory in arguments {
        from_wal(Path::new(&directory), &mut found)?;
        let cases: usize = found.by_branch.values().map(BTreeMap::len).sum();
        println!("{}: {} branches, {cases} cases", directory.display(), found.by_branch.len());
    }
    let first = found.by_branch.keys().map(|(version, _)| *version).min();
    let mut cases = Vec::new();
    for ((version, _), shapes) in found.by_branch {
        let limit = SHAPES[usize::from(Some(version) != first)];
        let mut shapes: Vec<_> = shapes.into_values().collect();
        shapes.sort_by_key(Vec::len);
        cases.extend(shapes.into_iter().take(limit));
    }
    let bytes = write_all(&cases);
    println!("{} cases, {} bytes", cases.len(), bytes.len());
    std::fs::write(out, bytes)
}

fn from_wal(directory: &Path, found: &mut Found) -> std::io::Result<()> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.len() == 24) {
            paths.push(path);
        }
    }
    paths.sort();
    let first = std::fs::read(&paths[0])?;
    let version = PgVersion::from_wal_magic(u16::from_le_bytes([first[0], first[1]]));
    let version = version.expect("a known version");
    let mut start = [0; 8];
    start.copy_from_slice(&first[8..16]);
    let mut decoder = WalDecoder::new(Lsn(u64::from_le_bytes(start)), first.len() as u64);
    let mut pages = PageAt::new();
    for path in paths {
        for chunk in std::fs::read(path)?.chunks(1 << 16) {
            decoder.feed(chunk);
            while let Ok(Some(record)) = decoder.poll() {
                let decoded = DecodedRecord::decode(record).expect("a record");
                if !decoded.blocks.is_empty() {
                    offer(version, &decoded, &pages, found);
                    follow(&decoded, &mut pages);
                }
            }
        }
    }
    Ok(())
}

/// Keeps the pages as they are after the record.
fn follow(record: &DecodedRecord<'_>, pages: &mut PageAt) {
    for block in &record.blocks {
        // Nothing of these is replayed, and they are many.
        if block.rel.fork == Fork::FreeSpace || record.header.rmgr == rmgr::XLOG {
            continue;
        }
        let mut page = Box::new([0; PAGE_SIZE]);
        if block.image.is_some_and(|image| image.restore(&mut page).is_ok()) {
            pages.insert((block.rel, block.block), page);
        }
    }
}

fn offer(version: PgVersion, record: &DecodedRecord<'_>, pages: &PageAt, found: &mut Found) {
    let shape = shape(version, record, pages);
    let tries = found.tries.entry(shape).or_insert(0);
    *tries += 1;
    if *tries > TRIES {
        return;
    }
    let before = record.blocks.iter().filter_map(|block| {
        let page = pages.get(&(block.rel, block.block))?;
        Some((block.rel, block.block, page.clone()))
    });
    let case = Case { version, pages: before.collect(), record: plain_record(record) };
    let report = case.check();
    if report.mismatches > 0 || report.unsupported > 0 || report.compared == 0 {
        return;
    }
    let bytes = case.encode();
    for (kind, branches) in report.by_branch() {
        for branch in branches.into_keys() {
            let key = (version.major(), format!("{kind}: {branch}"));
            let shapes = found.by_branch.entry(key).or_default();
            let smallest = shapes.entry(shape).or_insert_with(|| bytes.clone());
            if bytes.len() < smallest.len() {
                *smallest = bytes.clone();
            }
        }
    }
}

/// What two cases have in common that exercise the same: which blocks there are and how full, and where in them the
/// record's first numbers point.
fn shape(version: PgVersion, record: &DecodedRecord<'_>, pages: &PageAt) -> u64 {
    let mut hasher = DefaultHasher::new();
    (version.major(), record.header.rmgr, record.header.opcode()).hash(&mut hasher);
    let mut lines = Vec::new();
    for block in &record.blocks {
        let page = pages.get(&(block.rel, block.block));
        let count = page.map(|page| (u16::from_le_bytes([page[12], page[13]]).max(24) - 24) / 4);
        (block.id, block.rel.fork as u8, block.will_init, block.has_applied_image())
            .hash(&mut hasher);
        (block.data.len() % 8, block.data.len().min(64).ilog2_or_zero()).hash(&mut hasher);
        count.map(|count| u64::from(count).ilog2_or_zero()).hash(&mut hasher);
        lines.extend(count);
    }
    let (last, main) = (lines.first().copied().unwrap_or(0), record.main_data);
    main.len().min(40).hash(&mut hasher);
    for pair in main.chunks_exact(2).take(6) {
        let number = u16::from_le_bytes([pair[0], pair[1]]);
        (number == 0, number == 1, number.cmp(&last), number == last + 1).hash(&mut hasher);
    }
    hasher.finish()
}

trait Log {
    fn ilog2_or_zero(self) -> u32;
}

impl Log for u64 {
    fn ilog2_or_zero(self) -> u32 {
        self.checked_ilog2().map_or(0, |log| log + 1)
    }
}

impl Log for usize {
    fn ilog2_or_zero(self) -> u32 {
        (self as u64).ilog2_or_zero()
    }
}

/// The record with its images uncompressed: a page before and after it then compress as one.
fn plain_record(record: &DecodedRecord<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[4..8].copy_from_slice(&record.header.xid.to_le_bytes());
    bytes[16] = record.header.info;
    bytes[17] = record.header.rmgr;
    let mut contents = Vec::new();
    for block in &record.blocks {
        let content = block.image.map(|image| content(&image));
        block_header(&mut bytes, block, content.as_deref());
        contents.extend(content.unwrap_or_default());
        contents.extend_from_slice(block.data);
    }
    bytes.push(254);
    bytes.extend_from_slice(&(record.main_data.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&contents);
    bytes.extend_from_slice(record.main_data);
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

fn content(image: &BlockImage<'_>) -> Vec<u8> {
    let mut out = vec![0; image.content_length()];
    image.decompress(&mut out).expect("an image");
    out
}

fn block_header(bytes: &mut Vec<u8>, block: &BlockRef<'_>, content: Option<&[u8]>) {
    let mut flags = block.rel.fork as u8;
    flags |= if block.image.is_some() { 0x10 } else { 0 };
    flags |= if block.data.is_empty() { 0 } else { 0x20 };
    flags |= if block.will_init { 0x40 } else { 0 };
    bytes.extend_from_slice(&[block.id, flags]);
    bytes.extend_from_slice(&(block.data.len() as u16).to_le_bytes());
    if let (Some(image), Some(content)) = (block.image, content) {
        bytes.extend_from_slice(&(content.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&image.hole_offset.to_le_bytes());
        bytes.push(image.info() & 3);
    }
    for word in [block.rel.spc, block.rel.db, block.rel.rel, block.block] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
}
