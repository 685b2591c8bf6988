//! Cuts a stream of WAL bytes into records, checking everything that PostgreSQL checks (access/transam/xlogreader.c).
//!
//! The decoder does no I/O: bytes go in with [`WalDecoder::feed`] in pieces of any size, records come out of
//! [`WalDecoder::poll`]. A record within one page is a slice of the input; one that straddles pages is assembled in a
//! buffer that is reused and grows only with bytes that were really fed.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::{WalError, WalErrorKind};
use crate::page_header::{PageHeader, page_header_size};
use crate::record::{HEADER_SIZE, RMGR_XLOG, is_valid_rmgr};
use crate::version::PgVersion;
use pgstrata_ids::{Lsn, PAGE_SIZE};

/// Records longer than this are refused unless configured otherwise, in bytes. PostgreSQL 16 and later write at most
/// 1020 MiB, and the reader of 15 cannot allocate 1 GiB.
pub const MAX_RECORD_SIZE_DEFAULT: usize = 1 << 30;

/// No decoder starts behind this position, so that no position it computes overflows. No log gets that far.
const LAST_START: Lsn = Lsn(1 << 62);
/// Consumed input is dropped from the buffer's front when there is this much of it, in bytes.
const COMPACT_THRESHOLD: usize = 256 * 1024;
/// The assembly buffer is given back above this capacity, in bytes.
const ASSEMBLY_KEEP: usize = 1024 * 1024;

const INFO_OPCODE: u8 = 0xF0;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

/// A complete record whose checksum and back link are right.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Where the record starts.
    pub lsn: Lsn,
    /// Where the next record starts, at the earliest: PostgreSQL's `EndRecPtr`, which redo writes into pages.
    pub end: Lsn,
    /// The record without page headers and padding.
    pub bytes: &'a [u8],
}

/// Where a record that `step` found lies.
#[derive(Clone, Copy)]
enum Place {
    Input { offset: usize },
    Assembly,
}

#[derive(Clone, Copy)]
struct Found {
    lsn: Lsn,
    end: Lsn,
    length: usize,
    place: Place,
}

/// A record of which some pages have been seen.
#[derive(Clone, Copy, Debug)]
struct Partial {
    start: Lsn,
    total: usize,
    header_checked: bool,
}

/// Sans-I/O decoder of one timeline's WAL.
#[derive(Debug)]
pub struct WalDecoder {
    segment_size: u64,
    max_record_size: usize,
    system_identifier: Option<u64>,
    version: Option<PgVersion>,
    tli: Option<u32>,
    only_tli: Option<u32>,

    /// Bytes fed and not yet dropped; those before `consumed` are done with.
    input: Vec<u8>,
    consumed: usize,
    /// Position of `input[consumed]`.
    cursor: Lsn,

    assembly: Vec<u8>,
    partial: Option<Partial>,
    /// Everything before this position is padding, the rest of a switched segment, or an earlier record's end.
    discard_until: Lsn,
    /// The start of a torn record that the page just entered abandons.
    overwritten: Option<Lsn>,
    /// True once a record boundary is known; before, continuation data is skipped.
    synced: bool,

    position: Lsn,
    last_record: Option<Lsn>,
    failed: Option<WalError>,
}

impl WalDecoder {
    /// A decoder for bytes from `start` on: a record boundary, or the start of any page, where the rest of an earlier
    /// record is skipped. `segment_size` is a power of two, in bytes.
    pub fn new(start: Lsn, segment_size: u64) -> WalDecoder {
        let mut decoder = WalDecoder {
            segment_size: segment_size.max(PAGE_SIZE as u64).next_power_of_two(),
            max_record_size: MAX_RECORD_SIZE_DEFAULT,
            system_identifier: None,
            version: None,
            tli: None,
            only_tli: None,
            input: Vec::new(),
            consumed: 0,
            cursor: start,
            assembly: Vec::new(),
            partial: None,
            discard_until: start,
            overwritten: None,
            synced: start.page_offset() != 0,
            position: start,
            last_record: None,
            failed: None,
        };
        decoder.check_start();
        decoder
    }

    /// Also checks that the first record's back link is `prev`. The start is then a record boundary.
    pub fn with_prev(mut self, prev: Lsn) -> WalDecoder {
        self.last_record = Some(prev);
        self.synced = true;
        self
    }

    /// Also checks that segments belong to this cluster.
    pub fn with_system_identifier(mut self, system_identifier: u64) -> WalDecoder {
        self.system_identifier = Some(system_identifier);
        self
    }

    /// Also checks that pages are of this timeline.
    pub fn with_timeline(mut self, tli: u32) -> WalDecoder {
        self.only_tli = Some(tli);
        self
    }

    /// Also checks that pages are of this version.
    pub fn with_version(mut self, version: PgVersion) -> WalDecoder {
        self.version = Some(version);
        self
    }

    /// Refuses longer records, instead of those above [`MAX_RECORD_SIZE_DEFAULT`].
    pub fn with_max_record_size(mut self, bytes: usize) -> WalDecoder {
        self.max_record_size = bytes.max(HEADER_SIZE);
        self
    }

