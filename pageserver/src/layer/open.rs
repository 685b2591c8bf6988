//! The layer that takes changes: in memory, sharded by key, so that a reader waits at most for
//! one shard's part of one batch.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use pgstrata_ids::{Key, KeyKind, Lsn};
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::{COMPLETE, Gathered};

const SHARDS: usize = 16;
const CHUNK_SIZE: usize = 256 * 1024;

/// One change to be inserted: `value` is a range of the batch's buffer, without flags.
#[derive(Clone, Debug)]
pub struct Change {
    /// What changed.
    pub key: Key,
    /// End of the record that changed it.
    pub lsn: Lsn,
    /// [`COMPLETE`] and [`super::PAGE`].
    pub flags: u8,
    /// Where in the batch's buffer the value lies.
    pub value: std::ops::Range<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    lsn: Lsn,
    chunk: u32,
    offset: u32,
    length: u32,
}

#[derive(Debug, Default)]
struct History {
    places: Vec<Place>,
    /// Values since, and without, the last complete one.
    incomplete: u32,
}

#[derive(Debug, Default)]
struct Shard {
    histories: FxHashMap<Key, History>,
    chunks: Vec<Vec<u8>>,
}

impl Shard {
    fn insert(&mut self, key: Key, lsn: Lsn, flags: u8, value: &[u8]) -> u32 {
        let length = value.len() + 1;
        let full = self.chunks.last().is_none_or(|chunk| chunk.len() + length > chunk.capacity());
        if full {
            self.chunks.push(Vec::with_capacity(CHUNK_SIZE.max(length)));
        }
        let chunk = self.chunks.len() - 1;
        let bytes = &mut self.chunks[chunk];
        let offset = bytes.len();
        bytes.push(flags);
        bytes.extend_from_slice(value);
        let history = self.histories.entry(key).or_default();
        let (chunk, offset) = (chunk as u32, offset as u32);
        history.places.push(Place { lsn, chunk, offset, length: length as u32 });
        history.incomplete = if flags & COMPLETE != 0 { 0 } else { history.incomplete + 1 };
        history.incomplete
    }

    fn stored(&self, place: Place) -> &[u8] {
        let start = place.offset as usize;
        &self.chunks[place.chunk as usize][start..start + place.length as usize]
    }
}

/// Changes after `start_lsn`, in memory.
#[derive(Debug)]
pub struct OpenLayer {
    start_lsn: Lsn,
    end_lsn: AtomicU64,
    size: AtomicUsize,
    shards: [RwLock<Shard>; SHARDS],
    /// Keys that directory listings look for; blocks and SLRU pages are too many for an order.
    listed: Mutex<BTreeSet<Key>>,
}

fn shard_of(key: &Key) -> usize {
    let mut hasher = FxBuildHasher.build_hasher();
    hasher.write(&key.0[5..]);
    (hasher.finish() >> 60) as usize % SHARDS
}

impl OpenLayer {
    /// An empty layer for changes after `start_lsn`.
    pub fn new(start_lsn: Lsn) -> OpenLayer {
        OpenLayer {
            start_lsn,
            end_lsn: AtomicU64::new(start_lsn.0),
            size: AtomicUsize::new(0),
            shards: std::array::from_fn(|_| RwLock::default()),
            listed: Mutex::default(),
        }
    }

    /// Changes up to here came before this layer.
    pub fn start_lsn(&self) -> Lsn {
        self.start_lsn
    }

    /// Changes up to here are in this layer.
    pub fn end_lsn(&self) -> Lsn {
        Lsn(self.end_lsn.load(Ordering::Acquire))
    }

    /// Declares everything up to `lsn` inserted.
    pub fn set_end_lsn(&self, lsn: Lsn) {
        let before = self.end_lsn.swap(lsn.0, Ordering::AcqRel);
        debug_assert!(before <= lsn.0);
    }

    /// Bytes of values, roughly.
    pub fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// True if no change was inserted.
    pub fn is_empty(&self) -> bool {
        self.size() == 0
    }

    /// Inserts a batch in order. `long` gets the keys whose chain of incomplete values reached
    /// `bound` or a multiple of it.
    pub fn insert(&self, batch: &[Change], buffer: &[u8], bound: u32, long: &mut Vec<Key>) {
        let mut order: [Vec<u32>; SHARDS] = Default::default();
        let mut size = 0;
        for (at, change) in batch.iter().enumerate() {
            order[shard_of(&change.key)].push(at as u32);
            size += change.value.len() + 32;
        }
        for (shard, order) in self.shards.iter().zip(&order) {
            if order.is_empty() {
                continue;
            }
            let mut shard = shard.write();
            for &at in order {
                let change = &batch[at as usize];
                let value = &buffer[change.value.clone()];
                let chain = shard.insert(change.key, change.lsn, change.flags, value);
                if chain > 0 && chain % bound == 0 {
                    long.push(change.key);
                }
            }
        }
        let mut listed = self.listed.lock();
        for change in batch {
            let block = change.key.0[0] == KeyKind::RelBlock as u8;
            if !block && change.key.0[0] != KeyKind::SlruPage as u8 {
                listed.insert(change.key);
            }
        }
        self.size.fetch_add(size, Ordering::Relaxed);
    }

