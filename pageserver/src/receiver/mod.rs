//! Follows a safekeeper: PostgreSQL's replication protocol in, ingest out, in one thread.
//!
//! Whom to follow ([`choice`]), and what is said on a connection ([`session`]), are decided without sockets, sleeps and clocks: the
//! loop around them ([`follow()`]) has these. What WAL is fed to is a [`Sink`].

pub mod believing;
pub mod choice;
mod connect;
mod follow;
mod inbox;
mod messages;
pub mod session;
mod sink;

#[cfg(test)]
mod choice_tests;
#[cfg(test)]
mod session_tests;
#[cfg(test)]
mod test_sink;

pub use follow::{Safekeepers, follow};
pub use inbox::{BadLength, MESSAGE_LIMIT};
pub use sink::Sink;
