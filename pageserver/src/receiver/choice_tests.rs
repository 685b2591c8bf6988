//! Choosing, told what time it is, and what came of those that were chosen.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use pgstrata_ids::Lsn;

use super::choice::{Choice, Next, Pause, Sources};
use super::session::{Ended, SourceError};
use super::sink::Sink;
use super::test_sink::{Bytes, START};
use crate::ingest::IngestError;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

#[derive(Default)]
struct Known {
    candidates: Vec<String>,
    is_known: bool,
}

impl Sources for Known {
    fn candidates(&self) -> Vec<String> {
        self.candidates.clone()
    }

    fn is_known(&self) -> bool {
        self.is_known
    }
}

struct Run {
    choice: Choice,
    sink: Bytes,
    sources: Known,
    now: Instant,
}

impl Run {
    fn new(candidates: &[&str]) -> Run {
        let candidates = candidates.iter().map(|&candidate| candidate.to_owned()).collect();
        let sources = Known { candidates, is_known: false };
        Run { choice: Choice::default(), sink: Bytes::default(), sources, now: Instant::now() }
    }

    fn next(&mut self) -> Next {
        self.choice.next(self.now, &mut self.sink, &self.sources)
    }

    /// Begins where that is what is to be done.
    fn next_begun(&mut self) -> Next {
        match self.next() {
            Next::Begin => {
                let begun = self.sink.begin();
                self.choice.begun(self.now, &mut self.sink, begun);
                self.next()
            }
            next => next,
        }
    }

    /// Whom to follow next; what is to be waited for is.
    fn follow(&mut self) -> String {
        loop {
            match self.next_begun() {
                Next::Follow(address) => return address,
                Next::Pause(pause) => self.now = pause.until,
                other => panic!("{other:?}"),
            }
        }
    }

    fn pause(&mut self) -> Pause {
        match self.next_begun() {
            Next::Pause(pause) => pause,
            other => panic!("{other:?}"),
        }
    }

    /// For how long nothing is done.
    fn paused(&mut self) -> Duration {
        let pause = self.pause();
        let paused = pause.until - self.now;
        self.now = pause.until;
        paused
    }

    fn ended(&mut self, ended: Ended) {
        self.choice.ended(self.now, &mut self.sink, ended);
    }

    fn fails(&mut self) {
        self.ended(SourceError::Lags.into());
    }

    /// The one that is followed sends so much, of which so much is whole records.
    fn sends(&mut self, bytes: u64, whole: Lsn) {
        self.sink.position = self.sink.position + bytes;
        self.sink.whole = whole;
    }

    fn sends_no_wal(&mut self) {
        self.ended(Ended::Sink(IngestError::Bytes(anyhow!("a checksum"))));
    }

    fn unknown(&mut self) {
        self.ended(SourceError::Unknown("there is none".to_owned()).into());
    }
}

/// It is forgotten also while nobody can be asked.
#[test]
fn what_is_in_doubt_is_forgotten_before_others_are_asked() {
    let mut run = Run::new(&[]);
    assert!(matches!(run.next(), Next::Begin));
    run.choice.begun(run.now, &mut run.sink, Ok(()));
    assert!(matches!(run.next(), Next::Pause(_)));
    run.sink.is_in_doubt = true;
    assert!(matches!(run.next(), Next::Begin));
}

#[test]
fn the_best_is_asked_first_and_who_failed_last_comes_last() {
    let mut run = Run::new(&["a", "b", "c"]);
    for expected in ["a", "b", "c", "a", "b", "c"] {
        assert_eq!(run.follow(), expected);
        run.now += MILLISECOND;
        run.fails();
    }
    // One gives something: another round begins at once, in which it comes last.
    assert_eq!(run.follow(), "a");
    run.sends(10, START + 10);
    run.fails();
    assert!(matches!(run.next(), Next::Follow(address) if address == "b"));
    run.now += 10 * SECOND;
    run.fails();
    // What is long ago is forgotten, and 'b' failed just now.
    assert_eq!(run.follow(), "c");
}

#[test]
fn who_failed_is_asked_in_its_turn_again_after_a_while() {
    let mut run = Run::new(&["a", "b"]);
    assert_eq!(run.follow(), "a");
    run.fails();
    for (after, expected) in [(9 * SECOND, "b"), (2 * SECOND, "a")] {
        assert_eq!(run.follow(), expected);
        run.sends(10, run.sink.position + 10);
        run.now += after;
        if expected == "b" {
            run.fails();
        }
    }
}

