use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_ids::{Lsn, NodeId, Term};
use pgstrata_quorum::{ProposerId, TermHistory};

use super::super::config::{ProposerError, WalChunk, WalSource};
use super::super::driver::Driver;
use super::super::driver::fixtures::{START, commit, config, driver, elect, outrank, places};
use super::super::sockets::Sockets;
use super::*;

const LONG: Duration = Duration::from_secs(30);

fn elected() -> Driver<Sockets> {
    let mut driver = driver();
    elect(&mut driver, &TermHistory::default(), START, START);
    driver
}

/// Records of one length, without an end, and what it is told.
struct Endless {
    at: Lsn,
    length: usize,
    taken: usize,
    told: Vec<Lsn>,
    fenced: Option<Term>,
    found: Arc<AtomicU64>,
}

impl Endless {
    fn new(length: usize) -> Endless {
        let found = Arc::default();
        Endless { at: START, length, taken: 0, told: Vec::new(), fenced: None, found }
    }
}

impl WalSource for Endless {
    fn poll_wal(&mut self, _: usize) -> io::Result<Option<WalChunk>> {
        let (start, bytes) = (self.at, Bytes::from(vec![1; self.length]));
        self.at = start + self.length as u64;
        self.taken += 1;
        Ok(Some(WalChunk { start, bytes, record_end: self.at }))
    }

    fn read_range(&mut self, _: Lsn, _: Lsn) -> io::Result<Bytes> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn on_commit(&mut self, lsn: Lsn) {
        assert_eq!(self.found.load(Ordering::Acquire), lsn.0, "nobody else finds it yet");
        self.told.push(lsn);
    }

    fn on_fenced(&mut self, by: Term) {
        self.fenced = Some(by);
    }
}

#[test]
fn who_is_outranked_pauses_and_campaigns_above() {
    let (mut driver, now) = (driver(), Instant::now());
    let mut campaign = Campaign::new(ProposerId([4; 16]), false, LONG, now);
    outrank(&mut driver, Term(1 << 30));
    assert_eq!(campaign.step(now, &mut driver).unwrap(), None);
    assert!(campaign.wait(now) < TURN, "a pause that is over ends the wait");
    assert_eq!(driver.fenced(), Some(Term(1 << 30)));
    assert_eq!(campaign.step(now + Duration::from_millis(70), &mut driver).unwrap(), None);
    assert_eq!(driver.fenced(), None);
    let term = elect(&mut driver, &TermHistory::default(), START, START);
    assert!(term > Term(1 << 30), "{term}");
    let won = campaign.step(now, &mut driver).unwrap().unwrap();
    assert_eq!((won.term, won.start_lsn), (term, START));
    assert!(!won.has_record_before(&config(Arc::new(places())).parameters));
}

/// Members that were changed while it paused have it campaign at once: the pause is over, and the next one is one again.
#[test]
fn a_pause_that_others_ended_is_over() {
    let (mut driver, now) = (driver(), Instant::now());
    let mut campaign = Campaign::new(ProposerId([4; 16]), false, LONG, now);
    outrank(&mut driver, Term(1 << 30));
    campaign.step(now, &mut driver).unwrap();
    driver.campaign_above(Term(1 << 30));
    let later = now + Duration::from_secs(1);
    assert_eq!(campaign.step(later, &mut driver).unwrap(), None);
    assert_eq!(campaign.wait(later), TURN);
    outrank(&mut driver, Term(1 << 31));
    campaign.step(later, &mut driver).unwrap();
    assert_eq!(driver.fenced(), Some(Term(1 << 31)), "it pauses");
}

#[test]
fn who_was_elected_before_ends_when_outranked() {
    let (mut driver, now) = (driver(), Instant::now());
    let mut campaign = Campaign::new(ProposerId([4; 16]), true, LONG, now);
    outrank(&mut driver, Term(9));
    let error = campaign.step(now, &mut driver).unwrap_err();
    assert!(matches!(error, ProposerError::Fenced(Term(9))), "{error}");
}

