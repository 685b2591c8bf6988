//! Visiting every state once.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use super::world::{Action, Beginning, Bounds, Content, LEAVER, Message, World};
use crate::Fault;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Different states visited.
    pub states: usize,
    /// Steps between them.
    pub steps: u64,
    /// Longest way from the beginning that was walked.
    pub depth: usize,
    /// Most bytes that were committed in any state.
    pub most_committed: usize,
    /// Highest term that was won in any state.
    pub highest_term: u64,
    /// True if nothing is left to visit.
    pub complete: bool,
    /// What is wrong, if anything.
    pub violation: Option<Violation>,
}

/// A state that must not be, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What is wrong.
    pub what: String,
    /// From the beginning.
    pub trace: Vec<Action>,
}

#[derive(Debug)]
struct Step {
    action: Action,
    before: Option<Rc<Step>>,
    depth: usize,
}

fn trace_of(mut step: Option<&Rc<Step>>) -> Vec<Action> {
    let mut trace = Vec::new();
    while let Some(one) = step {
        trace.push(one.action);
        step = one.before.as_ref();
    }
    trace.reverse();
    trace
}

/// 64 bits: among ten million states, two share one with a probability of three in a million.
pub fn fingerprint(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Passes fingerprints on: they are hashes already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.0 = self.0.rotate_left(8) ^ u64::from(byte));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Fingerprints of the states that were visited.
type Seen = HashSet<u64, BuildHasherDefault<Identity>>;

/// Visits all states within `bounds`, at most `most_states`. With `shortest_trace` the nearest
/// come first, which takes memory for a whole generation; else the deepest come first, which takes memory for one way.
pub fn explore(
    bounds: Bounds,
    fault: Option<Fault>,
    most_states: usize,
    shortest_trace: bool,
) -> Outcome {
    let first = beginning(bounds, fault);
    let mut seen = Seen::default();
    seen.insert(first.fingerprint());
    let outcome = Outcome {
        states: 1,
        steps: 0,
        depth: 0,
        most_committed: 0,
        highest_term: 0,
        complete: false,
        violation: None,
    };
    match shortest_trace {
        true => nearest_first(first, seen, most_states, outcome),
        false => deepest_first(first, seen, most_states, outcome),
    }
}

fn nearest_first(
    first: World,
    mut seen: Seen,
    most_states: usize,
    mut outcome: Outcome,
) -> Outcome {
    let mut waiting: VecDeque<(World, Option<Rc<Step>>)> = [(first, None)].into();
    while let Some((world, before)) = waiting.pop_front() {
        outcome.note(&world, before.as_ref().map_or(0, |step| step.depth));
        for action in world.actions() {
            outcome.steps += 1;
            let depth = before.as_ref().map_or(0, |step| step.depth) + 1;
            match world.after(action) {
                Ok(after) if seen.insert(after.fingerprint()) => {
                    let step = Rc::new(Step { action, before: before.clone(), depth });
                    waiting.push_back((after, Some(step)));
                }
                Ok(_) => {}
                Err(what) => {
                    let mut trace = trace_of(before.as_ref());
                    trace.push(action);
                    outcome.states = seen.len();
                    outcome.violation = Some(Violation { what, trace });
                    return outcome;
                }
            }
        }
        outcome.states = seen.len();
        if outcome.states >= most_states {
            return outcome;
        }
    }
    outcome.complete = true;
    outcome
}

/// A state on the way, how it was come to, and what is still to be tried from there.
struct Stop {
    world: World,
    by: Option<Action>,
    actions: std::vec::IntoIter<Action>,
}

impl Stop {
    fn at(world: World, by: Option<Action>) -> Stop {
        let actions = world.actions().into_iter();
        Stop { world, by, actions }
    }
}

fn deepest_first(
    first: World,
    mut seen: Seen,
    most_states: usize,
    mut outcome: Outcome,
) -> Outcome {
    outcome.note(&first, 0);
    let mut way = vec![Stop::at(first, None)];
    while let Some(stop) = way.last_mut() {
        let Some(action) = stop.actions.next_back() else {
            way.pop();
            continue;
        };
        outcome.steps += 1;
        match stop.world.after(action) {
            Ok(after) if seen.insert(after.fingerprint()) => {
                outcome.note(&after, way.len());
                outcome.states = seen.len();
                if outcome.states >= most_states {
                    return outcome;
                }
                way.push(Stop::at(after, Some(action)));
            }
            Ok(_) => {}
            Err(what) => {
                let mut trace: Vec<Action> = way.iter().filter_map(|stop| stop.by).collect();
                trace.push(action);
                outcome.violation = Some(Violation { what, trace });
                return outcome;
            }
        }
    }
    outcome.complete = true;
    outcome
}

