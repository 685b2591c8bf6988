//! Reading what was written.

use std::sync::Arc;

use pgstrata_env::DiskFile;
use pgstrata_ids::Lsn;

use super::SegmentFiles;
use crate::storage_error::StorageError;

/// Reads one timeline's own segments, keeping the last file open.
#[derive(Debug)]
pub struct SegmentReader {
    files: Arc<SegmentFiles>,
    open: Option<(u64, Arc<dyn DiskFile>)>,
}

impl SegmentReader {
    /// A reader that has nothing open yet.
    pub fn new(files: Arc<SegmentFiles>) -> SegmentReader {
        SegmentReader { files, open: None }
    }

    /// Fills `buffer` from `at` on, to the end of the segment at most. Returns how many bytes
    /// were read; 0 if the segment isn't here.
    pub fn read(&mut self, at: Lsn, buffer: &mut [u8]) -> Result<usize, StorageError> {
        let size = self.files.segment_size();
        let number = self.files.number_of(at);
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            self.open = self.files.open(number)?.map(|file| (number, file));
        }
        let Some((_, file)) = &self.open else { return Ok(0) };
        let offset = at.segment_offset(size);
        let count = buffer.len().min((size - offset) as usize);
        let path = || self.files.path(number);
        file.read_at(&mut buffer[..count], offset)
            .map_err(|error| StorageError::wrap("read", &path())(error))
    }
}
