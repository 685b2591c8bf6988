//! What a cluster is at one LSN, plainly: every page of every relation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgstrata_ids::{Fork, Lsn, RelTag};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

pub type Page = [u8; 8192];

/// Where a page's free space begins and ends. Changes are made behind it.
const LOWER: usize = 64;
const UPPER: usize = 7800;
const XACTS_PER_PAGE: u32 = 32_768;
const PAGES_PER_SEGMENT: u64 = 32;

#[derive(Clone, Debug, Default)]
pub struct State {
    pub databases: BTreeSet<u32>,
    pub relations: BTreeMap<RelTag, Vec<Arc<Page>>>,
    pub clog: BTreeMap<u64, Arc<Page>>,
    pub next_xid: u64,
}

/// What a record does.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Nothing, in so many bytes.
    Filler(usize),
    Create(RelTag),
    Images(Vec<(RelTag, u32, Arc<Page>)>),
    /// Bytes of pages that are there.
    Patches(Vec<(RelTag, u32, usize, Vec<u8>)>),
    Truncate(RelTag, u32),
    Commit {
        xid: u32,
        time: i64,
        drops: Vec<RelTag>,
    },
    ClogZero(u64),
    ClogTruncate(u64),
    DatabaseCopy {
        db: u32,
        from: u32,
    },
    DatabaseCreate(u32),
    DatabaseDrop(u32),
}

fn zeros() -> Arc<Page> {
    Arc::new([0; 8192])
}

