//! The local directory backend: the semantics of an object store on a POSIX file system.
//!
//! An object is a file. Writes go to a temporary file that is synced and then renamed (or, for
//! put-if-absent, linked) into place, and the directory is synced, so an object is either wholly
//! there and durable, or not there. Compare-and-swap holds an exclusive lock on one file of the
//! store, so that several processes may share the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use crate::claim;
use crate::durable::DurableDirectories;
use crate::error::too_large;
use crate::store::{CasOutcome, ObjectInfo, PutOutcome, Version};

/// Temporary files start with this, and are never listed as objects.
const TEMPORARY_PREFIX: &str = ".tmp-";
const LOCK_FILE: &str = ".lock";

/// What is said of a store that is away.
fn away(mark: &str) -> io::Error {
    io::Error::other(format!(
        "the store is away: '{mark}', which is in it for as long as it is there, is not. Nothing is written in its place; put \
         the directory back, or mount it, and everything goes on by itself"
    ))
}

/// Bytes of an object that are written and synced before that is counted as progress: as long as most objects are, and as
/// much as a disk that works takes within anybody's patience.
const SYNCED_AT_ONCE: usize = 64 << 20;

static TEMPORARY_SERIAL: AtomicU64 = AtomicU64::new(0);

/// Opening a pipe waits for its other end, unless told not to.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

fn regular(file: File, path: &Path) -> io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other(format!("{} is no regular file", path.display()))),
    }
}

/// Opens a file for reading. Whatever is no regular file is refused at once: a pipe could keep its
/// reader for ever, and a device has no end.
pub fn open_regular(path: &Path) -> io::Result<File> {
    regular(OpenOptions::new().read(true).custom_flags(NONBLOCK).open(path)?, path)
}

/// A file's content, as long as the file is when it is opened.
fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    if size > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, too_large(size, limit)));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).map_err(io::Error::other)?);
    file.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// How far an operation is, and whether a write is still wanted. Who gives a write up may go on as if it had never been
/// asked for; one that has begun to appear can't be given up any more.
#[derive(Debug, Default)]
pub(crate) struct Intent {
    stage: AtomicU8,
    steps: AtomicU64,
}

