//! Who the members are, and what a quorum of them is.

use pgstrata_ids::{Incarnation, Lsn, Member, NodeId};

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
///
/// Numbers begin with 1. Number 0 stands for one that is not known: it names nodes, and of none of them which life of its
/// directory is meant, so that nobody is a member of it, and it can't elect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Configuration {
    number: u64,
    members: Vec<Member>,
    incoming: Vec<Member>,
}

impl Configuration {
    /// One group of members.
    pub fn new(number: u64, members: Vec<Member>) -> Result<Configuration, ConfigurationError> {
        Configuration::joint(number, members, Vec::new())
    }

    /// A change from `members` to `incoming`; an empty `incoming` means no change under way.
    pub fn joint(
        number: u64,
        members: Vec<Member>,
        incoming: Vec<Member>,
    ) -> Result<Configuration, ConfigurationError> {
        if members.is_empty() {
            return Err(ConfigurationError::NoMembers);
        }
        for group in [&members, &incoming] {
            if group.len() > MAX_MEMBERS {
                return Err(ConfigurationError::TooMany(group.len()));
            }
            let is_before = |i: usize, node| group[..i].iter().any(|other| other.node == node);
            let twice = group.iter().enumerate().find(|(i, member)| is_before(*i, member.node));
            if let Some((_, member)) = twice {
                return Err(ConfigurationError::Twice(member.node));
            }
        }
        Ok(Configuration { number, members, incoming })
    }

    /// The one that is not known, of these nodes.
    pub fn unknown(nodes: &[NodeId]) -> Result<Configuration, ConfigurationError> {
        let nobody = Incarnation([0; 16]);
        let member = |&node: &NodeId| Member { node, incarnation: nobody };
        Configuration::new(0, nodes.iter().map(member).collect())
    }

    /// Higher replaces lower.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it can elect: it is not one that is not known.
    pub fn is_known(&self) -> bool {
        self.number > 0
    }

    /// The members, or those before the change under way.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members after the change under way; empty if there is none.
    pub fn incoming(&self) -> &[Member] {
        &self.incoming
    }

