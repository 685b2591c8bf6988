//! The world in one process.

pub mod lies;
pub mod plan;

mod compute;
mod network;
mod node;
mod truth;
mod world;

pub use lies::Lie;
pub use plan::{Plan, Trouble};
pub use world::{Outcome, World};

/// The run of a seed.
pub fn run(seed: u64, lie: Option<Lie>) -> Outcome {
    World::new(&Plan::new(seed), lie, false).run()
}
