//! Timelines that come to rest, and are opened when they are needed.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::lives::{DIRECTORY, OWN, START, World, directory, key, nth};
use common::wal::{SEGMENT_SIZE, parameters};
use parking_lot::Mutex;
use pgstrata_env::Disk;
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Lsn, Member, NodeId, TenantId, Term, TimelineId, TimelineParameters};
use pgstrata_quorum::{Configuration, ProposerId};
use pgstrata_safekeeper::background::mending::{Damaged, attempt};
use pgstrata_safekeeper::decisions::Swapped;
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::segment::{Preparer, SegmentFiles, Zeros};
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::{Greeting, RefusedReason};

#[test]
fn what_rests_is_not_opened_at_a_start_and_is_when_it_is_needed() {
    let mut world = World::new(1);
    let life = world.open();
    let mut logs = [life.found(1), life.found(2)];
    for log in &mut logs {
        log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
    }
    assert!(life.rest(1) && !life.is_open(1));
    let before = life.timelines.overviews();
    drop(life);
    world.disk.lose_power();

    // What it says is what it said, and nothing was read of it.
    let life = world.open();
    assert_eq!(life.timelines.open_keys(), [key(2)]);
    let summary = |all: &[pgstrata_safekeeper::timeline::Overview], n| {
        let found = all.iter().find(|one| one.key() == key(n)).unwrap();
        (found.is_open, found.summary.clone())
    };
    let after = life.timelines.overviews();
    assert_eq!(summary(&after, 1), summary(&before, 1));
    assert_eq!(after.len(), 2);
    // It goes on from there.
    let timeline = life.get(1).unwrap();
    assert_eq!(timeline.flush_lsn(), logs[0].generator.at);
    assert_eq!(timeline.commit_lsn(), logs[0].generator.at);
    assert_eq!(timeline.term(), Term(1));
    logs[0].commit(&timeline, 500).unwrap();
    drop((timeline, life));
    world.disk.lose_power();
    let life = world.open();
    assert_eq!(life.timelines.open_keys(), [key(1), key(2)]);
    assert_eq!(life.get(1).unwrap().flush_lsn(), logs[0].generator.at);
}

#[test]
fn what_something_is_to_be_done_with_does_not_rest() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    log.commit(&timeline, 1000).unwrap();
    // Somebody has it.
    assert!(!life.rest(1));
    let compute = timeline.compute_connected();
    drop(timeline);
    assert!(!life.rest(1));
    drop(compute);
    // Not all that is known is on disk.
    life.get(1).unwrap().note_addresses(&[(NodeId(2), "127.0.0.1:5".into())]);
    assert_eq!(life.timelines.let_rest(&[key(1)]).unwrap(), 0);
    assert!(life.rest(1));
    // What is not committed is to be proven, or cut.
    log.write(&life.get(1).unwrap(), 1000).unwrap();
    assert!(!life.rest(1));
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    // A full segment is to be archived, and then to be removed.
    let timeline = life.get(1).unwrap();
    while timeline.commit_lsn() < Lsn(2 * SEGMENT_SIZE) + 200_000 {
        log.commit(&timeline, 100_000).unwrap();
    }
    drop(timeline);
    assert!(!life.rest_as_it_is(1));
    // And what there is of the last one too.
    life.get(1).unwrap().note_archived(Lsn(2 * SEGMENT_SIZE));
    assert!(!life.rest_as_it_is(1));
    assert!(life.rest(1));
    life.get(1).unwrap().note_consistent(Lsn(2 * SEGMENT_SIZE));
    assert!(!life.rest(1));
    assert_eq!(life.get(1).unwrap().trim().unwrap(), 1);
    assert!(life.rest(1));
    // Members who are to come have to get it.
    let other = Member { node: NodeId(2), ..OWN };
    let joint = Configuration::joint(2, vec![OWN], vec![OWN, other]).unwrap();
    assert_eq!(life.get(1).unwrap().configure(&joint).unwrap(), None);
    assert!(!life.rest(1));
    let new = Configuration::new(3, vec![OWN, other]).unwrap();
    assert_eq!(life.get(1).unwrap().configure(&new).unwrap(), None);
    assert!(life.rest(1));
}

