//! `global/pg_control` (`ControlFileData` in catalog/pg_control.h): 8192 bytes, of which the first 296 are used.
//!
//! ```text
//! offset  field                      offset  field
//!      0  system identifier u64         184  max_worker_processes i32
//!      8  control version u32           188  max_wal_senders i32
//!     12  catalog version u32           192  max_prepared_xacts i32
//!     16  state u32                     196  max_locks_per_xact i32
//!     24  time i64                      200  track_commit_timestamp bool
//!     32  checkPoint lsn                204  maxAlign u32
//!     40  checkPointCopy (88)           208  floatFormat f64
//!    128  unloggedLSN                   216  blcksz, relseg_size, xlog_blcksz, xlog_seg_size u32
//!    136  minRecoveryPoint              232  nameDataLen, indexMaxKeys, toast chunk, loblksize u32
//!    144  minRecoveryPointTLI u32       248  float8ByVal bool
//!    152  backupStartPoint              252  data_checksum_version u32
//!    160  backupEndPoint                256  (18: default_char_signedness bool, then) nonce (32)
//!    168  backupEndRequired bool        288  crc (18: 292)
//!    172  wal_level i32
//!    176  wal_log_hints bool
//!    180  MaxConnections i32
//! ```

use crate::bytes::{Truncated, i32_at, i64_at, u8_at, u32_at, u64_at};
use crate::{CheckPoint, PgVersion};
use pgstrata_ids::Lsn;

/// Bytes of the file.
pub const CONTROL_FILE_SIZE: usize = 8192;
const USED_SIZE: usize = 296;

/// `DBState`: what the cluster was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DbState {
    /// Being created.
    Startup = 0,
    /// Shut down cleanly.
    ShutDowned = 1,
    /// Standby, shut down cleanly.
    ShutDownedInRecovery = 2,
    /// Shutting down.
    ShuttingDown = 3,
    /// In crash recovery.
    InCrashRecovery = 4,
    /// In archive recovery.
    InArchiveRecovery = 5,
    /// Running.
    InProduction = 6,
}

impl DbState {
    const fn from_number(number: u32) -> Option<DbState> {
        match number {
            0 => Some(DbState::Startup),
            1 => Some(DbState::ShutDowned),
            2 => Some(DbState::ShutDownedInRecovery),
            3 => Some(DbState::ShuttingDown),
            4 => Some(DbState::InCrashRecovery),
            5 => Some(DbState::InArchiveRecovery),
            6 => Some(DbState::InProduction),
            _ => None,
        }
    }
}

/// The bytes are no `pg_control` of a supported version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Shorter than the struct.
    #[error("pg_control is too short")]
    TooShort,
    /// Another version, or not a control file.
    #[error(
        "pg_control is of version {control_version}, catalog {catalog_version}: not PostgreSQL 15 to 18"
    )]
    Version {
        /// `pg_control_version`.
        control_version: u32,
        /// `catalog_version_no`.
        catalog_version: u32,
    },
    /// Wrong CRC.
    #[error("pg_control has a wrong checksum")]
    Checksum,
    /// A state that does not exist.
    #[error("pg_control has the unknown cluster state {0}")]
    State(u32),
}

impl From<Truncated> for ControlFileError {
    fn from(_: Truncated) -> ControlFileError {
        ControlFileError::TooShort
    }
}

/// Everything in `pg_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// Gives the control and catalog versions.
    pub version: PgVersion,
    /// Identity of the cluster.
    pub system_identifier: u64,
    /// What the cluster was doing.
    pub state: DbState,
    /// Last update, in seconds since 1970.
    pub time: i64,
    /// Start of the last checkpoint's record.
    pub checkpoint: Lsn,
    /// What that record said.
    pub checkpoint_copy: CheckPoint,
    /// Counter of fake LSNs for unlogged relations.
    pub unlogged_lsn: Lsn,
    /// Recovery must get to here before the data is consistent.
    pub min_recovery_point: Lsn,
    /// Timeline of that position.
    pub min_recovery_point_tli: u32,
    /// Redo position of the base backup that is being recovered.
    pub backup_start_point: Lsn,
    /// Its end, when taken from a standby.
    pub backup_end_point: Lsn,
    /// Is a backup-end record needed before the data is consistent?
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_xacts: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_xact: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
    /// Alignment of the build.
    pub max_align: u32,
    /// A known double, as bits, to recognise the float format.
    pub float_format: u64,
    /// Data page size, in bytes.
    pub block_size: u32,
    /// Blocks per relation segment.
    pub relation_segment_blocks: u32,
    /// WAL page size, in bytes.
    pub wal_block_size: u32,
    /// WAL segment size, in bytes.
    pub wal_segment_size: u32,
    /// `NAMEDATALEN`.
    pub name_data_length: u32,
    /// `INDEX_MAX_KEYS`.
    pub index_max_keys: u32,
    /// Largest chunk of a toasted value, in bytes.
    pub toast_max_chunk_size: u32,
    /// Large object chunk, in bytes.
    pub large_object_block_size: u32,
    /// Are eight-byte values passed by value?
    pub float8_by_value: bool,
    /// 0: pages have no checksums.
    pub data_checksum_version: u32,
    /// Signedness of `char` where the cluster was made. Stored since PostgreSQL 18; true before.
    pub default_char_signedness: bool,
    /// Nonce for mock authentication.
    pub mock_authentication_nonce: [u8; 32],
}

