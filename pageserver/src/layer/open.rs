//! The layer that takes changes: in memory, sharded by key, so that a reader waits at most for
//! one shard's part of one batch.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pgstrata_ids::{Key, KeyKind, Lsn};
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::{COMPLETE, Gathered};

use crate::lock::{Mutex, RwLock};

const SHARDS: usize = 16;
const CHUNK_SIZE: usize = 512 * 1024;
/// A batch with this many bytes of values becomes a chunk as it is; smaller ones share chunks.
const OWN_CHUNK: usize = 128 * 1024;

/// One change to be inserted.
#[derive(Clone, Debug)]
pub struct Change {
    /// What changed.
    pub key: Key,
    /// End of the record that changed it.
    pub lsn: Lsn,
    /// [`COMPLETE`] and [`super::PAGE`].
    pub flags: u8,
    /// Where in the batch's values it lies.
    pub value: std::ops::Range<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    lsn: Lsn,
    chunk: u32,
    offset: u32,
    length: u32,
    flags: u8,
}

#[derive(Debug, Default)]
struct History {
    places: Vec<Place>,
    /// Values since, and without, the last complete one.
    incomplete: u32,
}

type Shard = FxHashMap<Key, History>;

/// Chunks of layers that are gone, for those to come: memory given back to the system would have to be cleared by it
/// again, which costs more than filling it.
static SPARE_CHUNKS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
/// How many are kept: as much as a layer of the usual size has.
const SPARE_CHUNKS_KEPT: usize = (64 << 20) / CHUNK_SIZE;

fn new_chunk() -> Vec<u8> {
    SPARE_CHUNKS.lock().pop().unwrap_or_else(|| Vec::with_capacity(CHUNK_SIZE))
}

/// The values' bytes.
#[derive(Debug, Default)]
struct Chunks {
    list: Vec<Vec<u8>>,
    /// The chunk that small batches are appended to.
    shared: Option<usize>,
}

impl Chunks {
    /// Takes a batch's values. Returns the chunk and the offset that its first byte has now.
    fn take(&mut self, values: &mut Vec<u8>) -> (u32, u32) {
        if values.len() >= OWN_CHUNK {
            self.list.push(std::mem::replace(values, new_chunk()));
            return ((self.list.len() - 1) as u32, 0);
        }
        let fits = |chunk: &Vec<u8>| chunk.capacity() - chunk.len() >= values.len();
        let shared = match self.shared.filter(|&shared| fits(&self.list[shared])) {
            Some(shared) => shared,
            None => {
                self.list.push(new_chunk());
                *self.shared.insert(self.list.len() - 1)
            }
        };
        let offset = self.list[shared].len();
        self.list[shared].extend_from_slice(values);
        values.clear();
        (shared as u32, offset as u32)
    }

    fn value(&self, place: Place) -> &[u8] {
        let start = place.offset as usize;
        &self.list[place.chunk as usize][start..start + place.length as usize]
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        let mut spare = SPARE_CHUNKS.lock();
        for mut chunk in self.list.drain(..) {
            if spare.len() < SPARE_CHUNKS_KEPT && chunk.capacity() == CHUNK_SIZE {
                chunk.clear();
                spare.push(chunk);
            }
        }
    }
}

/// Changes after `start_lsn`, in memory.
#[derive(Debug)]
pub struct OpenLayer {
    start_lsn: Lsn,
    end_lsn: AtomicU64,
    size: AtomicUsize,
    /// Locked for writing only while a batch's bytes are taken, before its places are known to
    /// anybody; and never while waiting for a shard.
    chunks: RwLock<Chunks>,
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
            chunks: RwLock::default(),
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

