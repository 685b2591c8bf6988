//! Appending to segments.

use std::sync::Arc;

use pgstrata_env::DiskFile;
use pgstrata_ids::Lsn;

use super::{Preparer, SegmentFiles, Zeros};
use crate::storage_error::StorageError;

/// Zeros written at once when a log is cut, in bytes.
const ZERO_CHUNK: usize = 256 << 10;

/// Segments that are made ahead of one writer, at most.
const MOST_AHEAD: u64 = 2;

/// The end of one timeline's log.
#[derive(Debug)]
pub struct LogWriter {
    files: Arc<SegmentFiles>,
    preparer: Preparer,
    open: Option<(u64, Arc<dyn DiskFile>)>,
    unsynced: Vec<(u64, Arc<dyn DiskFile>)>,
    /// Everything after it is zero.
    end: Lsn,
    /// Segments that are asked for ahead of the one that is written to.
    ahead: u64,
    /// What comes before it is somewhere already, and is copied.
    copied_to: Lsn,
}

impl LogWriter {
    /// A writer for a log that ends at `end`, with nothing but zeros after it.
    pub fn new(files: Arc<SegmentFiles>, preparer: Preparer, end: Lsn) -> LogWriter {
        let copied_to = Lsn::INVALID;
        LogWriter { files, preparer, open: None, unsynced: Vec::new(), end, ahead: 1, copied_to }
    }

    /// What comes before `lsn` is committed without this log, and on its way.
    pub fn is_copied_to(&mut self, lsn: Lsn) {
        self.copied_to = self.copied_to.max(lsn);
    }

    /// What is copied need not be waited for. The last of it shares its segment with what comes after it.
    fn zeros(&self, number: u64) -> Zeros {
        match number < self.files.number_of(self.copied_to) {
            true => Zeros::Reserved,
            false => Zeros::Written,
        }
    }

    /// Makes the segment of the next byte soon.
    pub fn prepare(&self) {
        let number = self.files.number_of(self.end);
        self.preparer.request(&self.files, number, self.zeros(number));
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
            let (file, was_there) = self.files.open_or_make(number, self.zeros(number))?;
            // One is not enough for who fills segments as quickly as they are made.
            let goes_on = self.open.as_ref().is_some_and(|(open, _)| open + 1 == number);
            if goes_on && !was_there {
                self.ahead = MOST_AHEAD;
            }
            for next in 1..=self.ahead {
                self.preparer.request(&self.files, number + next, self.zeros(number + next));
            }
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pgstrata_env::Disk;
    use pgstrata_sim::wal::parameters;
    use pgstrata_sim::{Fail, FaultyDisk, SimDisk};

    use super::*;
    use crate::latch::Latch;

    const SIZE: u32 = 64 << 10;

    #[test]
    fn a_name_that_may_be_lost_stays_so_whatever_is_made_after_it() {
        let (disk, directory) = (FaultyDisk::default(), tempfile::tempdir().unwrap());
        let parameters = parameters(Lsn(1 << 20));
        let files = SegmentFiles::new(Arc::new(disk.clone()), directory.path(), parameters);
        disk.fail(Fail::NamesFull);
        assert!(files.open_or_make(1, Zeros::Written).is_err());
        assert_eq!(files.numbers().unwrap(), [1]);
        disk.fail(Fail::Nothing);
        assert!(files.open_or_make(2, Zeros::Written).is_ok());
        assert!(files.open_or_make(1, Zeros::Written).is_err(), "its name was never durable");
        assert!(files.open_or_make(2, Zeros::Written).is_ok());
    }

    #[test]
    fn who_had_to_wait_for_a_segment_asks_for_two_from_then_on() {
        let disk = SimDisk::new(1);
        let directory = Path::new("/timeline");
        disk.create_directory(directory).unwrap();
        let mut parameters = parameters(Lsn(SIZE.into()));
        parameters.segment_size = SIZE;
        let files = Arc::new(SegmentFiles::new(Arc::new(disk), directory, parameters));
        let (preparer, preparations) = Preparer::queue(Latch::default());
        let mut writer = LogWriter::new(Arc::clone(&files), preparer, Lsn(SIZE.into()));
        let mut fill = |number: u64| writer.write(Lsn(number * u64::from(SIZE)), &[1]).unwrap();
        let make =
            || std::iter::repeat_with(|| preparations.step()).take_while(|&made| made).count();
        fill(1);
        assert_eq!(
            (make(), files.numbers().unwrap()),
            (1, vec![1, 2]),
            "the first is always waited for"
        );
        fill(2);
        assert_eq!((make(), files.numbers().unwrap()), (1, vec![1, 2, 3]));
        fill(3);
        fill(4);
        assert_eq!(make(), 3, "4, which was made by who waited, 5 and 6");
        assert_eq!(files.numbers().unwrap(), [1, 2, 3, 4, 5, 6]);
        fill(5);
        assert_eq!((make(), files.numbers().unwrap()), (2, vec![1, 2, 3, 4, 5, 6, 7]));
    }
    #[test]
    fn segments_that_are_copied_whole_are_not_written_twice() {
        let (disk, directory) = (FaultyDisk::default(), tempfile::tempdir().unwrap());
        let size = u64::from(SIZE);
        let mut parameters = parameters(Lsn(size));
        parameters.segment_size = SIZE;
        let files = SegmentFiles::new(Arc::new(disk.clone()), directory.path(), parameters);
        let files = Arc::new(files);
        let (preparer, preparations) = Preparer::queue(Latch::default());
        let mut writer = LogWriter::new(Arc::clone(&files), preparer, Lsn(size));
        writer.is_copied_to(Lsn(4 * size + size / 2));
        let mut fill = |number: u64| {
            let before = disk.written_bytes();
            writer.write(Lsn(number * size), &[1]).unwrap();
            while preparations.step() {}
            disk.written_bytes() - before - 1
        };
        assert_eq!(fill(1), 0);
        // From the second on, for which it had not to wait, the next is made ahead.
        assert_eq!((fill(2), files.numbers().unwrap()), (0, vec![1, 2, 3]));
        assert_eq!(
            (fill(3), files.numbers().unwrap()),
            (size, vec![1, 2, 3, 4]),
            "its end is not copied"
        );
        assert_eq!(fill(4), size);
        let is_whole = |number| files.open(number).unwrap().unwrap().size().unwrap() == size;
        assert!((1..=5).all(is_whole));
        let mut byte = [1];
        files.open(2).unwrap().unwrap().read_at(&mut byte, size - 1).unwrap();
        assert_eq!(byte, [0]);
        // Where space can't be reserved it is written.
        writer.is_copied_to(Lsn(100 * size));
        disk.fail(Fail::NoReserve);
        let before = disk.written_bytes();
        writer.write(Lsn(50 * size), &[1]).unwrap();
        assert_eq!(disk.written_bytes() - before, size + 1);
        assert_eq!(files.open(50).unwrap().unwrap().size().unwrap(), size);
    }
}
