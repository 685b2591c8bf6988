//! The pgstrata command.
fn main() {}
