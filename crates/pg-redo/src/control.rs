//! What WAL changes in `pg_control` and the shared counters, followed record by record.
//!
//! This is the state that stock recovery would have at its end, so that a cluster can be started at any position as if
//! it had been shut down there (access/transam/xlog.c `xlog_redo`, varsup.c, multixact.c, commit_ts.c).
//!
//! ```text
//! counters (40)   next xid u64, next oid u32, next multi u32, next multi offset u32,
//!                 oldest and newest commit timestamp xid u32, offsets page u32, initialised early u32, reserved u32
//! full            format u8 (1), full page writes u8, tli u32, oldest xid u32 and its database u32,
//!                 oldest multi u32 and its database u32, counters (40), pg_control (296)
//! ```

use crate::error::{RecordKind, RedoError, Step};
use crate::slru::OFFSETS_PER_PAGE;
use crate::xact::{self, Prepare, Xact};
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::bytes::{Reader, u8_at, u32_at};
use pgstrata_pg_wal::{
    CheckPoint, ControlFile, ControlFileError, DbState, DecodedRecord, PgVersion, rmgr,
};

const FORMAT: u8 = 1;
const CONTROL_SIZE: usize = 296;
const NONE: u32 = u32::MAX;
const FIRST_NORMAL_XID: u32 = 3;
/// Where the server starts its counter of fake LSNs for unlogged relations.
const FIRST_UNLOGGED_LSN: Lsn = Lsn(1000);
const DB_SHUTDOWN: DbState = DbState::ShutDowned;

/// How much a record changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Changed {
    /// Nothing.
    Nothing,
    /// Only what [`ControlState::encode_counters`] holds.
    Counters,
    /// More than that: [`ControlState::encode`].
    Full,
}

/// A stored control state that this code did not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlStateError {
    /// Written by a later version of this program.
    #[error("control state has format {0}, which is newer than this program")]
    Newer(u8),
    /// Too short.
    #[error("control state is cut off")]
    Truncated,
    /// The `pg_control` inside is wrong.
    #[error(transparent)]
    ControlFile(#[from] ControlFileError),
}

/// The control file and the live counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlState {
    /// Parameters, identity, and the last checkpoint that was seen.
    pub control: ControlFile,
    /// Timeline that is being written.
    pub tli: u32,
    /// Are full-page writes on?
    pub full_page_writes: bool,
    /// Next transaction, with epoch.
    pub next_xid: u64,
    /// Next oid.
    pub next_oid: u32,
    /// Next multixact.
    pub next_multi: u32,
    /// Next multixact member.
    pub next_multi_offset: u32,
    /// Oldest transaction that may still be in a tuple.
    pub oldest_xid: u32,
    /// Database with that transaction.
    pub oldest_xid_db: u32,
    /// Oldest multixact that may still be in a tuple.
    pub oldest_multi: u32,
    /// Database with that multixact.
    pub oldest_multi_db: u32,
    /// Oldest transaction with a commit timestamp, or 0.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction with a commit timestamp, or 0.
    pub newest_commit_ts_xid: u32,
    /// The last multixact offsets page that was initialised.
    pub(crate) offsets_page: u32,
    /// That page was initialised early, so its own record must be skipped.
    pub(crate) offsets_page_early: Option<u32>,
}

/// `TransactionIdPrecedes`: modulo 2^32 among normal ids, plain order where a special one is involved.
pub(crate) fn xid_precedes(a: u32, b: u32) -> bool {
    if a < FIRST_NORMAL_XID || b < FIRST_NORMAL_XID {
        return a < b;
    }
    (a.wrapping_sub(b) as i32) < 0
}

