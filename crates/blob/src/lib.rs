//! Object storage: put-if-absent, compare-and-swap, retry.
