//! The acceptor together with its files: performs the outputs of the one on the other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pgstrata_env::{Disk, replace_file};
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::WalChecker;
use pgstrata_quorum::{Acceptor, AcceptorOutput, Append, ControlState, PeerRange, TermHistory};
use pgstrata_wire::safekeeper::{Message, RefusedReason};

use crate::checked_segment::checker_after;
use crate::disk_space::DiskSpace;
use crate::latch::Latch;
use crate::meters::Meters;
use crate::segment::{FlushedNote, LogWriter, SegmentFiles, last_record_before};
use crate::storage_error::StorageError;

/// What an input is answered with, if at all.
pub type Answer = Option<Message<'static>>;

/// Bytes of a record that isn't whole yet are synced when there are so many, in bytes, so that
/// recovery can tell from what follows a bad record that it was durable.
pub const SYNC_EVERY: u64 = 1 << 20;

/// Where an empty log begins whose first bytes are archived, and the first bytes that are not.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// The first byte that is here then: of a segment all before which are archived.
    pub available_lsn: Lsn,
    /// A committed record boundary after it: where the log ends then.
    pub lsn: Lsn,
    /// The start of the last record before `lsn`.
    pub last_record: Option<Lsn>,
    /// From `available_lsn` on, to `lsn` at least.
    pub bytes: Vec<u8>,
    /// Of a log that has it all.
    pub history: TermHistory,
    /// What is known of that to be committed.
    pub commit_lsn: Lsn,
}

/// The durable end is noted when the log has grown by so much, in bytes, and every second anyway.
const NOTE_EVERY: u64 = 1 << 20;

/// What must change together, under one lock.
#[derive(Debug)]
pub struct Core {
    pub acceptor: Acceptor,
    pub log: LogWriter,
    /// As last persisted.
    pub stored: TimelineControl,
    pub disk: Arc<dyn Disk>,
    pub control_path: PathBuf,
    pub latch: Latch,
    pub files: Arc<SegmentFiles>,
    /// Has seen every byte of the log up to the acceptor's write LSN.
    pub checker: WalChecker,
    pub note: FlushedNote,
    /// Bytes written since the last sync.
    pub unsynced: u64,
    pub meters: Meters,
    pub space: DiskSpace,
    /// Why nothing is promised, written or said through this any more, if so: the log is found to be damaged.
    pub retired: Option<String>,
    /// Kept between inputs so that the hot path doesn't allocate.
    pub outputs: Vec<AcceptorOutput>,
}

fn invalid(why: &dyn std::fmt::Display) -> Message<'static> {
    let text = format!("what was sent is not valid WAL, and was not stored: {why}");
    Message::Refused(RefusedReason::InvalidWal(text))
}

