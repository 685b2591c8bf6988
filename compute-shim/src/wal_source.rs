//! PostgreSQL's WAL files, followed: what is complete in them goes to the proposer, and a flush
//! returns when the quorum has it.
//!
//! PostgreSQL writes whole WAL pages, so the end of what was written may hold a record that is
//! still being copied. Complete means: right back link, right checksum. A record once complete
//! never changes, so everything up to the last complete record may be sent at once, whether or
//! not somebody waits for it.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use pgstrata_compute_shared::SharedMap;
use pgstrata_ids::{Lsn, PAGE_SIZE, Term, TimelineParameters};
use pgstrata_pg_wal::{
    DecodedRecord, MAX_RECORD_SIZE_DEFAULT, PgVersion, Record, WalDecoder, page_header_size, rmgr,
};

use crate::conf;
use crate::memory::wake_waiters;
use crate::proposer::{WalChunk, WalSource};

/// Bytes read from a file at once.
const READ_SIZE: usize = 256 * 1024;
/// Bytes looked at in one call, at most: there are sockets to be served in between.
const SCAN_SIZE: usize = 4 << 20;
/// The longest record that PostgreSQL writes, with room to spare, in bytes.
const MAX_RECORD: u32 = MAX_RECORD_SIZE_DEFAULT as u32;

/// Resource managers from here on are extensions' (`RM_MIN_CUSTOM_ID` in access/rmgr.h).
const FIRST_CUSTOM_RMGR: u8 = 128;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;

/// Follows the WAL of a running compute.
pub struct PgWal {
    directory: PathBuf,
    parameters: TimelineParameters,
    /// What the files hold before this may be made up: only its last record is known to be the log's.
    start: Lsn,
    map: SharedMap,
    decoder: WalDecoder,
    /// Ends of complete records after `sent`, in order; the last is how far WAL is complete.
    boundaries: VecDeque<Lsn>,
    sent: Lsn,
    /// The last record boundary at or before `sent`.
    sent_boundary: Lsn,
    committed: Lsn,
    /// The count of WAL writes when the files were last looked at.
    seen: u64,
    /// A count of WAL writes and how far they went, while not all of it has been looked at.
    looking: Option<(u64, Lsn)>,
    /// Counts of writes, and how far WAL was complete then: a flush that saw the count waits for
    /// that position.
    promises: VecDeque<(u64, Lsn)>,
    /// Nothing new can be complete before PostgreSQL has written this far.
    wanted: Lsn,
    file: Option<(u64, File)>,
    buffer: Vec<u8>,
    /// What the buffer holds: so many bytes from here on, as last read.
    held: (Lsn, usize),
    fenced: Arc<AtomicBool>,
}

impl PgWal {
    /// Follows the files in `directory` from `start`, where the last record started at `prev`.
    /// `fenced` is set when a newer compute was elected.
    pub fn new(
        directory: PathBuf,
        parameters: TimelineParameters,
        version: PgVersion,
        map: SharedMap,
        start: Lsn,
        prev: Lsn,
        fenced: Arc<AtomicBool>,
    ) -> PgWal {
        let decoder = WalDecoder::new(start, parameters.segment_size.into())
            .with_prev(prev)
            .with_version(version);
        PgWal {
            directory,
            parameters,
            start,
            map,
            decoder,
            boundaries: VecDeque::new(),
            sent: start,
            sent_boundary: start,
            committed: start,
            seen: 0,
            looking: None,
            promises: VecDeque::new(),
            wanted: Lsn::INVALID,
            file: None,
            buffer: vec![0; READ_SIZE],
            held: (start, 0),
            fenced,
        }
    }