/// The first state.
fn beginning(bounds: Bounds, fault: Option<Fault>) -> World {
    let mut world = World::new(bounds, fault);
    let act = |world: &mut World, action| {
        // Nothing has gone wrong yet that a check could find.
        *world = world.after(action).unwrap_or_else(|what| unreachable!("{what}"));
    };
    let deliver_all = |world: &mut World| {
        while !world.network.is_empty() {
            act(world, Action::Deliver(0, false));
        }
    };
    let starts_alone =
        matches!(bounds.beginning, Beginning::Fresh | Beginning::Joint | Beginning::Replaced);
    if !starts_alone {
        act(&mut world, Action::Campaign(0, 1));
        deliver_all(&mut world);
    }
    let deliver_to_all_but = |world: &mut World, node: u8| {
        while let Some(next) = world.network.iter().position(|message| message.node != node) {
            act(world, Action::Deliver(next as u8, false));
        }
        world.network.clear();
    };
    if matches!(bounds.beginning, Beginning::Joint | Beginning::Replaced) {
        let left_out = if bounds.beginning == Beginning::Replaced { LEAVER } else { u8::MAX };
        world.left.changes += 2;
        act(&mut world, Action::Change);
        act(&mut world, Action::Campaign(0, 2));
        deliver_to_all_but(&mut world, left_out);
        act(&mut world, Action::Write(0));
        for node in (0..world.nodes.len() as u8).filter(|&node| node != left_out) {
            act(&mut world, Action::Send(0, node, false));
        }
        deliver_to_all_but(&mut world, left_out);
        act(&mut world, Action::Change);
        if bounds.beginning == Beginning::Replaced {
            world.left.restarts += 1;
            act(&mut world, Action::Restart(0));
            world.left.crashes += 1;
            // All that it wrote is synced.
            world.crash(0, u8::MAX).unwrap_or_else(|what| unreachable!("{what}"));
        }
        return world;
    }
    if bounds.beginning == Beginning::Heard {
        world.left.changes += 1;
        act(&mut world, Action::Change);
        world.left.learns += 2;
        act(&mut world, Action::Learn(0));
        act(&mut world, Action::Learn(1));
        return world;
    }
    if bounds.beginning == Beginning::Elected || bounds.beginning == Beginning::Fresh {
        return world;
    }
    act(&mut world, Action::Write(0));
    if bounds.beginning == Beginning::RetakenLonger {
        act(&mut world, Action::Write(0));
    }
    act(&mut world, Action::Send(0, 0, false));
    deliver_all(&mut world);
    act(&mut world, Action::Campaign(1, 1));
    let waits =
        |message: &Message| message.node == 2 && matches!(message.content, Content::Elected(_));
    let is_next = |message: &Message| message.node != 0 && !waits(message);
    while let Some(next) = world.network.iter().position(is_next) {
        act(&mut world, Action::Deliver(next as u8, false));
    }
    // It may come later.
    world.network.retain(waits);
    let waiting = std::mem::take(&mut world.network);
    act(&mut world, Action::Write(1));
    act(&mut world, Action::Send(1, 1, false));
    deliver_all(&mut world);
    world.network = waiting;
    if bounds.beginning != Beginning::Divided {
        world.left.restarts += 1;
        act(&mut world, Action::Restart(0));
        act(&mut world, Action::Campaign(0, 1));
        world.network.retain(|message| !waits(message));
        deliver_to_all_but(&mut world, 1);
    }
    world
}

impl Outcome {
    fn note(&mut self, world: &World, depth: usize) {
        self.depth = self.depth.max(depth);
        self.most_committed = self.most_committed.max(world.committed.len());
        let won = world.computes.iter().filter(|c| c.core.phase() == crate::Phase::Elected);
        let highest = won.map(|compute| compute.core.term().0).max().unwrap_or_default();
        self.highest_term = self.highest_term.max(highest);
    }
}
