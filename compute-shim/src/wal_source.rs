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
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use pgstrata_compute_shared::SharedMap;
use pgstrata_ids::{Lsn, PAGE_SIZE, Term, TimelineParameters};
use pgstrata_pg_wal::{PgVersion, WalDecoder, page_header_size};

use crate::memory::wake_waiters;
use crate::proposer::{WalChunk, WalSource};

/// Bytes read from a file at once.
const READ_SIZE: usize = 256 * 1024;

/// Follows the WAL of a running compute.
pub struct PgWal {
    directory: PathBuf,
    parameters: TimelineParameters,
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
    /// Counts of writes, and how far WAL was complete then: a flush that saw the count waits for
    /// that position.
    promises: VecDeque<(u64, Lsn)>,
    /// Nothing new can be complete before PostgreSQL has written this far.
    wanted: Lsn,
    file: Option<(u64, File)>,
    buffer: Vec<u8>,
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
            map,
            decoder,
            boundaries: VecDeque::new(),
            sent: start,
            sent_boundary: start,
            committed: start,
            seen: 0,
            promises: VecDeque::new(),
            wanted: Lsn::INVALID,
            file: None,
            buffer: vec![0; READ_SIZE],
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
        match &self.file {
            Some((_, file)) => file.read_at(&mut self.buffer[..length], offset),
            None => Ok(0),
        }
    }

    /// Finds out how far WAL is complete, given that PostgreSQL wrote up to `written`.
    fn scan(&mut self, written: Lsn) -> io::Result<()> {
        if written < self.wanted {
            return Ok(());
        }
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
                self.boundaries.push_back(record.end);
            }
            let stuck = self.decoder.poll().is_err();
            if stuck {
                break;
            }
        }
        // What was fed and is not complete may change yet.
        let next = self.decoder.rewind();
        self.wanted = self.end_of_next_record(next, written)?;
        Ok(())
    }

    /// A bound on when the record that starts at `next` can be complete, so that a long record is
    /// not read again and again while it is being written.
    fn end_of_next_record(&mut self, next: Lsn, written: Lsn) -> io::Result<Lsn> {
        let mut start = next;
        if start.page_offset() == 0 {
            let header = page_header_size(start, self.parameters.segment_size.into());
            start = start + header as u64;
        }
        if start + 4 > written || self.read(start, 4)? < 4 {
            return Ok(start);
        }
        let [a, b, c, d, ..] = self.buffer[..] else { return Ok(start) };
        let length = u32::from_le_bytes([a, b, c, d]);
        // The length may still be a stale byte of a recycled page: it only ever delays by what
        // the record could really have, never beyond a page for lengths that fit one.
        match length as usize > PAGE_SIZE && length < 1 << 30 {
            true => Ok((start + u64::from(length)).min(written + (1 << 20))),
            false => Ok(start),
        }
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

    fn look(&mut self) -> io::Result<bool> {
        let map = self.map;
        let control = map.control();
        let count = control.write_sequence.load(Ordering::SeqCst);
        if count == self.seen {
            return Ok(false);
        }
        let written = Lsn(control.written_lsn.load(Ordering::SeqCst));
        self.scan(written)?;
        self.seen = count;
        self.promises.push_back((count, self.complete()));
        self.keep_promises();
        Ok(true)
    }
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
            let count = self.read(at, (end - at) as usize)?;
            if count == 0 {
                return Err(io::Error::other(format!("WAL at {at} is gone from pg_wal")));
            }
            bytes.extend_from_slice(&self.buffer[..count]);
        }
        self.sent = end;
        self.sent_boundary = record_end;
        Ok(Some(WalChunk { start, bytes: Bytes::from(bytes), record_end }))
    }

    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes> {
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
