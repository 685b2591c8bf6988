//! Layers: where versions of values are found.
//!
//! An [`OpenLayer`] takes changes in memory; frozen, it becomes an L0 file; compaction makes L1
//! files. A [`LayerMap`] says which layers a read has to look at, newest first.

mod cache;
mod descriptors;
mod file;
mod map;
mod open;

pub use cache::BlockCache;
pub use descriptors::{Descriptors, raise_limit};
pub use file::{Cursor, LayerFile, LayerSource, key_text, layer_object};
pub use map::LayerMap;
pub use open::{Change, OpenLayer};

use std::ops::Range;

use pgstrata_ids::Lsn;

/// Flag in the first byte of every stored value: nothing older is needed.
pub const COMPLETE: u8 = 1;
/// Flag: the value is a page as it is ([`crate::value::encode_page`]), not a change to one.
pub const PAGE: u8 = 2;

/// The flags and the value that a layer file stores as one.
pub fn split_flags(stored: &[u8]) -> (u8, &[u8]) {
    stored.split_first().map_or((0, stored), |(flags, value)| (*flags, value))
}

/// One value of a key, without its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value<'a> {
    /// End of the record that it belongs to.
    pub lsn: Lsn,
    /// Whether it is a page, not a change.
    pub is_page: bool,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Values of one key, newest first, gathered into one reused buffer.
#[derive(Debug, Default)]
pub struct Gathered {
    bytes: Vec<u8>,
    /// LSN, flags, place in `bytes`.
    values: Vec<(Lsn, u8, Range<usize>)>,
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
    pub fn push(&mut self, lsn: Lsn, flags: u8, value: &[u8]) -> bool {
        debug_assert!(!self.complete);
        debug_assert!(self.values.last().is_none_or(|(newer, _, _)| *newer >= lsn));
        let start = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self.values.push((lsn, flags, start..self.bytes.len()));
        self.complete = flags & COMPLETE != 0;
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

    fn value(&self, (lsn, flags, range): &(Lsn, u8, Range<usize>)) -> Value<'_> {
        Value { lsn: *lsn, is_page: flags & PAGE != 0, bytes: &self.bytes[range.clone()] }
    }

    /// The newest value.
    pub fn newest(&self) -> Option<Value<'_>> {
        self.values.first().map(|value| self.value(value))
    }

    /// The values, oldest first: the order in which they are applied.
    pub fn oldest_first(&self) -> impl Iterator<Item = Value<'_>> {
        self.values.iter().rev().map(|value| self.value(value))
    }
}
