//! Faults on command: disks that fail, servers that are slow.

mod disk;
mod server;

pub use disk::{Fail, FaultyDisk};
pub use server::slow_server;
