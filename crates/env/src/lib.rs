//! The outside world behind traits, so that tests can make it fail.

mod directory_lock;
mod disk;

pub use directory_lock::DirectoryLock;
pub use disk::{Disk, DiskFile, RealDisk, Space, is_disk_full, replace_file};
