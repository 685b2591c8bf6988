//! The safekeeper: durable WAL, one member of a quorum.
fn main() {}
