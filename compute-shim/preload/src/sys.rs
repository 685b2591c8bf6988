//! System calls, made directly: the C library's own functions are the ones being replaced.

use libc::{c_char, c_int, c_long, off_t, size_t, ssize_t};

/// `errno` of this thread.
pub fn errno() -> c_int {
    // SAFETY: the location is valid for this thread's life.
    unsafe { *libc::__errno_location() }
}

/// Sets `errno` and returns the -1 that goes with it.
pub fn fail(error: c_int) -> c_int {
    // SAFETY: the location is valid for this thread's life.
    unsafe { *libc::__errno_location() = error };
    -1
}

/// Opens a file.
///
/// # Safety
/// `path` must be a C string.
pub unsafe fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: the caller vouches for the path; the kernel checks the rest.
    unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int }
}

/// Closes a descriptor.
pub fn close(fd: c_int) -> c_int {
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_close, fd) as c_int }
}

/// Reads at an offset.
///
/// # Safety
/// `buffer` must be valid for `count` bytes of writes.
pub unsafe fn pread(fd: c_int, buffer: *mut u8, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: as the caller vouches.
    unsafe { libc::syscall(libc::SYS_pread64, fd, buffer, count, offset) as ssize_t }
}

/// Writes at an offset.
///
/// # Safety
/// `buffer` must be valid for `count` bytes of reads.
pub unsafe fn pwrite(fd: c_int, buffer: *const u8, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: as the caller vouches.
    unsafe { libc::syscall(libc::SYS_pwrite64, fd, buffer, count, offset) as ssize_t }
}

/// Reads.
///
/// # Safety
/// `buffer` must be valid for `count` bytes of writes.
pub unsafe fn read(fd: c_int, buffer: *mut u8, count: size_t) -> ssize_t {
    // SAFETY: as the caller vouches.
    unsafe { libc::syscall(libc::SYS_read, fd, buffer, count) as ssize_t }
}

/// Writes.
///
/// # Safety
/// `buffer` must be valid for `count` bytes of reads.
pub unsafe fn write(fd: c_int, buffer: *const u8, count: size_t) -> ssize_t {
    // SAFETY: as the caller vouches.
    unsafe { libc::syscall(libc::SYS_write, fd, buffer, count) as ssize_t }
}

/// Vectored read at an offset.
///
/// # Safety
/// `vectors` must be `count` valid vectors.
pub unsafe fn preadv(
    fd: c_int,
    vectors: *const libc::iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    // SAFETY: as the caller vouches. The offset goes in two halves; on 64 bits the high is unused.
    unsafe { libc::syscall(libc::SYS_preadv, fd, vectors, count, offset, 0) as ssize_t }
}

/// Vectored write at an offset.
///
/// # Safety
/// `vectors` must be `count` valid vectors.
pub unsafe fn pwritev(
    fd: c_int,
    vectors: *const libc::iovec,
    count: c_int,
    offset: off_t,
) -> ssize_t {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_pwritev, fd, vectors, count, offset, 0) as ssize_t }
}

/// Moves or asks for a descriptor's position.
pub fn lseek(fd: c_int, offset: off_t, whence: c_int) -> off_t {
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_lseek, fd, offset, whence) as off_t }
}

/// This process.
pub fn getpid() -> c_int {
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_getpid) as c_int }
}

/// Any system call of numbers only.
pub fn numbers(number: c_long, a: c_long, b: c_long, c: c_long, d: c_long) -> c_long {
    // SAFETY: callers pass no addresses.
    unsafe { libc::syscall(number, a, b, c, d) }
}

/// A line on standard error, which is PostgreSQL's log.
pub fn complain(message: &str) {
    let parts: [&[u8]; 3] = [b"pgstrata preload: ", message.as_bytes(), b"\n"];
    for part in parts {
        // SAFETY: the slice is valid for its length.
        unsafe { write(2, part.as_ptr(), part.len()) };
    }
}
