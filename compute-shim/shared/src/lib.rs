//! Memory and messages shared by the compute shim's daemon and the library that it preloads into
//! PostgreSQL.
//!
//! One memory file, made by the daemon, inherited by the postmaster and mapped by every process:
//!
//! ```text
//! offset               what
//!      0               Control: the WAL hand-over
//!   4096               SEGMENTS x Segment: an open-addressed table of the page server's relation segments
//!   LOCALS_OFFSET      LOCALS x Local: a cache of names of which the page server has nothing
//!   BLOCKS_OFFSET      BLOCK_STATES bytes: one for each block that the page server has of a segment
//! ```
//! The file is sparse: a segment that was never opened costs nothing, a small one less than 100 bytes.
//!
//! Both tables are written by the daemon only. Segments are only added; names in the cache give way to others. Block
//! states change by compare-and-swap from any process. See [`block`] for the states and who may change which.

mod map;
mod message;
pub mod path;

pub use map::{Control, Found, SharedMap};
pub use message::{NO_ENTRY, REPLY_SIZE, REQUEST_SIZE, Reply, Request, RequestKind};

/// Environment variable: descriptor of the shared memory file.
pub const ENV_MEMORY: &str = "PGSTRATA_SHIM_MEMORY_FD";
/// Environment variable: descriptor of the eventfd that tells the daemon about new WAL.
pub const ENV_EVENT: &str = "PGSTRATA_SHIM_EVENT_FD";
/// Environment variable: path of the daemon's socket.
pub const ENV_SOCKET: &str = "PGSTRATA_SHIM_SOCKET";
/// Environment variable: the data directory.
pub const ENV_DATA: &str = "PGSTRATA_SHIM_DATA";
/// Environment variable: `1` if the compute only answers queries.
pub const ENV_READ_ONLY: &str = "PGSTRATA_SHIM_READ_ONLY";

/// The name that `global/pg_control` really has. A server that is started without the preload
/// library does not find its control file and stops, instead of serving zeros as data.
pub const CONTROL_FILE: &str = "global/pg_control.pgstrata";

/// Blocks of a relation segment (stock builds: 1 GiB).
pub const SEGMENT_BLOCKS: u32 = 131_072;
/// Entries of the segment table.
pub const SEGMENTS: usize = 1 << 22;
/// Blocks that can have states: 128 TiB of relations.
pub const BLOCK_STATES: u64 = 1 << 34;
/// The states of a segment begin at a multiple of this many.
pub const STATES_UNIT: u64 = 64;
/// Where the segment table begins.
pub const SEGMENTS_OFFSET: usize = 4096;
/// Bytes of a table entry.
pub const SEGMENT_SIZE: usize = 32;
/// Names of segments of which the page server has nothing that are remembered, at most.
pub const LOCALS: usize = 1 << 18;
/// In how many places a name may be.
pub const LOCAL_WAYS: usize = 8;
/// Bytes of such a name.
pub const LOCAL_SIZE: usize = 20;
/// Where the cache of these names begins.
pub const LOCALS_OFFSET: usize = SEGMENTS_OFFSET + SEGMENTS * SEGMENT_SIZE;
/// Where the block states begin.
pub const BLOCKS_OFFSET: usize = LOCALS_OFFSET + LOCALS * LOCAL_SIZE;
/// Size of the memory file.
pub const MEMORY_SIZE: usize = BLOCKS_OFFSET + BLOCK_STATES as usize;

/// States of a block of a mapped segment.
///
/// ```text
/// ABSENT  -> FILLING   daemon, before it writes the block into the local file
/// FILLING -> CLEAN     daemon, when the block is there
/// FILLING -> ABSENT    daemon, when the fetch failed
/// ABSENT  -> WRITTEN   PostgreSQL, before it writes the block, or cuts it off
/// CLEAN   -> WRITTEN   PostgreSQL, likewise
/// ```
/// A writer that meets FILLING waits: the daemon's older bytes must not land on top of its own.
pub mod block {
    /// Not in the local file; the page server has it.
    pub const ABSENT: u8 = 0;
    /// The daemon is writing it into the local file.
    pub const FILLING: u8 = 1;
    /// In the local file, as the page server has it.
    pub const CLEAN: u8 = 2;
    /// In the local file, changed by this compute.
    pub const WRITTEN: u8 = 3;
}

/// States of an entry of the segment table. MAPPED becomes KEPT when PostgreSQL has unlinked the file.
pub mod segment {
    /// The entry is free.
    pub const EMPTY: u32 = 0;
    /// The local file is sparse, and has block states.
    pub const MAPPED: u32 = 1;
    /// The local file is all there is, if any, although the page server knows of one.
    pub const KEPT: u32 = 2;
}
