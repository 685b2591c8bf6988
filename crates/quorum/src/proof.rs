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

/// The newest (term, position) that a quorum holds, if any: everything up to it is committed.
///
/// A member's bytes of term T count only while T is the last entry of its history: then T's own
/// proposer sent them, so the member held them before it promised a later term, and a quorum of
/// such members is in the way of every later winner that lacks them. Bytes of T that a *later*
/// proposer sent along prove nothing (figure 8 of the Raft paper). Reports need not be of one
/// moment. Members copy only committed bytes from each other ([`crate::PeerRange`]), which keeps
/// the argument.
pub fn provable_commit(configuration: &Configuration, holdings: &[Holding]) -> Option<(Term, Lsn)> {
    let held = |term: Term| {
        let reached = |member: Member| {
            let holding = holdings.iter().find(|holding| holding.member == member)?;
            let last = holding.history.last().filter(|last| last.term == term)?;
            (last.lsn < holding.flush_lsn).then_some(holding.flush_lsn)
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
        // The second member's bytes of term 1 came from the proposer of term 3, which has written
        // nothing yet: a third member with a byte of term 2 could still win.
        let sent_along = [holding(1, 30, &[(1, 0)]), holding(2, 30, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&sent_along), None);
        let continued = [holding(1, 40, &[(1, 0), (3, 30)]), holding(2, 35, &[(1, 0), (3, 30)])];
        assert_eq!(proven(&continued), Some((Term(3), Lsn(35))));
    }
}
