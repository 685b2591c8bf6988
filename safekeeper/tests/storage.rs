//! What happens to a timeline when its disk fails or fills up, and to its port when clients stall.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::failing::{START, World, configuration, greeting, send, vote, wait_until};
use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_ids::{Lsn, Term};
use pgstrata_listen::Security;
use pgstrata_quorum::{
    Append, Elected, PeerRange, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace, DiskState};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::pace::{CatchUpArguments, Pace};
use pgstrata_safekeeper::segment::{Preparer, SegmentFiles, Zeros};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{Answer, Timeline};
use pgstrata_safekeeper::wal;
use pgstrata_sim::Fail;
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::{Message, RefusedReason};

/// Refused beside what is kept for votes and for trimming.
fn is_for_kept_space(error: &StorageError) -> bool {
    matches!(error, StorageError::DiskFull { kept_bytes: 1.., .. })
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_or_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    let acknowledged = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    world.disk.fail(Fail::Sync);
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Failed { .. })));
    assert!(world.latch.reason().unwrap().contains("injected"));
    // The disk is well again, but who knows what it lost.
    world.disk.fail(Fail::Nothing);
    let syncs = world.disk.syncs();
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Latched(_))));
    assert!(matches!(vote(&timeline, 2), Err(StorageError::Latched(_))));
    // Nobody is told how far it is: it counts on what may be lost.
    assert!(matches!(timeline.status(), Err(StorageError::Latched(_))));
    assert!(matches!(timeline.holding(), Err(StorageError::Latched(_))));
    assert_eq!(world.disk.syncs(), syncs);
    drop(timeline);
    // The process would have ended; what was acknowledged is there.
    world.latch = Latch::default();
    let timeline = world.open().only().unwrap();
    assert!(timeline.flush_lsn() >= acknowledged);
}

#[test]
fn a_failed_sync_of_a_segment_made_ahead_latches() {
    for fail in [Fail::Sync, Fail::Write] {
        let world = World::new();
        let preparer = Preparer::start(world.latch.clone()).unwrap();
        let disk = Arc::new(world.disk.clone());
        let files = SegmentFiles::new(disk, world.directory.path(), parameters(START));
        let files = Arc::new(files);
        world.disk.fail(fail);
        preparer.request(&files, 1, Zeros::Written);
        wait_until("latch", || world.latch.reason().is_some());
        assert!(world.latch.reason().unwrap().contains("injected"));
        // The disk is well again; still no segment is made.
        world.disk.fail(Fail::Nothing);
        let syncs = world.disk.syncs();
        preparer.request(&files, 1, Zeros::Written);
        preparer.request(&files, 2, Zeros::Written);
        drop(preparer);
        // The thread has ended once it has let go of the last request.
        wait_until("end of the thread", || Arc::weak_count(&files) == 0);
        assert_eq!((world.disk.syncs(), files.numbers().unwrap()), (syncs, Vec::new()));
    }
}

#[test]
fn a_failed_write_latches_too() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    world.disk.fail(Fail::Write);
    assert!(matches!(world.append(&timeline, 1000), Err(StorageError::Failed { .. })));
    assert!(world.latch.reason().is_some());
}

/// Bytes that were written and not synced when somebody else asks for a vote.
fn append_unsynced(world: &mut World, timeline: &Timeline) {
    let start = world.generator.at;
    let bytes = world.generator.record(1000);
    let end = world.generator.at;
    let length = bytes.len() as u64;
    let append = Append { term: Term(1), start, length, record_end: end, commit_lsn: start };
    timeline.batch().append(&append, &bytes).unwrap();
}

#[test]
fn l8_a_sync_that_finds_no_space_in_a_vote_is_not_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    append_unsynced(&mut world, &timeline);
    world.disk.fail(Fail::SyncFull);
    assert!(vote(&timeline, 2).is_err());
    assert!(world.latch.reason().is_some());
    world.disk.fail(Fail::Nothing);
    let syncs = world.disk.syncs();
    assert!(matches!(vote(&timeline, 2), Err(StorageError::Latched(_))));
    assert_eq!(world.disk.syncs(), syncs);
}

