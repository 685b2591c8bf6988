//! What can be proven committed from durable logs alone, when no proposer runs.

use pgstrata_ids::{Lsn, Member, Term};

use crate::{Configuration, TermHistory};

/// The durable log of one member, as it reports it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holding {
    /// Whose log.
    pub member: Member,
    /// End of its durable log.
    pub flush_lsn: Lsn,
    /// Which term wrote which byte.
    pub history: TermHistory,
}

/// What a member says of itself while members are being changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Adopter {
    /// Number of the configuration that it has taken.
    pub number: u64,
    /// The term that it had promised then.
    pub configured_in: Term,
    /// Its durable log.
    pub holding: Holding,
}

/// A term that was won by both groups of a joint configuration, and how far what it has is committed by both; `None` if
/// that can't be told. Only then may the new group decide alone: all that was ever committed is with a majority of it.
///
/// Those who have taken the configuration refuse votes to whoever counts by the one before it. If they are a quorum, who
/// wins a term later than any that they had promised then counts by this one. What such a term's own proposer led a
/// quorum to is committed; and who was elected before, by the old group alone, is fenced. Reports need not be of one moment.
pub fn joint_in_use(joint: &Configuration, said: &[Adopter]) -> Option<(Term, Lsn)> {
    let adopters: Vec<&Adopter> = said.iter().filter(|one| one.number == joint.number()).collect();
    let has_it = |member| adopters.iter().any(|one| one.holding.member == member);
    if !joint.is_quorum(has_it) {
        return None;
    }
    let taken_in = adopters.iter().map(|one| one.configured_in).max()?;
    let holdings: Vec<Holding> = adopters.iter().map(|one| one.holding.clone()).collect();
    provable_commit(joint, &holdings).filter(|proven| proven.0 > taken_in)
}

/// The newest (term, position) that a quorum holds, if any: everything up to it is committed.
///
/// A member counts for term T only while T is the last entry of its history, and its log has reached the entry: then T's own
/// proposer led it there, or it copied what was committed up to there, and a quorum of such members is in the way of every
/// later winner that lacks what they hold. Bytes of T that a *later* proposer sent along prove nothing (figure 8 of the Raft
/// paper). Reports need not be of one moment. Members copy only committed bytes from each other ([`crate::PeerRange`]),
/// which keeps the argument.
pub fn provable_commit(configuration: &Configuration, holdings: &[Holding]) -> Option<(Term, Lsn)> {
    let held = |term: Term| {
        let reached = |member: Member| {
            let holding = holdings.iter().find(|holding| holding.member == member)?;
            let last = holding.history.last().filter(|last| last.term == term)?;
            (last.lsn <= holding.flush_lsn).then_some(holding.flush_lsn)
        };
        configuration.quorum_lsn(reached).map(|lsn| (term, lsn))
    };
    let terms = holdings.iter().filter_map(|holding| holding.history.last());
    terms.filter_map(|last| held(last.term)).max_by_key(|&(term, lsn)| (lsn, term))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgstrata_ids::{Incarnation, NodeId};

    use crate::TermStart;

    fn member(node: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) }
    }

    fn holding(node: u64, flush: u64, entries: &[(u64, u64)]) -> Holding {
        let entries =
            entries.iter().map(|&(term, lsn)| TermStart { term: Term(term), lsn: Lsn(lsn) });
        Holding {
            member: member(node),
            flush_lsn: Lsn(flush),
            history: TermHistory::new(entries.collect()).unwrap(),
        }
    }

    #[test]
    fn only_bytes_of_one_term_held_by_a_majority_count() {
        let three = Configuration::new(1, vec![member(1), member(2), member(3)]).unwrap();
        let proven = |holdings: &[Holding]| provable_commit(&three, holdings);
        assert_eq!(proven(&[holding(1, 50, &[(1, 0)])]), None);
        let two = [holding(1, 50, &[(1, 0)]), holding(2, 40, &[(1, 0)])];
        assert_eq!(proven(&two), Some((Term(1), Lsn(40))));
        // The second member's bytes of term 1 came from the proposer of term 3: a third member with a
        // byte of term 2 could still win.
        let sent_along = [holding(1, 30, &[(1, 0)]), holding(2, 30, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&sent_along), None);
        // Nor before the second has all that the third term began with; then it needs to write nothing.
        let behind = [holding(1, 30, &[(1, 0), (3, 30)]), holding(2, 20, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&behind), None);
        let reached = [holding(1, 30, &[(1, 0), (3, 30)]), holding(2, 30, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&reached), Some((Term(3), Lsn(30))));
        let continued = [holding(1, 40, &[(1, 0), (3, 30)]), holding(2, 35, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&continued), Some((Term(3), Lsn(35))));
    }
}