fn wrapping_precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl ControlState {
    /// The state at the checkpoint in a control file.
    pub fn from_pg_control(control: &ControlFile) -> ControlState {
        let copy = &control.checkpoint_copy;
        ControlState {
            control: *control,
            tli: copy.this_tli,
            full_page_writes: copy.full_page_writes,
            next_xid: copy.next_xid,
            next_oid: copy.next_oid,
            next_multi: copy.next_multi,
            next_multi_offset: copy.next_multi_offset,
            oldest_xid: copy.oldest_xid,
            oldest_xid_db: copy.oldest_xid_db,
            oldest_multi: copy.oldest_multi,
            oldest_multi_db: copy.oldest_multi_db,
            oldest_commit_ts_xid: copy.oldest_commit_ts_xid,
            newest_commit_ts_xid: copy.newest_commit_ts_xid,
            offsets_page: copy.next_multi / OFFSETS_PER_PAGE,
            offsets_page_early: None,
        }
    }

    /// PostgreSQL's version.
    pub fn version(&self) -> PgVersion {
        self.control.version
    }

    /// `XLogHintBitIsNeeded`: pages carry checksums, or hint bits are logged.
    pub fn hint_bits_are_logged(&self) -> bool {
        self.control.data_checksum_version != 0 || self.control.wal_log_hints
    }

    /// A 32-bit transaction id with its epoch: those above the next one's low half are of the epoch before.
    pub fn full_xid(&self, xid: u32) -> u64 {
        let epoch = self.next_xid >> 32;
        let epoch = if xid > self.next_xid as u32 { epoch.wrapping_sub(1) } else { epoch };
        epoch << 32 | u64::from(xid)
    }

    /// `AdvanceNextFullTransactionIdPastXid`.
    fn advance_past(&mut self, xid: u32) -> bool {
        let next = self.next_xid as u32;
        if xid < FIRST_NORMAL_XID || xid_precedes(xid, next) {
            return false;
        }
        let after = xid.wrapping_add(1).max(FIRST_NORMAL_XID);
        let epoch = (self.next_xid >> 32) + u64::from(after < next);
        self.next_xid = epoch << 32 | u64::from(after);
        true
    }

    /// Follows one record. `Effects::derive` calls this itself; calling it twice for a record does no harm.
    pub fn observe(&mut self, record: &DecodedRecord<'_>) -> Result<Changed, RedoError> {
        self.observe_record(record).map_err(|bad| RedoError::Record {
            record: RecordKind {
                version: self.version(),
                rmgr: record.header.rmgr,
                info: record.header.info,
            },
            lsn: record.lsn,
            reason: bad.0,
        })
    }

    fn observe_record(&mut self, record: &DecodedRecord<'_>) -> Step<Changed> {
        let advanced = self.advance_past(record.header.xid);
        let changed = match record.header.rmgr {
            rmgr::XLOG => self.observe_xlog(record)?,
            rmgr::TRANSACTION => self.observe_transaction(record)?,
            rmgr::MULTIXACT => self.observe_multixact(record)?,
            rmgr::COMMIT_TS if record.header.opcode() == 0x10 => {
                let at = self.version().slru_page_number_size();
                let oldest = u32_at(record.main_data, at)?;
                if self.oldest_commit_ts_xid != 0 && xid_precedes(self.oldest_commit_ts_xid, oldest)
                {
                    self.oldest_commit_ts_xid = oldest;
                }
                Changed::Counters
            }
            _ => Changed::Nothing,
        };
        Ok(if advanced { changed.max(Changed::Counters) } else { changed })
    }

    fn observe_xlog(&mut self, record: &DecodedRecord<'_>) -> Step<Changed> {
        let main = record.main_data;
        match record.header.opcode() {
            0x00 => self.observe_checkpoint(record, true)?,
            0x10 => self.observe_checkpoint(record, false)?,
            0x30 => {
                self.next_oid = u32_at(main, 0)?;
                return Ok(Changed::Counters);
            }
            0x60 => self.observe_parameters(main)?,
            0x80 => self.full_page_writes = u8_at(main, 0)? != 0,
            0x90 => self.tli = u32_at(main, 8)?,
            _ => return Ok(Changed::Nothing),
        }
        Ok(Changed::Full)
    }

    fn observe_checkpoint(&mut self, record: &DecodedRecord<'_>, shutdown: bool) -> Step<()> {
        let checkpoint = CheckPoint::decode(self.version(), record.main_data)?;
        self.control.checkpoint = record.lsn;
        self.control.checkpoint_copy = checkpoint;
        self.control.time = checkpoint.time;
        self.full_page_writes = checkpoint.full_page_writes;
        self.tli = checkpoint.this_tli;
        if shutdown {
            self.next_xid = checkpoint.next_xid;
            self.next_oid = checkpoint.next_oid;
            self.next_multi = checkpoint.next_multi;
            self.next_multi_offset = checkpoint.next_multi_offset;
        } else {
            // The next oid is not taken from an online checkpoint: NEXTOID records are ahead of it.
            self.next_xid = self.next_xid.max(checkpoint.next_xid);
            self.advance_multi(checkpoint.next_multi, checkpoint.next_multi_offset);
        }
        if shutdown || xid_precedes(self.oldest_xid, checkpoint.oldest_xid) {
            self.oldest_xid = checkpoint.oldest_xid;
            self.oldest_xid_db = checkpoint.oldest_xid_db;
        }
        self.advance_oldest_multi(checkpoint.oldest_multi, checkpoint.oldest_multi_db);
        Ok(())
    }

    fn observe_parameters(&mut self, main: &[u8]) -> Step<()> {
        let mut reader = Reader::new(main);
        let control = &mut self.control;
        control.max_connections = reader.i32()?;
        control.max_worker_processes = reader.i32()?;
        control.max_wal_senders = reader.i32()?;
        control.max_prepared_xacts = reader.i32()?;
        control.max_locks_per_xact = reader.i32()?;
        control.wal_level = reader.i32()?;
        control.wal_log_hints = reader.u8()? != 0;
        let track = reader.u8()? != 0;
        if track && !control.track_commit_timestamp && self.oldest_commit_ts_xid == 0 {
            // ActivateCommitTs.
            self.oldest_commit_ts_xid = self.next_xid as u32;
            self.newest_commit_ts_xid = self.next_xid as u32;
        } else if !track && control.track_commit_timestamp {
            // DeactivateCommitTs.
            self.oldest_commit_ts_xid = 0;
            self.newest_commit_ts_xid = 0;
        }
        self.control.track_commit_timestamp = track;
        Ok(())
    }

    fn observe_transaction(&mut self, record: &DecodedRecord<'_>) -> Step<Changed> {
        let info = record.header.info;
        let mut advanced = false;
        match info & 0x70 {
            xact::COMMIT | xact::ABORT | xact::COMMIT_PREPARED | xact::ABORT_PREPARED => {
                let xact = Xact::decode(self.version(), info, record.header.xid, record.main_data)?;
                for xid in xact.all_xids() {
                    advanced |= self.advance_past(xid);
                }
                if xact.commits && self.control.track_commit_timestamp {
                    for xid in xact.all_xids() {
                        if xid_precedes(self.newest_commit_ts_xid, xid) {
                            self.newest_commit_ts_xid = xid;
                            advanced = true;
                        }
                    }
                }
            }
            xact::PREPARE => {
                for xid in Prepare::decode(record.main_data)?.subxids() {
                    advanced |= self.advance_past(xid);
                }
            }
            _ => {}
        }
        Ok(if advanced { Changed::Counters } else { Changed::Nothing })
    }

    fn observe_multixact(&mut self, record: &DecodedRecord<'_>) -> Step<Changed> {
        let main = record.main_data;
        match record.header.opcode() {
            0x20 => {
                let mut reader = Reader::new(main);
                let multi = reader.u32()?;
                let offset = reader.u32()?;
                let count = reader.u32()?;
                for _ in 0..count {
                    let xid = reader.u32()?;
                    reader.u32()?;
                    self.advance_past(xid);
                }
                self.advance_multi(multi.wrapping_add(1), offset.wrapping_add(count));
                Ok(Changed::Counters)
            }
            0x30 => {
                self.advance_oldest_multi(u32_at(main, 8)?, u32_at(main, 0)?);
                Ok(Changed::Full)
            }
            _ => Ok(Changed::Nothing),
        }
    }

    fn advance_multi(&mut self, multi: u32, offset: u32) {
        if wrapping_precedes(self.next_multi, multi) {
            self.next_multi = multi;
        }
        if wrapping_precedes(self.next_multi_offset, offset) {
            self.next_multi_offset = offset;
        }
    }

    fn advance_oldest_multi(&mut self, multi: u32, database: u32) {
        if wrapping_precedes(self.oldest_multi, multi) {
            self.oldest_multi = multi;
            self.oldest_multi_db = database;
        }
    }

    /// The checkpoint of a clean shutdown now, whose record starts at `at`. `time` is in seconds since 1970.
    pub fn checkpoint(&self, at: Lsn, time: i64) -> CheckPoint {
        CheckPoint {
            redo: at,
            this_tli: self.tli,
            prev_tli: self.tli,
            full_page_writes: self.full_page_writes,
            // The field exists since 17.
            wal_level: if self.version() >= PgVersion::V17 {
                self.control.wal_level as u32
            } else {
                0
            },
            next_xid: self.next_xid,
            next_oid: self.next_oid,
            next_multi: self.next_multi,
            next_multi_offset: self.next_multi_offset,
            oldest_xid: self.oldest_xid,
            oldest_xid_db: self.oldest_xid_db,
            oldest_multi: self.oldest_multi,
            oldest_multi_db: self.oldest_multi_db,
            time,
            oldest_commit_ts_xid: self.oldest_commit_ts_xid,
            newest_commit_ts_xid: self.newest_commit_ts_xid,
            // Only meaningful in an online checkpoint.
            oldest_active_xid: 0,
        }
    }

    /// The control file of a cluster that was shut down cleanly by [`ControlState::checkpoint`] at `at`.
    pub fn to_pg_control(&self, at: Lsn, time: i64) -> ControlFile {
        ControlFile {
            state: DB_SHUTDOWN,
            time,
            checkpoint: at,
            checkpoint_copy: self.checkpoint(at, time),
            unlogged_lsn: FIRST_UNLOGGED_LSN,
            min_recovery_point: Lsn::INVALID,
            min_recovery_point_tli: 0,
            backup_start_point: Lsn::INVALID,
            backup_end_point: Lsn::INVALID,
            backup_end_required: false,
            ..self.control
        }
    }

    /// The counters' absolute values: what most records change.
    pub fn encode_counters(&self) -> [u8; ControlState::COUNTERS_SIZE] {
        let mut out = [0; ControlState::COUNTERS_SIZE];
        out[0..8].copy_from_slice(&self.next_xid.to_le_bytes());
        let words = [
            self.next_oid,
            self.next_multi,
            self.next_multi_offset,
            self.oldest_commit_ts_xid,
            self.newest_commit_ts_xid,
            self.offsets_page,
            self.offsets_page_early.unwrap_or(NONE),
            0,
        ];
        for (place, word) in out[8..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Bytes of [`ControlState::encode_counters`].
    pub const COUNTERS_SIZE: usize = 40;

    /// Takes over counters written by [`ControlState::encode_counters`].
    pub fn apply_counters(&mut self, bytes: &[u8]) -> Result<(), ControlStateError> {
        let mut reader = Reader::new(bytes);
        self.read_counters(&mut reader).map_err(|_| ControlStateError::Truncated)
    }

    fn read_counters(&mut self, reader: &mut Reader<'_>) -> Step<()> {
        self.next_xid = reader.u64()?;
        self.next_oid = reader.u32()?;
        self.next_multi = reader.u32()?;
        self.next_multi_offset = reader.u32()?;
        self.oldest_commit_ts_xid = reader.u32()?;
        self.newest_commit_ts_xid = reader.u32()?;
        self.offsets_page = reader.u32()?;
        self.offsets_page_early = Some(reader.u32()?).filter(|page| *page != NONE);
        reader.u32()?;
        Ok(())
    }

    /// The whole state.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT, u8::from(self.full_page_writes)];
        for word in
            [self.tli, self.oldest_xid, self.oldest_xid_db, self.oldest_multi, self.oldest_multi_db]
        {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.encode_counters());
        out.extend_from_slice(&self.control.encode()[..CONTROL_SIZE]);
        out
    }

    /// Reads what [`ControlState::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<ControlState, ControlStateError> {
        let truncated = |_| ControlStateError::Truncated;
        let mut reader = Reader::new(bytes);
        let format = reader.u8().map_err(truncated)?;
        if format != FORMAT {
            return Err(ControlStateError::Newer(format));
        }
        let full_page_writes = reader.u8().map_err(truncated)? != 0;
        let fixed: [u8; 20] = reader.array().map_err(truncated)?;
        let counters: [u8; ControlState::COUNTERS_SIZE] = reader.array().map_err(truncated)?;
        let mut state = ControlState::from_pg_control(&ControlFile::decode(reader.rest())?);
        let mut words = Reader::new(&fixed);
        let mut word = || words.u32().map_err(truncated);
        state.full_page_writes = full_page_writes;
        state.tli = word()?;
        state.oldest_xid = word()?;
        state.oldest_xid_db = word()?;
        state.oldest_multi = word()?;
        state.oldest_multi_db = word()?;
        state.apply_counters(&counters)?;
        Ok(state)
    }
}
