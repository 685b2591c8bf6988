//! A disk in memory that loses in a loss of power whatever it may.
//!
//! What it promises is what [`DiskFile`] and [`Disk`] say, and POSIX: sectors of 512 bytes are written whole or not at all,
//! and what was not synced is on the device or not, each sector for itself, as it was at any time since the last sync. A
//! file's size lasts from `sync_all` on, names from `sync_directory` on. A change of a name is done whole or not at all, and
//! what a name is of may have lost what it had. After a failed sync nobody writes what it left out, though it can still be
//! read until it is [evicted](DiskFile::evict), as on Linux.
//!
//! Everything is decided by numbers of a seed. It is meant for one thread.

mod contents;
mod names;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_env::{Disk, DiskFile, Space};

use self::contents::{Contents, Fate};
use self::names::Names;
use crate::Rng;

/// See the module. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    files: Vec<Contents>,
    names: Names,
    /// How often it was started: files that were opened before are of no use.
    life: u64,
    operations: u64,
    /// After so many operations nothing is done any more.
    stops_at: Option<u64>,
    /// That many syncs from now on, one fails.
    failing_sync: Option<u64>,
    is_full: bool,
}

#[derive(Debug)]
struct SimFile {
    state: Arc<Mutex<State>>,
    index: usize,
    life: u64,
}

fn failed(why: &str) -> io::Error {
    io::Error::other(format!("simulated: {why}"))
}

impl State {
    fn check_stopped(&self) -> io::Result<()> {
        match self.stops_at.is_some_and(|until| self.operations >= until) {
            true => Err(failed("the power is gone, or the process")),
            false => Ok(()),
        }
    }

    /// Something that changes what is there.
    fn operate(&mut self) -> io::Result<()> {
        self.check_stopped()?;
        self.operations += 1;
        Ok(())
    }

