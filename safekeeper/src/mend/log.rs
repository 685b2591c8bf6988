//! A damaged log: the own bytes, as far as they can be read, and over them what others gave.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pgstrata_env::{Disk, replace_file};
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::WalChecker;

use super::sources::Sources;
use crate::checked_segment::{checker, checker_after};
use crate::disk_space::DiskSpace;
use crate::segment::{FlushedNote, SegmentFiles, evidence_of_more, last_nonzero, last_written};
use crate::storage_error::StorageError;

/// WAL checked at once, in bytes.
const READ_CHUNK: usize = 256 << 10;

/// What a disk reads whole or not at all, in bytes.
const SECTOR: usize = 512;

/// Segments in memory before those that are whole are put in their places.
const MAX_HELD: usize = 2;

/// Why a log can't be mended now.
#[derive(Debug, thiserror::Error)]
pub enum Lack {
    /// Nobody who answers has what is missing.
    #[error("{0}")]
    Missing(String),
    /// The own disk, which is no damage to mend.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mended {
    /// Bytes that others gave.
    pub fetched_bytes: u64,
    /// Segments that were put in place.
    pub segments: usize,
    /// Where the log was cut, as nothing depends on what was there and nobody has.
    pub cut: Option<Lsn>,
}

/// See the module. Nobody else has the timeline's files open for writing.
#[derive(Debug)]
pub struct DamagedLog {
    disk: Arc<dyn Disk>,
    files: SegmentFiles,
    control: TimelineControl,
    /// First byte that has to be here.
    begin: Lsn,
    /// The log was durable up to here at least: by what was noted, or by what the log itself shows.
    floor: Lsn,
    /// It ended there, whatever is left of its segments: what was sent away, whose control file has its end.
    ends_at_floor: bool,
    /// Segments with bytes of others in them, which are not in place yet.
    held: BTreeMap<u64, Vec<u8>>,
    mended: Mended,
}

impl DamagedLog {
    /// That of the timeline in `directory`, of which `control` says what it should be.
    pub fn open(
        disk: Arc<dyn Disk>,
        directory: &Path,
        control: TimelineControl,
        space: DiskSpace,
    ) -> Result<DamagedLog, StorageError> {
        let files = SegmentFiles::new(Arc::clone(&disk), directory, control.parameters.clone());
        let files = files.on(space);
        for number in files.numbers()? {
            // As the disk has them. What can't be forgotten of the cache is looked at all the same.
            if let Some(file) = files.open(number)?
                && let Err(error) = file.evict()
            {
                tracing::debug!(%error, "a segment stays in the cache");
            }
        }
        let note = FlushedNote::open(disk.as_ref(), directory)?;
        let begin = control.available_lsn.max(control.parameters.start_lsn);
        let floor = control.flush_lsn.max(control.state.commit_lsn).max(note.lsn()).max(begin);
        let (held, mended) = (BTreeMap::new(), Mended::default());
        Ok(DamagedLog { disk, files, control, begin, floor, ends_at_floor: false, held, mended })
    }

    /// The same of a timeline that was sent away: what is not here was in object storage, and there was no more of it.
    pub fn sent_away(self) -> DamagedLog {
        DamagedLog { ends_at_floor: true, ..self }
    }

    fn size(&self) -> u64 {
        self.files.segment_size()
    }

    fn start_of(&self, number: u64) -> Lsn {
        Lsn(number * self.size())
    }

    /// The segment in which the log ends, as far as that is known.
    fn tail(&self) -> u64 {
        self.files.number_of(Lsn(self.floor.0.saturating_sub(1)))
    }

