//! Who the members are, and what a quorum of them is.

use pgstrata_ids::{Lsn, NodeId};

/// Most members of one group.
pub const MAX_MEMBERS: usize = 15;

/// A configuration that can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// A timeline needs at least one member.
    #[error("a membership configuration needs at least one member")]
    NoMembers,
    /// More than [`MAX_MEMBERS`] in a group.
    #[error("a membership configuration has {0} members, more than the {MAX_MEMBERS} supported")]
    TooMany(usize),
    /// A node occurs twice in a group.
    #[error("node {0} is listed twice in the membership configuration")]
    Twice(NodeId),
}

/// A numbered set of members; while a change is under way, two sets.
///
/// A joint configuration needs a majority of both groups for everything, so that it overlaps with
/// every quorum of the configuration before it and of the one after it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Configuration {
    number: u64,
    members: Vec<NodeId>,
    incoming: Vec<NodeId>,
}

impl Configuration {
    /// One group of members.
    pub fn new(number: u64, members: Vec<NodeId>) -> Result<Configuration, ConfigurationError> {
        Configuration::joint(number, members, Vec::new())
    }

    /// A change from `members` to `incoming`; an empty `incoming` means no change under way.
    pub fn joint(
        number: u64,
        members: Vec<NodeId>,
        incoming: Vec<NodeId>,
    ) -> Result<Configuration, ConfigurationError> {
        if members.is_empty() {
            return Err(ConfigurationError::NoMembers);
        }
        for group in [&members, &incoming] {
            if group.len() > MAX_MEMBERS {
                return Err(ConfigurationError::TooMany(group.len()));
            }
            let twice = group.iter().enumerate().find(|(i, node)| group[..*i].contains(node));
            if let Some((_, &node)) = twice {
                return Err(ConfigurationError::Twice(node));
            }
        }
        Ok(Configuration { number, members, incoming })
    }

    /// Higher replaces lower.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The members, or those before the change under way.
    pub fn members(&self) -> &[NodeId] {
        &self.members
    }

    /// The members after the change under way; empty if there is none.
    pub fn incoming(&self) -> &[NodeId] {
        &self.incoming
    }

    /// Every node of either group, each once.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        let only_incoming = self.incoming.iter().filter(|node| !self.members.contains(node));
        self.members.iter().chain(only_incoming).copied()
    }

    /// True if both have the same groups, in whatever order.
    pub fn has_the_members_of(&self, other: &Configuration) -> bool {
        let same = |one: &[NodeId], two: &[NodeId]| {
            one.len() == two.len() && one.iter().all(|node| two.contains(node))
        };
        same(&self.members, &other.members) && same(&self.incoming, &other.incoming)
    }

    /// True if `node` is in either group.
    pub fn contains(&self, node: NodeId) -> bool {
        self.members.contains(&node) || self.incoming.contains(&node)
    }

    /// True if those for which `has` holds are a majority of each group.
    pub fn is_quorum(&self, has: impl Fn(NodeId) -> bool) -> bool {
        let majority =
            |group: &[NodeId]| group.iter().filter(|&&node| has(node)).count() > group.len() / 2;
        majority(&self.members) && (self.incoming.is_empty() || majority(&self.incoming))
    }

    /// The highest position that a majority of each group has reached.
    pub fn quorum_lsn(&self, reached: impl Fn(NodeId) -> Option<Lsn>) -> Option<Lsn> {
        let of_group = |group: &[NodeId]| {
            let mut sorted = [None; MAX_MEMBERS];
            let sorted = &mut sorted[..group.len()];
            for (slot, &node) in sorted.iter_mut().zip(group) {
                *slot = reached(node);
            }
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            sorted[group.len() / 2]
        };
        let first = of_group(&self.members)?;
        if self.incoming.is_empty() {
            return Some(first);
        }
        of_group(&self.incoming).map(|second| first.min(second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unusable_configurations_are_refused() {
        assert_eq!(Configuration::new(1, vec![]), Err(ConfigurationError::NoMembers));
        let twice = Configuration::new(1, vec![NodeId(1), NodeId(1)]);
        assert_eq!(twice, Err(ConfigurationError::Twice(NodeId(1))));
        let many = (0..16).map(NodeId).collect();
        assert_eq!(Configuration::new(1, many), Err(ConfigurationError::TooMany(16)));
    }

    proptest! {
        /// The slow twin tries every position.
        #[test]
        fn quorum_lsn_is_the_highest_with_a_quorum(
            members in 1usize..6,
            incoming in 0usize..6,
            reached in prop::collection::vec(prop::option::of(0u64..8), 10),
        ) {
            let nodes = |range: std::ops::Range<usize>| range.map(|n| NodeId(n as u64)).collect();
            let configuration =
                Configuration::joint(1, nodes(0..members), nodes(3..3 + incoming)).unwrap();
            let reached = |node: NodeId| reached[node.0 as usize].map(Lsn);
            let slow = (0..8).rev().map(Lsn).find(|&lsn| {
                configuration.is_quorum(|node| reached(node).is_some_and(|at| at >= lsn))
            });
            prop_assert_eq!(configuration.quorum_lsn(reached), slow);
        }
    }
}
