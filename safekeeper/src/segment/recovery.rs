//! Where the log ends after a crash.
//!
//! The log is read from the device, not from the page cache (after a failed sync the cache may
//! hold what the device doesn't), decoded from the segment of the last known commit LSN, and ends
//! with its last valid record. What follows is zeroed, so that nothing half-written ever becomes
//! part of a record again.
//!
//! That holds for a torn end only. Where the first record that is not valid was durable before,
//! the log is damaged, and nothing of it is counted or removed. Two things tell the two apart:
//! what was noted as durable, and that a sector which did not reach the disk ends with zeros, as
//! segments are made of zeros and are filled from their beginning. What can be either is taken for
//! a torn end: a record that is whole, without a sector that ends so, and wrong, can't.

use std::sync::Arc;

use pgstrata_env::DiskFile;
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_wal::{PgVersion, WalDecoder, page_header_size};

use super::{MENDING, SegmentFiles};
use crate::storage_error::StorageError;

/// WAL read and decoded at once, in bytes.
const READ_CHUNK: usize = 256 << 10;

/// What a disk writes whole or not at all, in bytes.
const SECTOR: u64 = 512;

/// Bytes that are compared at once.
const CACHE_LINE: usize = 64;

/// The durable log as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveredLog {
    /// End of the last valid record.
    pub flush_lsn: Lsn,
    /// Bytes that followed it and were removed.
    pub removed_bytes: u64,
    /// Start of the last valid record, if it is here.
    pub last_record: Option<Lsn>,
}

/// Finds the end of the log and removes what follows. `known_lsn` is a record boundary that was
/// durable. A log that ends before `durable_lsn` is damaged: nothing is removed then, so that
/// what can still be read stays.
///
/// Segments from that of `available_lsn` on must be there; those before that of `known_lsn` are not read.
pub fn recover(
    files: &SegmentFiles,
    available_lsn: Lsn,
    known_lsn: Lsn,
    durable_lsn: Lsn,
) -> Result<RecoveredLog, StorageError> {
    for name in ["zeroed.tmp", MENDING] {
        let temporary = files.directory.join(name);
        match files.disk.remove(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StorageError::wrap("remove", &temporary)(error));
            }
            _ => {}
        }
    }
    // A crash may have come between a segment's rename and the sync of its name.
    files.sync_directory()?;
    look_for_closed(files, available_lsn, known_lsn)?;
    for number in files.numbers()?.into_iter().rev() {
        settle(files, number)?;
        if number <= files.number_of(known_lsn) {
            break;
        }
    }
    let start = known_lsn.segment_start(files.segment_size()).max(files.parameters.start_lsn);
    let mut decoder = decoder(files, start)?;
    scan(files, &mut decoder, Lsn::MAX)?;
    let flush_lsn = decoder.position();
    let damaged = |why: String| damaged(files, &format!("the WAL ends at {flush_lsn}, {why}"));
    if flush_lsn < durable_lsn {
        return Err(damaged(format!("but it was durable up to {durable_lsn}")));
    }
    if let Some(why) = evidence_of_more(files, flush_lsn)? {
        return Err(damaged(why));
    }
    let removed_bytes = clear_after(files, flush_lsn)?;
    let last_record = match decoder.last_record() {
        Some(lsn) => Some(lsn),
        None => last_record_before(files, flush_lsn)?,
    };
    Ok(RecoveredLog { flush_lsn, removed_bytes, last_record })
}

fn damaged(files: &SegmentFiles, why: &str) -> StorageError {
    StorageError::DamagedLog {
        path: files.directory.clone(),
        reason: format!(
            "{why}: segments are missing or damaged. This safekeeper does not vote on this timeline or count as having \
             its WAL; nothing was removed"
        ),
    }
}

/// Makes sure that segments are there, with all their bytes, which are read later, by whoever wants them.
fn look_for_closed(
    files: &SegmentFiles,
    available_lsn: Lsn,
    known_lsn: Lsn,
) -> Result<(), StorageError> {
    for number in files.number_of(available_lsn)..files.number_of(known_lsn) {
        let path = files.path(number);
        let Some(file) = files.open(number)? else {
            return Err(damaged(files, &format!("{} is missing", path.display())));
        };
        let size = file.size().map_err(StorageError::wrap("measure", &path))?;
        if size != files.segment_size() {
            return Err(damaged(files, &format!("{} has {size} bytes", path.display())));
        }
    }
    Ok(())
}

