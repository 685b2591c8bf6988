//! What must be true, whatever happened.

use pgstrata_ids::{Lsn, Term};

use super::world::{RECORD, World};
use crate::{Phase, TermHistory};

/// Everything in `log` was just reported committed, in `term`: it must agree with everything that
/// was before, and every later winner must have it.
pub fn commit(world: &mut World, log: &[u8], term: Term) -> Result<(), String> {
    let shared = log.len().min(world.committed.len());
    if log[..shared] != world.committed[..shared] {
        let text = format!("{log:?} is reported committed, but {:?} was", world.committed);
        return Err(text);
    }
    if log.len() > world.committed.len() {
        world.committed = log.to_vec();
        world.committed_in.resize(log.len(), u64::MAX);
    }
    for first in &mut world.committed_in[..log.len()] {
        *first = term.0.min(*first);
    }
    for compute in &world.computes {
        let later = compute.core.phase() == Phase::Elected && compute.core.term() > term;
        if later && !compute.log.starts_with(log) {
            return Err(format!(
                "{log:?} is committed in term {term}, but the winner of term {} has {:?}",
                compute.core.term(),
                compute.log
            ));
        }
    }
    Ok(())
}

/// A compute was just elected and took its donor's log.
pub fn elected(world: &World, c: u8, start: Lsn) -> Result<(), String> {
    let compute = &world.computes[usize::from(c)];
    let term = compute.core.term();
    if !start.0.is_multiple_of(RECORD as u64) {
        return Err(format!("the winner of term {term} starts at {start}, inside a record"));
    }
    if compute.log.len() != start.0 as usize {
        return Err(format!("the donor's log doesn't reach {start}"));
    }
    // A vote that was long under way may complete an old term: its winner can commit nothing, and
    // needs to have only what was committed in terms before its own.
    let older = world.committed_in.iter().take_while(|first| **first < term.0).count();
    if !compute.log.starts_with(&world.committed[..older]) {
        return Err(format!(
            "the winner of term {term} has {:?}, but {:?} is committed",
            compute.log, world.committed
        ));
    }
    let other = &world.computes[usize::from(1 - c)];
    if other.core.phase() == Phase::Elected && other.core.term() == term {
        return Err(format!("term {term} has two winners"));
    }
    Ok(())
}

/// What must hold in every state.
pub fn state(world: &World) -> Result<(), String> {
    for (n, node) in world.nodes.iter().enumerate() {
        if world.fault.is_none() {
            node.core.invariants().map_err(|what| format!("acceptor {n}: {what}"))?;
        }
        let flush = node.core.flush_lsn().0 as usize;
        if !flush.is_multiple_of(RECORD) {
            return Err(format!("acceptor {n}'s durable log ends inside a record, at {flush}"));
        }
        if flush > node.synced {
            return Err(format!("acceptor {n} takes {flush} for durable, {} is", node.synced));
        }
        if node.told_commit > node.synced {
            return Err(format!("acceptor {n} reports committed what isn't durable there"));
        }
        if node.core.commit_lsn().0 as usize > world.committed.len() {
            return Err(format!("acceptor {n} takes something for committed that isn't"));
        }
    }
    for compute in &world.computes {
        compute.core.invariants().map_err(str::to_owned)?;
    }
    one_value_per_term_and_position(world)
}

fn one_value_per_term_and_position(world: &World) -> Result<(), String> {
    let of_node = world.nodes.iter().map(|node| (node.core.history(), &node.log));
    let elected = world.computes.iter().filter(|c| c.core.phase() == Phase::Elected);
    let of_compute = elected.map(|compute| (compute.core.history(), &compute.log));
    let logs: Vec<(&TermHistory, &Vec<u8>)> = of_node.chain(of_compute).collect();
    for (i, (history, log)) in logs.iter().enumerate() {
        for (other_history, other) in &logs[..i] {
            for at in 0..log.len().min(other.len()) {
                let end = Lsn(at as u64 + 1);
                let term = history.term_at_end(end);
                if term == other_history.term_at_end(end) && log[at] != other[at] {
                    return Err(format!(
                        "term {term} has two values at {at}: {} and {}",
                        log[at], other[at]
                    ));
                }
            }
        }
    }
    Ok(())
}
