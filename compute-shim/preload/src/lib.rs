//! The library preloaded into PostgreSQL.
//!
//! It stands between `postgres` and the C library for the calls that touch files, and does three
//! things: a read of a block that is not in the local sparse file has the daemon fetch it first;
//! a sync of a WAL segment waits until a quorum has everything written before; every other sync
//! does nothing, because the directory is disposable. Files that are neither relations nor WAL
//! pass through.
//!
//! Rules of this code: no threads, no allocation, no panics, no calls of interposed functions
//! (system calls only), and nothing but an atomic load on the path of a cached read. It is inert
//! in any other program, such as an archive command that inherits the environment.

mod calls;
mod daemon;
mod files;
mod interrupts;
mod paths;
mod shm;
mod state;
mod sys;
mod wal;
