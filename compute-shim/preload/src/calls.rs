//! The interposed functions. Each does its bookkeeping, then the system call.

#![allow(clippy::missing_safety_doc)] // Their contracts are those of the C library's functions.

use libc::{c_char, c_int, c_void, iovec, mode_t, off_t, size_t, ssize_t};
use pgstrata_compute_shared::path::Named;
use pgstrata_compute_shared::{Found, RequestKind};

use crate::daemon;
use crate::files;
use crate::paths;
use crate::state::{State, Tracked, state, track, tracked};
use crate::sys;
use crate::wal;

/// `open` is variadic in C; on x86-64 a third integer argument is passed the same way whether or
/// not it is variadic, and reading it when it was not passed is harmless.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let Some(state) = state() else {
        // SAFETY: the caller's contract is open's.
        return unsafe { sys::open(path, flags, mode) };
    };
    // SAFETY: the caller's contract is open's.
    let name = unsafe { paths::named(state, path) };
    let what = match paths::tracking(state, name) {
        Ok(what) => what,
        Err(error) => return sys::fail(error),
    };
    // SAFETY: the real path is the caller's, or a constant.
    let fd = unsafe { sys::open(paths::real(state, name, path), flags, mode) };
    if fd >= 0 {
        if flags & libc::O_TRUNC != 0
            && let Tracked::Relation(entry) = what
        {
            files::before_truncate(state, entry, 0);
        }
        if !track(fd, what) {
            // Unable to remember it, we would serve zeros for absent blocks.
            sys::close(fd);
            return sys::fail(libc::EMFILE);
        }
    }
    fd
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { open(path, flags, mode) }
}

#[unsafe(no_mangle)]
pub extern "C" fn close(fd: c_int) -> c_int {
    track(fd, Tracked::Nothing);
    sys::close(fd)
}

