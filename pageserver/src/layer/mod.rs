//! Layers: where versions of values are found.
//!
//! An [`OpenLayer`] takes changes in memory; frozen, it becomes an L0 file; compaction makes L1
//! files. A [`LayerMap`] says which layers a read has to look at, newest first.

mod cache;
mod file;
mod map;
mod open;

pub use cache::BlockCache;
pub use file::{Cursor, LayerFile, LayerSource, key_text, layer_object};
pub use map::LayerMap;
pub use open::{Change, OpenLayer};

use std::ops::Range;

use pgstrata_ids::Lsn;

/// First byte of every stored value: bit 0 says that nothing older is needed.
pub const COMPLETE: u8 = 1;

/// Values of one key, newest first, gathered into one reused buffer.
#[derive(Debug, Default)]
pub struct Gathered {
    bytes: Vec<u8>,
    values: Vec<(Lsn, Range<usize>)>,
    complete: bool,
}

impl Gathered {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.values.clear();
        self.complete = false;
    }

    /// Adds the next older value. Returns true when nothing older is needed.
    pub fn push(&mut self, lsn: Lsn, stored: &[u8]) -> bool {
        debug_assert!(!self.complete);
        debug_assert!(self.values.last().is_none_or(|(newer, _)| *newer >= lsn));
        let start = self.bytes.len();
        self.bytes.extend_from_slice(stored.get(1..).unwrap_or_default());
        self.values.push((lsn, start..self.bytes.len()));
        self.complete = stored.first().is_some_and(|flags| flags & COMPLETE != 0);
        self.complete
    }

    /// Whether the oldest value needs nothing older.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// How many values were gathered.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// True if no value was found.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The newest value.
    pub fn newest(&self) -> Option<(Lsn, &[u8])> {
        self.values.first().map(|(lsn, range)| (*lsn, &self.bytes[range.clone()]))
    }

    /// The values, oldest first: the order in which they are applied.
    pub fn oldest_first(&self) -> impl Iterator<Item = (Lsn, &[u8])> {
        self.values.iter().rev().map(|(lsn, range)| (*lsn, &self.bytes[range.clone()]))
    }
}
