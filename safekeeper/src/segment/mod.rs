//! WAL segment files: plain PostgreSQL segments, full size and zero-filled before first use.
//!
//! Owns creation, naming and removal of one timeline's segments. A segment is zeroed and synced
//! before it gets its name, so that appending only overwrites: `fdatasync` then has no metadata
//! to journal and can't run out of space. One that is to be filled whole with what is committed
//! elsewhere has its space reserved only, and reads as zeros: nobody waits for its syncs.

mod flushed;
mod reader;
mod recovery;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pgstrata_env::{Disk, DiskFile};
use pgstrata_ids::{Lsn, TimelineParameters};

pub use flushed::FlushedNote;
pub use reader::SegmentReader;
pub use recovery::{RecoveredLog, last_record_before, recover};
pub(crate) use recovery::{evidence_of_more, last_nonzero, last_written};
pub use writer::LogWriter;

use crate::disk_space::DiskSpace;
use crate::latch::Latch;
use crate::storage_error::StorageError;

/// Zeros written at once when a segment is made, in bytes.
const ZERO_CHUNK: usize = 1 << 20;

/// What a segment is called that is to replace a damaged one, until it is whole and durable.
const MENDING: &str = "mending.tmp";

/// Segments waiting to be made; more are made when they are needed.
const PREPARE_QUEUE: usize = 128;

/// Threads that make them. Most of it is copying zeros into new pages of the system's cache, which one processor does at some
/// 400 MB/s; more than these leave nothing to those who receive and check.
const PREPARE_THREADS: usize = 4;

/// One timeline's segment files.
#[derive(Debug)]
pub struct SegmentFiles {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    parameters: TimelineParameters,
    /// Held while a segment is made: a zeroed file must never replace one with WAL in it. Whether none is made any more.
    making: Mutex<bool>,
    /// Segments that have their names, which a loss of power could still take away: one that is being made, and those of which
    /// that failed, after which nothing is acknowledged any more. Taken for a moment only, also while `making` is held, never the
    /// other way round.
    unsynced_names: Mutex<Vec<u64>>,
    /// Segments that are here, once they were counted.
    count: AtomicU64,
    /// They are others' by now: none is made or removed any more. Changes while `making` is held.
    is_retired: AtomicBool,
    /// What has to be left when a segment was made, if anything.
    space: Option<DiskSpace>,
}

impl SegmentFiles {
    /// The segments in `directory`, which exists.
    pub fn new(disk: Arc<dyn Disk>, directory: &Path, parameters: TimelineParameters) -> Self {
        SegmentFiles {
            disk,
            directory: directory.to_owned(),
            parameters,
            making: Mutex::new(false),
            unsynced_names: Mutex::default(),
            count: AtomicU64::new(0),
            is_retired: AtomicBool::new(false),
            space: None,
        }
    }

    /// The same, on a disk of which something is kept.
    pub fn on(self, space: DiskSpace) -> SegmentFiles {
        SegmentFiles { space: Some(space), ..self }
    }

