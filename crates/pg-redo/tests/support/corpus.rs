//! A record with the pages it is for: what a file of `tests/fault_corpus` holds. `tests/oracle_corpus.zst` is many of
//! them behind each other, each behind its length (u32), as one zstd frame.
//!
//! ```text
//! u8   major version
//! u8   number of pages, then each
//!      u32 tablespace, database, relation; u8 fork; u32 block
//!      u16 length of its start, u16 of its end, both; zeros between
//!      the record, with the images of wal_consistency_checking, to the end
//! ```
#![allow(dead_code, clippy::expect_used)]

use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{Checker, MemoryStore, Page, PageStore, Report};
use pgstrata_pg_wal::{PgVersion, Record};

/// A case.
pub struct Case {
    /// Version that wrote the record.
    pub version: PgVersion,
    /// Pages before the record.
    pub pages: Vec<(RelTag, u32, Box<Page>)>,
    /// The record's bytes.
    pub record: Vec<u8>,
}

/// The page without its hole.
fn ends(page: &Page) -> (&[u8], &[u8]) {
    let field = |at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    let (lower, upper) = (field(12), field(14));
    let has_hole = lower > 24 && lower <= upper && upper <= PAGE_SIZE;
    if has_hole { (&page[..lower], &page[upper..]) } else { (page, &[]) }
}

impl Case {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.version.major() as u8, self.pages.len() as u8];
        for (rel, block, page) in &self.pages {
            for word in [rel.spc, rel.db, rel.rel] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.push(rel.fork as u8);
            out.extend_from_slice(&block.to_le_bytes());
            let (start, end) = ends(page);
            out.extend_from_slice(&(start.len() as u16).to_le_bytes());
            out.extend_from_slice(&(end.len() as u16).to_le_bytes());
            out.extend_from_slice(start);
            out.extend_from_slice(end);
        }
        out.extend_from_slice(&self.record);
        out
    }

    /// From the file's bytes.
    pub fn decode(mut bytes: &[u8]) -> Case {
        let mut take = |length: usize| {
            let (taken, rest) = bytes.split_at(length);
            bytes = rest;
            taken.to_vec()
        };
        let word = |bytes: Vec<u8>| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        let half = |bytes: Vec<u8>| usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let version = PgVersion::from_major(u32::from(take(1)[0])).expect("a version");
        let count = take(1)[0];
        let mut pages = Vec::new();
        for _ in 0..count {
            let (spc, db, rel) = (word(take(4)), word(take(4)), word(take(4)));
            let fork = Fork::from_number(take(1)[0]).expect("a fork");
            let block = word(take(4));
            let (first, last) = (half(take(2)), half(take(2)));
            let mut page = Box::new([0; PAGE_SIZE]);
            page[..first].copy_from_slice(&take(first));
            page[PAGE_SIZE - last..].copy_from_slice(&take(last));
            pages.push((RelTag { spc, db, rel, fork }, block, page));
        }
        Case { version, pages, record: bytes.to_vec() }
    }

    /// What the oracle says of it.
    pub fn check(&self) -> Report {
        let mut store = MemoryStore::default();
        for (rel, block, page) in &self.pages {
            let stored = store.store(*rel, *block, page);
            stored.expect("memory does not fail");
        }
        let mut checker = Checker::new(store, crate::control(self.version), true);
        let record = Record { lsn: Lsn(1 << 40), end: Lsn((1 << 40) + 8192), bytes: &self.record };
        checker.feed(record).expect("a record");
        checker.report()
    }
}

/// The file of many cases.
pub fn write_all(cases: &[Vec<u8>]) -> Vec<u8> {
    let mut plain = Vec::new();
    for case in cases {
        plain.extend_from_slice(&(case.len() as u32).to_le_bytes());
        plain.extend_from_slice(case);
    }
    let mut encoder = zstd::Encoder::new(Vec::new(), 19).expect("a level of zstd");
    encoder.long_distance_matching(true).expect("a parameter of zstd");
    std::io::Write::write_all(&mut encoder, &plain).expect("memory does not fail");
    encoder.finish().expect("memory does not fail")
}

/// The cases of such a file.
pub fn read_all(bytes: &[u8]) -> Vec<Case> {
    let plain = zstd::decode_all(bytes).expect("a zstd frame");
    let mut rest = plain.as_slice();
    let mut cases = Vec::new();
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        let (case, behind) = behind.split_at(u32::from_le_bytes(*length) as usize);
        cases.push(Case::decode(case));
        rest = behind;
    }
    cases
}
