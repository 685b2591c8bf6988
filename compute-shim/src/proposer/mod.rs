//! The proposer driver: wins a term and makes WAL durable on a quorum of safekeepers.
//!
//! [`elect`] wins; [`Leader::append_record`] then commits single records (the barrier, the
//! synthetic checkpoint), and [`Leader::run`] hands the rest to a thread that follows a
//! [`WalSource`]. That thread is one epoll loop over the source's wake-up and one socket per
//! safekeeper: nothing between a WAL record and its three sends is queued or handed over.
//!
//! A slow or absent safekeeper delays nobody: it has a bounded queue, and what it missed is read
//! again from the source. What that does not have, as another compute wrote it or as it is long ago, the safekeeper pulls from others.

mod backlog;
mod config;
mod connection;
mod dialing;
mod driver;
mod leader;
mod leading;
mod link;
mod network;
mod poller;
mod sockets;

pub use config::{Limits, Members, ProposerConfig, ProposerError, WalChunk, WalSource};
pub use connection::SENT_BYTES;
pub use driver::Driver;
pub use leader::{Leader, Proposing, elect, elect_again};
pub use leading::{Campaign, Elected, Following, Question, Recording};
pub use network::{Network, Ready, Wire};
pub use pgstrata_wal_client::SafekeeperClient;
