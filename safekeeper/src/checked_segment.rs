//! A full segment of committed WAL that was checked before anything rests on it.

use std::sync::Arc;

use pgstrata_ids::{Lsn, TimelineParameters};
use pgstrata_pg_wal::{PgVersion, WalChecker};

use crate::chain_reader::ChainReader;

/// WAL read at once beyond the segment, in bytes.
const READ_CHUNK: usize = 64 << 10;

/// A segment in which every record is whole and right, those that begin before it or end after
/// it included.
#[derive(Clone, Debug)]
pub struct CheckedSegment {
    /// Its number.
    pub number: u64,
    /// All of it: on a branch's first segment, the ancestor's bytes too.
    pub bytes: Arc<Vec<u8>>,
}

/// A checker for this timeline's WAL from `start` on.
pub fn checker(parameters: &TimelineParameters, start: Lsn) -> WalChecker {
    WalChecker::new(start, u64::from(parameters.segment_size))
        .with_system_identifier(parameters.system_id.0)
        .with_version(PgVersion::from_major(parameters.pg_version))
}

/// A checker for what follows the record boundary `lsn`; `last_record` is the start of the record
/// before it, if that is known.
pub fn checker_after(
    parameters: &TimelineParameters,
    lsn: Lsn,
    last_record: Option<Lsn>,
) -> WalChecker {
    let checker = checker(parameters, lsn).at_boundary();
    match last_record {
        Some(prev) => checker.with_prev(prev),
        None => checker,
    }
}

impl CheckedSegment {
    /// Reads segment `number` and checks it. `commit_lsn` is a record boundary at or after its
    /// end. `reached` is where the segment before it was left, if it was checked just now, and
    /// then where this one was: records may go on from one to the next.
    pub async fn read(
        reader: &mut ChainReader,
        parameters: &TimelineParameters,
        number: u64,
        commit_lsn: Lsn,
        reached: &mut Option<WalChecker>,
    ) -> Result<CheckedSegment, String> {
        let size = u64::from(parameters.segment_size);
        let from = Lsn(number * size);
        let mut bytes = vec![0; size as usize];
        fill(reader, from, &mut bytes).await?;
        let before = reached.take();
        let mut segment =
            Segment { reader, parameters, from, bytes: &bytes, commit_lsn, before, reached };
        let mut end = from + size;
        // From the last timeline that wrote in it to the first.
        loop {
            let start = segment.reader.start_of(Lsn(end.0 - 1)).map_err(|e| e.to_string())?;
            segment.check(start, end).await?;
            if start <= from {
                break;
            }
            end = start;
        }
        Ok(CheckedSegment { number, bytes: Arc::new(bytes) })
    }
}

async fn fill(reader: &mut ChainReader, from: Lsn, buffer: &mut [u8]) -> Result<(), String> {
    let mut done = 0;
    while done < buffer.len() {
        let at = from + done as u64;
        let count = reader.read(at, &mut buffer[done..]).await;
        done += count.map_err(|error| error.to_string())?;
    }
    Ok(())
}

struct Segment<'a> {
    reader: &'a mut ChainReader,
    parameters: &'a TimelineParameters,
    from: Lsn,
    bytes: &'a [u8],
    commit_lsn: Lsn,
    before: Option<WalChecker>,
    reached: &'a mut Option<WalChecker>,
}

impl Segment<'_> {
    /// Checks the part that one timeline wrote: from its `start`, or the segment's, to `end`.
    async fn check(&mut self, start: Lsn, end: Lsn) -> Result<(), String> {
        let from = self.from.max(start);
        let mut checker = self.checker_at(start, from).await?;
        let range = (from - self.from) as usize..(end - self.from) as usize;
        check(&mut checker, &self.bytes[range])?;
        let segment_end = self.from + self.bytes.len() as u64;
        if end == segment_end {
            *self.reached = Some(checker.clone());
        } else if checker.position() != end {
            return Err(format!("a branch starts at {end}, which is inside a record"));
        }
        // A record that goes on in the next segment.
        let mut buffer = vec![0; READ_CHUNK];
        while checker.position() < end {
            let at = checker.feed_position();
            let count = READ_CHUNK.min(self.commit_lsn.saturating_sub(at) as usize);
            if count == 0 {
                return Err(format!("the record at the end of {segment_end} is not committed"));
            }
            fill(self.reader, at, &mut buffer[..count]).await?;
            check(&mut checker, &buffer[..count])?;
        }
        Ok(())
    }

    /// A checker that is at `from` and knows of the record, if any, that goes on there.
    async fn checker_at(&mut self, start: Lsn, from: Lsn) -> Result<WalChecker, String> {
        if let Some(checker) = self.before.take_if(|before| before.feed_position() == from) {
            return Ok(checker);
        }
        let size = self.bytes.len() as u64;
        let mut begin = from;
        loop {
            let mut checker = checker(self.parameters, begin);
            if begin == start {
                checker = checker.at_boundary();
            }
            let mut buffer = vec![0; READ_CHUNK];
            while checker.feed_position() < from {
                let at = checker.feed_position();
                let count = READ_CHUNK.min((from - at) as usize);
                fill(self.reader, at, &mut buffer[..count]).await?;
                check(&mut checker, &buffer[..count])?;
            }
            if begin == start || (begin < from && checker.is_synced()) {
                return Ok(checker);
            }
            begin = Lsn(begin.0.saturating_sub(size)).max(start);
        }
    }
}

fn check(checker: &mut WalChecker, bytes: &[u8]) -> Result<(), String> {
    checker.check(bytes).map_err(|error| format!("committed WAL is damaged here: {error}"))
}
