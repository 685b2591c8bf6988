//! PostgreSQL's System V segment, by which one server finds that another one uses its data directory.
//!
//! It outlives servers that are killed, and is found again only by one that starts in the same directory: where
//! directories come and go, the kernel's limit on segments (4096) would be reached one day, and no server on the machine
//! could start. A compute's directory is locked by its shim, and nobody looks for the segment: it is marked to be
//! destroyed as soon as it is attached, and goes with the last process that has it.

use libc::{c_int, c_void, shmid_ds};

use crate::state::{State, state};
use crate::sys;

/// The segment was made by this process.
fn is_own(id: c_int) -> bool {
    // SAFETY: zeros are a valid structure, which the kernel fills.
    unsafe {
        let mut about: shmid_ds = std::mem::zeroed();
        let known = libc::syscall(libc::SYS_shmctl, id, libc::IPC_STAT, &raw mut about) == 0;
        known && about.shm_cpid == sys::getpid()
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmat(id: c_int, address: *const c_void, flags: c_int) -> *mut c_void {
    // SAFETY: the caller's contract is shmat's.
    let attached = unsafe { libc::syscall(libc::SYS_shmat, id, address, flags) } as *mut c_void;
    // Others' segments are attached, too, to see whether they are in use.
    if attached as isize != -1 && state().as_ref().is_some_and(State::is_postmaster) && is_own(id) {
        sys::numbers(libc::SYS_shmctl, id.into(), libc::IPC_RMID.into(), 0, 0);
    }
    attached
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmctl(id: c_int, command: c_int, about: *mut shmid_ds) -> c_int {
    // SAFETY: the caller's contract is shmctl's.
    let result = unsafe { libc::syscall(libc::SYS_shmctl, id, command, about) } as c_int;
    let gone = matches!(sys::errno(), libc::EINVAL | libc::EIDRM);
    // PostgreSQL destroys it when it ends, after it has detached it: then it is gone already.
    if result == -1 && command == libc::IPC_RMID && gone && state().is_some() {
        return 0;
    }
    result
}