/// Stops in the middle of what comes after a rest, at each operation.
#[test]
fn nothing_acknowledged_after_a_rest_is_lost_and_the_next_start_sees_to_it() {
    let (mut stopped_early, mut acknowledged) = (0, 0);
    for operations in 0..40 {
        for seed in 0..6 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut log = life.found(1);
            let mut durable = log.commit(&life.get(1).unwrap(), 1000).unwrap();
            assert!(life.rest(1));
            world.disk.stop_after(operations);
            let mut has_opened = false;
            if let Ok(timeline) = life.get(1) {
                has_opened = true;
                if let Ok(end) = log.write(&timeline, 1000) {
                    durable = end;
                    acknowledged += 1;
                }
            } else {
                stopped_early += 1;
            }
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            let what = format!("{operations} operations, seed {seed}");
            // It has a tail that is to be proven, or something that is to be cut.
            assert!(life.is_open(1) || !has_opened, "{what}: it counts as resting");
            let timeline = life.get(1).unwrap();
            assert!(timeline.flush_lsn() >= durable, "{what}: {}", timeline.flush_lsn());
            assert!(timeline.commit_lsn() >= START, "{what}");
        }
    }
    assert!(stopped_early > 20 && acknowledged > 20, "{stopped_early} {acknowledged}");
}

/// Stops at each operation while two timelines come to rest, one of them for the second time.
#[test]
fn whatever_is_left_of_a_rest_it_is_only_said_of_what_rests() {
    let mut rested = 0;
    for operations in 0..24 {
        for seed in 0..6 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut logs = [life.found(1), life.found(2)];
            for log in &mut logs {
                log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            }
            assert!(life.rest(1));
            logs[0].commit(&life.get(1).unwrap(), 700).unwrap();
            for n in [1, 2] {
                let timeline = life.get(n).unwrap();
                timeline.note_archived(timeline.commit_lsn());
                timeline.checkpoint().unwrap();
            }
            world.disk.stop_after(operations);
            let outcome = life.timelines.let_rest(&[key(1), key(2)]);
            assert!(outcome.is_ok() || world.latch.reason().is_some());
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            for log in &logs {
                let what = format!("{operations} operations, seed {seed}, timeline {}", log.n);
                let all = life.timelines.overviews();
                let one = all.iter().find(|one| one.key() == key(log.n)).unwrap();
                // The summary is that of the second rest, or it was opened.
                assert_eq!(one.summary.flush_lsn, log.generator.at, "{what}");
                rested += u32::from(!one.is_open);
                assert_eq!(life.get(log.n).unwrap().commit_lsn(), log.generator.at, "{what}");
            }
        }
    }
    assert!((20..2 * 24 * 6 - 20).contains(&rested), "{rested}");
}

#[test]
fn two_at_once_open_it_once() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    for _ in 0..20 {
        assert!(life.rest(1));
        let opened = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| opened.lock().push(life.get(1).unwrap()));
            }
        });
        let opened = opened.into_inner();
        assert!(opened.iter().all(|other| Arc::ptr_eq(other, &opened[0])));
    }
}

/// Who comes and goes, and what rests in between, with segments that are made ahead.
#[test]
fn a_timeline_that_rests_again_and_again_under_writes_is_one_log() {
    let mut world = World::new(1);
    let life = world.open();
    let log = Mutex::new(life.found(1));
    let is_over = AtomicBool::new(false);
    let rests = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let mut log = log.lock();
                        let timeline = life.get(1).unwrap();
                        log.commit(&timeline, 3000).unwrap();
                        timeline.note_archived(log.generator.at);
                        timeline.checkpoint().unwrap();
                        drop(timeline);
                        drop(log);
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        let preparing = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                if !life.preparations.lock().step() {
                    std::thread::yield_now();
                }
            }
        });
        let mut rests = 0;
        while !writers.iter().all(|writer| writer.is_finished()) {
            rests += life.timelines.let_rest(&[key(1)]).unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        preparing.join().unwrap();
        rests
    });
    assert!(rests > 20, "it came to rest {rests} times");
    assert_eq!(world.latch.reason(), None);
    let end = log.into_inner().generator.at;
    assert!(end > Lsn(2 * SEGMENT_SIZE));
    drop(life);
    world.disk.lose_power();
    assert_eq!(world.open().get(1).unwrap().flush_lsn(), end);
}

#[test]
fn a_segment_is_not_made_ahead_for_who_has_let_go() {
    let disk = Arc::new(SimDisk::new(1));
    disk.create_directory(Path::new(DIRECTORY)).unwrap();
    let latch = Latch::default();
    let (preparer, preparations) = Preparer::queue(latch.clone());
    let files = Arc::new(SegmentFiles::new(disk, Path::new(DIRECTORY), parameters(START)));
    preparer.request(&files, 1, Zeros::Written);
    preparer.request(&files, 2, Zeros::Reserved);
    assert!(preparations.step());
    files.let_go();
    assert!(preparations.step());
    assert_eq!(files.numbers().unwrap(), [1]);
    let made = |number| files.open_or_make(number, Zeros::Reserved).is_ok();
    assert!(made(1) && !made(2));
    assert_eq!(latch.reason(), None);
}

