//! Runs a stock PostgreSQL on a disposable directory.
//!
//! Owns a cache that may be lost at any moment, and one `postgres`. Everything durable is on the
//! safekeepers; pages come from the page server.

pub mod access;
pub mod ask;
pub mod branch;
pub mod compute;
pub mod conf;
pub mod data_directory;
pub mod dynamic_memory;
pub mod http;
pub mod leftover;
pub mod memory;
pub mod pages;
pub mod places;
pub mod plain_file;
pub mod postgres;
pub mod proposer;
pub mod pulse;
pub mod segments;
pub mod settings;
pub mod socket;
pub mod wal_source;
