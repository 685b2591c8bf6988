//! A log that begins later than its timeline, since what is before is archived.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_env::Disk;
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_quorum::{Chain, PeerRange, TermHistory, TermStart};
use pgstrata_safekeeper::background::pulling::others_commit;
use pgstrata_safekeeper::checked_segment::checker;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::Preparer;
use pgstrata_safekeeper::timeline::{Beginning, OpenContext, Timeline};
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::{Message, Status};

const START: Lsn = Lsn(SEGMENT_SIZE);

const OWN: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

const DIRECTORY: &str = "/safekeeper/tenant/timeline";

fn context(disk: &SimDisk) -> OpenContext {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let latch = Latch::default();
    OpenContext {
        own: OWN,
        preparer: Preparer::queue(latch.clone()).0,
        latch,
        space: DiskSpace::new(Arc::clone(&disk), Path::new("/"), DiskArguments::default()),
        disk,
        meters: Meters::new().unwrap(),
    }
}

fn history() -> TermHistory {
    TermHistory::new(vec![TermStart { term: Term(1), lsn: START }]).unwrap()
}

/// Another member's log: the bytes from the timeline's start on.
fn another() -> Vec<u8> {
    let mut generator = WalGenerator::new(parameters(START), START, Lsn(START.0 - 8));
    let mut bytes = Vec::new();
    while generator.at < START + 3 * SEGMENT_SIZE {
        bytes.extend(generator.record(70_000));
    }
    bytes
}

/// Where that log begins when its first two segments are removed, and the end of the first record there.
fn beginning(bytes: &[u8]) -> Beginning {
    let available_lsn = START + 2 * SEGMENT_SIZE;
    let bytes = bytes[2 * SEGMENT_SIZE as usize..].to_vec();
    let mut checker = checker(&parameters(START), available_lsn);
    for piece in bytes.chunks(10_000) {
        checker.check(piece).unwrap();
        if checker.last_record().is_some() {
            break;
        }
    }
    let (lsn, last_record) = (checker.position(), checker.last_record());
    // The log goes on inside a record there, which began before.
    assert!(lsn > available_lsn + 1000 && last_record > Some(available_lsn));
    let commit_lsn = available_lsn + bytes.len() as u64;
    Beginning { available_lsn, lsn, last_record, bytes, history: history(), commit_lsn }
}

fn create(disk: &SimDisk) -> Timeline {
    create_among(disk, &[])
}

/// The same where there are other members.
fn create_among(disk: &SimDisk, others: &[Member]) -> Timeline {
    disk.create_directory(Path::new("/safekeeper")).unwrap();
    disk.sync_directory(Path::new("/")).unwrap();
    let chain = Chain::found([&[OWN], others].concat()).unwrap();
    let founded = Quorum::founded(parameters(START), chain);
    Timeline::create(&context(disk), Path::new(DIRECTORY), &founded, &[]).unwrap()
}

fn open(disk: &SimDisk) -> Timeline {
    Timeline::open(&context(disk), Path::new(DIRECTORY)).unwrap().timeline
}

/// The rest of the other log, from the beginning on.
fn copy_rest(timeline: &Timeline, beginning: &Beginning) {
    let start = timeline.flush_lsn();
    let rest = &beginning.bytes[(start - beginning.available_lsn) as usize..];
    let (history, commit_lsn) = (history(), beginning.commit_lsn);
    let range = PeerRange { history, commit_lsn, start, length: rest.len() as u64 };
    assert_eq!(timeline.peer_range(&range, rest).unwrap(), None);
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (commit_lsn, commit_lsn));
    let mut reading =
        timeline.read_range(beginning.available_lsn, commit_lsn, Term(0)).unwrap_or_else(|why| {
            panic!("{why}");
        });
    let mut found = Vec::new();
    let mut buffer = vec![0; 100_000];
    loop {
        match reading.next(&mut buffer).unwrap() {
            0 => break,
            count => found.extend_from_slice(&buffer[..count]),
        }
    }
    assert!(found == beginning.bytes);
    assert!(timeline.read_range(START, commit_lsn, Term(0)).is_err());
}