#[test]
fn what_is_damaged_is_found_when_it_is_opened_and_others_are_served() {
    let mut world = World::new(1);
    let life = world.open();
    let mut logs = [life.found(1), life.found(2)];
    for log in &mut logs {
        log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
        assert!(life.rest(log.n));
    }
    drop(life);
    let segment = directory(1).join(parameters(START).segment_name(1));
    world.disk.rot(&segment, 300).unwrap();
    let life = world.open();
    assert_eq!((life.timelines.overviews().len(), life.timelines.damaged()), (2, Vec::new()));
    for _ in 0..2 {
        let refused = life.get(1).unwrap_err();
        // Others may have it: whoever asks may ask again.
        assert!(matches!(&refused, RefusedReason::Unavailable(text) if text.contains("damaged")));
    }
    assert_eq!(life.get(2).unwrap().flush_lsn(), logs[1].generator.at);
    let damaged = life.timelines.damaged();
    assert_eq!((life.timelines.overviews().len(), damaged.len()), (1, 1));
    assert!(damaged[0].1.contains("damaged"), "{damaged:?}");
    // The next start says so at once.
    drop(life);
    world.disk.lose_power();
    assert_eq!(world.open().timelines.damaged().len(), 1);
}

#[test]
fn one_whose_directory_is_gone_is_missed_at_the_start() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    drop(life);
    let gone = directory(1).with_extension("gone");
    world.disk.rename(&directory(1), &gone).unwrap();
    let life = world.open();
    assert!(life.timelines.damaged()[0].1.contains("is gone"));
}

#[test]
fn a_list_that_is_lost_or_broken_costs_a_look_and_nothing_else() {
    let list = Path::new(DIRECTORY).join("resting");
    for is_broken in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut log = life.found(1);
        log.commit(&life.get(1).unwrap(), 1000).unwrap();
        assert!(life.rest(1));
        drop(life);
        match is_broken {
            true => world.disk.rot(&list, 70).unwrap(),
            false => world.disk.remove(&list).unwrap(),
        }
        let life = world.open();
        assert!(life.is_open(1));
        assert_eq!(life.get(1).unwrap().flush_lsn(), log.generator.at);
        assert!(life.rest(1));
        drop(life);
        assert!(!world.open().is_open(1));
    }
}

#[test]
fn on_a_full_disk_a_timeline_is_opened_and_does_not_count_as_resting() {
    for seed in 0..10 {
        let mut world = World::new(seed);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            assert!(life.rest(log.n));
        }
        world.disk.set_full(true);
        let timeline = life.get(1).unwrap();
        // Its segment is there.
        logs[0].write(&timeline, 1000).unwrap();
        drop(timeline);
        // Nor can it be written down what rests.
        assert_eq!(life.get(2).unwrap().commit_lsn(), logs[1].generator.at);
        assert_eq!(life.timelines.let_rest(&[key(2)]).unwrap(), 1);
        assert_eq!(world.latch.reason(), None);
        drop(life);
        world.disk.lose_power();
        let life = world.open();
        assert_eq!(life.timelines.open_keys(), [key(1), key(2)]);
        assert_eq!(life.get(1).unwrap().flush_lsn(), logs[0].generator.at);
        world.disk.set_full(false);
        assert!(life.rest(2));
        drop(life);
        world.disk.lose_power();
        assert_eq!(world.open().timelines.open_keys(), [key(1)]);
    }
}

#[test]
fn what_others_keep_by_now_comes_to_rest_and_is_removed_at_the_next_start() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    assert!(life.rest(1));
    let other = Member { node: NodeId(2), ..OWN };
    let timeline = life.get(1).unwrap();
    log.write(&timeline, 1000).unwrap();
    let new = Configuration::new(3, vec![other]).unwrap();
    assert_eq!(timeline.configure(&new).unwrap(), None);
    drop(timeline);
    assert!(life.rest(1));
    drop(life);
    let life = world.open();
    assert_eq!((life.timelines.overviews().len(), life.timelines.damaged()), (0, Vec::new()));
    assert!(matches!(life.get(1), Err(RefusedReason::UnknownTimeline)));
    drop(life);
    // It is not mistaken for a resting one when it comes back with nothing.
    let life = world.open();
    assert_eq!(life.timelines.overviews().len(), 0);
}

