//! Winning a term and leading it, as cores: each looks at the driver after a turn of it and says how long the next may wait. They know
//! no sockets, threads or clocks; the loop with those is [`leader`](super::leader).

mod campaign;
mod following;
mod question;
mod recording;
#[cfg(test)]
mod tests;

use std::time::Duration;

use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};

pub use campaign::Campaign;
pub use following::Following;
pub use question::Question;
pub use recording::Recording;

/// Longest wait of one turn while something is waited for.
const TURN: Duration = Duration::from_millis(50);

/// The same where nobody wakes the loop.
pub(super) const SHORT_TURN: Duration = Duration::from_millis(1);

/// A term that was won.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elected {
    /// The term.
    pub term: Term,
    /// Where this term's first record goes: a record boundary, the end of the donor's log.
    pub start_lsn: Lsn,
    /// Start of the last record before `start_lsn`, for its `xl_prev`; `None` if this timeline
    /// has no record yet.
    pub prev_record_lsn: Option<Lsn>,
    /// What was known to be committed by the voters. Everything up to `start_lsn` is once the
    /// first record of this term is.
    pub commit_lsn: Lsn,
    /// The safekeeper whose log is continued.
    pub donor: NodeId,
}

impl Elected {
    /// Whether there is a record before the first of this term, in this timeline: where it starts is to be asked for.
    pub fn has_record_before(&self, parameters: &TimelineParameters) -> bool {
        self.start_lsn > parameters.start_lsn
    }
}
