//! What is in one file: as whoever reads it sees it, and as the device has it.

use std::collections::BTreeSet;

use crate::Rng;

/// What a device writes whole or not at all, in bytes.
pub const SECTOR: usize = 512;

/// Bytes that are kept together.
const BLOCK: usize = 4096;

const SECTORS: usize = BLOCK / SECTOR;

/// What becomes of unsynced sectors in a loss of power.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// None had reached the device.
    Lost,
    /// All had.
    Kept,
    /// Each for itself.
    Each,
    /// Those up to a place in the file had.
    Beginning,
}

#[derive(Clone, Debug)]
struct Block {
    seen: [u8; BLOCK],
    /// As on the device, where that differs, or may.
    device: Option<Box<[u8; BLOCK]>>,
    /// Sectors that a sync would write.
    dirty: u8,
    /// Sectors that a failed sync did not write, and no later one will.
    forgotten: u8,
}

/// See the module. Blocks that were never anything but zeros are not kept.
#[derive(Debug, Default)]
pub struct Contents {
    blocks: Vec<Option<Box<Block>>>,
    /// Blocks with dirty sectors, each once.
    dirty: Vec<usize>,
    /// In bytes, as seen, and as on the device.
    size: u64,
    device_size: u64,
    /// Sectors that can't be read.
    lost: BTreeSet<u64>,
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    bytes.chunks(BLOCK).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

fn overlaps(sector: u64, from: u64, to: u64) -> bool {
    let start = sector * SECTOR as u64;
    start < to && from < start + SECTOR as u64
}

fn sectors(from: usize, to: usize) -> impl Iterator<Item = usize> {
    from / SECTOR..to.div_ceil(SECTOR)
}

fn range(sector: usize) -> std::ops::Range<usize> {
    sector * SECTOR..(sector + 1) * SECTOR
}

impl Block {
    fn new() -> Block {
        Block { seen: [0; BLOCK], device: None, dirty: 0, forgotten: 0 }
    }

