//! PostgreSQL's requests to end a statement or a session, seen while a process waits for the daemon.
//!
//! The flags and counters are PostgreSQL's own variables (miscadmin.h), which every version exports.

use std::ffi::CStr;
use std::sync::OnceLock;

use crate::sys;

/// Where they are.
struct Variables {
    query_cancel_pending: *const i32,
    process_die_pending: *const i32,
    critical_sections: *const u32,
    holdoffs: *const u32,
    process_interrupts: unsafe extern "C" fn(),
    /// Reads report their errors as results (since 18), also in critical sections.
    reads_have_results: bool,
}

// SAFETY: the pointers are to variables of a program that is never unloaded; they are only read.
unsafe impl Send for Variables {}
// SAFETY: as above.
unsafe impl Sync for Variables {}

static VARIABLES: OnceLock<Option<Variables>> = OnceLock::new();

fn find(name: &CStr) -> *mut libc::c_void {
    // SAFETY: the name is a C string.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

/// Looks for the variables. Called before `main`.
pub fn find_variables() {
    let names = [
        c"QueryCancelPending",
        c"ProcDiePending",
        c"CritSectionCount",
        c"InterruptHoldoffCount",
        c"ProcessInterrupts",
    ];
    let found = names.map(find);
    if found.iter().any(|address| address.is_null()) {
        sys::complain("PostgreSQL's interrupts can't be seen: reads can't be cancelled");
        let _ = VARIABLES.set(None);
        return;
    }
    let [query_cancel, process_die, critical_sections, holdoffs, process] = found;
    let _ = VARIABLES.set(Some(Variables {
        query_cancel_pending: query_cancel.cast(),
        process_die_pending: process_die.cast(),
        critical_sections: critical_sections.cast(),
        holdoffs: holdoffs.cast(),
        // SAFETY: the symbol is PostgreSQL's function of this name, which takes and returns nothing.
        process_interrupts: unsafe {
            std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn()>(process)
        },
        reads_have_results: !find(c"pgaio_io_start_readv").is_null(),
    }));
}

/// What a wait is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// A relation's bytes: nothing is lost when PostgreSQL leaves the read by a long jump, as it leaves it by an error.
    Read,
    /// A file's name: PostgreSQL leaves by a long jump where it takes interrupts, and waits elsewhere, such as at the end of
    /// a transaction, when the files of dropped relations are removed.
    Name,
}

/// Whether to give up, because the statement or the session is to end. An error in a critical section would end the
/// whole server.
pub fn is_pending(wait: Wait) -> bool {
    let Some(Some(variables)) = VARIABLES.get() else { return false };
    // SAFETY: they are PostgreSQL's variables, of these types; signal handlers of this thread change them.
    unsafe {
        let asked = variables.query_cancel_pending.read_volatile() != 0
            || variables.process_die_pending.read_volatile() != 0;
        let is_critical = variables.critical_sections.read_volatile() != 0;
        let is_held_off = variables.holdoffs.read_volatile() != 0;
        let may_fail = match wait {
            Wait::Read => !is_critical || variables.reads_have_results,
            Wait::Name => !is_critical && !is_held_off,
        };
        asked && may_fail
    }
}

/// Ends the statement with PostgreSQL's own message if that can be done here; does not return then.
pub fn process() {
    let Some(Some(variables)) = VARIABLES.get() else { return };
    // SAFETY: as above. The function leaves by siglongjmp, over frames of ours that have nothing to drop: none of them
    // holds a lock, an allocation or a descriptor at this point.
    unsafe {
        if variables.critical_sections.read_volatile() == 0
            && variables.holdoffs.read_volatile() == 0
        {
            (variables.process_interrupts)();
        }
    }
}
