//! Messages of the safekeeper's WAL port: proposers, peers and readers of raw WAL.
//!
//! A connection starts with [`Message::Greeting`] (a proposer, answered by
//! [`Message::GreetingReply`]) or [`Message::Open`] (a reader, answered by [`Message::Status`]).
//! Any answer may be [`Message::Refused`] instead. Byte layouts: `docs/formats/safekeeper-wire.md`.
//!
//! What versions guarantee: in every version of [`WAL`]'s range a greeting, a vote, an election, an append and an
//! acknowledgement are the same values, with nothing left out, and promise the same. `proposers_messages` and
//! `safekeepers_messages` below hold all of them to that; what was recorded of each version holds their bytes.
//! `Greeting`, `Open` and `Refused` have one form in all versions from 3 on: they are read before one is agreed on. Those of
//! [`version2`] say at once that they are of it.

mod decode;
mod encode;
#[cfg(test)]
mod tests;
pub mod version2;

use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, TenantId, Term, TimelineId, TimelineParameters,
};
use pgstrata_quorum::{
    Ack, Append, Configuration, Elected, ProposerId, Refusal, TermHistory, Vote, VoteRequest,
};

use crate::frame::FrameError;
use crate::frame_buffer::FrameBuffer;
use crate::version::{Protocol, Range, Version, VersionError};

pub use decode::decode;
pub use encode::{AppendHead, encode};

/// The protocol. Version 1 was never released. In version 3 members have incarnations, and only configurations that were
/// decided are followed: a rule, so that nobody asks by the former rule any more, and only safekeepers answer to
/// it: [`SERVED`].
pub const WAL: Protocol = Protocol {
    name: "WAL protocol",
    server: "safekeeper",
    speaks: match Range::new(3, 3) {
        Some(range) => range,
        None => panic!("no range"),
    },
};

/// The same, as safekeepers speak it: also with computes of the release before, which follow the former rule, for as long as a
/// timeline's members are not decided on ([`version2`]).
pub const SERVED: Protocol = Protocol {
    speaks: match Range::new(2, 3) {
        Some(range) => range,
        None => panic!("no range"),
    },
    ..WAL
};

/// Most WAL bytes in one message.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Longest address of a member, in bytes.
pub const MAX_ADDRESS: usize = 255;

/// Longest text of a refusal, in bytes.
pub const MAX_REASON: usize = 1024;

/// A proposer introduces itself and the timeline. Answered by what the safekeeper knows of it, which may be nothing: this
/// creates no timeline, unless it was founded with the safekeeper as a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Number of the newest configuration that the proposer knows, 0 if it knows none: a safekeeper that knows only lower
    /// ones looks where they are decided before it answers.
    pub known: u64,
    /// Where members' WAL ports are, as far as known; hints for catching up from each other.
    pub addresses: Vec<(NodeId, String)>,
    /// Who speaks.
    pub proposer: ProposerId,
}

/// A safekeeper introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GreetingReply {
    /// Who answers.
    pub node: NodeId,
    /// Which life of its directory this is.
    pub incarnation: Incarnation,
    /// The newest configuration of the timeline that it knows, which need not name it. `None` if the timeline was not
    /// founded yet, and one that is not known if only its nodes are: see [`Message::Found`].
    pub configuration: Option<Configuration>,
    /// Where members' WAL ports are, as far as it knows.
    pub addresses: Vec<(NodeId, String)>,
    /// The highest term it promised on this timeline.
    pub term: Term,
    /// End of its durable log.
    pub flush_lsn: Lsn,
    /// What it knows to be committed.
    pub commit_lsn: Lsn,
}

/// Everything that one safekeeper knows of one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Who answers.
    pub member: Member,
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Its members.
    pub configuration: Configuration,
    /// The term that was promised when these were taken.
    pub configured_in: Term,
    /// Whether a proposer is connected that has greeted.
    pub has_proposer: bool,
    /// The highest term promised.
    pub term: Term,
    /// First byte still on disk, at least the timeline's start.
    pub available_lsn: Lsn,
    /// End of the durable log.
    pub flush_lsn: Lsn,
    /// What is known to be committed.
    pub commit_lsn: Lsn,
    /// Which term wrote which byte.
    pub history: TermHistory,
}

