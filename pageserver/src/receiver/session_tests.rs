//! A session that is told what time it is, and what comes.

use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, TenantId, TimelineId};
use pgstrata_wire::postgres::{
    BackendWriter, Frontend, StandbyStatus, Startup, split, text_column,
};
use proptest::prelude::*;

use super::believing::Doubt;
use super::inbox::{BadLength, MESSAGE_LIMIT};
use super::session::{Ended, Next, Session, SourceError, TICK};
use super::test_sink::{Bytes, START};
use crate::ingest::IngestError;

const SECOND: Duration = Duration::from_secs(1);

struct Run {
    session: Session,
    sink: Bytes,
    now: Instant,
    written: Vec<u8>,
    ended: Option<Ended>,
}

impl Run {
    fn new() -> Run {
        let now = Instant::now();
        let session = Session::new(TenantId([1; 16]), TimelineId([2; 16]), now);
        let sink = Bytes::default();
        let mut run = Run { session, sink, now, written: Vec::new(), ended: None };
        run.go();
        run
    }

    /// One whose stream has begun.
    fn streaming() -> Run {
        let mut run = Run::new();
        run.hear(said(|out| {
            out.ready_for_query();
            shows(out, "7");
            out.copy_both();
        }));
        run.written.clear();
        run
    }

    /// Until something is waited for.
    fn go(&mut self) {
        while self.ended.is_none() {
            match self.session.step(self.now, &mut self.sink) {
                Next::Go => {}
                Next::Write => {
                    self.written.extend_from_slice(self.session.output());
                    self.session.written(self.session.output().len(), self.now);
                }
                Next::Wait(until) => {
                    assert!(until > self.now && until <= self.now + TICK);
                    return;
                }
                Next::Ended(ended) => self.ended = Some(ended),
            }
        }
    }

    fn hear(&mut self, bytes: impl AsRef<[u8]>) {
        let mut bytes = bytes.as_ref();
        while !bytes.is_empty() && self.ended.is_none() {
            let room = self.session.room();
            assert!(!room.is_empty(), "bytes are waited for, and there is no room for any");
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            self.session.received(count, self.now);
            bytes = &bytes[count..];
            self.go();
        }
    }

    /// Nothing comes for so long, or until it ends. How long that was.
    fn quiet(&mut self, longest: Duration) -> Duration {
        let since = self.now;
        while self.ended.is_none() && self.now - since < longest {
            self.now += TICK;
            self.session.received(0, self.now);
            self.go();
        }
        self.now - since
    }

