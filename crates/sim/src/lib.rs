//! Faults on command: disks that fail, servers that are slow, networks that are far away. And conversations that were
//! recorded.

pub mod conversation;
mod disk;
mod server;
mod switch;

pub use disk::{Fail, FaultyDisk};
pub use server::slow_server;
pub use switch::{Counts, Switch};
