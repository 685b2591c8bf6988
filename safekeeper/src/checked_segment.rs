//! A full segment of committed WAL that was checked before anything rests on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgstrata_ids::{Lsn, TimelineParameters};
use pgstrata_pg_wal::{PgVersion, WalChecker};

use crate::chain_reader::{ChainReader, ReadError};

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
    /// How many of its first bytes are the ancestor's, and not on this safekeeper: zeros.
    pub missing: usize,
    /// End of the last record that is whole in it, or before it.
    pub boundary: Lsn,
    /// Where that record starts, if that is known.
    pub last_record: Option<Lsn>,
}

/// Why a segment can't be archived now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Trouble {
    /// For people.
    pub text: String,
    /// What is committed can't be read here, or is not what it was: no later attempt mends that.
    pub is_damage: bool,
}

impl From<String> for Trouble {
    fn from(text: String) -> Trouble {
        Trouble { text, is_damage: false }
    }
}

impl From<ReadError> for Trouble {
    fn from(error: ReadError) -> Trouble {
        let is_damage = matches!(error, ReadError::Storage(_));
        Trouble { text: error.to_string(), is_damage }
    }
}

/// What a look at one segment leaves for the next one's.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    /// Where the last segment was left: a record may go on in the next one.
    checker: Option<WalChecker>,
    /// Checksums of later segments, by their numbers: such as are the inside of a record that was
    /// read to its end already. 4 bytes a segment, for 1 GB of record at most.
    inside: BTreeMap<u64, u32>,
}

/// A checker for this timeline's WAL from `start` on.
pub fn checker(parameters: &TimelineParameters, start: Lsn) -> WalChecker {
    WalChecker::new(start, u64::from(parameters.segment_size))
        .with_system_identifier(parameters.system_id.0)
        .with_timeline(parameters.pg_timeline)
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
    /// end. `reached` is what the look at the segment before it left, if that was just now, and
    /// then what this one leaves.
    pub async fn read(
        reader: &mut ChainReader,
        parameters: &TimelineParameters,
        number: u64,
        commit_lsn: Lsn,
        reached: &mut Reached,
    ) -> Result<CheckedSegment, Trouble> {
        let size = u64::from(parameters.segment_size);
        let from = Lsn(number * size);
        let mut bytes = vec![0; size as usize];
        let missing = fill_segment(reader, parameters, from, &mut bytes).await?;
        let before = std::mem::take(reached);
        let mut segment =
            Segment { reader, parameters, from, bytes: &bytes, commit_lsn, before, reached };
        let mut end = from + size;
        // From the last timeline that wrote in it to the first.
        loop {
            let start = segment.reader.start_of(Lsn(end.0 - 1)).await?;
            segment.check(start, end).await?;
            if start <= from + missing as u64 {
                break;
            }
            end = start;
        }
        // The first that was checked has left it, where the segment ends.
        let last = reached.checker.as_ref();
        let boundary = last.map_or(from, WalChecker::position);
        let last_record = last.and_then(WalChecker::last_record);
        Ok(CheckedSegment { number, bytes: Arc::new(bytes), missing, boundary, last_record })
    }

    /// Whether an archived object's bytes are this segment's. What is not here of a branch's first
    /// segment must be WAL in them that goes on to the branch's start.
    pub fn is_held_by(&self, found: &[u8], parameters: &TimelineParameters) -> bool {
        if found.len() != self.bytes.len() || found[self.missing..] != self.bytes[self.missing..] {
            return false;
        }
        let from = Lsn(self.number * u64::from(parameters.segment_size));
        let mut checker = checker(parameters, from);
        let checked = checker.check(&found[..self.missing]).is_ok();
        checked && checker.position() == from + self.missing as u64
    }
}

/// Reads a segment; returns how much of its begin is of an ancestor that is not here.
async fn fill_segment(
    reader: &mut ChainReader,
    parameters: &TimelineParameters,
    from: Lsn,
    bytes: &mut [u8],
) -> Result<usize, Trouble> {
    let ancestors = parameters.start_lsn.saturating_sub(from) as usize;
    fill(reader, from + ancestors as u64, &mut bytes[ancestors..]).await?;
    match fill(reader, from, &mut bytes[..ancestors]).await {
        Ok(()) => Ok(0),
        Err(ReadError::Missing(_)) => {
            bytes[..ancestors].fill(0);
            Ok(ancestors)
        }
        Err(error) => Err(error.into()),
    }
}