    fn check_start(&mut self) {
        let offset = self.cursor.page_offset();
        let page = Lsn(self.cursor.0 - offset);
        let in_header = offset != 0 && offset < page_header_size(page, self.segment_size) as u64;
        if self.cursor > LAST_START || in_header || self.cursor.align_up() != self.cursor {
            self.failed = Some(WalErrorKind::BadStart.at(self.cursor));
        }
    }

    /// The end of the last valid record; at first, the start (moved to the first record boundary once that is known).
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The start of the last valid record, which is the next record's back link. `None` before the first record,
    /// unless given by [`WalDecoder::with_prev`].
    pub fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// Where the next byte to be fed belongs.
    pub fn feed_position(&self) -> Lsn {
        self.cursor + (self.input.len() - self.consumed) as u64
    }

    /// The version, once a page header was read (or it was given).
    pub fn version(&self) -> Option<PgVersion> {
        self.version
    }

    /// The timeline of the last page whose header was read.
    pub fn timeline(&self) -> Option<u32> {
        self.tli
    }

    /// Forgets bytes that belong to no complete record, and any error, and returns the position from which to feed
    /// again: for a follower that met the end of what had been written so far.
    pub fn rewind(&mut self) -> Lsn {
        self.input.clear();
        self.consumed = 0;
        self.assembly.clear();
        self.partial = None;
        self.overwritten = None;
        self.failed = None;
        self.cursor = self.position;
        self.discard_until = self.position;
        self.check_start();
        self.cursor
    }

