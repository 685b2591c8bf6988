//! A disk that fails as it is told to, and otherwise is the real one.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgstrata_env::{Disk, DiskFile, RealDisk, Space};

/// What goes wrong from now on, until told otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fail {
    /// Nothing.
    #[default]
    Nothing,
    /// Syncs of file contents fail.
    Sync,
    /// Writes fail.
    Write,
    /// There is no space: files can't be created or extended.
    Full,
    /// There is space until contents are synced, as where space is given out late.
    SyncFull,
    /// Syncs of directories wait until something else goes wrong, or nothing.
    HoldNames,
    /// Syncs of directories fail, for lack of space.
    NamesFull,
    /// Space is not reserved, as on a file system that can't do that.
    NoReserve,
}

/// See the module. Clones share what goes wrong.
#[derive(Clone, Debug, Default)]
pub struct FaultyDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    fail: Fail,
    syncs: u64,
    written_bytes: u64,
    /// Bytes that the file system seems to have, if not as many as it has.
    size: Option<u64>,
    /// Bytes of files that can't be read, until the files are replaced.
    unreadable: Vec<(PathBuf, Range<u64>)>,
    /// Renames that a loss of power would undo: from, to.
    unsynced_names: Vec<(PathBuf, PathBuf)>,
}

#[derive(Debug)]
struct FaultyFile {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    state: Arc<Mutex<State>>,
}

impl FaultyDisk {
    /// Changes what goes wrong.
    pub fn fail(&self, fail: Fail) {
        self.state.lock().fail = fail;
    }

    /// How often contents were to be synced, failures included.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// How many bytes were written.
    pub fn written_bytes(&self) -> u64 {
        self.state.lock().written_bytes
    }

    /// From now on the file system seems to have so many bytes, of which those are used that lie in the directory that is
    /// asked about. It says so only: what doesn't fit is written all the same.
    pub fn resize(&self, size: u64) {
        self.state.lock().size = Some(size);
    }

    /// What a loss of power does to names: those that were not synced are the old ones again.
    /// What had the new name before is not brought back.
    pub fn lose_unsynced_names(&self) -> io::Result<()> {
        let names = std::mem::take(&mut self.state.lock().unsynced_names);
        names.iter().rev().try_for_each(|(from, to)| RealDisk.rename(to, from))
    }

    /// From now on these bytes of the file at `path` can't be read; what has its place later can.
    pub fn lose(&self, path: &Path, bytes: Range<u64>) {
        self.state.lock().unreadable.push((path.to_owned(), bytes));
    }

    fn wrap(&self, file: Arc<dyn DiskFile>, path: &Path) -> Arc<dyn DiskFile> {
        Arc::new(FaultyFile { file, path: path.to_owned(), state: Arc::clone(&self.state) })
    }
}

impl FaultyFile {
    fn check(&self, fail: Fail, error: io::Error) -> io::Result<()> {
        if self.state.lock().fail == fail { Err(error) } else { Ok(()) }
    }

    fn check_sync(&self) -> io::Result<()> {
        self.state.lock().syncs += 1;
        self.check(Fail::SyncFull, io::ErrorKind::StorageFull.into())?;
        self.check(Fail::Sync, io::Error::other("injected I/O error"))
    }
}

/// Bytes of all files below a directory. One that is gone by the time it is looked at has none.
fn used(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        bytes += match entry.metadata() {
            Ok(about) if about.is_dir() => used(&entry.path())?,
            Ok(about) => about.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(bytes)
}

impl DiskFile for FaultyFile {
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.check(Fail::Write, io::Error::other("injected I/O error"))?;
        if position + bytes.len() as u64 > self.file.size()? {
            self.check(Fail::Full, io::ErrorKind::StorageFull.into())?;
        }
        self.state.lock().written_bytes += bytes.len() as u64;
        self.file.write_at(bytes, position)
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let end = position + buffer.len() as u64;
        let is_lost = |(path, lost): &(PathBuf, Range<u64>)| {
            *path == self.path && lost.start < end && position < lost.end
        };
        if self.state.lock().unreadable.iter().any(is_lost) {
            return Err(io::Error::other("injected unreadable sector"));
        }
        self.file.read_at(buffer, position)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.check_sync()?;
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.check_sync()?;
        self.file.sync_all()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn reserve(&self, size: u64) -> io::Result<()> {
        self.check(Fail::Full, io::ErrorKind::StorageFull.into())?;
        if self.state.lock().fail == Fail::NoReserve {
            return Ok(());
        }
        self.file.reserve(size)
    }

    fn evict(&self) -> io::Result<()> {
        self.file.evict()
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        if self.state.lock().fail == Fail::Full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(self.wrap(RealDisk.create(path)?, path))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.wrap(RealDisk.open(path)?, path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)?;
        self.state.lock().unreadable.retain(|(path, _)| path != to);
        self.state.lock().unsynced_names.push((from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn remove_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_all(path)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_directory(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        while self.state.lock().fail == Fail::HoldNames {
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.state.lock().fail == Fail::NamesFull {
            return Err(io::ErrorKind::StorageFull.into());
        }
        RealDisk.sync_directory(path)?;
        self.state.lock().unsynced_names.retain(|(_, to)| to.parent() != Some(path));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(path)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let size = self.state.lock().size;
        let Some(total) = size else { return RealDisk.space(path) };
        Ok(Space { free: total.saturating_sub(used(path)?), total })
    }
}
