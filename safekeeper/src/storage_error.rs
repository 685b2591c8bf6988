//! What can go wrong with files.

use std::io;
use std::path::{Path, PathBuf};

use pgstrata_env::is_disk_full;

use crate::disk_space::size;

fn but_kept(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        _ => format!(" beside the last {}, which are kept for votes and for trimming", size(bytes)),
    }
}

/// What each text begins with that is for want of space.
const NO_SPACE: &str = "no space left to ";

/// An operation on a file that didn't succeed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// No space left, or no more than what is kept. Nothing is broken: appends are refused, reads go on. The text is the same
    /// each time, so that who tries again and again can tell that it is said already.
    #[error("{NO_SPACE}{action} {}{}: free space on this disk, writing then resumes", path.display(), but_kept(*kept_bytes))]
    DiskFull {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What is kept for votes, configurations and trimming, if that is why; 0 where the system had no more.
        kept_bytes: u64,
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
    /// Segments of a timeline are missing, or hold what they can't. Others may have what is right.
    #[error("{}: {reason}", path.display())]
    DamagedLog {
        /// The timeline's directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl StorageError {
    /// True if what is wrong may be fetched anew from others: `crate::mend`.
    pub fn is_mendable(&self) -> bool {
        matches!(self, StorageError::DamagedLog { .. })
    }

    /// True if nothing was written when it happened: it may be tried again.
    pub fn is_of_reading(&self) -> bool {
        let is_reading = |action: &&str| ["open", "list", "measure", "read"].contains(action);
        matches!(self, StorageError::Failed { action, .. } if is_reading(action))
    }

    /// True if it is for want of space, of what is kept or of any: that is said of the disk (`DiskSpace::note`), and not of
    /// each timeline that wants some.
    pub fn is_for_want_of_space(&self) -> bool {
        matches!(self, StorageError::DiskFull { .. })
    }

    /// The same of what somebody was refused, by its text.
    pub fn is_text_of_want_of_space(text: &str) -> bool {
        text.starts_with(NO_SPACE)
    }

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
                true => StorageError::DiskFull { action, path, kept_bytes: 0 },
                false => StorageError::Failed { action, path, source },
            }
        }
    }
}
