//! Where a log ends after a crash: what is a torn end, and what is damage.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;

use common::failing::{START, World, flip, send, vote};
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_env::Disk;
use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::{Append, Elected, TermHistory, TermStart};
use pgstrata_safekeeper::segment::FlushedNote;
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::Message;

#[test]
fn a_torn_tail_is_cut_to_the_last_whole_record() {
    let mut world = World::new();
    let timeline = world.led();
    let whole = world.append(&timeline, 1000).unwrap();
    // A crash in the middle of the next record, which was never acknowledged.
    let torn = world.generator.record(5000);
    let mut batch = timeline.batch();
    let append =
        Append { term: Term(1), start: whole, length: 3000, record_end: whole, commit_lsn: whole };
    batch.append(&append, &torn[..3000]).unwrap();
    batch.finish().unwrap();
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), whole);
    let mut rest = vec![1; 3000];
    timeline.reader().read(whole, &mut rest).unwrap();
    assert_eq!(rest, vec![0; 3000], "nothing half-written is left");
    assert!(timeline.last_record_before(whole).unwrap().is_some());
}

/// Opens what is left when the note of the durable end was lost, too.
fn forget_note(world: &World) {
    std::fs::remove_file(world.timeline_directory().join("flushed")).unwrap();
}

fn assert_damaged(world: &World, by: &str) {
    let timelines = world.open();
    assert_eq!(timelines.overviews().len(), 0, "{by}: it is counted as whole");
    assert!(timelines.damaged()[0].1.contains("damaged"), "{}", timelines.damaged()[0].1);
}

#[test]
fn l6_rot_in_the_acknowledged_tail_is_no_torn_end() {
    let mut world = World::new();
    let timeline = world.led();
    for _ in 0..5 {
        world.append(&timeline, 1000).unwrap();
    }
    let end = timeline.flush_lsn();
    drop(timeline);
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    // The first record, one in the middle, and the last.
    for at in [300, 2500, (end - START) - 10] {
        flip(&segment, at);
        assert_damaged(&world, &format!("rot at {at}"));
        flip(&segment, at);
        assert_eq!(world.open().only().unwrap().flush_lsn(), end);
    }
    // The same without the note: all the bytes of the record are there, and they are wrong.
    for at in [300, 2500, (end - START) - 10] {
        let note = world.timeline_directory().join("flushed");
        if note.exists() {
            forget_note(&world);
        }
        flip(&segment, at);
        assert_damaged(&world, &format!("rot at {at}, no note"));
        flip(&segment, at);
    }
    assert_eq!(world.open().only().unwrap().flush_lsn(), end);
}

#[test]
fn l6_what_a_crash_leaves_of_a_write_is_a_torn_end() {
    use std::os::unix::fs::FileExt;
    for note_is_lost in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        let torn = world.generator.record(5000);
        let mut batch = timeline.batch();
        let length = torn.len() as u64;
        let append =
            Append { term: Term(1), start: whole, length, record_end: whole, commit_lsn: whole };
        batch.append(&append, &torn).unwrap();
        drop(batch);
        drop(timeline);
        // A sector in the middle did not reach the disk, those after it did.
        let segment = world.timeline_directory().join(parameters(START).segment_name(1));
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        file.write_all_at(&[0; 512], 6 * 512).unwrap();
        if note_is_lost {
            forget_note(&world);
        }
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_sector_that_has_only_its_beginning_is_a_torn_end() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    let whole = world.append(&timeline, 1000).unwrap();
    // The first part of a record was synced, with what came before it.
    let torn = world.generator.record(1500);
    let append = |start: Lsn, length: usize| {
        let length = length as u64;
        Append { term: Term(1), start, length, record_end: whole, commit_lsn: whole }
    };
    timeline.batch().append(&append(whole, 100), &torn[..100]).unwrap();
    let mut batch = timeline.batch();
    batch.append(&append(whole + 100, torn.len() - 100), &torn[100..]).unwrap();
    drop(batch);
    drop(timeline);
    // Of the rest only the first sector did not reach the disk.
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    let from = whole + 100 - START;
    file.write_all_at(&vec![0; (from.next_multiple_of(512) - from) as usize], from).unwrap();
    forget_note(&world);
    assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
}

