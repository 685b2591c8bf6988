//! The page server: pages at any LSN from WAL and layers.
fn main() {}