#[test]
fn a_vote_that_a_full_disk_prevents_destroys_nothing() {
    let mut world = World::new();
    let timeline = world.led();
    let end = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // The beginning of a record, which a vote takes away.
    let bytes = world.generator.record(1000);
    let append = Append {
        term: Term(1),
        start: end,
        length: 500,
        record_end: Lsn::INVALID,
        commit_lsn: end,
    };
    timeline.batch().append(&append, &bytes[..500]).unwrap();
    world.disk.fail(Fail::Full);
    assert!(matches!(vote(&timeline, 2), Err(StorageError::DiskFull { .. })));
    assert_eq!((timeline.term(), world.latch.reason()), (Term(1), None));
    let append = Append { start: end + 500, length: bytes.len() as u64 - 500, ..append };
    timeline.batch().append(&append, &bytes[500..]).unwrap();
    world.disk.fail(Fail::Nothing);
    vote(&timeline, 2).unwrap();
    assert_eq!(timeline.flush_lsn(), end + bytes.len() as u64);
}

#[test]
fn l8_a_name_that_could_not_be_synced_is_not_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // The new control file has its name by then: whether it is the durable one nobody knows.
    world.disk.fail(Fail::NamesFull);
    assert!(vote(&timeline, 2).is_err());
    assert!(world.latch.reason().is_some());
}

#[test]
fn l7_nothing_is_acknowledged_in_a_segment_whose_name_may_be_lost() {
    let mut world = World::new();
    let timeline = world.led();
    let disk = world.disk.clone();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // From now on segments get their names, but these don't become durable.
    disk.fail(Fail::HoldNames);
    std::thread::scope(|scope| {
        let world = &mut world;
        let timeline = &timeline;
        let appending = scope.spawn(move || {
            while world.generator.at.segment_number(SEGMENT_SIZE) < 3 {
                world.append(timeline, 100_000).unwrap();
            }
        });
        let number = |name: u64| parameters(START).segment_name(name);
        let named = timeline.files().directory().join(number(3));
        wait_until("name of the segment", || named.exists());
        std::thread::sleep(Duration::from_millis(500));
        assert!(!appending.is_finished(), "acknowledged before the name was durable");
        assert!(timeline.flush_lsn() < Lsn(3 * SEGMENT_SIZE));
        disk.fail(Fail::Nothing);
        appending.join().unwrap();
    });
    let acknowledged = timeline.flush_lsn();
    assert!(acknowledged > Lsn(3 * SEGMENT_SIZE));
    drop(timeline);
    disk.lose_unsynced_names().unwrap();
    assert_eq!(world.open().only().unwrap().flush_lsn(), acknowledged);
}

#[test]
fn l7_names_are_durable_before_a_log_counts_again() {
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at.segment_number(SEGMENT_SIZE) < 3 {
        world.append(&timeline, 100_000).unwrap();
    }
    world.wait_for_next_segment();
    // Until its name is synced too.
    std::thread::sleep(Duration::from_millis(200));
    drop(timeline);
    // Without one to remove, opening has no other reason to sync names.
    std::fs::remove_file(world.timeline_directory().join(parameters(START).segment_name(4)))
        .unwrap();
    // As after a crash between a rename and the sync: the name is there, and may still be lost.
    let path = world.timeline_directory().join(parameters(START).segment_name(3));
    let unsynced = path.with_extension("unsynced");
    std::fs::rename(&path, &unsynced).unwrap();
    pgstrata_env::Disk::rename(&world.disk, &unsynced, &path).unwrap();
    let flush_lsn = world.open().only().unwrap().flush_lsn();
    world.disk.lose_unsynced_names().unwrap();
    assert!(flush_lsn > Lsn(3 * SEGMENT_SIZE));
    assert!(path.exists(), "the log was counted, and its name was lost");
}