const WANTED: u8 = 0;
const APPEARS: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Intent {
    fn leave(&self, to: u8) -> bool {
        self.stage.compare_exchange(WANTED, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Counts what was done: whoever waits goes on waiting.
    pub(crate) fn advance(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Right before the step by which others see the write.
    fn appear(&self) -> io::Result<()> {
        match self.leave(APPEARS) {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody waits for it any more")),
        }
    }

    /// Sees to it that the write never appears. False if it may have, or will.
    pub(crate) fn give_up(&self) -> bool {
        self.leave(GIVEN_UP)
    }
}

#[derive(Debug)]
pub(crate) struct LocalDirectory {
    directories: DurableDirectories,
}

impl LocalDirectory {
    pub(crate) fn open(root: &Path) -> io::Result<LocalDirectory> {
        Self::over(DurableDirectories::open(root)?)
    }

    /// The same for one who writes it under a claim. Where the claim is not there, neither is the store, and nothing is made
    /// in its place; it can be used once it is back.
    pub(crate) fn open_claimed(root: &Path) -> io::Result<LocalDirectory> {
        match root.join(claim::OBJECT).symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(LocalDirectory { directories: DurableDirectories::at(root)? })
            }
            _ => Self::open(root),
        }
    }

    /// An error if another directory is in the place of the store, or none: a disk that is not mounted, or that somebody
    /// moved. The mark is the claim, where the store is written under one, which none but its owner has; else the lock's file.
    pub(crate) fn check_there(&self, is_claimed: bool) -> io::Result<()> {
        let mark = if is_claimed { claim::OBJECT } else { LOCK_FILE };
        match self.file(mark).symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(away(mark)),
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    fn over(directories: DurableDirectories) -> io::Result<LocalDirectory> {
        // Writability is checked now, where the message can name the store, not at first use.
        let path = directories.root().join(LOCK_FILE);
        let mut options = OpenOptions::new();
        let lock =
            options.create(true).truncate(false).write(true).custom_flags(NONBLOCK).open(&path);
        regular(lock?, &path)?;
        Ok(LocalDirectory { directories })
    }

    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.directories.root().join(path)
    }

    pub(crate) fn get(&self, path: &str, limit: u64) -> io::Result<Bytes> {
        read_regular(&self.file(path), limit).map(Bytes::from)
    }

    pub(crate) fn get_range(&self, path: &str, range: Range<u64>) -> io::Result<Bytes> {
        let mut file = open_regular(&self.file(path))?;
        file.seek(SeekFrom::Start(range.start))?;
        let mut bytes = Vec::new();
        file.take(range.end.saturating_sub(range.start)).read_to_end(&mut bytes)?;
        Ok(Bytes::from(bytes))
    }

    pub(crate) fn put(&self, path: &str, bytes: &[u8], intent: &Intent) -> io::Result<()> {
        let target = self.file(path);
        let temporary = self.write_temporary(&target, bytes, intent)?;
        intent
            .appear()
            .and_then(|()| fs::rename(&temporary, &target))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        self.directories.sync_parent(&target)
    }

    pub(crate) fn put_if_absent(
        &self,
        path: &str,
        bytes: &[u8],
        intent: &Intent,
    ) -> io::Result<PutOutcome> {
        let target = self.file(path);
        let temporary = self.write_temporary(&target, bytes, intent)?;
        // A hard link fails if the name exists, which rename does not.
        let linked = intent.appear().and_then(|()| fs::hard_link(&temporary, &target));
        fs::remove_file(&temporary)?;
        let outcome = match linked {
            Ok(()) => PutOutcome::Created,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => PutOutcome::Exists,
            Err(error) => return Err(error),
        };
        self.directories.sync_parent(&target)?;
        Ok(outcome)
    }

    pub(crate) fn compare_and_swap(
        &self,
        path: &str,
        expected: Option<&Version>,
        bytes: &[u8],
        intent: &Intent,
    ) -> io::Result<CasOutcome> {
        self.directories.check()?;
        let lock_path = self.file(LOCK_FILE);
        let lock = OpenOptions::new().write(true).custom_flags(NONBLOCK).open(&lock_path)?;
        let lock = regular(lock, &lock_path)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let content = match expected {
            Some(Version::Content(content)) => Some(content),
            _ => None,
        };
        let limit = content.map_or(0, |content| content.len() as u64);
        let (is_there, matches) = match read_regular(&self.file(path), limit) {
            Ok(current) => (true, content.is_some_and(|content| *content == current)),
            // Another one.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => (true, false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (false, expected.is_none()),
            Err(error) => return Err(error),
        };
        if !matches {
            // The caller goes by what is there instead.
            if is_there {
                self.directories.sync_parent(&self.file(path))?;
            }
            return Ok(CasOutcome::Conflict);
        }
        self.put(path, bytes, intent)?;
        Ok(CasOutcome::Swapped(Version::Content(Bytes::copy_from_slice(bytes))))
    }

    pub(crate) fn delete(&self, path: &str, intent: &Intent) -> io::Result<()> {
        self.directories.check()?;
        intent.appear()?;
        let target = self.file(path);
        match fs::remove_file(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Err(_) if !target.parent().is_some_and(Path::is_dir) => Ok(()),
            _ => self.directories.sync_parent(&target),
        }
    }

    /// Every object whose path starts with `prefix` (a path of whole components), sorted. Files that
    /// were looked at are counted.
    pub(crate) fn list(&self, prefix: &str, intent: &Intent) -> io::Result<Vec<ObjectInfo>> {
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
                intent.advance();
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
                } else if let Ok(path) = entry.path().strip_prefix(self.directories.root()) {
                    let path = path.to_string_lossy().into_owned();
                    found.push(ObjectInfo { path, size: metadata.len() });
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    fn write_temporary(&self, target: &Path, bytes: &[u8], intent: &Intent) -> io::Result<PathBuf> {
        let parent = target.parent().unwrap_or(self.directories.root());
        self.directories.make(parent)?;
        let serial = TEMPORARY_SERIAL.fetch_add(1, Ordering::Relaxed);
        let random = rand::random::<u64>();
        let name = format!("{TEMPORARY_PREFIX}{}-{serial}-{random:016x}", std::process::id());
        let temporary = parent.join(name);
        let written = (|| {
            // Not one that somebody else has put there, nor what it leads to.
            let mut file = OpenOptions::new().create_new(true).write(true).open(&temporary)?;
            let mut parts = bytes.chunks(SYNCED_AT_ONCE).peekable();
            while let Some(part) = parts.next() {
                file.write_all(part)?;
                if parts.peek().is_some() {
                    file.sync_data()?;
                    intent.advance();
                }
            }
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
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A failed helper fails the test.
mod tests {
    use super::*;
    use crate::durable::watched;

    struct World(tempfile::TempDir);

    impl World {
        fn new() -> World {
            World(tempfile::tempdir().unwrap())
        }

        fn open(&self) -> LocalDirectory {
            let root = self.0.path().join("a/store");
            let directories = DurableDirectories::open_with(&root, watched::sync).unwrap();
            LocalDirectory::over(directories).unwrap()
        }

        fn synced(&self) -> Vec<String> {
            watched::synced(self.0.path())
        }
    }

    #[test]
    fn each_process_makes_all_directories_of_an_object_durable_once() {
        let world = World::new();
        let store = world.open();
        // Each directory that was made, in its parent; the root once more.
        assert_eq!(world.synced(), ["a", "", "a"]);
        store.put("t/wal/1", b"one", &Intent::default()).unwrap();
        assert_eq!(world.synced(), ["a/store", "a/store/t", "a/store/t/wal"]);
        store.put("t/wal/2", b"two", &Intent::default()).unwrap();
        assert_eq!(world.synced(), ["a/store/t/wal"]);
        // Another process can't know how far this one came.
        let other = world.open();
        assert_eq!(world.synced(), ["a"]);
        other.put_if_absent("t/wal/3", b"three", &Intent::default()).unwrap();
        assert_eq!(world.synced(), ["a/store", "a/store/t", "a/store/t/wal"]);
        // Somebody removed the directory: it is made again.
        fs::remove_dir_all(store.file("t")).unwrap();
        store.put("t/wal/1", b"one", &Intent::default()).unwrap();
        assert_eq!(world.synced(), ["a/store", "a/store/t", "a/store/t/wal"]);
    }

    #[test]
    fn what_another_did_is_durable_before_it_is_told() {
        let world = World::new();
        let store = world.open();
        store.put("object", b"one", &Intent::default()).unwrap();
        world.synced();
        assert_eq!(
            store.put_if_absent("object", b"two", &Intent::default()).unwrap(),
            PutOutcome::Exists
        );
        assert_eq!(world.synced(), ["a/store"]);
        let other = Version::Content(Bytes::from_static(b"two"));
        let swapped =
            store.compare_and_swap("object", Some(&other), b"three", &Intent::default()).unwrap();
        assert_eq!((swapped, world.synced()), (CasOutcome::Conflict, vec!["a/store".to_owned()]));
        store.delete("object", &Intent::default()).unwrap();
        store.delete("object", &Intent::default()).unwrap();
        assert_eq!(world.synced(), ["a/store", "a/store"]);
        store.delete("no/such/directory", &Intent::default()).unwrap();
        assert!(world.synced().is_empty());
    }

    #[test]
    fn nothing_is_made_where_a_store_that_is_claimed_is_away() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("store");
        let away = LocalDirectory::open_claimed(&root).unwrap();
        assert!(!root.exists());
        let missing = away.check_there(true).unwrap_err().to_string();
        assert!(missing.contains("the store is away") && missing.contains("'claim'"), "{missing}");
        // It is there after all.
        let store = LocalDirectory::open(&root).unwrap();
        assert!(away.check_there(true).is_err() && store.check_there(false).is_ok());
        store.put(claim::OBJECT, b"ours", &Intent::default()).unwrap();
        away.check_there(true).unwrap();
        away.put("t/index", b"one", &Intent::default()).unwrap();
        assert_eq!(store.get("t/index", 10).unwrap(), "one");
    }

    #[test]
    fn a_long_object_is_waited_for_part_by_part() {
        let world = World::new();
        let store = world.open();
        let intent = Intent::default();
        let long = vec![7; 2 * SYNCED_AT_ONCE + 1];
        store.put("long", &long, &intent).unwrap();
        assert_eq!(intent.steps(), 2);
        assert_eq!(store.get("long", u64::MAX).unwrap(), long);
        store.put("empty", b"", &Intent::default()).unwrap();
        assert_eq!(store.get("empty", 0).unwrap(), Bytes::new());
    }

    #[test]
    fn s4_what_is_no_file_is_refused_at_once_and_named() {
        let world = World::new();
        let store = world.open();
        store.put("t/index", b"one", &Intent::default()).unwrap();
        let one = Version::Content(Bytes::from_static(b"one"));
        let (told, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let pipe = store.file("t/pipe");
            rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
            std::os::unix::fs::symlink("/dev/zero", store.file("t/endless")).unwrap();
            for name in ["t/pipe", "t/endless"] {
                told.send((name, store.get(name, 100).unwrap_err())).unwrap();
                told.send((name, store.get_range(name, 0..8).unwrap_err())).unwrap();
                let swapped = store.compare_and_swap(name, Some(&one), b"two", &Intent::default());
                told.send((name, swapped.unwrap_err())).unwrap();
            }
            fs::remove_file(store.file(LOCK_FILE)).unwrap();
            fs::rename(&pipe, store.file(LOCK_FILE)).unwrap();
            let swapped = store.compare_and_swap("t/index", Some(&one), b"two", &Intent::default());
            told.send((LOCK_FILE, swapped.unwrap_err())).unwrap();
        });
        for _ in 0..7 {
            let wait = std::time::Duration::from_secs(5);
            let (name, refused) = answers.recv_timeout(wait).expect("it hangs");
            let text = refused.to_string();
            // A pipe that nobody reads can't even be opened for writing.
            assert!(name == LOCK_FILE || text.contains(name), "{text}");
            assert!(name == LOCK_FILE || text.contains("no regular file"), "{text}");
        }
    }

    #[test]
    fn after_a_failed_sync_nothing_is_written_until_the_store_is_opened_again() {
        type Write = fn(&LocalDirectory) -> io::Result<()>;
        let writes: [Write; 5] = [
            |store| store.put("object", b"two", &Intent::default()),
            |store| store.put("new/object", b"two", &Intent::default()),
            |store| store.put_if_absent("object", b"two", &Intent::default()).map(drop),
            |store| {
                let one = Version::Content(Bytes::from_static(b"one"));
                store.compare_and_swap("object", Some(&one), b"two", &Intent::default()).map(drop)
            },
            |store| store.delete("object", &Intent::default()),
        ];
        for write in writes {
            let world = World::new();
            let store = world.open();
            store.put("object", b"one", &Intent::default()).unwrap();
            watched::fail(true);
            let failed = write(&store).unwrap_err().to_string();
            assert!(failed.contains("injected"), "{failed}");
            // The disk is well again, but who knows what it lost.
            watched::fail(false);
            world.synced();
            let left = fs::read(store.file("object")).ok();
            for write in writes {
                let refused = write(&store).unwrap_err().to_string();
                assert!(refused.contains("injected") && refused.contains("restart"), "{refused}");
            }
            assert_eq!((world.synced(), fs::read(store.file("object")).ok()), (vec![], left));
            world.open().put("object", b"two", &Intent::default()).unwrap();
            assert_eq!(store.get("object", 100).unwrap(), "two");
            world.synced();
        }
    }
}