/// What shows that the bytes at `end`, which are no valid record, were durable once; `None` if
/// they can be what a crash leaves of a write.
pub(crate) fn evidence_of_more(
    files: &SegmentFiles,
    end: Lsn,
) -> Result<Option<String>, StorageError> {
    let Some(last) = last_written(files, end)? else { return Ok(None) };
    let mut reader = SectorReader::default();
    let until = match record_end(files, end, &mut reader)? {
        Some(until) if until > last + 1 => return Ok(None),
        // Of this record only: what comes after it says nothing.
        Some(until) => until,
        // Not even its length is there. A page's header may be, or a part of that.
        None => Lsn((last.0 / SECTOR + 1) * SECTOR),
    };
    let mut at = end;
    while at < until {
        let next = Lsn((at.0 / SECTOR + 1) * SECTOR).min(until);
        // It may not have reached the disk, or not since there was less in it; or a long record has zeros there and is not
        // whole; or a cut was under way that puts zeros over what was cut off.
        if reader.read(files, at, next)?.last() == Some(&0) {
            return Ok(None);
        }
        at = next;
    }
    Ok(Some("where a record is whole but not right".to_owned()))
}

/// The last byte at or after `end` that is not zero.
pub(crate) fn last_written(files: &SegmentFiles, end: Lsn) -> Result<Option<Lsn>, StorageError> {
    let size = files.segment_size();
    for number in files.numbers()?.into_iter().rev() {
        let start = Lsn(number * size);
        if number < files.number_of(end) {
            break;
        }
        let Some(file) = files.open(number)? else { continue };
        let mut buffer = vec![0; READ_CHUNK.min(size as usize)];
        let mut upper = size;
        // What is before it need not be readable.
        let lowest = end.saturating_sub(start);
        while upper > lowest {
            let lower = upper.saturating_sub(READ_CHUNK as u64).max(lowest);
            let part = &mut buffer[..(upper - lower) as usize];
            let path = files.path(number);
            let count = file.read_at(part, lower).map_err(StorageError::wrap("read", &path))?;
            part[count..].fill(0);
            if let Some(found) = last_nonzero(part) {
                let lsn = start + lower + found as u64;
                return Ok((lsn >= end).then_some(lsn));
            }
            upper = lower;
        }
    }
    Ok(None)
}

/// Where the last byte is that is not zero. Most of what is looked at is zero: many bytes at once, not each.
pub(crate) fn last_nonzero(bytes: &[u8]) -> Option<usize> {
    let mut end = bytes.len();
    for chunk in bytes.rchunks(CACHE_LINE) {
        if chunk != &[0; CACHE_LINE][..chunk.len()] {
            let found = chunk.iter().rposition(|&byte| byte != 0)?;
            return Some(end - chunk.len() + found);
        }
        end -= chunk.len();
    }
    None
}

/// Where the record that starts at the boundary `start` would end, by its own word; `None` if it
/// doesn't say.
fn record_end(
    files: &SegmentFiles,
    start: Lsn,
    reader: &mut SectorReader,
) -> Result<Option<Lsn>, StorageError> {
    let size = files.segment_size();
    let past_header = |at: Lsn| match at.page_offset() {
        0 => at + page_header_size(at, size) as u64,
        _ => at,
    };
    let mut at = past_header(start);
    let length = reader.read(files, at, at + 4)?;
    let length = length.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if length == 0 {
        return Ok(None);
    }
    let mut left = u64::from(length);
    while left > 0 {
        at = past_header(at);
        let room = (PAGE_SIZE as u64 - at.page_offset()).min(left);
        at = at + room;
        left -= room;
    }
    Ok(Some(at))
}

/// Reads small pieces, each within one segment.
#[derive(Default)]
struct SectorReader {
    open: Option<(u64, Arc<dyn DiskFile>)>,
    buffer: Vec<u8>,
}

impl SectorReader {
    /// The bytes `[from, to)`; zeros where there is no segment.
    fn read(&mut self, files: &SegmentFiles, from: Lsn, to: Lsn) -> Result<&[u8], StorageError> {
        let number = files.number_of(from);
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            self.open = files.open(number)?.map(|file| (number, file));
        }
        self.buffer.clear();
        self.buffer.resize((to - from) as usize, 0);
        if let Some((_, file)) = &self.open {
            let path = files.path(number);
            file.read_at(&mut self.buffer, from.segment_offset(files.segment_size()))
                .map_err(StorageError::wrap("read", &path))?;
        }
        Ok(&self.buffer)
    }
}

