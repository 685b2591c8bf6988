//! What the fuzz targets do with their input: one function per target, which must not panic on any bytes.
//!
//! The targets in `fuzz/` hand libFuzzer's bytes to these, and the test of this crate hands them the seeds and random
//! changes of the seeds, so that stable `cargo test` runs the same code. Owns no knowledge of the formats beyond what
//! it takes to get past a checksum: random bytes never have a right one.

mod control;
mod input;
mod layer;
mod redo;
mod values;
mod wal;
mod wire;

pub use control::control;
pub use layer::layer;
pub use redo::redo;
pub use values::values;
pub use wal::{record, wal};
pub use wire::wire;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("wal", wal),
    ("record", record),
    ("redo", redo),
    ("values", values),
    ("layer", layer),
    ("wire", wire),
];
