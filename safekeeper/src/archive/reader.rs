//! Reading archived WAL on and on.

use std::sync::Arc;

use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::{Lsn, TimelineParameters};

use super::{Archive, ArchiveError};
use crate::checked_segment::checker;

/// Reads archived WAL, keeping the last segment in memory.
#[derive(Debug)]
pub struct ArchiveReader {
    archive: Arc<Archive>,
    last: Option<Part>,
    given_up: AllGivenUp,
}

/// A segment, or the tail in it.
#[derive(Debug)]
struct Part {
    parameters: TimelineParameters,
    from: Lsn,
    bytes: Arc<Vec<u8>>,
}

impl Part {
    fn has(&self, parameters: &TimelineParameters, at: Lsn) -> bool {
        let end = self.from + self.bytes.len() as u64;
        self.parameters == *parameters && self.from <= at && at < end
    }
}

impl ArchiveReader {
    /// A reader of `archive`.
    pub fn new(archive: Arc<Archive>) -> ArchiveReader {
        ArchiveReader { archive, last: None, given_up: AllGivenUp::default() }
    }

    /// The same, that leaves out what is of members who were given up.
    pub fn without(self, given_up: AllGivenUp) -> ArchiveReader {
        ArchiveReader { given_up, ..self }
    }

    /// Fills `buffer` from `at` on, to the end of the segment, or of what is archived of it, at most.
    pub async fn read(
        &mut self,
        parameters: &TimelineParameters,
        at: Lsn,
        buffer: &mut [u8],
    ) -> Result<usize, String> {
        if !self.last.as_ref().is_some_and(|last| last.has(parameters, at)) {
            self.last = None;
            let number = at.segment_number(u64::from(parameters.segment_size));
            let found =
                self.archive.part(parameters, number, Lsn(at.0 + 1), &self.given_up).await?;
            let part =
                found.map(|(from, bytes)| Part { parameters: parameters.clone(), from, bytes });
            let Some(part) = part.filter(|part| part.has(parameters, at)) else {
                return Err(format!(
                    "the WAL segment of {at} is neither on this safekeeper nor in object storage"
                ));
            };
            self.last = Some(part);
        }
        let Some(part) = &self.last else { return Ok(0) };
        let rest = &part.bytes[(at - part.from) as usize..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl Archive {
    /// What there is of a segment of the log that goes on, and where that begins: all of it, or its beginning, up to `to` if there
    /// is as much. `None` if there is nothing.
    pub async fn part(
        &self,
        parameters: &TimelineParameters,
        number: u64,
        to: Lsn,
        given_up: &AllGivenUp,
    ) -> Result<Option<(Lsn, Arc<Vec<u8>>)>, ArchiveError> {
        let mut best: Option<(Lsn, Arc<Vec<u8>>)> = None;
        // Tails are removed once the whole segment is there: then that is to be found.
        for _ in 0..2 {
            if let Some(part) = self.whole(parameters, number, given_up).await? {
                if ends(&part) >= to {
                    return Ok(Some(part));
                }
                best = Some(part);
            }
            for named in self.tails(parameters).await? {
                if named.end.segment_number(u64::from(parameters.segment_size)) != number {
                    continue;
                }
                let Some(tail) = self.get_tail(parameters, named.end).await? else { continue };
                let part =
                    shared(tail.extent.from, tail.bytes, tail.extent.configuration, given_up);
                if ends(&part) >= to {
                    return Ok(Some(part));
                }
                if best.as_ref().is_none_or(|best| ends(best) < ends(&part)) {
                    best = Some(part);
                }
            }
        }
        Ok(best)
    }

    /// Checks that what is archived up to the end of `extent`, from the segment of its last record on, can be had, is right, and
    /// ends with a record.
    pub async fn check_end(
        &self,
        parameters: &TimelineParameters,
        extent: &Extent,
        given_up: &AllGivenUp,
    ) -> Result<(), String> {
        let size = u64::from(parameters.segment_size);
        let (start_lsn, end) = (parameters.start_lsn, extent.boundary);
        let last = extent.last_record.unwrap_or(Lsn(end.0.saturating_sub(1)));
        let from = last.segment_start(size).max(start_lsn);
        let mut checker = match from == start_lsn {
            true => checker(parameters, from).at_boundary(),
            false => checker(parameters, from),
        };
        while checker.feed_position() < end {
            let at = checker.feed_position();
            let to = (at.segment_start(size) + size).min(end);
            let part = self.part(parameters, at.segment_number(size), to, given_up).await?;
            let wal = part.as_ref().and_then(|(first, bytes)| {
                let begin = at.0.checked_sub(first.0)? as usize;
                bytes.get(begin..begin + (to - at) as usize)
            });
            let wal = wal.ok_or_else(|| format!("nothing there has WAL from {at} to {to}"))?;
            checker.check(wal).map_err(|error| error.to_string())?;
        }
        match checker.is_synced() && checker.position() != end {
            true => Err(format!("it has no record that ends at {end}")),
            false => Ok(()),
        }
    }

    async fn whole(
        &self,
        parameters: &TimelineParameters,
        number: u64,
        given_up: &AllGivenUp,
    ) -> Result<Option<(Lsn, Arc<Vec<u8>>)>, ArchiveError> {
        let Some((extent, segment)) = self.get_segment(parameters, number).await? else {
            return Ok(None);
        };
        let from = Lsn(number * u64::from(parameters.segment_size));
        let configuration = extent.map_or(0, |extent| extent.configuration);
        Ok(Some(shared(from, Arc::new(segment), configuration, given_up)))
    }
}

/// Where it ends.
fn ends((from, bytes): &(Lsn, Arc<Vec<u8>>)) -> Lsn {
    *from + bytes.len() as u64
}

/// What of it is of the log that goes on, too.
fn shared(
    from: Lsn,
    bytes: Arc<Vec<u8>>,
    configuration: u64,
    given_up: &AllGivenUp,
) -> (Lsn, Arc<Vec<u8>>) {
    let end = from + bytes.len() as u64;
    match given_up.denies(configuration, end) {
        None => (from, bytes),
        Some(given_up) => {
            let right = given_up.lsn.saturating_sub(from) as usize;
            (from, Arc::new(bytes[..right.min(bytes.len())].to_vec()))
        }
    }
}
