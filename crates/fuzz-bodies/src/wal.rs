//! The WAL stream decoder, and one record's parts.

use crate::input::Input;
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_wal::{
    DecodedRecord, PageHeader, PgVersion, Record, WalDecoder, page_header_size, record_name,
};

const SEGMENT_SIZE: u64 = 1 << 20;
const HEADER: usize = 24;
/// Before the resource manager's bytes there is always a page's worth of segment.
const START: Lsn = Lsn(SEGMENT_SIZE);

/// A stream of WAL.
///
/// ```text
/// u8   1: the rest is a stream as it is, after u64 start, u8 piece; else bodies to be framed
/// u8   version
/// then bodies: u8 resource manager, u8 info, u16 length, bytes
/// ```
/// Framed bodies have right headers and checksums: the decoder must return every one, whatever the pieces in which the
/// stream is fed; with one byte of the stream changed it must return a prefix of them or nothing wrong.
pub fn wal(data: &[u8]) {
    let mut input = Input(data);
    if input.u8() == 1 {
        raw(&mut input);
    } else {
        framed(&mut input);
    }
}

fn raw(input: &mut Input<'_>) {
    let start = Lsn(input.u64());
    let piece = usize::from(input.u8()) + 1;
    let mut decoder = WalDecoder::new(start, SEGMENT_SIZE);
    let mut fed = 0;
    while !input.is_empty() {
        let bytes = input.take(piece * 16);
        fed += bytes.len();
        decoder.feed(bytes);
        while let Ok(Some(found)) = decoder.poll() {
            assert!(found.bytes.len() <= fed);
            let _ = DecodedRecord::decode(found);
        }
    }
    let _ = (decoder.position(), decoder.feed_position(), decoder.timeline(), decoder.rewind());
}

/// A stream of bodies, and the records that are in it.
struct Framed {
    stream: Vec<u8>,
    records: Vec<Vec<u8>>,
}

impl Framed {
    fn push(&mut self, version: PgVersion, rmgr: u8, info: u8, body: &[u8], prev: Lsn) -> Lsn {
        let mut record = vec![0; HEADER];
        record.extend_from_slice(body);
        let total = record.len() as u32;
        record[..4].copy_from_slice(&total.to_le_bytes());
        record[8..16].copy_from_slice(&prev.0.to_le_bytes());
        record[16] = info;
        record[17] = rmgr;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[HEADER..]), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        self.stream.resize(self.stream.len().next_multiple_of(8), 0);
        let mut start = None;
        let mut rest = &record[..];
        while !rest.is_empty() {
            let at = START + self.stream.len() as u64;
            if at.page_offset() == 0 {
                let first = at.segment_offset(SEGMENT_SIZE) == 0;
                let header = PageHeader {
                    version,
                    tli: 1,
                    address: at,
                    continuation: (rest.len() < record.len()).then_some(rest.len() as u32),
                    overwrites_contrecord: false,
                    segment: first.then_some((7, SEGMENT_SIZE as u32)),
                };
                header.encode(&mut self.stream);
                assert_eq!(
                    (START + self.stream.len() as u64) - at,
                    page_header_size(at, SEGMENT_SIZE) as u64
                );
                continue;
            }
            start.get_or_insert(at);
            let room = PAGE_SIZE - at.page_offset() as usize;
            let (piece, left) = rest.split_at(rest.len().min(room));
            self.stream.extend_from_slice(piece);
            rest = left;
        }
        self.records.push(record);
        start.unwrap_or(START)
    }
}

fn framed(input: &mut Input<'_>) {
    let version = PgVersion::ALL[usize::from(input.u8() & 3)];
    let (piece, flip_at, flip) = (input.u16(), input.u32(), input.u8());
    let mut framed = Framed { stream: Vec::new(), records: Vec::new() };
    let mut prev = Lsn(8);
    while !input.is_empty() {
        // What no resource manager has is refused before the checksum is looked at; a switch ends the stream.
        let (rmgr, info) = (input.u8() % 22, input.u8() & 0xB0);
        let length = usize::from(input.u16());
        let body = input.take(length);
        prev = framed.push(version, rmgr, info, body, prev);
    }
    let decoded = decode(&framed.stream, usize::from(piece) + 1);
    assert!(decoded == framed.records, "a right stream gives its records");
    if flip != 0 && !framed.stream.is_empty() {
        let at = flip_at as usize % framed.stream.len();
        framed.stream[at] ^= flip;
        let decoded = decode(&framed.stream, PAGE_SIZE);
        assert!(framed.records.starts_with(&decoded), "a damaged stream gives no wrong record");
    }
}

fn decode(stream: &[u8], piece: usize) -> Vec<Vec<u8>> {
    let mut decoder = WalDecoder::new(START, SEGMENT_SIZE);
    let mut found = Vec::new();
    for bytes in stream.chunks(piece) {
        decoder.feed(bytes);
        while let Ok(Some(record)) = decoder.poll() {
            let _ = DecodedRecord::decode(record);
            found.push(record.bytes.to_vec());
        }
    }
    found
}

/// One record, of which only the length is put right.
pub fn record(data: &[u8]) {
    let mut bytes = data.to_vec();
    if let Some(length) = bytes.get_mut(..4) {
        length.copy_from_slice(&(data.len() as u32).to_le_bytes());
    }
    let found = Record { lsn: Lsn(0x1000), end: Lsn(0x2000), bytes: &bytes };
    let Ok(decoded) = DecodedRecord::decode(found) else { return };
    let payload = decoded.main_data.len() + decoded.images_length();
    let data_length: usize = decoded.blocks.iter().map(|block| block.data.len()).sum();
    assert!(payload + data_length <= data.len());
    for version in PgVersion::ALL {
        let _ = record_name(version, decoded.header.rmgr, decoded.header.info);
    }
    for block in &decoded.blocks {
        assert_eq!(decoded.block(block.id).map(|found| found.block), Some(block.block));
        if let Some(image) = block.image {
            let mut page = [0; PAGE_SIZE];
            let _ = image.restore(&mut page);
        }
    }
}
