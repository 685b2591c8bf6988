//! The server's side of PostgreSQL's frontend/backend protocol, as far as replication needs it.
//!
//! Source: PostgreSQL documentation, "Frontend/Backend Protocol" and "Streaming Replication
//! Protocol"; `src/backend/replication/walsender.c`. Integers are big endian. Simple queries only.

mod backend;
mod command;
mod frontend;
mod startup;
#[cfg(test)]
mod tests;

pub use backend::{BackendWriter, Column, int8_column, text_column};
pub use command::{Command, CommandError, parse};
pub use frontend::{Frontend, MAX_MESSAGE, StandbyStatus, split};
pub use startup::{MAX_STARTUP, Startup, StartupPacket, settings_of};

/// What a safekeeper shows the number of the configuration as that it knows of a timeline's members, 0 if it knows of none.
pub const CONFIGURATION: &str = "pgstrata.configuration";

/// PostgreSQL counts microseconds from 2000-01-01; this is that moment in Unix time, in seconds.
pub const POSTGRES_EPOCH_UNIX_S: u64 = 946_684_800;
