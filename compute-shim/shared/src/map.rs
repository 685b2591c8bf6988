//! The shared memory, mapped.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::path::SegmentId;
use crate::{
    BLOCKS_OFFSET, MEMORY_SIZE, SEGMENT_BLOCKS, SEGMENT_SIZE, SEGMENTS, SEGMENTS_OFFSET, SLOTS,
    segment,
};

/// The WAL hand-over. `write_sequence` counts WAL writes; a flush waits until the daemon says
/// that everything up to the count it saw is durable on a quorum.
///
/// Counting writes and not bytes matters: PostgreSQL writes the same WAL page again and again as
/// it fills, so equal positions do not mean equal contents.
#[repr(C)]
pub struct Control {
    /// WAL writes finished.
    pub write_sequence: AtomicU64,
    /// End of the furthest WAL write.
    pub written_lsn: AtomicU64,
    /// WAL writes that are durable on a quorum.
    pub durable_sequence: AtomicU64,
    /// Changed, as a futex, whenever `durable_sequence` is.
    pub durable_futex: AtomicU32,
    /// Processes that wait for the futex.
    pub waiters: AtomicU32,
    /// A newer compute owns the branch, or the daemon gave up: no flush succeeds any more.
    pub fenced: AtomicU32,
    /// The daemon sleeps, and wants the eventfd written.
    pub daemon_sleeps: AtomicU32,
    /// Bytes of a WAL segment.
    pub wal_segment_size: AtomicU32,
}

#[repr(C)]
struct Segment {
    spc: AtomicU32,
    db: AtomicU32,
    rel: AtomicU32,
    /// Fork in the upper 4 bits, segment number below.
    fork_segment: AtomicU32,
    /// Blocks at or after this one were never the page server's.
    blocks: AtomicU32,
    slot: AtomicU32,
    /// Published last.
    state: AtomicU32,
    unused: AtomicU32,
}

const _: () = assert!(size_of::<Segment>() == SEGMENT_SIZE);
const _: () = assert!(size_of::<Control>() <= SEGMENTS_OFFSET);

/// A segment found in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its entry.
    pub entry: u32,
    /// Its state.
    pub state: u32,
}

/// The mapped memory. Never unmapped: it lives as long as the process.
#[derive(Clone, Copy)]
pub struct SharedMap {
    base: *mut u8,
}

// SAFETY: everything behind the pointer is accessed through atomics only.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

fn fork_segment(id: &SegmentId) -> u32 {
    u32::from(id.fork) << 28 | (id.segment & 0x0FFF_FFFF)
}