/// Syncs a segment and forgets its cached contents.
fn settle(files: &SegmentFiles, number: u64) -> Result<(), StorageError> {
    let path = files.path(number);
    let Some(file) = files.open(number)? else { return Ok(()) };
    let size = file.size().map_err(StorageError::wrap("measure", &path))?;
    if size != files.segment_size() {
        let (path, expected) = (path.display(), files.segment_size());
        return Err(damaged(files, &format!("{path} has {size} bytes instead of {expected}")));
    }
    file.sync_all().map_err(StorageError::unsynced("sync", &path))?;
    file.evict().map_err(StorageError::wrap("evict", &path))
}

fn decoder(files: &SegmentFiles, start: Lsn) -> Result<WalDecoder, StorageError> {
    let parameters = &files.parameters;
    let decoder = WalDecoder::new(start, files.segment_size())
        .with_system_identifier(parameters.system_id.0)
        .with_timeline(parameters.pg_timeline);
    match PgVersion::from_major(parameters.pg_version) {
        Some(version) => Ok(decoder.with_version(version)),
        None => Ok(decoder),
    }
}

/// Feeds the decoder until the bytes, the records, or `end` run out.
fn scan(files: &SegmentFiles, decoder: &mut WalDecoder, end: Lsn) -> Result<(), StorageError> {
    let size = files.segment_size();
    let mut buffer = vec![0; READ_CHUNK.min(size as usize)];
    let mut open: Option<(u64, Arc<dyn DiskFile>)> = None;
    loop {
        let at = decoder.feed_position();
        let number = files.number_of(at);
        if open.as_ref().is_none_or(|(open, _)| *open != number) {
            open = files.open(number)?.map(|file| (number, file));
        }
        let Some((_, file)) = &open else { return Ok(()) };
        let offset = at.segment_offset(size);
        let count = buffer.len().min((size - offset) as usize).min((end.0 - at.0) as usize);
        let path = files.path(number);
        let count = file
            .read_at(&mut buffer[..count], offset)
            .map_err(StorageError::wrap("read", &path))?;
        if count == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..count]);
        loop {
            match decoder.poll() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                // Whatever stops the decoder is the end of the log; if it lies before what must
                // be durable, the caller reports it.
                Err(_) => return Ok(()),
            }
        }
    }
}

/// Zeroes the rest of the segment after `end` if anything is there, and removes later segments.
fn clear_after(files: &SegmentFiles, end: Lsn) -> Result<u64, StorageError> {
    let size = files.segment_size();
    let last = files.number_of(end);
    let removed = files.remove(|number| number > last)?;
    let Some(file) = files.open(last)? else { return Ok(removed * size) };
    let path = files.path(last);
    let Some(garbage) = last_written(files, end)? else { return Ok(removed * size) };
    let length = garbage - end + 1;
    let zeros = vec![0; READ_CHUNK.min(length as usize)];
    for at in (0..length).step_by(READ_CHUNK) {
        let count = zeros.len().min((length - at) as usize);
        let offset = end.segment_offset(size) + at;
        file.write_at(&zeros[..count], offset).map_err(StorageError::wrap("clear", &path))?;
    }
    file.sync_data().map_err(StorageError::unsynced("sync", &path))?;
    Ok(removed * size + length)
}

/// The start of the last record before `end`, a record boundary; `None` if this timeline has no
/// record before it, or its segments aren't here.
pub fn last_record_before(files: &SegmentFiles, end: Lsn) -> Result<Option<Lsn>, StorageError> {
    let size = files.segment_size();
    let first = files.parameters.start_lsn;
    let mut from = end;
    while from > first {
        // A record may fill whole segments: go back until one starts.
        from = Lsn(from.0 - 1).segment_start(size).max(first);
        let mut decoder = decoder(files, from)?;
        scan(files, &mut decoder, end)?;
        if decoder.position() == end
            && let Some(lsn) = decoder.last_record()
        {
            return Ok(Some(lsn));
        }
    }
    Ok(None)
}
