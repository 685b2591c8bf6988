//! WAL that is checked before it is handed out.
//!
//! Owns what has been read and not been handed out yet, and says what to read next; reading is the caller's, from wherever the
//! bytes are. What is handed out lies before the end of a record that is whole and right: of a record that is longer than what is held
//! in memory, all is read once before its first byte is handed out, and then again.

use pgstrata_ids::{Lsn, PAGE_SIZE, TimelineParameters};
use pgstrata_pg_wal::{WalChecker, WalError};

use crate::checked_segment::checker;

/// Most that is read at once, in bytes.
pub const READ_CHUNK: usize = 128 << 10;

/// Of a record that is not whole yet, so much is held in memory, in bytes.
const MAX_HELD: usize = 512 << 10;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// [`Verifier::take`]: there are bytes.
    Take,
    /// Read so many bytes from there, at most, and [`Verifier::give`] them.
    Read {
        /// Where.
        at: Lsn,
        /// How many, in bytes; not 0.
        count: usize,
    },
    /// The record there is not whole by the end that was named.
    Unfinished,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Verifier {
    parameters: TimelineParameters,
    /// First byte that can be read.
    floor: Lsn,
    /// Whether a record starts there.
    floor_is_boundary: bool,
    /// First byte that is to be handed out. What is before it tells which record it belongs to.
    from: Lsn,
    /// How far before it reading begins, in bytes.
    back: u64,
    /// Has seen everything that is held.
    checker: WalChecker,
    /// Goes on where the record is longer than what is held.
    ahead: Option<WalChecker>,
    /// Everything before it was seen, and is right.
    released: Lsn,
    at: Lsn,
    held: Vec<u8>,
    taken: usize,
}

impl Verifier {
    /// Of `[from, ...)`, where `floor` is the first byte that can be read, and `floor_is_boundary` if it is known that a record
    /// starts there. What is left, at the floor, of a record that begins before it can't be checked, and is handed out.
    pub fn new(
        parameters: &TimelineParameters,
        floor: Lsn,
        floor_is_boundary: bool,
        from: Lsn,
    ) -> Verifier {
        let mut verifier = Verifier {
            parameters: parameters.clone(),
            floor,
            floor_is_boundary,
            from,
            back: PAGE_SIZE as u64,
            checker: checker(parameters, floor),
            ahead: None,
            released: from,
            at: from,
            held: Vec::new(),
            taken: 0,
        };
        verifier.begin();
        verifier
    }

    /// Begins so far back that a record's start may be before what is wanted.
    fn begin(&mut self) {
        let page = PAGE_SIZE as u64;
        let begin = Lsn(self.from.0.saturating_sub(self.back) / page * page);
        let at_floor = begin <= self.floor;
        let checker = checker(&self.parameters, begin.max(self.floor));
        self.checker = match at_floor && self.floor_is_boundary {
            true => checker.at_boundary(),
            false => checker,
        };
        if at_floor {
            self.back = u64::MAX;
        }
    }

    /// The next byte that is handed out.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// Everything before it was found to be right.
    pub fn right_until(&self) -> Lsn {
        self.checker.position()
    }

    fn safe_until(&self) -> Lsn {
        match self.checker.is_synced() {
            true => self.released.max(self.checker.position()),
            false => self.checker.feed_position(),
        }
    }

    fn held(&self) -> &[u8] {
        &self.held[self.taken..]
    }

    /// What is to be done, where WAL up to `end` can be read, at which a record ends.
    pub fn next(&self, end: Lsn) -> Next {
        let fed = self.checker.feed_position();
        let read = |at: Lsn, until: Lsn| match until.saturating_sub(at) {
            0 => Next::Unfinished,
            left => Next::Read { at, count: left.min(READ_CHUNK as u64) as usize },
        };
        if fed < self.from {
            return read(fed, self.from.min(end));
        }
        if !self.held().is_empty() && self.safe_until() > self.at {
            return Next::Take;
        }
        match &self.ahead {
            Some(ahead) => read(ahead.feed_position(), end),
            None => read(fed, end),
        }
    }

    /// Takes what was read. After an error it is of no further use.
    pub fn give(&mut self, bytes: &[u8]) -> Result<(), WalError> {
        if self.checker.feed_position() < self.from {
            let checked = self.checker.check(bytes);
            let is_there = self.checker.feed_position() >= self.from;
            // It may have begun among the zeros that follow a switch of segments.
            let is_too_late = checked.is_err() || (is_there && !self.checker.is_synced());
            if is_too_late && self.back != u64::MAX {
                self.back = self.back.saturating_mul(2);
                self.begin();
                return Ok(());
            }
            return checked;
        }
        if let Some(ahead) = &mut self.ahead {
            ahead.check(bytes)?;
            if ahead.position() > self.at {
                self.released = ahead.position();
                self.ahead = None;
            }
            return Ok(());
        }
        self.checker.check(bytes)?;
        if self.taken > 0 {
            self.held.drain(..self.taken);
            self.taken = 0;
        }
        self.held.extend_from_slice(bytes);
        if self.safe_until() <= self.at && self.held.len() >= MAX_HELD {
            self.ahead = Some(self.checker.clone());
        }
        Ok(())
    }

