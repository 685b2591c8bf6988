//! WAL for peers and proposers: what is committed, or what is durable in a term that still decides. It is checked before it
//! is handed out.

use std::sync::Arc;

use pgstrata_format::archived::Extent;
use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::TermHistory;
use pgstrata_wire::safekeeper::RefusedReason;

use super::Timeline;
use crate::archive::Tail;
use crate::segment::SegmentReader;
use crate::verifier::{Next, READ_CHUNK, Verifier};

/// A range that is being read.
#[derive(Debug)]
pub struct Reading<'a> {
    timeline: &'a Timeline,
    reader: SegmentReader,
    verifier: Verifier,
    buffer: Vec<u8>,
    to: Lsn,
    term: Term,
    /// Where more than what is committed is read: nothing durable is removed while it stays the same.
    history: TermHistory,
}

/// Where a range that was read has ended: who goes on there needs to check nothing twice.
#[derive(Clone, Debug)]
pub struct ReadOn {
    verifier: Verifier,
    term: Term,
    history: TermHistory,
}

impl Timeline {
    /// Begins to read `[from, to)`: of the log of `term`, or only what is committed if that is 0.
    pub fn read_range(&self, from: Lsn, to: Lsn, term: Term) -> Result<Reading<'_>, RefusedReason> {
        self.read_on(from, to, term, None)
    }

    /// The same by who may have read what comes before it just now.
    pub fn read_on(
        &self,
        from: Lsn,
        to: Lsn,
        term: Term,
        before: Option<ReadOn>,
    ) -> Result<Reading<'_>, RefusedReason> {
        let available_lsn = self.marks().available_lsn;
        if from < available_lsn {
            return Err(RefusedReason::Unavailable(format!(
                "WAL before {available_lsn} is no longer on this safekeeper; it is in object storage"
            )));
        }
        let history = match term {
            Term(0) => TermHistory::default(),
            _ => self.history(),
        };
        let goes_on = |before: &ReadOn| {
            before.verifier.at() == from && before.term == term && before.history == history
        };
        let verifier = match before.filter(goes_on) {
            Some(before) => before.verifier,
            None => self.verifier(from),
        };
        let buffer = Vec::new();
        Ok(Reading { timeline: self, reader: self.reader(), verifier, buffer, to, term, history })
    }

    /// What is committed of the segment of `end`, before that, which is a record's end: for the archive, where it is said to be of
    /// the configuration of this number, which was known before. Waits for the disk.
    pub fn read_tail(&self, end: Lsn, configuration: u64) -> Result<Tail, String> {
        let from = Tail::start(self.parameters(), end);
        let mut bytes = vec![0; (end - from) as usize];
        // What is damaged is noted where it is met.
        let refused = |reason: RefusedReason| reason.to_string();
        let mut reading = self.read_range(from, end, Term(0)).map_err(refused)?;
        let mut done = 0;
        while done < bytes.len() {
            match reading.next(&mut bytes[done..]).map_err(refused)? {
                0 => return Err(format!("WAL at {} can't be read", reading.at())),
                count => done += count,
            }
        }
        let last_record = self.last_record_before(end).map_err(|error| error.to_string())?;
        let history = self.history().up_to(end);
        let extent = Extent { from, boundary: end, last_record, configuration, history };
        Ok(Tail { extent, bytes: Arc::new(bytes) })
    }

    /// A check of the own log from `from` on.
    pub fn verifier(&self, from: Lsn) -> Verifier {
        let start_lsn = self.parameters().start_lsn;
        let floor = self.marks().available_lsn.max(start_lsn);
        Verifier::new(self.parameters(), floor, floor == start_lsn, from)
    }
}

impl Reading<'_> {
    /// The next byte.
    pub fn at(&self) -> Lsn {
        self.verifier.at()
    }

    /// For [`Timeline::read_on`].
    pub fn ended(self) -> ReadOn {
        ReadOn { verifier: self.verifier, term: self.term, history: self.history }
    }

    /// Reads the next bytes, as many as there are, and as fit into `buffer`, or fewer; 0 if there are no more.
    pub fn next(&mut self, buffer: &mut [u8]) -> Result<usize, RefusedReason> {
        let (timeline, at) = (self.timeline, self.at());
        let end = match self.term {
            Term(0) => timeline.commit_lsn(),
            _ => timeline.flush_lsn(),
        };
        if at >= end.min(self.to) {
            return Ok(0);
        }
        let count = self.read_checked(buffer, end)?;
        if timeline.is_retired() {
            return Err(RefusedReason::Unavailable("the timeline is being mended".into()));
        }
        // Only a newer proposer removes durable bytes, and it is promised its term first.
        if at + count as u64 > timeline.commit_lsn() && timeline.term() != self.term {
            return Err(RefusedReason::Unavailable(format!(
                "WAL at {at} isn't committed, and term {} now decides about it",
                timeline.term()
            )));
        }
        Ok(count)
    }

    fn read_checked(&mut self, buffer: &mut [u8], end: Lsn) -> Result<usize, RefusedReason> {
        loop {
            let (at, count) = match self.verifier.next(end) {
                Next::Take => return Ok(self.verifier.take(buffer, self.to)),
                Next::Read { at, count } => (at, count),
                Next::Unfinished => return Err(self.damaged(&format!("no record ends at {end}"))),
            };
            self.buffer.resize(READ_CHUNK, 0);
            let read = match self.reader.read(at, &mut self.buffer[..count]) {
                Ok(0) if at < self.timeline.marks().available_lsn => {
                    let text = format!("the segment of {at} is no longer on this safekeeper");
                    return Err(RefusedReason::Unavailable(text));
                }
                Ok(0) => {
                    return Err(self.damaged(&format!("the segment of {at} is missing or short")));
                }
                Ok(read) => read,
                Err(error) => return Err(self.damaged(&error.to_string())),
            };
            if let Err(error) = self.verifier.give(&self.buffer[..read]) {
                return Err(self.damaged(&error.to_string()));
            }
        }
    }

    /// It may be that it was cut meanwhile: who looks into it in the background can tell.
    fn damaged(&self, why: &str) -> RefusedReason {
        let at = self.verifier.right_until();
        self.timeline.suspect(at, why.to_owned());
        RefusedReason::Storage(format!("WAL at {at} can't be read as it was written: {why}"))
    }
}
