//! The shared memory, mapped.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use crate::path::SegmentId;
use crate::{
    BLOCK_STATES, BLOCKS_OFFSET, LOCAL_SIZE, LOCAL_WAYS, LOCALS, LOCALS_OFFSET, MEMORY_SIZE,
    SEGMENT_SIZE, SEGMENTS, SEGMENTS_OFFSET, STATES_UNIT, segment,
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
    /// Where its block states begin, in units.
    states: AtomicU32,
    /// Published last.
    state: AtomicU32,
    unused: AtomicU32,
}

/// The name of a segment whose local file is all there is.
#[repr(C)]
struct Local {
    spc: AtomicU32,
    db: AtomicU32,
    rel: AtomicU32,
    fork_segment: AtomicU32,
    /// 0 if the entry was never used, and odd while another name takes it: who reads it meanwhile must not mix what two
    /// names leave in it.
    version: AtomicU32,
}

const _: () = assert!(size_of::<Segment>() == SEGMENT_SIZE);
const _: () = assert!(size_of::<Local>() == LOCAL_SIZE);
const _: () = assert!(size_of::<Control>() <= SEGMENTS_OFFSET);

/// What the table says of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its file is sparse; block states are under this entry, as long as the memory exists.
    Mapped(u32),
    /// Its local file is all there is, or there is none.
    Local,
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

