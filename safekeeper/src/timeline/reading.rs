//! WAL for peers and proposers: what is committed, or what is durable in a term that still decides.

use pgstrata_ids::{Lsn, Term};
use pgstrata_wire::safekeeper::RefusedReason;

use super::Timeline;
use crate::segment::SegmentReader;

/// A range that is being read.
#[derive(Debug)]
pub struct Reading<'a> {
    timeline: &'a Timeline,
    reader: SegmentReader,
    at: Lsn,
    to: Lsn,
    term: Term,
}

impl Timeline {
    /// Begins to read `[from, to)`: of the log of `term`, or only what is committed if that is 0.
    pub fn read_range(&self, from: Lsn, to: Lsn, term: Term) -> Result<Reading<'_>, RefusedReason> {
        let available_lsn = self.marks().available_lsn;
        match from < available_lsn {
            true => Err(RefusedReason::Unavailable(format!(
                "WAL before {available_lsn} is no longer on this safekeeper; it is in object storage"
            ))),
            false => Ok(Reading { timeline: self, reader: self.reader(), at: from, to, term }),
        }
    }
}

impl Reading<'_> {
    /// The next byte.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// Reads the next bytes, as many as there are, as fit into `buffer`, and as lie in one segment; 0 if there are no more.
    pub fn next(&mut self, buffer: &mut [u8]) -> Result<usize, RefusedReason> {
        let (timeline, at) = (self.timeline, self.at);
        let end = match self.term {
            Term(0) => timeline.commit_lsn(),
            _ => timeline.flush_lsn(),
        };
        let end = end.min(self.to);
        if at >= end {
            return Ok(0);
        }
        let want = buffer.len().min((end.0 - at.0) as usize);
        let count = match self.reader.read(at, &mut buffer[..want]) {
            Ok(0) => {
                let text = format!("the segment of {at} is no longer on this safekeeper");
                return Err(RefusedReason::Unavailable(text));
            }
            Ok(count) => count,
            Err(error) => return Err(RefusedReason::Storage(error.to_string())),
        };
        // Only a newer proposer removes durable bytes, and it is promised its term first.
        if at + count as u64 > timeline.commit_lsn() && timeline.term() != self.term {
            return Err(RefusedReason::Unavailable(format!(
                "WAL at {at} isn't committed, and term {} now decides about it",
                timeline.term()
            )));
        }
        self.at = at + count as u64;
        Ok(count)
    }
}
