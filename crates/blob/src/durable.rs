//! Directories whose names are durable, for a store in a local directory.
//!
//! Whatever an answer tells is durable, whoever did it: a process may have died between making a
//! name and syncing its directory, so who finds the name syncs the directory again. A sync that
//! fails is not tried again, since it could then succeed without having done anything: everything
//! that writes is refused until the store is opened anew.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Makes the names in a directory durable.
type Sync = fn(&Path) -> io::Result<()>;

/// See the module.
#[derive(Debug)]
pub(crate) struct DurableDirectories {
    root: PathBuf,
    /// Those that this process made durable, in all directories above too, up to the root.
    known: Mutex<HashSet<PathBuf>>,
    /// The first sync that failed.
    failed: OnceLock<String>,
    /// [`sync`], except where tests look.
    sync: Sync,
}

impl DurableDirectories {
    /// Makes the root, and what is missing above it.
    pub(crate) fn open(root: &Path) -> io::Result<DurableDirectories> {
        Self::open_with(root, sync)
    }

    pub(crate) fn open_with(root: &Path, sync: Sync) -> io::Result<DurableDirectories> {
        let absolute = std::path::absolute(root)?;
        let missing: Vec<&Path> = absolute.ancestors().take_while(|path| !path.exists()).collect();
        fs::create_dir_all(&absolute)?;
        let root = absolute.canonicalize()?;
        for made in missing {
            sync(made.canonicalize()?.parent().unwrap_or(made))?;
        }
        match root.parent().map(sync) {
            // Perhaps one who died made the root. Who may not read the directory did not.
            Some(Err(error)) if error.kind() != io::ErrorKind::PermissionDenied => {
                return Err(error);
            }
            _ => {}
        }
        let known = Mutex::new(HashSet::from([root.clone()]));
        Ok(DurableDirectories { root, known, failed: OnceLock::new(), sync })
    }

    /// The same of one that is away: nothing is made. Whoever made it once made its name durable.
    pub(crate) fn at(root: &Path) -> io::Result<DurableDirectories> {
        let root = std::path::absolute(root)?;
        let known = Mutex::new(HashSet::from([root.clone()]));
        Ok(DurableDirectories { root, known, failed: OnceLock::new(), sync })
    }

    /// The directory of the store.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// An error if a sync failed before.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.failed.get() {
            Some(reason) => Err(io::Error::other(format!(
                "writing stopped, since {reason}: check the disk, then restart this service"
            ))),
            None => Ok(()),
        }
    }

    /// Makes the names in the directory of `path` durable, those that others made too.
    pub(crate) fn sync_parent(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        let directory = path.parent().unwrap_or(&self.root);
        (self.sync)(directory).map_err(|error| {
            let reason = format!("a sync of {} failed: {error}", directory.display());
            self.failed.get_or_init(|| reason.clone());
            io::Error::other(reason)
        })
    }

    /// Makes sure that `directory` is there and durable, and all above it, up to the root.
    pub(crate) fn make(&self, directory: &Path) -> io::Result<()> {
        self.check()?;
        // Held to the end: nobody may count on a directory that is not synced yet. A set is
        // whole even if its holder panicked.
        self.make_locked(directory, &mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn make_locked(&self, directory: &Path, known: &mut HashSet<PathBuf>) -> io::Result<()> {
        if known.contains(directory) && directory.is_dir() {
            return Ok(());
        }
        if directory != self.root
            && let Some(parent) = directory.parent()
        {
            self.make_locked(parent, known)?;
        }
        match fs::create_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.sync_parent(directory)?;
        known.insert(directory.to_owned());
        Ok(())
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
pub(crate) mod watched {
    //! Syncs that tests on one thread can see, and let fail.

    use std::cell::{Cell, RefCell};

    use super::*;

    thread_local! {
        static SYNCED: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
        static FAIL: Cell<bool> = const { Cell::new(false) };
    }

    /// The real one, unless told to fail.
    pub(crate) fn sync(path: &Path) -> io::Result<()> {
        SYNCED.with_borrow_mut(|synced| synced.push(path.to_owned()));
        match FAIL.get() {
            true => Err(io::Error::other("injected I/O error")),
            false => super::sync(path),
        }
    }

    pub(crate) fn fail(fail: bool) {
        FAIL.set(fail);
    }

    /// What was synced since the last call, relative to `base`.
    pub(crate) fn synced(base: &Path) -> Vec<String> {
        let base = base.canonicalize().expect("a temporary directory is there");
        let relative = |path: PathBuf| match path.strip_prefix(&base) {
            Ok(path) => path.display().to_string(),
            Err(_) => panic!("{} was synced", path.display()),
        };
        SYNCED.take().into_iter().map(relative).collect()
    }
}
