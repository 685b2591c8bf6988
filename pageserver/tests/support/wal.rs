//! The model's operations as PostgreSQL's records.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgstrata_ids::{Fork, Lsn, RelTag};
use pgstrata_pg_wal::{PgVersion, WalWriter, rmgr};
use rand::rngs::SmallRng;

use super::model::{Operation, State};
use super::{SEGMENT_SIZE, SYSTEM_ID};

const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const APPLY: u8 = 0x02;
const DATA_LONG: u8 = 254;
const HAS_XINFO: u8 = 0x80;
const XINFO_RELATIONS: u32 = 1 << 2;

struct Block<'a> {
    rel: RelTag,
    number: u32,
    image: Option<&'a [u8]>,
    data: Vec<u8>,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn record(
    resource: u8,
    info: u8,
    xid: u32,
    blocks: &[Block<'_>],
    main: &[u8],
    prev: Lsn,
) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    for (id, block) in (0..).zip(blocks) {
        let image = if block.image.is_some() { HAS_IMAGE } else { 0 };
        let data = if block.data.is_empty() { 0 } else { HAS_DATA };
        bytes.extend_from_slice(&[id, block.rel.fork as u8 | image | data]);
        bytes.extend_from_slice(&(block.data.len() as u16).to_le_bytes());
        if let Some(image) = block.image {
            bytes.extend_from_slice(&(image.len() as u16).to_le_bytes());
            bytes.extend_from_slice(&[0, 0, APPLY]);
        }
        let RelTag { spc, db, rel, .. } = block.rel;
        bytes.extend_from_slice(&words(&[spc, db, rel, block.number]));
    }
    if !main.is_empty() {
        bytes.push(DATA_LONG);
        bytes.extend_from_slice(&(main.len() as u32).to_le_bytes());
    }
    for block in blocks {
        bytes.extend_from_slice(block.image.unwrap_or_default());
        bytes.extend_from_slice(&block.data);
    }
    bytes.extend_from_slice(main);
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes[4..8].copy_from_slice(&xid.to_le_bytes());
    bytes[8..16].copy_from_slice(&prev.0.to_le_bytes());
    bytes[16] = info;
    bytes[17] = resource;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[24..]), &bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn page_number(version: PgVersion, page: u64) -> Vec<u8> {
    match version {
        PgVersion::V15 | PgVersion::V16 => (page as u32).to_le_bytes().to_vec(),
        PgVersion::V17 | PgVersion::V18 => page.to_le_bytes().to_vec(),
    }
}

fn encode(operation: &Operation, version: PgVersion, prev: Lsn) -> Vec<u8> {
    let plain = |resource, info, main: &[u8]| record(resource, info, 0, &[], main, prev);
    match operation {
        Operation::Filler(size) => plain(rmgr::LOGICAL_MESSAGE, 0, &vec![7; *size]),
        Operation::Create(rel) => {
            let main = words(&[rel.spc, rel.db, rel.rel, rel.fork as u32]);
            plain(rmgr::STORAGE, 0x10, &main)
        }
        Operation::Images(images) => {
            let blocks: Vec<_> = images
                .iter()
                .map(|(rel, number, page)| Block {
                    rel: *rel,
                    number: *number,
                    image: Some(&page[..]),
                    data: Vec::new(),
                })
                .collect();
            record(rmgr::XLOG, 0xB0, 0, &blocks, &[], prev)
        }
        Operation::Patches(patches) => {
            let blocks: Vec<_> = patches
                .iter()
                .map(|(rel, number, at, bytes)| {
                    let mut data = (*at as u16).to_le_bytes().to_vec();
                    data.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
                    data.extend_from_slice(bytes);
                    Block { rel: *rel, number: *number, image: None, data }
                })
                .collect();
            record(rmgr::GENERIC, 0, 0, &blocks, &[], prev)
        }
        Operation::Truncate(rel, blocks) => {
            plain(rmgr::STORAGE, 0x20, &words(&[*blocks, rel.spc, rel.db, rel.rel, 1]))
        }
        Operation::Commit { xid, time, drops } => {
            let mut main = time.to_le_bytes().to_vec();
            let mut info = 0;
            if !drops.is_empty() {
                info = HAS_XINFO;
                main.extend(words(&[XINFO_RELATIONS, drops.len() as u32]));
                drops.iter().for_each(|rel| main.extend(words(&[rel.spc, rel.db, rel.rel])));
            }
            record(rmgr::TRANSACTION, info, *xid, &[], &main, prev)
        }
        Operation::ClogZero(page) => plain(rmgr::CLOG, 0x00, &page_number(version, *page)),
        Operation::ClogTruncate(page) => {
            let mut main = page_number(version, *page);
            main.extend(words(&[3, 1]));
            plain(rmgr::CLOG, 0x10, &main)
        }
        Operation::DatabaseCopy { db, from } => {
            plain(rmgr::DATABASE, 0x00, &words(&[*db, 1663, *from, 1663]))
        }
        Operation::DatabaseCreate(db) => plain(rmgr::DATABASE, 0x10, &words(&[*db, 1663])),
        Operation::DatabaseDrop(db) => plain(rmgr::DATABASE, 0x20, &words(&[*db, 1, 1663])),
    }
}

/// One branch's WAL, and what the cluster is after every record of it.
pub struct History {
    pub version: PgVersion,
    /// First byte of `bytes`.
    pub start: Lsn,
    pub bytes: Vec<u8>,
    /// By the ends of records: their starts, and what is then. The first is what it begins with.
    pub states: BTreeMap<Lsn, (Lsn, Arc<State>)>,
}

impl History {
    /// Nothing yet: it goes on after the record from `record_start` to `start`.
    pub fn new(version: PgVersion, start: Lsn, record_start: Lsn, state: Arc<State>) -> History {
        let states = BTreeMap::from([(start, (record_start, state))]);
        History { version, start, bytes: Vec::new(), states }
    }

    /// End of the last record.
    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    /// What is after the last record that ends at or before `lsn`; where that record ends and starts.
    pub fn at(&self, lsn: Lsn) -> Option<(Lsn, Lsn, &Arc<State>)> {
        let (end, (start, state)) = self.states.range(..=lsn).next_back()?;
        Some((*end, *start, state))
    }

    /// Adds a record.
    pub fn append(&mut self, operation: &Operation) {
        let end = self.end();
        let (prev, state) = self.states[&end].clone();
        let writer = WalWriter {
            version: self.version,
            tli: 1,
            system_identifier: SYSTEM_ID,
            segment_size: SEGMENT_SIZE.into(),
        };
        let placed = writer.place(end, encode(operation, self.version, prev));
        let mut state = (*state).clone();
        state.apply(operation, placed.end);
        self.bytes.extend_from_slice(&placed.bytes);
        assert_eq!(self.end(), placed.end);
        self.states.insert(placed.end, (placed.start, Arc::new(state)));
    }

    /// Adds records at random.
    pub fn grow(&mut self, random: &mut SmallRng, records: usize) {
        for _ in 0..records {
            let operation = self.states[&self.end()].1.operation(random);
            self.append(&operation);
        }
    }
}

/// All forks that WAL keeps.
pub const FORKS: [Fork; 3] = [Fork::Main, Fork::Visibility, Fork::Init];
