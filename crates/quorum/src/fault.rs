//! Mistakes to seed, so that the explorer can show that it would find them.

/// One deliberate mistake in an acceptor or proposer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The vote is answered without being made durable.
    VoteNotPersisted,
    /// A second proposer gets a vote in a term that was given away.
    VoteTwice,
    /// The vote leaves out bytes that are written but not durable, and keeps them.
    VoteKeepsUnsynced,
    /// The acknowledgement leaves before the sync.
    AckBeforeSync,
    /// Bytes of an older term are counted as committed before one of the current term is.
    CommitOlderTerm,
    /// A quorum is one less than a majority.
    SmallQuorum,
    /// The donor is the longest log, whatever its last term.
    DonorByLength,
    /// The log is cut at the start of the new term, not where the histories part.
    WrongDivergence,
    /// A new election cuts off everything of the last term, committed or not.
    TruncateBelowCommit,
    /// The new history is durable before the old bytes are gone.
    HistoryBeforeTruncate,
    /// The new history isn't made durable at all.
    HistoryNotPersisted,
    /// Appends of a deposed proposer are taken.
    AppendOldTerm,
    /// The end of the log is reported in the middle of a record.
    FlushInsideRecord,
    /// The proposer's commit LSN is believed beyond the own log.
    CommitBeyondLog,
    /// Bytes beyond the commit LSN are copied from a peer.
    PeerBeyondCommit,
    /// What the term that is followed began with is taken from a log that is another one there.
    AnyLogShared,
    /// Commitment is proven from bytes that a later proposer sent along.
    ProofIgnoresAdoption,
    /// Votes are given to who counts members that were replaced.
    StaleConfigurationTaken,
    /// The next configuration is taken from whoever asks for the vote, though nobody decided on it.
    MessengerBelieved,
    /// A safekeeper that lost its directory comes back as who it was.
    WipedComesBack,
    /// The configuration that was decided is forgotten in a crash.
    ConfigurationNotPersisted,
    /// While a change is under way, the members after it are enough.
    JointIsNew,
    /// While a change is under way, the members before it are enough.
    JointIsOld,
    /// The members after a change are enough before a record was committed by both groups.
    NewTooEarly,
    /// A change is undone after it has ended.
    UndoneTooLate,
    /// What a proposer of the old group committed counts as committed by both.
    OldTermIsJoint,
    /// A vote leaves out a term that has written nothing, although that was followed up to its start.
    EmptyTermForgotten,
}
