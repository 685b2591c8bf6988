//! Makes seeds for the fuzz targets, from WAL and from messages and files made here.
//!
//! `fuzz_seeds OUT LIMIT WAL...`: OUT gets a directory for each target. Each WAL is a directory of segments of one
//! cluster, made with `wal_consistency_checking=all`: its images are the pages on which the records are to be replayed.
//! Of every kind of record the smallest is taken, if its seed is at most LIMIT bytes.
#![allow(clippy::expect_used)]

use pgstrata_format::layer::{Codec, LayerHeader, LayerKind, LayerWriter};
use pgstrata_fuzz_bodies::control;
use pgstrata_ids::{
    Fork, Generation, Incarnation, Key, Lsn, Member, NodeId, PAGE_SIZE, RelTag, SystemId, TenantId,
    Term, TimelineId, TimelineParameters,
};
use pgstrata_pg_redo::{ControlState, Effect, Effects};
use pgstrata_pg_wal::{BlockRef, DecodedRecord, PgVersion, WalDecoder};
use pgstrata_quorum::{
    Ack, Append, Configuration, ProposerId, Refusal, TermHistory, TermStart, VoteRequest,
};
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{Greeting, GreetingReply, Message, RefusedReason, WAL, encode};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const CHUNK: usize = 64 * 1024;
/// Kind of an item of a seed of `redo`.
const PAGE: u8 = 1;
const RECORD: u8 = 2;

type PageAt = HashMap<(RelTag, u32), Box<[u8; PAGE_SIZE]>>;

struct Seeds {
    out: PathBuf,
    limit: usize,
    /// By target and name.
    found: BTreeMap<(&'static str, String), Vec<u8>>,
}

impl Seeds {
    fn offer(&mut self, target: &'static str, name: String, seed: Vec<u8>) {
        if seed.len() <= self.limit {
            let best = self.found.entry((target, name)).or_insert_with(|| seed.clone());
            if seed.len() < best.len() {
                *best = seed;
            }
        }
    }

    fn write(&self) -> std::io::Result<()> {
        for ((target, name), seed) in &self.found {
            let directory = self.out.join(target);
            std::fs::create_dir_all(&directory)?;
            std::fs::write(directory.join(name), seed)?;
        }
        Ok(())
    }
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: fuzz_seeds OUT LIMIT WAL...";
    let out = PathBuf::from(arguments.next().expect(usage));
    let limit = arguments.next().and_then(|text| text.to_str()?.parse().ok()).expect(usage);
    let mut seeds = Seeds { out, limit, found: BTreeMap::new() };
    for directory in arguments {
        from_wal(&mut seeds, Path::new(&directory))?;
    }
    messages(&mut seeds);
    layers(&mut seeds);
    seeds.write()?;
    println!("{} seeds", seeds.found.len());
    Ok(())
}

fn from_wal(seeds: &mut Seeds, directory: &Path) -> std::io::Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() == 24 {
            names.push((u64::from_str_radix(&name[8..], 16).expect("a segment"), entry.path()));
        }
    }
    names.sort();
    let size = std::fs::metadata(&names[0].1)?.len();
    let number = (names[0].0 >> 32) * ((1 << 32) / size) + (names[0].0 & 0xFFFF_FFFF);
    let head = std::fs::read(&names[0].1)?;
    let magic = u16::from_le_bytes([head[0], head[1]]);
    let version = PgVersion::from_wal_magic(magic).expect("WAL of a known version");
    let mut decoder = WalDecoder::new(Lsn(number * size), size);
    let mut state = control(version, true, true);
    let mut pages = PageAt::new();
    for (_, path) in names {
        for chunk in std::fs::read(path)?.chunks(CHUNK) {
            decoder.feed(chunk);
            while let Ok(Some(record)) = decoder.poll() {
                let record = DecodedRecord::decode(record).expect("a record");
                from_effects(seeds, &record, &mut state, &pages);
                from_record(seeds, version, &record, &mut pages);
            }
        }
    }
    Ok(())
}

/// `+INIT`, images, several blocks: all that makes a record of a kind another record.
fn name(version: PgVersion, record: &DecodedRecord<'_>) -> String {
    let (rmgr, info) = (record.header.rmgr, record.header.info & 0xF0);
    let mut blocks = String::new();
    for block in &record.blocks {
        let form = if block.has_applied_image() {
            "i"
        } else if block.will_init {
            "n"
        } else {
            ""
        };
        blocks.push_str(&format!("-{}{form}", block.id));
    }
    format!("{version}-{rmgr:02}-{info:02x}{blocks}")
}

