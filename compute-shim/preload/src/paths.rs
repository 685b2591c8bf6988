//! Calls that name files: resolved with the daemon before the kernel sees them.

use std::ffi::CStr;

use libc::c_char;
use pgstrata_compute_shared::Found;
use pgstrata_compute_shared::path::{Named, SegmentId, canonical, parse};

use crate::daemon;
use crate::state::{State, Tracked};

/// Bytes of a path that may be written in more than one way. Longer ones name nothing of ours.
const CANONICAL: usize = 1024;

/// What a path names.
///
/// # Safety
/// `path` must be a C string.
pub unsafe fn named(state: State, path: *const c_char) -> Named {
    if path.is_null() {
        return Named::Other;
    }
    // SAFETY: the caller vouches for the path.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    parse(canonical(path, &mut [0; CANONICAL]), state.data())
}

/// The path that the kernel is to see: the control file has another name on disk. Absolute,
/// because the postmaster looks for it before it enters the data directory.
pub fn real(state: State, name: Named, path: *const c_char) -> *const c_char {
    if name == Named::Control { state.control_file().as_ptr() } else { path }
}

/// What a segment is, after making sure that its file is in place if the page server knows it.
pub fn resolve(state: State, id: SegmentId) -> Result<Found, i32> {
    match state.map().find(&id) {
        Some(found) => Ok(found),
        None => daemon::resolve(state, id),
    }
}

/// What a descriptor of this name is to be tracked as. An error number if the daemon can't say.
pub fn tracking(state: State, name: Named) -> Result<Tracked, i32> {
    match name {
        Named::Relation(id) => match resolve(state, id)? {
            Found::Mapped(entry) => Ok(Tracked::Relation(entry)),
            Found::Local => Ok(Tracked::Nothing),
        },
        Named::Wal { high, low, .. } => {
            let size =
                state.map().control().wal_segment_size.load(std::sync::atomic::Ordering::Relaxed);
            let per_id = (1u64 << 32) / u64::from(size.max(1));
            Ok(Tracked::Wal(u64::from(high) * per_id + u64::from(low)))
        }
        _ => Ok(Tracked::Nothing),
    }
}
