//! Faults on command: disks that fail, or lose power, servers that are slow, networks that are far away. And conversations
//! that were recorded, and WAL to send.

pub mod conversation;
mod disk;
mod rng;
mod server;
mod sim_disk;
mod switch;
pub mod wal;

pub use disk::{Fail, FaultyDisk};
pub use rng::Rng;
pub use server::slow_server;
pub use sim_disk::SimDisk;
pub use switch::{Counts, Switch};