    /// Finds what is damaged, and puts what `sources` have in its place, durably on return; the rest of the work, and the
    /// last word, is recovery's.
    pub fn mend(mut self, sources: &mut Sources) -> Result<Mended, Lack> {
        let mut checker = self.checker_at(self.begin, None);
        // What was put over the own bytes last: from where to where.
        let mut fetched: Option<(Lsn, Lsn)> = None;
        let end = loop {
            let why = self.scan(&mut checker);
            // What is left of a record that begins before the log does has no boundary in it to go on from, and the checker
            // says where its pages end.
            let is_in_rest =
                self.begin != self.control.parameters.start_lsn && checker.last_record().is_none();
            let at = if is_in_rest { self.begin } else { checker.position() };
            let shown = match at < self.floor {
                true => Ok(Some(why)),
                false => evidence_of_more(&self.files, at),
            };
            let why = match shown {
                Ok(Some(why)) => why,
                Ok(None) => break at,
                // Where it can't be read there may have been anything.
                Err(error @ StorageError::Failed { action: "read", .. }) => {
                    return self.cut(sources, at, &error.to_string());
                }
                Err(error) => return Err(error.into()),
            };
            let failed_at = checker.feed_position();
            let until = self.start_of(self.files.number_of(failed_at) + 1).min(self.floor);
            checker = self.checker_at(at, checker.last_record());
            let is_worse = fetched.is_some_and(|(from, to)| {
                at < to && (failed_at < to || (at == from && until <= to))
            });
            // If so it is whoever gave it that is damaged.
            if is_worse && !sources.distrust_last() {
                return self.cut(sources, at, &why);
            }
            let got = match at < self.floor {
                true => self.fetch(sources, at, until),
                false => self.fetch_record(sources, &checker),
            };
            tracing::info!(
                timeline = %self.control.parameters.timeline, from = %at, to = %got, why, "damaged WAL is replaced"
            );
            // Those who are trusted have no more of it than they had the last time: a record goes on in a segment that none has.
            let is_again = !is_worse && fetched == Some((at, got));
            if got <= at || is_again {
                return self.cut(sources, at, &why);
            }
            fetched = Some((at, got));
            if at >= self.floor {
                self.floor = got;
            }
            self.put_whole(at)?;
        };
        if !self.ends_at_floor && !self.shows_its_end(end) {
            let why = "how far it was acknowledged can't be told from what is left of its end, and nothing that was \
                       committed since shows that nobody depends on it";
            return self.cut(sources, end, why);
        }
        self.put_all()?;
        Ok(self.mended)
    }

    fn checker_at(&self, at: Lsn, last_record: Option<Lsn>) -> WalChecker {
        let parameters = self.files.parameters();
        match at == self.begin && at != parameters.start_lsn {
            // What is left of a record that begins before it can't be checked.
            true => checker(parameters, at),
            false => checker_after(parameters, at, last_record),
        }
    }

    /// Checks on, as far as everything is right; returns why it ends there.
    fn scan(&self, checker: &mut WalChecker) -> String {
        let mut buffer = vec![0; READ_CHUNK];
        loop {
            let at = checker.feed_position();
            let left = self.size() - at.segment_offset(self.size());
            let want = (left as usize).min(READ_CHUNK);
            let count = match self.read_some(at, &mut buffer[..want]) {
                Ok(count) => count,
                Err(why) => return why,
            };
            if let Err(error) = checker.check(&buffer[..count]) {
                return error.to_string();
            }
            if count == 0 {
                let path = self.files.path(self.files.number_of(at));
                return format!("{} is too short", path.display());
            }
        }
    }

    /// The same up to the first sector that can't be read; an error if that is the first of all.
    fn read_some(&self, at: Lsn, buffer: &mut [u8]) -> Result<usize, String> {
        match self.read(at, buffer) {
            Err(_) if buffer.len() > SECTOR => {}
            read => return read,
        }
        let mut done = 0;
        for sector in buffer.chunks_mut(SECTOR) {
            match self.read(at + done as u64, sector) {
                Ok(count) if count == sector.len() => done += count,
                Ok(count) => return Ok(done + count),
                Err(why) if done == 0 => return Err(why),
                Err(_) => return Ok(done),
            }
        }
        Ok(done)
    }

