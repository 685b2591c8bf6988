//! Blocks of relation segments: present before they are read, marked before they are written.

use std::sync::atomic::Ordering;

use libc::{off_t, size_t};
use pgstrata_compute_shared::{SEGMENT_BLOCKS, block};

use crate::daemon;
use crate::state::State;
use crate::sys;

const BLOCK_SIZE: u64 = 8192;

/// The blocks that `count` bytes at `offset` touch.
fn blocks(offset: off_t, count: size_t) -> std::ops::Range<u32> {
    let start = u64::try_from(offset).unwrap_or(0);
    let end = start.saturating_add(count as u64);
    let limit = u64::from(SEGMENT_BLOCKS);
    let first = (start / BLOCK_SIZE).min(limit) as u32;
    let last = end.div_ceil(BLOCK_SIZE).min(limit) as u32;
    first..last
}

fn pause() {
    let wait = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
    // SAFETY: the structure is valid; no remainder is asked for.
    unsafe { libc::syscall(libc::SYS_nanosleep, &raw const wait, 0) };
}

/// Makes sure that bytes to be read are in the local file. 0, or an error number.
pub fn before_read(state: State, entry: u32, offset: off_t, count: size_t) -> i32 {
    let map = state.map();
    let wanted = blocks(offset, count);
    let end = wanted.end.min(map.blocks(entry));
    let mut at = wanted.start;
    while at < end {
        if map.block(entry, at).load(Ordering::Acquire) >= block::CLEAN {
            at += 1;
            continue;
        }
        // From the first missing block on, in one request: the daemon skips what is there.
        let error = daemon::fill(state, map.id(entry), at, end - at);
        if error != 0 {
            return error;
        }
        at = end;
    }
    0
}

/// Makes sure that all blocks of a segment are in the local file. 0, or an error number.
pub fn before_stream(state: State, entry: u32) -> i32 {
    before_read(state, entry, 0, SEGMENT_BLOCKS as size_t * BLOCK_SIZE as size_t)
}

/// Marks blocks as this compute's own, before they are written.
pub fn before_write(state: State, entry: u32, offset: off_t, count: size_t) {
    mark(state, entry, blocks(offset, count));
}

/// Marks every block that a file of `length` bytes does not have: when the file grows again, they
/// are zeros, whatever the page server has.
pub fn before_truncate(state: State, entry: u32, length: off_t) {
    let from = blocks(length, 0).end;
    mark(state, entry, from..state.map().blocks(entry));
}

fn mark(state: State, entry: u32, range: std::ops::Range<u32>) {
    let map = state.map();
    let end = range.end.min(map.blocks(entry));
    for number in range.start..end {
        let cell = map.block(entry, number);
        let mut now = cell.load(Ordering::Acquire);
        while now != block::WRITTEN {
            if now == block::FILLING {
                pause();
                now = cell.load(Ordering::Acquire);
                continue;
            }
            match cell.compare_exchange(now, block::WRITTEN, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(actual) => now = actual,
            }
        }
    }
}

/// Announces bytes that will be read soon.
pub fn will_need(state: State, entry: u32, offset: off_t, count: size_t) {
    let map = state.map();
    let wanted = blocks(offset, count);
    let end = wanted.end.min(map.blocks(entry));
    let absent = |at: &u32| map.block(entry, *at).load(Ordering::Relaxed) == block::ABSENT;
    if let Some(first) = (wanted.start..end).find(absent) {
        daemon::prefetch(state, map.id(entry), first, end - first);
    }
}

/// The position at which a plain read or write of `fd` happens.
pub fn position(fd: i32) -> off_t {
    sys::lseek(fd, 0, libc::SEEK_CUR)
}
