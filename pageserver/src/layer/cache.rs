//! Unpacked blocks of layer files, shared by every reader, bounded in bytes.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

/// Layer number and block number.
type BlockId = (u64, u32);

#[derive(Clone)]
struct BySize;

impl Weighter<BlockId, Arc<Vec<u8>>> for BySize {
    fn weight(&self, _: &BlockId, block: &Arc<Vec<u8>>) -> u64 {
        block.len() as u64 + 64
    }
}

/// A cache of unpacked blocks.
pub struct BlockCache {
    blocks: Cache<BlockId, Arc<Vec<u8>>, BySize>,
}

impl BlockCache {
    /// A cache of at most `capacity` bytes.
    pub fn new(capacity: u64) -> BlockCache {
        BlockCache { blocks: Cache::with_weighter((capacity / 16384) as usize, capacity, BySize) }
    }

    pub(super) fn get(&self, layer: u64, block: u32) -> Option<Arc<Vec<u8>>> {
        self.blocks.get(&(layer, block))
    }

    pub(super) fn insert(&self, layer: u64, block: u32, bytes: Arc<Vec<u8>>) {
        self.blocks.insert((layer, block), bytes);
    }

    /// Bytes held now.
    pub fn size(&self) -> u64 {
        self.blocks.weight()
    }
}
