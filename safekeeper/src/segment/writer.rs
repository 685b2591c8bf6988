//! Appending to segments.

use std::sync::Arc;

use pgstrata_env::DiskFile;
use pgstrata_ids::Lsn;

use super::{Preparer, SegmentFiles};
use crate::storage_error::StorageError;

/// Zeros written at once when a log is cut, in bytes.
const ZERO_CHUNK: usize = 256 << 10;

/// The end of one timeline's log.
#[derive(Debug)]
pub struct LogWriter {
    files: Arc<SegmentFiles>,
    preparer: Preparer,
    open: Option<(u64, Arc<dyn DiskFile>)>,
    unsynced: Vec<(u64, Arc<dyn DiskFile>)>,
    /// Everything after it is zero.
    end: Lsn,
}

impl LogWriter {
    /// A writer for a log that ends at `end`, with nothing but zeros after it.
    pub fn new(files: Arc<SegmentFiles>, preparer: Preparer, end: Lsn) -> LogWriter {
        LogWriter { files, preparer, open: None, unsynced: Vec::new(), end }
    }

    /// Makes the segment of the next byte soon.
    pub fn prepare(&self) {
        self.preparer.request(&self.files, self.files.number_of(self.end));
    }

    /// Makes sure that bytes of `[from, to)` have segments: the only step of writing that can
    /// run out of space.
    pub fn reserve(&mut self, from: Lsn, to: Lsn) -> Result<(), StorageError> {
        if to <= from {
            return Ok(());
        }
        let last = self.files.number_of(Lsn(to.0 - 1));
        let first = self.files.number_of(from);
        for number in first..=last {
            self.segment(number)?;
        }
        // The write that follows begins in the first of them.
        self.segment(first).map(|_| ())
    }

    fn segment(&mut self, number: u64) -> Result<&Arc<dyn DiskFile>, StorageError> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            let file = self.files.open_or_make(number)?;
            self.preparer.request(&self.files, number + 1);
            return Ok(&self.open.insert((number, file)).1);
        }
        match &self.open {
            Some((_, file)) => Ok(file),
            None => Err(StorageError::Latched("no segment is open".into())),
        }
    }

    /// Writes `bytes` at `at`; durable after [`LogWriter::sync`].
    pub fn write(&mut self, mut at: Lsn, mut bytes: &[u8]) -> Result<(), StorageError> {
        let size = self.files.segment_size();
        self.end = self.end.max(at + bytes.len() as u64);
        while !bytes.is_empty() {
            let number = self.files.number_of(at);
            let offset = at.segment_offset(size);
            let room = (size - offset).min(bytes.len() as u64) as usize;
            let (now, rest) = bytes.split_at(room);
            let file = Arc::clone(self.segment(number)?);
            file.write_at(now, offset)
                .map_err(|error| StorageError::wrap("write", &self.files.path(number))(error))?;
            if self.unsynced.last().is_none_or(|(last, _)| *last != number) {
                self.unsynced.push((number, file));
            }
            at = at + room as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Makes everything written durable; returns how many files had to be synced.
    pub fn sync(&mut self) -> Result<usize, StorageError> {
        for (number, file) in &self.unsynced {
            file.sync_data().map_err(|error| {
                StorageError::unsynced("sync", &self.files.path(*number))(error)
            })?;
        }
        let files = self.unsynced.len();
        self.unsynced.clear();
        Ok(files)
    }

    /// Removes all bytes from `lsn` on, durably: whole later segments first, so that what a crash
    /// leaves is the old log or a beginning of it. What is before `lsn` and was not synced waits
    /// for [`LogWriter::sync`] as before.
    pub fn truncate(&mut self, lsn: Lsn) -> Result<(), StorageError> {
        let size = self.files.segment_size();
        let last = self.files.number_of(lsn);
        self.open = None;
        self.unsynced.retain(|(number, _)| *number <= last);
        self.files.remove(|number| number > last)?;
        let stop = self.end.0.min((last + 1) * size);
        self.end = self.end.min(lsn);
        if lsn.0 >= stop {
            return Ok(());
        }
        let Some(file) = self.files.open(last)? else { return Ok(()) };
        let path = self.files.path(last);
        let zeros = vec![0; ZERO_CHUNK.min((stop - lsn.0) as usize)];
        let mut at = lsn.0;
        while at < stop {
            let count = zeros.len().min((stop - at) as usize);
            file.write_at(&zeros[..count], at % size).map_err(StorageError::wrap("cut", &path))?;
            at += count as u64;
        }
        file.sync_data().map_err(StorageError::unsynced("sync", &path))
    }
}