impl Core {
    pub fn check_latch(&self) -> Result<(), StorageError> {
        if let Some(reason) = self.latch.reason() {
            return Err(StorageError::Latched(reason));
        }
        match &self.retired {
            Some(reason) => Err(StorageError::DamagedLog {
                path: self.files.directory().to_owned(),
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// An append or flush: the hot path. `payload` are the append's WAL bytes. Any failure throws
    /// the latch, since the acceptor already counts on the bytes.
    pub fn act(
        &mut self,
        payload: &[u8],
        act: impl FnOnce(&mut Acceptor, &mut Vec<AcceptorOutput>),
    ) -> Result<Answer, StorageError> {
        self.check_latch()?;
        let mut outputs = std::mem::take(&mut self.outputs);
        outputs.clear();
        act(&mut self.acceptor, &mut outputs);
        let mut destroyed = false;
        let result = self.perform(&outputs, payload, &mut destroyed);
        let result = result.and_then(|answer| {
            let flush_lsn = self.acceptor.flush_lsn();
            if flush_lsn.saturating_sub(self.note.lsn()) >= NOTE_EVERY {
                self.note.raise(flush_lsn, self.acceptor.commit_lsn())?;
            }
            Ok(answer)
        });
        self.outputs = outputs;
        result.inspect_err(|error| self.latch.throw(&error.to_string()))
    }

    /// Takes an append's bytes if they are WAL that continues the log; where its records end, they
    /// say themselves.
    pub fn append(&mut self, append: &Append, payload: &[u8]) -> Result<Answer, StorageError> {
        self.reserve(append)?;
        let mut append = Append { record_end: Lsn::INVALID, ..*append };
        if let Some(skip) = self.acceptor.takes(&append) {
            let new = payload.get(skip as usize..).unwrap_or_default();
            let mut checker = self.checker.clone();
            if let Err(error) = checker.check(new) {
                return Ok(Some(invalid(&error)));
            }
            append.record_end = checker.position();
            self.checker = checker;
        }
        let answer = self.act(payload, |acceptor, outputs| acceptor.append(&append, outputs))?;
        assert_eq!(self.checker.feed_position(), self.acceptor.write_lsn());
        Ok(answer)
    }

    /// The checker after these outputs: an error if they would write what is no WAL, or count on
    /// a boundary that none was found at.
    fn check(
        &self,
        outputs: &[AcceptorOutput],
        payload: &[u8],
    ) -> Result<Result<WalChecker, Answer>, StorageError> {
        let mut checker = self.checker.clone();
        for output in outputs {
            match output {
                AcceptorOutput::Truncate(lsn) => {
                    let last_record = match *lsn == checker.position() {
                        true => checker.last_record(),
                        false => last_record_before(&self.files, *lsn)?,
                    };
                    checker = checker_after(self.files.parameters(), *lsn, last_record);
                }
                AcceptorOutput::Write { skip, .. } => {
                    let new = payload.get(*skip as usize..).unwrap_or_default();
                    if let Err(error) = checker.check(new) {
                        return Ok(Err(Some(invalid(&error))));
                    }
                }
                _ => {}
            }
        }
        let boundary_lsn = self.acceptor.boundary_lsn();
        if boundary_lsn > checker.position() {
            return Ok(Err(Some(invalid(&format!("no record ends at {boundary_lsn}")))));
        }
        Ok(Ok(checker))
    }

    /// A step that may promise something: a vote, an election, a peer's history. If the disk is
    /// too full to write the promise down, it isn't made, and the acceptor is as before.
    pub fn promise(
        &mut self,
        payload: &[u8],
        act: impl FnOnce(&mut Acceptor, &mut Vec<AcceptorOutput>),
    ) -> Result<Answer, StorageError> {
        self.check_latch()?;
        let before = self.acceptor.clone();
        let mut outputs = Vec::new();
        act(&mut self.acceptor, &mut outputs);
        let checker = match self.check(&outputs, payload) {
            Ok(Ok(checker)) => checker,
            // Nothing was done yet.
            Ok(Err(refusal)) => {
                self.acceptor = before;
                return Ok(refusal);
            }
            Err(error) => {
                self.acceptor = before;
                return Err(error);
            }
        };
        let mut destroyed = false;
        let result = self.perform(&outputs, payload, &mut destroyed);
        match &result {
            Err(error) if !destroyed && self.space.note(error) => self.acceptor = before,
            Err(error) => self.latch.throw(&error.to_string()),
            Ok(_) => self.checker = checker,
        }
        result
    }

    /// Begins an empty log later than the timeline begins. Its bytes are durable before anything says that they are there: what
    /// a crash leaves of them alone is removed by recovery.
    pub fn begin_at(&mut self, beginning: &Beginning) -> Result<Answer, StorageError> {
        self.check_latch()?;
        let (from, lsn) = (beginning.available_lsn, beginning.lsn);
        let bytes = &beginning.bytes[..(lsn - from) as usize];
        self.space.check(self.files.directory())?;
        let before = self.acceptor.clone();
        let mut outputs = Vec::new();
        let range = PeerRange {
            history: beginning.history.clone(),
            commit_lsn: beginning.commit_lsn,
            start: lsn,
            length: 0,
        };
        self.acceptor.begin_at(&range, &mut outputs);
        // Taken only if nothing refused it.
        let refused = outputs.iter().any(|output| matches!(output, AcceptorOutput::Refuse(_)));
        if !refused && let Err(error) = self.log.reserve(from, lsn) {
            self.acceptor = before;
            self.failed(&error);
            return Err(error);
        }
        let result = match refused {
            true => Ok(()),
            false => self.log.write(from, bytes).and_then(|()| self.sync()),
        };
        let stored = self.stored.clone();
        let result = result.and_then(|()| {
            if !refused {
                self.stored.available_lsn = from;
                self.stored.archived_lsn = from;
            }
            self.perform(&outputs, &[], &mut false)
        });
        match result {
            Ok(answer) => {
                if !refused {
                    let last_record = beginning.last_record;
                    self.checker = checker_after(self.files.parameters(), lsn, last_record);
                }
                Ok(answer)
            }
            // Only the control file could not be replaced: the log is empty as before.
            Err(error @ StorageError::DiskFull { .. }) => {
                self.acceptor = before;
                self.stored = stored;
                self.space.note(&error);
                let cut = self.log.truncate(self.acceptor.write_lsn());
                cut.inspect_err(|error| self.latch.throw(&error.to_string()))?;
                Err(error)
            }
            Err(error) => {
                self.latch.throw(&error.to_string());
                Err(error)
            }
        }
    }

    /// Syncs what isn't acknowledged yet if there is much of it.
    pub fn sync_long_record(&mut self) -> Result<(), StorageError> {
        if self.unsynced < SYNC_EVERY {
            return Ok(());
        }
        self.sync().inspect_err(|error| self.latch.throw(&error.to_string()))
    }

    /// Makes what was written durable. Acknowledgements wait for it, so it is timed.
    fn sync(&mut self) -> Result<(), StorageError> {
        let begun = Instant::now();
        let files = self.log.sync()?;
        if files > 0 {
            self.meters.synced(files, begun.elapsed());
        }
        self.unsynced = 0;
        Ok(())
    }

    /// Makes room for what the append will write. On a disk that is full, or about to be, it is refused
    /// here, before the acceptor hears of the bytes.
    pub fn reserve(&mut self, append: &Append) -> Result<(), StorageError> {
        self.check_latch()?;
        let from = self.acceptor.write_lsn();
        let Some(end) = append.start.checked_add(append.length) else { return Ok(()) };
        if append.start > from || end <= from {
            return Ok(());
        }
        let checked = self.space.check(self.files.directory());
        let reserved = checked.and_then(|()| {
            self.log.is_copied_to(append.commit_lsn);
            self.log.reserve(from, end)
        });
        reserved.inspect_err(|error| self.failed(error))
    }

    fn perform(
        &mut self,
        outputs: &[AcceptorOutput],
        payload: &[u8],
        destroyed: &mut bool,
    ) -> Result<Answer, StorageError> {
        let mut answer = None;
        for output in outputs {
            match output {
                AcceptorOutput::Persist(state) => self.persist(state.clone())?,
                AcceptorOutput::Truncate(lsn) => {
                    // The file must not promise more than the log will have after a crash.
                    if self.stored.flush_lsn > *lsn {
                        self.store(TimelineControl { flush_lsn: *lsn, ..self.stored.clone() })?;
                    }
                    *destroyed = true;
                    self.note.lower(*lsn)?;
                    self.log.truncate(*lsn)?;
                }
                AcceptorOutput::Write { at, skip } => {
                    let bytes = payload.get(*skip as usize..).unwrap_or_default();
                    *destroyed = true;
                    self.log.write(*at, bytes)?;
                    self.unsynced += bytes.len() as u64;
                    self.meters.wrote(bytes.len());
                }
                AcceptorOutput::Sync => self.sync()?,
                AcceptorOutput::Vote(vote) => answer = Some(Message::Vote(vote.clone())),
                AcceptorOutput::Ack(ack) => answer = Some(Message::Ack(*ack)),
                AcceptorOutput::Refuse(refusal) => {
                    answer = Some(Message::Refused(RefusedReason::Quorum(refusal.clone())));
                }
                // Readers are woken by whoever holds the lock, after the answer is on its way.
                AcceptorOutput::Committed(_) => {}
            }
        }
        Ok(answer)
    }

    /// Persists what the acceptor says, with the log's end as far as it is durable by now: every
    /// sync that it counts on comes before in the outputs.
    fn persist(&mut self, state: ControlState) -> Result<(), StorageError> {
        let flush_lsn = self.acceptor.flush_lsn();
        self.store(TimelineControl { flush_lsn, state, ..self.stored.clone() })
    }

    /// Replaces the control file.
    pub fn store(&mut self, stored: TimelineControl) -> Result<(), StorageError> {
        let path = &self.control_path;
        replace_file(self.disk.as_ref(), path, &stored.encode())
            .map_err(StorageError::wrap("replace", path))?;
        self.stored = stored;
        Ok(())
    }

    /// Writes down how far everything is, if that changed.
    pub fn checkpoint(
        &mut self,
        change: impl FnOnce(&mut TimelineControl),
    ) -> Result<(), StorageError> {
        self.check_latch()?;
        let flush_lsn = self.acceptor.flush_lsn();
        let state = self.acceptor.control();
        let mut stored = TimelineControl { flush_lsn, state, ..self.stored.clone() };
        change(&mut stored);
        if stored == self.stored {
            return Ok(());
        }
        self.store(stored).inspect_err(|error| self.failed(error))
    }

    /// Nothing was written: for want of space that is no harm, and of anything else what is there is not known.
    fn failed(&self, error: &StorageError) {
        if !self.space.note(error) {
            self.latch.throw(&error.to_string());
        }
    }
}
