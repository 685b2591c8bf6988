//! Names in directories: as they are seen, and as the device has them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path};

use crate::Rng;

/// What a name is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A file, by its index.
    File(usize),
    /// A directory, by its index.
    Directory(usize),
}

/// What happens to a directory at once, or, in a loss of power, not at all.
#[derive(Clone, Debug)]
enum Change {
    Set(String, Node),
    Remove(String),
    Rename(String, String, Node),
}

type Entries = BTreeMap<String, Node>;

#[derive(Debug, Default)]
struct Directory {
    seen: Entries,
    device: Entries,
    /// Which changes the device lacks, oldest first, and their places among those of all directories.
    pending: Vec<(u64, Change)>,
}

impl Change {
    /// Whether a name is of something after it.
    fn gives(&self, other: &str) -> bool {
        match self {
            Change::Set(name, _) | Change::Rename(_, name, _) => name == other,
            Change::Remove(_) => false,
        }
    }

    fn apply(self, entries: &mut Entries) {
        match self {
            Change::Set(name, node) => {
                entries.insert(name, node);
            }
            Change::Remove(name) => {
                entries.remove(&name);
            }
            Change::Rename(from, to, node) => {
                entries.remove(&from);
                entries.insert(to, node);
            }
        }
    }
}

/// All directories; the first is the root.
#[derive(Debug)]
pub struct Names {
    directories: Vec<Directory>,
    changes: u64,
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Names {
    pub fn new() -> Names {
        Names { directories: vec![Directory::default()], changes: 0 }
    }

    fn parts(path: &Path) -> impl Iterator<Item = &str> {
        path.components().filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
    }

    /// The directory of that path.
    pub fn directory(&self, path: &Path) -> io::Result<usize> {
        Names::parts(path).try_fold(0, |at, name| match self.directories[at].seen.get(name) {
            Some(Node::Directory(index)) => Ok(*index),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(not_found()),
        })
    }

    fn place<'a>(&self, path: &'a Path) -> io::Result<(usize, &'a str)> {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(not_found)?;
        Ok((self.directory(path.parent().unwrap_or(Path::new("")))?, name))
    }

    fn change(&mut self, directory: usize, change: Change) {
        let directory = &mut self.directories[directory];
        change.clone().apply(&mut directory.seen);
        directory.pending.push((self.changes, change));
        self.changes += 1;
    }

    /// The file of that path.
    pub fn file(&self, path: &Path) -> io::Result<usize> {
        let (directory, name) = self.place(path)?;
        match self.directories[directory].seen.get(name) {
            Some(Node::File(index)) => Ok(*index),
            Some(Node::Directory(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found()),
        }
    }

    /// Names a file that has none.
    pub fn create(&mut self, path: &Path, file: usize) -> io::Result<()> {
        let (directory, name) = self.place(path)?;
        if self.directories[directory].seen.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(directory, Change::Set(name.to_owned(), Node::File(file)));
        Ok(())
    }

    /// Within one directory: nobody here moves a file to another one.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let ((directory, from), (other, to)) = (self.place(from)?, self.place(to)?);
        if directory != other {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        let node = *self.directories[directory].seen.get(from).ok_or_else(not_found)?;
        self.change(directory, Change::Rename(from.to_owned(), to.to_owned(), node));
        Ok(())
    }

    pub fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.file(path)?;
        let (directory, name) = self.place(path)?;
        self.change(directory, Change::Remove(name.to_owned()));
        Ok(())
    }

    /// An empty one.
    pub fn remove_directory(&mut self, path: &Path) -> io::Result<()> {
        if !self.directories[self.directory(path)?].seen.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let (above, name) = self.place(path)?;
        self.change(above, Change::Remove(name.to_owned()));
        Ok(())
    }

    /// Removes a file, durably at once.
    pub fn lose(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.place(path)?;
        let directory = &mut self.directories[directory];
        directory.seen.remove(name);
        directory.device.remove(name);
        directory.pending.retain(|(_, change)| !change.gives(name));
        Ok(())
    }

    pub fn create_directory(&mut self, path: &Path) -> io::Result<()> {
        let mut at = 0;
        for name in Names::parts(path) {
            at = match self.directories[at].seen.get(name) {
                Some(Node::Directory(index)) => *index,
                Some(Node::File(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
                None => {
                    let index = self.directories.len();
                    self.directories.push(Directory::default());
                    self.change(at, Change::Set(name.to_owned(), Node::Directory(index)));
                    index
                }
            };
        }
        Ok(())
    }

    pub fn sync(&mut self, directory: usize) {
        let directory = &mut self.directories[directory];
        for (_, change) in directory.pending.drain(..) {
            change.apply(&mut directory.device);
        }
    }

    pub fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        Ok(self.directories[self.directory(path)?].seen.keys().cloned().collect())
    }

    /// What was not synced is there or not: as far as a journal had got, or, as POSIX allows, each change for itself.
    pub fn lose_power(&mut self, rng: &mut Rng) {
        let pending = self.directories.iter().flat_map(|directory| &directory.pending);
        let oldest = pending.map(|(place, _)| *place).min().unwrap_or(self.changes);
        let until = oldest + rng.below(self.changes - oldest + 1);
        let has_journal = rng.one_in(2);
        for directory in &mut self.directories {
            for (place, change) in directory.pending.drain(..) {
                let is_kept = match has_journal {
                    true => place < until,
                    false => rng.one_in(2),
                };
                if is_kept {
                    change.apply(&mut directory.device);
                }
            }
            directory.seen.clone_from(&directory.device);
        }
    }
}
