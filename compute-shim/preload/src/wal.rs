//! WAL: counting writes, and waiting at a sync until a quorum has them.

use std::sync::atomic::Ordering;

use crate::state::State;
use crate::sys;

/// How long a waiter sleeps before it looks whether the server still lives.
const LOOK_AFTER_NS: i64 = 200_000_000;

/// Counts a finished write that ends at `offset` of segment `segment`, and tells the daemon.
pub fn written(state: State, segment: u64, end_offset: u64) {
    let control = state.map().control();
    let segment_size = u64::from(control.wal_segment_size.load(Ordering::Relaxed));
    let end = segment.wrapping_mul(segment_size).wrapping_add(end_offset);
    control.written_lsn.fetch_max(end, Ordering::AcqRel);
    // After the bytes and their end: who sees this count sees them too.
    control.write_sequence.fetch_add(1, Ordering::SeqCst);
    if control.daemon_sleeps.load(Ordering::SeqCst) != 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight valid bytes. A full counter (EAGAIN) has woken the daemon already.
        unsafe { sys::write(state.event(), one.as_ptr(), one.len()) };
    }
}

/// Returns when everything written before is durable on a quorum. It never returns otherwise: a
/// compute that lost its branch, or its daemon, must not tell anybody that it committed.
pub fn sync(state: State) {
    if state.is_read_only() {
        // However it came to write: a standby does not, until it is promoted.
        sys::complain("a read-only compute can't be promoted, nobody keeps its WAL: it ends");
        exit();
    }
    let control = state.map().control();
    let target = control.write_sequence.load(Ordering::SeqCst);
    if control.durable_sequence.load(Ordering::Acquire) >= target
        && control.fenced.load(Ordering::Acquire) == 0
    {
        return;
    }
    control.waiters.fetch_add(1, Ordering::SeqCst);
    loop {
        let seen = control.durable_futex.load(Ordering::SeqCst);
        if control.fenced.load(Ordering::Acquire) != 0 {
            sys::complain("a newer compute owns this branch: this server ends");
            exit();
        }
        if control.durable_sequence.load(Ordering::SeqCst) >= target {
            break;
        }
        let timeout = libc::timespec { tv_sec: 0, tv_nsec: LOOK_AFTER_NS };
        // SAFETY: the word is in memory that is never unmapped; the timeout is valid. The futex
        // is shared between processes, so FUTEX_PRIVATE_FLAG is not set.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                control.durable_futex.as_ptr(),
                libc::FUTEX_WAIT,
                seen,
                &raw const timeout,
            );
        }
        if !state.has_parent() {
            sys::complain("the compute shim is gone: this server ends");
            exit();
        }
    }
    control.waiters.fetch_sub(1, Ordering::SeqCst);
}

/// Ends the process without running anything of PostgreSQL's.
fn exit() -> ! {
    loop {
        sys::numbers(libc::SYS_exit_group, 2, 0, 0, 0);
    }
}
