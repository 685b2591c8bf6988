//! What a proposer is given, and what it can fail with.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use pgstrata_identity::Identity;
use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::ProposerId;

/// How much is held, and sent at once. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most WAL that one append carries.
    pub chunk: usize,
    /// WAL kept in memory for safekeepers that lag. What is older is read again.
    pub backlog: u64,
    /// WAL sent and not yet committed before the source isn't asked for more. A record that is longer is sent all the same:
    /// nothing of it is committed before its end.
    pub uncommitted: u64,
    /// Queued for one safekeeper before it gets no more; the rest waits in the backlog.
    pub queued: usize,
    /// Queued for a lagging one before it gets no more of what is no longer in memory.
    pub old_queued: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            chunk: 512 << 10,
            backlog: 64 << 20,
            uncommitted: 48 << 20,
            queued: 8 << 20,
            old_queued: 2 << 20,
        }
    }
}

/// Where members are.
pub trait Members: Debug + Send + Sync {
    /// The WAL port of a member, as `host:port`, best first: asked for at each attempt to connect, on the proposer's
    /// thread, so that it must not wait for anything.
    fn addresses(&self, node: NodeId) -> Vec<String>;

    /// Safekeepers that are said to have the timeline, members or not: they are asked who its members are, where those that
    /// are known can't elect, or commit nothing. Must not wait either.
    fn holders(&self) -> Vec<NodeId> {
        Vec::new()
    }

    /// Why there is no address of a member, for messages.
    fn describe(&self) -> String {
        "nobody said where it is".to_owned()
    }
}

impl Members for Vec<(NodeId, String)> {
    fn addresses(&self, node: NodeId) -> Vec<String> {
        let of_node = self.iter().filter(|(other, _)| *other == node);
        of_node.map(|(_, address)| address.clone()).collect()
    }
}

/// Who proposes what to whom.
#[derive(Clone, Debug)]
pub struct ProposerConfig {
    /// The timeline; it is founded if it is new.
    pub parameters: TimelineParameters,
    /// Safekeepers to ask who its members are; and the first members, if it is founded.
    pub safekeepers_to_ask: Vec<NodeId>,
    /// Where they are.
    pub safekeepers: Arc<dyn Members>,
    /// Who we are to them, where they are to ask.
    pub identity: Option<Identity>,
    /// This run of this compute; must never have been used before.
    pub id: ProposerId,
    /// What it does by chance it does by this, a random number. Nothing depends on its being nobody else's.
    pub seed: u64,
    /// The highest term that the compute ever asked for, or 0; kept up.
    pub asked_term: Arc<AtomicU64>,
    /// How much it holds.
    pub limits: Limits,
}

/// The next piece of WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalChunk {
    /// Position of the first byte: where the piece before it ended.
    pub start: Lsn,
    /// The bytes; not empty.
    pub bytes: Bytes,
    /// The last record boundary at or before the end of the bytes: their very end, unless a
    /// record is longer than was asked for.
    pub record_end: Lsn,
}

/// Where the WAL comes from. Called on the proposer's thread only; every call should be quick.
pub trait WalSource: Send {
    /// The next complete records after what was returned before, at most `max_bytes`, or `None`
    /// if there are none yet. The first piece starts where the proposer's log ended when it was
    /// handed the source.
    fn poll_wal(&mut self, max_bytes: usize) -> io::Result<Option<WalChunk>>;

    /// Whether [`WalSource::poll_wal`] should be called again soon although it returned nothing: it does a part of what
    /// there is to do in each call.
    fn has_more(&self) -> bool {
        false
    }

    /// Bytes that were returned before, from `from` to at most `to`, for a safekeeper that missed
    /// them. An error or no bytes means that they aren't here any more; they are then read from
    /// another safekeeper.
    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes>;

    /// Everything up to `commit` is durable on a quorum. Rises with every call.
    fn on_commit(&mut self, commit: Lsn);

    /// Term `by` was promised to another compute: nothing is committed from here on, ever.
    fn on_fenced(&mut self, by: Term);
}

/// Why a proposer stopped, or never started.
#[derive(Debug, thiserror::Error)]
pub enum ProposerError {
    /// Another compute won a newer term.
    #[error("another compute has taken over this branch in term {0}; this one must stop")]
    Fenced(Term),
    /// Other members keep the timeline's WAL from now on, and a term has to be won with them.
    #[error(
        "the branch's members were changed (configuration {0}), and what they go on with is not the log that was written \
         here: the term is given up"
    )]
    MembersChanged(u64),
    /// Too few safekeepers answered in time.
    #[error("no quorum of safekeepers answered within {seconds} s: {details}")]
    NoQuorum {
        /// How long it was tried.
        seconds: u64,
        /// What is wrong with each.
        details: String,
    },
    /// So many safekeepers refuse this branch that the others are no quorum.
    #[error("no quorum of safekeepers is left that does not refuse this branch: {details}")]
    Refused {
        /// What is wrong with each.
        details: String,
    },
    /// Not committed within the time given; it still may be.
    #[error("{what} was not committed within {seconds} s: {details}")]
    NotCommitted {
        /// What was to be committed.
        what: String,
        /// How long was waited.
        seconds: u64,
        /// What is wrong with each safekeeper.
        details: String,
    },
    /// WAL can't be read from any safekeeper.
    #[error("can't read WAL at {at} from any safekeeper: {details}")]
    Unreadable {
        /// Where.
        at: Lsn,
        /// What is wrong with each.
        details: String,
    },
    /// The source failed or broke its contract.
    #[error("the WAL source failed: {0}")]
    Source(io::Error),
    /// The system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl ProposerError {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> ProposerError {
        move |source| ProposerError::System { what, source }
    }
}