    /// Counts the segments that are here. Those that are made and removed from then on are counted as that happens.
    pub fn count(&self) -> Result<(), StorageError> {
        self.count.store(self.numbers()?.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Bytes of the segments that are here.
    pub fn size_bytes(&self) -> u64 {
        self.count.load(Ordering::Acquire) * self.segment_size()
    }

    /// What the timeline is.
    pub fn parameters(&self) -> &TimelineParameters {
        &self.parameters
    }

    /// Segment size in bytes.
    pub fn segment_size(&self) -> u64 {
        u64::from(self.parameters.segment_size)
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file of segment `number`.
    pub fn path(&self, number: u64) -> PathBuf {
        self.directory.join(self.parameters.segment_name(number))
    }

    /// Opens segment `number`; `None` if there is no such file.
    pub fn open(&self, number: u64) -> Result<Option<Arc<dyn DiskFile>>, StorageError> {
        let path = self.path(number);
        match self.disk.open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StorageError::wrap("open", &path)(error)),
        }
    }

    /// Opens segment `number`, making it first if it doesn't exist. Its name is durable then. Also whether it was there.
    pub fn open_or_make(
        &self,
        number: u64,
        zeros: Zeros,
    ) -> Result<(Arc<dyn DiskFile>, bool), StorageError> {
        if let Some(file) = self.open_durable(number)? {
            return Ok((file, true));
        }
        let made = self.make_unless_there(number, zeros)?;
        let let_go = || StorageError::Latched("the timeline's files were let go of".into());
        made.map(|file| (file, false)).ok_or_else(let_go)
    }

    /// Makes segment `number` if it doesn't exist. Its name is durable then. Not if none is made any more.
    fn make_ahead(&self, number: u64, zeros: Zeros) -> Result<(), StorageError> {
        match self.open_durable(number)? {
            Some(_) => Ok(()),
            None => self.make_unless_there(number, zeros).map(drop),
        }
    }

    fn open_durable(&self, number: u64) -> Result<Option<Arc<dyn DiskFile>>, StorageError> {
        let opened = self.open(number)?;
        Ok(opened.filter(|_| !self.is_name_unsynced(number)))
    }

    /// Waits for whoever makes one just now. `None` if none is made any more.
    fn make_unless_there(
        &self,
        number: u64,
        zeros: Zeros,
    ) -> Result<Option<Arc<dyn DiskFile>>, StorageError> {
        let is_let_go = self.making.lock();
        if *is_let_go {
            return Ok(None);
        }
        self.check_retired()?;
        if let Some(file) = self.open(number)? {
            // Whoever gave it the name has let go of `making`, and did not get to the end.
            return match self.is_name_unsynced(number) {
                false => Ok(Some(file)),
                true => Err(StorageError::Latched(format!(
                    "the name of {} could not be made durable",
                    self.path(number).display()
                ))),
            };
        }
        let temporary = self.directory.join("zeroed.tmp");
        let made = self.make(number, zeros, &temporary);
        if made.is_err() {
            // Best effort: what matters is the first error, and start-up removes leftovers.
            let _ = self.disk.remove(&temporary);
        }
        made.map(Some)
    }

    /// Makes no segment any more, from when this returns: whoever opens the timeline next has its files for himself. One that
    /// is being made is waited for.
    pub fn let_go(&self) {
        *self.making.lock() = true;
    }

    /// Nothing is made or removed through this any more, on return: a zeroed segment that is made ahead must not take the
    /// place of one that whoever mends the log has put there.
    pub fn retire(&self) {
        let _making = self.making.lock();
        self.is_retired.store(true, Ordering::Release);
    }

    fn check_retired(&self) -> Result<(), StorageError> {
        match self.is_retired.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(StorageError::DamagedLog {
                path: self.directory.clone(),
                reason: "the timeline is being mended".to_owned(),
            }),
        }
    }

    /// Puts all of a segment's bytes in the place of what is there, durably on return: after a crash it is the one or the
    /// other, whole.
    pub fn replace(&self, number: u64, bytes: &[u8]) -> Result<(), StorageError> {
        let temporary = self.directory.join(MENDING);
        if let Some(space) = &self.space {
            space.check_room(self.segment_size(), &temporary)?;
        }
        let put = self.put(&temporary, number, bytes);
        if put.is_err() {
            // Best effort: what matters is the first error, and start-up removes leftovers.
            let _ = self.disk.remove(&temporary);
        }
        put?;
        self.sync_directory()
    }

    fn put(&self, temporary: &Path, number: u64, bytes: &[u8]) -> Result<(), StorageError> {
        let wrap = || StorageError::wrap("write", temporary);
        match self.disk.remove(temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(wrap()(error));
            }
            _ => {}
        }
        let file = self.disk.create(temporary).map_err(wrap())?;
        file.reserve(bytes.len() as u64).map_err(wrap())?;
        file.write_at(bytes, 0).map_err(wrap())?;
        file.sync_all().map_err(StorageError::unsynced("sync", temporary))?;
        let path = self.path(number);
        self.disk.rename(temporary, &path).map_err(StorageError::unsynced("name", &path))
    }

    fn is_name_unsynced(&self, number: u64) -> bool {
        self.unsynced_names.lock().contains(&number)
    }

    /// It is durable, or there is none.
    fn name_is_settled(&self, number: u64) {
        self.unsynced_names.lock().retain(|&unsynced| unsynced != number);
    }

    fn make(
        &self,
        number: u64,
        zeros: Zeros,
        temporary: &Path,
    ) -> Result<Arc<dyn DiskFile>, StorageError> {
        let wrap = || StorageError::wrap("make WAL segment", temporary);
        match self.disk.remove(temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(wrap()(error));
            }
            _ => {}
        }
        if let Some(space) = &self.space {
            space.check_room(self.segment_size(), temporary)?;
        }
        let file = self.disk.create(temporary).map_err(wrap())?;
        file.reserve(self.segment_size()).map_err(wrap())?;
        let size = self.segment_size();
        // Not every file system can reserve.
        if zeros == Zeros::Written || file.size().map_err(wrap())? != size {
            let zeros = vec![0; ZERO_CHUNK.min(size as usize)];
            for at in (0..size).step_by(ZERO_CHUNK) {
                file.write_at(&zeros, at).map_err(wrap())?;
            }
        }
        file.sync_all().map_err(wrap())?;
        let path = self.path(number);
        // Before the name can be seen, so that nobody takes it for a durable one.
        self.unsynced_names.lock().push(number);
        let renamed = self.disk.rename(temporary, &path);
        if let Err(error) = renamed {
            self.name_is_settled(number);
            return Err(StorageError::wrap("name", &path)(error));
        }
        self.count.fetch_add(1, Ordering::AcqRel);
        self.sync_directory()?;
        self.name_is_settled(number);
        if let Some(space) = &self.space {
            space.look();
        }
        Ok(file)
    }

    pub(crate) fn sync_directory(&self) -> Result<(), StorageError> {
        let wrap = StorageError::unsynced("sync directory", &self.directory);
        self.disk.sync_directory(&self.directory).map_err(wrap)
    }

    /// Numbers of all segments here, rising.
    pub fn numbers(&self) -> Result<Vec<u64>, StorageError> {
        let names = self.disk.list(&self.directory);
        let names = names.map_err(StorageError::wrap("list", &self.directory))?;
        Ok(names.iter().filter_map(|name| self.parameters.segment_number(name)).collect())
    }

    /// Removes every segment for which `doomed` holds, the last first, durably.
    pub fn remove(&self, doomed: impl Fn(u64) -> bool) -> Result<u64, StorageError> {
        let _making = self.making.lock();
        self.check_retired()?;
        let mut removed = 0;
        // Those that are removed before they were counted are not counted.
        let less = |count: u64| count.checked_sub(1);
        for number in self.numbers()?.into_iter().rev().filter(|&number| doomed(number)) {
            let path = self.path(number);
            self.disk.remove(&path).map_err(StorageError::wrap("remove", &path))?;
            self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).ok();
            removed += 1;
        }
        if removed > 0 {
            self.sync_directory()?;
        }
        Ok(removed)
    }

    pub(crate) fn number_of(&self, lsn: Lsn) -> u64 {
        lsn.segment_number(self.segment_size())
    }
}

