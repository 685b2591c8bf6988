//! Feeding, told what time it is, how far commits are, and what the client says.

use std::time::{Duration, Instant};

use pgstrata_ids::Lsn;
use pgstrata_wire::postgres::{BackendWriter, Frontend, StandbyStatus};

use super::feeding::{Feeding, FeedingError, MAX_SEND, Next, Standing};

const SECOND: Duration = Duration::from_secs(1);
const START: Lsn = Lsn(0x100_0000);

struct Run {
    feeding: Feeding,
    now: Instant,
    commit_lsn: Lsn,
    standing: Standing,
    out: BackendWriter,
}

impl Run {
    fn new() -> Run {
        let now = Instant::now();
        Run {
            feeding: Feeding::new(START, now),
            now,
            commit_lsn: START,
            standing: Standing::Kept,
            out: BackendWriter::default(),
        }
    }

    fn next(&mut self) -> Next {
        self.feeding.next(self.now, self.commit_lsn, self.standing)
    }

    /// Does what is next.
    fn act(&mut self) -> Next {
        let next = self.next();
        match next {
            Next::Wal { end, most, .. } => {
                self.feeding.wal(&vec![7; most], end, 5, &mut self.out);
                self.feeding.sent(self.now);
            }
            Next::Keepalive(is_question) => {
                self.feeding.keepalive(is_question, 5, &mut self.out);
                self.feeding.sent(self.now);
            }
            Next::Wait(until) => {
                assert!(until > self.now);
                self.now = until;
            }
            Next::Done | Next::Ended(_) => {}
        }
        next
    }

    fn says(&mut self, reply_requested: bool) {
        let status =
            StandbyStatus { write_lsn: START, flush_lsn: START, apply_lsn: START, reply_requested };
        let noted = self.feeding.take(&Frontend::Status(status), self.now);
        assert_eq!(noted, Some(status));
    }
}

#[test]
fn what_is_committed_is_sent_in_pieces_and_no_more() {
    let mut run = Run::new();
    assert_eq!(run.next(), Next::Wait(run.now + 10 * SECOND));
    run.commit_lsn = START + MAX_SEND as u64 + 10;
    let end = run.commit_lsn;
    assert_eq!(run.act(), Next::Wal { at: START, end, most: MAX_SEND });
    let at = START + MAX_SEND as u64;
    assert_eq!(run.act(), Next::Wal { at, end, most: 10 });
    assert!(matches!(run.next(), Next::Wait(_)));
    assert_eq!(run.feeding.position(), end);
    // Of what could be read there may be less.
    run.commit_lsn = end + 10;
    run.feeding.wal(&[7; 3], run.commit_lsn, 5, &mut run.out);
    assert_eq!(run.next(), Next::Wal { at: end + 3, end: run.commit_lsn, most: 7 });
    // A client may ask for what is not committed yet.
    let mut run = Run::new();
    run.commit_lsn = Lsn(START.0 - 10);
    assert!(matches!(run.next(), Next::Wait(_)));
}

#[test]
fn messages_are_as_postgresql_has_them() {
    let mut run = Run::new();
    run.feeding.wal(b"some", START + 9, 5, &mut run.out);
    run.feeding.keepalive(true, 6, &mut run.out);
    let lsn = |lsn: Lsn| lsn.0.to_be_bytes();
    let wal = [&b"d\0\0\0\x21w"[..], &lsn(START), &lsn(START + 9), &lsn(Lsn(5)), b"some"].concat();
    let keepalive = [&b"d\0\0\0\x16k"[..], &lsn(START + 4), &lsn(Lsn(6)), &[1]].concat();
    assert_eq!(run.out.bytes, [wal, keepalive].concat());
}

#[test]
fn a_client_hears_something_every_ten_seconds() {
    let mut run = Run::new();
    let since = run.now;
    for number in 1..=100 {
        assert!(matches!(run.act(), Next::Wait(_)));
        assert_eq!(run.now, since + 10 * SECOND * number);
        run.says(false);
        assert_eq!(run.act(), Next::Keepalive(false));
    }
}

#[test]
fn a_client_that_asks_is_answered_at_once() {
    let mut run = Run::new();
    run.commit_lsn = START + 10;
    run.says(true);
    assert_eq!(run.act(), Next::Keepalive(false));
    assert!(matches!(run.act(), Next::Wal { .. }));
    run.says(false);
    assert!(matches!(run.next(), Next::Wait(_)));
}

#[test]
fn a_silent_client_is_asked_and_then_given_up() {
    let mut run = Run::new();
    run.commit_lsn = START + 10;
    let (since, mut questions) = (run.now, Vec::new());
    let error = loop {
        match run.act() {
            Next::Keepalive(is_question) => questions.push((run.now - since, is_question)),
            Next::Ended(error) => break error,
            _ => {}
        }
    };
    let expected = [10, 20, 30, 40, 50, 60].map(|after| (after * SECOND, after > 30));
    assert_eq!(questions, expected.map(|(after, is_question)| (after, is_question)));
    assert_eq!(error, FeedingError::Silent(70 * SECOND));
    // One that says anything is there.
    let mut run = Run::new();
    for _ in 0..20 {
        run.now += 55 * SECOND;
        assert_eq!(run.feeding.take(&Frontend::CopyData, run.now), None);
        assert!(matches!(run.act(), Next::Keepalive(false)));
    }
}

/// As `pg_receivewal --status-interval=0` does.
#[test]
fn a_client_that_speaks_only_when_it_is_asked_is_not_given_up() {
    let mut run = Run::new();
    let since = run.now;
    let mut questions = 0;
    // There is always something to send, and then, for long, there is not.
    while run.now - since < 1000 * SECOND {
        if run.now - since < 500 * SECOND {
            run.commit_lsn = run.feeding.position() + 10;
            run.now += SECOND;
        }
        match run.act() {
            Next::Keepalive(true) => {
                questions += 1;
                run.says(false);
            }
            Next::Ended(error) => panic!("{error}, after {:?}", run.now - since),
            _ => {}
        }
    }
    assert!((20..=35).contains(&questions), "asked {questions} times");
    // What is sent to one that is gone goes on until the system takes no more of it.
    let mut run = Run::new();
    run.now += 1000 * SECOND;
    run.commit_lsn = START + 10;
    assert_eq!(run.act(), Next::Keepalive(true));
    assert!(matches!(run.act(), Next::Wal { .. }));
    let asked = run.now;
    while !matches!(run.act(), Next::Ended(_)) {}
    assert_eq!(run.now - asked, 30 * SECOND);
}

#[test]
fn nothing_is_sent_of_a_timeline_that_is_not_kept_here_any_more() {
    for (standing, error) in
        [(Standing::Left, FeedingError::Left), (Standing::Retired, FeedingError::Retired)]
    {
        let mut run = Run::new();
        run.commit_lsn = START + 10 * MAX_SEND as u64;
        assert!(matches!(run.act(), Next::Wal { .. }));
        run.standing = standing;
        assert_eq!(run.act(), Next::Ended(error));
    }
}

#[test]
fn a_client_that_wants_no_more_is_sent_no_more() {
    for message in [Frontend::CopyDone, Frontend::CopyFail] {
        let mut run = Run::new();
        run.commit_lsn = START + 10;
        assert!(!run.feeding.is_done());
        assert_eq!(run.feeding.take(&message, run.now), None);
        assert_eq!((run.next(), run.feeding.is_done()), (Next::Done, true));
    }
}