    fn write(&mut self, bytes: &[u8], offset: usize, rng: &mut Rng) {
        for sector in sectors(offset, offset + bytes.len()) {
            let bit = 1 << sector;
            let is_kept = (self.dirty | self.forgotten) & bit != 0;
            // The system may write back what is dirty whenever it likes.
            if !is_kept || (self.dirty & bit != 0 && rng.one_in(4)) {
                let seen = &self.seen;
                let device = self.device.get_or_insert_with(|| Box::new(*seen));
                device[range(sector)].copy_from_slice(&seen[range(sector)]);
            }
            self.dirty |= bit;
            self.forgotten &= !bit;
        }
        self.seen[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// The device has the sector as it is seen.
    fn settle(&mut self, sector: usize) {
        if let Some(device) = &mut self.device {
            device[range(sector)].copy_from_slice(&self.seen[range(sector)]);
        }
        self.dirty &= !(1 << sector);
        self.forgotten &= !(1 << sector);
    }

    /// The sector is seen as the device has it.
    fn revert(&mut self, sector: usize) {
        if let Some(device) = &self.device {
            self.seen[range(sector)].copy_from_slice(&device[range(sector)]);
        }
        self.dirty &= !(1 << sector);
        self.forgotten &= !(1 << sector);
    }

    fn release(&mut self) {
        if self.dirty == 0 && self.forgotten == 0 {
            self.device = None;
        }
    }
}

impl Contents {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in memory, about.
    pub fn footprint(&self) -> usize {
        self.blocks.iter().flatten().count() * size_of::<Block>()
    }

    pub fn reserve(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    pub fn write(&mut self, mut bytes: &[u8], mut position: u64, rng: &mut Rng) {
        self.size = self.size.max(position + bytes.len() as u64);
        if !self.lost.is_empty() {
            let end = position + bytes.len() as u64;
            self.lost.retain(|sector| !overlaps(*sector, position, end));
        }
        while !bytes.is_empty() {
            let (index, offset) = (position as usize / BLOCK, position as usize % BLOCK);
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - offset));
            if self.blocks.len() <= index {
                self.blocks.resize_with(index + 1, || None);
            }
            let slot = &mut self.blocks[index];
            // Zeros over zeros: whether they reach the device makes no difference.
            if slot.is_some() || !is_zero(now) {
                let block = slot.get_or_insert_with(|| Box::new(Block::new()));
                if block.dirty == 0 {
                    self.dirty.push(index);
                }
                block.write(now, offset, rng);
            }
            position += now.len() as u64;
            bytes = rest;
        }
    }

    pub fn read(&self, buffer: &mut [u8], position: u64) -> usize {
        let count = buffer.len().min(self.size.saturating_sub(position) as usize);
        let mut done = 0;
        while done < count {
            let at = position as usize + done;
            let (index, offset) = (at / BLOCK, at % BLOCK);
            let length = (count - done).min(BLOCK - offset);
            let place = &mut buffer[done..done + length];
            match self.blocks.get(index).and_then(Option::as_ref) {
                Some(block) => place.copy_from_slice(&block.seen[offset..offset + length]),
                None => place.fill(0),
            }
            done += length;
        }
        count
    }

    /// Writes what is dirty to the device.
    pub fn sync(&mut self, with_size: bool) {
        for index in self.dirty.drain(..) {
            let Some(block) = &mut self.blocks[index] else { continue };
            for sector in (0..SECTORS).filter(|sector| block.dirty & (1 << sector) != 0) {
                if block.forgotten != 0
                    && let Some(device) = &mut block.device
                {
                    device[range(sector)].copy_from_slice(&block.seen[range(sector)]);
                }
            }
            block.dirty = 0;
            block.release();
        }
        if with_size {
            self.device_size = self.size;
        }
    }

    /// A sync that fails: some sectors were written, and the others count as if they were.
    pub fn sync_badly(&mut self, rng: &mut Rng) {
        for index in self.dirty.drain(..) {
            let Some(block) = &mut self.blocks[index] else { continue };
            for sector in 0..SECTORS {
                let bit = 1 << sector;
                if block.dirty & bit == 0 {
                    continue;
                }
                match rng.one_in(2) {
                    true => block.settle(sector),
                    false => {
                        block.dirty &= !bit;
                        block.forgotten |= bit;
                    }
                }
            }
            block.release();
        }
    }

    /// What is not dirty is read from the device next time.
    pub fn evict(&mut self) {
        for block in self.blocks.iter_mut().flatten().filter(|block| block.forgotten != 0) {
            for sector in 0..SECTORS {
                if block.forgotten & (1 << sector) != 0 {
                    block.revert(sector);
                }
            }
            block.release();
        }
    }

    /// The power is gone: what is seen from now on is what the device has.
    pub fn lose_power(&mut self, fate: Fate, rng: &mut Rng) {
        self.evict();
        self.dirty.sort_unstable();
        let count = self.dirty.len().max(1);
        let (until, within) = (rng.index(count), rng.index(SECTORS + 1));
        for (place, index) in self.dirty.drain(..).enumerate() {
            let Some(block) = &mut self.blocks[index] else { continue };
            for sector in 0..SECTORS {
                if block.dirty & (1 << sector) == 0 {
                    continue;
                }
                let is_kept = match fate {
                    Fate::Lost => false,
                    Fate::Kept => true,
                    Fate::Each => rng.one_in(2),
                    Fate::Beginning => place < until || (place == until && sector < within),
                };
                match is_kept {
                    true => block.settle(sector),
                    false => block.revert(sector),
                }
            }
            block.release();
        }
        if self.size != self.device_size && rng.one_in(2) {
            self.size = self.device_size;
            self.cut();
        }
        self.device_size = self.size;
    }

    /// Nothing is left of what was beyond the end.
    fn cut(&mut self) {
        self.blocks.truncate(self.size.div_ceil(BLOCK as u64) as usize);
        let rest = self.size as usize % BLOCK;
        if rest > 0
            && let Some(Some(block)) = self.blocks.get_mut(self.size as usize / BLOCK)
        {
            block.seen[rest..].fill(0);
        }
    }

    /// A sector can't be read until something is written there.
    pub fn lose_sector(&mut self, position: u64) {
        self.lost.insert(position / SECTOR as u64);
    }

    /// Whether one of these bytes can't be read.
    pub fn is_lost(&self, position: u64, count: usize) -> bool {
        let end = self.size.min(position + count as u64);
        self.lost.iter().any(|sector| overlaps(*sector, position, end))
    }

    /// What is from `size` on is gone, here and on the device.
    pub fn shorten(&mut self, size: u64) {
        self.size = self.size.min(size);
        self.device_size = self.device_size.min(size);
        self.dirty.retain(|index| *index < self.size.div_ceil(BLOCK as u64) as usize);
        self.cut();
    }

    /// A bit is the other one, here and on the device.
    pub fn rot(&mut self, position: u64, bit: u8) {
        if position >= self.size {
            return;
        }
        let (index, offset) = (position as usize / BLOCK, position as usize % BLOCK);
        if self.blocks.len() <= index {
            self.blocks.resize_with(index + 1, || None);
        }
        let block = self.blocks[index].get_or_insert_with(|| Box::new(Block::new()));
        block.seen[offset] ^= 1 << bit;
        if let Some(device) = &mut block.device {
            device[offset] ^= 1 << bit;
        }
    }
}