#[test]
fn a_full_disk_refuses_and_goes_on_reading() {
    let mut world = World::new();
    let timeline = world.led();
    let first = world.append(&timeline, 1000).unwrap();
    world.disk.fail(Fail::Full);
    // What fits the segments made before is taken; then it is refused.
    let refused = loop {
        match world.append(&timeline, 100_000) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StorageError::DiskFull { .. }), "{refused}");
    assert!(refused.to_string().contains("free space"), "{refused}");
    assert!(matches!(vote(&timeline, 2), Err(StorageError::DiskFull { .. })));
    assert_eq!((timeline.term(), world.latch.reason()), (Term(1), None));
    let mut bytes = vec![0; (first - START) as usize];
    assert_eq!(timeline.reader().read(START, &mut bytes).unwrap(), bytes.len());
    assert_ne!(bytes, vec![0; bytes.len()]);
    // Space again: everything goes on.
    world.disk.fail(Fail::Nothing);
    world.append(&timeline, 100_000).unwrap();
    vote(&timeline, 2).unwrap();
    assert_eq!(timeline.term(), Term(2));
}

/// On a disk of so many bytes, of which 2 MiB are kept. It is slow below 4 MiB, and warns below 7.
fn small_world(size: u64) -> World {
    let mut world = World::new();
    world.disk.resize(size);
    world.arguments = DiskArguments {
        disk_warn: Some(7 << 20),
        disk_slow: Some(4 << 20),
        disk_refuse: Some(2 << 20),
    };
    world
}

impl World {
    fn space(&self) -> DiskSpace {
        self.space.lock().unwrap().clone().unwrap()
    }

    fn free(&self) -> u64 {
        let look = self.space();
        look.look();
        look.last().space.free
    }
}

