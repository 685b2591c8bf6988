//! Whose WAL is taken in, and what that is worth. Members that were given up may live on and not have heard of it: what they call
//! committed is not, after where the log parted. Who they are stands in object storage, with who the members are.
//!
//! Whoever is followed says which configuration of the members it knows, and is judged by what is decided then, and every now and
//! then again. What was taken from whom is remembered until it is durable: nothing becomes durable before what is decided was read
//! after it came.

use std::collections::BTreeMap;

use pgstrata_format::quorum::{AllGivenUp, Quorum, Restored};
use pgstrata_ids::Lsn;

/// What is decided of a timeline's members, as far as it matters to who follows the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    newest: u64,
    given_up: AllGivenUp,
    restored: Option<Restored>,
}

impl Decided {
    /// By what stands in object storage; `None` where nothing does, as of a timeline that no compute ever had.
    pub fn new(quorum: Option<&Quorum>) -> Decided {
        let Some(quorum) = quorum else { return Decided::default() };
        Decided {
            newest: quorum.chain.newest().number(),
            given_up: quorum.given_up.clone(),
            restored: quorum.restored,
        }
    }

    /// Why nobody follows one who knows of configuration `number`, and of no later one; 0 if it does not say.
    fn refuses(&self, number: u64) -> Option<String> {
        // Of what older releases gave up they wrote down only who began anew.
        let restored = self.restored.map_or(0, |restored| restored.number);
        let last = self.given_up.last().map_or(0, |last| last.number).max(restored);
        (number < last).then(|| match number {
            0 => format!(
                "it does not say who the branch's members are, of whom some were given up (configuration {last})"
            ),
            _ => format!(
                "it knows of configuration {number}, and in {last} members were given up: it may be one of them"
            ),
        })
    }

    /// How far WAL up to `end` from whoever knew of `number` is of the log that goes on, if not all of it is.
    fn denies(&self, number: u64, end: Lsn) -> Option<Lsn> {
        let restored = self.restored.filter(|restored| number < restored.number);
        let restored = restored.map(|restored| restored.lsn).filter(|lsn| end > *lsn);
        let given_up = self.given_up.denies(number, end).map(|point| point.lsn);
        given_up.into_iter().chain(restored).min()
    }
}

/// Why WAL is not taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// This source may not be followed, for this reason.
    Source(String),
    /// What was taken in after here, of this source or others, is not of the log that goes on.
    Taken(Lsn),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Believing {
    /// As it was read last.
    decided: Option<Decided>,
    /// What the source says that is followed now.
    number: u64,
    /// How far what is not durable yet came from sources of which configuration.
    taken: BTreeMap<u64, Lsn>,
}

impl Believing {
    /// Whether a source is followed that knows of configuration `number`, by what is decided now, or could not be read.
    pub fn judge(&mut self, number: u64, read: Result<Decided, String>) -> Result<(), Doubt> {
        let noted = self.note(read);
        self.judge_by(number, noted)
    }

    /// The same by what was read before, where that may do: more was decided since for whoever knows more.
    pub fn judge_again(&mut self, number: u64) -> Option<Result<(), Doubt>> {
        let is_known = self.decided.as_ref().is_some_and(|decided| number <= decided.newest);
        is_known.then(|| self.judge_by(number, Ok(())))
    }

    fn judge_by(&mut self, number: u64, noted: Result<(), String>) -> Result<(), Doubt> {
        let decided = match (noted, &self.decided) {
            (Ok(()), Some(decided)) => decided,
            // Nobody who knows as much as this was given up by then. Whether it was since is found out before anything of it is
            // durable.
            (Err(_), Some(before)) if number >= before.newest => before,
            (noted, _) => {
                let why = noted.err().unwrap_or_else(|| "it was not read".to_owned());
                let text = format!("who was given up of the branch's members is not known: {why}");
                return Err(Doubt::Source(text));
            }
        };
        if let Some(lsn) = self.parts_by(decided) {
            return Err(Doubt::Taken(lsn));
        }
        if let Some(why) = decided.refuses(number) {
            return Err(Doubt::Source(why));
        }
        self.number = number;
        Ok(())
    }

    /// WAL up to `end`, which no record ends beyond, is about to be taken in of the source that was judged last.
    pub fn took(&mut self, end: Lsn) {
        // Others may have given as much before, or the beginning of a record: what is there then may be of either.
        let of_number = self.taken.entry(self.number).or_insert(end);
        *of_number = end.max(*of_number);
    }

    /// Whether there is anything that is not durable.
    pub fn has_taken(&self) -> bool {
        !self.taken.is_empty()
    }

    /// Where what was taken in parts from the log that goes on, if it does, by what is decided now. An error if that is not known.
    pub fn parts_at(&mut self, read: Result<Decided, String>) -> Result<Option<Lsn>, String> {
        self.note(read)?;
        Ok(self.decided.as_ref().and_then(|decided| self.parts_by(decided)))
    }

    fn parts_by(&self, decided: &Decided) -> Option<Lsn> {
        self.taken.iter().filter_map(|(number, end)| decided.denies(*number, *end)).min()
    }

    fn note(&mut self, read: Result<Decided, String>) -> Result<(), String> {
        let read = read?;
        // Decisions are never removed: a place that has none is not where they are, but an empty directory, say.
        if self.decided.as_ref().is_some_and(|before| before.newest > read.newest) {
            return Err("what was decided of them is not there any more".to_owned());
        }
        self.decided = Some(read);
        Ok(())
    }