#[test]
fn l6_a_page_of_which_only_the_header_came_is_a_torn_end() {
    for header in [5, 24] {
        let mut world = World::new();
        let timeline = world.led();
        // Up to the end of a page.
        world.append(&timeline, 1000).unwrap();
        let left = (8192 - world.generator.at.page_offset()) as usize;
        let whole = world.append(&timeline, left - 29).unwrap();
        assert_eq!(whole.page_offset(), 0);
        let next = world.generator.record(1000);
        let append = Append {
            term: Term(1),
            start: whole,
            length: header,
            record_end: whole,
            commit_lsn: whole,
        };
        let mut batch = timeline.batch();
        batch.append(&append, &next[..header as usize]).unwrap();
        batch.finish().unwrap();
        drop(timeline);
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_note_that_was_lowered_and_not_synced_does_not_come_back() {
    let directory = Path::new("/timeline");
    for seed in 0..40 {
        let disk = SimDisk::new(seed);
        let open = || FlushedNote::open(&disk, directory).unwrap();
        disk.create_directory(directory).unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        let mut note = open();
        disk.sync_directory(directory).unwrap();
        note.raise(Lsn(2000), Lsn(1500)).unwrap();
        note.sync().unwrap();
        // Lowered for a cut, but the process ends before it is synced, or that fails.
        match seed % 2 {
            0 => disk.stop_after(1),
            _ => disk.fail_sync_after(0),
        }
        note.lower(Lsn(1000)).unwrap_err();
        disk.end_process();
        // The next one cuts.
        open().lower(Lsn(1000)).unwrap();
        disk.lose_power();
        let note = open();
        assert_eq!((note.lsn(), note.commit_lsn()), (Lsn(1000), Lsn(1000)), "seed {seed}");
    }
}

/// Nobody else may be left who could tell it: see `quorum recover`.
#[test]
fn what_was_known_to_be_committed_is_known_after_a_crash() {
    let mut world = World::new();
    let timeline = world.led();
    let committed = world.append(&timeline, 1000).unwrap();
    // The one that comes next says that it is.
    let end = world.append(&timeline, 1000).unwrap();
    let start = world.generator.at;
    let append =
        Append { term: Term(1), start, length: 0, record_end: start, commit_lsn: committed };
    let mut batch = timeline.batch();
    batch.append(&append, &[]).unwrap();
    batch.finish().unwrap();
    assert_eq!(timeline.commit_lsn(), committed);
    timeline.note_flushed().unwrap();
    assert!(timeline.stored_commit_lsn() < committed, "the control file is written seldom");
    drop(timeline);
    let timeline = world.open().only().unwrap();
    assert_eq!((timeline.flush_lsn(), timeline.commit_lsn()), (end, committed));
    // What the release before has written of it says nothing of that, and is good.
    drop(timeline);
    let path = world.timeline_directory().join("flushed");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&bytes[..20], &[0; 492]].concat()).unwrap();
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), end);
    assert!(timeline.commit_lsn() < committed);
}

/// What looks like a torn write and was acknowledged: only the note can tell.
#[test]
fn l6_zeros_in_what_was_noted_are_damage() {
    use std::os::unix::fs::FileExt;
    for noted in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        timeline.note_flushed().unwrap();
        world.append(&timeline, 5000).unwrap();
        if noted {
            timeline.note_flushed().unwrap();
        }
        drop(timeline);
        let segment = world.timeline_directory().join(parameters(START).segment_name(1));
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        file.write_all_at(&[0; 512], 6 * 512).unwrap();
        match noted {
            true => assert_damaged(&world, "a sector of zeros"),
            false => assert_eq!(world.open().only().unwrap().flush_lsn(), whole),
        }
    }
}

#[test]
fn l6_a_hole_far_before_the_end_is_damage() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    while world.generator.at < Lsn(8 * SEGMENT_SIZE) {
        world.append(&timeline, 100_000).unwrap();
    }
    drop(timeline);
    let segment = world.timeline_directory().join(parameters(START).segment_name(2));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(&[0; 4096], 8192).unwrap();
    assert_damaged(&world, "a hole");
}

#[test]
fn l6_a_long_record_of_zeros_that_was_cut_short_is_a_torn_end() {
    for note_is_lost in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let whole = world.append(&timeline, 1000).unwrap();
        // As PostgreSQL writes a message of zeros: its first sectors hold nothing else.
        let record = world.generator.record_of(&vec![0; 9 << 20]);
        let part = &record[..8 << 20];
        for (number, piece) in part.chunks(256 << 10).enumerate() {
            let start = whole + (number * (256 << 10)) as u64;
            let length = piece.len() as u64;
            let append =
                Append { term: Term(1), start, length, record_end: whole, commit_lsn: whole };
            let mut batch = timeline.batch();
            batch.append(&append, piece).unwrap();
            batch.finish().unwrap();
        }
        drop(timeline);
        if note_is_lost {
            forget_note(&world);
        }
        assert_eq!(world.open().only().unwrap().flush_lsn(), whole);
    }
}

