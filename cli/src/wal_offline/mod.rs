//! Commands that read WAL from files, without any service: `wal dump` and `wal check-redo`.

pub mod check_redo;
pub mod dump;
mod jobs;
mod overlay;
pub mod segments;