    fn source_error(self) -> String {
        match self.ended {
            Some(Ended::Source(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    /// What it said of how far it is, since it was asked last.
    fn statuses(&mut self) -> Vec<StandbyStatus> {
        let mut statuses = Vec::new();
        let mut rest = &self.written[..];
        while let Some((message, size)) = split(rest).unwrap() {
            let Frontend::Status(status) = message else { panic!("{message:?}") };
            statuses.push(status);
            rest = &rest[size..];
        }
        self.written.clear();
        statuses
    }
}

/// The answer to which configuration it knows.
fn shows(out: &mut BackendWriter, value: &str) {
    out.result(&[text_column("setting")], Some(&[Some(value)]), "SHOW");
    out.ready_for_query();
}

fn said(say: impl FnOnce(&mut BackendWriter)) -> Vec<u8> {
    let mut out = BackendWriter::default();
    say(&mut out);
    out.bytes
}

fn wal(start: Lsn, bytes: &[u8]) -> Vec<u8> {
    said(|out| {
        let filled: Result<(), std::convert::Infallible> = out.xlog_data(start, start, 0, |out| {
            out.extend_from_slice(bytes);
            Ok(())
        });
        let Ok(()) = filled;
    })
}

#[test]
fn a_session_says_who_it_is_and_from_where_it_wants_wal() {
    let mut run = Run::new();
    let length = u32::from_be_bytes(*run.written.first_chunk().unwrap()) as usize;
    assert_eq!(length, run.written.len());
    let Ok(Startup::Session(packet)) = Startup::decode(&run.written[4..]) else { panic!() };
    assert_eq!(packet.get("replication"), Some("true"));
    assert_eq!(packet.setting("pgstrata.role").as_deref(), Some("pageserver"));
    assert_eq!(packet.setting("pgstrata.tenant"), Some("01".repeat(16)));
    assert_eq!(packet.setting("pgstrata.timeline"), Some("02".repeat(16)));
    run.written.clear();
    run.hear(said(|out| out.welcome(&packet, "15.0")));
    let (query, _) = split(&run.written).unwrap().unwrap();
    assert_eq!(query, Frontend::Query("SHOW pgstrata.configuration".to_owned()));
    assert!(run.sink.judged.is_empty());
    run.written.clear();
    run.hear(said(|out| shows(out, "7")));
    assert_eq!(run.sink.judged, [7]);
    let (query, _) = split(&run.written).unwrap().unwrap();
    let expected = format!("START_REPLICATION PHYSICAL {START} TIMELINE 1");
    assert_eq!(query, Frontend::Query(expected));
    run.hear(said(BackendWriter::copy_both));
    run.hear(wal(START, b"some"));
    assert_eq!((run.sink.fed, run.ended.is_none()), (b"some".to_vec(), true));
}

#[test]
fn a_safekeeper_that_does_not_answer_is_left_sooner_while_it_is_wanted() {
    for (is_wanted, least) in [(false, 5 * SECOND), (true, Duration::from_millis(150))] {
        for is_let_in in [false, true] {
            let mut run = Run::new();
            run.sink.is_wanted = is_wanted;
            run.quiet(TICK);
            if is_let_in {
                run.hear(said(BackendWriter::ready_for_query));
            }
            let waited = run.quiet(60 * SECOND);
            assert!(waited + TICK > least && waited <= least + TICK, "{waited:?}");
            assert_eq!(run.source_error(), "no answer");
        }
    }
}

#[test]
fn one_of_a_release_that_says_not_who_the_members_are_is_judged_as_such() {
    let mut run = Run::new();
    run.hear(said(|out| {
        out.ready_for_query();
        out.error(false, "42704", "unrecognized configuration parameter");
        out.ready_for_query();
        out.copy_both();
    }));
    run.hear(wal(START, b"some"));
    assert_eq!((run.sink.judged, run.sink.fed), (vec![0], b"some".to_vec()));
}

#[test]
fn what_is_no_number_of_a_configuration_is_refused() {
    for value in ["", "-1", "seven", "99999999999999999999"] {
        let mut run = Run::new();
        run.hear(said(BackendWriter::ready_for_query));
        run.hear(said(|out| shows(out, value)));
        assert!(run.sink.judged.is_empty());
        assert_eq!(
            run.source_error(),
            format!("it shows {value:?} as the configuration that it knows")
        );
    }
    // Another error than that it knows no such thing is no answer either.
    let mut run = Run::new();
    run.hear(said(BackendWriter::ready_for_query));
    run.hear(said(|out| out.error(false, "58P01", "the disk is gone")));
    assert_eq!(run.source_error(), "the disk is gone");
}

#[test]
fn who_is_doubted_is_not_asked_for_wal() {
    let mut run = Run::new();
    run.hear(said(BackendWriter::ready_for_query));
    run.sink.doubt = Some(Doubt::Source("it was given up".to_owned()));
    run.written.clear();
    run.hear(said(|out| shows(out, "3")));
    assert!(run.written.is_empty() && run.sink.judged == [3]);
    assert_eq!(run.source_error(), "it is not followed: it was given up");
}

#[test]
fn a_source_is_judged_again_while_wal_comes_and_when_there_is_reason_to() {
    let mut run = Run::streaming();
    // Nothing came of it: nothing is to be judged.
    run.quiet(10 * SECOND);
    assert_eq!(run.sink.judged, [7]);
    run.hear(wal(START, b"some"));
    run.quiet(10 * SECOND);
    assert_eq!(run.sink.judged, [7, 7]);
    run.hear(wal(START + 4, b"more"));
    assert_eq!(run.sink.judged, [7, 7, 7]);
    run.hear(wal(START + 8, b"even"));
    run.sink.doubt = Some(Doubt::Taken(START + 4));
    assert!(run.quiet(10 * SECOND) <= 2 * SECOND + TICK);
    assert!(matches!(run.ended, Some(Ended::Sink(IngestError::GivenUp(lsn))) if lsn == START + 4));
    // Others found it.
    let mut run = Run::streaming();
    run.sink.is_in_doubt = true;
    run.sink.doubt = Some(Doubt::Source("it was given up".to_owned()));
    assert_eq!(run.quiet(10 * SECOND), TICK);
    assert_eq!(run.source_error(), "it is not followed: it was given up");
}

#[test]
fn a_safekeeper_that_says_other_things_than_an_answer_is_left() {
    let mut run = Run::new();
    for _ in 0..51 {
        run.now += TICK;
        run.hear(said(BackendWriter::empty_query));
    }
    assert_eq!(run.source_error(), "no answer");
}

#[test]
fn what_a_safekeeper_refuses_is_told_apart() {
    let refused = |sqlstate: &str, is_streaming: bool| {
        let mut run = if is_streaming { Run::streaming() } else { Run::new() };
        run.hear(said(|out| out.error(true, sqlstate, "not here")));
        run.ended
    };
    let unknown = refused("3D000", false);
    assert!(
        matches!(&unknown, Some(Ended::Source(SourceError::Unknown(text))) if text == "not here"),
        "{unknown:?}"
    );
    for (sqlstate, is_streaming) in [("42501", false), ("58P01", true), ("3D000", true)] {
        let ended = refused(sqlstate, is_streaming);
        let is_right =
            matches!(&ended, Some(Ended::Source(SourceError::Refused(text))) if text == "not here");
        assert!(is_right, "{ended:?}");
    }
    // An error without fields is one.
    let mut run = Run::new();
    run.hear(b"E\0\0\0\x04");
    assert_eq!(run.source_error(), "an error without a text");
}

#[test]
fn a_silent_safekeeper_is_given_up() {
    let mut run = Run::streaming();
    run.hear(wal(START, b"some"));
    assert_eq!(run.quiet(29 * SECOND), 29 * SECOND);
    assert!(run.ended.is_none() && run.sink.tidied > 0);
    run.hear(said(|out| out.keepalive(START, 0, false)));
    let waited = run.quiet(60 * SECOND);
    assert!(waited > 30 * SECOND && waited <= 30 * SECOND + 2 * TICK, "{waited:?}");
    assert_eq!(run.source_error(), "no word for 30s");
}

#[test]
fn a_safekeeper_that_sends_no_wal_is_left_while_that_is_wanted() {
    let mut run = Run::streaming();
    run.quiet(10 * SECOND);
    run.hear(wal(START, b"some"));
    run.sink.is_wanted = true;
    let waited = run.quiet(SECOND);
    assert_eq!(waited, 2 * TICK);
    assert_eq!(run.source_error(), "it lags: others may have more");
}

#[test]
fn a_safekeeper_that_talks_and_sends_no_wal_is_left_while_that_is_wanted() {
    let mut run = Run::streaming();
    run.sink.is_wanted = true;
    let since = run.now;
    while run.ended.is_none() {
        run.now += TICK / 4;
        run.hear(said(|out| out.keepalive(START, 0, false)));
        assert!(run.now - since < SECOND, "it is listened to for ever");
    }
    assert!(run.now - since > Duration::from_millis(150));
    assert_eq!(run.source_error(), "it lags: others may have more");
}

#[test]
fn a_safekeeper_that_stops_inside_a_message_is_given_up_sooner_while_it_is_wanted() {
    let piece = wal(START, &[7; 1000]);
    for (is_wanted, expected) in [(false, 30 * SECOND), (true, SECOND)] {
        let mut run = Run::streaming();
        run.sink.is_wanted = is_wanted;
        // It comes slowly, but it comes.
        for byte in &piece[..50] {
            assert_eq!(run.quiet(TICK), TICK);
            run.hear([*byte]);
        }
        assert!(run.ended.is_none());
        let waited = run.quiet(60 * SECOND) + 50 * TICK * u32::from(!is_wanted);
        assert!(waited > expected && waited <= expected + 2 * TICK, "{waited:?}");
        let text = if is_wanted { "it lags" } else { "a message did not come whole" };
        assert!(run.source_error().contains(text));
    }
}

#[test]
fn a_message_that_comes_a_byte_at_a_time_must_be_whole_in_time() {
    let mut run = Run::streaming();
    run.sink.is_wanted = true;
    let since = run.now;
    for byte in wal(START, &[7; 1000]) {
        run.now += TICK;
        run.hear([byte]);
        if run.ended.is_some() {
            break;
        }
    }
    assert!(run.now - since <= 31 * SECOND);
    assert_eq!(run.source_error(), "a message did not come whole within 30s");
}

#[test]
fn time_that_feeding_takes_is_not_held_against_the_safekeeper() {
    let mut run = Run::streaming();
    run.sink.is_wanted = true;
    let two = [wal(START, b"some"), wal(START + 4, b"more")].concat();
    let room = run.session.room();
    room[..two.len()].copy_from_slice(&two);
    run.session.received(two.len(), run.now);
    for fed in [4, 8] {
        while run.sink.fed.len() < fed {
            assert!(matches!(run.session.step(run.now, &mut run.sink), Next::Go | Next::Write));
            run.session.written(run.session.output().len(), run.now);
        }
        // So long that took.
        run.now += 40 * SECOND;
    }
    run.go();
    assert!(run.ended.is_none());
    assert_eq!(run.quiet(SECOND), 2 * TICK);
}

#[test]
fn messages_come_in_pieces_of_a_byte_and_of_any_size() {
    let bytes: Vec<u8> = (0..300_000u32).map(|number| number as u8).collect();
    let mut at = START;
    let mut stream = said(BackendWriter::ready_for_query);
    stream.extend(said(|out| shows(out, "7")));
    stream.extend(said(BackendWriter::copy_both));
    for piece in bytes.chunks(70_000) {
        stream.extend(wal(at, piece));
        stream.extend(said(|out| out.keepalive(at, 0, false)));
        at = at + piece.len() as u64;
    }
    for size in [1, 7, 8192, 100_000, stream.len()] {
        let mut run = Run::new();
        stream.chunks(size).for_each(|piece| run.hear(piece));
        assert!(run.ended.is_none() && run.sink.fed == bytes, "in pieces of {size}");
    }
}

#[test]
fn a_message_that_is_too_long_is_refused_before_there_is_room_for_it() {
    for length in [0, 3, MESSAGE_LIMIT as u32 + 1, u32::MAX] {
        let mut run = Run::streaming();
        let size = run.session.inbox_size();
        run.hear([&b"d"[..], &length.to_be_bytes()].concat());
        assert_eq!(run.session.inbox_size(), size);
        let expected = BadLength(length as usize).to_string();
        assert_eq!(run.source_error(), expected);
    }
    // One that is as long as it may be is taken, and room is made as it comes.
    let mut run = Run::streaming();
    let long = wal(START, &vec![7; MESSAGE_LIMIT - 4 - 25]);
    assert_eq!(long.len(), MESSAGE_LIMIT + 1);
    run.hear(&long[..1000]);
    assert!(run.session.inbox_size() <= 256 << 10);
    run.hear(&long[1000..]);
    assert!(run.ended.is_none() && run.sink.fed.len() == MESSAGE_LIMIT - 29);
    assert!(run.session.inbox_size() <= MESSAGE_LIMIT + 1);
}

#[test]
fn wal_from_another_position_is_not_taken() {
    let mut run = Run::streaming();
    run.hear(wal(START, b"some"));
    run.hear(wal(START + 3, b"more"));
    assert_eq!(run.sink.fed, b"some");
    let expected = START + 4;
    assert_eq!(run.source_error(), format!("WAL from {} came instead of {expected}", START + 3));
}

#[test]
fn how_far_it_is_is_said_each_second_when_it_is_asked_and_when_more_is_durable() {
    let mut run = Run::streaming();
    run.hear(wal(START, b"some"));
    run.sink.whole = START + 2;
    assert!(run.statuses().is_empty());
    run.quiet(3 * SECOND + TICK);
    let status = StandbyStatus {
        write_lsn: START + 2,
        flush_lsn: Lsn::INVALID,
        apply_lsn: Lsn::INVALID,
        reply_requested: false,
    };
    assert_eq!(run.statuses(), [status; 3]);
    run.hear(said(|out| out.keepalive(START, 0, false)));
    assert!(run.statuses().is_empty());
    run.hear(said(|out| out.keepalive(START, 0, true)));
    assert_eq!(run.statuses(), [status]);
    run.sink.durable = START + 1;
    run.quiet(TICK);
    let status = StandbyStatus { flush_lsn: START + 1, apply_lsn: START + 1, ..status };
    assert_eq!(run.statuses(), [status]);
}

#[test]
fn a_safekeeper_that_takes_nothing_is_given_up() {
    let mut run = Run::streaming();
    run.sink.durable = START;
    let wait = |run: &mut Run, longest: Duration| {
        let since = run.now;
        while run.now - since <= longest {
            run.now += TICK;
            match run.session.step(run.now, &mut run.sink) {
                Next::Write => {}
                Next::Ended(ended) => return Some(ended),
                other => panic!("{other:?}"),
            }
        }
        None
    };
    assert!(wait(&mut run, 29 * SECOND).is_none());
    // Some of it is taken, and no second status is put behind it meanwhile.
    let left = run.session.output().len();
    run.session.written(1, run.now);
    assert_eq!(run.session.output().len(), left - 1);
    assert!(wait(&mut run, 29 * SECOND).is_none());
    run.ended = wait(&mut run, 2 * SECOND);
    assert_eq!(run.source_error(), "it took nothing for 30s");
}

#[test]
fn the_end_of_the_stream_and_what_is_unknown_end_the_session() {
    let ended = |bytes: &[u8]| {
        let mut run = Run::streaming();
        run.hear(bytes);
        run.source_error()
    };
    assert_eq!(ended(&said(BackendWriter::copy_done)), "the safekeeper ended the stream");
    let complete = said(|out| out.command_complete("START_REPLICATION"));
    assert_eq!(ended(&complete), "the safekeeper ended the stream");
    let unknown = "unknown replication message";
    assert_eq!(ended(&said(|out| out.copy_data(b"x", b""))), format!("{unknown} Some('x')"));
    assert_eq!(ended(&said(|out| out.copy_data(b"", b""))), format!("{unknown} None"));
    // Too short for what they are.
    assert_eq!(ended(&said(|out| out.copy_data(b"w", &[0; 23]))), format!("{unknown} Some('w')"));
    assert_eq!(ended(&said(|out| out.copy_data(b"k", &[0; 16]))), format!("{unknown} Some('k')"));
    // What is none of the stream's business is skipped.
    let mut run = Run::streaming();
    run.hear(said(BackendWriter::empty_query));
    assert!(run.ended.is_none());
}

#[test]
fn a_session_ends_with_its_sink() {
    let mut run = Run::streaming();
    run.sink.broken = Some(IngestError::Bytes(anyhow::anyhow!("no WAL")));
    run.hear(wal(START, b"some"));
    assert!(matches!(run.ended, Some(Ended::Sink(IngestError::Bytes(_)))), "{:?}", run.ended);
    let mut run = Run::streaming();
    run.sink.is_stopping = true;
    run.quiet(TICK);
    assert!(matches!(run.ended, Some(Ended::Stopped)), "{:?}", run.ended);
}

/// Bytes as they might come: of any kind, or with the head of a message.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let some = proptest::collection::vec(any::<u8>(), 0..200);
    let kind = prop::sample::select(b"ZWEdcCSNwk".to_vec());
    let message =
        (kind, prop::option::of(any::<u32>()), some.clone()).prop_map(|(kind, length, body)| {
            let length = length.unwrap_or(body.len() as u32 + 4);
            [&[kind][..], &length.to_be_bytes(), &body].concat()
        });
    let right = (0..300usize).prop_map(|size| wal(START, &vec![1; size]));
    let asks = any::<bool>().prop_map(|asks| said(|out| out.keepalive(START, 0, asks)));
    prop_oneof![1 => some, 4 => message, 2 => right, 2 => asks]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_comes_is_taken_or_refused(
        is_streaming: bool,
        pieces in proptest::collection::vec((bytes(), 1..50usize, 0..200u64), 0..20),
    ) {
        let mut run = if is_streaming { Run::streaming() } else { Run::new() };
        let mut came = 0;
        for (bytes, size, pause) in pieces {
            for piece in bytes.chunks(size) {
                came += piece.len();
                run.hear(piece);
            }
            run.quiet(Duration::from_millis(pause));
            // Twice what has come, or what there is at first.
            prop_assert!(run.session.inbox_size() <= (256 << 10).max(2 * came));
            prop_assert!(run.session.output().is_empty());
        }
        prop_assert!(run.sink.fed.len() <= came);
    }
}
