//! Reading a timeline's own log from the disk, and checking it.

use std::time::Duration;

use pgstrata_ids::Lsn;

use crate::storage_error::StorageError;
use crate::timeline::{Suspicion, Timeline};
use crate::verifier::{Next, READ_CHUNK};

/// Bytes handed out at once, and forgotten.
const CHUNK: usize = READ_CHUNK;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Everything is right up to here.
    Right(Lsn),
    /// It is damaged.
    Damaged(Suspicion),
}

/// Checks `[from, to)` of what comes before `end`, a record's, as the disk has it, and the record that goes on after it. Segments in which nothing is
/// written any more are read from the disk and not from the cache. After each piece `pause` is told how many bytes were
/// read, and says how long to wait, or `None` to end here.
pub fn check(
    timeline: &Timeline,
    from: Lsn,
    to: Lsn,
    end: Lsn,
    mut pause: impl FnMut(usize) -> Option<Duration>,
) -> Found {
    let size = timeline.files().segment_size();
    let to = to.min(end);
    let from = from.max(timeline.marks().available_lsn).max(timeline.parameters().start_lsn);
    let mut reader = timeline.reader();
    let mut verifier = timeline.verifier(from);
    let mut scratch = vec![0; CHUNK];
    let mut buffer = vec![0; READ_CHUNK];
    let mut evicted = None;
    let damaged = |at: Lsn, why: String| Found::Damaged(Suspicion { at, why });
    while verifier.at() < to {
        let (at, count) = match verifier.next(end) {
            Next::Take => {
                verifier.take(&mut scratch, to);
                continue;
            }
            Next::Read { at, count } => (at, count),
            Next::Unfinished => {
                return damaged(verifier.right_until(), format!("no record ends at {end}"));
            }
        };
        let number = at.segment_number(size);
        if evicted != Some(number) && number < end.segment_number(size) {
            evicted = Some(number);
            if let Ok(Some(file)) = timeline.files().open(number)
                && let Err(error) = file.evict()
            {
                tracing::debug!(%error, "a segment is read from the cache");
            }
        }
        let read = reader.read(at, &mut buffer[..count]);
        if timeline.is_retired() || at < timeline.marks().available_lsn {
            // Others look after it, or it was trimmed meanwhile.
            return Found::Right(verifier.at());
        }
        let count = match read {
            Ok(0) => {
                return damaged(verifier.right_until(), "its segment is missing or short".into());
            }
            Ok(count) => count,
            Err(error @ StorageError::Failed { action: "read", .. }) => {
                return damaged(verifier.right_until(), error.to_string());
            }
            Err(error) => {
                tracing::warn!(%error, "WAL can't be checked now");
                return Found::Right(verifier.at());
            }
        };
        if let Err(error) = verifier.give(&buffer[..count]) {
            return damaged(verifier.right_until(), error.to_string());
        }
        match pause(count) {
            Some(pause) if pause.is_zero() => {}
            Some(pause) => std::thread::sleep(pause),
            None => return Found::Right(verifier.at()),
        }
    }
    Found::Right(to)
}

/// Whether what somebody met who read is so, and not something that was cut meanwhile.
pub fn confirm(timeline: &Timeline, suspicion: &Suspicion) -> Option<Suspicion> {
    let size = timeline.files().segment_size();
    // What comes before it was right. One record of any length, and a segment more.
    let from = suspicion.at.segment_start(size);
    let to = from + 2 * size;
    let no_pause = |_: usize| Some(Duration::ZERO);
    let commit_lsn = timeline.commit_lsn();
    // What is not committed may be cut while it is read, which the history shows: it is looked at first, and last.
    let history = (suspicion.at >= commit_lsn).then(|| timeline.history());
    let end = match &history {
        Some(_) => timeline.flush_lsn(),
        None => commit_lsn,
    };
    match check(timeline, from, to, end, no_pause) {
        Found::Damaged(_) if history.is_some_and(|before| before != timeline.history()) => None,
        Found::Damaged(found) => Some(found),
        Found::Right(_) => None,
    }
}