    /// Inserts a batch in order, and leaves `values` empty. `long` gets the keys whose chain of
    /// incomplete values reached `bound` or a multiple of it.
    pub fn insert(&self, batch: &[Change], values: &mut Vec<u8>, bound: u32, long: &mut Vec<Key>) {
        let (chunk, base) = self.chunks.write().take(values);
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
                let Change { key, lsn, flags, value } = &batch[at as usize];
                let history = shard.entry(*key).or_default();
                let offset = base + value.start as u32;
                let (lsn, flags, length) = (*lsn, *flags, value.len() as u32);
                history.places.push(Place { lsn, chunk, offset, length, flags });
                let complete = flags & COMPLETE != 0;
                history.incomplete = if complete { 0 } else { history.incomplete + 1 };
                if history.incomplete > 0 && history.incomplete % bound == 0 {
                    long.push(*key);
                }
            }
        }
        let mut listed = self.listed.lock();
        let mut last = None;
        for Change { key, .. } in batch {
            let page = [KeyKind::RelBlock as u8, KeyKind::SlruPage as u8].contains(&key.0[0]);
            if !page && last != Some(key) {
                listed.insert(*key);
                last = Some(key);
            }
        }
        self.size.fetch_add(size, Ordering::Relaxed);
    }

    /// Gathers values of `key` at or before `lsn`, newest first. Returns true when complete.
    pub fn gather(&self, key: &Key, lsn: Lsn, after: Lsn, into: &mut Gathered) -> bool {
        let shard = self.shards[shard_of(key)].read();
        let Some(history) = shard.get(key) else { return false };
        let chunks = self.chunks.read();
        let end = history.places.partition_point(|place| place.lsn <= lsn);
        for place in history.places[..end].iter().rev() {
            if place.lsn <= after {
                return false;
            }
            if into.push(place.lsn, place.flags, chunks.value(*place)) {
                return true;
            }
        }
        false
    }

    /// Every value of `key` with `after` < LSN <= `lsn`, oldest first, without flags.
    pub fn history(&self, key: &Key, after: Lsn, lsn: Lsn, each: &mut dyn FnMut(Lsn, &[u8])) {
        let shard = self.shards[shard_of(key)].read();
        let Some(history) = shard.get(key) else { return };
        let chunks = self.chunks.read();
        for place in &history.places {
            if place.lsn > after && place.lsn <= lsn {
                each(place.lsn, chunks.value(*place));
            }
        }
    }

    /// Adds the listed keys in [`first`, `last`] to `keys`.
    pub fn list(&self, first: Key, last: Key, keys: &mut BTreeSet<Key>) {
        keys.extend(self.listed.lock().range(first..=last).copied());
    }

    /// Calls `each` with every entry by (key, LSN): flags and value. Blocks writers.
    pub fn for_each_sorted(&self, mut each: impl FnMut(Key, Lsn, u8, &[u8])) {
        let shards: Vec<_> = self.shards.iter().map(|shard| shard.read()).collect();
        let chunks = self.chunks.read();
        let mut histories: Vec<(Key, &History)> = Vec::new();
        for shard in &shards {
            histories.extend(shard.iter().map(|(key, history)| (*key, history)));
        }
        histories.sort_unstable_by_key(|(key, _)| *key);
        for (key, history) in histories {
            for place in &history.places {
                each(key, place.lsn, place.flags, chunks.value(*place));
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
        layer.insert(&[change], &mut value.to_vec(), 3, &mut long);
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
        layer.for_each_sorted(|key, lsn, flags, value| {
            assert_eq!((flags, value), (0, &lsn.0.to_le_bytes()[..]));
            seen.push((key, lsn));
        });
        assert_eq!(seen.len(), 180);
        assert!(seen.is_sorted());
    }
    #[test]
    fn values_lie_where_they_were_put() {
        // Small batches share chunks, large ones become chunks, and chunks are used again.
        for _ in 0..3 {
            let layer = OpenLayer::new(Lsn(1));
            let mut values = Vec::new();
            let sizes: Vec<usize> = (0..200).map(|n: usize| n * n * 7919 % 60_000).collect();
            for (n, batch) in sizes.chunks(3 + sizes.len() % 4).enumerate() {
                let mut changes = Vec::new();
                for (m, size) in batch.iter().enumerate() {
                    let start = values.len();
                    values.resize(start + size, (n * 10 + m) as u8);
                    let (key, lsn) = (key(m as u32), Lsn(2 + n as u64));
                    changes.push(Change { key, lsn, flags: 0, value: start..values.len() });
                }
                layer.insert(&changes, &mut values, 1000, &mut Vec::new());
                assert!(values.is_empty());
            }
            let mut seen = 0;
            layer.for_each_sorted(|key, lsn, _, value| {
                let (n, m) = (lsn.0 as usize - 2, key.e() as usize);
                assert_eq!(value.len(), sizes[n * (3 + sizes.len() % 4) + m]);
                assert!(value.iter().all(|&byte| byte == (n * 10 + m) as u8));
                seen += 1;
            });
            assert_eq!(seen, sizes.len());
        }
    }
}
