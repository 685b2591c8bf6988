//! The outside world behind traits, so that tests can make it fail.

mod disk;

pub use disk::{Disk, DiskFile, RealDisk, is_disk_full, replace_file};