impl ControlFile {
    /// Reads the file; anything after the struct is ignored.
    pub fn decode(bytes: &[u8]) -> Result<ControlFile, ControlFileError> {
        let control_version = u32_at(bytes, 8)?;
        let catalog_version = u32_at(bytes, 12)?;
        let version = PgVersion::from_catalog_version(catalog_version)
            .filter(|version| version.control_version() == control_version)
            .ok_or(ControlFileError::Version { control_version, catalog_version })?;
        let crc_offset = version.control_crc_offset();
        let covered = bytes.get(..crc_offset).ok_or(ControlFileError::TooShort)?;
        if u32_at(bytes, crc_offset)? != crc32c::crc32c(covered) {
            return Err(ControlFileError::Checksum);
        }
        let state = u32_at(bytes, 16)?;
        let has_signedness = version >= PgVersion::V18;
        let nonce_offset = if has_signedness { 257 } else { 256 };
        let nonce = bytes.get(nonce_offset..).and_then(|rest| rest.first_chunk::<32>());
        let flag = |at| u8_at(bytes, at).map(|value| value != 0);
        let lsn = |at| u64_at(bytes, at).map(Lsn);
        Ok(ControlFile {
            version,
            system_identifier: u64_at(bytes, 0)?,
            state: DbState::from_number(state).ok_or(ControlFileError::State(state))?,
            time: i64_at(bytes, 24)?,
            checkpoint: lsn(32)?,
            checkpoint_copy: CheckPoint::decode(version, &covered[40..])?,
            unlogged_lsn: lsn(128)?,
            min_recovery_point: lsn(136)?,
            min_recovery_point_tli: u32_at(bytes, 144)?,
            backup_start_point: lsn(152)?,
            backup_end_point: lsn(160)?,
            backup_end_required: flag(168)?,
            wal_level: i32_at(bytes, 172)?,
            wal_log_hints: flag(176)?,
            max_connections: i32_at(bytes, 180)?,
            max_worker_processes: i32_at(bytes, 184)?,
            max_wal_senders: i32_at(bytes, 188)?,
            max_prepared_xacts: i32_at(bytes, 192)?,
            max_locks_per_xact: i32_at(bytes, 196)?,
            track_commit_timestamp: flag(200)?,
            max_align: u32_at(bytes, 204)?,
            float_format: u64_at(bytes, 208)?,
            block_size: u32_at(bytes, 216)?,
            relation_segment_blocks: u32_at(bytes, 220)?,
            wal_block_size: u32_at(bytes, 224)?,
            wal_segment_size: u32_at(bytes, 228)?,
            name_data_length: u32_at(bytes, 232)?,
            index_max_keys: u32_at(bytes, 236)?,
            toast_max_chunk_size: u32_at(bytes, 240)?,
            large_object_block_size: u32_at(bytes, 244)?,
            float8_by_value: flag(248)?,
            data_checksum_version: u32_at(bytes, 252)?,
            default_char_signedness: !has_signedness || flag(256)?,
            mock_authentication_nonce: *nonce.ok_or(ControlFileError::TooShort)?,
        })
    }

    /// The file's bytes, checksum included.
    pub fn encode(&self) -> [u8; CONTROL_FILE_SIZE] {
        let mut bytes = [0; CONTROL_FILE_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.system_identifier.to_le_bytes());
        put(8, &self.version.control_version().to_le_bytes());
        put(12, &self.version.catalog_version().to_le_bytes());
        put(16, &(self.state as u32).to_le_bytes());
        put(24, &self.time.to_le_bytes());
        put(32, &self.checkpoint.0.to_le_bytes());
        put(40, &self.checkpoint_copy.encode(self.version));
        put(128, &self.unlogged_lsn.0.to_le_bytes());
        put(136, &self.min_recovery_point.0.to_le_bytes());
        put(144, &self.min_recovery_point_tli.to_le_bytes());
        put(152, &self.backup_start_point.0.to_le_bytes());
        put(160, &self.backup_end_point.0.to_le_bytes());
        put(168, &[u8::from(self.backup_end_required)]);
        put(172, &self.wal_level.to_le_bytes());
        put(176, &[u8::from(self.wal_log_hints)]);
        put(180, &self.max_connections.to_le_bytes());
        put(184, &self.max_worker_processes.to_le_bytes());
        put(188, &self.max_wal_senders.to_le_bytes());
        put(192, &self.max_prepared_xacts.to_le_bytes());
        put(196, &self.max_locks_per_xact.to_le_bytes());
        put(200, &[u8::from(self.track_commit_timestamp)]);
        put(204, &self.max_align.to_le_bytes());
        put(208, &self.float_format.to_le_bytes());
        put(216, &self.block_size.to_le_bytes());
        put(220, &self.relation_segment_blocks.to_le_bytes());
        put(224, &self.wal_block_size.to_le_bytes());
        put(228, &self.wal_segment_size.to_le_bytes());
        put(232, &self.name_data_length.to_le_bytes());
        put(236, &self.index_max_keys.to_le_bytes());
        put(240, &self.toast_max_chunk_size.to_le_bytes());
        put(244, &self.large_object_block_size.to_le_bytes());
        put(248, &[u8::from(self.float8_by_value)]);
        put(252, &self.data_checksum_version.to_le_bytes());
        if self.version >= PgVersion::V18 {
            put(256, &[u8::from(self.default_char_signedness)]);
            put(257, &self.mock_authentication_nonce);
        } else {
            put(256, &self.mock_authentication_nonce);
        }
        let crc_offset = self.version.control_crc_offset();
        let crc = crc32c::crc32c(&bytes[..crc_offset]);
        bytes[crc_offset..crc_offset + 4].copy_from_slice(&crc.to_le_bytes());
        debug_assert!(crc_offset + 4 <= USED_SIZE);
        bytes
    }
}
