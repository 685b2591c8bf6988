//! Open files of layers: a bounded number of them, however many layers there are.

use std::fs::File;
use std::io;
use std::sync::Arc;

use quick_cache::sync::Cache;

/// Descriptors for other things: connections, the object store, what is being written.
const RESERVED: u64 = 256;
/// More than this makes nothing faster.
const MOST: u64 = 16_384;

/// Open files by the number of their layer. One that is not used is closed when others are.
pub struct Descriptors {
    files: Cache<u64, Arc<File>>,
}

impl Descriptors {
    /// At most about so many at once.
    pub fn new(capacity: usize) -> Descriptors {
        Descriptors { files: Cache::new(capacity) }
    }

    /// As many as a process with this limit on descriptors can spare.
    pub fn for_limit(limit: u64) -> Descriptors {
        let spare = limit.saturating_sub(RESERVED).max(limit / 4) / 2;
        Descriptors::new(spare.clamp(8, MOST) as usize)
    }

    pub(super) fn get(
        &self,
        layer: u64,
        open: impl FnOnce() -> anyhow::Result<File>,
    ) -> anyhow::Result<Arc<File>> {
        if let Some(file) = self.files.get(&layer) {
            return Ok(file);
        }
        let file = Arc::new(open()?);
        self.files.insert(layer, Arc::clone(&file));
        Ok(file)
    }

    pub(super) fn forget(&self, layer: u64) {
        self.files.remove(&layer);
    }
}

/// Raises the process's limit on descriptors to what it may have, and says what that is.
pub fn raise_limit() -> io::Result<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    Ok(limit.current.unwrap_or(u64::MAX))
}
