//! Synthetic WAL that every check of the decoder accepts.

use pgstrata_ids::{Lsn, PAGE_SIZE, SystemId, TenantId, TimelineId, TimelineParameters};
use pgstrata_pg_wal::{PageHeader, PgVersion, page_header_size};

/// `XLOG_SWITCH` of PostgreSQL's `pg_control.h`, and whose record it is.
const INFO_SWITCH: u8 = 0x40;
const RMGR_XLOG: u8 = 0;

/// Of `RM_LOGICALMSG_ID`, in whose main data anything may be.
const INFO_ORDINARY: u8 = 0;
const RMGR_ORDINARY: u8 = 21;

/// The smallest that PostgreSQL can have, in bytes.
pub const SEGMENT_SIZE: u64 = 1 << 20;

/// Of a timeline that starts there.
pub fn parameters(start: Lsn) -> TimelineParameters {
    TimelineParameters {
        tenant: TenantId([0x11; 16]),
        timeline: TimelineId([0x22; 16]),
        system_id: SystemId(0x1234_5678_9ABC),
        pg_version: 15,
        pg_timeline: 1,
        segment_size: SEGMENT_SIZE as u32,
        start_lsn: start,
        ancestor: None,
    }
}

/// Writes records one after the other.
#[derive(Clone, Debug)]
pub struct WalGenerator {
    /// Of whose WAL.
    pub parameters: TimelineParameters,
    /// Where the next record goes.
    pub at: Lsn,
    /// Start of the last record.
    pub prev: Lsn,
    counter: u64,
}

impl WalGenerator {
    /// Goes on at `at`, after a record that started at `prev`.
    pub fn new(parameters: TimelineParameters, at: Lsn, prev: Lsn) -> WalGenerator {
        WalGenerator { parameters, at, prev, counter: 0 }
    }

    /// The same, with records that differ from those of generators with other numbers.
    pub fn numbered(self, number: u64) -> WalGenerator {
        WalGenerator { counter: number << 32, ..self }
    }

    /// The bytes of one record with `size` bytes of main data, from the current position on.
    pub fn record(&mut self, size: usize) -> Vec<u8> {
        self.counter += 1;
        let mut data = vec![0; size];
        for (index, eight) in data.chunks_mut(8).enumerate() {
            let fill = self.counter ^ u64::from_le_bytes([index as u8; 8]);
            eight.copy_from_slice(&fill.to_le_bytes()[..eight.len()]);
        }
        self.record_of(&data)
    }

    /// The bytes of one record with this main data, from the current position on.
    pub fn record_of(&mut self, data: &[u8]) -> Vec<u8> {
        self.place(&self.encode(INFO_ORDINARY, RMGR_ORDINARY, data))
    }

    /// A record that ends its segment, and the zeros after it.
    pub fn switch(&mut self) -> Vec<u8> {
        let record = self.encode(INFO_SWITCH, RMGR_XLOG, &[]);
        let mut bytes = self.place(&record);
        let segment_size = u64::from(self.parameters.segment_size);
        let end = Lsn(self.at.0.next_multiple_of(segment_size));
        bytes.resize(bytes.len() + (end - self.at) as usize, 0);
        self.at = end;
        bytes
    }

    fn encode(&self, info: u8, rmgr: u8, data: &[u8]) -> Vec<u8> {
        let mut record = vec![0; 24];
        if !data.is_empty() {
            record.push(254);
            record.extend_from_slice(&(data.len() as u32).to_le_bytes());
            record.extend_from_slice(data);
        }
        let total = record.len() as u32;
        record[0..4].copy_from_slice(&total.to_le_bytes());
        record[8..16].copy_from_slice(&self.prev.0.to_le_bytes());
        record[16] = info;
        record[17] = rmgr;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn place(&mut self, record: &[u8]) -> Vec<u8> {
        let segment_size = u64::from(self.parameters.segment_size);
        let mut bytes = Vec::with_capacity(record.len() + 64);
        let mut cursor = self.at;
        let mut rest = record;
        while !rest.is_empty() {
            if cursor.page_offset() == 0 {
                let continued = rest.len() < record.len();
                let first = cursor.segment_offset(segment_size) == 0;
                PageHeader {
                    version: PgVersion::from_major(self.parameters.pg_version)
                        .expect("a version that exists"),
                    tli: self.parameters.pg_timeline,
                    address: cursor,
                    continuation: continued.then_some(rest.len() as u32),
                    overwrites_contrecord: false,
                    segment: first.then_some((self.parameters.system_id.0, segment_size as u32)),
                }
                .encode(&mut bytes);
                cursor = cursor + page_header_size(cursor, segment_size) as u64;
            }
            if rest.len() == record.len() {
                self.prev = cursor;
            }
            let room = PAGE_SIZE - cursor.page_offset() as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            bytes.extend_from_slice(now);
            cursor = cursor + now.len() as u64;
            rest = later;
        }
        let end = cursor.align_up();
        bytes.resize(bytes.len() + (end - cursor) as usize, 0);
        self.at = end;
        bytes
    }
}