#[test]
fn a_disk_that_fills_warns_slows_refuses_and_recovers_by_itself() {
    use DiskState::{Fine, Refuses, Slows, Warns};
    let mut world = small_world(12 << 20);
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    let mut states = vec![world.space().last().state()];
    let refused = loop {
        match world.append(&timeline, 100_000) {
            Ok(_) => {}
            Err(error) => break error,
        }
        // As of the looks that making segments has, also by the thread that makes them ahead.
        let state = world.space().last().state();
        if states.last() != Some(&state) {
            states.push(state);
        }
    };
    assert!(states.is_sorted() && states[0] == Fine, "{states:?}");
    assert!(states.contains(&Warns) && states.contains(&Slows), "{states:?}");
    assert!(is_for_kept_space(&refused), "{refused}");
    assert!(refused.to_string().contains("beside the last 2.0 MiB"), "{refused}");
    assert_eq!(world.space().last().state(), Refuses);
    // What is kept is there, and serves for votes and for following who won them.
    assert!(world.free() >= 2 << 20);
    let acknowledged = world.generator.at;
    assert_eq!(timeline.flush_lsn(), acknowledged);
    vote(&timeline, 2).unwrap();
    let entry = |term, lsn| TermStart { term: Term(term), lsn };
    let history = TermHistory::new(vec![entry(1, START), entry(2, acknowledged)]).unwrap();
    timeline.elected(&Elected { term: Term(2), history }).unwrap();
    assert_eq!(timeline.term(), Term(2));
    // What adds nothing is answered: who is connected hears that it is there, and it hears what is committed.
    let (term, record_end, commit_lsn) = (Term(2), Lsn::INVALID, acknowledged);
    let tells = Append { term, start: acknowledged, length: 0, record_end, commit_lsn };
    let mut batch = timeline.batch();
    batch.append(&tells, &[]).unwrap();
    assert!(matches!(batch.finish().unwrap(), Some(Message::Ack(_))));
    assert_eq!(timeline.commit_lsn(), acknowledged);

    // Somebody else takes what was kept: now no byte is taken any more, wherever it would go.
    let ballast = world.directory.path().join("ballast");
    std::fs::File::create(&ballast).unwrap().set_len(1 << 20).unwrap();
    assert!(world.free() < 2 << 20);
    assert!(is_for_kept_space(&world.append_in(&timeline, 2, 8).unwrap_err()));
    let peers = PeerRange {
        history: timeline.history(),
        commit_lsn: Lsn(acknowledged.0 + 48),
        start: acknowledged,
        length: 48,
    };
    assert!(is_for_kept_space(&timeline.peer_range(&peers, &[0; 48]).unwrap_err()));
    vote(&timeline, 3).unwrap();
    assert_eq!((timeline.flush_lsn(), world.latch.reason()), (acknowledged, None));

    // Everything is archived and needed no more: trimming makes room, and WAL is taken without anything being started anew.
    timeline.note_archived(acknowledged);
    timeline.note_consistent(acknowledged);
    timeline.checkpoint().unwrap();
    assert!(timeline.trim().unwrap() > 0);
    world.space().look();
    assert_eq!(world.space().last().state(), Fine);
    // Term 2 wrote nothing.
    let history = TermHistory::new(vec![entry(1, START), entry(3, acknowledged)]).unwrap();
    timeline.elected(&Elected { term: Term(3), history }).unwrap();
    let end = world.append_in(&timeline, 3, 100_000).unwrap();
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn an_append_larger_than_what_is_left_is_refused_and_takes_nothing_of_what_is_kept() {
    let mut world = small_world(6 << 20);
    let timeline = world.led();
    let acknowledged = world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    // Two segments are there, and there is room for one more.
    assert!(is_for_kept_space(&world.append(&timeline, 5 << 20).unwrap_err()));
    assert!(world.free() >= 2 << 20);
    assert_eq!((timeline.flush_lsn(), world.generator.at), (acknowledged, acknowledged));
    // What fits those that are there is taken, and what was acknowledged stays.
    let end = world.append(&timeline, 1_500_000).unwrap();
    assert!(world.free() >= 2 << 20);
    assert_eq!(timeline.files().size_bytes(), 3 * SEGMENT_SIZE);
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn an_append_that_comes_in_pieces_waits_once() {
    use std::io::Write;
    // Slow from the start on.
    let mut world = small_world(6 << 20);
    let timeline = world.led();
    world.append(&timeline, 1000).unwrap();
    world.wait_for_next_segment();
    drop(timeline);
    std::fs::File::create(world.directory.path().join("ballast"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut stream = std::net::TcpStream::connect(serve(&world)).unwrap();
    assert_eq!(world.space().last().state(), DiskState::Slows);
    let start = world.generator.at;
    let history =
        vec![TermStart { term: Term(1), lsn: START }, TermStart { term: Term(2), lsn: start }];
    let history = TermHistory::new(history).unwrap();
    let (proposer, configuration) = (ProposerId([2; 16]), configuration());
    let bytes = world.generator.record(600_000);
    let length = bytes.len() as u64;
    let append =
        Append { term: Term(2), start, length, record_end: world.generator.at, commit_lsn: start };
    let speaks = pgstrata_wire::safekeeper::WAL.speaks;
    let mut sent = Vec::new();
    for (number, message) in [
        Message::Greeting(greeting()),
        Message::VoteRequest(VoteRequest { term: Term(2), proposer, configuration }),
        Message::Elected(Elected { term: Term(2), history }),
        Message::Append(append, &bytes),
    ]
    .into_iter()
    .enumerate()
    {
        let stamp = match number {
            0 => pgstrata_wire::frame::Stamp::First(speaks),
            _ => pgstrata_wire::frame::Stamp::In(speaks.highest()),
        };
        pgstrata_wire::safekeeper::encode(&message, stamp, &mut sent);
    }
    for piece in sent.chunks(8 << 10) {
        stream.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let end = world.generator.at;
    let address = stream.peer_addr().unwrap().to_string();
    let has_it = || {
        let client = SafekeeperClient::connect(&address, None, None, Duration::from_secs(5));
        let parameters = parameters(START);
        client.unwrap().open(parameters.tenant, parameters.timeline).unwrap().flush_lsn == end
    };
    wait_until("the append", has_it);
    let paused = world.space().paused();
    assert!(paused > Duration::ZERO && paused < Duration::from_millis(500), "{paused:?}");
}

#[test]
fn a_trim_that_found_no_space_is_tried_again() {
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at.segment_number(SEGMENT_SIZE) < 4 {
        world.append(&timeline, 100_000).unwrap();
    }
    world.wait_for_next_segment();
    let files = timeline.files();
    let counted = || files.size_bytes() / SEGMENT_SIZE;
    wait_until("count of what has its name", || counted() == files.numbers().unwrap().len() as u64);
    let before = counted();
    let end = world.append(&timeline, 1000).unwrap();
    timeline.checkpoint().unwrap();
    timeline.note_archived(end);
    timeline.note_consistent(end);
    world.disk.fail(Fail::Full);
    assert!(matches!(timeline.trim(), Err(StorageError::DiskFull { .. })));
    assert_eq!(timeline.marks().available_lsn, START, "it was promised that something is gone");
    world.disk.fail(Fail::Nothing);
    let removed = timeline.trim().unwrap();
    assert!(removed > 0);
    assert_eq!(counted(), before - removed);
    assert_eq!(files.numbers().unwrap().len() as u64, counted());
}

fn is_invalid(answer: &Answer) -> bool {
    matches!(answer, Some(Message::Refused(RefusedReason::InvalidWal(_))))
}

#[test]
fn l5_what_is_no_wal_is_not_taken() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let good = world.generator.record(20_000);
    let end = world.generator.at;
    for damage in [0, 8, 16, 500, 19_999] {
        let mut bad = good.clone();
        bad[damage] ^= 1;
        let (answer, flush_lsn) = send(&timeline, at, &bad, end);
        assert!(is_invalid(&answer), "{damage}: {answer:?}");
        assert_eq!(flush_lsn, at);
    }
    let (answer, flush_lsn) = send(&timeline, at, &vec![0; 20_000], end);
    assert!(is_invalid(&answer), "zeros: {answer:?}");
    assert_eq!(flush_lsn, at);
    // A record that follows none of this log.
    let mut stray = WalGenerator::new(parameters(START), at, Lsn(8));
    let bytes = stray.record(10);
    assert!(is_invalid(&send(&timeline, at, &bytes, stray.at).0));
    // Half a record is stored, and is no boundary, whatever its sender says.
    let half = at + 8000;
    assert_eq!(send(&timeline, at, &good[..8000], half).1, at);
    // The sender's end is not needed for a whole one.
    assert_eq!(send(&timeline, half, &good[8000..], at).1, end);
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), end);
    assert_eq!(timeline.last_record_before(end).unwrap().unwrap(), world.generator.prev);
}

#[test]
fn l5_what_a_peer_gives_is_looked_at() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let good = world.generator.record(20_000);
    let end = world.generator.at;
    let start = TermStart { term: Term(1), lsn: START };
    let history = TermHistory::new(vec![start]).unwrap();
    let length = good.len() as u64;
    let range = PeerRange { history, commit_lsn: end, start: at, length };
    let mut bad = good.clone();
    bad[9000] ^= 1;
    let answer = timeline.peer_range(&range, &bad).unwrap();
    assert!(is_invalid(&answer), "{answer:?}");
    let short = PeerRange { commit_lsn: Lsn(end.0 - 8), length: length - 8, ..range.clone() };
    let answer = timeline.peer_range(&short, &good[..good.len() - 8]).unwrap();
    assert!(is_invalid(&answer), "inside a record: {answer:?}");
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (at, START));
    timeline.peer_range(&range, &good).unwrap();
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (end, end));
}

