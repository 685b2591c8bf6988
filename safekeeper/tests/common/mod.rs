//! Real safekeeper processes, and WAL to send them.
#![allow(dead_code)] // Each test binary uses a part.
#![allow(clippy::unwrap_used)] // Tests, which clippy doesn't recognise in helper modules.

pub mod broker;
pub mod cluster;
pub mod failing;
pub mod lives;
pub mod members;
pub mod played;
pub mod replication;
pub mod source;
pub use pgstrata_sim::wal;
