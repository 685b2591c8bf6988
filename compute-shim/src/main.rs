//! Runs a stock PostgreSQL on a disposable directory.
fn main() {}
