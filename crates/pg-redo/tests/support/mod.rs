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

/// A stored piece of a record (`value.rs` has its form), as of a cluster with checksums.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Version of the server.
    pub version: PgVersion,
    /// Resource manager and info bits.
    pub kind: (u8, u8),
    /// Id of the block in the record.
    pub role: u8,
    /// Rebuilt from zeros.
    pub init: bool,
    /// Ids and numbers of the record's other blocks.
    pub others: Vec<(u8, u32)>,
    /// Main data.
    pub main: Vec<u8>,
    /// The block's data.
    pub data: Vec<u8>,
}

impl Piece {
    /// Of version 15, for block 0, without data.
    pub fn new(kind: (u8, u8), main: Fields) -> Piece {
        let version = PgVersion::V15;
        let (others, data) = (Vec::new(), Vec::new());
        Piece { version, kind, role: 0, init: false, others, main: main.0, data }
    }

    /// For block `role` of the record.
    pub fn role(self, role: u8) -> Piece {
        Piece { role, ..self }
    }

    /// With data of the block.
    pub fn data(self, data: Fields) -> Piece {
        Piece { data: data.0, ..self }
    }

    /// Beside other blocks.
    pub fn others(self, others: &[(u8, u32)]) -> Piece {
        Piece { others: others.to_vec(), ..self }
    }

    /// Of another version.
    pub fn version(self, version: PgVersion) -> Piece {
        Piece { version, ..self }
    }

    /// Of a page rebuilt from zeros.
    pub fn init(self) -> Piece {
        Piece { init: true, ..self }
    }

    /// The value's bytes. The transaction is 700.
    pub fn encode(&self) -> Vec<u8> {
        let tag = 2 | 0x40 | ((self.version.major() - 15) << 4) as u8;
        let fields = Fields::new()
            .u8(tag | if self.init { 0x88 } else { 0 })
            .u8(self.kind.0)
            .u8(self.kind.1)
            .u8(self.role)
            .u32(700)
            .u8(self.others.len() as u8);
        let add = |fields: Fields, (id, block): &(u8, u32)| fields.u8(*id).u32(*block);
        let fields = self.others.iter().fold(fields, add);
        fields.u8(255).u32(self.main.len() as u32).bytes(&self.main).bytes(&self.data).0
    }

    /// Applies it to a block that is numbered 3, at this position, or gives the reason why it does not apply.
    pub fn apply_at(&self, page: &mut Page, end_lsn: Lsn) -> Result<(), &'static str> {
        match pgstrata_pg_redo::apply_block(page, &self.encode(), 3, end_lsn) {
            Ok(()) => Ok(()),
            Err(pgstrata_pg_redo::RedoError::Apply { reason, block: 3, .. }) => Err(reason),
            Err(other) => panic!("{other}"),
        }
    }

    /// The page after it, whose LSN is left at zero.
    pub fn after(&self, before: &Page) -> Result<Page, &'static str> {
        let mut page = *before;
        self.apply_at(&mut page, Lsn(0x5_0000_0080))?;
        assert_eq!(pgstrata_pg_redo::page::lsn(&page), Lsn(0x5_0000_0080));
        page[..8].copy_from_slice(&before[..8]);
        Ok(page)
    }
}

/// Sets two bytes.
pub fn put_u16(page: &mut Page, at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Sets four bytes.
pub fn put_u32(page: &mut Page, at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// A page with a special space of this size, whose items have these bytes. What is free is filled with 0x11: redo must
/// leave it.
pub fn page_of(special: usize, items: &[&[u8]]) -> Page {
    let mut page = [0x11; PAGE_SIZE];
    page[..24].fill(0);
    let mut upper = PAGE_SIZE - special;
    page[upper..].fill(0);
    put_u16(&mut page, 16, upper as u16);
    put_u16(&mut page, 18, 0x2004);
    for (index, item) in items.iter().enumerate() {
        upper -= item.len().next_multiple_of(8);
        page[upper..upper + item.len()].copy_from_slice(item);
        let line = upper as u32 | 1 << 15 | (item.len() as u32) << 17;
        put_u32(&mut page, 24 + index * 4, line);
    }
    put_u16(&mut page, 12, 24 + items.len() as u16 * 4);
    put_u16(&mut page, 14, upper as u16);
    page
}

/// A page with these fields changed.
pub fn with(page: &Page, change: impl FnOnce(&mut Page)) -> Page {
    let mut page = *page;
    change(&mut page);
    page
}
