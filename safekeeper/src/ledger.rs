//! Which timelines this safekeeper has taken part in, in this life of its directory.
//!
//! One whose directory is gone has forgotten what it promised and stored, and must not be begun anew under the same
//! incarnation: it would vote with an empty log.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_env::{Disk, replace_file};
use pgstrata_format::safekeeper::{MAX_TIMELINES, decode_timelines, encode_timelines};

use crate::storage_error::StorageError;
use crate::timelines::TimelineKey;

/// Largest file that is read, in bytes.
const MAX_SIZE: u64 = 64 + MAX_TIMELINES as u64 * 32;

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    entries: Mutex<BTreeSet<TimelineKey>>,
}

impl Ledger {
    /// That of a safekeeper's `directory`. If it must be there and is not, what was in it is forgotten with it.
    pub fn open(
        disk: Arc<dyn Disk>,
        directory: &Path,
        must_be_there: bool,
    ) -> Result<Ledger, StorageError> {
        let path = directory.join("timelines");
        let entries = match disk.open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_be_there => {
                BTreeSet::new()
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let reason =
                    "it is gone, and with it what this safekeeper took part in: move the whole \
                              directory away, and it begins anew with an empty one"
                        .to_owned();
                return Err(StorageError::Damaged { path, reason });
            }
            Err(error) => return Err(StorageError::wrap("open", &path)(error)),
            Ok(file) => {
                let size = file.size().map_err(StorageError::wrap("measure", &path))?;
                let mut bytes = vec![0; size.min(MAX_SIZE) as usize];
                file.read_at(&mut bytes, 0).map_err(StorageError::wrap("read", &path))?;
                decode_timelines(&bytes).map_err(|error| StorageError::Damaged {
                    path: path.clone(),
                    reason: error.to_string(),
                })?
            }
        };
        Ok(Ledger { disk, path, entries: Mutex::new(entries) })
    }

    /// All of them.
    pub fn entries(&self) -> Vec<TimelineKey> {
        self.entries.lock().iter().copied().collect()
    }

    /// Whether it has taken part in this one.
    pub fn has(&self, key: TimelineKey) -> bool {
        self.entries.lock().contains(&key)
    }

    /// Forgets one that others keep by now, durably on return.
    pub fn remove(&self, key: TimelineKey) -> Result<(), StorageError> {
        let mut entries = self.entries.lock();
        let mut fewer = entries.clone();
        if !fewer.remove(&key) {
            return Ok(());
        }
        replace_file(self.disk.as_ref(), &self.path, &encode_timelines(&fewer))
            .map_err(StorageError::wrap("replace", &self.path))?;
        *entries = fewer;
        Ok(())
    }

    /// Notes that it takes part in these, durably on return.
    pub fn add(&self, keys: impl IntoIterator<Item = TimelineKey>) -> Result<(), StorageError> {
        // Held over the write: what is in memory is what is on disk, and it happens once for each timeline.
        let mut entries = self.entries.lock();
        let mut more = entries.clone();
        more.extend(keys);
        if more.len() == entries.len() {
            return Ok(());
        }
        replace_file(self.disk.as_ref(), &self.path, &encode_timelines(&more))
            .map_err(StorageError::wrap("replace", &self.path))?;
        *entries = more;
        Ok(())
    }
}
