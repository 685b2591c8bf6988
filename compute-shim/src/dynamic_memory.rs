//! Where PostgreSQL's dynamic shared memory is: a directory of its own in memory.
//!
//! Otherwise each segment is a file of its own in `/dev/shm`, which outlives a server that is killed until one starts in
//! the same data directory. A compute's directories come and go, and so would their segments, but they would stay.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

const PREFIX: &str = "pgstrata-compute-";
/// Nobody takes longer than this to lock one and name it.
const NAMELESS: Duration = Duration::from_secs(3600);
/// Held by the shim as long as it lives.
const LOCK: &str = "lock";

/// A directory for one run of PostgreSQL. It is removed with this value, or by the next shim if this one is killed.
pub struct DynamicMemory {
    path: PathBuf,
    _lock: File,
}

impl DynamicMemory {
    /// In `parent`, which is in memory. Removes what killed shims of this user have left there.
    pub fn new(parent: &Path) -> io::Result<DynamicMemory> {
        sweep(parent)?;
        let unique = format!("{PREFIX}{}-{:08x}", std::process::id(), rand::random::<u32>());
        // Others look at it when it has its name, and so its lock.
        let unlocked = parent.join(format!(".{unique}"));
        DirBuilder::new().mode(0o700).create(&unlocked)?;
        let lock = File::create(unlocked.join(LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let path = parent.join(unique);
        fs::rename(&unlocked, &path)?;
        Ok(DynamicMemory { path, _lock: lock })
    }

    /// Has PostgreSQL keep its segments here: its own directory for them becomes a link.
    pub fn place(&self, data: &Path) -> io::Result<()> {
        let own = data.join("pg_dynshmem");
        fs::remove_dir_all(&own)?;
        symlink(&self.path, own)
    }
}

impl Drop for DynamicMemory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("can't remove {}: {error}", self.path.display());
        }
    }
}

/// Removes directories that nobody holds the lock of.
fn sweep(parent: &Path) -> io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // One that has no name yet has no lock yet either.
        let unnamed = name.strip_prefix('.').is_some_and(|name| name.starts_with(PREFIX));
        if !unnamed && !name.starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let stale = || -> io::Result<bool> {
            let about = entry.metadata()?;
            if about.uid() != user {
                return Ok(false);
            }
            if unnamed {
                return Ok(about.modified()?.elapsed().is_ok_and(|age| age > NAMELESS));
            }
            let lock = File::open(path.join(LOCK))?;
            Ok(flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok())
        };
        // Another shim may remove it at the same time.
        if stale().unwrap_or(false) {
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_killed_shims_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("pg_dynshmem")).unwrap();
        let running = DynamicMemory::new(parent.path()).unwrap();
        running.place(data.path()).unwrap();
        fs::write(data.path().join("pg_dynshmem/mmap.1"), "x").unwrap();
        assert!(running.path.join("mmap.1").exists());
        // Killed: its lock is gone, its directory is not.
        let killed = parent.path().join(format!("{PREFIX}1-1"));
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join(LOCK), "").unwrap();
        fs::write(killed.join("mmap.2"), "x").unwrap();
        // Killed before it had its name, and one that is about to get it.
        let [nameless, new] =
            ["1-2", "1-3"].map(|name| parent.path().join(format!(".{PREFIX}{name}")));
        fs::create_dir(&nameless).unwrap();
        let long_ago = std::time::SystemTime::now() - 2 * NAMELESS;
        File::open(&nameless).unwrap().set_modified(long_ago).unwrap();
        fs::create_dir(&new).unwrap();
        // Somebody else's.
        fs::create_dir(parent.path().join("other")).unwrap();

        let next = DynamicMemory::new(parent.path()).unwrap();
        assert!(!killed.exists() && !nameless.exists() && new.exists());
        fs::remove_dir(new).unwrap();
        assert!(running.path.join("mmap.1").exists() && next.path.exists());
        drop((running, next));
        let left: Vec<_> =
            fs::read_dir(parent.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["other"]);
    }
}
