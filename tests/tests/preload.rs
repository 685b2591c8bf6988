//! Everything by which a version of `postgres` touches file contents passes the preload library.
//!
//! A call that is missing there would read zeros, which are valid new pages, or write what nobody
//! ships. So the programs' imports are compared with the library's exports.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use pgstrata_tests::installation::Installation;
use pgstrata_tests::programs;

/// Calls of the C library and of the kernel's other interfaces that open files, read, write, cut,
/// sync or remove them, in all their spellings.
const FILE_CALLS: &[&str] = &[
    "open",
    "openat",
    "creat",
    "__open_2",
    "__openat_2",
    "close",
    "dup",
    "dup2",
    "dup3",
    "read",
    "__read_chk",
    "readv",
    "pread",
    "__pread_chk",
    "preadv",
    "preadv2",
    "write",
    "writev",
    "pwrite",
    "pwritev",
    "pwritev2",
    "ftruncate",
    "truncate",
    "fallocate",
    "posix_fallocate",
    "posix_fadvise",
    "fsync",
    "fdatasync",
    "sync",
    "syncfs",
    "sync_file_range",
    "msync",
    "unlink",
    "unlinkat",
    "remove",
    "rmdir",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "stat",
    "lstat",
    "__xstat",
    "__lxstat",
    "fstatat",
    "__fxstatat",
    "statx",
    "access",
    "faccessat",
    "opendir",
    "scandir",
    "nftw",
    "fopen",
    "freopen",
    "mmap",
    "sendfile",
    "splice",
    "copy_file_range",
    "ioctl",
    "prctl",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_queue_init_params",
    "io_uring_queue_init",
    "io_uring_submit",
    "aio_read",
    "aio_write",
    "lio_listio",
    "syscall",
];

/// Calls that need no care, and why.
const HARMLESS: &[(&str, &str)] = &[
    ("dup", "of descriptors that are no relation's: of the standard streams"),
    ("dup2", "the same"),
    ("posix_fallocate", "grows a relation beyond the blocks that the page server has"),
    ("rename", "of files that are no relation's: WAL, relation maps, SLRUs, two-phase, logical"),
    ("link", "of WAL segments, which are looked up by name when they are opened"),
    ("freopen", "of the standard streams"),
    ("mmap", "of shared memory"),
    ("io_uring_queue_init", "only with io_method = io_uring, which the shim does not allow"),
    ("io_uring_queue_init_params", "the same"),
    ("io_uring_submit", "the same"),
];

fn symbols(path: &Path, which: &str) -> BTreeSet<String> {
    let output = Command::new("nm").args(["-D", which]).arg(path).output().unwrap();
    assert!(output.status.success(), "nm of {}", path.display());
    let text = String::from_utf8(output.stdout).unwrap();
    let last = |line: &str| line.split_whitespace().next_back().unwrap().to_owned();
    text.lines().map(last).map(|name| name.split('@').next().unwrap().to_owned()).collect()
}

#[test]
fn every_call_that_touches_files_is_interposed() {
    let library = programs().join("libpgstrata_preload.so");
    let exports = symbols(&library, "--defined-only");
    let calls: BTreeSet<_> = FILE_CALLS
        .iter()
        .flat_map(|name| [(*name).to_owned(), format!("{name}64"), format!("{name}64v2")])
        .chain(["__pread64_chk".to_owned()])
        .collect();
    for major in [15, 16, 17, 18] {
        let installation = Installation::of(major);
        let imports = symbols(&installation.bin().join("postgres"), "--undefined-only");
        assert!(imports.contains("pwrite") || imports.contains("pwrite64"), "no imports: {major}");
        let bare = |name: &String| name.trim_end_matches("64").to_owned();
        let missing: Vec<_> = imports
            .intersection(&calls)
            .filter(|name| !exports.contains(*name))
            .filter(|name| !HARMLESS.iter().any(|(harmless, _)| *harmless == bare(name)))
            .collect();
        assert!(missing.is_empty(), "postgres {major} calls {missing:?} past the preload library");
    }
}