#[test]
fn what_was_copied_before_a_crash_is_not_copied_again() {
    let mut world = World::new();
    let timeline = world.led();
    let at = world.append(&timeline, 1000).unwrap();
    let mut bytes = world.generator.record(20_000);
    bytes.extend(world.generator.record(20_000));
    let whole = world.generator.at;
    bytes.extend(world.generator.record(2_000_000));
    let end = world.generator.at;
    let start = TermStart { term: Term(1), lsn: START };
    let history = TermHistory::new(vec![start]).unwrap();
    // The first piece ends within the third record, and so does the second.
    for (from, to) in [(at, whole + 5000), (whole + 5000, whole + 1_500_000)] {
        let piece = &bytes[(from - at) as usize..(to - at) as usize];
        let length = piece.len() as u64;
        let range = PeerRange { history: history.clone(), commit_lsn: end, start: from, length };
        assert_eq!(timeline.peer_range(&range, piece).unwrap(), None);
        assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (whole, whole));
    }
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), whole);
    let rest = &bytes[(whole - at) as usize..];
    let length = rest.len() as u64;
    let range = PeerRange { history, commit_lsn: end, start: whole, length };
    assert_eq!(timeline.peer_range(&range, rest).unwrap(), None);
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (end, end));
}

#[test]
fn l11_the_last_record_stays_when_its_segment_is_archived() {
    let mut world = World::new();
    let timeline = world.led();
    // One that begins in a segment and ends in the next, and is the last.
    while world.generator.at < Lsn(3 * SEGMENT_SIZE - 50_000) {
        world.append(&timeline, 40_000).unwrap();
    }
    let end = world.append(&timeline, 100_000).unwrap();
    let last = world.generator.prev;
    assert_eq!((last.segment_number(SEGMENT_SIZE), end.segment_number(SEGMENT_SIZE)), (2, 3));
    let (term, record_end) = (Term(1), Lsn::INVALID);
    let tells = Append { term, start: end, length: 0, record_end, commit_lsn: end };
    let mut batch = timeline.batch();
    batch.append(&tells, &[]).unwrap();
    batch.finish().unwrap();
    assert_eq!(timeline.commit_lsn(), end);
    timeline.checkpoint().unwrap();
    timeline.note_archived(end);
    timeline.note_consistent(end);
    timeline.trim().unwrap();
    assert!(timeline.marks().available_lsn > START, "nothing was trimmed");
    assert_eq!(timeline.last_record_before(end).unwrap(), Some(last));
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.last_record_before(end).unwrap(), Some(last));
}