fn from_record(
    seeds: &mut Seeds,
    version: PgVersion,
    record: &DecodedRecord<'_>,
    pages: &mut PageAt,
) {
    let bytes = without_checks(record);
    let name = name(version, record);
    let flags = (version.major() as u8 - 15) | 0x0C;
    let mut seed = vec![flags];
    let mut known = true;
    for block in record.blocks.iter().filter(|block| block.rel.fork != Fork::FreeSpace) {
        match pages.get(&(block.rel, block.block)) {
            Some(page) => put_page(&mut seed, block, page),
            None => known &= block.will_init || block.has_applied_image(),
        }
    }
    if known {
        seed.push(RECORD);
        seed.extend_from_slice(&(bytes.len().min(65_535) as u16).to_le_bytes());
        seed.extend_from_slice(&bytes);
        seeds.offer("redo", name.clone(), seed);
    }
    if record.header.rmgr < 11 {
        let body = &bytes[24..];
        let mut framed = vec![0, flags, 99, 0, 50, 0, 0, 0, 1];
        for _ in 0..2 {
            framed.extend_from_slice(&[record.header.rmgr, record.header.info]);
            framed.extend_from_slice(&(body.len().min(65_535) as u16).to_le_bytes());
            framed.extend_from_slice(body);
        }
        if version == PgVersion::V15 {
            seeds.offer("wal", name.clone(), framed);
            seeds.offer("record", name, bytes);
        }
    }
    for block in &record.blocks {
        let mut page = Box::new([0; PAGE_SIZE]);
        if block.image.is_some_and(|image| image.restore(&mut page).is_ok()) {
            pages.insert((block.rel, block.block), page);
        }
    }
}

/// The smallest values of each kind, with the pages they are for.
fn from_effects(
    seeds: &mut Seeds,
    record: &DecodedRecord<'_>,
    state: &mut ControlState,
    pages: &PageAt,
) {
    let name = name(state.version(), record);
    let mut effects = Effects::new();
    effects.derive(record, state).expect("a known record");
    for effect in &effects.items {
        let (page, number, value) = match *effect {
            Effect::Block { rel, block, value, .. } => (pages.get(&(rel, block)), block, value),
            Effect::SlruPage { value, .. } => (None, 0, value),
            _ => continue,
        };
        let (start, end) = page.map_or((&[][..], &[][..]), |page| ends(page));
        let mut seed = number.to_le_bytes().to_vec();
        seed.extend_from_slice(&(start.len() as u16).to_le_bytes());
        seed.extend_from_slice(&(end.len() as u16).to_le_bytes());
        seed.extend_from_slice(start);
        seed.extend_from_slice(end);
        seed.extend_from_slice(effects.value(value));
        seeds.offer("values", name.clone(), seed);
    }
}

fn ends(page: &[u8; PAGE_SIZE]) -> (&[u8], &[u8]) {
    let field = |at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    let (lower, upper) = (field(12), field(14));
    if lower >= 24 && lower <= upper && upper <= PAGE_SIZE {
        (&page[..lower], &page[upper..])
    } else {
        (page, &[])
    }
}

fn put_page(seed: &mut Vec<u8>, block: &BlockRef<'_>, page: &[u8; PAGE_SIZE]) {
    let (start, end) = ends(page);
    seed.extend_from_slice(&[PAGE, block.rel.fork as u8]);
    seed.extend_from_slice(&block.block.to_le_bytes());
    seed.extend_from_slice(&(start.len() as u16).to_le_bytes());
    seed.extend_from_slice(&(end.len() as u16).to_le_bytes());
    seed.extend_from_slice(start);
    seed.extend_from_slice(end);
}