#[test]
fn an_empty_log_begins_where_others_do_whenever_power_fails() {
    let bytes = another();
    let beginning = beginning(&bytes);
    let mut begun = [0, 0];
    for point in 0.. {
        let disk = SimDisk::new(point);
        let timeline = create(&disk);
        disk.stop_after(point);
        let answer = timeline.begin_at(&beginning);
        let is_whole = answer.is_ok();
        drop(timeline);
        match point % 2 {
            0 => disk.lose_power(),
            _ => disk.end_process(),
        }
        let timeline = open(&disk);
        let flush_lsn = timeline.flush_lsn();
        let here = flush_lsn == beginning.lsn;
        assert!(here || (flush_lsn == START && !is_whole), "point {point}: {flush_lsn}");
        begun[usize::from(here)] += 1;
        if !here {
            assert_eq!(timeline.begin_at(&beginning).unwrap(), None);
        }
        assert_eq!(timeline.commit_lsn(), beginning.lsn);
        assert_eq!(timeline.marks().available_lsn, beginning.available_lsn);
        copy_rest(&timeline, &beginning);
        drop(timeline);
        disk.lose_power();
        assert_eq!(open(&disk).flush_lsn(), beginning.commit_lsn);
        if is_whole {
            break;
        }
    }
    assert!(begun[0] > 5 && begun[1] > 0, "{begun:?}");
}

#[test]
fn only_an_empty_log_begins_later() {
    let bytes = another();
    let beginning = beginning(&bytes);
    let disk = SimDisk::new(1);
    let timeline = create(&disk);
    let length = SEGMENT_SIZE;
    let commit_lsn = beginning.commit_lsn;
    let range = PeerRange { history: history(), commit_lsn, start: START, length };
    let piece = &bytes[..length as usize];
    assert_eq!(timeline.peer_range(&range, piece).unwrap(), None);
    let before = timeline.flush_lsn();
    let answer = timeline.begin_at(&beginning).unwrap();
    assert!(matches!(answer, Some(Message::Refused(_))), "{answer:?}");
    assert_eq!((timeline.flush_lsn(), timeline.marks().available_lsn), (before, START));
    // Nor where it would be inside what is not known to be committed.
    let disk = SimDisk::new(2);
    let timeline = create(&disk);
    let uncommitted = Beginning { commit_lsn: Lsn(beginning.lsn.0 - 1), ..beginning };
    let answer = timeline.begin_at(&uncommitted).unwrap();
    assert!(matches!(answer, Some(Message::Refused(_))), "{answer:?}");
    assert_eq!(timeline.flush_lsn(), START);
}

#[test]
fn only_who_nobody_waits_for_is_paced() {
    let others = [2, 3]
        .map(|node: u64| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) });
    let timeline = create_among(&SimDisk::new(1), &others);
    let status = |member: Member, has_proposer: bool, flush: u64, commit: u64| Status {
        member,
        has_proposer,
        flush_lsn: START + flush,
        commit_lsn: START + commit,
        ..timeline.status().unwrap()
    };
    let [two, three] = others;
    let far = 1 << 30;
    // Both have what is committed, as nearly as can be told.
    let peers = [status(two, true, far, far), status(three, false, far - 1000, far - 2000)];
    assert!(others_commit(&timeline, &peers));
    // Nobody writes; one of them is gone; or lacks as much as this one.
    let peers = [status(two, false, far, far), status(three, false, far, far)];
    assert!(!others_commit(&timeline, &peers));
    assert!(!others_commit(&timeline, &[status(two, true, far, far)]));
    let peers = [status(two, true, far, far), status(three, true, 0, 0)];
    assert!(!others_commit(&timeline, &peers));
}