/// Why a request wasn't served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusedReason {
    /// By the rules of consensus.
    #[error("{0}")]
    Quorum(Refusal),
    /// The greeting contradicts what the timeline was created with.
    #[error("{0}")]
    Mismatch(String),
    /// This safekeeper doesn't have the timeline.
    #[error("this safekeeper doesn't have the timeline")]
    UnknownTimeline,
    /// WAL can't be stored (disk full, read-only); reading goes on.
    #[error("{0}")]
    Storage(String),
    /// The WAL asked for isn't here (yet, or any more).
    #[error("{0}")]
    Unavailable(String),
    /// Who asks may not do that.
    #[error("{0}")]
    Forbidden(String),
    /// There is no version of the protocol that both sides speak.
    #[error("{0}")]
    Version(String),
    /// The bytes are no WAL that continues the log; none of them was stored.
    #[error("{0}")]
    InvalidWal(String),
}

/// Why a server's first answer can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It is of a version that was not offered.
    #[error(transparent)]
    Version(#[from] VersionError),
}

/// Client: the version that the server chose, told once, when the first frame of its answer begins to come.
pub fn chosen(input: &mut FrameBuffer) -> Result<Option<Version>, AnswerError> {
    if input.agreed().is_some() {
        return Ok(None);
    }
    let Some(answer) = input.offer()? else { return Ok(None) };
    let version = WAL.answered(answer.lowest())?;
    input.agree(version);
    Ok(Some(version))
}

/// Any message of the port; WAL bytes are borrowed from the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Proposer: hello.
    Greeting(Greeting),
    /// Proposer: may I?
    VoteRequest(VoteRequest),
    /// Proposer: I won.
    Elected(Elected),
    /// Proposer: bytes; `length` equals the slice's.
    Append(Append, &'a [u8]),
    /// Proposer: are you there? Answered by an [`Ack`] once an election was announced.
    Ping,
    /// Proposer, after a greeting: let the timeline be founded with these nodes as its first members, each as it has
    /// registered, which must be as it answered a greeting, if it did. Answered like the greeting; if somebody else has
    /// founded it with others, then with those.
    Found(Vec<(NodeId, Option<Incarnation>)>),
    /// Reader: this timeline, please; never creates one.
    Open(TenantId, TimelineId),
    /// Reader: WAL from `.0` to at most `.1`, in chunks. Bytes that aren't known to be committed
    /// are given only to the proposer of term `.2`, while nobody newer can change them; others
    /// say term 0.
    ReadWal(Lsn, Lsn, Term),
    /// Reader: where does the last record before this boundary start?
    LastRecord(Lsn),
    /// Reader: a configuration of this number was decided; take part if it names you, or no more if it doesn't. Answered as
    /// `Open` is.
    Learn(TenantId, TimelineId, u64),
    /// Safekeeper: hello.
    GreetingReply(GreetingReply),
    /// Safekeeper: a vote, given or not.
    Vote(Vote),
    /// Safekeeper: this much is durable.
    Ack(Ack),
    /// Safekeeper: no.
    Refused(RefusedReason),
    /// Safekeeper: answer to `Open`; sent again for another `Open`.
    Status(Status),
    /// Safekeeper: one chunk of WAL from `.0`; an empty one ends the answer.
    WalChunk(Lsn, &'a [u8]),
    /// Safekeeper: start of the last record before the boundary; 0/0 if this timeline has none.
    LastRecordReply(Lsn),
    /// Safekeeper, to a proposer that was elected: this was decided since you greeted, and members' WAL ports are there.
    /// Comes beside an answer.
    Configuration(Configuration, Vec<(NodeId, String)>),
}

impl Message<'_> {
    /// The frame's kind byte.
    pub fn kind(&self) -> u8 {
        match self {
            Message::Greeting(_) => GREETING_KIND,
            Message::VoteRequest(_) => VOTE_REQUEST_KIND,
            Message::Elected(_) => 3,
            Message::Append(..) => APPEND_KIND,
            Message::Ping => PING_KIND,
            Message::Open(..) => 6,
            Message::ReadWal(..) => 7,
            Message::LastRecord(_) => 8,
            Message::Found(_) => 10,
            Message::Learn(..) => 11,
            Message::GreetingReply(_) => 65,
            Message::Vote(_) => 66,
            Message::Ack(_) => 67,
            Message::Refused(_) => 68,
            Message::Status(_) => 69,
            Message::WalChunk(..) => 70,
            Message::LastRecordReply(_) => 71,
            Message::Configuration(..) => 72,
        }
    }
}

pub(crate) const GREETING_KIND: u8 = 1;
pub(crate) const VOTE_REQUEST_KIND: u8 = 2;
pub(crate) const APPEND_KIND: u8 = 4;
pub(crate) const PING_KIND: u8 = 5;

/// True for the message that a compute introduces itself with.
pub fn greets(kind: u8) -> bool {
    kind == GREETING_KIND
}

/// True for messages that one acknowledgement answers together: appends and pings.
pub fn is_appending(kind: u8) -> bool {
    kind == APPEND_KIND || kind == PING_KIND
}