/// How a segment that is made comes to be full of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// They are written: what takes their place later is synced without more.
    Written,
    /// Its space is reserved: half of what would be written, where all of it is filled at once.
    Reserved,
}

/// A segment that is to be made, by its number.
type Request = (Weak<SegmentFiles>, u64, Zeros);

/// Asks for segments ahead of their use.
#[derive(Clone, Debug)]
pub struct Preparer(SyncSender<Request>);

impl Preparer {
    /// Starts the threads that make them; they end when the last handle is dropped.
    pub fn start(latch: Latch) -> std::io::Result<Preparer> {
        let (preparer, preparations) = Preparer::queue(latch);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores.clamp(2, PREPARE_THREADS) {
            let preparations = preparations.clone();
            std::thread::Builder::new()
                .name("segments".into())
                .spawn(move || preparations.run())?;
        }
        Ok(preparer)
    }

    /// The same without the threads: whoever has the other end makes them. A failed write or sync throws `latch`; no
    /// segment is begun once it is thrown.
    pub fn queue(latch: Latch) -> (Preparer, Preparations) {
        let (sender, requests) = sync_channel(PREPARE_QUEUE);
        (Preparer(sender), Preparations { requests: Arc::new(Mutex::new(requests)), latch })
    }

    /// Makes segment `number` soon. A full queue is no harm: the writer makes it then.
    pub fn request(&self, files: &Arc<SegmentFiles>, number: u64, zeros: Zeros) {
        let _ = self.0.try_send((Arc::downgrade(files), number, zeros));
    }
}

/// Segments that are to be made; see [`Preparer::queue`].
#[derive(Clone, Debug)]
pub struct Preparations {
    /// Held by the one who waits for the next, and not while anything is made.
    requests: Arc<Mutex<Receiver<Request>>>,
    latch: Latch,
}

impl Preparations {
    /// Makes what is asked for, until nobody is left who could ask.
    fn run(self) {
        loop {
            let Ok((files, number, zeros)) = self.requests.lock().recv() else { return };
            self.make(&files, number, zeros);
        }
    }

    /// Makes what was asked for first. False if there is nothing.
    pub fn step(&self) -> bool {
        let next = self.requests.lock().try_recv();
        match next {
            Ok((files, number, zeros)) => {
                self.make(&files, number, zeros);
                true
            }
            Err(_) => false,
        }
    }

    fn make(&self, files: &Weak<SegmentFiles>, number: u64, zeros: Zeros) {
        let Some(files) = files.upgrade() else { return };
        if self.latch.reason().is_some() {
            return;
        }
        match files.make_ahead(number, zeros) {
            Ok(()) => {}
            // Whoever mends it makes what it needs.
            Err(StorageError::DamagedLog { .. }) => {}
            // Whoever needs the segment meets the full disk again, and refuses what needs it.
            Err(error) if error.is_for_want_of_space() => {
                if let Some(space) = &files.space {
                    space.note(&error);
                }
                tracing::debug!(%error, "a WAL segment is not made ahead of its use");
            }
            // Made again, the segment could seem to be well on a disk that drops what it is given.
            Err(error) => self.latch.throw(&error.to_string()),
        }
    }
}
