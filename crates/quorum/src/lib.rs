//! Consensus on one timeline's WAL: who may write it, and from where on it is committed.
//!
//! Owns the rules: terms and votes, term history and divergence, what an acknowledgement means,
//! when bytes are committed. It never sees the bytes themselves, only their positions, and does
//! no I/O: inputs go in as method calls, outputs come out in the order in which the driver must
//! perform them. A driver that can't perform an output stops; it never skips one.
//!
//! The algorithm is Raft's log replication and voting, with bytes instead of entries: the log is
//! a timeline's WAL from its start LSN, each byte belongs to the term in which it was first
//! appended, and a [`TermHistory`] says which byte belongs to which. See `docs/consensus.md`.

mod acceptor;
mod chain;
mod configuration;
#[cfg(any(test, feature = "explorer"))]
pub mod explorer;
#[cfg(any(test, feature = "explorer"))]
mod fault;
mod history;
mod message;
mod proof;
mod proposer;

pub use acceptor::{Acceptor, AcceptorOutput, ControlState, InvalidState};
pub use chain::{Chain, ChainError, MAX_CHAIN};
pub use configuration::{Configuration, ConfigurationError, MAX_MEMBERS};
#[cfg(any(test, feature = "explorer"))]
pub use fault::Fault;
pub use history::{HistoryError, MAX_HISTORY, TermHistory, TermStart};
pub use message::{Ack, Append, Elected, PeerRange, ProposerId, Refusal, Vote, VoteRequest};
pub use proof::{Adopter, Holding, joint_in_use, provable_commit};
pub use proposer::{Election, Phase, Proposer, ProposerOutput};