/// A WAL port with small limits; where it listens.
fn serve(world: &World) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let limits = wal::Limits {
        connections: 8,
        pending: 4,
        greeting: Duration::from_secs(60),
        message: Duration::from_secs(1),
        ..wal::Limits::default()
    };
    let served = wal::Served {
        timelines: Arc::new(world.open()),
        security: Security::default(),
        limits,
        pace: Arc::new(Pace::new(CatchUpArguments { catch_up_rate: 0 })),
    };
    wal::serve(vec![listener], served).unwrap();
    address
}

#[test]
fn h14_a_message_must_come_whole() {
    use std::io::Write;
    let world = World::new();
    let mut stream = std::net::TcpStream::connect(serve(&world)).unwrap();
    let mut bytes = Vec::new();
    let parameters = parameters(START);
    let open = Message::Open(parameters.tenant, parameters.timeline);
    let stamp = pgstrata_wire::frame::Stamp::First(pgstrata_wire::safekeeper::WAL.speaks);
    pgstrata_wire::safekeeper::encode(&open, stamp, &mut bytes);
    // A byte now and then, of a message that is fine.
    for byte in &bytes[..bytes.len() - 1] {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("it was listened to for {} bytes", bytes.len());
}

#[test]
fn h14_who_says_nothing_keeps_nobody_out() {
    let world = World::new();
    drop(world.led());
    let address = serve(&world);
    let silent: Vec<_> = (0..40).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let parameters = parameters(START);
    let connected =
        SafekeeperClient::connect(&address.to_string(), None, None, Duration::from_secs(5));
    let status = connected.unwrap().open(parameters.tenant, parameters.timeline);
    assert_eq!(status.unwrap().term, Term(1));
    drop(silent);
}