    /// Takes the next bytes of the stream. Poll until `None` before feeding more, to keep the buffer small. After an
    /// error they are of no use, and not kept.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.consumed == self.input.len() {
            self.input.clear();
            self.consumed = 0;
        } else if self.consumed >= COMPACT_THRESHOLD {
            self.input.drain(..self.consumed);
            self.consumed = 0;
        }
        self.input.extend_from_slice(bytes);
    }

    /// The next record, or `None` when more bytes are needed. After an error every call returns that error until
    /// [`WalDecoder::rewind`].
    pub fn poll(&mut self) -> Result<Option<Record<'_>>, WalError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let found = match self.step() {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.failed = Some(error);
                return Err(error);
            }
        };
        let bytes = match found.place {
            Place::Input { offset } => &self.input[offset..offset + found.length],
            Place::Assembly => &self.assembly[..],
        };
        Ok(Some(Record { lsn: found.lsn, end: found.end, bytes }))
    }

    fn available(&self) -> usize {
        self.input.len() - self.consumed
    }

    fn advance(&mut self, bytes: usize) {
        self.consumed += bytes;
        self.cursor = self.cursor + bytes as u64;
    }

    fn step(&mut self) -> Result<Option<Found>, WalError> {
        if self.partial.is_none() && self.assembly.capacity() > ASSEMBLY_KEEP {
            self.assembly = Vec::new();
        }
        loop {
            if self.cursor < self.discard_until {
                let wanted = self.discard_until - self.cursor;
                self.advance(self.available().min(usize::try_from(wanted).unwrap_or(usize::MAX)));
                if self.cursor < self.discard_until {
                    return Ok(None);
                }
            }
            if self.cursor.page_offset() == 0 {
                if !self.enter_page()? {
                    return Ok(None);
                }
                continue;
            }
            let found = match self.partial {
                Some(partial) => self.continue_record(partial)?,
                None => self.start_record()?,
            };
            match found {
                Progress::Found(found) => return Ok(Some(found)),
                Progress::NextPage => {}
                Progress::Starved => return Ok(None),
            }
        }
    }

    /// Reads the header of the page at the cursor; false if it has not been fed yet.
    fn enter_page(&mut self) -> Result<bool, WalError> {
        let page = self.cursor;
        let size = page_header_size(page, self.segment_size);
        let Some(bytes) = self.input.get(self.consumed..self.consumed + size) else {
            return Ok(false);
        };
        let header =
            PageHeader::decode(bytes, page, self.segment_size).map_err(|kind| kind.at(page))?;
        self.check_page(&header).map_err(|kind| kind.at(page))?;
        self.advance(size);
        self.discard_until = self.cursor;

        match (self.partial, header.continuation) {
            (Some(partial), _) if header.overwrites_contrecord => {
                self.overwritten = Some(partial.start);
                self.partial = None;
                self.assembly.clear();
            }
            (Some(partial), Some(found)) => {
                let expected = (partial.total - self.assembly.len()) as u32;
                if expected != found {
                    return Err(WalErrorKind::ContinuationLength { expected, found }.at(page));
                }
            }
            (Some(_), None) => return Err(WalErrorKind::NotContinued.at(page)),
            (None, Some(_)) if self.synced => {
                return Err(WalErrorKind::UnexpectedContinuation.at(page));
            }
            (None, Some(remaining)) => {
                let room = PAGE_SIZE - size;
                let skip = (remaining as usize).next_multiple_of(8);
                self.discard_until = self.cursor + skip.min(room) as u64;
                // Continuation data that fills the page may go on in the next one, whose header tells.
                self.synced = skip < room;
                self.position = self.discard_until;
            }
            (None, None) => self.synced = true,
        }
        Ok(true)
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

    /// At a record boundary within a page: takes the record if it ends here, else begins to assemble it.
    fn start_record(&mut self) -> Result<Progress, WalError> {
        let start = self.cursor;
        let fed = &self.input[self.consumed..];
        // Records start at multiples of 8, so the length is never cut by a page's end.
        let Ok(length) = u32_at(fed, 0) else {
            return Ok(Progress::Starved);
        };
        let total = length as usize;
        if length == 0 {
            return Err(WalErrorKind::ZeroLength.at(start));
        }
        if total < HEADER_SIZE {
            return Err(WalErrorKind::RecordLength(length).at(start));
        }
        if total > self.max_record_size {
            return Err(WalErrorKind::RecordTooLong(length).at(start));
        }
        let page_left = PAGE_SIZE - start.page_offset() as usize;
        if total > page_left {
            self.partial = Some(Partial { start, total, header_checked: false });
            self.assembly.clear();
            return Ok(Progress::NextPage);
        }
        // A wrong header is reported before the rest of what may be garbage is waited for.
        if fed.len() >= HEADER_SIZE {
            self.check_header(start, &fed[..HEADER_SIZE])?;
        }
        if fed.len() < total {
            return Ok(Progress::Starved);
        }
        self.check_record(start, &fed[..total])?;
        let (info, rmgr) = (fed[16], fed[17]);
        let place = Place::Input { offset: self.consumed };
        self.advance(total);
        Ok(Progress::Found(self.finish(start, total, info, rmgr, place)))
    }

    /// Within a page that holds a piece of an unfinished record.
    fn continue_record(&mut self, mut partial: Partial) -> Result<Progress, WalError> {
        let page_left = PAGE_SIZE - self.cursor.page_offset() as usize;
        let missing = partial.total - self.assembly.len();
        let wanted = missing.min(page_left);
        let taken = wanted.min(self.available());
        self.assembly.extend_from_slice(&self.input[self.consumed..self.consumed + taken]);
        self.advance(taken);
        self.discard_until = self.cursor;
        if !partial.header_checked && self.assembly.len() >= HEADER_SIZE {
            self.check_header(partial.start, &self.assembly[..HEADER_SIZE])?;
            partial.header_checked = true;
            self.partial = Some(partial);
        }
        if taken < wanted {
            return Ok(Progress::Starved);
        }
        if taken < missing {
            return Ok(Progress::NextPage);
        }
        self.check_record(partial.start, &self.assembly)?;
        let (info, rmgr) = (self.assembly[16], self.assembly[17]);
        self.partial = None;
        Ok(Progress::Found(self.finish(partial.start, partial.total, info, rmgr, Place::Assembly)))
    }

    fn check_header(&self, start: Lsn, header: &[u8]) -> Result<(), WalError> {
        let malformed = |_| WalErrorKind::Malformed("header is cut off").at(start);
        let found = Lsn(u64_at(header, 8).map_err(malformed)?);
        if let Some(expected) = self.last_record {
            if found != expected {
                return Err(WalErrorKind::PreviousLink { expected, found }.at(start));
            }
        } else if found >= start {
            return Err(WalErrorKind::LinkNotBackwards(found).at(start));
        }
        if !is_valid_rmgr(header[17]) {
            return Err(WalErrorKind::ResourceManager(header[17]).at(start));
        }
        Ok(())
    }

    fn check_record(&self, start: Lsn, record: &[u8]) -> Result<(), WalError> {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[HEADER_SIZE..]), &record[..20]);
        if u32_at(record, 20) != Ok(crc) {
            return Err(WalErrorKind::Checksum.at(start));
        }
        let is_xlog = record[17] == RMGR_XLOG;
        let opcode = record[16] & INFO_OPCODE;
        if let Some(overwritten) = self.overwritten {
            // Main data is {255, 16} and then the position of the torn record.
            let names_it = is_xlog
                && opcode == XLOG_OVERWRITE_CONTRECORD
                && u16_at(record, HEADER_SIZE) == Ok(0x10FF)
                && u64_at(record, HEADER_SIZE + 2) == Ok(overwritten.0);
            if !names_it {
                return Err(WalErrorKind::OverwriteContrecord.at(start));
            }
        }
        if is_xlog && opcode == XLOG_SWITCH && record.len() != HEADER_SIZE {
            return Err(WalErrorKind::RecordLength(record.len() as u32).at(start));
        }
        Ok(())
    }

    fn finish(&mut self, lsn: Lsn, length: usize, info: u8, rmgr: u8, place: Place) -> Found {
        let mut end = self.cursor.align_up();
        if rmgr == RMGR_XLOG && info & INFO_OPCODE == XLOG_SWITCH {
            // The rest of the segment is zeros without page headers.
            end = Lsn(end.0.next_multiple_of(self.segment_size));
        }
        self.discard_until = end;
        self.position = end;
        self.last_record = Some(lsn);
        self.overwritten = None;
        Found { lsn, end, length, place }
    }
}

enum Progress {
    Found(Found),
    NextPage,
    Starved,
}