/// Its branch was deleted meanwhile, which may free what it waits for.
#[test]
fn what_could_not_be_opened_is_removed_with_its_branch() {
    let mut unopened = 0;
    for seed in 0..30 {
        let mut world = World::new(seed);
        let life = world.open();
        let mut log = life.found(1);
        log.commit(&life.get(1).unwrap(), 1000).unwrap();
        log.write(&life.get(1).unwrap(), 300).unwrap();
        drop(life);
        world.disk.lose_power();
        world.disk.fail_sync_after(seed);
        let Ok(life) = world.try_to_open() else { continue };
        world.disk.fail_sync_after(u64::MAX);
        if life.timelines.mending().is_empty() {
            continue;
        }
        unopened += 1;
        let decisions = world.decisions();
        let (decided, version) = decisions.read_versioned(key(1)).unwrap().unwrap();
        let deleted = Quorum { is_deleted: true, ..decided };
        assert_eq!(decisions.swap(key(1), &version, &deleted).unwrap(), Swapped::Yes);
        let nobody = |_: &Damaged<'_>| unreachable!("nothing of it is damaged");
        let outcome = attempt(&life.timelines, key(1), nobody);
        assert!(outcome.is_ok(), "{seed}: {outcome:?}");
        assert!(matches!(life.get(1), Err(RefusedReason::UnknownTimeline)));
        assert!(life.timelines.keys().is_empty() && world.disk.list(&directory(1)).is_err());
    }
    assert!(unopened > 1, "{unopened}");
}

/// The world's clusters have smaller segments than PostgreSQL can: a safekeeper that is run takes none of those.
#[test]
fn segments_smaller_than_postgresql_has_are_refused() {
    let mut world = World::new(1);
    let life = world.open();
    let small = |segment_size| Greeting {
        parameters: TimelineParameters { segment_size, ..nth(1) },
        known: 0,
        addresses: Vec::new(),
        proposer: ProposerId([1; 16]),
    };
    let nodes = [(OWN.node, Some(OWN.incarnation))];
    for size in [64 << 10, 512 << 10] {
        let greeting = small(size);
        for outcome in [life.timelines.found(&greeting, &nodes), life.timelines.greet(&greeting)] {
            let Err(RefusedReason::Mismatch(why)) = outcome else { panic!("{size} bytes") };
            assert!(why.contains("smaller than PostgreSQL has them"), "{why}");
        }
    }
    assert!(life.timelines.keys().is_empty());
    assert!(life.timelines.found(&small(1 << 20), &nodes).is_ok());
}

/// A wait for a timeline ends, and is for that timeline only.
#[test]
fn others_are_served_while_one_comes_to_rest() {
    let mut world = World::new(1);
    let life = world.open();
    for n in 1..=20 {
        life.found(n).commit(&life.get(n).unwrap(), 1000).unwrap();
    }
    let keys: Vec<TimelineKey> = (1..=19).map(key).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let resting = scope.spawn(|| {
            for _ in 0..20 {
                for key in &keys {
                    life.timelines.get(*key).unwrap().checkpoint().unwrap();
                }
                life.timelines.let_rest(&keys).unwrap();
            }
        });
        while !resting.is_finished() {
            assert!(life.timelines.get_open(key(20)).is_some());
            assert_eq!(life.timelines.overviews().len(), 20);
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(60));
    let unknown = (TenantId([9; 16]), TimelineId([9; 16]));
    assert!(matches!(life.timelines.get(unknown), Err(RefusedReason::UnknownTimeline)));
}

/// Whatever fails while a timeline is opened: the others are served, and it is too once it can be.
#[test]
fn what_could_not_be_opened_is_opened_later() {
    let mut unopened = 0;
    for syncs in 0..30 {
        for is_full in [false, true] {
            let mut world = World::new(syncs);
            let life = world.open();
            let mut log = life.found(1);
            log.commit(&life.get(1).unwrap(), 1000).unwrap();
            log.write(&life.get(1).unwrap(), 300).unwrap();
            drop(life);
            world.disk.lose_power();
            match is_full {
                true => world.disk.set_full(true),
                false => world.disk.fail_sync_after(syncs),
            }
            let Ok(life) = world.try_to_open() else { continue };
            world.disk.set_full(false);
            world.disk.fail_sync_after(u64::MAX);
            if life.get(1).is_err() {
                unopened += 1;
                assert_eq!(life.timelines.mending(), [key(1)]);
                let nobody = |_: &Damaged<'_>| unreachable!("nothing of it is damaged");
                attempt(&life.timelines, key(1), nobody).unwrap();
            }
            let timeline = life.get(1).unwrap();
            assert_eq!(timeline.flush_lsn(), log.generator.at);
            assert!(life.timelines.damaged().is_empty());
        }
    }
    assert!(unopened > 1, "{unopened}");
}