#[test]
fn pauses_grow_to_a_second_and_are_short_again_after_progress() {
    let mut run = Run::new(&["a"]);
    let pauses = |run: &mut Run, count: usize| -> Vec<u64> {
        let pause = |_| {
            run.follow();
            run.fails();
            run.paused().as_millis() as u64
        };
        (0..count).map(pause).collect()
    };
    assert_eq!(pauses(&mut run, 8), [20, 40, 80, 160, 320, 640, 1000, 1000]);
    run.follow();
    run.sends(10, START + 10);
    run.fails();
    assert_eq!(pauses(&mut run, 2), [20, 40]);
    // Whoever wants more waits for none of them.
    run.sink.is_wanted = true;
    assert_eq!(pauses(&mut run, 2), [5, 5]);
    // Where nobody is known there is nobody to be asked.
    let mut run = Run::new(&[]);
    assert_eq!((run.paused(), run.paused()), (20 * MILLISECOND, 40 * MILLISECOND));
    let pause = run.pause();
    assert!(pause.ends_when_wanted);
}

#[test]
fn who_sent_what_is_no_wal_is_not_asked_at_that_position() {
    let mut run = Run::new(&["bad", "good"]);
    assert_eq!(run.follow(), "bad");
    run.sends_no_wal();
    assert_eq!(run.sink.bad, ["bad"]);
    for _ in 0..5 {
        assert_eq!(run.follow(), "good");
        run.fails();
    }
    // At another it is.
    assert_eq!(run.follow(), "good");
    run.sends(10, START + 10);
    run.fails();
    assert_eq!(run.follow(), "bad");
}

/// It may have been mended, and the other one may never come back.
#[test]
fn who_sent_what_is_no_wal_is_asked_again_later_where_others_give_nothing() {
    let mut run = Run::new(&["bad", "gone"]);
    assert_eq!(run.follow(), "bad");
    run.sends_no_wal();
    let since = run.now;
    while run.follow() != "bad" {
        run.fails();
        assert!(run.now - since < 60 * SECOND, "it is never asked again");
    }
    assert!(run.now - since >= 10 * SECOND);
}

#[test]
fn where_all_sent_what_is_no_wal_they_are_asked_again_after_a_second() {
    let mut run = Run::new(&["a", "b"]);
    for expected in ["a", "b"] {
        assert_eq!(run.follow(), expected);
        run.sends_no_wal();
    }
    let since = run.now;
    let pause = run.pause();
    assert_eq!((pause.until - since, pause.ends_when_wanted), (SECOND, false));
    let stalled = run.sink.stalled.clone().unwrap();
    assert!(stalled.contains("a: after") && stalled.contains("b: after"), "{stalled}");
    run.now = pause.until;
    assert_eq!(run.follow(), "a");
}

#[test]
fn a_record_that_another_one_continues_otherwise_is_asked_for_anew() {
    let mut run = Run::new(&["a", "b"]);
    assert_eq!(run.follow(), "a");
    run.sends(30, START);
    run.fails();
    // 'b' goes on from there, and what it has doesn't fit.
    assert_eq!(run.follow(), "b");
    run.sends_no_wal();
    assert!(run.sink.bad.is_empty(), "nobody knows whose bytes are wrong");
    assert!(matches!(run.next(), Next::Begin));
    assert_eq!(run.follow(), "b", "who began it comes last");
    assert_eq!(run.sink.position, START);
    // From the record's beginning it is 'b' alone who sent it.
    run.sends(30, START);
    run.sends_no_wal();
    assert_eq!(run.sink.bad, ["b"]);
    assert_eq!(run.follow(), "a");
}

#[test]
fn a_record_that_its_source_continues_wrongly_is_its_sources() {
    let mut run = Run::new(&["a", "b"]);
    assert_eq!(run.follow(), "a");
    run.sends(30, START);
    run.fails();
    assert_eq!(run.follow(), "b");
    run.fails();
    assert_eq!(run.follow(), "a");
    run.sends_no_wal();
    assert_eq!(run.sink.bad, ["a"]);
}

#[test]
fn a_record_of_which_nobody_has_more_is_asked_for_from_its_beginning() {
    let mut run = Run::new(&["a"]);
    assert_eq!(run.follow(), "a");
    run.sends(30, START);
    run.fails();
    assert_eq!(run.follow(), "a");
    run.fails();
    let pause = run.pause();
    assert_eq!((pause.until - run.now, pause.ends_when_wanted), (200 * MILLISECOND, true));
    run.now = pause.until;
    assert!(matches!(run.next(), Next::Begin));
    assert_eq!(run.follow(), "a");
    assert_eq!(run.sink.position, START);
}

