//! One process a directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// The right to a directory. It ends with its holder, however that ends.
#[derive(Debug)]
pub struct DirectoryLock {
    file: File,
}

impl DirectoryLock {
    /// Takes the right to a directory, which must exist, by locking `file` in it. Who else may have it is `holder`, such
    /// as "safekeeper", for the message.
    pub fn take(directory: &Path, file: &str, holder: &str) -> io::Result<DirectoryLock> {
        let path = directory.join(file);
        let told = |what: &str, error: io::Error| {
            io::Error::new(error.kind(), format!("can't {what} {}: {error}", path.display()))
        };
        let file = open_lock_file(&path).map_err(|error| told("open", error))?;
        match file.try_lock() {
            Ok(()) => Ok(DirectoryLock { file }),
            Err(TryLockError::WouldBlock) => Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("another {holder} is running in {}", directory.display()),
            )),
            Err(TryLockError::Error(error)) => Err(told("lock", error)),
        }
    }
}

impl Drop for DirectoryLock {
    /// Here and not by closing alone: a process that is being started has the file too, for a moment, and the lock with it.
    fn drop(&mut self) {
        // What can't be unlocked is when it is closed.
        let _ = self.file.unlock();
    }
}

/// Whoever put a pipe or a link in its place gets a refusal: a pipe would be waited for, and what a
/// link names is not ours to lock.
fn open_lock_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).custom_flags(flags.bits() as i32);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file: remove it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_has_it_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let take = || DirectoryLock::take(directory.path(), "lock", "safekeeper");
        let lock = take().unwrap();
        let refused = take().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        let text = format!("another safekeeper is running in {}", directory.path().display());
        assert_eq!(refused.to_string(), text);
        drop(lock);
        take().unwrap();
    }

    #[test]
    fn s4_a_pipe_in_the_place_of_the_lock_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let take = |directory: &Path| DirectoryLock::take(directory, "lock", "safekeeper");
        // Also one that somebody reads, which can be opened.
        for is_read in [false, true] {
            let reader = is_read.then(|| reader_of(&path));
            let (done, answer) = std::sync::mpsc::channel();
            let place = directory.path().to_owned();
            std::thread::spawn(move || done.send(take(&place).unwrap_err().to_string()));
            let text = answer.recv_timeout(Duration::from_secs(20)).unwrap();
            assert!(text.contains(path.to_str().unwrap()), "read: {is_read}: {text}");
            drop(reader);
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        take(directory.path()).unwrap_err();
        assert!(!directory.path().join("elsewhere").exists());
        std::fs::remove_file(&path).unwrap();
        take(directory.path()).unwrap();
    }

    fn reader_of(path: &Path) -> File {
        let nonblock = OFlags::NONBLOCK.bits() as i32;
        OpenOptions::new().read(true).custom_flags(nonblock).open(path).unwrap()
    }
}