fn hash(id: &SegmentId) -> u64 {
    let mut value = u64::from(id.rel) << 32 | u64::from(fork_segment(id));
    value ^= (u64::from(id.db) << 32 | u64::from(id.spc)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    value = (value ^ value >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value >> 40
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

    /// The state of a block of a mapped segment: one of those that the page server had.
    pub fn block(&self, entry: u32, block: u32) -> &AtomicU8 {
        let unit = u64::from(self.segment(entry).states.load(Ordering::Relaxed));
        let state = (unit * STATES_UNIT + u64::from(block)) % BLOCK_STATES;
        // SAFETY: the position is reduced to the region's bounds.
        unsafe { &*self.base.add(BLOCKS_OFFSET + state as usize).cast::<AtomicU8>() }
    }

    fn local(&self, set: usize, way: usize) -> &Local {
        let entry = (set * LOCAL_WAYS + way) % LOCALS;
        // SAFETY: the entry is inside the table, whose offset and stride keep the alignment.
        unsafe { &*self.base.add(LOCALS_OFFSET + entry * LOCAL_SIZE).cast::<Local>() }
    }

    /// Looks a segment up; never blocks. `None`: the daemon has to be asked.
    pub fn find(&self, id: &SegmentId) -> Option<Found> {
        let hash = hash(id) as usize;
        for probe in 0..SEGMENTS {
            let entry = ((hash + probe) % SEGMENTS) as u32;
            let found = self.segment(entry);
            let state = found.state.load(Ordering::Acquire);
            if state == segment::EMPTY {
                break;
            }
            if found.rel.load(Ordering::Relaxed) == id.rel
                && found.fork_segment.load(Ordering::Relaxed) == fork_segment(id)
                && found.db.load(Ordering::Relaxed) == id.db
                && found.spc.load(Ordering::Relaxed) == id.spc
            {
                return Some(match state {
                    segment::MAPPED => Found::Mapped(entry),
                    _ => Found::Local,
                });
            }
        }
        let is_local = (0..LOCAL_WAYS).any(|way| self.is_local(id, self.local(hash, way)));
        is_local.then_some(Found::Local)
    }

    fn is_local(&self, id: &SegmentId, local: &Local) -> bool {
        let version = local.version.load(Ordering::Acquire);
        let same = local.rel.load(Ordering::Relaxed) == id.rel
            && local.fork_segment.load(Ordering::Relaxed) == fork_segment(id)
            && local.db.load(Ordering::Relaxed) == id.db
            && local.spc.load(Ordering::Relaxed) == id.spc;
        fence(Ordering::Acquire);
        let unchanged = local.version.load(Ordering::Relaxed) == version;
        same && unchanged && version != 0 && version.is_multiple_of(2)
    }

    /// Adds a segment of which the page server knows; it stays. Only the daemon may call this, one call at a time.
    /// `None`: the table is full.
    /// Its block states begin at unit `states`.
    pub fn insert(&self, id: &SegmentId, state: u32, states: u32, blocks: u32) -> Option<u32> {
        let start = hash(id) as usize;
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
            free.states.store(states, Ordering::Relaxed);
            free.state.store(state, Ordering::Release);
            return Some(entry);
        }
        None
    }

    /// Remembers that a segment's local file is all there is, until others take its place: a compute may make and drop
    /// any number of relations. Only the daemon may call this, one call at a time, and for the same segments always.
    pub fn insert_local(&self, id: &SegmentId) {
        let set = hash(id) as usize;
        let versions =
            (0..LOCAL_WAYS).map(|way| self.local(set, way).version.load(Ordering::Relaxed));
        // Each name that came raised one of them by two: they are taken in turn.
        let names = versions.fold(0, u32::wrapping_add) / 2;
        let local = self.local(set, names as usize % LOCAL_WAYS);
        let version = local.version.load(Ordering::Relaxed);
        local.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        local.spc.store(id.spc, Ordering::Relaxed);
        local.db.store(id.db, Ordering::Relaxed);
        local.rel.store(id.rel, Ordering::Relaxed);
        local.fork_segment.store(fork_segment(id), Ordering::Relaxed);
        local.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The file of a mapped segment was unlinked: what comes under its name now is local.
    pub fn set_unlinked(&self, entry: u32) {
        self.segment(entry).state.store(segment::KEPT, Ordering::Release);
    }

    /// Blocks that the page server had of a mapped segment.
    pub fn blocks(&self, entry: u32) -> u32 {
        self.segment(entry).blocks.load(Ordering::Relaxed)
    }

    /// Which segment the entry of a mapped one is.
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
                assert_eq!(map.find(&id), Some(Found::Mapped(entry)));
                assert_eq!(map.id(entry), id);
            }
        }
        let id = SegmentId { spc: 1663, db: 5, rel: 7, fork: 0, segment: 1 };
        let Some(Found::Mapped(entry)) = map.find(&id) else { panic!("it is mapped") };
        map.block(entry, 131_071).store(3, Ordering::Relaxed);
        assert_eq!(map.block(entry, 131_071).load(Ordering::Relaxed), 3);
        assert_eq!(map.block(entry, 131_070).load(Ordering::Relaxed), 0);
        map.set_unlinked(entry);
        assert_eq!(map.find(&id), Some(Found::Local));
    }

    fn relation(rel: u32) -> SegmentId {
        SegmentId { spc: 1663, db: 5, rel, fork: 0, segment: 0 }
    }

    #[test]
    fn any_number_of_names_of_local_files() {
        let map = memory();
        for rel in (1..100_000).step_by(3) {
            map.insert(&relation(rel), segment::MAPPED, rel % 9, rel).unwrap();
        }
        // Ten times what there is room for. The last ones are remembered.
        let local = |rel: u32| SegmentId { fork: 1, ..relation(rel) };
        let last = LOCALS as u32 * 10;
        for rel in 1..=last {
            assert_eq!(map.find(&local(rel)), None);
            map.insert_local(&local(rel));
            assert_eq!(map.find(&local(rel)), Some(Found::Local));
        }
        let remembered = |rel: &u32| map.find(&local(*rel)) == Some(Found::Local);
        assert_eq!((last - 1000..=last).filter(remembered).count(), 1001);
        let count = (1..=last).filter(remembered).count();
        assert!(count > LOCALS * 9 / 10 && count <= LOCALS, "{count}");
        for rel in (1..100_000).step_by(3) {
            let Some(Found::Mapped(entry)) = map.find(&relation(rel)) else {
                panic!("{rel} is mapped")
            };
            assert_eq!((map.id(entry), map.blocks(entry)), (relation(rel), rel));
        }
    }

    #[test]
    fn what_changes_hands_is_seen_whole() {
        let map = memory();
        let ended = std::sync::atomic::AtomicBool::new(false);
        // Names that take the same entries in turn.
        let set = |id: &SegmentId| hash(id) as usize % (LOCALS / LOCAL_WAYS);
        let names: Vec<SegmentId> = (0..50_000_000)
            .map(|at| SegmentId { fork: (at % 4) as u8, db: 5 + at % 3, ..relation(at / 4) })
            .filter(|id| set(id) == 0)
            .take(60)
            .collect();
        // Their parts in other combinations.
        let mixed: Vec<SegmentId> = (0..names.len())
            .map(|at| SegmentId { rel: names[at].rel, ..names[(at + 1) % names.len()] })
            .filter(|id| !names.contains(id))
            .collect();
        assert!(names.len() == 60 && mixed.len() > 30);
        let reader = || {
            let mut seen = 0;
            while !ended.load(Ordering::Relaxed) {
                // Where the names are, and not where the mixed ones would be looked for.
                for id in &mixed {
                    assert!((0..LOCAL_WAYS).all(|way| !map.is_local(id, map.local(0, way))));
                }
                seen += names.iter().filter(|id| map.find(id).is_some()).count();
            }
            assert!(seen > 0);
        };
        std::thread::scope(|scope| {
            scope.spawn(reader);
            scope.spawn(reader);
            for _ in 0..50_000 {
                names.iter().for_each(|id| map.insert_local(id));
            }
            ended.store(true, Ordering::Relaxed);
        });
    }
}
