//! The configurations of a timeline, one after the other, from the founding on.
//!
//! There is one chain for each timeline, in one place that is advanced by compare-and-swap (object storage). The swap
//! decides: whoever asks for votes with a configuration, an acceptor takes it only when it stands there. So there is one
//! configuration of each number, whoever changes members, and whatever flags anybody starts with.

use pgstrata_ids::Member;

use crate::{Configuration, ConfigurationError};

/// Configurations that are kept: the newest. An acceptor that was away for longer believes the oldest of them.
pub const MAX_CHAIN: usize = 64;

/// Number of the configuration that a log is founded with.
const FIRST: u64 = 1;

/// A chain that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No configuration, or too many.
    #[error("a chain of {0} configurations, 1 to {MAX_CHAIN} are possible")]
    Length(usize),
    /// One that does not follow from the one before it.
    #[error("configuration {number} does not follow from the one before it")]
    NoStep {
        /// Its number.
        number: u64,
    },
    /// The next one can't be used.
    #[error(transparent)]
    Unusable(#[from] ConfigurationError),
    /// A change is under way already.
    #[error("members are being changed already, by configuration {0}")]
    UnderWay(u64),
    /// There is no change to end.
    #[error("configuration {0} is no change that could be ended")]
    NotUnderWay(u64),
    /// The change would change nothing.
    #[error("these are the members already")]
    NoChange,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain(Vec<Configuration>);

impl Chain {
    /// The first configuration.
    pub fn found(members: Vec<Member>) -> Result<Chain, ChainError> {
        Chain::of(vec![Configuration::new(FIRST, members)?])
    }

    /// These configurations, if each follows from the one before it.
    pub fn of(configurations: Vec<Configuration>) -> Result<Chain, ChainError> {
        if configurations.is_empty() || configurations.len() > MAX_CHAIN {
            return Err(ChainError::Length(configurations.len()));
        }
        let is_first = |first: &Configuration| match first.number() {
            0 => false,
            FIRST => first.incoming().is_empty(),
            _ => true,
        };
        let wrong = configurations.first().filter(|first| !is_first(first));
        let steps = configurations.windows(2).find(|pair| !is_step(&pair[0], &pair[1]));
        match wrong.or(steps.map(|pair| &pair[1])) {
            Some(wrong) => Err(ChainError::NoStep { number: wrong.number() }),
            None => Ok(Chain(configurations)),
        }
    }

    /// All that are kept, oldest first.
    pub fn configurations(&self) -> &[Configuration] {
        &self.0
    }

    /// The one that is to be used.
    pub fn newest(&self) -> &Configuration {
        &self.0[self.0.len() - 1]
    }

    /// Whether the configuration is still there that the log was founded with.
    pub fn begins_with_the_first(&self) -> bool {
        self.0[0].number() == FIRST
    }

    /// Whether whoever has this configuration may go on to the newest: it is one of them, or older than all.
    pub fn goes_on_from(&self, own: &Configuration) -> bool {
        let (first, newest) = (self.0[0].number(), self.newest().number());
        match own.number() {
            number if number < first => true,
            number if number > newest => false,
            number => self.0[(number - first) as usize].has_the_members_of(own),
        }
    }

    /// The chain in which a change to these members has begun.
    pub fn change_to(&self, incoming: Vec<Member>) -> Result<Chain, ChainError> {
        let newest = self.newest();
        if !newest.incoming().is_empty() {
            return Err(ChainError::UnderWay(newest.number()));
        }
        let members = newest.members().to_vec();
        let next = Configuration::joint(newest.number() + 1, members, incoming)?;
        if next.incoming().is_empty() {
            return Err(ConfigurationError::NoMembers.into());
        }
        if newest
            .has_the_members_of(&Configuration::new(newest.number(), next.incoming().to_vec())?)
        {
            return Err(ChainError::NoChange);
        }
        Ok(self.with(next))
    }

    /// The chain in which the change under way has ended. Only after a proposer of the joint configuration has committed a
    /// record (`docs/consensus.md`).
    pub fn change_ended(&self) -> Result<Chain, ChainError> {
        let newest = self.newest();
        if newest.incoming().is_empty() {
            return Err(ChainError::NotUnderWay(newest.number()));
        }
        let next = Configuration::new(newest.number() + 1, newest.incoming().to_vec())?;
        Ok(self.with(next))
    }

    /// The chain in which the change under way is undone: the members before it are the members. At any time, without a
    /// proof: whatever the change committed is with a majority of them (`docs/consensus.md`).
    pub fn change_undone(&self) -> Result<Chain, ChainError> {
        let newest = self.newest();
        if newest.incoming().is_empty() {
            return Err(ChainError::NotUnderWay(newest.number()));
        }
        let next = Configuration::new(newest.number() + 1, newest.members().to_vec())?;
        Ok(self.with(next))
    }

    /// The chain that begins anew with who is left of the members, against the word of nobody else: what only the others had is
    /// given up. Never without an operator who says that they are gone for good. The one that has `most` decides until all
    /// have that: a majority of the others could elect without it.
    pub fn recovered(&self, most: Member, survivors: Vec<Member>) -> Result<Chain, ChainError> {
        let number = self.newest().number().saturating_add(1);
        let next = match survivors == [most] {
            true => Configuration::new(number, survivors)?,
            false => Configuration::joint(number, vec![most], survivors)?,
        };
        Chain::of(vec![next])
    }

    /// The chain that begins anew with others, where none of the members is left: what they are to have is in the archive, and
    /// what is not there is given up. Never without an operator who says that all are gone for good.
    pub fn restored(&self, members: Vec<Member>) -> Result<Chain, ChainError> {
        let number = self.newest().number().saturating_add(1);
        Chain::of(vec![Configuration::new(number, members)?])
    }

    /// Whether a step that is kept shows that this member was let go: others have what it has.
    pub fn shows_leaving(&self, member: Member) -> bool {
        let leaves = |pair: &[Configuration]| pair[0].contains(member) && !pair[1].contains(member);
        self.0.windows(2).any(leaves)
    }

    /// Whether others may have gone on without a member that knows of no later configuration than `own`: they began anew, without
    /// asking it, or so many steps ago that none of them shows whether they did. What they were decided to be since then tells
    /// nothing of what it has.
    pub fn began_without(&self, own: &Configuration, member: Member) -> bool {
        let first = &self.0[0];
        own.contains(member) && own.number() < first.number() && !first.contains(member)
    }

    fn with(&self, next: Configuration) -> Chain {
        let mut configurations = self.0.clone();
        configurations.push(next);
        let dropped = configurations.len().saturating_sub(MAX_CHAIN);
        configurations.drain(..dropped);
        Chain(configurations)
    }
}

/// Whether the one is the next after the other: the beginning of a change, its end, or the way back.
fn is_step(before: &Configuration, after: &Configuration) -> bool {
    let same = |one: &[Member], two: &[Member]| {
        one.len() == two.len() && one.iter().all(|member| two.contains(member))
    };
    let begins = before.incoming().is_empty()
        && !after.incoming().is_empty()
        && same(before.members(), after.members())
        && !same(after.members(), after.incoming());
    let ends = !before.incoming().is_empty()
        && after.incoming().is_empty()
        && (same(before.incoming(), after.members()) || same(before.members(), after.members()));
    before.number().checked_add(1) == Some(after.number()) && (begins || ends)
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{Incarnation, NodeId};
    use proptest::prelude::*;

    use super::*;

    fn group(nodes: &[u64]) -> Vec<Member> {
        let member =
            |&node: &u64| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) };
        nodes.iter().map(member).collect()
    }

    #[test]
    fn a_change_begins_and_ends() {
        let first = Chain::found(group(&[1, 2, 3])).unwrap();
        assert_eq!(first.change_ended(), Err(ChainError::NotUnderWay(1)));
        assert_eq!(first.change_to(group(&[3, 2, 1])), Err(ChainError::NoChange));
        assert_eq!(first.change_to(Vec::new()), Err(ConfigurationError::NoMembers.into()));
        let joint = first.change_to(group(&[1, 2, 4])).unwrap();
        assert_eq!(joint.change_to(group(&[1, 2, 5])), Err(ChainError::UnderWay(2)));
        let ended = joint.change_ended().unwrap();
        assert_eq!(ended.newest(), &Configuration::new(3, group(&[1, 2, 4])).unwrap());
        assert_eq!(Chain::of(ended.configurations().to_vec()), Ok(ended.clone()));
        // Or it is undone, and may begin again.
        let undone = joint.change_undone().unwrap();
        assert_eq!(undone.newest(), &Configuration::new(3, group(&[1, 2, 3])).unwrap());
        assert_eq!(Chain::of(undone.configurations().to_vec()), Ok(undone.clone()));
        assert_eq!(undone.change_undone(), Err(ChainError::NotUnderWay(3)));
        let again = undone.change_to(group(&[1, 2, 4])).unwrap();
        assert_eq!(Chain::of(again.configurations().to_vec()), Ok(again));
        // Who has another one of a number, or one that is further, is on no way to here.
        let of = |number, nodes: &[u64]| Configuration::new(number, group(nodes)).unwrap();
        assert!(ended.goes_on_from(&of(1, &[3, 2, 1])));
        assert!(ended.goes_on_from(&Configuration::unknown(&[NodeId(1)]).unwrap()));
        assert!(!ended.goes_on_from(&of(1, &[1, 2, 4])));
        assert!(!ended.goes_on_from(&of(2, &[1, 2, 3])));
        assert!(!ended.goes_on_from(&of(4, &[1, 2, 4])));
    }

    #[test]
    fn who_is_left_begins_anew() {
        let old = Chain::found(group(&[1, 2, 3])).unwrap();
        let joint = old.change_to(group(&[1, 2, 4])).unwrap();
        let most = group(&[2])[0];
        let recovered = joint.recovered(most, group(&[2])).unwrap();
        assert_eq!(recovered.configurations(), [Configuration::new(3, group(&[2])).unwrap()]);
        assert_eq!(Chain::of(recovered.configurations().to_vec()), Ok(recovered.clone()));
        assert!(recovered.goes_on_from(old.newest()) && recovered.goes_on_from(joint.newest()));
        let two = joint.recovered(most, group(&[1, 2])).unwrap();
        let first = Configuration::joint(3, group(&[2]), group(&[1, 2])).unwrap();
        assert_eq!(two.newest(), &first);
        assert_eq!(Chain::of(two.configurations().to_vec()), Ok(two));
        let ended = joint.change_ended().unwrap();
        let leaves = |chain: &Chain, node| chain.shows_leaving(group(&[node])[0]);
        assert!(leaves(&ended, 3) && !leaves(&ended, 2) && !leaves(&ended, 4));
        assert!(leaves(&joint.change_undone().unwrap(), 4));
        // Who was given up is not let go.
        assert!(!leaves(&recovered, 1) && !leaves(&recovered, 3));
    }

    #[test]
    fn what_does_not_follow_is_no_chain() {
        let of = |number, nodes: &[u64]| Configuration::new(number, group(nodes)).unwrap();
        let joint = |number, from: &[u64], to: &[u64]| {
            Configuration::joint(number, group(from), group(to)).unwrap()
        };
        let wrong = |configurations: Vec<Configuration>, number| {
            assert_eq!(Chain::of(configurations), Err(ChainError::NoStep { number }));
        };
        assert_eq!(Chain::of(Vec::new()), Err(ChainError::Length(0)));
        wrong(vec![of(0, &[1])], 0);
        wrong(vec![joint(1, &[1], &[2])], 1);
        // From one group to another at once; a number left out; to others than were there or about to come.
        wrong(vec![of(1, &[1, 2, 3]), of(2, &[1, 2, 4])], 2);
        wrong(vec![of(1, &[1]), joint(3, &[1], &[2])], 3);
        wrong(vec![of(1, &[1]), joint(2, &[1], &[2]), of(3, &[1, 2])], 3);
        wrong(vec![of(1, &[1]), joint(2, &[1], &[2]), of(3, &[2]), of(4, &[1])], 4);
        wrong(vec![of(1, &[1]), joint(2, &[2], &[1])], 2);
        wrong(vec![of(1, &[1]), joint(2, &[1], &[1])], 2);
        wrong(vec![joint(7, &[1], &[2]), joint(8, &[1], &[3])], 8);
    }

    proptest! {
        /// However long it gets, the newest are kept, and are a chain.
        #[test]
        fn a_chain_is_bounded(changes in prop::collection::vec(prop::collection::btree_set(1u64..8, 1..5), 1..80)) {
            let mut chain = Chain::found(group(&[1, 2, 3])).unwrap();
            for nodes in changes {
                let nodes: Vec<u64> = nodes.into_iter().collect();
                let Ok(joint) = chain.change_to(group(&nodes)) else { continue };
                chain = joint.change_ended().unwrap();
                prop_assert!(chain.configurations().len() <= MAX_CHAIN);
                prop_assert_eq!(Chain::of(chain.configurations().to_vec()), Ok(chain.clone()));
            }
        }
    }
}