fn set_lsn(page: &mut Page, lsn: Lsn) {
    page[0..4].copy_from_slice(&((lsn.0 >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn.0 as u32).to_le_bytes());
}

/// A page as PostgreSQL lays it out, with its free space zero.
pub fn random_page(random: &mut SmallRng) -> Arc<Page> {
    let mut page = [0; 8192];
    random.fill_bytes(&mut page[20..LOWER]);
    random.fill_bytes(&mut page[UPPER..]);
    page[12..14].copy_from_slice(&(LOWER as u16).to_le_bytes());
    page[14..16].copy_from_slice(&(UPPER as u16).to_le_bytes());
    page[16..18].copy_from_slice(&8192u16.to_le_bytes());
    page[18..20].copy_from_slice(&0x2004u16.to_le_bytes());
    Arc::new(page)
}

impl State {
    /// A small cluster.
    pub fn first(random: &mut SmallRng) -> State {
        let mut state = State { next_xid: 1000, ..State::default() };
        state.databases.insert(5);
        for (spc, db, rel) in [(1663, 5, 16384), (1663, 5, 16385), (1664, 0, 1260)] {
            let rel = RelTag { spc, db, rel, fork: Fork::Main };
            let pages = (0..random.random_range(0..4)).map(|_| random_page(random)).collect();
            state.relations.insert(rel, pages);
        }
        state.clog.insert(0, zeros());
        state
    }

    fn some_relation(&self, random: &mut SmallRng) -> RelTag {
        let dbs: Vec<u32> = self.databases.iter().copied().chain([0]).collect();
        let db = *dbs.choose(random).unwrap();
        let fork = *[Fork::Main, Fork::Main, Fork::Main, Fork::Visibility, Fork::Init]
            .choose(random)
            .unwrap();
        let spc = if db == 0 { 1664 } else { 1663 };
        RelTag { spc, db, rel: 16384 + random.random_range(0..4), fork }
    }

    /// Something that PostgreSQL might do now.
    pub fn operation(&self, random: &mut SmallRng) -> Operation {
        match random.random_range(0..100) {
            0..4 => Operation::Filler(random.random_range(0..30_000)),
            4..10 => Operation::Create(self.some_relation(random)),
            10..35 => {
                let mut images = BTreeMap::new();
                for _ in 0..random.random_range(1..4) {
                    let rel = self.some_relation(random);
                    let blocks = self.relations.get(&rel).map_or(0, Vec::len) as u32;
                    // Now and then past the end, over a gap.
                    let gap = random.random_range(1..4);
                    let block = random.random_range(0..blocks + gap);
                    images.insert((rel, block), random_page(random));
                }
                Operation::Images(
                    images.into_iter().map(|((rel, block), page)| (rel, block, page)).collect(),
                )
            }
            35..75 => {
                let all: Vec<(RelTag, u32)> = self
                    .relations
                    .iter()
                    .flat_map(|(rel, pages)| {
                        let there = (0..).zip(pages).filter(|(_, page)| page[14..16] != [0, 0]);
                        there.map(|(block, _)| (*rel, block))
                    })
                    .collect();
                // Few pages get most changes, so that some chains are long.
                let hot = all.len().min(4);
                let mut patches = BTreeMap::new();
                for _ in 0..random.random_range(1..4) {
                    let from = if random.random_bool(0.7) { &all[..hot] } else { &all[..] };
                    let Some((rel, block)) = from.choose(random).copied() else { continue };
                    let at = random.random_range(UPPER..8192);
                    let mut bytes = vec![0; random.random_range(1..=(8192 - at).min(100))];
                    random.fill_bytes(&mut bytes);
                    patches.insert((rel, block), (at, bytes));
                }
                let patch = |((rel, block), (at, bytes))| (rel, block, at, bytes);
                match patches.is_empty() {
                    true => Operation::Filler(0),
                    false => Operation::Patches(patches.into_iter().map(patch).collect()),
                }
            }
            75..80 => {
                let rel = self.some_relation(random).with_fork(Fork::Main);
                let blocks = self.relations.get(&rel).map_or(0, Vec::len) as u32;
                Operation::Truncate(rel, random.random_range(0..blocks + 1))
            }
            80..92 => {
                let pages: Vec<u64> = self.clog.keys().copied().collect();
                let page = *pages.choose(random).unwrap() as u32;
                let xid = page * XACTS_PER_PAGE + random.random_range(3..XACTS_PER_PAGE);
                let mut drops = Vec::new();
                if random.random_bool(0.2) {
                    drops.push(self.some_relation(random).with_fork(Fork::Main));
                }
                Operation::Commit { xid, time: random.random_range(1..1_000_000_000), drops }
            }
            92..94 => {
                let last = *self.clog.keys().last().unwrap();
                Operation::ClogZero(last + random.random_range(1..20))
            }
            94..95 => {
                let pages: Vec<u64> = self.clog.keys().copied().collect();
                Operation::ClogTruncate(*pages.choose(random).unwrap())
            }
            _ => {
                let db = random.random_range(6..10);
                match self.databases.contains(&db) {
                    true => Operation::DatabaseDrop(db),
                    false if random.random_bool(0.2) => Operation::DatabaseCreate(db),
                    false => {
                        let dbs: Vec<u32> = self.databases.iter().copied().collect();
                        Operation::DatabaseCopy { db, from: *dbs.choose(random).unwrap() }
                    }
                }
            }
        }
    }

    /// Does it. `end` is the end of its record.
    pub fn apply(&mut self, operation: &Operation, end: Lsn) {
        match operation {
            Operation::Filler(_) => {}
            Operation::Create(rel) => drop(self.relations.entry(*rel).or_default()),
            Operation::Images(images) => {
                for (rel, block, page) in images {
                    let pages = self.relations.entry(*rel).or_default();
                    let at = *block as usize;
                    if pages.len() <= at {
                        pages.resize_with(at + 1, zeros);
                    }
                    let mut page = **page;
                    set_lsn(&mut page, end);
                    pages[at] = Arc::new(page);
                }
            }
            Operation::Patches(patches) => {
                for (rel, block, at, bytes) in patches {
                    let pages = self.relations.get_mut(rel).unwrap();
                    let page = Arc::make_mut(&mut pages[*block as usize]);
                    page[*at..*at + bytes.len()].copy_from_slice(bytes);
                    set_lsn(page, end);
                }
            }
            Operation::Truncate(rel, blocks) => {
                self.relations.entry(*rel).or_default().truncate(*blocks as usize);
            }
            Operation::Commit { xid, drops, .. } => {
                let at = (xid % XACTS_PER_PAGE) as usize;
                let page = self.clog.get_mut(&u64::from(xid / XACTS_PER_PAGE)).unwrap();
                let byte = &mut Arc::make_mut(page)[at / 4];
                *byte = *byte & !(3 << (at % 4 * 2)) | 1 << (at % 4 * 2);
                self.next_xid = self.next_xid.max(u64::from(*xid) + 1);
                for rel in drops {
                    for fork in Fork::ALL {
                        self.relations.remove(&rel.with_fork(fork));
                    }
                }
            }
            Operation::ClogZero(page) => drop(self.clog.insert(*page, zeros())),
            Operation::ClogTruncate(page) => {
                let first = page - page % PAGES_PER_SEGMENT;
                self.clog.retain(|page, _| *page >= first);
            }
            Operation::DatabaseCopy { db, from } => {
                self.databases.insert(*db);
                let copied: Vec<_> = self
                    .relations
                    .iter()
                    .filter(|(rel, _)| rel.db == *from)
                    .map(|(rel, pages)| (RelTag { db: *db, ..*rel }, pages.clone()))
                    .collect();
                self.relations.extend(copied);
            }
            Operation::DatabaseCreate(db) => drop(self.databases.insert(*db)),
            Operation::DatabaseDrop(db) => {
                self.databases.remove(db);
                self.relations.retain(|rel, _| rel.db != *db);
            }
        }
    }
}