    /// Gathers values of `key` at or before `lsn`, newest first. Returns true when complete.
    pub fn gather(&self, key: &Key, lsn: Lsn, after: Lsn, into: &mut Gathered) -> bool {
        let shard = self.shards[shard_of(key)].read();
        let Some(history) = shard.histories.get(key) else { return false };
        let end = history.places.partition_point(|place| place.lsn <= lsn);
        for place in history.places[..end].iter().rev() {
            if place.lsn <= after {
                return false;
            }
            if into.push(place.lsn, shard.stored(*place)) {
                return true;
            }
        }
        false
    }

    /// Every value of `key` with `after` < LSN <= `lsn`, oldest first.
    pub fn history(&self, key: &Key, after: Lsn, lsn: Lsn, each: &mut dyn FnMut(Lsn, &[u8])) {
        let shard = self.shards[shard_of(key)].read();
        let Some(history) = shard.histories.get(key) else { return };
        for place in &history.places {
            if place.lsn > after && place.lsn <= lsn {
                each(place.lsn, shard.stored(*place));
            }
        }
    }

    /// Adds the listed keys in [`first`, `last`] to `keys`.
    pub fn list(&self, first: Key, last: Key, keys: &mut BTreeSet<Key>) {
        keys.extend(self.listed.lock().range(first..=last).copied());
    }

    /// Calls `each` with every entry by (key, LSN), values with their flags. Blocks writers.
    pub fn for_each_sorted(&self, mut each: impl FnMut(Key, Lsn, &[u8])) {
        let shards: Vec<_> = self.shards.iter().map(|shard| shard.read()).collect();
        let mut keys: Vec<(Key, usize)> = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            keys.extend(shard.histories.keys().map(|key| (*key, number)));
        }
        keys.sort_unstable();
        for (key, number) in keys {
            let shard = &shards[number];
            if let Some(history) = shard.histories.get(&key) {
                for place in &history.places {
                    each(key, place.lsn, shard.stored(*place));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgstrata_ids::{Fork, RelTag};

    fn key(block: u32) -> Key {
        Key::rel_block(RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main }, block)
    }

    fn insert(layer: &OpenLayer, block: u32, lsn: u64, complete: bool, value: &[u8]) -> Vec<Key> {
        let mut long = Vec::new();
        let flags = if complete { COMPLETE } else { 0 };
        let change = Change { key: key(block), lsn: Lsn(lsn), flags, value: 0..value.len() };
        layer.insert(&[change], value, 3, &mut long);
        long
    }

    #[test]
    fn gathers_newest_first_until_complete() {
        let layer = OpenLayer::new(Lsn(10));
        insert(&layer, 1, 20, true, b"old image");
        insert(&layer, 1, 30, true, b"image");
        insert(&layer, 1, 40, false, b"a");
        insert(&layer, 1, 50, false, b"b");
        let mut gathered = Gathered::default();
        assert!(layer.gather(&key(1), Lsn(45), Lsn(0), &mut gathered));
        let values: Vec<_> =
            gathered.oldest_first().map(|value| (value.lsn, value.bytes)).collect();
        assert_eq!(values, vec![(Lsn(30), &b"image"[..]), (Lsn(40), b"a")]);
        gathered.clear();
        assert!(!layer.gather(&key(1), Lsn(60), Lsn(40), &mut gathered));
        assert_eq!(gathered.len(), 1);
        gathered.clear();
        assert!(!layer.gather(&key(2), Lsn(60), Lsn(0), &mut gathered));
    }

    #[test]
    fn reports_long_chains() {
        let layer = OpenLayer::new(Lsn(10));
        assert!(insert(&layer, 1, 20, false, b"x").is_empty());
        assert!(insert(&layer, 1, 21, false, b"x").is_empty());
        assert_eq!(insert(&layer, 1, 22, false, b"x"), vec![key(1)]);
        assert!(insert(&layer, 1, 23, true, b"x").is_empty());
        assert!(insert(&layer, 1, 24, false, b"x").is_empty());
    }

    #[test]
    fn sorted_iteration_sees_everything() {
        let layer = OpenLayer::new(Lsn(10));
        for lsn in 20..200 {
            insert(&layer, (lsn % 7) as u32, lsn, false, &lsn.to_le_bytes());
        }
        let mut seen = Vec::new();
        layer.for_each_sorted(|key, lsn, stored| {
            assert_eq!(stored[1..], lsn.0.to_le_bytes());
            seen.push((key, lsn));
        });
        assert_eq!(seen.len(), 180);
        assert!(seen.is_sorted());
    }
}
