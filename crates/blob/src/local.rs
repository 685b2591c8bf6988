//! The local directory backend: the semantics of an object store on a POSIX file system.
//!
//! An object is a file. Writes go to a temporary file that is synced and then renamed (or, for
//! put-if-absent, linked) into place, and the directory is synced, so an object is either wholly
//! there and durable, or not there. Compare-and-swap holds an exclusive lock on one file of the
//! store, so that several processes may share the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use crate::store::{CasOutcome, ObjectInfo, PutOutcome, Version};

/// Temporary files start with this, and are never listed as objects.
const TEMPORARY_PREFIX: &str = ".tmp-";
const LOCK_FILE: &str = ".lock";

static TEMPORARY_SERIAL: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
pub(crate) struct LocalDirectory {
    root: PathBuf,
}

impl LocalDirectory {
    pub(crate) fn open(root: &Path) -> io::Result<LocalDirectory> {
        fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        // Writability is checked now, where the message can name the store, not at first use.
        OpenOptions::new().create(true).truncate(false).write(true).open(root.join(LOCK_FILE))?;
        Ok(LocalDirectory { root })
    }

    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub(crate) fn get(&self, path: &str) -> io::Result<Bytes> {
        fs::read(self.file(path)).map(Bytes::from)
    }

    pub(crate) fn get_range(&self, path: &str, range: Range<u64>) -> io::Result<Bytes> {
        let mut file = File::open(self.file(path))?;
        file.seek(SeekFrom::Start(range.start))?;
        let mut bytes = Vec::new();
        file.take(range.end.saturating_sub(range.start)).read_to_end(&mut bytes)?;
        Ok(Bytes::from(bytes))
    }

    pub(crate) fn put(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let target = self.file(path);
        let temporary = self.write_temporary(&target, bytes)?;
        fs::rename(&temporary, &target).inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        sync_parent(&target)
    }

    pub(crate) fn put_if_absent(&self, path: &str, bytes: &[u8]) -> io::Result<PutOutcome> {
        let target = self.file(path);
        let temporary = self.write_temporary(&target, bytes)?;
        // A hard link fails if the name exists, which rename does not.
        let linked = fs::hard_link(&temporary, &target);
        fs::remove_file(&temporary)?;
        match linked {
            Ok(()) => sync_parent(&target).map(|()| PutOutcome::Created),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(PutOutcome::Exists),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn compare_and_swap(
        &self,
        path: &str,
        expected: Option<&Version>,
        bytes: &[u8],
    ) -> io::Result<CasOutcome> {
        let lock = OpenOptions::new().write(true).open(self.file(LOCK_FILE))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let current = match fs::read(self.file(path)) {
            Ok(current) => Some(current),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let matches = match (&current, expected) {
            (None, None) => true,
            (Some(current), Some(Version::Content(expected))) => current == expected,
            _ => false,
        };
        if !matches {
            return Ok(CasOutcome::Conflict);
        }
        self.put(path, bytes)?;
        Ok(CasOutcome::Swapped(Version::Content(Bytes::copy_from_slice(bytes))))
    }

    pub(crate) fn delete(&self, path: &str) -> io::Result<()> {
        let target = self.file(path);
        match fs::remove_file(&target) {
            Ok(()) => sync_parent(&target),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Every object whose path starts with `prefix` (a path of whole components), sorted.
    pub(crate) fn list(&self, prefix: &str) -> io::Result<Vec<ObjectInfo>> {
        let mut found = Vec::new();
        let mut pending = vec![self.file(prefix)];
        while let Some(directory) = pending.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name.starts_with(TEMPORARY_PREFIX) || name == LOCK_FILE {
                    continue;
                }
                let metadata = match entry.metadata() {
                    Ok(metadata) => metadata,
                    // Deleted while we were listing: as if it had been deleted before.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                if metadata.is_dir() {
                    pending.push(entry.path());
                } else if let Ok(path) = entry.path().strip_prefix(&self.root) {
                    let path = path.to_string_lossy().into_owned();
                    found.push(ObjectInfo { path, size: metadata.len() });
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    fn write_temporary(&self, target: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
        let parent = target.parent().unwrap_or(&self.root);
        self.create_directories(parent)?;
        let serial = TEMPORARY_SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("{TEMPORARY_PREFIX}{}-{serial}", std::process::id());
        let temporary = parent.join(name);
        let written = (|| {
            let mut file =
                OpenOptions::new().create(true).write(true).truncate(true).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()
        })();
        match written {
            Ok(()) => Ok(temporary),
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Makes the directory and its missing parents, each durable in its own parent.
    fn create_directories(&self, directory: &Path) -> io::Result<()> {
        if directory.is_dir() {
            return Ok(());
        }
        if let Some(parent) = directory.parent() {
            self.create_directories(parent)?;
        }
        match fs::create_dir(directory) {
            Ok(()) => sync_parent(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
