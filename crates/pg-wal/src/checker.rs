//! Checks a stream of WAL bytes as [`WalDecoder`](crate::WalDecoder) does, without keeping any of them.
//!
//! For those who store WAL and hand it on, and must not believe a byte before it was checked. Its state is small and
//! can be copied, whatever the length of a record: the checksum is taken as bytes come.

use crate::decoder::MAX_RECORD_SIZE_DEFAULT;
use crate::error::{WalError, WalErrorKind};
use crate::page_header::{LONG_SIZE, PageHeader, page_header_size};
use crate::record::{HEADER_SIZE, RMGR_XLOG, is_valid_rmgr};
use crate::version::PgVersion;
use pgstrata_ids::{Lsn, PAGE_SIZE};

/// Of a record, what is looked at beyond its checksum: the header, and what an `OVERWRITE_CONTRECORD` names.
const PREFIX: usize = HEADER_SIZE + 10;

const INFO_OPCODE: u8 = 0xF0;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;
/// The header up to its checksum.
const CHECKED_HEADER: usize = 20;

/// A record that has begun.
#[derive(Clone, Copy, Debug)]
struct Partial {
    start: Lsn,
    /// 0 until the length was read.
    total: usize,
    done: usize,
    header_checked: bool,
    prefix: [u8; PREFIX],
    /// Of the bytes after the header.
    crc: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct WalChecker {
    segment_size: u64,
    system_identifier: Option<u64>,
    version: Option<PgVersion>,
    tli: Option<u32>,
    only_tli: Option<u32>,

    /// Where the next byte belongs.
    cursor: Lsn,
    page_header: [u8; LONG_SIZE],
    page_header_done: usize,
    partial: Option<Partial>,
    /// Everything before it is padding or the rest of an earlier record.
    discard_until: Lsn,
    /// A boundary that counts once the cursor is there.
    pending: Option<Lsn>,
    overwritten: Option<Lsn>,
    /// Where the rest of a record ends with which a segment, and what was given, begins, if it may be that of a switch.
    after_rest: Option<Lsn>,
    /// It was one: the next record links to where it began, before this.
    switched_before: Option<Lsn>,
    synced: bool,

    position: Lsn,
    /// Before `position`.
    last_record: Option<Lsn>,
    /// The last that is whole, though what pads it, and with it the boundary, may be still to come.
    link: Option<Lsn>,
    failed: Option<WalError>,
}

impl WalChecker {
    /// A checker for bytes from `start` on: a record boundary, or the start of any page, where the rest of an earlier
    /// record is skipped unchecked. `segment_size` is a power of two, in bytes.
    pub fn new(start: Lsn, segment_size: u64) -> WalChecker {
        WalChecker {
            segment_size: segment_size.max(PAGE_SIZE as u64).next_power_of_two(),
            system_identifier: None,
            version: None,
            tli: None,
            only_tli: None,
            cursor: start,
            page_header: [0; LONG_SIZE],
            page_header_done: 0,
            partial: None,
            discard_until: start,
            pending: None,
            overwritten: None,
            after_rest: None,
            switched_before: None,
            synced: start.page_offset() != 0,
            position: start,
            last_record: None,
            link: None,
            failed: (start > Lsn(1 << 62)).then(|| WalErrorKind::BadStart.at(start)),
        }
    }

    /// The start is a record boundary, whatever the page says.
    pub fn at_boundary(mut self) -> WalChecker {
        self.synced = true;
        self
    }

    /// Also checks that the first record's back link is `prev`. The start is then a record boundary.
    pub fn with_prev(mut self, prev: Lsn) -> WalChecker {
        self.last_record = Some(prev);
        self.link = Some(prev);
        self.at_boundary()
    }

    /// Also checks that segments belong to this cluster.
    pub fn with_system_identifier(mut self, system_identifier: u64) -> WalChecker {
        self.system_identifier = Some(system_identifier);
        self
    }

