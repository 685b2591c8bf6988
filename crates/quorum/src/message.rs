//! What proposers and acceptors say to each other. Bytes travel beside [`Append`], not in it.

use pgstrata_ids::{Lsn, Term};

use crate::{Configuration, TermHistory};

/// One run of one compute: tells two proposers that ask for the same term apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposerId(pub [u8; 16]);

/// "May I write in this term?"
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VoteRequest {
    /// The term asked for.
    pub term: Term,
    /// Who asks.
    pub proposer: ProposerId,
    /// The members whose votes are counted.
    pub configuration: Configuration,
}

/// The answer to a [`VoteRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vote {
    /// The term that was asked for.
    pub asked: Term,
    /// True if the vote was given; it is durable then.
    pub granted: bool,
    /// The highest term that this acceptor promised.
    pub term: Term,
    /// End of its durable log: a record boundary.
    pub flush_lsn: Lsn,
    /// What it knows to be committed, at most `flush_lsn`.
    pub commit_lsn: Lsn,
    /// Which term wrote which byte of that log.
    pub history: TermHistory,
}

/// "I won this term, and this is what the log looks like."
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Elected {
    /// The term won.
    pub term: Term,
    /// The proposer's log; its last entry is `term`.
    pub history: TermHistory,
}

/// Bytes to append; they follow the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Append {
    /// The proposer's term.
    pub term: Term,
    /// Position of the first byte.
    pub start: Lsn,
    /// Number of bytes; 0 only tells the commit LSN.
    pub length: u64,
    /// The last record boundary at or before `start + length`. It is `start + length` itself
    /// unless a record is longer than one message.
    pub record_end: Lsn,
    /// What the proposer knows to be committed.
    pub commit_lsn: Lsn,
}

/// "I have this much of your log, durably."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ack {
    /// The term whose log it is.
    pub term: Term,
    /// End of the durable log: a record boundary.
    pub flush_lsn: Lsn,
    /// What this acceptor knows to be committed.
    pub commit_lsn: Lsn,
}

/// Committed bytes read from another acceptor; they follow the message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerRange {
    /// The other's history.
    pub history: TermHistory,
    /// A committed record boundary of the other's log.
    pub commit_lsn: Lsn,
    /// Position of the first byte.
    pub start: Lsn,
    /// Number of bytes; they end at or before `commit_lsn`.
    pub length: u64,
}

/// Why an acceptor does nothing with a message.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// A newer proposer has been promised; the sender is fenced.
    #[error("term {promised} has been promised to another proposer")]
    Fenced {
        /// The promised term.
        promised: Term,
    },
    /// The sender counts votes by members that are no longer current.
    #[error("membership configuration {current} has replaced the one used here")]
    StaleConfiguration {
        /// Number of the current configuration.
        current: u64,
    },
    /// The sender counts votes by other members under the same number: one of the two sets is
    /// made up, and two sets could each have a majority of their own.
    #[error(
        "membership configuration {number} has other members here than those used by the sender: \
         start computes with all members of the branch"
    )]
    OtherMembers {
        /// The number that both have.
        number: u64,
    },
    /// Nobody decided on the configuration that the sender counts votes by, as far as is known here.
    #[error(
        "membership configuration {number} was not decided by anybody; the newest is {current}"
    )]
    Undecided {
        /// Its number.
        number: u64,
        /// Number of the newest.
        current: u64,
    },
    /// The term asked for is further away than elections lead. Only part of the way was promised,
    /// so that honest members who lag behind a mistake get there by asking again.
    #[error(
        "term {asked} is absurdly far above what was promised; {promised} is promised now, ask \
         again if it is meant"
    )]
    TermTooFar {
        /// The term that was asked for.
        asked: Term,
        /// The promised term.
        promised: Term,
    },
    /// This node, in this life of its directory, is no member of the timeline's configuration.
    #[error(
        "this safekeeper, with the directory that it has, is no member of the timeline's configuration"
    )]
    NotMember,
    /// Following the sender would drop committed bytes: two histories that can't both be true.
    #[error("the logs part at {divergence}, before {commit_lsn}, which is committed here")]
    CommittedDiffers {
        /// Where the logs part.
        divergence: Lsn,
        /// What is committed here.
        commit_lsn: Lsn,
    },
    /// The message contradicts itself.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
}