#[test]
fn a_campaign_ends_while_it_pauses_too() {
    let (mut driver, now) = (driver(), Instant::now());
    for is_outranked in [false, true] {
        let mut campaign = Campaign::new(ProposerId([4; 16]), false, LONG, now);
        if is_outranked {
            outrank(&mut driver, Term(9));
        }
        assert_eq!(campaign.step(now, &mut driver).unwrap(), None);
        let error = campaign.step(now + LONG, &mut driver).unwrap_err();
        assert!(matches!(error, ProposerError::NoQuorum { seconds: 30, .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("What to do: "), "{text}");
    }
}

#[test]
fn a_question_that_nobody_answers_ends() {
    let (driver, now) = (elected(), Instant::now());
    let mut question = Question::new(START, now);
    assert_eq!(question.to_ask(&driver), Vec::new(), "nobody is connected");
    question.failed(now, NodeId(3), &"it is on fire");
    question.check(now + Duration::from_secs(14), &driver).unwrap();
    let error = question.check(now + Duration::from_secs(15), &driver).unwrap_err();
    assert!(error.to_string().contains("safekeeper 3: it is on fire"), "{error}");
}

#[test]
fn a_question_is_of_no_use_to_who_is_outranked() {
    let (mut driver, now) = (elected(), Instant::now());
    let question = Question::new(START, now);
    question.check(now, &driver).unwrap();
    outrank(&mut driver, Term(1 << 30));
    assert!(matches!(question.check(now, &driver), Err(ProposerError::Fenced(_))));
}

#[test]
fn a_record_is_waited_for_until_it_is_committed_and_sent() {
    let (mut driver, now) = (elected(), Instant::now());
    let bytes = Bytes::from(vec![7; 64]);
    let mut recording = Recording::begin(&mut driver, bytes, LONG, now).unwrap();
    assert_eq!(recording.step(now + LONG / 2, &driver).unwrap(), None);
    commit(&mut driver, START + 32);
    assert_eq!(recording.step(now + LONG / 2, &driver).unwrap(), None);
    commit(&mut driver, START + 64);
    // Nobody is connected who is to be told; and a turn sends what was said.
    assert_eq!(recording.step(now + 2 * LONG, &driver).unwrap(), None);
    assert_eq!(recording.wait(), Duration::ZERO);
    assert_eq!(recording.step(now + 2 * LONG, &driver).unwrap(), Some(START + 64));
}

#[test]
fn a_record_that_is_not_committed_ends() {
    let (mut driver, now) = (elected(), Instant::now());
    let bytes = Bytes::from(vec![7; 64]);
    let mut recording = Recording::begin(&mut driver, bytes, LONG, now).unwrap();
    let error = recording.step(now + LONG, &driver).unwrap_err();
    assert!(matches!(error, ProposerError::NotCommitted { seconds: 30, .. }), "{error}");
    outrank(&mut driver, Term(1 << 30));
    assert!(matches!(recording.step(now, &driver), Err(ProposerError::Fenced(_))));
}

#[test]
fn a_turn_takes_so_many_pieces_and_what_there_is_room_for() {
    let now = Instant::now();
    // Small ones; some that fill the room; one that is larger than it.
    for (length, pieces, wait) in [(8, 8, Duration::ZERO), (500, 2, IDLE), (5000, 1, IDLE)] {
        let mut config = config(Arc::new(places()));
        config.limits.uncommitted = 1000;
        let mut driver = Driver::of_sockets(config, None).unwrap();
        elect(&mut driver, &TermHistory::default(), START, START);
        let mut source = Endless::new(length);
        let mut following = Following::new(&driver, Arc::clone(&source.found), now);
        assert_eq!(following.take(now, &mut driver, &mut source).unwrap(), wait, "{length}");
        assert_eq!(source.taken, pieces, "{length}");
        // Some of it is committed, and all.
        commit(&mut driver, START + length as u64);
        following.report(&driver, &mut source).unwrap();
        following.report(&driver, &mut source).unwrap();
        assert_eq!(source.told, [START + length as u64]);
        following.take(now, &mut driver, &mut source).unwrap();
        assert!(source.taken > pieces, "{length}");
    }
}

const IDLE: Duration = Duration::from_secs(1);

#[test]
fn who_is_outranked_tells_its_source_and_nothing_else() {
    let (mut driver, now) = (elected(), Instant::now());
    let mut source = Endless::new(8);
    let mut following = Following::new(&driver, Arc::clone(&source.found), now);
    following.take(now, &mut driver, &mut source).unwrap();
    commit(&mut driver, START + 8);
    outrank(&mut driver, Term(1 << 30));
    let ended = following.report(&driver, &mut source);
    assert!(matches!(ended, Err(ProposerError::Fenced(_))), "{ended:?}");
    assert_eq!((source.fenced, source.told), (Some(Term(1 << 30)), Vec::new()));
}

#[test]
fn who_was_outranked_before_it_follows_takes_nothing() {
    let (mut driver, now) = (elected(), Instant::now());
    let mut source = Endless::new(8);
    let mut following = Following::new(&driver, Arc::clone(&source.found), now);
    outrank(&mut driver, Term(1 << 30));
    let ended = following.take(now, &mut driver, &mut source);
    assert!(matches!(ended, Err(ProposerError::Fenced(_))), "{ended:?}");
    assert_eq!((source.fenced, source.taken), (Some(Term(1 << 30)), 0));
    let record = Recording::begin(&mut driver, Bytes::from(vec![7; 64]), LONG, now);
    assert!(matches!(record, Err(ProposerError::Fenced(_))), "{record:?}");
    assert_eq!(driver.end_lsn(), START);
}

#[test]
fn whether_commits_are_possible_is_looked_at_now_and_then() {
    let (driver, now) = (elected(), Instant::now());
    let mut following = Following::new(&driver, Arc::default(), now);
    assert_eq!(following.look(now, &driver), None);
    let after = now + Duration::from_millis(101);
    let problem = following.look(after, &driver).flatten().unwrap();
    assert!(problem.contains("no quorum of safekeepers is connected"), "{problem}");
    assert_eq!(following.look(after, &driver), None);
}