fn read_error(state: State, fd: c_int, offset: off_t, count: size_t) -> c_int {
    match tracked(fd) {
        Tracked::Relation(entry) => files::before_read(state, entry, offset, count),
        _ => 0,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    if let Some(state) = state() {
        let error = read_error(state, fd, offset, count);
        if error != 0 {
            return sys::fail(error) as ssize_t;
        }
    }
    // SAFETY: the caller's contract is pread's.
    unsafe { sys::pread(fd, buffer.cast(), count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pread(fd, buffer, count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn __pread_chk(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
    size: size_t,
) -> ssize_t {
    if count > size {
        sys::complain("a read is longer than its buffer");
        std::process::abort();
    }
    // SAFETY: the same contract.
    unsafe { pread(fd, buffer, count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn __pread64_chk(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
    size: size_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { __pread_chk(fd, buffer, count, offset, size) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t {
    if let Some(state) = state()
        && let Tracked::Relation(_) = tracked(fd)
    {
        let error = read_error(state, fd, files::position(fd), count);
        if error != 0 {
            return sys::fail(error) as ssize_t;
        }
    }
    // SAFETY: the caller's contract is read's.
    unsafe { sys::read(fd, buffer.cast(), count) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn __read_chk(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    size: size_t,
) -> ssize_t {
    if count > size {
        sys::complain("a read is longer than its buffer");
        std::process::abort();
    }
    // SAFETY: the same contract.
    unsafe { read(fd, buffer, count) }
}

unsafe fn total(vectors: *const iovec, count: c_int) -> size_t {
    let mut sum: size_t = 0;
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller passes `count` valid vectors.
        sum = sum.saturating_add(unsafe { (*vectors.add(at)).iov_len });
    }
    sum
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv(
    fd: c_int,
    vectors: *const iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    if let Some(state) = state() {
        // SAFETY: the caller's contract is preadv's.
        let error = read_error(state, fd, offset, unsafe { total(vectors, count) });
        if error != 0 {
            return sys::fail(error) as ssize_t;
        }
    }
    // SAFETY: the caller's contract is preadv's.
    unsafe { sys::preadv(fd, vectors, count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv64(
    fd: c_int,
    vectors: *const iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { preadv(fd, vectors, count, offset) }
}

fn before_write(fd: c_int, offset: off_t, count: size_t) {
    if let Some(state) = state()
        && let Tracked::Relation(entry) = tracked(fd)
    {
        files::before_write(state, entry, offset, count);
    }
}

fn after_write(fd: c_int, offset: off_t, written: ssize_t) {
    if let Some(state) = state()
        && let Tracked::Wal(number) = tracked(fd)
        && let (Ok(offset), Ok(written)) = (u64::try_from(offset), u64::try_from(written))
        && written > 0
    {
        wal::written(state, number, offset + written);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(
    fd: c_int,
    buffer: *const c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    before_write(fd, offset, count);
    // SAFETY: the caller's contract is pwrite's.
    let written = unsafe { sys::pwrite(fd, buffer.cast(), count, offset) };
    after_write(fd, offset, written);
    written
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: c_int,
    buffer: *const c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwrite(fd, buffer, count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev(
    fd: c_int,
    vectors: *const iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    // SAFETY: the caller's contract is pwritev's.
    before_write(fd, offset, unsafe { total(vectors, count) });
    // SAFETY: as above.
    let written = unsafe { sys::pwritev(fd, vectors, count, offset) };
    after_write(fd, offset, written);
    written
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev64(
    fd: c_int,
    vectors: *const iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwritev(fd, vectors, count, offset) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    if state().is_none() || tracked(fd) == Tracked::Nothing {
        // SAFETY: the caller's contract is write's.
        return unsafe { sys::write(fd, buffer.cast(), count) };
    }
    let offset = files::position(fd);
    before_write(fd, offset, count);
    // SAFETY: the caller's contract is write's.
    let written = unsafe { sys::write(fd, buffer.cast(), count) };
    after_write(fd, offset, written);
    written
}

#[unsafe(no_mangle)]
pub extern "C" fn ftruncate(fd: c_int, length: off_t) -> c_int {
    if let Some(state) = state()
        && let Tracked::Relation(entry) = tracked(fd)
    {
        files::before_truncate(state, entry, length);
    }
    sys::numbers(libc::SYS_ftruncate, fd.into(), length, 0, 0) as c_int
}

#[unsafe(no_mangle)]
pub extern "C" fn ftruncate64(fd: c_int, length: off_t) -> c_int {
    ftruncate(fd, length)
}

/// Resolves a named relation segment, so that its file is there if it should be. 0, or an error
/// number.
unsafe fn prepare(path: *const c_char) -> (Named, Option<u32>, c_int) {
    let Some(state) = state() else { return (Named::Other, None, 0) };
    // SAFETY: the callers' contracts give a C string.
    let name = unsafe { paths::named(state, path) };
    let Named::Relation(id) = name else { return (name, None, 0) };
    match paths::resolve(state, id) {
        Ok(Found::Mapped(entry)) => (name, Some(entry), 0),
        Ok(Found::Local) => (name, None, 0),
        Err(error) => (name, None, error),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the caller's contract is truncate's.
    let (_, entry, error) = unsafe { prepare(path) };
    if error != 0 {
        return sys::fail(error);
    }
    if let (Some(state), Some(entry)) = (state(), entry) {
        files::before_truncate(state, entry, length);
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_truncate, path, length) as c_int }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate64(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { truncate(path, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the caller's contract is unlink's.
    let (_, entry, error) = unsafe { prepare(path) };
    if error != 0 {
        return sys::fail(error);
    }
    // SAFETY: as above.
    let result = unsafe { libc::syscall(libc::SYS_unlink, path) as c_int };
    if let (Some(state), Some(entry), 0) = (state(), entry, result) {
        state.map().set_unlinked(entry);
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    if let Some(state) = state() {
        // SAFETY: the caller's contract is rmdir's.
        if let Named::Database { spc, db } = unsafe { paths::named(state, path) } {
            let error = daemon::database(state, RequestKind::DropDatabase, spc, db);
            if error != 0 {
                return sys::fail(error);
            }
        }
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_rmdir, path) as c_int }
}

/// A directory that opens and can't be read. Functions that sum up sizes take one that can't be opened for an empty one
/// (db_dir_size in utils/adt/dbsize.c).
unsafe fn unreadable(path: *const c_char, error: c_int) -> *mut libc::DIR {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the caller vouches for the path; fdopendir takes over the descriptor, which stays one of the process's
    // own after it was made to be another file.
    unsafe {
        let fd = sys::open(path, flags, 0);
        let null = sys::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0);
        let directory = if fd < 0 || null < 0 { std::ptr::null_mut() } else { libc::fdopendir(fd) };
        if !directory.is_null() {
            sys::numbers(libc::SYS_dup3, null.into(), fd.into(), libc::O_CLOEXEC.into(), 0);
        } else {
            sys::fail(error);
        }
        if null >= 0 {
            sys::close(null);
        }
        directory
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn opendir(path: *const c_char) -> *mut libc::DIR {
    if let Some(state) = state()
        // The postmaster lists every database at its start, looking for temporary files, which
        // the page server never has.
        && !state.is_postmaster()
    {
        // SAFETY: the caller's contract is opendir's.
        let name = unsafe { paths::named(state, path) };
        if let Named::Database { spc, db } = name {
            let error = daemon::database(state, RequestKind::ListDatabase, spc, db);
            if error != 0 {
                sys::complain("a database's directory can't be listed: the shim's log says why");
                // SAFETY: the caller's contract is opendir's.
                return unsafe { unreadable(path, error) };
            }
        }
    }
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: as above; fdopendir takes over the descriptor.
    unsafe {
        let fd = sys::open(path, flags, 0);
        if fd < 0 { std::ptr::null_mut() } else { libc::fdopendir(fd) }
    }
}

unsafe fn stat_call(
    path: *const c_char,
    call: impl FnOnce(*const c_char) -> libc::c_long,
) -> c_int {
    // SAFETY: the callers' contracts give a C string.
    let (name, _, error) = unsafe { prepare(path) };
    if error != 0 {
        return sys::fail(error);
    }
    if let Some(state) = state()
        && state.is_read_only()
        && name == Named::Promote
    {
        // Whoever put it there: the startup process does not find it.
        return sys::fail(libc::ENOENT);
    }
    let real = state().map_or(path, |state| paths::real(state, name, path));
    call(real) as c_int
}

macro_rules! stat_functions {
    ($($name:ident, $name64:ident, $old:ident, $old64:ident: $number:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, to: *mut libc::stat) -> c_int {
            // SAFETY: the caller's contract is the function's; on x86-64 the C library's
            // structure is the kernel's.
            unsafe { stat_call(path, |real| libc::syscall($number, real, to)) }
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name64(path: *const c_char, to: *mut libc::stat) -> c_int {
            // SAFETY: the same contract.
            unsafe { $name(path, to) }
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $old(
            _version: c_int,
            path: *const c_char,
            to: *mut libc::stat,
        ) -> c_int {
            // SAFETY: the same contract; x86-64 has had one version only.
            unsafe { $name(path, to) }
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $old64(
            _version: c_int,
            path: *const c_char,
            to: *mut libc::stat,
        ) -> c_int {
            // SAFETY: the same contract.
            unsafe { $name(path, to) }
        }
    )*};
}

stat_functions! {
    stat, stat64, __xstat, __xstat64: libc::SYS_stat;
    lstat, lstat64, __lxstat, __lxstat64: libc::SYS_lstat;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: the caller's contract is access's.
    unsafe { stat_call(path, |real| libc::syscall(libc::SYS_access, real, mode)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn posix_fadvise(fd: c_int, offset: off_t, length: off_t, advice: c_int) -> c_int {
    if let Some(state) = state()
        && let Tracked::Relation(entry) = tracked(fd)
    {
        if advice == libc::POSIX_FADV_WILLNEED
            && let Ok(length) = size_t::try_from(length)
        {
            files::will_need(state, entry, offset, length);
        }
        return 0;
    }
    let result = sys::numbers(libc::SYS_fadvise64, fd.into(), offset, length, advice.into());
    if result == 0 { 0 } else { sys::errno() }
}

#[unsafe(no_mangle)]
pub extern "C" fn posix_fadvise64(fd: c_int, offset: off_t, length: off_t, advice: c_int) -> c_int {
    posix_fadvise(fd, offset, length, advice)
}

/// Everything written to WAL before is durable on a quorum when this returns 0; any other file is
/// part of a directory that nobody will recover from.
fn sync(fd: c_int, number: libc::c_long) -> c_int {
    match (state(), tracked(fd)) {
        (Some(state), Tracked::Wal(_)) => {
            wal::sync(state);
            0
        }
        (Some(_), _) => 0,
        (None, _) => sys::numbers(number, fd.into(), 0, 0, 0) as c_int,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fdatasync)
}

#[unsafe(no_mangle)]
pub extern "C" fn fsync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fsync)
}

#[unsafe(no_mangle)]
pub extern "C" fn syncfs(fd: c_int) -> c_int {
    match state() {
        Some(_) => 0,
        None => sys::numbers(libc::SYS_syncfs, fd.into(), 0, 0, 0) as c_int,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn sync_file_range(
    fd: c_int,
    offset: off_t,
    length: off_t,
    flags: libc::c_uint,
) -> c_int {
    match state() {
        Some(_) => 0,
        None => sys::numbers(libc::SYS_sync_file_range, fd.into(), offset, length, flags.into())
            as c_int,
    }
}

/// PostgreSQL 18 copies files with this: what is to be copied has to be there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_offset: *mut off_t,
    to: c_int,
    to_offset: *mut off_t,
    length: size_t,
    flags: libc::c_uint,
) -> ssize_t {
    if let Some(state) = state() {
        // SAFETY: a given offset is valid for reads.
        let offset =
            if from_offset.is_null() { files::position(from) } else { unsafe { *from_offset } };
        let error = read_error(state, from, offset, length);
        if error != 0 {
            return sys::fail(error) as ssize_t;
        }
        // SAFETY: as above.
        let offset = if to_offset.is_null() { files::position(to) } else { unsafe { *to_offset } };
        before_write(to, offset, length);
    }
    // SAFETY: the caller's contract is copy_file_range's.
    unsafe {
        libc::syscall(libc::SYS_copy_file_range, from, from_offset, to, to_offset, length, flags)
            as ssize_t
    }
}

/// A stream's own reads and writes do not come through here, so a relation segment that is read by one has to be there
/// as a whole, and is written by none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    type Fopen = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut libc::FILE;
    let mut real_path = path;
    if let Some(state) = state() {
        // SAFETY: the caller's contract is fopen's.
        let name = unsafe { paths::named(state, path) };
        // SAFETY: as above.
        let reads = unsafe { *mode.cast::<u8>() == b'r' && *mode.add(1).cast::<u8>() != b'+' };
        let error = match (name, paths::tracking(state, name)) {
            (Named::Promote, _) if state.is_read_only() && !reads => {
                sys::complain("a read-only compute can't be promoted; make a branch of it instead");
                libc::EROFS
            }
            (_, Ok(Tracked::Relation(entry))) if reads => files::before_stream(state, entry),
            (_, Ok(Tracked::Relation(_))) => libc::ENOTSUP,
            (_, Ok(_)) => 0,
            (_, Err(error)) => error,
        };
        if error != 0 {
            sys::fail(error);
            return std::ptr::null_mut();
        }
        real_path = paths::real(state, name, path);
    }
    // SAFETY: the name is a C string; the C library has a function of this name and type.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"fopen".as_ptr());
        if next.is_null() {
            sys::fail(libc::ENOSYS);
            return std::ptr::null_mut();
        }
        let next: Fopen = std::mem::transmute(next);
        next(real_path, mode)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    // SAFETY: the same contract.
    unsafe { fopen(path, mode) }
}

/// PostgreSQL asks for a signal of its own when the postmaster dies, and looks at it when it gets
/// to it. Ours has to end the process wherever it is (see the fork handlers).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    a: libc::c_ulong,
    b: libc::c_ulong,
    c: libc::c_ulong,
    d: libc::c_ulong,
) -> c_int {
    let own = state().is_some() && option == libc::PR_SET_PDEATHSIG;
    let a = if own { libc::SIGKILL as libc::c_ulong } else { a };
    // SAFETY: the caller's contract is prctl's.
    unsafe { libc::syscall(libc::SYS_prctl, option, a, b, c, d) as c_int }
}
