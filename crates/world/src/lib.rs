//! A quorum of safekeepers, the computes that write to it, their disks and their network: the world in one process, and in
//! one thread of it.
//!
//! What runs is what ships: the safekeeper's `Timeline` with its files, its recovery and what it concludes from its peers, and
//! the consensus core's `Proposer`. What is simulated is around it: disks ([`pgstrata_sim::SimDisk`]), connections, time, and
//! the loops that would wait for them. A number decides everything, so that what fails, fails again.
//!
//! There is no simulated runtime here, as turmoil and madsim have one: those run programs that wait for tokio. A safekeeper's
//! timeline waits for nobody. It is files under a lock, called by threads, and its steps can be taken one after the other by
//! whoever calls it. What that leaves out is what threads do within one call of another thread.
//!
//! What must never be, and is looked for after every event:
//!
//! * a term with two winners, or a winner whose log lacks something committed,
//! * a safekeeper that serves, as committed, another byte than is committed, or that refuses what it has,
//! * a safekeeper that comes back with less than it acknowledged, or has forgotten a term, a vote, or a configuration,
//! * a segment that is removed and not archived,
//! * refusals between members that mean that two histories contradict each other, or that valid WAL is none,
//! * a panic, and, once nothing goes wrong any more, two seconds in which nothing new is committed.

pub mod lies;
pub mod plan;

mod ancestor;
mod campaign;
mod compute;
mod follower;
mod network;
mod node;
mod objects;
mod truth;
mod visit;
mod wires;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use lies::Lie;
pub use plan::{Plan, Trouble};
pub use world::{Outcome, World};

/// The run of a plan.
pub fn run(plan: &Plan, lie: Option<Lie>, traces: bool) -> Outcome {
    // Nothing of it is used after a panic.
    let run = catch_unwind(AssertUnwindSafe(|| World::new(plan, lie, traces).run()));
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("of no text");
        Outcome { violation: Some(format!("a panic: {text}")), ..Outcome::default() }
    })
}

/// A plan that fails as well, with as little that goes wrong as can be found by leaving out one thing after the other.
pub fn minimise(plan: &Plan, lie: Option<Lie>) -> Plan {
    let mut least = plan.clone();
    let mut index = 0;
    while index < least.troubles.len() {
        let mut fewer = least.clone();
        fewer.troubles.remove(index);
        match run(&fewer, lie, false).violation {
            // What was tried before may be possible now.
            Some(_) => (least, index) = (fewer, 0),
            None => index += 1,
        }
    }
    least
}
