//! Which safekeeper is followed, and when: the life of a timeline's ingest, without connections and clocks.
//!
//! Safekeepers are asked in rounds, each of them at most once, until one gives something. What they are to each other is known by what
//! came of them: who failed lately is asked last, and who sent what is no WAL is not asked at that position
//! for a while.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use pgstrata_ids::Lsn;

use super::session::{Ended, SourceError};
use super::sink::Sink;
use crate::ingest::IngestError;

/// One that did not do is asked after the others for so long, and one that sent what is no WAL is not asked.
const AVOIDED: Duration = Duration::from_secs(10);
/// After a round that gave nothing the next one comes so soon, and twice as late after each other one.
const ROUND_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_ROUND_PAUSE: Duration = Duration::from_secs(1);
/// So soon while somebody waits for more.
const MOMENT: Duration = Duration::from_millis(5);
/// So long a record that has begun, and of which nobody has more, is waited for before it is asked for again.
const BEGUN_PAUSE: Duration = Duration::from_millis(200);
/// How soon ingest is tried again after it could not read or keep something.
const STORAGE_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_STORAGE_PAUSE: Duration = Duration::from_secs(1);
/// After so long all are asked again of whom each sent what is no WAL.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How often safekeepers are asked for a timeline that none of them has, while nobody wants its WAL and nobody is heard
/// to have it.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);
/// How soon it is noticed that one has it.
const UNKNOWN_TICK: Duration = Duration::from_millis(500);

/// Who may have the WAL.
pub trait Sources {
    /// Addresses, best first. Asked for every round.
    fn candidates(&self) -> Vec<String>;

    /// Whether any of them is known to have it.
    fn is_known(&self) -> bool;
}

/// What is to be done next.
#[derive(Debug)]
pub enum Next {
    /// [`Sink::begin`], and to say what came of it: [`Choice::begun`].
    Begin,
    /// To follow the safekeeper at this address, and to say why that ended: [`Choice::ended`].
    Follow(String),
    /// To wait.
    Pause(Pause),
    /// Nothing: the sink is stopping.
    Stopped,
    /// Nothing for good: committed WAL is not understood, for this reason.
    Failed(String),
}

/// A pause. It is over when [`Choice::next`] is called again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Until then.
    pub until: Instant,
    /// Or until somebody who did not wait before waits for more than there is, or the sink is stopping.
    pub ends_when_wanted: bool,
}

#[derive(Debug)]
enum Phase {
    /// The sink is to begin, first or anew.
    Begin,
    /// A round is to begin.
    Rounds,
    /// These are to be asked yet.
    Round(Round),
    /// One of them is.
    Following(Round, Asked),
    /// Nobody had it, by then.
    Unknown(Instant),
    /// Nothing can be done.
    Failed(String),
}

#[derive(Debug)]
struct Round {
    /// The sink's position when it began.
    before: Lsn,
    /// Who is asked yet, in this order.
    left: VecDeque<String>,
    /// How many candidates there were.
    known: usize,
    /// How many have no such timeline.
    unknown: usize,
}

/// Whom was asked, and what was there then.
#[derive(Debug)]
struct Asked {
    address: String,
    whole: Lsn,
    position: Lsn,
    /// The record that the sink is within begins with what another one sent.
    is_begun_by_another: bool,
}

/// Sources whose bytes were no WAL, at the position at which the sink is now, lately.
#[derive(Debug, Default)]
struct Refused {
    at: Lsn,
    /// When that was, and what was wrong.
    sources: BTreeMap<String, (Instant, String)>,
}

impl Refused {
    /// Forgets what was of an earlier position, and what was long ago: it may have been mended, and the others may not be there.
    fn forget(&mut self, now: Instant, whole: Lsn) {
        if self.at != whole {
            self.sources.clear();
            self.at = whole;
        }
        self.sources.retain(|_, (at, _)| now.saturating_duration_since(*at) < AVOIDED);
    }

    fn allows(&self, address: &str) -> bool {
        !self.sources.contains_key(address)
    }