/// The record without the images that are there for comparison only.
fn without_checks(record: &DecodedRecord<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[4..8].copy_from_slice(&record.header.xid.to_le_bytes());
    bytes[16] = record.header.info;
    bytes[17] = record.header.rmgr;
    let applied = |block: &BlockRef<'_>| block.image.is_some_and(|image| image.is_applied());
    for block in &record.blocks {
        let mut flags = block.rel.fork as u8;
        flags |= if applied(block) { 0x10 } else { 0 };
        flags |= if block.data.is_empty() { 0 } else { 0x20 };
        flags |= if block.will_init { 0x40 } else { 0 };
        bytes.extend_from_slice(&[block.id, flags]);
        bytes.extend_from_slice(&(block.data.len() as u16).to_le_bytes());
        if let Some(image) = block.image.filter(|image| image.is_applied()) {
            bytes.extend_from_slice(&(image.bytes.len() as u16).to_le_bytes());
            bytes.extend_from_slice(&image.hole_offset.to_le_bytes());
            bytes.push(image.info());
            if image.info() & 1 != 0 && image.compression().is_some() {
                bytes.extend_from_slice(&image.hole_length.to_le_bytes());
            }
        }
        for word in [block.rel.spc, block.rel.db, block.rel.rel, block.block] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    if !record.main_data.is_empty() {
        bytes.push(254);
        bytes.extend_from_slice(&(record.main_data.len() as u32).to_le_bytes());
    }
    for block in &record.blocks {
        if let Some(image) = block.image.filter(|image| image.is_applied()) {
            bytes.extend_from_slice(image.bytes);
        }
        bytes.extend_from_slice(block.data);
    }
    bytes.extend_from_slice(record.main_data);
    let total = bytes.len() as u32;
    bytes[..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

fn messages(seeds: &mut Seeds) {
    let parameters = TimelineParameters {
        tenant: TenantId([1; 16]),
        timeline: TimelineId([2; 16]),
        system_id: SystemId(3),
        pg_version: 15,
        pg_timeline: 1,
        segment_size: 16 << 20,
        start_lsn: Lsn(16 << 20),
        ancestor: Some(TimelineId([7; 16])),
    };
    let member = |node: u64| Member { node: NodeId(node), incarnation: Incarnation([6; 16]) };
    let group = |last: u64| (1..=last).map(member).collect();
    let configuration = Configuration::joint(4, group(3), group(5)).expect("a configuration");
    let history = TermHistory::new(vec![TermStart { term: Term(1), lsn: Lsn(16 << 20) }]);
    let greeting = Greeting {
        parameters,
        known: 4,
        addresses: vec![(NodeId(1), "127.0.0.1:5454".into())],
        proposer: ProposerId([9; 16]),
    };
    let proposer = ProposerId([9; 16]);
    let request = VoteRequest { term: Term(2), proposer, configuration: configuration.clone() };
    let reply = GreetingReply {
        node: NodeId(1),
        incarnation: Incarnation([6; 16]),
        configuration: Some(configuration),
        addresses: vec![(NodeId(1), "127.0.0.1:5454".into())],
        term: Term(1),
        flush_lsn: Lsn(12),
        commit_lsn: Lsn(8),
    };
    let append =
        Append { term: Term(1), start: Lsn(8), length: 4, record_end: Lsn(12), commit_lsn: Lsn(8) };
    let ack = Ack { term: Term(1), flush_lsn: Lsn(12), commit_lsn: Lsn(8) };
    let elected = pgstrata_quorum::Elected { term: Term(1), history: history.expect("a history") };
    let all = [
        Message::Greeting(greeting),
        Message::Found((1..=3).map(|node| (NodeId(node), None)).collect()),
        Message::GreetingReply(reply),
        Message::VoteRequest(request),
        Message::Elected(elected),
        Message::Append(append, &[1, 2, 3, 4]),
        Message::Ack(ack),
        Message::Refused(RefusedReason::Quorum(Refusal::Fenced { promised: Term(2) })),
        Message::Refused(RefusedReason::Storage("full".into())),
        Message::WalChunk(Lsn(8), &[1, 2, 3, 4]),
    ];
    for (at, message) in all.iter().enumerate() {
        let mut frame = Vec::new();
        encode(message, Stamp::In(WAL.speaks.highest()), &mut frame);
        let body = [&[0, message.kind()], &frame[16..]].concat();
        seeds.offer("wire", format!("message-{at}"), body);
        seeds.offer("wire", format!("frame-{at}"), [&[1, 20], &frame[..]].concat());
    }
    let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main };
    let query = pgstrata_wire::pages::Query::Pages { rel, block: 7, count: 3 };
    let request = pgstrata_wire::pages::PagesRequest { number: 1, lsn: Lsn(8), query };
    seeds.offer("wire", "pages".into(), [&[2], &request.encode()[..]].concat());
    let startup = b"\x03\0\x03\0\0user\0postgres\0options\0-c application_name=a\\ b\0\0";
    seeds.offer("wire", "startup".into(), startup.to_vec());
    let command = b"\x03START_REPLICATION SLOT \"s\" PHYSICAL 0/1000000 TIMELINE 1";
    seeds.offer("wire", "command".into(), command.to_vec());
    let query = b"\x04Q\0\0\0\x14IDENTIFY_SYSTEM\0d\0\0\0\x26r";
    seeds.offer("wire", "session".into(), [&query[..], &[0; 33]].concat());
}

fn layers(seeds: &mut Seeds) {
    for (name, codec) in [("lz4", Codec::Lz4), ("zstd", Codec::small())] {
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main };
        let key = Key::rel_block(rel, 7);
        let header = LayerHeader {
            kind: LayerKind::Delta,
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            generation: Generation(1),
            start_lsn: Lsn(8),
            end_lsn: Lsn(64),
            min_key: key,
            max_key: key,
        };
        let mut writer = LayerWriter::new(header, codec);
        for at in 0..20u8 {
            writer.push(key, Lsn(16 + u64::from(at)), &[at / 8; 24]);
        }
        let (_, file) = writer.finish();
        // Behind the header is the only block; its length is in the index, behind the first key, LSN and offset.
        let index = file.len() - 48 - 38;
        let mut length = [0; 4];
        length.copy_from_slice(&file[index + 34..index + 38]);
        let block = &file[136..136 + u32::from_le_bytes(length) as usize];
        seeds.offer("layer", format!("block-{name}"), [&[2], block].concat());
        seeds.offer("layer", format!("file-{name}"), [&[1], &file[..]].concat());
    }
    let node =
        pgstrata_format::safekeeper::encode_identity(NodeId(1), pgstrata_ids::Incarnation([1; 16]));
    seeds.offer("layer", "identity".into(), [&[3], &node[..]].concat());
}
