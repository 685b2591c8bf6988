//! What is wrong with files that say who we are.

use std::io;
use std::path::{Path, PathBuf};

/// A file or directory of certificates or keys that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}; {remedy}", path.display())]
pub struct Trouble {
    /// Which one.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl Trouble {
    pub(crate) fn new(path: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Trouble {
        Trouble { path: path.to_owned(), what: what.into(), remedy: remedy.into() }
    }

    pub(crate) fn unreadable(path: &Path, error: &io::Error, remedy: &str) -> Trouble {
        let what = match error.kind() {
            io::ErrorKind::NotFound => "it is not there".to_owned(),
            _ => format!("it can't be read: {error}"),
        };
        Trouble::new(path, what, remedy)
    }
}
