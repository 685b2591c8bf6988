//! The memory and the eventfd that the preload library inherits.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use pgstrata_compute_shared::{MEMORY_SIZE, SharedMap};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// What the daemon shares with PostgreSQL's processes. The descriptors are inheritable, and have
/// to stay open until PostgreSQL was started.
pub struct Memory {
    /// The mapped memory.
    pub map: SharedMap,
    /// The memory's descriptor.
    pub file: OwnedFd,
    /// Written by PostgreSQL when there is WAL and the daemon sleeps.
    pub event: OwnedFd,
}

impl Memory {
    /// Fresh memory for one start of PostgreSQL.
    pub fn new(wal_segment_size: u64) -> Result<Memory> {
        let file = memfd_create("pgstrata", MemfdFlags::empty())
            .context("can't create the shared memory file")?;
        ftruncate(&file, MEMORY_SIZE as u64).context("can't size the shared memory file")?;
        let map = SharedMap::map(file.as_raw_fd()).context("can't map the shared memory file")?;
        let event = eventfd(0, EventfdFlags::NONBLOCK).context("can't create an eventfd")?;
        let control = map.control();
        control.wal_segment_size.store(wal_segment_size as u32, Ordering::Relaxed);
        Ok(Memory { map, file, event })
    }
}

/// Wakes everybody who waits for `durable_sequence` to move.
pub fn wake_waiters(map: &SharedMap) {
    let control = map.control();
    control.durable_futex.fetch_add(1, Ordering::SeqCst);
    if control.waiters.load(Ordering::SeqCst) > 0 {
        // Not FUTEX_PRIVATE: the waiters are other processes. Failure is impossible but for a
        // bad address, and a missed wake-up ends by the waiters' own time limit.
        let flags = rustix::thread::futex::Flags::empty();
        let _ = rustix::thread::futex::wake(&control.durable_futex, flags, i32::MAX as u32);
    }
}
