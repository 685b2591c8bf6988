//! Runs a stock PostgreSQL on a disposable directory.

pub mod proposer;
