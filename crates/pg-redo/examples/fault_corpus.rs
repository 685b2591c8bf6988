//! Makes `tests/fault_corpus`: for each fault the smallest record that shows it.
//!
//! `fault_corpus OUT WAL...`: each WAL is a directory of segments made with `wal_consistency_checking=all`. The images in
//! it are the pages that later records are replayed on.
#![allow(clippy::expect_used)]

#[path = "../tests/support/corpus.rs"]
mod corpus;
#[path = "../tests/support/mod.rs"]
mod support;
use support::control;

use corpus::Case;
use pgstrata_ids::{Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::Page;
use pgstrata_pg_redo::faults::{self, FAULTS};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, WalDecoder};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

type PageAt = HashMap<(RelTag, u32), Box<Page>>;
/// The smallest file of each fault.
type Found = BTreeMap<usize, Vec<u8>>;

/// A record of a kind is tried this often; more would only make the files a little smaller.
const TRIES: u32 = 300;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let out = PathBuf::from(arguments.next().expect("usage: fault_corpus OUT WAL..."));
    let mut found = Found::new();
    for directory in arguments {
        from_wal(Path::new(&directory), &mut found)?;
    }
    for (fault, bytes) in &found {
        std::fs::write(out.join(FAULTS[*fault].name), bytes)?;
    }
    let missed = (0..FAULTS.len()).filter(|fault| !found.contains_key(fault));
    missed.for_each(|fault| println!("nothing shows {}", FAULTS[fault].name));
    println!("{} of {} faults", found.len(), FAULTS.len());
    Ok(())
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
    let mut start = [0; 8];
    start.copy_from_slice(&first[8..16]);
    let mut decoder = WalDecoder::new(Lsn(u64::from_le_bytes(start)), first.len() as u64);
    let mut pages = PageAt::new();
    let mut tries = HashMap::new();
    for path in paths {
        for chunk in std::fs::read(path)?.chunks(1 << 16) {
            decoder.feed(chunk);
            while let Ok(Some(record)) = decoder.poll() {
                let case = |pages| Case {
                    version: version.expect("a known version"),
                    pages,
                    record: record.bytes.to_vec(),
                };
                let decoded = DecodedRecord::decode(record).expect("a record");
                offer(&decoded, case, &mut pages, &mut tries, found);
            }
        }
    }
    Ok(())
}

fn offer(
    record: &DecodedRecord<'_>,
    case: impl Fn(Vec<(RelTag, u32, Box<Page>)>) -> Case,
    pages: &mut PageAt,
    tries: &mut HashMap<(u8, u8), u32>,
    found: &mut Found,
) {
    let before = record.blocks.iter().filter_map(|block| {
        let page = pages.get(&(block.rel, block.block))?;
        Some((block.rel, block.block, page.clone()))
    });
    let case = case(before.collect());
    let candidates: Vec<_> = FAULTS
        .iter()
        .enumerate()
        .filter(|(_, fault)| fault.may_show(record.header.rmgr, record.header.info))
        .map(|(index, _)| index)
        .collect();
    let count = tries.entry((record.header.rmgr, record.header.info)).or_insert(0);
    let missing = candidates.iter().any(|fault| !found.contains_key(fault));
    if missing || !candidates.is_empty() && *count < TRIES {
        *count += 1;
        let size = case.encode().len();
        let right = case.check();
        for fault in candidates {
            let smaller = found.get(&fault).is_none_or(|bytes| size < bytes.len());
            if smaller && right.mismatches == 0 && right.compared > 0 {
                faults::set(Some(fault));
                if case.check().mismatches > 0 {
                    found.insert(fault, case.encode());
                }
                faults::set(None);
            }
        }
    }
    for block in &record.blocks {
        let mut page = Box::new([0; PAGE_SIZE]);
        if block.image.is_some_and(|image| image.restore(&mut page).is_ok()) {
            pages.insert((block.rel, block.block), page);
        }
    }
}
