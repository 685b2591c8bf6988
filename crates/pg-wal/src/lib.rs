//! PostgreSQL's write-ahead log, versions 15 to 18: framing, records, and the few records that we write.
//!
//! Owns: the stream decoder ([`WalDecoder`]) and its frugal twin ([`WalChecker`]), one record's parts ([`DecodedRecord`]), full-page images, names as
//! `pg_waldump` prints them, `pg_control` and checkpoints, and the encoder of our own records ([`WalWriter`]).
//! Does no I/O, keeps no clock, and never panics or grows without bound on any input. What records *do* to pages is
//! `pgstrata-pg-redo`'s.

pub mod bytes;
mod checker;
mod checkpoint;
mod control_file;
mod decoder;
mod encoder;
mod error;
mod image;
mod names;
mod page_header;
mod pglz;
mod record;
mod version;

#[cfg(test)]
mod tests;

pub use checker::WalChecker;
pub use checkpoint::CheckPoint;
pub use control_file::{CONTROL_FILE_SIZE, ControlFile, ControlFileError, DbState};
pub use decoder::{MAX_RECORD_SIZE_DEFAULT, Record, WalDecoder};
pub use encoder::{Placed, WalWriter};
pub use error::{WalError, WalErrorKind};
pub use image::{BlockImage, Compression, ImageError};
pub use names::{record_name, rmgr, rmgr_name};
pub use page_header::{PageHeader, page_header_size};
pub use record::{BlockRef, DecodedRecord, RecordHeader};
pub use version::PgVersion;
