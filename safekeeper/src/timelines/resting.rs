//! Which timelines are at rest, as far as that is on disk: the next start does not open them.
//!
//! `resting` has a summary of each, and is replaced whole. `awake` is a directory with an empty file for each timeline that was
//! opened since, made durable before that: what `resting` says of it counts no longer. So it is never said of a timeline that
//! was written to that it rests, and to open one costs one small sync and not the whole list.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_env::{Disk, is_disk_full, replace_file};
use pgstrata_format::resting::{TimelineSummary, decode_resting, encode_resting};
use pgstrata_ids::NodeId;

use super::TimelineKey;
use crate::storage_error::StorageError;

/// Largest list that is read, in bytes: of as many timelines as there may be, with three members each.
const MAX_SIZE: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct RestingFiles {
    disk: Arc<dyn Disk>,
    node: NodeId,
    directory: PathBuf,
    /// Held while the list is written or taken away: that happens now and then, and whoever opens a timeline waits for it only
    /// on a full disk.
    writing: Mutex<()>,
}

/// What was found at a start.
#[derive(Debug, Default)]
pub struct Found {
    /// Those that rest.
    pub resting: Vec<TimelineSummary>,
    /// Files in `awake`: they go once there is a list without the timelines that they are about.
    pub awake: BTreeSet<String>,
}

fn mark_of(key: TimelineKey) -> String {
    format!("{}-{}", key.0, key.1)
}

impl RestingFiles {
    /// Those in a safekeeper's `directory`. A list that can't be used is as good as none.
    pub fn open(
        disk: Arc<dyn Disk>,
        directory: &Path,
        node: NodeId,
    ) -> Result<(RestingFiles, Found), StorageError> {
        let directory = directory.to_owned();
        let files = RestingFiles { disk, node, directory, writing: Mutex::default() };
        let awake = match files.disk.list(&files.awake()) {
            Ok(names) => names.into_iter().collect(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                files.make_awake()?;
                BTreeSet::new()
            }
            Err(error) => return Err(StorageError::wrap("list", &files.awake())(error)),
        };
        let mut resting = files.read().unwrap_or_else(|error| {
            tracing::warn!(%error, "what rests is not known: all timelines are opened");
            Vec::new()
        });
        let key = |one: &TimelineSummary| (one.parameters.tenant, one.parameters.timeline);
        resting.retain(|one| !awake.contains(&mark_of(key(one))));
        Ok((files, Found { resting, awake }))
    }

    fn path(&self) -> PathBuf {
        self.directory.join("resting")
    }

    fn awake(&self) -> PathBuf {
        self.directory.join("awake")
    }

    fn read(&self) -> Result<Vec<TimelineSummary>, StorageError> {
        let path = self.path();
        let file = match self.disk.open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(StorageError::wrap("open", &path))?,
        };
        let size = file.size().map_err(StorageError::wrap("measure", &path))?;
        let mut bytes = vec![0; size.min(MAX_SIZE) as usize];
        file.read_at(&mut bytes, 0).map_err(StorageError::wrap("read", &path))?;
        decode_resting(&bytes, self.node)
            .map_err(|error| StorageError::Damaged { path, reason: error.to_string() })
    }

    /// A timeline is about to be opened: durable on return.
    pub fn wake(&self, key: TimelineKey) -> Result<(), StorageError> {
        let awake = self.awake();
        match self.mark(&awake.join(mark_of(key))) {
            Ok(()) => {
                self.disk.sync_directory(&awake).map_err(StorageError::unsynced("sync", &awake))
            }
            // That needs no space. All are opened at the next start then, unless they have come to rest anew.
            Err(error) if is_disk_full(&error) => self.forget_all(),
            Err(error) => Err(StorageError::wrap("mark as open in", &awake)(error)),
        }
    }

    /// Before there is anybody who could put a mark into a directory that another one has made and not made durable yet. On
    /// a disk that is full marks are done without.
    fn make_awake(&self) -> Result<(), StorageError> {
        let awake = self.awake();
        match self.disk.create_directory(&awake) {
            Err(error) if is_disk_full(&error) => Ok(()),
            made => {
                made.map_err(StorageError::wrap("create directory", &awake))?;
                let unsynced = StorageError::unsynced("sync directory", &self.directory);
                self.disk.sync_directory(&self.directory).map_err(unsynced)
            }
        }
    }

    fn mark(&self, path: &Path) -> std::io::Result<()> {
        let create = || match self.disk.create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other.map(|_| ()),
        };
        match create() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.disk.create_directory(&self.awake())?;
                self.disk.sync_directory(&self.directory)?;
                create()
            }
            other => other,
        }
    }

    fn forget_all(&self) -> Result<(), StorageError> {
        let _writing = self.writing.lock();
        let path = self.path();
        match self.disk.remove(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => other.map_err(StorageError::wrap("remove", &path))?,
        }
        let unsynced = StorageError::unsynced("sync directory", &self.directory);
        self.disk.sync_directory(&self.directory).map_err(unsynced)
    }

    /// Makes a list of what `resting` gives then: those that are not open, and not about to be.
    pub fn store(
        &self,
        resting: impl FnOnce() -> Vec<Arc<TimelineSummary>>,
    ) -> Result<(), StorageError> {
        let _writing = self.writing.lock();
        let (resting, path) = (resting(), self.path());
        let bytes = encode_resting(self.node, resting.iter().map(Arc::as_ref));
        replace_file(self.disk.as_ref(), &path, &bytes)
            .map_err(StorageError::wrap("replace", &path))
    }

    /// The list has this timeline, and counts for it from now on. It need not be durable: a mark too many costs a look.
    pub fn has_come_to_rest(&self, key: TimelineKey) {
        self.remove_mark(&mark_of(key));
    }

    /// Removes marks that are of no use any more.
    pub fn remove_marks(&self, marks: &BTreeSet<String>) {
        marks.iter().for_each(|mark| self.remove_mark(mark));
    }

    fn remove_mark(&self, mark: &str) {
        let path = self.awake().join(mark);
        if let Err(error) = self.disk.remove(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(file = %path.display(), %error, "can't be removed");
        }
    }
}