fn hash(id: &SegmentId) -> usize {
    let mut value = u64::from(id.rel) << 32 | u64::from(fork_segment(id));
    value ^= (u64::from(id.db) << 32 | u64::from(id.spc)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    value = (value ^ value >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (value >> 40) as usize % SEGMENTS
}

impl SharedMap {
    /// Maps the memory file.
    pub fn map(fd: RawFd) -> io::Result<SharedMap> {
        // SAFETY: a new shared mapping at an address of the kernel's choice overlaps nothing; the
        // kernel checks the descriptor.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedMap { base: base.cast() })
    }

    /// The WAL hand-over.
    pub fn control(&self) -> &Control {
        // SAFETY: the mapping is page-aligned, larger than Control, never unmapped, and zeros are
        // valid atomics.
        unsafe { &*self.base.cast::<Control>() }
    }

    fn segment(&self, entry: u32) -> &Segment {
        let entry = entry as usize % SEGMENTS;
        // SAFETY: the entry is inside the table, whose offset and stride keep the alignment.
        unsafe { &*self.base.add(SEGMENTS_OFFSET + entry * SEGMENT_SIZE).cast::<Segment>() }
    }

    /// The state of a block of a mapped segment.
    pub fn block(&self, entry: u32, block: u32) -> &AtomicU8 {
        let slot = self.segment(entry).slot.load(Ordering::Relaxed) as usize % SLOTS;
        let block = (block % SEGMENT_BLOCKS) as usize;
        // SAFETY: slot and block are reduced to the region's bounds.
        unsafe {
            &*self
                .base
                .add(BLOCKS_OFFSET + slot * SEGMENT_BLOCKS as usize + block)
                .cast::<AtomicU8>()
        }
    }

    /// Looks a segment up. One atomic load a probe; never blocks.
    pub fn find(&self, id: &SegmentId) -> Option<Found> {
        let start = hash(id);
        for probe in 0..SEGMENTS {
            let entry = ((start + probe) % SEGMENTS) as u32;
            let found = self.segment(entry);
            let state = found.state.load(Ordering::Acquire);
            if state == segment::EMPTY {
                return None;
            }
            if found.rel.load(Ordering::Relaxed) == id.rel
                && found.fork_segment.load(Ordering::Relaxed) == fork_segment(id)
                && found.db.load(Ordering::Relaxed) == id.db
                && found.spc.load(Ordering::Relaxed) == id.spc
            {
                return Some(Found { entry, state });
            }
        }
        None
    }

    /// Adds a segment. Only the daemon may call this, one call at a time. `None`: the table is
    /// full.
    pub fn insert(&self, id: &SegmentId, state: u32, slot: u32, blocks: u32) -> Option<u32> {
        let start = hash(id);
        for probe in 0..SEGMENTS {
            let entry = ((start + probe) % SEGMENTS) as u32;
            let free = self.segment(entry);
            if free.state.load(Ordering::Acquire) != segment::EMPTY {
                continue;
            }
            free.spc.store(id.spc, Ordering::Relaxed);
            free.db.store(id.db, Ordering::Relaxed);
            free.rel.store(id.rel, Ordering::Relaxed);
            free.fork_segment.store(fork_segment(id), Ordering::Relaxed);
            free.blocks.store(blocks, Ordering::Relaxed);
            free.slot.store(slot, Ordering::Relaxed);
            free.state.store(state, Ordering::Release);
            return Some(entry);
        }
        None
    }

    /// The state of an entry.
    pub fn state(&self, entry: u32) -> u32 {
        self.segment(entry).state.load(Ordering::Acquire)
    }

    /// The segment's file was unlinked: what comes under its name now is local.
    pub fn set_local(&self, entry: u32) {
        self.segment(entry).state.store(segment::LOCAL, Ordering::Release);
    }

    /// Blocks that the page server had of the segment.
    pub fn blocks(&self, entry: u32) -> u32 {
        self.segment(entry).blocks.load(Ordering::Relaxed)
    }

    /// Which segment an entry is.
    pub fn id(&self, entry: u32) -> SegmentId {
        let found = self.segment(entry);
        let fork_segment = found.fork_segment.load(Ordering::Relaxed);
        SegmentId {
            spc: found.spc.load(Ordering::Relaxed),
            db: found.db.load(Ordering::Relaxed),
            rel: found.rel.load(Ordering::Relaxed),
            fork: (fork_segment >> 28) as u8,
            segment: fork_segment & 0x0FFF_FFFF,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn memory() -> SharedMap {
        // SAFETY: memfd_create takes a name and flags, and returns a new descriptor or -1.
        let fd = unsafe {
            let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: only changes the size of the file that we just made.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), MEMORY_SIZE as i64) }, 0);
        SharedMap::map(fd.as_raw_fd()).unwrap()
    }

    #[test]
    fn segments_are_found_again() {
        let map = memory();
        for rel in 1..3000 {
            for fork in [0, 2] {
                let id = SegmentId { spc: 1663, db: 5, rel, fork, segment: rel % 3 };
                assert_eq!(map.find(&id), None);
                let entry = map.insert(&id, segment::MAPPED, rel, 10).unwrap();
                assert_eq!(map.find(&id), Some(Found { entry, state: segment::MAPPED }));
                assert_eq!(map.id(entry), id);
            }
        }
        let id = SegmentId { spc: 1663, db: 5, rel: 7, fork: 0, segment: 1 };
        let found = map.find(&id).unwrap();
        map.set_local(found.entry);
        assert_eq!(map.find(&id).unwrap().state, segment::LOCAL);
        map.block(found.entry, 131_071).store(3, Ordering::Relaxed);
        assert_eq!(map.block(found.entry, 131_071).load(Ordering::Relaxed), 3);
        assert_eq!(map.block(found.entry, 131_070).load(Ordering::Relaxed), 0);
    }
}