    /// Every member of either group, each once. A node whose directory is replaced is two.
    pub fn all(&self) -> impl Iterator<Item = Member> + '_ {
        let only_incoming = self.incoming.iter().filter(|member| !self.members.contains(member));
        self.members.iter().chain(only_incoming).copied()
    }

    /// Every node of either group, each once.
    pub fn nodes(&self) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for member in self.all() {
            if !nodes.contains(&member.node) {
                nodes.push(member.node);
            }
        }
        nodes
    }

    /// True if both have the same groups, in whatever order.
    pub fn has_the_members_of(&self, other: &Configuration) -> bool {
        let same = |one: &[Member], two: &[Member]| {
            one.len() == two.len() && one.iter().all(|member| two.contains(member))
        };
        same(&self.members, &other.members) && same(&self.incoming, &other.incoming)
    }

    /// True if `member` is in either group.
    pub fn contains(&self, member: Member) -> bool {
        self.is_known() && (self.members.contains(&member) || self.incoming.contains(&member))
    }

    /// True if those for which `has` holds are a majority of each group.
    pub fn is_quorum(&self, has: impl Fn(Member) -> bool) -> bool {
        let majority = |group: &[Member]| {
            group.iter().filter(|&&member| has(member)).count() > group.len() / 2
        };
        majority(&self.members) && (self.incoming.is_empty() || majority(&self.incoming))
    }

    /// With what later configuration who leads with this one goes on, by the newest that each member tells of: the newest of
    /// those that enough know. A newer one that a few know hides no other: they may have read what the rest can't
    /// read now, or are no members any more, and those who are may never hear of it as long as nothing changes again.
    pub fn next_of<'a>(&self, told: &[(Member, &'a Configuration)]) -> Option<&'a Configuration> {
        let knows = |member: Member, number: u64| {
            told.iter().any(|(who, newest)| *who == member && newest.number >= number)
        };
        let known = told.iter().map(|(_, newest)| *newest);
        known
            .filter(|next| self.yields_to(next, |member| knows(member, next.number)))
            .max_by_key(|next| next.number)
    }

    /// Whether who leads with this configuration goes on with a later one, by who knows of that: a majority of its members
    /// before its change, or a quorum of the own ones. A few may have read what the others can't read now, and would not elect.
    /// The own ones may never be a quorum again, where members were changed, and lost, and changed again meanwhile; and
    /// newcomers are met only afterwards.
    fn yields_to(&self, next: &Configuration, knows: impl Fn(Member) -> bool) -> bool {
        let known = next.members.iter().filter(|&&member| knows(member)).count();
        next.number > self.number && (known > next.members.len() / 2 || self.is_quorum(knows))
    }

    /// The highest position that a majority of each group has reached.
    pub fn quorum_lsn(&self, reached: impl Fn(Member) -> Option<Lsn>) -> Option<Lsn> {
        let of_group = |group: &[Member]| {
            let mut sorted = [None; MAX_MEMBERS];
            let sorted = &mut sorted[..group.len()];
            for (slot, &member) in sorted.iter_mut().zip(group) {
                *slot = reached(member);
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

    fn member(node: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation([node as u8 + 1; 16]) }
    }

    #[test]
    fn unusable_configurations_are_refused() {
        assert_eq!(Configuration::new(1, vec![]), Err(ConfigurationError::NoMembers));
        let twice = Configuration::new(1, vec![member(1), member(1)]);
        assert_eq!(twice, Err(ConfigurationError::Twice(NodeId(1))));
        let other = Member { incarnation: Incarnation([9; 16]), ..member(1) };
        let twice = Configuration::new(1, vec![member(1), other]);
        assert_eq!(twice, Err(ConfigurationError::Twice(NodeId(1))));
        let many = (0..16).map(member).collect();
        assert_eq!(Configuration::new(1, many), Err(ConfigurationError::TooMany(16)));
    }

    #[test]
    fn a_leader_goes_on_when_those_know_who_can_elect() {
        let again = Member { incarnation: Incarnation([9; 16]), ..member(0) };
        let old = vec![member(0), member(1), member(2)];
        let new = vec![again, member(1), member(2)];
        let own = Configuration::joint(4, old, new.clone()).unwrap();
        let replaced = Configuration::new(5, new.clone()).unwrap();
        let grown =
            Configuration::joint(6, new, vec![again, member(1), member(2), member(3), member(4)]);
        let grown = grown.unwrap();
        let by = |next: &Configuration, who: &[Member]| {
            own.yields_to(next, |member| who.contains(&member))
        };
        assert!(!by(&replaced, &[again]) && !by(&grown, &[again]));
        assert!(by(&replaced, &[again, member(1)]) && by(&replaced, &[member(1), member(2)]));
        // Member 2 is lost: of the own first group only one is left, and 3 and 4 were never met.
        assert!(by(&grown, &[again, member(1)]));
        assert!(!replaced.yields_to(&own, |_| true));
    }

    #[test]
    fn a_newer_configuration_that_few_know_hides_none_that_enough_know() {
        let old: Vec<Member> = [1, 2, 3].map(member).to_vec();
        let own = Configuration::joint(4, old, vec![member(5)]).unwrap();
        let ended = Configuration::new(5, vec![member(5)]).unwrap();
        let all = [1, 2, 5].map(member).to_vec();
        let begun = Configuration::joint(6, vec![member(5)], all).unwrap();
        let undone = Configuration::new(7, vec![member(5)]).unwrap();
        let told = [(member(1), &undone), (member(2), &begun)];
        assert_eq!(own.next_of(&told), None);
        let told = [told[0], told[1], (member(5), &ended)];
        assert_eq!(own.next_of(&told), Some(&ended));
        let told = [told[0], (member(5), &begun)];
        assert_eq!(own.next_of(&told), Some(&begun));
        assert_eq!(own.next_of(&[(member(5), &undone)]), Some(&undone));
        assert_eq!(undone.next_of(&told), None);
    }

    #[test]
    fn a_node_in_two_lives_is_two_members() {
        let other = Member { incarnation: Incarnation([9; 16]), ..member(2) };
        let (old, new) = (vec![member(0), member(1), member(2)], vec![member(0), member(1), other]);
        let joint = Configuration::joint(2, old, new).unwrap();
        assert_eq!(joint.all().count(), 4);
        assert_eq!(joint.nodes(), [NodeId(0), NodeId(1), NodeId(2)]);
        assert!(joint.is_quorum(|one| one == member(0) || one == member(1)));
        assert!(!joint.is_quorum(|one| one == member(0) || one == member(2)));
        assert!(!joint.contains(Member { incarnation: Incarnation([7; 16]), ..member(0) }));
    }

    #[test]
    fn nobody_is_a_member_of_what_is_not_known() {
        let unknown = Configuration::unknown(&[NodeId(0), NodeId(1)]).unwrap();
        for member in unknown.all() {
            assert!(!unknown.contains(member));
        }
    }

    proptest! {
        /// The slow twin tries every position.
        #[test]
        fn quorum_lsn_is_the_highest_with_a_quorum(
            members in 1usize..6,
            incoming in 0usize..6,
            reached in prop::collection::vec(prop::option::of(0u64..8), 10),
        ) {
            let group = |range: std::ops::Range<usize>| range.map(|n| member(n as u64)).collect();
            let configuration =
                Configuration::joint(1, group(0..members), group(3..3 + incoming)).unwrap();
            let reached = |member: Member| reached[member.node.0 as usize].map(Lsn);
            let slow = (0..8).rev().map(Lsn).find(|&lsn| {
                configuration.is_quorum(|member| reached(member).is_some_and(|at| at >= lsn))
            });
            prop_assert_eq!(configuration.quorum_lsn(reached), slow);
        }
    }
}
