//! Native redo of PostgreSQL's WAL, versions 15 to 18.
//!
//! Two halves, both pure. At ingest, [`Effects::derive`] turns one record into everything it implies: a value per block
//! that it changes, and what happens outside of blocks. At reads, [`apply_block`] and [`apply_slru`] apply values to
//! pages. [`ControlState`] follows `pg_control` and the counters. [`Checker`] proves the first two against the images
//! that `wal_consistency_checking` puts into WAL.
//!
//! The rules (R1 to R14) that comments name are those of `docs/redo.md`.

mod apply;
mod branch;
mod brin;
mod btree;
mod btree_posting;
mod checker;
mod checksum;
mod compare;
mod control;
mod effects;
mod error;
#[cfg(feature = "redo-faults")]
pub mod faults;
mod generic;
mod gin;
mod gin_posting;
mod gist;
mod hash;
mod hash_meta;
mod heap;
mod heap_prune;
mod heap_tuple;
mod mask;
pub mod page;
mod plan;
mod replayer;
mod report;
mod sequence;
mod slru;
mod spgist;
mod spgist_tuple;
mod store;
mod value;
mod visibility;
mod xact;

pub use apply::{Reads, apply_block, reads, value_kind};
pub use checker::{CheckError, Checker};
pub use checksum::{pd_checksum, set_checksum};
pub use compare::{PageKind, compare, compare_pages};
pub use control::{Changed, ControlState, ControlStateError};
pub use effects::{Effect, Effects, ValueRange};
pub use error::{RecordKind, RedoError};
pub use mask::{MaskTarget, mask};
pub use page::Page;
pub use plan::{Batch, Planner, partition};
pub use replayer::Replayer;
pub use report::{Counts, Mismatch, Report};
pub use slru::{
    CLOG_XACTS_PER_PAGE, COMMIT_TS_PER_PAGE, MEMBERS_PER_PAGE, OFFSETS_PER_PAGE, PAGES_PER_SEGMENT,
    apply_slru, is_complete_slru, is_truncated,
};
pub use store::{Loaded, MemoryStore, PageStore};
pub use value::{ValueKind, is_complete};
