//! What lies on disk and in object storage: one file per kind, its byte table above its codec.
//!
//! Pure: bytes in, values out. Every kind has a magic, a version, its owner's identity and
//! checksums, and four different errors: unwritten, torn, corrupt, and written by a newer version.

pub mod archived;
mod bytes;
pub mod claim;
mod document;
mod error;
pub mod index;
pub mod layer;
pub mod quorum;
pub mod registration;
pub mod resting;
pub mod safekeeper;
pub mod undecided;

pub use error::FormatError;
