//! Every behaviour of a small cluster, within stated bounds.
//!
//! Breadth first over all interleavings, so that a violation comes with a shortest trace. The
//! states are those of the real core; the world around it (disks, network, crashes) is in
//! [`world`](self). What is not bounded is free: any message may be lost or overtaken.

mod actions;
mod checks;
mod search;
#[cfg(test)]
mod tests;
mod world;

pub use search::{Outcome, Violation, explore};
pub use world::{Action, Beginning, Bounds};
