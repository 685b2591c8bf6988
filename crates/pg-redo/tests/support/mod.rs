//! Records made by hand.
#![allow(dead_code)]

use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{ControlState, Page};
use pgstrata_pg_wal::{CheckPoint, ControlFile, DbState, PgVersion};

/// The state of some cluster.
pub fn control(version: PgVersion) -> ControlState {
    ControlState::from_pg_control(&ControlFile {
        version,
        system_identifier: 1,
        state: DbState::InProduction,
        time: 0,
        checkpoint: Lsn(64),
        checkpoint_copy: CheckPoint { next_xid: 1000, next_multi: 1, ..CheckPoint::default() },
        unlogged_lsn: Lsn(1000),
        min_recovery_point: Lsn(0),
        min_recovery_point_tli: 0,
        backup_start_point: Lsn(0),
        backup_end_point: Lsn(0),
        backup_end_required: false,
        wal_level: 1,
        wal_log_hints: false,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_xacts: 0,
        max_locks_per_xact: 64,
        track_commit_timestamp: true,
        max_align: 8,
        float_format: 0,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        wal_block_size: 8192,
        wal_segment_size: 16 << 20,
        name_data_length: 64,
        index_max_keys: 32,
        toast_max_chunk_size: 1996,
        large_object_block_size: 2048,
        float8_by_value: true,
        data_checksum_version: 1,
        default_char_signedness: true,
        mock_authentication_nonce: [0; 32],
    })
}

/// A block reference of a record that is being made.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its id in the record.
    pub id: u8,
    /// Block number.
    pub number: u32,
    /// Fork.
    pub fork: u8,
    /// Rebuilt from zeros.
    pub init: bool,
    /// Its data.
    pub data: Vec<u8>,
    /// An image for comparison.
    pub image: Option<Page>,
}

/// A record of transaction 700, without a checksum.
pub fn record_bytes(rmgr: u8, info: u8, blocks: &[Block], main: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[4..8].copy_from_slice(&700u32.to_le_bytes());
    bytes[16] = info;
    bytes[17] = rmgr;
    for block in blocks {
        let mut flags = block.fork;
        flags |= if block.image.is_some() { 0x10 } else { 0 };
        flags |= if block.data.is_empty() { 0 } else { 0x20 };
        flags |= if block.init { 0x40 } else { 0 };
        bytes.extend_from_slice(&[block.id, flags]);
        bytes.extend_from_slice(&(block.data.len() as u16).to_le_bytes());
        if block.image.is_some() {
            bytes.extend_from_slice(&(PAGE_SIZE as u16).to_le_bytes());
            bytes.extend_from_slice(&[0, 0, 0]);
        }
        for word in [1663, 5, 16384, block.number] {
            bytes.extend_from_slice(&u32::to_le_bytes(word));
        }
    }
    bytes.push(254);
    bytes.extend_from_slice(&(main.len() as u32).to_le_bytes());
    for block in blocks {
        if let Some(image) = &block.image {
            bytes.extend_from_slice(image);
        }
        bytes.extend_from_slice(&block.data);
    }
    bytes.extend_from_slice(main);
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// A record without blocks.
pub fn plain_record(rmgr: u8, info: u8, xid: u32, origin: Option<u16>, main: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[4..8].copy_from_slice(&xid.to_le_bytes());
    bytes[16] = info;
    bytes[17] = rmgr;
    if let Some(origin) = origin {
        bytes.push(253);
        bytes.extend_from_slice(&origin.to_le_bytes());
    }
    bytes.push(254);
    bytes.extend_from_slice(&(main.len() as u32).to_le_bytes());
    bytes.extend_from_slice(main);
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// Little-endian fields behind each other.
#[derive(Clone, Default)]
pub struct Fields(pub Vec<u8>);

impl Fields {
    /// None yet.
    pub fn new() -> Fields {
        Fields::default()
    }

    /// One byte.
    pub fn u8(mut self, value: u8) -> Fields {
        self.0.push(value);
        self
    }

    /// Two bytes.
    pub fn u16(mut self, value: u16) -> Fields {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Four bytes.
    pub fn u32(mut self, value: u32) -> Fields {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn u64(mut self, value: u64) -> Fields {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Fields {
        self.0.extend_from_slice(bytes);
        self
    }
}
