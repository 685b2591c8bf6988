//! Mending a timeline whose segments are damaged: what is missing or wrong comes from other members or the archive.
//!
//! Why nothing that was acknowledged is lost by it, and nobody is elected who lacks it, is said in `docs/consensus.md`,
//! "A torn end, or damage, and how it is mended". In short: what is put in place is, byte for byte, what was there; or it is
//! shown that nobody depends on what was there.

pub mod check;
mod log;
mod relief;
mod sources;

pub use log::{DamagedLog, Lack, Mended};
pub use relief::relieves;
pub use sources::{Said, Source, Sources};
