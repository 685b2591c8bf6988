//! The page server: pages at any LSN, from WAL and layers.
//!
//! Owns what it ingested and did not upload yet, and a cache of object storage; both may be lost
//! at any moment. Does not decide what is committed: it reads only committed WAL.

pub mod directory;
pub mod import;
pub mod ingest;
pub mod layer;
pub mod lock;
pub mod metrics;
pub mod origins;
pub mod receiver;
pub mod remote;
pub mod repository;
pub mod safekeepers;
pub mod serve;
pub mod spool;
pub mod timeline;
pub mod value;
