//! When nothing depends any more on what a damaged member acknowledged.

use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::TermHistory;

/// Whether all that was ever committed by counting a member, whose history is `own`, is held by a quorum without it, where
/// WAL up to `commit_lsn` of a log with this `history` is committed. `bound` is where the member's log ended at most, if that
/// is known.
///
/// The member acknowledged bytes in terms up to the last of its history, T, and no others. A byte of a later term was
/// committed by members that followed one, so without this one; and who won that term has all that was committed in T
/// or before. Bytes of T itself that lie beyond all that the member had were committed without it as well, and what comes
/// before them with them.
pub fn relieves(
    own: &TermHistory,
    bound: Option<Lsn>,
    history: &TermHistory,
    commit_lsn: Lsn,
) -> bool {
    let last = own.last().map_or(Term(0), |last| last.term);
    let committed = history.up_to(commit_lsn).last().map_or(Term(0), |last| last.term);
    committed > last || (committed == last && bound.is_some_and(|bound| commit_lsn > bound))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgstrata_quorum::TermStart;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        let entry = |&(term, lsn): &(u64, u64)| TermStart { term: Term(term), lsn: Lsn(lsn) };
        TermHistory::new(entries.iter().map(entry).collect()).unwrap()
    }

    #[test]
    fn only_a_later_term_or_more_than_it_ever_had_relieves_a_member() {
        let own = history(&[(1, 0), (3, 50)]);
        let by = |bound: Option<u64>, entries: &[(u64, u64)], commit_lsn: u64| {
            relieves(&own, bound.map(Lsn), &history(entries), Lsn(commit_lsn))
        };
        // What it acknowledged in term 3 may be what the commit rests on.
        assert!(!by(None, &[(1, 0), (3, 50)], 1000));
        assert!(!by(Some(1000), &[(1, 0), (3, 50)], 1000));
        assert!(by(Some(999), &[(1, 0), (3, 50)], 1000));
        // Nothing of the later term is committed: its winner may have been elected with this member's vote.
        assert!(!by(Some(90), &[(1, 0), (3, 50), (4, 80)], 80));
        assert!(by(None, &[(1, 0), (3, 50), (4, 80)], 81));
        // A winner that never met what this member has of term 3.
        assert!(by(None, &[(1, 0), (4, 40)], 41));
        // An earlier term says nothing, however far it goes.
        assert!(!by(Some(90), &[(1, 0), (2, 40)], 1000));
    }
}
