//! Somebody who asks a safekeeper something on a connection of his own, and hears the answer at once: the shipped conversation
//! without a wire.

use std::sync::Arc;
use std::time::Instant;

use pgstrata_ids::{Lsn, Term};
use pgstrata_listen::Peer;
use pgstrata_safekeeper::pace::{CatchUpArguments, Pace};
use pgstrata_safekeeper::timelines::{TimelineKey, Timelines};
use pgstrata_safekeeper::wal::conversation::{Conversation, Step};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::{Stamp, split};
use pgstrata_wire::safekeeper::{Message, RefusedReason, Status, WAL, decode, encode};

/// Room for a message, in bytes: none of a run's is longer.
pub const BUFFER: usize = 256 << 10;

/// What each safekeeper takes of what others send, as far as it is bounded.
pub fn pace() -> Arc<Pace> {
    Arc::new(Pace::new(CatchUpArguments { catch_up_rate: 48 }))
}

/// A message as bytes, in the version that is spoken now.
pub fn bytes_of(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(message, Stamp::In(WAL.speaks.highest()), &mut bytes);
    bytes
}

/// See the module.
pub struct Visit {
    conversation: Conversation<Vec<u8>>,
    input: FrameBuffer,
}

impl std::fmt::Debug for Visit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Visit").finish_non_exhaustive()
    }
}

impl Visit {
    pub fn new(timelines: Arc<Timelines>) -> Visit {
        let conversation = Conversation::new(Vec::new(), Peer::Local, timelines, pace());
        Visit { conversation, input: FrameBuffer::new(4 << 10) }
    }

    /// Says one thing. What is answered, if it is no refusal.
    fn say<T>(
        &mut self,
        message: &Message<'_>,
        mut take: impl FnMut(Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, RefusedReason> {
        let bytes = bytes_of(message);
        let mut rest = &bytes[..];
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            let filled = self.input.fill(&mut rest);
            filled.map_err(|error| RefusedReason::Unavailable(error.to_string()))?;
            loop {
                match self.conversation.step(&mut self.input, Instant::now()) {
                    Ok(Step::NeedsMore) => break,
                    Ok(Step::GoesOn(_)) => {}
                    Err(error) => {
                        result = Err(RefusedReason::Unavailable(error.to_string()));
                        break;
                    }
                }
            }
        }
        let output = std::mem::take(self.conversation.out());
        let mut answers = Vec::new();
        let mut at = 0;
        while let Ok(Some(frame)) = split(&output[at..]) {
            match decode(frame.kind, frame.body) {
                Ok(Message::Refused(reason)) => return Err(reason),
                Ok(message) => answers.extend(take(message)),
                Err(error) => return Err(RefusedReason::InvalidWal(error.to_string())),
            }
            at += frame.size;
        }
        result.map(|()| answers)
    }

    fn status(&mut self, message: &Message<'_>) -> Result<Status, RefusedReason> {
        let mut answers = self.say(message, |answer| match answer {
            Message::Status(status) => Some(status),
            _ => None,
        })?;
        answers.pop().ok_or_else(|| RefusedReason::Unavailable("no answer".into()))
    }

    /// What it says of its timeline.
    pub fn open(&mut self, key: TimelineKey) -> Result<Status, RefusedReason> {
        self.status(&Message::Open(key.0, key.1))
    }

    /// The same, where a configuration of this number was decided.
    pub fn learn(&mut self, key: TimelineKey, number: u64) -> Result<Status, RefusedReason> {
        self.status(&Message::Learn(key.0, key.1, number))
    }

    /// WAL of the timeline that was opened, as far as it is there.
    pub fn read(&mut self, from: Lsn, to: Lsn, term: Term) -> Result<Vec<u8>, RefusedReason> {
        let chunks = self.say(&Message::ReadWal(from, to, term), |answer| match answer {
            Message::WalChunk(_, bytes) => Some(bytes.to_vec()),
            _ => None,
        })?;
        Ok(chunks.concat())
    }

    /// Where the last record before a boundary begins; 0 if there is none.
    pub fn last_record(&mut self, end: Lsn) -> Result<Lsn, RefusedReason> {
        let mut answers = self.say(&Message::LastRecord(end), |answer| match answer {
            Message::LastRecordReply(lsn) => Some(lsn),
            _ => None,
        })?;
        answers.pop().ok_or_else(|| RefusedReason::Unavailable("no answer".into()))
    }
}
