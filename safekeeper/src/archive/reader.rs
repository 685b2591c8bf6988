//! Reading archived WAL on and on.

use std::sync::Arc;

use pgstrata_ids::{Lsn, TimelineParameters};

use super::{Archive, ArchiveError};

/// Reads archived WAL, keeping the last segment in memory.
#[derive(Debug)]
pub struct ArchiveReader {
    archive: Arc<Archive>,
    last: Option<Part>,
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
        ArchiveReader { archive, last: None }
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
            let found = self.archive.part(parameters, number).await?;
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
    /// What there is of a segment, and where that begins: all of it, or its beginning. `None` if there is nothing.
    pub async fn part(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<(Lsn, Arc<Vec<u8>>)>, ArchiveError> {
        let from = Lsn(number * u64::from(parameters.segment_size));
        let whole = |segment: Vec<u8>| (from, Arc::new(segment));
        if let Some(segment) = self.get(parameters, number).await? {
            return Ok(Some(whole(segment)));
        }
        if let Some(tail) = self.tail_of(parameters, number).await? {
            return Ok(Some((tail.extent.from, tail.bytes)));
        }
        // Tails are removed once the whole segment is there.
        Ok(self.get(parameters, number).await?.map(whole))
    }
}