    fn check_space(&self) -> io::Result<()> {
        if self.is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// True if this sync is the one that fails.
    fn fails_sync(&mut self) -> bool {
        match &mut self.failing_sync {
            Some(0) => {
                self.failing_sync = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn sync(&mut self, index: usize, with_size: bool) -> io::Result<()> {
        self.operate()?;
        if self.fails_sync() {
            self.files[index].sync_badly(&mut self.rng);
            return Err(failed("I/O error"));
        }
        self.files[index].sync(with_size);
        Ok(())
    }
}

impl SimDisk {
    /// An empty one.
    pub fn new(seed: u64) -> SimDisk {
        let state = State {
            rng: Rng::new(seed),
            files: Vec::new(),
            names: Names::new(),
            life: 0,
            operations: 0,
            stops_at: None,
            failing_sync: None,
            is_full: false,
        };
        SimDisk { state: Arc::new(Mutex::new(state)) }
    }

    /// The power goes, or the process ends, in the middle of what is done: so many operations are done, and all later ones
    /// fail, until [`SimDisk::lose_power`] or [`SimDisk::end_process`] says what is left.
    pub fn stop_after(&self, operations: u64) {
        let mut state = self.state.lock();
        state.stops_at = Some(state.operations + operations);
    }

    /// Whether it has stopped.
    pub fn has_stopped(&self) -> bool {
        self.state.lock().check_stopped().is_err()
    }

    /// So many syncs of contents are done, and then one fails.
    pub fn fail_sync_after(&self, syncs: u64) {
        self.state.lock().failing_sync = Some(syncs);
    }

    /// Whether there is no space to create or extend anything.
    pub fn set_full(&self, is_full: bool) {
        self.state.lock().is_full = is_full;
    }

    /// How much was done to it.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Bytes in memory, about.
    pub fn footprint(&self) -> usize {
        self.state.lock().files.iter().map(Contents::footprint).sum()
    }

    /// Everybody who had files open is gone, and the system goes on.
    pub fn end_process(&self) {
        let mut state = self.state.lock();
        state.life += 1;
        state.stops_at = None;
    }

    /// The power is gone, and comes back. Files that were open are of no use from now on.
    pub fn lose_power(&self) {
        let mut state = self.state.lock();
        let State { rng, files, names, .. } = &mut *state;
        let fates = [Fate::Lost, Fate::Kept, Fate::Each, Fate::Beginning];
        for file in files {
            let fate = fates[rng.index(fates.len())];
            file.lose_power(fate, rng);
        }
        names.lose_power(rng);
        state.life += 1;
        state.stops_at = None;
        state.failing_sync = None;
    }

    /// A bit of a file rots.
    pub fn rot(&self, path: &Path, position: u64) -> io::Result<()> {
        let bit = self.state.lock().rng.below(8) as u8;
        self.flip(path, position, bit)
    }

    /// A certain one.
    pub fn flip(&self, path: &Path, position: u64, bit: u8) -> io::Result<()> {
        let mut state = self.state.lock();
        let index = state.names.file(path)?;
        state.files[index].rot(position, bit);
        Ok(())
    }

    /// A sector of a file can't be read any more, until something is written there.
    pub fn lose_sector(&self, path: &Path, position: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let index = state.names.file(path)?;
        state.files[index].lose_sector(position);
        Ok(())
    }

    /// What a file has from `size` on is gone.
    pub fn shorten(&self, path: &Path, size: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let index = state.names.file(path)?;
        state.files[index].shorten(size);
        Ok(())
    }

    /// A file is gone, durably.
    pub fn lose(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.names.file(path)?;
        state.names.lose(path)
    }

    /// All of a file, as it is seen.
    pub fn read_all(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.state.lock();
        let file = &state.files[state.names.file(path)?];
        let mut bytes = vec![0; file.size() as usize];
        file.read(&mut bytes, 0);
        Ok(bytes)
    }

    fn handle(&self, index: usize, life: u64) -> Arc<dyn DiskFile> {
        Arc::new(SimFile { state: Arc::clone(&self.state), index, life })
    }
}

impl SimFile {
    fn with<T>(&self, act: impl FnOnce(&mut State, usize) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state.lock();
        if state.life != self.life {
            return Err(failed("the file was opened before the crash"));
        }
        act(&mut state, self.index)
    }
}

impl DiskFile for SimFile {
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.with(|state, index| {
            state.operate()?;
            if position + bytes.len() as u64 > state.files[index].size() {
                state.check_space()?;
            }
            state.files[index].write(bytes, position, &mut state.rng);
            Ok(())
        })
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.with(|state, index| {
            state.check_stopped()?;
            if state.files[index].is_lost(position, buffer.len()) {
                return Err(failed("a sector can't be read"));
            }
            Ok(state.files[index].read(buffer, position))
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|state, index| state.sync(index, false))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.with(|state, index| state.sync(index, true))
    }

    fn size(&self) -> io::Result<u64> {
        self.with(|state, index| Ok(state.files[index].size()))
    }

    fn reserve(&self, size: u64) -> io::Result<()> {
        self.with(|state, index| {
            state.operate()?;
            if size > state.files[index].size() {
                state.check_space()?;
            }
            state.files[index].reserve(size);
            Ok(())
        })
    }

    fn evict(&self) -> io::Result<()> {
        self.with(|state, index| {
            state.check_stopped()?;
            state.files[index].evict();
            Ok(())
        })
    }
}

impl Disk for SimDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state.lock();
        state.operate()?;
        state.check_space()?;
        let index = state.files.len();
        state.names.create(path, index)?;
        state.files.push(Contents::default());
        Ok(self.handle(index, state.life))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.state.lock();
        state.check_stopped()?;
        Ok(self.handle(state.names.file(path)?, state.life))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.operate()?;
        state.names.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_stopped()?;
        state.names.remove(path)?;
        state.operate()
    }

    fn remove_all(&self, path: &Path) -> io::Result<()> {
        for name in self.list(path)? {
            let inside = path.join(name);
            let is_directory = self.state.lock().names.directory(&inside).is_ok();
            match is_directory {
                true => self.remove_all(&inside)?,
                false => self.remove(&inside)?,
            }
        }
        let mut state = self.state.lock();
        state.check_stopped()?;
        state.names.remove_directory(path)?;
        state.operate()
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.operate()?;
        state.names.create_directory(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.operate()?;
        let directory = state.names.directory(path)?;
        state.names.sync(directory);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.state.lock();
        state.check_stopped()?;
        state.names.list(path)
    }

    /// It has no size: where space ends, it ends at once.
    fn space(&self, _: &Path) -> io::Result<Space> {
        self.state.lock().check_stopped()?;
        Ok(Space::default())
    }
}
