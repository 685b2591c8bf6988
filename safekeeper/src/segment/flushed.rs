//! How far the log was durable, a moment ago, and known to be committed.
//!
//! Written over for each MiB of log, and once a second while there are appends, which also syncs it; not for each commit,
//! which would be one system call more on its way. What it says was true when it was written, so a log that
//! ends before it is damaged, and not just torn.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_env::{Disk, DiskFile};
use pgstrata_format::safekeeper::{FLUSHED_SIZE, decode_committed, decode_flushed, encode_flushed};
use pgstrata_ids::Lsn;

use crate::storage_error::StorageError;

/// Size of the file, in bytes.
const FILE_SIZE: usize = 512;

/// See the module.
#[derive(Clone, Debug)]
pub struct FlushedNote {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    lsn: Lsn,
    commit_lsn: Lsn,
}

impl FlushedNote {
    /// The note in a timeline's `directory`; made if there is none. The directory is synced by
    /// whoever opens the timeline: a note that is lost is no harm.
    pub fn open(disk: &dyn Disk, directory: &Path) -> Result<FlushedNote, StorageError> {
        let path = directory.join("flushed");
        let file = match disk.open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => disk.create(&path),
            other => other,
        };
        let file = file.map_err(StorageError::wrap("open", &path))?;
        // Whoever had it before may have ended, or failed, before what is read here was durable: it would not be lowered
        // again before a cut, and could come back as it was after that.
        file.sync_all().map_err(StorageError::unsynced("sync", &path))?;
        file.evict().map_err(StorageError::wrap("evict", &path))?;
        let mut bytes = [0; FLUSHED_SIZE];
        let count = file.read_at(&mut bytes, 0).map_err(StorageError::wrap("read", &path))?;
        let size = file.size().map_err(StorageError::wrap("measure", &path))?;
        if size < FILE_SIZE as u64 {
            file.write_at(&[0; FILE_SIZE], 0).map_err(StorageError::wrap("write", &path))?;
            file.sync_all().map_err(StorageError::unsynced("sync", &path))?;
        }
        let lsn = decode_flushed(&bytes[..count]).unwrap_or_default();
        // Written with the other one, of the same log.
        let commit_lsn = decode_committed(&bytes[..count]).unwrap_or_default().min(lsn);
        Ok(FlushedNote { file, path, lsn, commit_lsn })
    }

    /// What it says; [`Lsn::INVALID`] if nothing.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Up to where what is durable is committed, by it; [`Lsn::INVALID`] if it says nothing of that.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// The log is durable up to `lsn`, and committed up to `commit_lsn`.
    pub fn raise(&mut self, lsn: Lsn, commit_lsn: Lsn) -> Result<(), StorageError> {
        if lsn <= self.lsn && commit_lsn <= self.commit_lsn {
            return Ok(());
        }
        self.commit_lsn = self.commit_lsn.max(commit_lsn);
        self.write(lsn.max(self.lsn))
    }

    /// The log is about to be cut to `lsn`: durable on return, as the log must not be shorter
    /// than the note says.
    pub fn lower(&mut self, lsn: Lsn) -> Result<(), StorageError> {
        if lsn >= self.lsn {
            return Ok(());
        }
        self.write(lsn)?;
        self.sync()
    }

    fn write(&mut self, lsn: Lsn) -> Result<(), StorageError> {
        // What is cut was not committed: whatever else was said is not said any more.
        self.commit_lsn = self.commit_lsn.min(lsn);
        let written = self.file.write_at(&encode_flushed(lsn, self.commit_lsn), 0);
        written.map_err(StorageError::unsynced("write", &self.path))?;
        self.lsn = lsn;
        Ok(())
    }

    /// Makes durable what it says by now, or what is written to it meanwhile.
    pub fn sync(&self) -> Result<(), StorageError> {
        self.file.sync_data().map_err(StorageError::unsynced("sync", &self.path))
    }
}