    fn note(&mut self, now: Instant, whole: Lsn, address: &str, reason: String) {
        self.forget(now, whole);
        self.sources.insert(address.to_owned(), (now, reason));
    }

    fn text(&self) -> String {
        let each = self.sources.iter().map(|(address, (_, reason))| format!("{address}: {reason}"));
        each.collect::<Vec<_>>().join("; ")
    }
}

/// See the module.
#[derive(Debug)]
pub struct Choice {
    phase: Phase,
    /// Before anything else.
    pause: Option<Pause>,
    refused: Refused,
    /// When each failed last, if that was lately.
    failed: HashMap<String, Instant>,
    /// Who gave the beginning of the record that the sink is within.
    begun_by: Option<String>,
    round_pause: Duration,
    storage_pause: Duration,
    /// The end of what the sink had when it began.
    whole_at_begin: Lsn,
}

impl Default for Choice {
    fn default() -> Choice {
        Choice {
            phase: Phase::Begin,
            pause: None,
            refused: Refused::default(),
            failed: HashMap::new(),
            begun_by: None,
            round_pause: ROUND_PAUSE,
            storage_pause: STORAGE_PAUSE,
            whole_at_begin: Lsn::INVALID,
        }
    }
}

impl Choice {
    /// What to do next.
    pub fn next(&mut self, now: Instant, sink: &mut impl Sink, sources: &impl Sources) -> Next {
        loop {
            if let Phase::Failed(reason) = &self.phase {
                return Next::Failed(reason.clone());
            }
            if sink.is_stopping() {
                return Next::Stopped;
            }
            if let Some(pause) = self.pause.take() {
                return Next::Pause(pause);
            }
            self.phase = match std::mem::replace(&mut self.phase, Phase::Rounds) {
                Phase::Begin => {
                    self.whole_at_begin = sink.whole();
                    self.phase = Phase::Begin;
                    return Next::Begin;
                }
                // What is to be forgotten is, whether or not anybody can be asked.
                Phase::Rounds if sink.is_in_doubt() => Phase::Begin,
                Phase::Rounds => self.round(now, sink, sources.candidates()),
                Phase::Round(mut round) => match round.left.pop_front() {
                    None => self.round_ended(now, sink, &round),
                    Some(address) => {
                        let asked = self.asked(sink, address.clone());
                        self.phase = Phase::Following(round, asked);
                        return Next::Follow(address);
                    }
                },
                Phase::Unknown(since) => {
                    let waited = now.saturating_duration_since(since);
                    let is_over = sink.is_wanted() || sources.is_known() || waited > UNKNOWN_PAUSE;
                    if !is_over {
                        self.pause(now, UNKNOWN_TICK, true, sink);
                    }
                    if is_over { Phase::Rounds } else { Phase::Unknown(since) }
                }
                // It is asked again, as if it had not been asked.
                Phase::Following(mut round, asked) => {
                    round.left.push_front(asked.address);
                    Phase::Round(round)
                }
                failed @ Phase::Failed(_) => failed,
            };
        }
    }

    /// The sink has begun, or has not.
    pub fn begun(&mut self, now: Instant, sink: &mut impl Sink, begun: Result<(), IngestError>) {
        (self.begun_by, self.round_pause) = (None, ROUND_PAUSE);
        match begun {
            Ok(()) => self.phase = Phase::Rounds,
            Err(error) => self.broken(now, sink, error),
        }
    }

    /// Following the one that was named last has ended.
    pub fn ended(&mut self, now: Instant, sink: &mut impl Sink, ended: Ended) {
        let phase = std::mem::replace(&mut self.phase, Phase::Rounds);
        let Phase::Following(mut round, asked) = phase else {
            self.phase = phase;
            return;
        };
        let is_same_record = asked.is_begun_by_another && sink.whole() == asked.whole;
        match ended {
            Ended::Stopped => {}
            Ended::Source(error) => {
                round.unknown += usize::from(matches!(error, SourceError::Unknown(_)));
                self.failed.insert(asked.address.clone(), now);
            }
            // The one may have begun a record that was never committed, and was given up with it.
            Ended::Sink(IngestError::Bytes(_)) if is_same_record => {
                self.failed.extend(self.begun_by.take().map(|begun_by| (begun_by, now)));
                self.phase = Phase::Begin;
                return;
            }
            Ended::Sink(error) => {
                if let IngestError::Bytes(reason) = &error {
                    let at = sink.whole();
                    let text = format!("after {at} it sent what is no WAL: {reason:#}");
                    sink.note_bad_source(&asked.address, &text);
                    self.refused.note(now, at, &asked.address, text);
                }
                return self.broken(now, sink, error);
            }
        }
        if sink.position() > asked.position && !is_same_record {
            self.begun_by = Some(asked.address);
        }
        if sink.position() > round.before {
            round.left.clear();
        }
        self.phase = Phase::Round(round);
    }

