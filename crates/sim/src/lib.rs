//! Faults on command: disks that fail.

mod disk;

pub use disk::{Fail, FaultyDisk};
