//! Faults on command: disks that fail, servers that are slow. And conversations that were recorded.

pub mod conversation;
mod disk;
mod server;

pub use disk::{Fail, FaultyDisk};
pub use server::slow_server;