    fn asked(&self, sink: &impl Sink, address: String) -> Asked {
        let (whole, position) = (sink.whole(), sink.position());
        let is_within = position > whole;
        let is_begun_by_another = is_within && self.begun_by.as_ref() != Some(&address);
        Asked { address, whole, position, is_begun_by_another }
    }

    fn round(&mut self, now: Instant, sink: &mut impl Sink, mut candidates: Vec<String>) -> Phase {
        let known = candidates.len();
        self.refused.forget(now, sink.whole());
        candidates.retain(|address| self.refused.allows(address));
        if candidates.is_empty() && known > 0 {
            // None of them has it as it must be. One may be repaired, or another may come.
            let text = self.refused.text();
            sink.stall(format!("no safekeeper has the WAL that follows: {text}"));
            self.refused.sources.clear();
            self.pause(now, REFUSED_PAUSE, false, sink);
            return Phase::Rounds;
        }
        // Those that failed last come last: one that hangs would be the best by what is known of it.
        self.failed.retain(|_, at| now.saturating_duration_since(*at) < AVOIDED);
        candidates.sort_by_key(|address| self.failed.get(address).copied());
        Phase::Round(Round { before: sink.position(), left: candidates.into(), known, unknown: 0 })
    }

    /// All were asked, or one gave something.
    fn round_ended(&mut self, now: Instant, sink: &mut impl Sink, round: &Round) -> Phase {
        sink.tidy();
        if sink.position() > round.before {
            self.round_pause = ROUND_PAUSE;
            return Phase::Rounds;
        }
        if sink.position() > sink.whole() {
            // Nobody has more of a record that has begun: it may not be of the log that goes on. It is asked for again.
            self.pause(now, BEGUN_PAUSE, true, sink);
            return Phase::Begin;
        }
        if round.known > 0 && round.unknown == round.known {
            self.pause(now, UNKNOWN_TICK, true, sink);
            return Phase::Unknown(now);
        }
        self.pause(now, self.round_pause, true, sink);
        self.round_pause = (self.round_pause * 2).min(LONGEST_ROUND_PAUSE);
        Phase::Rounds
    }

    /// The sink is of no use any more.
    fn broken(&mut self, now: Instant, sink: &mut impl Sink, error: IngestError) {
        self.phase = match error {
            IngestError::Wal(error) => Phase::Failed(format!("{error:#}")),
            // The source is known to be bad by now, or what came before is forgotten: others are asked.
            IngestError::Bytes(_) | IngestError::GivenUp(_) => Phase::Begin,
            IngestError::Storage(error) => {
                sink.stall(format!("{error:#}"));
                let moved = sink.whole() > self.whole_at_begin;
                let longer = (self.storage_pause * 2).min(LONGEST_STORAGE_PAUSE);
                self.storage_pause = if moved { STORAGE_PAUSE } else { longer };
                self.pause(now, self.storage_pause, false, sink);
                Phase::Begin
            }
        };
    }

    /// Has it wait before it does anything else.
    fn pause(&mut self, now: Instant, pause: Duration, ends_when_wanted: bool, sink: &impl Sink) {
        let is_hurried = ends_when_wanted && sink.is_wanted();
        let pause = if is_hurried { pause.min(MOMENT) } else { pause };
        self.pause = Some(Pause { until: now + pause, ends_when_wanted });
    }
}
