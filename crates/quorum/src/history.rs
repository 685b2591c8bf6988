//! Which term wrote which bytes, and where two logs part.

use pgstrata_ids::{Lsn, Term};

/// Longest history that is accepted: one entry per term that wrote something.
pub const MAX_HISTORY: usize = 65_536;

/// A proposer merges old entries when its history has more.
const COMPACT_ABOVE: usize = 8_192;

/// How many of the newest entries it keeps then.
const KEEP: usize = 4_096;

/// A term, and the first byte that it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TermStart {
    /// The term.
    pub term: Term,
    /// Its first byte: always a record boundary.
    pub lsn: Lsn,
}

/// A history that can't have come from a correct proposer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Terms or positions do not rise.
    #[error("term history entry {index} does not rise above the one before it")]
    NotRising {
        /// Index of the entry.
        index: usize,
    },
    /// More than [`MAX_HISTORY`] entries.
    #[error("term history has {0} entries, more than the {MAX_HISTORY} supported")]
    TooLong(usize),
}

/// Terms and their first bytes, both strictly rising.
///
/// A term's bytes reach to the next entry's position, the last term's to the end of the log. An
/// entry at or past the end of the log has written nothing yet; one at the end of the log was reached all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TermHistory(Vec<TermStart>);

impl TermHistory {
    /// Checks that terms and positions rise.
    pub fn new(entries: Vec<TermStart>) -> Result<TermHistory, HistoryError> {
        if entries.len() > MAX_HISTORY {
            return Err(HistoryError::TooLong(entries.len()));
        }
        let falls = |pair: &[TermStart]| pair[0].term >= pair[1].term || pair[0].lsn >= pair[1].lsn;
        match entries.windows(2).position(falls) {
            Some(index) => Err(HistoryError::NotRising { index: index + 1 }),
            None => Ok(TermHistory(entries)),
        }
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> &[TermStart] {
        &self.0
    }

    /// The newest entry, whether or not it has written anything.
    pub fn last(&self) -> Option<TermStart> {
        self.0.last().copied()
    }

    /// The term of the last byte of a log that ends at `end`; term 0 if it has no bytes.
    pub fn term_at_end(&self, end: Lsn) -> Term {
        self.0.iter().rev().find(|entry| entry.lsn < end).map_or(Term(0), |entry| entry.term)
    }

    /// The history of the log's first bytes, up to `end`: entries that wrote something there.
    pub fn up_to(&self, end: Lsn) -> TermHistory {
        let count = self.0.partition_point(|entry| entry.lsn < end);
        TermHistory(self.0[..count].to_vec())
    }

    /// The entries that a log has reached which ends at `end`: also one that begins there and has written nothing. Its
    /// proposer was followed up to its very beginning, which is all that there was to have.
    pub fn reached_by(&self, end: Lsn) -> TermHistory {
        let count = self.0.partition_point(|entry| entry.lsn <= end);
        TermHistory(self.0[..count].to_vec())
    }

    /// This history cut at `start`, continued there by `term`, which must be newer.
    pub fn continued(&self, term: Term, start: Lsn) -> TermHistory {
        let mut history = self.up_to(start);
        debug_assert!(history.last().is_none_or(|last| last.term < term));
        history.0.push(TermStart { term, lsn: start });
        history
    }

    /// Whether a log that was won by the history `won` is, up to where the winner's term starts, the one that was led before by
    /// this one. All terms of what was led from `own_since` on are the same proposer's, and wrote the same bytes.
    pub fn is_led_on(&self, own_since: Term, won: &TermHistory, start: Lsn) -> bool {
        let newest = won.up_to(start).last();
        // Where members changed twice in a row, the voters may not have heard of the election between.
        let mut own = self.entries().iter().filter(|led| led.term >= own_since);
        newest == self.up_to(start).last() || own.any(|led| Some(*led) == newest)
    }

    /// This history with old entries merged into one, if there are many; everything that they say
    /// is about bytes before `commit_lsn`, and so is the first byte of the entry after them, which a
    /// majority shares therefore.
    ///
    /// The merged entry is the first byte of all with the newest of their terms: which of those
    /// terms wrote what is forgotten, and need not be known, as all of it is committed. It is in
    /// the logs of a majority, with that term or a newer one at their end, so that a shorter log
    /// that seems to be of that term still loses against them.
    pub fn compacted(self, commit_lsn: Lsn) -> TermHistory {
        let count = self.0.len();
        let first_kept = count.saturating_sub(KEEP);
        if count <= COMPACT_ABOVE || self.0[first_kept].lsn >= commit_lsn {
            return self;
        }
        let merged = TermStart { term: self.0[first_kept - 1].term, lsn: self.0[0].lsn };
        let kept = self.0[first_kept..].iter().copied();
        TermHistory(std::iter::once(merged).chain(kept).collect())
    }

    /// The end of the bytes that both logs have in common: this log up to `end`, the other up to
    /// `other_end`; `base` is up to where they agree if they share no entry.
    ///
    /// A term's entry names all that came before it, so the newest shared entry decides, whatever
    /// was merged before it.
    pub fn divergence(&self, end: Lsn, other: &TermHistory, other_end: Lsn, base: Lsn) -> Lsn {
        let ours = self.up_to(end);
        let theirs = other.up_to(other_end);
        let shared = ours.0.iter().rev().find_map(|entry| {
            let place =
                |history: &TermHistory| history.0.binary_search_by_key(&entry.term, |e| e.term);
            let (mine, other) = (place(&ours).ok()?, place(&theirs).ok()?);
            (theirs.0[other] == *entry).then_some((mine, other))
        });
        let Some((mine, other)) = shared else { return base };
        let end_of = |history: &TermHistory, last: usize, end: Lsn| {
            history.0.get(last + 1).map_or(end, |next| next.lsn.min(end))
        };
        end_of(&ours, mine, end).min(end_of(&theirs, other, other_end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        let entries =
            entries.iter().map(|&(term, lsn)| TermStart { term: Term(term), lsn: Lsn(lsn) });
        TermHistory::new(entries.collect()).unwrap()
    }

    #[test]
    fn falling_entries_are_refused() {
        let entry = |term, lsn| TermStart { term: Term(term), lsn: Lsn(lsn) };
        for bad in
            [[entry(2, 0), entry(1, 8)], [entry(1, 8), entry(2, 8)], [entry(1, 8), entry(1, 16)]]
        {
            assert_eq!(TermHistory::new(bad.to_vec()), Err(HistoryError::NotRising { index: 1 }));
        }
    }

    #[test]
    fn an_entry_without_bytes_does_not_count() {
        let history = history(&[(1, 0), (3, 80)]);
        assert_eq!(history.term_at_end(Lsn(80)), Term(1));
        assert_eq!(history.term_at_end(Lsn(88)), Term(3));
        assert_eq!(history.term_at_end(Lsn(0)), Term(0));
        assert_eq!(history.up_to(Lsn(80)), self::history(&[(1, 0)]));
    }

    #[test]
    fn a_log_goes_on_if_all_of_it_is_the_same_proposers() {
        // Led in term 5 from 100 on, and in term 6, with other members, from 200 on.
        let led = history(&[(3, 0), (5, 100), (6, 200)]);
        let is_same = |won: &[(u64, u64)], start| led.is_led_on(Term(5), &history(won), Lsn(start));
        assert!(is_same(&[(3, 0), (5, 100), (6, 200), (7, 250)], 250));
        // Who voted had not heard of term 6, and has more of term 5 than who voted then, or less.
        assert!(is_same(&[(3, 0), (5, 100), (7, 250)], 250));
        assert!(is_same(&[(3, 0), (5, 100), (7, 150)], 150));
        // Somebody else wrote, or what was led before is not there.
        assert!(!is_same(&[(3, 0), (5, 100), (6, 150), (7, 250)], 250));
        assert!(!is_same(&[(3, 0), (4, 100), (7, 250)], 250));
        assert!(!is_same(&[(3, 0), (7, 250)], 250));
    }

    /// The slow twin: byte by byte, as long as both have the same term there.
    fn divergence_by_byte(a: &TermHistory, end: u64, b: &TermHistory, other_end: u64) -> Lsn {
        let mut lsn = 0;
        while lsn < end
            && lsn < other_end
            && a.term_at_end(Lsn(lsn + 1)) == b.term_at_end(Lsn(lsn + 1))
        {
            lsn += 1;
        }
        Lsn(lsn)
    }

    /// Two logs as a correct cluster can have them: one prefix, then terms of their own.
    fn two_logs() -> impl Strategy<Value = (TermHistory, u64, TermHistory, u64)> {
        let steps = || prop::collection::vec((1u64..3, 1u64..6), 0..4);
        (steps(), steps(), steps(), 0u64..6, 0u64..6).prop_map(|(common, a, b, more_a, more_b)| {
            let mut prefix = Vec::new();
            let (mut term, mut lsn) = (0, 0);
            for (term_step, bytes) in common {
                term += term_step;
                prefix.push((term, lsn));
                lsn += bytes;
            }
            let grow = |steps: Vec<(u64, u64)>, parity: u64, more: u64| {
                let mut entries = prefix.clone();
                let (mut term, mut lsn) = (term.next_multiple_of(2) + parity, lsn);
                for (_, bytes) in steps {
                    term += 2;
                    entries.push((term, lsn));
                    lsn += bytes;
                }
                let end = if entries.is_empty() { 0 } else { lsn + more };
                (history(&entries), end)
            };
            let ((a, a_end), (b, b_end)) = (grow(a, 0, more_a), grow(b, 1, more_b));
            (a, a_end, b, b_end)
        })
    }

    proptest! {
        #[test]
        fn divergence_is_the_first_byte_of_another_term((a, a_end, b, b_end) in two_logs()) {
            let found = a.divergence(Lsn(a_end), &b, Lsn(b_end), Lsn(0));
            prop_assert_eq!(found, divergence_by_byte(&a, a_end, &b, b_end));
            prop_assert_eq!(found, b.divergence(Lsn(b_end), &a, Lsn(a_end), Lsn(0)));
        }
    }
}