#[test]
fn l6_a_cut_that_was_interrupted_is_no_damage() {
    use std::os::unix::fs::FileExt;
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    while world.generator.at < kept + (SEGMENT_SIZE - (100 << 10)) {
        world.append(&timeline, 50_000).unwrap();
    }
    drop(timeline);
    // Zeros were put over the first part of what was cut off.
    let segment = world.timeline_directory().join(parameters(START).segment_name(1));
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(&vec![0; 64 << 10], kept - START).unwrap();
    forget_note(&world);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

#[test]
fn l6_a_cut_is_no_damage() {
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    world.append(&timeline, 1000).unwrap();
    vote(&timeline, 2).unwrap();
    let entry = |term, lsn| TermStart { term: Term(term), lsn };
    let history = TermHistory::new(vec![entry(1, START), entry(2, kept)]).unwrap();
    timeline.elected(&Elected { term: Term(2), history }).unwrap();
    assert_eq!(timeline.flush_lsn(), kept);
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

/// Nothing is missing of it but zeros, and they are there: recovery would find it whole, and a vote that said less would have let a
/// winner begin before it.
#[test]
fn what_has_only_begun_at_a_vote_is_not_there_after_a_crash() {
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    let bytes = world.generator.clone().record(10);
    send(&timeline, kept, &bytes[..bytes.len() - 1], kept);
    assert_eq!(timeline.flush_lsn(), kept);
    drop(timeline);
    // Before anybody was told how far it goes it may count.
    let timeline = world.open().only().unwrap();
    assert_eq!(timeline.flush_lsn(), kept + bytes.len() as u64);
    drop(timeline);
    let mut world = World::new();
    let timeline = world.led();
    let kept = world.append(&timeline, 1000).unwrap();
    send(&timeline, kept, &bytes[..bytes.len() - 1], kept);
    let voted = vote(&timeline, 2).unwrap();
    assert!(matches!(&voted, Some(Message::Vote(vote)) if vote.flush_lsn == kept), "{voted:?}");
    drop(timeline);
    assert_eq!(world.open().only().unwrap().flush_lsn(), kept);
}

/// It was taken for the one that the next record links back to, and all that the next proposer sent was refused.
#[test]
fn a_record_that_is_cut_before_what_pads_it_is_forgotten() {
    for ends_segment in [false, true] {
        let mut world = World::new();
        let timeline = world.led();
        let kept = world.append(&timeline, 1000).unwrap();
        let mut next = world.generator.clone();
        let bytes = if ends_segment { next.switch() } else { next.record(10) };
        // Whole, but what follows it up to the boundary is still to come.
        let length = if ends_segment { 4096 } else { bytes.len() - 1 };
        let append = |term, bytes: &[u8]| {
            let length = bytes.len() as u64;
            let append = Append {
                term: Term(term),
                start: kept,
                length,
                record_end: kept,
                commit_lsn: kept,
            };
            let mut batch = timeline.batch();
            assert_eq!(batch.append(&append, bytes).unwrap(), None);
            batch.finish().unwrap()
        };
        append(1, &bytes[..length]);
        assert_eq!(timeline.flush_lsn(), kept);
        vote(&timeline, 2).unwrap();
        let entry = |term, lsn| TermStart { term: Term(term), lsn };
        let history = TermHistory::new(vec![entry(1, START), entry(2, kept)]).unwrap();
        timeline.elected(&Elected { term: Term(2), history }).unwrap();
        let bytes = world.generator.record(100);
        append(2, &bytes);
        assert_eq!(timeline.flush_lsn(), world.generator.at);
    }
}

#[test]
fn damage_below_what_was_durable_gives_one_clear_error() {
    let mut world = World::new();
    let timeline = world.led();
    for _ in 0..5 {
        world.append(&timeline, 1000).unwrap();
    }
    timeline.checkpoint().unwrap();
    drop(timeline);
    let directory = world.timeline_directory();
    let segment = directory.join(parameters(START).segment_name(1));
    flip(&segment, 2500);
    let timelines = world.open();
    let damaged = timelines.damaged();
    assert_eq!((timelines.overviews().len(), damaged.len()), (0, 1));
    assert!(damaged[0].1.contains("was durable"), "{}", damaged[0].1);
    drop(timelines);
    flip(&segment, 2500);
    assert_eq!(world.open().overviews().len(), 1);
    flip(&directory.join("control"), 60);
    let damaged = world.open().damaged();
    assert!(damaged[0].1.contains("checksum"), "{}", damaged[0].1);
    std::fs::write(directory.join("control"), b"").unwrap();
    assert!(world.open().damaged()[0].1.contains("never written"));
    std::fs::remove_file(directory.join("control")).unwrap();
    assert_eq!(world.open().damaged().len(), 1);
}
