//! Soft state: who has which timeline, how far.
fn main() {}