#[test]
fn a_timeline_that_nobody_has_is_asked_for_when_somebody_has_it_or_wants_it() {
    let asked_after = |is_known: bool, is_wanted: bool| {
        let mut run = Run::new(&["a", "b"]);
        for _ in 0..2 {
            run.follow();
            run.unknown();
        }
        assert_eq!(run.paused(), 500 * MILLISECOND);
        (run.sources.is_known, run.sink.is_wanted) = (is_known, is_wanted);
        let since = run.now;
        run.follow();
        run.now - since
    };
    assert_eq!(asked_after(true, false), Duration::ZERO);
    assert_eq!(asked_after(false, true), Duration::ZERO);
    let waited = asked_after(false, false);
    assert!(waited > 29 * SECOND && waited <= 30 * SECOND, "{waited:?}");
    // One that fails otherwise may have it.
    let mut run = Run::new(&["a", "b"]);
    run.follow();
    run.unknown();
    run.follow();
    run.fails();
    assert_eq!(run.paused(), 20 * MILLISECOND);
}

#[test]
fn what_fails_for_lack_of_storage_is_tried_again_later_and_later() {
    let mut run = Run::new(&["a"]);
    let fail = |run: &mut Run| {
        let no_space = || IngestError::Storage(anyhow!("no space"));
        run.ended(Ended::Sink(no_space()));
        assert_eq!(run.sink.stalled.as_deref(), Some("no space"));
        let paused = run.paused().as_millis() as u64;
        assert!(matches!(run.next(), Next::Begin));
        paused
    };
    let mut pauses = Vec::new();
    for _ in 0..6 {
        assert_eq!(run.follow(), "a");
        pauses.push(fail(&mut run));
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
    assert_eq!(run.follow(), "a");
    run.sends(10, START + 10);
    assert_eq!(fail(&mut run), 50);
    // Nor can it begin.
    let error = Err(IngestError::Storage(anyhow!("no space")));
    run.choice.begun(run.now, &mut run.sink, error);
    assert_eq!(run.paused(), 100 * MILLISECOND);
}

#[test]
fn wal_that_is_not_understood_is_the_end_and_so_is_stopping() {
    let mut run = Run::new(&["a", "b"]);
    run.follow();
    run.ended(Ended::Sink(IngestError::Wal(anyhow!("of a record that is not known"))));
    for _ in 0..2 {
        let next = run.next();
        assert!(matches!(&next, Next::Failed(text) if text.contains("not known")), "{next:?}");
    }
    let mut run = Run::new(&["a", "b"]);
    run.follow();
    run.sink.is_stopping = true;
    run.ended(Ended::Stopped);
    assert!(matches!(run.next(), Next::Stopped));
}

/// Sources that fail, lie, or give something, as numbers say: nobody is asked without a pause for ever, and nobody is forgotten.
#[test]
fn whoever_may_have_more_is_asked_within_a_while() {
    let names = ["a", "b", "c"];
    for seed in 1..500u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut run = Run::new(&names);
        let begun = run.now;
        let mut asked: HashMap<String, Instant> = HashMap::new();
        let mut in_a_row = 0;
        for _ in 0..200 {
            match run.next_begun() {
                Next::Follow(address) => {
                    asked.insert(address, run.now);
                    let before = run.sink.position;
                    match draw(10) {
                        0 => run.sends_no_wal(),
                        1 => run.unknown(),
                        2 => {
                            run.sends(30, run.sink.whole);
                            run.fails();
                        }
                        3 => {
                            run.sends(30, before + 30);
                            run.fails();
                        }
                        _ => run.fails(),
                    }
                    in_a_row = if run.sink.position > before { 0 } else { in_a_row + 1 };
                    assert!(in_a_row <= 3 * names.len(), "{seed}: asked again and again");
                }
                Next::Pause(pause) => {
                    assert!(pause.until > run.now && pause.until - run.now <= SECOND);
                    run.now = pause.until;
                    in_a_row = 0;
                }
                other => panic!("{other:?}"),
            }
        }
        if run.now - begun > 60 * SECOND {
            let late = names
                .iter()
                .find(|&&name| asked.get(name).is_none_or(|&at| run.now - at > 45 * SECOND));
            assert_eq!(late, None, "{seed}: not asked for long");
        }
    }
}
