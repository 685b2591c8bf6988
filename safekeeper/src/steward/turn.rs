//! What the next step of a change of members is, by what is decided and what members say. Who asks them, and how, is not here.

use pgstrata_ids::{Member, NodeId};
use pgstrata_quorum::{Adopter, Configuration, Holding, joint_in_use};
use pgstrata_wire::safekeeper::Status;

/// What a newcomer may lack when the change begins to count on it, in bytes: less than a proposer has in memory for it.
pub const CLOSE: u64 = 32 << 20;

/// A member that answers.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Who.
    pub member: Member,
    /// What it says.
    pub status: Status,
}

/// What is to be done where certain nodes are to be the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The change begins, if they are not the members already.
    Begin,
    /// Another one is under way, which is undone first.
    Undo,
    /// This one is under way.
    Prepare,
}

/// The turn after the newest configuration.
pub fn of(newest: &Configuration, nodes: &[NodeId]) -> Turn {
    let is_asked_for = newest.incoming().len() == nodes.len()
        && newest.incoming().iter().all(|member| nodes.contains(&member.node));
    match (newest.incoming().is_empty(), is_asked_for) {
        (true, _) => Turn::Begin,
        (false, true) => Turn::Prepare,
        (false, false) => Turn::Undo,
    }
}

/// Whether a member comes in by this change.
pub fn is_newcomer(joint: &Configuration, member: Member) -> bool {
    !joint.members().contains(&member)
}

/// A node because of which a change never ends, where members whose directories are lost are known: it was to come in, or too few
/// are left of the group after the change. With the directory that it has now it can come in by a change that begins anew.
pub fn never_ends(joint: &Configuration, is_lost: impl Fn(Member) -> bool) -> Option<NodeId> {
    let lost: Vec<Member> =
        joint.incoming().iter().copied().filter(|member| is_lost(*member)).collect();
    let is_majority_left = lost.len() * 2 < joint.incoming().len();
    let found = lost.iter().find(|member| is_newcomer(joint, **member) || !is_majority_left);
    found.map(|member| member.node)
}

/// How much newcomers lack of what others know to be committed, in bytes.
pub fn behind(newcomers: &[Heard], others: &[Heard]) -> u64 {
    let committed = others.iter().map(|one| one.status.commit_lsn).max().unwrap_or_default();
    let flushed = newcomers.iter().map(|one| one.status.flush_lsn).min();
    flushed.map_or(0, |lsn| committed.saturating_sub(lsn))
}

/// Whether a compute is connected to one of them.
pub fn is_led(heard: &[Heard]) -> bool {
    heard.iter().any(|one| one.status.has_proposer)
}

/// Whether the new group may decide alone, or what that waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    IsReady,
    /// No majority of both groups has taken the configuration.
    WaitsForOld,
    /// A newcomer that the compute has not reached.
    WaitsForCompute(Member),
    /// Nobody has committed anything with both groups: the compute is to, or somebody in its place.
    IsUnused,
}

/// By what all members say who answered when they were told of the joint configuration. Reports need not be of one moment.
pub fn verdict(joint: &Configuration, all: &[Heard]) -> Verdict {
    let number = joint.number();
    let taken = |member| {
        let its = all.iter().find(|one| one.member == member);
        its.is_some_and(|one| one.status.configuration.number() == number)
    };
    if !joint.is_quorum(taken) {
        return Verdict::WaitsForOld;
    }
    let said: Vec<Adopter> = all.iter().map(adopter).collect();
    let Some((term, _)) = joint_in_use(joint, &said) else { return Verdict::IsUnused };
    // Under load it is never as far as the others at one moment; but it gets what they get.
    // What it copied from others it has without a compute that reaches it: then one that runs must.
    let is_led = is_led(all);
    let follows = |one: &Heard| {
        let at = one.status.history.last();
        at.is_some_and(|at| at.term >= term) && (one.status.has_proposer || !is_led)
    };
    let lacks = |one: &&Heard| is_newcomer(joint, one.member) && !follows(one);
    match all.iter().find(lacks) {
        None => Verdict::IsReady,
        Some(one) => Verdict::WaitsForCompute(one.member),
    }
}

fn adopter(heard: &Heard) -> Adopter {
    let status = &heard.status;
    let holding = Holding {
        member: heard.member,
        flush_lsn: status.flush_lsn,
        history: status.history.clone(),
    };
    Adopter { number: status.configuration.number(), configured_in: status.configured_in, holding }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::Incarnation;

    use super::*;

    fn group(nodes: &[u64]) -> Vec<Member> {
        let member =
            |&node: &u64| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) };
        nodes.iter().map(member).collect()
    }

    #[test]
    fn a_change_of_which_too_few_are_left_never_ends() {
        let joint =
            |from: &[u64], to: &[u64]| Configuration::joint(2, group(from), group(to)).unwrap();
        let lost = |nodes: &'static [u64]| move |member: Member| nodes.contains(&member.node.0);
        // A newcomer.
        assert_eq!(never_ends(&joint(&[1, 2, 3], &[1, 2, 4]), lost(&[4])), Some(NodeId(4)));
        // Who is replaced.
        assert_eq!(never_ends(&joint(&[1, 2, 3], &[1, 2, 4]), lost(&[3])), None);
        // Who stays, and the others are enough, or are not.
        assert_eq!(never_ends(&joint(&[1, 2, 3], &[1, 2, 3, 4, 5]), lost(&[3])), None);
        assert_eq!(never_ends(&joint(&[1, 2, 3], &[3, 4]), lost(&[3])), Some(NodeId(3)));
    }
}