    /// Also checks that pages are of this timeline. Otherwise one of a later one is noticed only at the next page, which seems to
    /// go back then.
    pub fn with_timeline(mut self, tli: u32) -> WalChecker {
        self.only_tli = Some(tli);
        self
    }

    /// Also checks that pages are of this version.
    pub fn with_version(mut self, version: Option<PgVersion>) -> WalChecker {
        self.version = version;
        self
    }

    /// The last record boundary up to which everything was given and is right; at first, the start.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The start of the last checked record before [`WalChecker::position`]: the back link of a record there.
    pub fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// Where the next byte belongs.
    pub fn feed_position(&self) -> Lsn {
        self.cursor
    }

    /// True once a record boundary is known; before, what was given is the rest of a record that began earlier.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Checks the next bytes. After an error every call returns that error.
    pub fn check(&mut self, mut bytes: &[u8]) -> Result<(), WalError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        while !bytes.is_empty() {
            match self.step(bytes) {
                Ok(taken) => bytes = &bytes[taken..],
                Err(error) => {
                    self.failed = Some(error);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn advance(&mut self, count: usize) -> usize {
        self.cursor = self.cursor + count as u64;
        if self.pending == Some(self.cursor) {
            self.position = self.cursor;
            self.last_record = self.link;
            self.pending = None;
        }
        count
    }

    /// Takes some of the bytes, at least one.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        if self.cursor < self.discard_until {
            let wanted = (self.discard_until - self.cursor).min(bytes.len() as u64);
            return Ok(self.advance(wanted as usize));
        }
        if self.page_header_done > 0 || self.cursor.page_offset() == 0 {
            return self.take_page_header(bytes);
        }
        match self.take_whole_record(bytes)? {
            Some(taken) => Ok(taken),
            None => self.take_record(bytes),
        }
    }

    /// The same as [`WalChecker::take_record`], in one step, for a record that lies in front of us on one page: most do.
    fn take_whole_record(&mut self, bytes: &[u8]) -> Result<Option<usize>, WalError> {
        let page_left = PAGE_SIZE - self.cursor.page_offset() as usize;
        let here = &bytes[..page_left.min(bytes.len())];
        if self.partial.is_some() || here.len() < HEADER_SIZE {
            return Ok(None);
        }
        let mut record = Partial {
            start: self.cursor,
            total: 0,
            done: 0,
            header_checked: true,
            prefix: [0; PREFIX],
            crc: 0,
        };
        record.prefix[..HEADER_SIZE].copy_from_slice(&here[..HEADER_SIZE]);
        if self.is_end_of_switch(&record) {
            return Ok(None);
        }
        record.total = self.record_length(&record)?;
        let Some(whole) = here.get(..record.total) else { return Ok(None) };
        let prefix = PREFIX.min(whole.len());
        record.prefix[..prefix].copy_from_slice(&whole[..prefix]);
        record.done = record.total;
        record.crc = crc32c::crc32c(&whole[HEADER_SIZE..]);
        self.check_header(&record)?;
        self.check_record(&record)?;
        self.advance(record.total);
        self.finish(&record);
        Ok(Some(record.total))
    }

    fn take_page_header(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        let page = Lsn(self.cursor.0 - self.page_header_done as u64);
        let size = page_header_size(page, self.segment_size);
        let taken = bytes.len().min(size - self.page_header_done);
        let place = self.page_header_done..self.page_header_done + taken;
        self.page_header[place].copy_from_slice(&bytes[..taken]);
        self.page_header_done += taken;
        self.cursor = self.cursor + taken as u64;
        if self.page_header_done < size {
            return Ok(taken);
        }
        self.page_header_done = 0;
        let header = PageHeader::decode(&self.page_header[..size], page, self.segment_size)
            .map_err(|kind| kind.at(page))?;
        self.check_page(&header).map_err(|kind| kind.at(page))?;
        self.enter_page(&header, PAGE_SIZE - size).map_err(|kind| kind.at(page))?;
        Ok(taken)
    }

    fn check_page(&mut self, header: &PageHeader) -> Result<(), WalErrorKind> {
        if self.version.is_some_and(|version| version != header.version) {
            return Err(WalErrorKind::OtherVersion(header.version.wal_magic()));
        }
        if let Some(expected) = self.only_tli.filter(|expected| header.tli != *expected) {
            return Err(WalErrorKind::OtherTimeline { found: header.tli, expected });
        }
        if let Some(before) = self.tli.filter(|before| header.tli < *before) {
            return Err(WalErrorKind::TimelineWentBack { found: header.tli, before });
        }
        if let (Some((found, _)), Some(expected)) = (header.segment, self.system_identifier)
            && found != expected
        {
            return Err(WalErrorKind::SystemIdentifier(found));
        }
        self.version = Some(header.version);
        self.tli = Some(header.tli);
        Ok(())
    }

    fn enter_page(&mut self, header: &PageHeader, room: usize) -> Result<(), WalErrorKind> {
        match (self.partial, header.continuation) {
            (Some(partial), _) if header.overwrites_contrecord => {
                self.overwritten = Some(partial.start);
                self.partial = None;
            }
            (Some(partial), Some(found)) => {
                let expected = (partial.total - partial.done) as u32;
                if expected != found {
                    return Err(WalErrorKind::ContinuationLength { expected, found });
                }
            }
            (Some(_), None) => return Err(WalErrorKind::NotContinued),
            (None, Some(_)) if self.synced => return Err(WalErrorKind::UnexpectedContinuation),
            (None, Some(remaining)) => {
                let skip = (remaining as usize).next_multiple_of(8);
                self.discard_until = self.cursor + skip.min(room) as u64;
                // Continuation data that fills the page may go on in the next one, whose header tells.
                self.synced = skip < room;
                self.pending = Some(self.discard_until);
                // It is a header and nothing else, of 24 bytes.
                let begins_segment =
                    self.cursor.segment_offset(self.segment_size) < PAGE_SIZE as u64;
                self.after_rest =
                    Some(self.discard_until).filter(|_| begins_segment && skip < HEADER_SIZE);
            }
            (None, None) => self.synced = true,
        }
        Ok(())
    }

    /// Within a page: takes bytes of the record at the cursor, up to the next thing to look at.
    fn take_record(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        let mut partial = self.partial.unwrap_or(Partial {
            start: self.cursor,
            total: 0,
            done: 0,
            header_checked: false,
            prefix: [0; PREFIX],
            crc: 0,
        });
        let until = match partial.done {
            0..4 => 4,
            4..HEADER_SIZE => HEADER_SIZE,
            done if done < PREFIX.min(partial.total) => PREFIX.min(partial.total),
            _ => partial.total,
        };
        let page_left = PAGE_SIZE - self.cursor.page_offset() as usize;
        let taken = (until - partial.done).min(page_left).min(bytes.len());
        let (from, now) = (partial.done, &bytes[..taken]);
        if from < PREFIX {
            partial.prefix[from..from + taken].copy_from_slice(now);
        }
        if from >= HEADER_SIZE {
            partial.crc = crc32c::crc32c_append(partial.crc, now);
        }
        partial.done += taken;
        if partial.done == 4 && self.is_end_of_switch(&partial) {
            self.partial = None;
            self.end_segment(partial.start);
            return Ok(self.advance(taken));
        }
        if partial.done == 4 {
            partial.total = self.record_length(&partial)?;
        }
        if partial.done >= HEADER_SIZE && !partial.header_checked {
            self.check_header(&partial)?;
            partial.header_checked = true;
        }
        let whole = partial.done >= HEADER_SIZE && partial.done == partial.total;
        if whole {
            self.check_record(&partial)?;
        }
        self.partial = (!whole).then_some(partial);
        self.advance(taken);
        if whole {
            self.finish(&partial);
        }
        Ok(taken)
    }

    /// Whether what begins with the rest of a short record, in a segment's first bytes, goes on with zeros: that was the end of a
    /// segment switch, whose own begin was not given. Otherwise there would be a record.
    fn is_end_of_switch(&self, partial: &Partial) -> bool {
        self.after_rest == Some(partial.start) && word(&partial.prefix, 0) == [0; 4]
    }

    /// The rest of the segment, from `at` on, is padding.
    fn end_segment(&mut self, at: Lsn) {
        let end = at.segment_start(self.segment_size) + self.segment_size;
        self.discard_until = end;
        self.pending = Some(end);
        self.after_rest = None;
        // Where records were here, and are zeros, the next one links to one of them.
        self.switched_before = Some(at.segment_start(self.segment_size));
    }

    fn record_length(&self, partial: &Partial) -> Result<usize, WalError> {
        let length = u32::from_le_bytes(word(&partial.prefix, 0));
        match length as usize {
            0 => Err(WalErrorKind::ZeroLength.at(partial.start)),
            total if total < HEADER_SIZE => {
                Err(WalErrorKind::RecordLength(length).at(partial.start))
            }
            total if total > MAX_RECORD_SIZE_DEFAULT => {
                Err(WalErrorKind::RecordTooLong(length).at(partial.start))
            }
            total => Ok(total),
        }
    }

    fn check_header(&self, partial: &Partial) -> Result<(), WalError> {
        let (start, header) = (partial.start, &partial.prefix);
        let found = Lsn(u64::from_le_bytes(word(header, 8)));
        match self.link {
            Some(expected) if found != expected => {
                return Err(WalErrorKind::PreviousLink { expected, found }.at(start));
            }
            None if found >= self.switched_before.unwrap_or(start) => {
                return Err(WalErrorKind::LinkNotBackwards(found).at(start));
            }
            _ => {}
        }
        match is_valid_rmgr(header[17]) {
            true => Ok(()),
            false => Err(WalErrorKind::ResourceManager(header[17]).at(start)),
        }
    }

    fn check_record(&self, partial: &Partial) -> Result<(), WalError> {
        let (start, record) = (partial.start, &partial.prefix);
        let crc = crc32c::crc32c_append(partial.crc, &record[..CHECKED_HEADER]);
        if u32::from_le_bytes(word(record, CHECKED_HEADER)) != crc {
            return Err(WalErrorKind::Checksum.at(start));
        }
        let opcode = (record[17] == RMGR_XLOG).then_some(record[16] & INFO_OPCODE);
        if let Some(overwritten) = self.overwritten {
            // Main data is {255, 16} and then the position of the torn record.
            let names_it = opcode == Some(XLOG_OVERWRITE_CONTRECORD)
                && partial.total >= PREFIX
                && record[HEADER_SIZE..HEADER_SIZE + 2] == [0xFF, 0x10]
                && u64::from_le_bytes(word(record, HEADER_SIZE + 2)) == overwritten.0;
            if !names_it {
                return Err(WalErrorKind::OverwriteContrecord.at(start));
            }
        }
        if opcode == Some(XLOG_SWITCH) && partial.total != HEADER_SIZE {
            return Err(WalErrorKind::RecordLength(partial.total as u32).at(start));
        }
        Ok(())
    }

    fn finish(&mut self, partial: &Partial) {
        let mut end = self.cursor.align_up();
        let (info, rmgr) = (partial.prefix[16], partial.prefix[17]);
        if rmgr == RMGR_XLOG && info & INFO_OPCODE == XLOG_SWITCH {
            // The rest of the segment is zeros without page headers.
            end = Lsn(end.0.next_multiple_of(self.segment_size));
        }
        self.discard_until = end;
        self.link = Some(partial.start);
        self.after_rest = None;
        self.switched_before = None;
        self.overwritten = None;
        self.pending = Some(end);
        self.advance(0);
    }
}

/// The `N` bytes at a place within a prefix.
fn word<const N: usize>(prefix: &[u8; PREFIX], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&prefix[at..at + N]);
    bytes
}