    /// Reads WAL at `at`, not past the end of its segment. 0 bytes: the file is not there yet.
    fn read(&mut self, at: Lsn, length: usize) -> io::Result<usize> {
        let segment_size = u64::from(self.parameters.segment_size);
        let number = at.segment_number(segment_size);
        if self.file.as_ref().is_none_or(|(open, _)| *open != number) {
            let path = self.directory.join(self.parameters.segment_name(number));
            match File::open(path) {
                Ok(file) => self.file = Some((number, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
                Err(error) => return Err(error),
            }
        }
        let offset = at.segment_offset(segment_size);
        let length = length.min((segment_size - offset) as usize).min(READ_SIZE);
        self.held = (at, 0);
        let Some((_, file)) = &self.file else { return Ok(0) };
        let count = file.read_at(&mut self.buffer[..length], offset)?;
        self.held.1 = count;
        Ok(count)
    }

    /// The bytes at `at`, at most `length`, that were read last; empty if others were. A complete record is complete by
    /// what was read, and most often there is no need to read it again.
    fn held(&self, at: Lsn, length: usize) -> &[u8] {
        let (start, count) = self.held;
        let held = &self.buffer[..count];
        let skip = if at < start { count } else { (at - start).min(count as u64) as usize };
        &held[skip..][..length.min(count - skip)]
    }

    /// Finds out how far WAL is complete, given that PostgreSQL wrote up to `written`. False if there is more to look at.
    fn scan(&mut self, written: Lsn) -> io::Result<bool> {
        if written < self.wanted {
            return Ok(true);
        }
        let mut scanned = 0;
        loop {
            let at = self.decoder.feed_position();
            let count = match written.saturating_sub(at) {
                0 => 0,
                left => self.read(at, left as usize)?,
            };
            if count == 0 {
                break;
            }
            self.decoder.feed(&self.buffer[..count]);
            // Any error here only means "not complete yet": see `WalError::is_end_of_wal`.
            while let Ok(Some(record)) = self.decoder.poll() {
                refuse_unkept(record, &self.directory)?;
                self.boundaries.push_back(record.end);
            }
            let stuck = self.decoder.poll().is_err();
            if stuck {
                break;
            }
            scanned += count;
            if scanned >= SCAN_SIZE {
                return Ok(false);
            }
        }
        // What was fed and is not complete may change yet.
        let next = self.decoder.rewind();
        self.wanted = self.end_of_next_record(next, written)?;
        Ok(true)
    }

    /// A bound on when the record that starts at `next` can be complete, so that a long record is
    /// not read again and again while it is being written.
    fn end_of_next_record(&mut self, next: Lsn, written: Lsn) -> io::Result<Lsn> {
        let segment_size = self.parameters.segment_size.into();
        let mut start = next;
        if start.page_offset() == 0 {
            start = start + page_header_size(start, segment_size) as u64;
        }
        let Some(length) = self.read_u32(start, written)? else { return Ok(start) };
        if length as usize <= PAGE_SIZE || length > MAX_RECORD {
            return Ok(start);
        }
        // The back link says whether the length is this record's, or a stale byte of a recycled page: it stands 8 bytes
        // further on, on the next page perhaps.
        let prev = record_position(start, 8, segment_size);
        let low = self.read_u32(prev, written)?;
        let high = self.read_u32(record_position(start, 12, segment_size), written)?;
        let found = low.zip(high).map(|(low, high)| Lsn(u64::from(high) << 32 | u64::from(low)));
        let end = record_position(start, length.into(), segment_size);
        match found.is_some() && found == self.decoder.last_record() {
            true => Ok(end),
            // It only ever delays a little.
            false => Ok(end.min(written + (1 << 20))),
        }
    }

    /// Four bytes of WAL, if they are written.
    fn read_u32(&mut self, at: Lsn, written: Lsn) -> io::Result<Option<u32>> {
        if at + 4 > written {
            return Ok(None);
        }
        if self.held(at, 4).len() < 4 {
            self.read(at, 4)?;
        }
        Ok(self.held(at, 4).first_chunk().copied().map(u32::from_le_bytes))
    }

    fn complete(&self) -> Lsn {
        self.boundaries.back().copied().unwrap_or(self.sent_boundary)
    }

    fn keep_promises(&mut self) {
        let mut kept = None;
        while let Some((count, position)) = self.promises.front().copied()
            && position <= self.committed
        {
            kept = Some(count);
            self.promises.pop_front();
        }
        if let Some(count) = kept
            && !self.fenced.load(Ordering::Acquire)
        {
            self.map.control().durable_sequence.store(count, Ordering::SeqCst);
            wake_waiters(&self.map);
        }
    }

    /// Looks at what was written. False if nothing was, since everything was looked at.
    fn look(&mut self) -> io::Result<bool> {
        let map = self.map;
        let control = map.control();
        let (count, written) = match self.looking {
            Some(unfinished) => unfinished,
            None => {
                let count = control.write_sequence.load(Ordering::SeqCst);
                if count == self.seen {
                    return Ok(false);
                }
                (count, Lsn(control.written_lsn.load(Ordering::SeqCst)))
            }
        };
        if !self.scan(written)? {
            self.looking = Some((count, written));
            return Ok(true);
        }
        self.looking = None;
        self.seen = count;
        self.promises.push_back((count, self.complete()));
        self.keep_promises();
        Ok(true)
    }
}

/// Where the byte after `bytes` bytes of a record is that starts at `start`: it leaves out page headers.
fn record_position(start: Lsn, bytes: u64, segment_size: u64) -> Lsn {
    let mut at = start;
    let mut left = bytes;
    loop {
        let room = PAGE_SIZE as u64 - at.page_offset();
        if left < room {
            return at + left;
        }
        left -= room;
        at = at + room;
        if left == 0 {
            return at;
        }
        at = at + page_header_size(at, segment_size) as u64;
    }
}

/// WAL that nothing of ours could ever replay must not be acknowledged. `directory` is the server's `pg_wal`.
fn refuse_unkept(record: Record<'_>, directory: &Path) -> io::Result<()> {
    // The header is whole: the record's checksum was right.
    let (info, manager) = (record.bytes[16], record.bytes[17]);
    let reason = if manager >= FIRST_CUSTOM_RMGR {
        format!(
            "an extension wrote WAL of its own kind (resource manager {manager}), which can't be replayed: remove the \
             extension from shared_preload_libraries{}",
            preloaded(directory)
        )
    } else if manager == rmgr::XLOG && info & 0xF0 == XLOG_PARAMETER_CHANGE && is_minimal(record) {
        "wal_level is minimal, which leaves changes out of the WAL".to_owned()
    } else {
        return Ok(());
    };
    let text = format!("WAL at {} is refused: {reason}", record.lsn);
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// Who may have written WAL of its own kind: only what is preloaded can, and the record has no name.
fn preloaded(directory: &Path) -> String {
    let entries =
        directory.parent().and_then(|data| conf::read(data, None).ok()).unwrap_or_default();
    match conf::find(&entries, "shared_preload_libraries") {
        Some(entry) => format!(", which is '{}' ({})", entry.value, entry.place),
        None => String::new(),
    }
}

/// Whether a record of new parameters says that `wal_level` is minimal (`xl_parameter_change` in catalog/pg_control.h
/// and access/xlog_internal.h: five numbers come before it).
fn is_minimal(record: Record<'_>) -> bool {
    const WAL_LEVEL_MINIMAL: i32 = 0;
    let decoded = DecodedRecord::decode(record);
    let level = decoded.ok().and_then(|record| {
        let bytes = record.main_data.get(20..24)?;
        Some(i32::from_le_bytes(bytes.try_into().ok()?))
    });
    level == Some(WAL_LEVEL_MINIMAL)
}

impl WalSource for PgWal {
    fn poll_wal(&mut self, max_bytes: usize) -> io::Result<Option<WalChunk>> {
        self.map.control().daemon_sleeps.store(0, Ordering::SeqCst);
        self.look()?;
        if self.sent >= self.complete() {
            self.map.control().daemon_sleeps.store(1, Ordering::SeqCst);
            // A write between the look and the store did not wake us.
            if !self.look()? || self.sent >= self.complete() {
                return Ok(None);
            }
        }
        let limit = self.sent + (max_bytes.min(READ_SIZE)) as u64;
        let mut record_end = self.sent_boundary;
        while let Some(boundary) = self.boundaries.front().copied()
            && boundary <= limit
        {
            record_end = boundary;
            self.boundaries.pop_front();
        }
        // A record longer than the limit goes in pieces; otherwise pieces end where records do.
        let end = if record_end > self.sent { record_end } else { limit };
        let start = self.sent;
        let mut bytes = Vec::with_capacity((end - start) as usize);
        while start + (bytes.len() as u64) < end {
            let at = start + bytes.len() as u64;
            let length = (end - at) as usize;
            if self.held(at, length).is_empty() {
                self.read(at, length)?;
            }
            let next = self.held(at, length);
            if next.is_empty() {
                return Err(io::Error::other(format!("WAL at {at} is gone from pg_wal")));
            }
            bytes.extend_from_slice(next);
        }
        self.sent = end;
        self.sent_boundary = record_end;
        Ok(Some(WalChunk { start, bytes: Bytes::from(bytes), record_end }))
    }

    fn has_more(&self) -> bool {
        self.looking.is_some()
    }

    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes> {
        if from < self.start {
            return Ok(Bytes::new());
        }
        let count = self.read(from, (to - from) as usize)?;
        Ok(Bytes::copy_from_slice(&self.buffer[..count]))
    }

    fn on_commit(&mut self, commit: Lsn) {
        self.committed = commit;
        self.keep_promises();
    }

    fn on_fenced(&mut self, by: Term) {
        tracing::error!("a newer compute owns this branch (term {by}): this one ends");
        self.fenced.store(true, Ordering::Release);
        self.map.control().fenced.store(1, Ordering::SeqCst);
        wake_waiters(&self.map);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use pgstrata_ids::{SystemId, TenantId, TimelineId};
    use pgstrata_pg_wal::WalWriter;

    const SEGMENT: u32 = 1 << 20;
    const START: Lsn = Lsn((5 << 20) + 24576 + 24);

    struct Server {
        memory: Memory,
        source: PgWal,
        directory: tempfile::TempDir,
        writer: WalWriter,
        at: Lsn,
        prev: Lsn,
    }

    impl Server {
        fn new() -> Server {
            let memory = Memory::new(SEGMENT.into()).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let parameters = TimelineParameters {
                tenant: TenantId([1; 16]),
                timeline: TimelineId([2; 16]),
                system_id: SystemId(7),
                pg_version: 15,
                pg_timeline: 1,
                segment_size: SEGMENT,
                start_lsn: Lsn(u64::from(SEGMENT)),
                ancestor: None,
            };
            let prev = Lsn((START.0 - 100) & !7);
            let fenced = Arc::default();
            let (path, map) = (directory.path().join("pg_wal"), memory.map);
            std::fs::create_dir(&path).unwrap();
            let source = PgWal::new(path, parameters, PgVersion::V15, map, START, prev, fenced);
            let writer = WalWriter {
                version: PgVersion::V15,
                tli: 1,
                system_identifier: 7,
                segment_size: SEGMENT.into(),
            };
            Server { memory, source, directory, writer, at: START, prev }
        }

        /// Writes bytes of WAL as PostgreSQL does: whole pages, and then it says so.
        fn write(&mut self, start: Lsn, bytes: &[u8]) {
            let size = u64::from(SEGMENT);
            let mut at = start;
            let mut left = bytes;
            while !left.is_empty() {
                let number = at.segment_number(size);
                let room = (size - at.segment_offset(size)) as usize;
                let (now, later) = left.split_at(left.len().min(room));
                let name = self.source.parameters.segment_name(number);
                let path = self.directory.path().join("pg_wal").join(name);
                let file = File::options().create(true).truncate(false).write(true).open(path);
                let file = file.unwrap();
                file.set_len(size).unwrap();
                file.write_all_at(now, at.segment_offset(size)).unwrap();
                at = at + now.len() as u64;
                left = later;
            }
            let control = self.memory.map.control();
            control.written_lsn.fetch_max(at.0, Ordering::SeqCst);
            control.write_sequence.fetch_add(1, Ordering::SeqCst);
        }

        /// The bytes of the next record, and where they start.
        fn record(&mut self, manager: u8, info: u8, main_data: &[u8]) -> (Lsn, Vec<u8>) {
            let mut record = vec![0; 24];
            record.push(254);
            record.extend_from_slice(&(main_data.len() as u32).to_le_bytes());
            record.extend_from_slice(main_data);
            let length = record.len() as u32;
            record[..4].copy_from_slice(&length.to_le_bytes());
            record[8..16].copy_from_slice(&self.prev.0.to_le_bytes());
            (record[16], record[17]) = (info, manager);
            let checksum = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
            record[20..24].copy_from_slice(&checksum.to_le_bytes());
            let placed = self.writer.place(self.at, record);
            let start = self.at;
            (self.at, self.prev) = (placed.end, placed.start);
            (start, placed.bytes)
        }

        fn poll(&mut self) -> io::Result<Option<WalChunk>> {
            loop {
                match self.source.poll_wal(1 << 20)? {
                    None if self.source.has_more() => {}
                    polled => return Ok(polled),
                }
            }
        }
    }

    #[test]
    fn l4_wal_of_an_extensions_own_kind_is_refused_before_it_is_acknowledged() {
        let mut server = Server::new();
        let (at, bytes) = server.record(rmgr::XLOG, 0x20, b"noop");
        server.write(at, &bytes);
        assert_eq!(server.poll().unwrap().unwrap().record_end, server.at);
        let conf = server.directory.path().join("postgresql.conf");
        std::fs::write(conf, "port = 1\nshared_preload_libraries = 'pg_columns, other'\n").unwrap();
        let (at, bytes) = server.record(128, 0, b"mine");
        server.write(at, &bytes);
        let error = server.poll().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        let text = error.to_string();
        assert!(text.contains("resource manager 128"), "{text}");
        assert!(text.contains("'pg_columns, other' (postgresql.conf line 2)"), "{text}");
        assert_eq!(server.memory.map.control().durable_sequence.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn l1_wal_that_says_it_is_minimal_is_refused() {
        let mut server = Server::new();
        let parameters = |level: i32| {
            let numbers = [100i32, 8, 10, 0, 64, level];
            let mut data: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            data.extend_from_slice(&[0, 0, 0, 0]);
            data
        };
        let (at, bytes) = server.record(rmgr::XLOG, XLOG_PARAMETER_CHANGE, &parameters(1));
        server.write(at, &bytes);
        assert!(server.poll().unwrap().is_some());
        let (at, bytes) = server.record(rmgr::XLOG, XLOG_PARAMETER_CHANGE, &parameters(0));
        server.write(at, &bytes);
        let error = server.poll().unwrap_err();
        assert!(error.to_string().contains("minimal"), "{error}");
    }

    #[test]
    fn l5_bytes_before_the_first_own_record_are_not_served() {
        let mut server = Server::new();
        let (at, bytes) = server.record(rmgr::XLOG, 0x20, &[7; 500]);
        // What the first segment file has before it: zeros, or anything.
        server.write(Lsn(5 << 20), &[0; 24576 + 24]);
        server.write(at, &bytes);
        assert!(server.poll().unwrap().is_some());
        for from in [Lsn(5 << 20), Lsn(START.0 - 8)] {
            assert!(server.source.read_range(from, START + 100).unwrap().is_empty(), "{from}");
        }
        assert_eq!(server.source.read_range(START, START + 100).unwrap(), bytes[..100]);
    }

    #[test]
    fn h1_a_long_record_is_read_once() {
        let mut server = Server::new();
        let (start, bytes) = server.record(rmgr::XLOG, 0x20, &vec![9; 40 << 20]);
        // It comes in many writes, and is looked at after each.
        let mut at = start;
        let mut reads = 0;
        for piece in bytes.chunks(64 << 10) {
            server.write(at, piece);
            at = at + piece.len() as u64;
            reads += u32::from(at >= server.source.wanted);
            if at < server.at {
                assert!(server.poll().unwrap().is_none());
            }
        }
        assert!(reads < 10, "the record was looked for {reads} times");
        let mut sent = Vec::new();
        while let Some(chunk) = server.poll().unwrap() {
            sent.extend_from_slice(&chunk.bytes);
            let whole = sent.len() == bytes.len();
            assert_eq!(chunk.record_end, if whole { server.at } else { START });
        }
        assert!(sent == bytes);
    }
}
