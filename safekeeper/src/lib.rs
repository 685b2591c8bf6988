//! The safekeeper: durable WAL of many timelines, one member of each one's quorum.
//!
//! Owns segment and control files, the WAL port for proposers and peers, the PostgreSQL
//! replication port for readers, and the HTTP port for people and monitoring. The rules of
//! consensus are `pgstrata-quorum`'s.

pub mod archive;
pub mod args;
pub mod background;
pub mod chain_reader;
pub mod checked_reader;
pub mod checked_segment;
pub mod decisions;
pub mod disk_space;
pub mod http;
pub mod identity;
pub mod latch;
pub mod ledger;
pub mod mend;
pub mod meters;
pub mod metrics;
pub mod pace;
pub mod pg;
pub mod registering;
pub mod run;
pub mod segment;
pub mod steward;
pub mod storage_error;
pub mod timeline;
pub mod timelines;
pub mod verifier;
pub mod wal;
pub mod wanted;
