//! The few records that we append ourselves, with the page headers around them.

use crate::checkpoint::CheckPoint;
use crate::page_header::{PageHeader, page_header_size};
use crate::record::{HEADER_SIZE, RMGR_XLOG};
use crate::version::PgVersion;
use pgstrata_ids::{Lsn, PAGE_SIZE};

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_NOOP: u8 = 0x20;
/// Fragment id of main data with a one-byte length.
const DATA_SHORT: u8 = 255;

/// Bytes to append to a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where the record starts: after any page header at the position it was placed at.
    pub start: Lsn,
    /// From the position it was placed at to `end`, page headers and padding included.
    pub bytes: Vec<u8>,
    /// Where the next record goes.
    pub end: Lsn,
}

/// What the page headers of one timeline's log say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalWriter {
    /// Gives the page magic.
    pub version: PgVersion,
    /// Timeline.
    pub tli: u32,
    /// Identity of the cluster.
    pub system_identifier: u64,
    /// Segment size, in bytes.
    pub segment_size: u64,
}

impl WalWriter {
    /// A record without data, `XLOG_NOOP`: changes nothing anywhere. `at` is the end of the record that starts at
    /// `prev`.
    pub fn noop(&self, at: Lsn, prev: Lsn) -> Placed {
        self.place(at, self.record(XLOG_NOOP, prev, &[]))
    }

    /// A shutdown checkpoint. Its redo position is the record's own start, whatever `checkpoint` says: that is what
    /// makes PostgreSQL start without recovery.
    pub fn checkpoint_shutdown(&self, at: Lsn, prev: Lsn, checkpoint: &CheckPoint) -> Placed {
        let checkpoint = CheckPoint { redo: self.record_start(at), ..*checkpoint };
        self.place(
            at,
            self.record(XLOG_CHECKPOINT_SHUTDOWN, prev, &checkpoint.encode(self.version)),
        )
    }

    /// Where a record placed at `at` starts: behind the page header, if `at` is a page's start.
    pub fn record_start(&self, at: Lsn) -> Lsn {
        let at = at.align_up();
        if at.page_offset() == 0 { at + page_header_size(at, self.segment_size) as u64 } else { at }
    }

    /// A segment's bytes from its start up to `until` (in that segment): right page headers, and zeros between. Enough
    /// for PostgreSQL to read records that follow.
    pub fn segment_prefix(&self, until: Lsn) -> Vec<u8> {
        // A prefix that ends at a segment's end is that whole segment.
        let start = Lsn(until.0.saturating_sub(1)).segment_start(self.segment_size);
        let length = until.saturating_sub(start) as usize;
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let page = start + bytes.len() as u64;
            self.page_header(page, None).encode(&mut bytes);
            bytes.resize((bytes.len().next_multiple_of(PAGE_SIZE)).min(length), 0);
        }
        bytes.truncate(length);
        bytes
    }

    /// As [`WalWriter::segment_prefix`], for readers that look for the first record of the page in which `until` lies
    /// before they go to `until` itself, as `pg_waldump` does (`XLogFindNextRecord`): what is before it there is the rest
    /// of a record that began earlier, which such a reader skips.
    pub fn skipped_prefix(&self, until: Lsn) -> Vec<u8> {
        let mut bytes = self.segment_prefix(until);
        let offset = until.page_offset() as usize;
        let page = Lsn(until.0 - offset as u64);
        let header = page_header_size(page, self.segment_size);
        if let Some(rest) = offset.checked_sub(header).filter(|rest| *rest > 0) {
            let mut skipping = Vec::with_capacity(header);
            self.page_header(page, Some(rest as u32)).encode(&mut skipping);
            let at = bytes.len() - offset;
            bytes[at..at + header].copy_from_slice(&skipping);
        }
        bytes
    }

    fn page_header(&self, page: Lsn, continuation: Option<u32>) -> PageHeader {
        let first = page.segment_offset(self.segment_size) == 0;
        PageHeader {
            version: self.version,
            tli: self.tli,
            address: page,
            continuation,
            overwrites_contrecord: false,
            segment: first.then_some((self.system_identifier, self.segment_size as u32)),
        }
    }

    /// A record of the XLOG resource manager with at most 255 bytes of main data.
    fn record(&self, info: u8, prev: Lsn, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        if !data.is_empty() {
            bytes.push(DATA_SHORT);
            bytes.push(data.len() as u8);
            bytes.extend_from_slice(data);
        }
        let total = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&total.to_le_bytes());
        bytes[8..16].copy_from_slice(&prev.0.to_le_bytes());
        bytes[16] = info;
        bytes[17] = RMGR_XLOG;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[HEADER_SIZE..]), &bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// A whole record, header and checksum included, with the page headers that it needs at `at`.
    pub fn place(&self, at: Lsn, record: Vec<u8>) -> Placed {
        let start = self.record_start(at);
        let mut bytes = Vec::with_capacity(record.len() + 128);
        bytes.resize((at.align_up() - at) as usize, 0);
        let mut cursor = at.align_up();
        let mut rest = &record[..];
        while !rest.is_empty() {
            if cursor.page_offset() == 0 {
                let continuation = (rest.len() < record.len()).then_some(rest.len() as u32);
                let before = bytes.len();
                self.page_header(cursor, continuation).encode(&mut bytes);
                cursor = cursor + (bytes.len() - before) as u64;
            }
            let room = PAGE_SIZE - cursor.page_offset() as usize;
            let (piece, left) = rest.split_at(rest.len().min(room));
            bytes.extend_from_slice(piece);
            cursor = cursor + piece.len() as u64;
            rest = left;
        }
        let end = cursor.align_up();
        bytes.resize(bytes.len() + (end - cursor) as usize, 0);
        Placed { start, bytes, end }
    }
}