async fn fill(reader: &mut ChainReader, from: Lsn, buffer: &mut [u8]) -> Result<(), ReadError> {
    let mut done = 0;
    while done < buffer.len() {
        done += reader.read(from + done as u64, &mut buffer[done..]).await?;
    }
    Ok(())
}

struct Segment<'a> {
    reader: &'a mut ChainReader,
    parameters: &'a TimelineParameters,
    from: Lsn,
    bytes: &'a [u8],
    commit_lsn: Lsn,
    before: Reached,
    reached: &'a mut Reached,
}

impl Segment<'_> {
    /// Checks the part that one timeline wrote: from its `start`, or the segment's, to `end`.
    async fn check(&mut self, start: Lsn, end: Lsn) -> Result<(), Trouble> {
        let from = self.from.max(start);
        let mut checker = self.checker_at(start, from).await?;
        let range = (from - self.from) as usize..(end - self.from) as usize;
        check(&mut checker, &self.bytes[range])?;
        if end == self.from + self.bytes.len() as u64 {
            self.reached.checker = Some(checker.clone());
            return self.check_rest(checker, end).await;
        }
        match checker.position() == end {
            true => Ok(()),
            false => Err(format!("a branch starts at {end}, which is inside a record").into()),
        }
    }

    /// Checks a record that goes on in later segments, to its end. It is read once, however many
    /// segments it fills: of each of them the checksum is kept.
    async fn check_rest(&mut self, mut checker: WalChecker, end: Lsn) -> Result<(), Trouble> {
        let size = self.bytes.len() as u64;
        let number = self.from.segment_number(size);
        if self.before.inside.get(&number) == Some(&crc32c::crc32c(self.bytes)) {
            self.reached.inside = self.before.inside.split_off(&(number + 1));
            return Ok(());
        }
        let mut sum = 0;
        let mut buffer = vec![0; READ_CHUNK];
        while checker.position() < end {
            let at = checker.feed_position();
            let to_boundary = size - at.segment_offset(size);
            let left = self.commit_lsn.saturating_sub(at);
            let count = to_boundary.min(left).min(READ_CHUNK as u64) as usize;
            if count == 0 {
                return Err(format!("the record at the end of {end} is not committed").into());
            }
            self.read(at, &mut buffer[..count]).await?;
            check(&mut checker, &buffer[..count])?;
            sum = crc32c::crc32c_append(sum, &buffer[..count]);
            // Where the record has ended, another may go on beyond the boundary.
            if count as u64 == to_boundary && checker.position() < end {
                self.reached.inside.insert(at.segment_number(size), std::mem::take(&mut sum));
            }
        }
        Ok(())
    }

    /// A checker that is at `from` and knows of the record, if any, that goes on there.
    async fn checker_at(&mut self, start: Lsn, from: Lsn) -> Result<WalChecker, Trouble> {
        if let Some(checker) = self.before.checker.take_if(|before| before.feed_position() == from)
        {
            return Ok(checker);
        }
        let mut begin = from;
        let mut back = self.bytes.len() as u64;
        loop {
            let mut checker = checker(self.parameters, begin);
            if begin == start {
                checker = checker.at_boundary();
            }
            let mut buffer = vec![0; READ_CHUNK];
            while checker.feed_position() < from {
                let at = checker.feed_position();
                let count = READ_CHUNK.min((from - at) as usize);
                self.read(at, &mut buffer[..count]).await?;
                check(&mut checker, &buffer[..count])?;
            }
            if begin == start || (begin < from && checker.is_synced()) {
                return Ok(checker);
            }
            // Twice as far each time: a long record's segments are not read again and again.
            begin = Lsn(from.0.saturating_sub(back)).max(start);
            back *= 2;
        }
    }

    async fn read(&mut self, at: Lsn, buffer: &mut [u8]) -> Result<(), Trouble> {
        Ok(fill(self.reader, at, buffer).await?)
    }
}

fn check(checker: &mut WalChecker, bytes: &[u8]) -> Result<(), Trouble> {
    checker.check(bytes).map_err(|error| Trouble {
        text: format!("committed WAL is damaged here: {error}"),
        is_damage: true,
    })
}
