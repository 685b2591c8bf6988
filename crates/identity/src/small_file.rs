//! Small files that say who we are, and the rule of who may read those with a secret in them.

use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::Trouble;

/// What was in a file, and whose it was then.
pub struct SmallFile {
    path: PathBuf,
    /// All of it.
    pub bytes: Vec<u8>,
    about: Metadata,
}

/// Without its bytes, which may be a secret.
impl fmt::Debug for SmallFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SmallFile").field(&self.path).finish()
    }
}

impl SmallFile {
    /// Reads a regular file. A pipe or a device in its place is refused, and never waited for. `remedy` is what is said to
    /// do where it can't be read.
    pub fn read(path: &Path, limit_bytes: u64, remedy: &str) -> Result<SmallFile, Trouble> {
        let unreadable = |error: std::io::Error| Trouble::unreadable(path, &error, remedy);
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file =
            OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(unreadable)?;
        let about = file.metadata().map_err(unreadable)?;
        if !about.is_file() {
            return Err(Trouble::new(path, "it is no regular file", remedy));
        }
        let mut bytes = Vec::new();
        file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        match bytes.len() as u64 > limit_bytes {
            true => {
                Err(Trouble::new(path, format!("it is longer than {limit_bytes} bytes"), remedy))
            }
            false => Ok(SmallFile { path: path.to_owned(), bytes, about }),
        }
    }

    /// Whoever can read a service's key can be that service: one that others can read is refused, not warned of, because
    /// nobody reads warnings. The rule is PostgreSQL's (`be-secure-common.c`, `check_ssl_key_file_permissions`), so that one
    /// key can serve both, and people know it: its owner's alone, or root's and a group's.
    pub fn check_private(&self) -> Result<(), Trouble> {
        let (allowed, remedy) = match self.about.uid() {
            0 => (0o640, "'chmod go=' it, or 'chmod u=rw,g=r,o=' and give it the service's group"),
            _ => (0o600, "'chmod go=' it"),
        };
        // That the owner may execute it harms nobody.
        match self.about.mode() & 0o777 & !(allowed | 0o100) {
            0 => Ok(()),
            _ => {
                let what = format!("others can read it (mode {:04o})", self.about.mode() & 0o7777);
                Err(Trouble::new(&self.path, what, remedy))
            }
        }
    }
}