    /// What is before `lsn` is durable.
    pub fn durable(&mut self, lsn: Lsn) {
        self.taken.retain(|_, end| *end > lsn);
    }

    /// What was not durable is forgotten.
    pub fn rewound(&mut self) {
        self.taken.clear();
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_format::quorum::GivenUp;

    use super::*;

    fn decided(newest: u64, points: &[(u64, u64)]) -> Result<Decided, String> {
        let point =
            |&(number, lsn): &(u64, u64)| GivenUp { number, lsn: Lsn(lsn), last_record: None };
        let given_up =
            points.iter().map(point).fold(AllGivenUp::default(), |all, next| all.with(next));
        Ok(Decided { newest, given_up, restored: None })
    }

    fn away() -> Result<Decided, String> {
        Err("the store is away".to_owned())
    }

    fn is_source_doubted(judged: &Result<(), Doubt>) -> bool {
        matches!(judged, Err(Doubt::Source(_)))
    }

    #[test]
    fn who_was_given_up_is_not_followed() {
        let mut believing = Believing::default();
        for (number, is_followed) in [(0, false), (3, false), (4, true), (9, true)] {
            let judged = believing.judge(number, decided(6, &[(4, 100)]));
            assert_eq!(!is_source_doubted(&judged), is_followed, "{number}: {judged:?}");
        }
        // While nobody ever was, all are, older releases too.
        assert_eq!(Believing::default().judge(0, decided(6, &[])), Ok(()));
        assert_eq!(Believing::default().judge(0, Ok(Decided::default())), Ok(()));
    }

    #[test]
    fn where_an_older_release_began_anew_others_are_not_followed() {
        let restored = Some(Restored { number: 4, lsn: Lsn(100) });
        let decided = Decided { newest: 4, restored, given_up: AllGivenUp::default() };
        let mut believing = Believing::default();
        assert!(is_source_doubted(&believing.judge(3, Ok(decided.clone()))));
        assert_eq!(believing.judge(4, Ok(decided.clone())), Ok(()));
        assert_eq!(
            (decided.denies(3, Lsn(101)), decided.denies(3, Lsn(100))),
            (Some(Lsn(100)), None)
        );
    }

    #[test]
    fn who_knows_no_less_is_followed_while_the_store_is_away_and_nobody_before_it_was_read() {
        let mut believing = Believing::default();
        assert!(is_source_doubted(&believing.judge(5, away())), "nothing is known");
        assert_eq!(believing.judge(5, decided(5, &[(2, 50)])), Ok(()));
        assert_eq!(believing.judge(5, away()), Ok(()));
        assert_eq!(believing.judge(6, away()), Ok(()));
        assert!(is_source_doubted(&believing.judge(4, away())), "it may have been given up since");
        // An empty directory in the place of the store.
        assert!(is_source_doubted(&believing.judge(4, Ok(Decided::default()))));
        assert!(believing.parts_at(Ok(Decided::default())).is_err());
    }

    #[test]
    fn what_was_taken_of_who_was_given_up_after_that_is_found() {
        let mut believing = Believing::default();
        believing.judge(3, decided(3, &[])).unwrap();
        believing.took(Lsn(80));
        believing.took(Lsn(120));
        assert_eq!(believing.parts_at(decided(3, &[])), Ok(None));
        assert!(believing.parts_at(away()).is_err(), "it is not known");
        // No more than those have who go on.
        assert_eq!(believing.parts_at(decided(4, &[(4, 120)])), Ok(None));
        assert_eq!(believing.parts_at(decided(4, &[(4, 119)])), Ok(Some(Lsn(119))));
        // Whoever is asked next, that comes first.
        assert_eq!(believing.judge(4, decided(4, &[(4, 119)])), Err(Doubt::Taken(Lsn(119))));
        believing.rewound();
        assert_eq!(believing.judge(4, decided(4, &[(4, 119)])), Ok(()));
    }

    /// A record that one had begun, and another gives anew, may be of a log that parts within it.
    #[test]
    fn what_was_begun_by_one_and_given_by_another_is_of_both() {
        let mut believing = Believing::default();
        believing.judge(5, decided(5, &[])).unwrap();
        believing.took(Lsn(120));
        believing.judge(3, decided(5, &[])).unwrap();
        believing.took(Lsn(110));
        assert_eq!(believing.parts_at(decided(6, &[(4, 100)])), Ok(Some(Lsn(100))));
    }

    #[test]
    fn who_knows_more_than_was_read_is_not_judged_by_that() {
        let mut believing = Believing::default();
        assert_eq!(believing.judge_again(0), None);
        believing.judge(3, decided(3, &[])).unwrap();
        assert_eq!(believing.judge_again(3), Some(Ok(())));
        assert_eq!(believing.judge_again(4), None);
    }

    #[test]
    fn what_others_gave_again_is_theirs_only_as_far_as_it_is_more() {
        let mut believing = Believing::default();
        believing.judge(3, decided(3, &[])).unwrap();
        believing.took(Lsn(120));
        believing.judge(5, decided(5, &[])).unwrap();
        believing.took(Lsn(120));
        believing.took(Lsn(150));
        assert_eq!(believing.parts_at(decided(5, &[(4, 110)])), Ok(Some(Lsn(110))));
        assert_eq!(believing.parts_at(decided(5, &[(4, 120)])), Ok(None));
        // What is durable was looked at before it was.
        believing.durable(Lsn(120));
        assert!(believing.has_taken());
        believing.durable(Lsn(150));
        assert!(!believing.has_taken());
    }
}