    /// Reads within one segment: what others gave, or else what is here.
    fn read(&self, at: Lsn, buffer: &mut [u8]) -> Result<usize, String> {
        let number = self.files.number_of(at);
        let offset = at.segment_offset(self.size());
        if let Some(segment) = self.held.get(&number) {
            let place = offset as usize..offset as usize + buffer.len();
            buffer.copy_from_slice(&segment[place]);
            return Ok(buffer.len());
        }
        let path = self.files.path(number);
        let file = self.files.open(number).map_err(|error| error.to_string())?;
        let file = file.ok_or_else(|| format!("{} is missing", path.display()))?;
        file.read_at(buffer, offset)
            .map_err(|error| format!("{} can't be read: {error}", path.display()))
    }

    /// A whole segment, with zeros where nothing can be read.
    fn composed(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.size() as usize];
        for (index, chunk) in bytes.chunks_mut(READ_CHUNK).enumerate() {
            let at = self.start_of(number) + (index * READ_CHUNK) as u64;
            if self.read(at, chunk).is_ok() {
                continue;
            }
            // A sector at a time where not all can be read at once.
            for (index, sector) in chunk.chunks_mut(SECTOR).enumerate() {
                if self.read(at + (index * SECTOR) as u64, sector).is_err() {
                    sector.fill(0);
                }
            }
        }
        bytes
    }

    /// Puts these bytes over what is here; segments in which nothing differs are not touched.
    fn put_over(&mut self, mut at: Lsn, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let number = self.files.number_of(at);
            let offset = at.segment_offset(self.size()) as usize;
            let count = bytes.len().min(self.size() as usize - offset);
            let (now, rest) = bytes.split_at(count);
            let mut same = vec![0; count];
            if self.read(at, &mut same) != Ok(count) || same != now {
                let mut segment = match self.held.remove(&number) {
                    Some(segment) => segment,
                    None => self.composed(number),
                };
                segment[offset..offset + count].copy_from_slice(now);
                self.held.insert(number, segment);
            }
            at = at + count as u64;
            bytes = rest;
        }
    }

    /// Replaces `[from, to)` as far as others have it; returns how far.
    fn fetch(&mut self, sources: &mut Sources, from: Lsn, to: Lsn) -> Lsn {
        let mut at = from;
        while at < to {
            let until = self.start_of(self.files.number_of(at) + 1).min(to);
            let bytes = sources.fetch(at, until);
            if bytes.is_empty() {
                break;
            }
            self.mended.fetched_bytes += bytes.len() as u64;
            self.put_over(at, &bytes);
            at = at + bytes.len() as u64;
        }
        at
    }

    /// Replaces the one record after the checker's position, of which it is only known that it was whole; returns its end.
    fn fetch_record(&mut self, sources: &mut Sources, checker: &WalChecker) -> Lsn {
        let from = checker.position();
        let (mut checker, mut at) = (checker.clone(), from);
        let mut record = Vec::new();
        while checker.position() == from {
            let until = self.start_of(self.files.number_of(at) + 1).min(at + READ_CHUNK as u64);
            let bytes = sources.fetch(at, until);
            // Byte by byte, as what follows it is not to be had from others. This is rare.
            let mut taken = 0;
            while taken < bytes.len() && checker.position() == from {
                if checker.check(&bytes[taken..=taken]).is_err() {
                    sources.distrust_last();
                    return from;
                }
                taken += 1;
            }
            if bytes.is_empty() {
                return from;
            }
            record.extend_from_slice(&bytes[..taken]);
            at = at + taken as u64;
        }
        self.mended.fetched_bytes += record.len() as u64;
        self.put_over(from, &record);
        from + record.len() as u64
    }

    /// Whether the own bytes show where the log ended, as they do on a disk that is well: there is something up to its last
    /// byte, and, as recovery finds, nothing after it that has to be more.
    fn shows_its_end(&self, end: Lsn) -> bool {
        let last = self.last_byte_before(end);
        let of_last = self.files.number_of(last.unwrap_or(end));
        let is_whole = |number: u64| match self.files.open(number) {
            Ok(Some(file)) => file.size().is_ok_and(|size| size == self.size()),
            Ok(None) => number != of_last,
            Err(_) => false,
        };
        let after = self.files.numbers().unwrap_or_default();
        let after = after.into_iter().filter(|&number| number > of_last);
        std::iter::once(of_last).chain(after).all(is_whole)
            && last.is_none_or(|last| matches!(last_written(&self.files, last), Ok(Some(_))))
    }

    /// The last byte of the mended log that is not zero.
    fn last_byte_before(&self, end: Lsn) -> Option<Lsn> {
        let mut upper = end;
        while upper > self.begin {
            let start = Lsn(upper.0 - 1).segment_start(self.size());
            let composed = self.composed(self.files.number_of(start));
            if let Some(found) = last_nonzero(&composed[..(upper - start) as usize]) {
                return Some(start + found as u64);
            }
            upper = start;
        }
        None
    }

    /// Where the log ended at most: in a segment that is followed by one that was made, and not written to.
    fn bound(&self) -> Option<Lsn> {
        let next = self.tail() + 1;
        let file = self.files.open(next).ok()??;
        let is_whole = file.size().is_ok_and(|size| size == self.size());
        let is_empty = matches!(last_written(&self.files, self.start_of(next)), Ok(None));
        (is_whole && is_empty).then(|| self.start_of(next))
    }

    fn is_relieved(&self, sources: &Sources) -> bool {
        sources.relieve(self.bound())
    }

    /// Nobody has what comes at `end`. That is no harm if nobody depends on it; then the log ends there.
    fn cut(mut self, sources: &mut Sources, end: Lsn, why: &str) -> Result<Mended, Lack> {
        if !self.is_relieved(sources) {
            return Err(self.lack(sources, end, why));
        }
        if end < self.control.state.commit_lsn {
            return Err(self.lack(sources, end, "what is missing is committed"));
        }
        let directory = self.files.directory().to_owned();
        // The notes first: the log must not be shorter than they say.
        if self.control.flush_lsn > end {
            let path = directory.join("control");
            let lowered = TimelineControl { flush_lsn: end, ..self.control.clone() };
            replace_file(self.disk.as_ref(), &path, &lowered.encode())
                .map_err(StorageError::unsynced("replace", &path))?;
        }
        let mut note = FlushedNote::open(self.disk.as_ref(), &directory)?;
        note.lower(end)?;
        // What follows is nothing that was ever durable, as recovery would take it for.
        let last = self.files.number_of(end);
        let offset = end.segment_offset(self.size()) as usize;
        self.held.retain(|&number, _| number <= last);
        let mut segment = self.composed(last);
        segment[offset..].fill(0);
        match offset {
            0 => self.held.remove(&last),
            _ => self.held.insert(last, segment),
        };
        self.put_all()?;
        self.files.remove(|number| number > last || (number == last && offset == 0))?;
        self.mended.cut = Some(end);
        Ok(self.mended)
    }

    /// Puts those in place that lie before what was found to be right, and before where the log may end: nothing of what shows
    /// that is lost with them.
    fn put_whole(&mut self, right_until: Lsn) -> Result<(), StorageError> {
        let tail = self.tail();
        let whole = |number: u64| number < tail && self.start_of(number + 1) <= right_until;
        let whole: Vec<u64> = self.held.keys().copied().filter(|&number| whole(number)).collect();
        if self.held.len() > MAX_HELD {
            for number in whole {
                self.put_one(number)?;
            }
        }
        Ok(())
    }

    fn put_all(&mut self) -> Result<(), StorageError> {
        while let Some(&number) = self.held.keys().next() {
            self.put_one(number)?;
        }
        Ok(())
    }

    fn put_one(&mut self, number: u64) -> Result<(), StorageError> {
        if let Some(segment) = self.held.remove(&number) {
            self.files.replace(number, &segment)?;
            self.mended.segments += 1;
        }
        Ok(())
    }

    fn lack(&self, sources: &Sources, at: Lsn, why: &str) -> Lack {
        let until = match at < self.floor {
            true => format!("{at} to {} at least", self.floor),
            false => format!("after {at}"),
        };
        Lack::Missing(format!(
            "WAL is damaged or missing here, {until} ({why}); asked for it: {}. Until somebody has it this safekeeper takes \
             no part in the timeline; if nobody ever will, replace it: pgstrata safekeeper replace",
            sources.asked()
        ))
    }
}
