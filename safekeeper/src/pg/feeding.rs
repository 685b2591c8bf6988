//! What a client of the stream is sent next, and how long it is waited for, without the connection and the WAL.
//!
//! Owns how far the stream is, and when either side was heard last. Knows no clock: it is told the time.

use std::time::{Duration, Instant};

use pgstrata_ids::Lsn;
use pgstrata_wire::postgres::{BackendWriter, Frontend, StandbyStatus};

/// Most WAL in one message, in bytes (`MAX_SEND_SIZE` of walsender.c).
pub const MAX_SEND: usize = 128 << 10;

/// Silence after which a keepalive is sent.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);

/// Silence of the client after which it is given up, once it was asked for half as long to say something.
const DEAD_AFTER: Duration = Duration::from_secs(60);

/// Whether a timeline's WAL is to be handed out here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is.
    Kept,
    /// Others keep it by now.
    Left,
    /// What is here is damaged, and another copy takes its place.
    Retired,
}

/// Why a client is sent nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedingError {
    /// See [`Standing::Left`].
    #[error("other safekeepers keep this timeline by now")]
    Left,
    /// See [`Standing::Retired`].
    #[error("this safekeeper's WAL of the timeline is damaged and is being mended")]
    Retired,
    /// It was silent for too long.
    #[error("the client said nothing for {} s", .0.as_secs())]
    Silent(Duration),
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// To read committed WAL, and to send it: [`Feeding::wal`].
    Wal {
        /// From here.
        at: Lsn,
        /// It is committed up to here.
        end: Lsn,
        /// Most bytes of it; not 0.
        most: usize,
    },
    /// To send a [`Feeding::keepalive`], which the client is to answer, or not.
    Keepalive(bool),
    /// To wait for a message, for more to be committed, and for the timeline's end, until then.
    Wait(Instant),
    /// Nothing: the client wants no more.
    Done,
    /// Nothing, for this reason.
    Ended(FeedingError),
}

/// See the module.
#[derive(Debug)]
pub struct Feeding {
    at: Lsn,
    /// When something was sent last, or it began.
    sent: Instant,
    /// When the client said something last, or it began.
    heard: Instant,
    /// The client wants to hear something.
    is_asked: bool,
    /// When it was asked to say something, if it has not said anything since.
    asked: Option<Instant>,
    is_done: bool,
}

impl Feeding {
    /// From this position on.
    pub fn new(start: Lsn, now: Instant) -> Feeding {
        Feeding { at: start, sent: now, heard: now, is_asked: false, asked: None, is_done: false }
    }

    /// The next byte that is sent.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// Whether the client wants no more.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// What to do, where WAL is committed up to `commit_lsn`.
    pub fn next(&mut self, now: Instant, commit_lsn: Lsn, standing: Standing) -> Next {
        if self.is_done {
            return Next::Done;
        }
        match standing {
            Standing::Kept => {}
            Standing::Left => return Next::Ended(FeedingError::Left),
            Standing::Retired => return Next::Ended(FeedingError::Retired),
        }
        let silent = now.saturating_duration_since(self.heard);
        // Also while WAL is sent: one that says something only when it is asked is not to seem silent after that.
        let is_to_be_asked = silent > DEAD_AFTER / 2 && self.asked.is_none();
        if self.is_asked || is_to_be_asked {
            return self.keep_alive(now, is_to_be_asked);
        }
        let left = commit_lsn.saturating_sub(self.at);
        if left > 0 {
            let most = left.min(MAX_SEND as u64) as usize;
            return Next::Wal { at: self.at, end: commit_lsn, most };
        }
        let due = self.sent + KEEPALIVE_AFTER;
        if now < due {
            return Next::Wait(due);
        }
        let asked = self.asked.map(|asked| now.saturating_duration_since(asked));
        let is_dead = silent > DEAD_AFTER && asked.is_some_and(|asked| asked >= DEAD_AFTER / 2);
        match is_dead {
            true => Next::Ended(FeedingError::Silent(silent)),
            false => self.keep_alive(now, self.asked.is_some()),
        }
    }

    fn keep_alive(&mut self, now: Instant, is_question: bool) -> Next {
        if is_question {
            self.asked.get_or_insert(now);
        }
        Next::Keepalive(is_question)
    }

    /// Puts WAL into `out`, from the position on, of what is committed up to `end`; the time is in microseconds since
    /// 2000-01-01. Once it has left, [`Feeding::sent`].
    pub fn wal(&mut self, wal: &[u8], end: Lsn, time_us: i64, out: &mut BackendWriter) {
        let filled: Result<(), std::convert::Infallible> =
            out.xlog_data(self.at, end, time_us, |out| {
                out.extend_from_slice(wal);
                Ok(())
            });
        // Infallible: the bytes were read before.
        let Ok(()) = filled;
        self.at = self.at + wal.len() as u64;
    }

    /// Puts a keepalive into `out`. Once it has left, [`Feeding::sent`].
    pub fn keepalive(&mut self, is_question: bool, time_us: i64, out: &mut BackendWriter) {
        out.keepalive(self.at, time_us, is_question);
        self.is_asked = false;
    }

    /// What was put out has left.
    pub fn sent(&mut self, now: Instant) {
        self.sent = now;
    }

    /// The client said something: how far it is, if that was it.
    pub fn take(&mut self, message: &Frontend, now: Instant) -> Option<StandbyStatus> {
        (self.heard, self.asked) = (now, None);
        match message {
            Frontend::Status(status) => {
                self.is_asked |= status.reply_requested;
                Some(*status)
            }
            Frontend::CopyDone | Frontend::CopyFail => {
                self.is_done = true;
                None
            }
            _ => None,
        }
    }
}