    /// Hands out what was checked, up to `to`; returns the number of bytes.
    pub fn take(&mut self, buffer: &mut [u8], to: Lsn) -> usize {
        let safe = self.safe_until().min(to).saturating_sub(self.at);
        let count = buffer.len().min(self.held().len()).min(safe as usize);
        buffer[..count].copy_from_slice(&self.held()[..count]);
        self.taken += count;
        self.at = self.at + count as u64;
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgstrata_sim::wal::{SEGMENT_SIZE, WalGenerator, parameters};

    const START: Lsn = Lsn(SEGMENT_SIZE);

    /// Some short records, a long one, and some more.
    fn log() -> (Vec<u8>, Vec<Lsn>) {
        let mut generator = WalGenerator::new(parameters(START), START, Lsn(8));
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for size in [0, 10, 1000, 9000, 30_000, 100, 2 << 20, 50, 8000, 1] {
            bytes.extend(generator.record(size));
            ends.push(generator.at);
        }
        bytes.extend(generator.switch());
        ends.push(generator.at);
        bytes.extend(generator.record(100));
        ends.push(generator.at);
        (bytes, ends)
    }

    /// What is handed out of `[from, to)`, and whether that is all.
    fn read(bytes: &[u8], floor: Lsn, from: Lsn, to: Lsn) -> (Vec<u8>, bool) {
        let end = START + bytes.len() as u64;
        let mut verifier = Verifier::new(&parameters(START), floor, floor == START, from);
        let (mut out, mut buffer) = (Vec::new(), vec![0; 10_000]);
        while verifier.at() < to {
            match verifier.next(end) {
                Next::Take => {
                    let count = verifier.take(&mut buffer, to);
                    assert!(count > 0);
                    out.extend_from_slice(&buffer[..count]);
                }
                Next::Read { at, count } => {
                    assert!(at >= floor && count > 0);
                    let place = (at - START) as usize;
                    if verifier.give(&bytes[place..place + count]).is_err() {
                        return (out, false);
                    }
                }
                Next::Unfinished => return (out, false),
            }
        }
        (out, true)
    }

    #[test]
    fn what_is_right_is_handed_out_from_anywhere_to_anywhere() {
        let (bytes, ends) = log();
        let end = *ends.last().unwrap();
        let places = (0..bytes.len() as u64).step_by(44_100 - 1).map(|offset| START + offset);
        for from in places.chain(ends.iter().copied()) {
            for to in [from, from + 1, from + 70_000, end] {
                let to = to.min(end);
                let range = (from - START) as usize..(to - START) as usize;
                assert_eq!(read(&bytes, START, from, to), (bytes[range].to_vec(), true), "{from}");
            }
        }
    }

    #[test]
    fn nothing_of_a_record_that_is_wrong_is_handed_out() {
        let (bytes, ends) = log();
        let starts = std::iter::once(START).chain(ends.iter().copied());
        for (start, end) in starts.zip(ends.iter().copied()) {
            let mut bytes = bytes.clone();
            // Its last byte that says something.
            let place = (start - START) as usize..(end - START) as usize;
            let last = bytes[place].iter().rposition(|&byte| byte != 0).unwrap() as u64;
            bytes[((start - START) + last) as usize] ^= 1;
            for from in [START, start, start + ((end - start) / 2)] {
                let (out, whole) = read(&bytes, START, from, *ends.last().unwrap());
                assert!(
                    !whole && from + out.len() as u64 <= start.max(from),
                    "{start} from {from}"
                );
            }
        }
    }

    #[test]
    fn what_is_left_of_a_record_at_the_floor_is_handed_out() {
        let (bytes, ends) = log();
        // In the middle of the long record.
        let floor = Lsn(2 * SEGMENT_SIZE);
        let end = *ends.last().unwrap();
        let (out, whole) = read(&bytes, floor, floor, end);
        assert!(whole && out == bytes[(floor - START) as usize..]);
    }

    /// WAL from the segment after `START`'s on, which begins with the last `rest` bytes of a record that is a header alone: a
    /// switch, or one that others follow. Where it ends, and where the last record in it starts.
    fn log_after_rest(is_switch: bool, rest: u64) -> (Vec<u8>, Lsn, Lsn) {
        let at = Lsn(START.0 + SEGMENT_SIZE - (24 - rest));
        let mut generator = WalGenerator::new(parameters(START), at, Lsn(START.0 + 40));
        let mut bytes = match is_switch {
            true => generator.switch(),
            false => generator.record(0),
        };
        if !is_switch {
            bytes.extend(generator.record(500));
            bytes.extend(generator.record(700));
            bytes.extend(generator.switch());
        }
        bytes.extend(generator.record(100));
        let last = generator.at;
        bytes.extend(generator.record(10));
        (bytes[(24 - rest) as usize..].to_vec(), generator.at, last)
    }

    #[test]
    fn a_log_may_begin_with_the_rest_of_a_switch() {
        let begin = START + SEGMENT_SIZE;
        for rest in [8, 16] {
            for is_switch in [true, false] {
                let (bytes, end, last) = log_after_rest(is_switch, rest);
                for piece in [1, 7, 8, 4096, 100_000, bytes.len()] {
                    let mut checker = checker(&parameters(START), begin);
                    for bytes in bytes.chunks(piece) {
                        checker.check(bytes).unwrap();
                    }
                    assert_eq!((checker.position(), checker.last_record()), (end, Some(last)));
                }
            }
            // Where there were records, and are zeros, the next one says so.
            let (mut bytes, _, _) = log_after_rest(false, rest);
            let after_rest = 40 + rest as usize;
            bytes[after_rest..SEGMENT_SIZE as usize].fill(0);
            let error = checker(&parameters(START), begin).check(&bytes).unwrap_err();
            assert_eq!(error.lsn, begin + SEGMENT_SIZE + 40, "{error}");
            // A longer rest is no switch's.
            let mut generator =
                WalGenerator::new(parameters(START), Lsn(begin.0 - 24), Lsn(START.0 + 40));
            let mut bytes = generator.record(30);
            bytes.resize(SEGMENT_SIZE as usize, 0);
            assert!(checker(&parameters(START), begin).check(&bytes[24..]).is_err());
        }
    }
}
