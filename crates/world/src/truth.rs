//! What is true of the whole cluster, which nobody in it can know: who won which term, what each wrote, what is committed.

use std::collections::BTreeMap;

use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::TermHistory;

/// Why a run failed: what must never be was.
pub type Checked<T = ()> = Result<T, String>;

/// Room for the WAL of most runs, in bytes: what grows is copied over and over.
const ROOM: usize = 256 << 10;

#[derive(Debug)]
struct TermLog {
    compute: usize,
    start: Lsn,
    history: TermHistory,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Truth {
    start: Lsn,
    terms: BTreeMap<Term, TermLog>,
    /// All that was ever committed, from the timeline's start on, and which term wrote it.
    bytes: Vec<u8>,
    history: TermHistory,
    /// How far that was known of each term.
    known: BTreeMap<Term, Lsn>,
    /// Who was given up, and may not know it.
    given_up: AllGivenUp,
    /// Up to where what was given up may be committed again: whoever wrote it may still have it.
    may_return: Lsn,
}

impl Truth {
    pub fn new(start: Lsn) -> Truth {
        Truth {
            start,
            terms: BTreeMap::new(),
            bytes: Vec::with_capacity(ROOM),
            history: TermHistory::default(),
            known: BTreeMap::new(),
            given_up: AllGivenUp::default(),
            may_return: Lsn::INVALID,
        }
    }

    /// The end of what is committed.
    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    /// Which term wrote what is committed.
    pub fn history(&self) -> &TermHistory {
        &self.history
    }

    /// Committed bytes.
    pub fn committed_bytes(&self, from: Lsn, to: Lsn) -> Option<&[u8]> {
        let range =
            from.0.checked_sub(self.start.0)? as usize..to.0.checked_sub(self.start.0)? as usize;
        self.bytes.get(range)
    }

    /// Somebody won a term: nobody else did, and all that was committed in earlier ones is in his log.
    pub fn elected(
        &mut self,
        compute: usize,
        term: Term,
        start: Lsn,
        history: &TermHistory,
    ) -> Checked {
        if let Some(other) = self.terms.get(&term) {
            return Err(format!("computes {} and {compute} both won term {term}", other.compute));
        }
        // Who wins late, when a later term has begun, is fenced wherever he could do harm.
        let before = self.known.range(..term).map(|(_, lsn)| *lsn).max();
        let end = before.unwrap_or(self.start);
        if start < end {
            return Err(format!("term {term} starts at {start}, before {end}, which is committed"));
        }
        if history.up_to(end) != self.history.up_to(end) {
            return Err(format!(
                "the log of term {term} is not what is committed: {history:?}, {:?}",
                self.history
            ));
        }
        let log = TermLog {
            compute,
            start,
            history: history.clone(),
            bytes: Vec::with_capacity(ROOM / 4),
        };
        self.terms.insert(term, log);
        Ok(())
    }

    /// The winner of a term goes on with its log. Where members were given up, one of before may have won one of the same number.
    pub fn wrote(&mut self, compute: usize, term: Term, bytes: &[u8]) {
        if let Some(log) = self.terms.get_mut(&term).filter(|log| log.compute == compute) {
            log.bytes.extend_from_slice(bytes);
        }
    }

    /// The log of `term` is known to be committed up to `lsn`.
    pub fn committed(&mut self, term: Term, lsn: Lsn) -> Checked {
        let Some(log) = self.terms.get(&term) else {
            return Err(format!("{lsn} of term {term}, which nobody won, is committed"));
        };
        let end = self.end();
        let known = end.min(lsn);
        if log.history.up_to(known) != self.history.up_to(known) {
            return Err(format!(
                "{lsn} of term {term} is committed, and other bytes before {known} are too"
            ));
        }
        let of_term = self.known.entry(term).or_insert(lsn);
        *of_term = lsn.max(*of_term);
        if lsn <= end {
            return Ok(());
        }
        let history = log.history.up_to(lsn);
        for (later, other) in self.terms.range(Term(term.0 + 1)..) {
            if other.start < lsn || other.history.up_to(lsn) != history {
                return Err(format!(
                    "{lsn} of term {term} is committed, but term {later} was won without it"
                ));
            }
        }
        let mut more = Vec::new();
        let entries = history.entries();
        for (index, entry) in entries.iter().enumerate() {
            let to = entries.get(index + 1).map_or(lsn, |next| next.lsn);
            let from = entry.lsn.max(end);
            if from >= to {
                continue;
            }
            let written = self.terms.get(&entry.term).and_then(|log| {
                let offset =
                    |lsn: Lsn| lsn.0.checked_sub(log.start.0).map(|offset| offset as usize);
                log.bytes.get(offset(from)?..offset(to)?)
            });
            let Some(written) = written else {
                return Err(format!(
                    "{from} to {to} of term {} was never written, and is committed",
                    entry.term
                ));
            };
            more.extend_from_slice(written);
        }
        self.bytes.extend_from_slice(&more);
        self.history = history;
        Ok(())
    }

    /// An operator has given up what is committed from there on, and that anybody won a later term than this: those who are left
    /// know of none.
    pub fn give_up(&mut self, lsn: Lsn, term: Term, all: &AllGivenUp) {
        self.given_up = all.clone();
        self.may_return = self.may_return.max(self.end());
        self.terms.retain(|other, _| *other <= term);
        self.known.retain(|other, _| *other <= term);
        self.bytes.truncate(lsn.saturating_sub(self.start) as usize);
        self.history = self.history.up_to(lsn);
        self.known.values_mut().for_each(|known| *known = lsn.min(*known));
    }

    /// Whether who knows of this configuration, and of no later one, was given up: others may have other bytes.
    pub fn has_given_up(&self, configuration: u64) -> bool {
        self.given_up.includes(configuration)
    }

    /// A member knows that its log is committed up to there: of what was given up that may be news.
    pub fn returned(&mut self, history: &TermHistory, lsn: Lsn) -> Checked {
        match history.up_to(lsn).last() {
            Some(last) if lsn > self.end() && lsn <= self.may_return => {
                self.committed(last.term, lsn)
            }
            _ => Ok(()),
        }
    }

    /// Somebody reads this as committed.
    pub fn check_served(&self, who: &str, from: Lsn, bytes: &[u8]) -> Checked {
        let to = from + bytes.len() as u64;
        let Some(committed) = self.committed_bytes(from, to) else {
            return Err(format!(
                "{who} serves {from} to {to} as committed, but {} is the end of that",
                self.end()
            ));
        };
        if bytes == committed {
            return Ok(());
        }
        let place = bytes.iter().zip(committed).position(|(found, right)| found != right);
        let at = from + place.unwrap_or_default() as u64;
        let (last, count) = bytes
            .iter()
            .zip(committed)
            .enumerate()
            .filter(|(_, (found, right))| found != right)
            .fold((0, 0), |(_, count), (place, _)| (place, count + 1));
        let last = from + last as u64;
        Err(format!(
            "{who} serves at {at} another byte than is committed, and {count} up to {last}"
        ))
    }
}
