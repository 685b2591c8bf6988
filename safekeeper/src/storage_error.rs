//! What can go wrong with files.

use std::io;
use std::path::{Path, PathBuf};

use pgstrata_env::is_disk_full;

/// An operation on a file that didn't succeed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// No space left. Nothing is broken: appends are refused, reads go on.
    #[error("no space left to {action} {}: free space on this disk, writing then resumes", path.display())]
    DiskFull {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
    },
    /// Anything else. What the file holds is unknown, so nothing is tried again.
    #[error("can't {action} {}: {source}", path.display())]
    Failed {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An earlier failure; the process is about to end.
    #[error("writing stopped after an earlier storage error: {0}")]
    Latched(String),
    /// A file has contents that it can't have.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// Which file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl StorageError {
    /// Turns the error of a sync into one of ours: whatever the reason, a lack of space too, what
    /// the file holds is unknown after it.
    pub fn unsynced<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| StorageError::Failed { action, path: path.to_owned(), source }
    }

    /// Turns a system error into one of ours. Not for syncs of what is already in use.
    pub fn wrap<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| {
            let path = path.to_owned();
            match is_disk_full(&source) {
                true => StorageError::DiskFull { action, path },
                false => StorageError::Failed { action, path, source },
            }
        }
    }
}
