//! Copies that the members went on without: they are kept for who misses what they have, and served to nobody.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;

use common::lives::{DIRECTORY, Life, OWN, START, World, directory, key, nth};
use pgstrata_env::Disk;
use pgstrata_format::quorum::{GivenUp, Quorum};
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Incarnation, Member, NodeId};
use pgstrata_quorum::{Chain, Configuration, ProposerId};
use pgstrata_safekeeper::background::mending::{Damaged, attempt};
use pgstrata_safekeeper::decisions::Swapped;
use pgstrata_safekeeper::timeline::{KEEP, note_kept};
use pgstrata_safekeeper::timelines::Greeted;
use pgstrata_wire::safekeeper::{Greeting, RefusedReason};

#[test]
fn several_hear_at_once_that_a_timeline_is_kept() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1);
    let timeline = life.get(1).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| timeline.keep().unwrap()));
        }
    });
    assert!(timeline.is_kept().unwrap());
    assert_eq!(world.latch.reason(), None);
}

/// Members went on without this one, which was not asked; and say later that it is one of them, and that it leaves again.
#[test]
fn what_others_went_on_without_is_kept_whatever_they_decide_of_it_later() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1);
    let timeline = life.get(1).unwrap();
    let two = Member { node: NodeId(2), incarnation: Incarnation([2; 16]) };
    let founded = Chain::found(vec![OWN]).unwrap();
    // It had left in steps that are known: what it has others have too.
    let leaves = founded.change_to(vec![two]).unwrap().change_ended().unwrap();
    timeline.admit_decision(&leaves).unwrap();
    assert!(!timeline.is_kept().unwrap());
    let without = founded.recovered(two, vec![two]).unwrap();
    let back = without.change_to(vec![two, OWN]).unwrap().change_ended().unwrap();
    let leaves = back.change_to(vec![two]).unwrap().change_ended().unwrap();
    timeline.admit_decision(&leaves).unwrap();
    assert!(timeline.is_kept().unwrap());
    for n in [2, 3] {
        life.found(n);
        let timeline = life.get(n).unwrap();
        let decided = if n == 2 { &back } else { &leaves };
        assert_eq!(timeline.admit_decision(decided).is_err(), n == 2);
        assert!(timeline.is_kept().unwrap());
    }
}

/// Members were given up after this one had left, or before it had heard that it did: its log may have what was given up. It is
/// served no more from the moment that it hears of it, nor after a restart, and is no member again with what it has.
#[test]
fn who_left_before_members_were_given_up_is_no_member_again_with_its_log() {
    let two = Member { node: NodeId(2), incarnation: Incarnation([2; 16]) };
    let three = Member { node: NodeId(3), incarnation: Incarnation([3; 16]) };
    for has_heard_that_it_left in [false, true] {
        for is_wanted in [false, true] {
            let mut world = World::new(1);
            let life = world.open();
            let mut log = life.found(1);
            let end = log.commit(&life.get(1).unwrap(), 1000).unwrap();
            let decisions = world.decisions();
            let decide = |change: &dyn Fn(Quorum) -> Quorum| {
                let (decided, version) = decisions.read_versioned(key(1)).unwrap().unwrap();
                let swapped = decisions.swap(key(1), &version, &change(decided)).unwrap();
                assert_eq!(swapped, Swapped::Yes);
            };
            let with = |decided: Quorum, chain: Chain| Quorum { chain, ..decided };
            decide(&|decided| {
                let chain = decided.chain.change_to(vec![two, three]).unwrap();
                with(decided, chain)
            });
            decide(&|decided| {
                let chain = decided.chain.change_ended().unwrap();
                with(decided, chain)
            });
            if has_heard_that_it_left {
                life.timelines.look_at_decision(key(1)).unwrap();
                assert!(life.get(1).unwrap().is_left() && !life.get(1).unwrap().is_kept().unwrap());
            }
            decide(&|decided| {
                let chain = decided.chain.recovered(two, vec![two]).unwrap();
                let point = GivenUp { number: 4, lsn: START, last_record: None };
                let given_up = decided.given_up.with(point);
                Quorum { given_up, ..with(decided, chain) }
            });
            // A change that came to nothing is none in which it left.
            decide(&|decided| {
                let chain = decided.chain.change_to(vec![two, OWN]).unwrap();
                with(decided, chain)
            });
            if !is_wanted {
                decide(&|decided| {
                    let chain = decided.chain.change_undone().unwrap();
                    with(decided, chain)
                });
            }
            let refused = life.timelines.look_at_decision(key(1)).unwrap_err().to_string();
            assert!(refused.contains("only with a new directory"), "{refused}");
            for _ in 0..2 {
                let refused = life.get(1).unwrap_err().to_string();
                assert!(refused.contains("went on without this safekeeper"), "{refused}");
            }
            drop(life);
            world.disk.end_process();
            let life = world.open();
            let refused = life.get(1).unwrap_err().to_string();
            assert!(refused.contains("went on without this safekeeper"), "{refused}");
            // What it has is there for who misses it.
            let bytes = world.disk.read_all(&directory(1).join("control")).unwrap();
            let control = TimelineControl::decode(&bytes, OWN.node).unwrap();
            assert!(control.flush_lsn.max(control.state.commit_lsn) <= end);
            assert!(world.disk.list(&directory(1)).unwrap().contains(&nth(1).segment_name(1)));
        }
    }
}

const TWO: Member = Member { node: NodeId(2), incarnation: Incarnation([2; 16]) };

fn decide(world: &World, change: impl FnOnce(Quorum) -> Quorum) {
    let decisions = world.decisions();
    let (decided, version) = decisions.read_versioned(key(1)).unwrap().unwrap();
    let swapped = decisions.swap(key(1), &version, &change(decided)).unwrap();
    assert_eq!(swapped, Swapped::Yes);
}

/// The other one goes on alone, and nobody tells this one.
fn go_on_without_it(world: &World) {
    decide(world, |decided| {
        let chain = decided.chain.recovered(TWO, vec![TWO]).unwrap();
        let number = chain.newest().number();
        let point = GivenUp { number, lsn: START, last_record: None };
        Quorum { chain, given_up: decided.given_up.with(point), ..decided }
    });
}

fn is_refused(life: &Life) -> bool {
    match life.get(1) {
        Err(RefusedReason::Storage(why)) => why.contains("went on without this safekeeper"),
        _ => false,
    }
}

/// Before it can be written down, too; and again after a restart, when nothing says so yet.
#[test]
fn on_a_full_disk_it_is_served_no_more_either() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    go_on_without_it(&world);
    world.disk.set_full(true);
    assert!(life.timelines.look_at_decision(key(1)).is_err());
    assert!(is_refused(&life) && world.latch.reason().is_none());
    drop(life);
    world.disk.lose_power();
    world.disk.set_full(false);
    let life = world.open();
    assert!(!is_refused(&life), "nothing says so here");
    assert!(life.timelines.look_at_decision(key(1)).is_err());
    assert!(is_refused(&life));
    drop(life);
    assert!(is_refused(&world.open()));
}

/// A compute that knows of nobody else hears there who the members are, and where.
#[test]
fn who_comes_to_it_hears_where_the_members_are() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    go_on_without_it(&world);
    let greeting = Greeting {
        parameters: nth(1),
        known: 0,
        addresses: Vec::new(),
        proposer: ProposerId([1; 16]),
    };
    assert!(life.timelines.look_at_decision(key(1)).is_err());
    for life in [life, world.open()] {
        let greeted = life.timelines.greet(&greeting);
        let Ok(Greeted::Elsewhere(members, _)) = greeted else { panic!("it is greeted") };
        assert_eq!(*members, Configuration::new(2, vec![TWO]).unwrap());
        assert!(is_refused(&life));
    }
}

/// What it had is in object storage only: nothing is fetched for nobody, and it does not count as resting.
#[test]
fn what_is_away_is_not_brought_back() {
    for has_list in [true, false] {
        let mut world = World::new(1);
        let life = world.open();
        life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
        world.archive_tail(&life.get(1).unwrap());
        assert!(life.rest_as_it_is(1));
        assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
        drop(life);
        note_kept(&world.disk, &directory(1), &world.latch).unwrap();
        if !has_list {
            world.disk.remove(&Path::new(DIRECTORY).join("resting")).unwrap();
        }
        let life = world.open();
        assert_eq!(life.timelines.damaged().len(), usize::from(!has_list));
        for _ in 0..2 {
            assert!(is_refused(&life));
        }
        assert_eq!(life.timelines.damaged().len(), 1);
        let names = world.disk.list(&directory(1)).unwrap();
        assert!(!names.iter().any(|name| name.len() == 24), "{names:?}");
    }
}

/// It is found to be damaged before it has heard: it is for people only from then on, and nobody tries to mend it.
#[test]
fn it_is_not_mended() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    go_on_without_it(&world);
    life.timelines.take_out(&life.get(1).unwrap(), "somebody says so");
    assert_eq!(life.timelines.mending(), [key(1)]);
    let nobody = |_: &Damaged<'_>| unreachable!("nobody is asked");
    let why = attempt(&life.timelines, key(1), nobody).unwrap_err();
    assert!(why.contains("only with a new directory"), "{why}");
    assert!(is_refused(&life) && life.timelines.mending().is_empty());
    assert!(world.disk.list(&directory(1)).unwrap().contains(&KEEP.to_owned()));
    drop(life);
    assert!(is_refused(&world.open()));
}

fn why_not_followed(life: &Life) -> Option<String> {
    life.timelines.get_to_follow(key(1)).err().map(|reason| reason.to_string())
}

/// It was started just now, and nobody has told it: whoever wants its log finds that out, and not what it has.
#[test]
fn who_follows_its_log_finds_out_before_it_has_heard() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    assert_eq!(why_not_followed(&life), None);
    go_on_without_it(&world);
    drop(life);
    let life = world.open();
    assert!(!is_refused(&life), "nothing says so here");
    let why = why_not_followed(&life).unwrap();
    assert!(why.contains("went on without this safekeeper"), "{why}");
    assert!(is_refused(&life) && why_not_followed(&life).is_some());
}

/// While object storage is away whoever was a member when it was looked at last is followed, and nobody else.
#[test]
fn while_object_storage_is_away_who_was_not_looked_at_is_not_followed() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    assert_eq!(why_not_followed(&life), None);
    let (here, away) = (world.objects.path().to_owned(), tempfile::tempdir().unwrap());
    // An empty directory is in its place.
    std::fs::rename(&here, away.path().join("objects")).unwrap();
    std::fs::create_dir(&here).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(why_not_followed(&life), None);
    drop(life);
    let life = world.open();
    let why = why_not_followed(&life).unwrap();
    assert!(why.contains("is not in object storage"), "{why}");
    std::fs::remove_dir_all(&here).unwrap();
    std::fs::rename(away.path().join("objects"), &here).unwrap();
    assert_eq!(why_not_followed(&life), None);
}

/// Who goes on had archived more than others will believe: by the number of before, as those may have who were given up.
#[test]
fn what_was_archived_before_it_heard_who_was_given_up_is_archived_anew() {
    let mut world = World::new(1);
    let life = world.open();
    let end = life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    let timeline = life.get(1).unwrap();
    let before = timeline.configuration_number();
    timeline.note_archived(end);
    decide(&world, |decided| {
        let chain = decided.chain.recovered(OWN, vec![OWN]).unwrap();
        let number = chain.newest().number();
        let point = GivenUp { number, lsn: START, last_record: None };
        Quorum { chain, given_up: decided.given_up.with(point), ..decided }
    });
    life.timelines.look_at_decision(key(1)).unwrap();
    assert!(timeline.configuration_number() > before);
    assert_eq!(timeline.marks().archived_lsn, START);
    // A turn that began before says so only now.
    timeline.note_archived_as(end, before);
    assert_eq!(timeline.marks().archived_lsn, START);
    drop(timeline);
    drop(life);
    world.disk.lose_power();
    let timeline = world.open().get(1).unwrap();
    assert_eq!(timeline.marks().archived_lsn, START);
    timeline.note_archived(end);
    assert_eq!(timeline.marks().archived_lsn, end);
}

/// A full disk, and the same again once there is space: what was lowered is written down before the members are.
#[test]
fn it_is_archived_anew_after_a_full_disk_too() {
    let mut world = World::new(1);
    let life = world.open();
    let end = life.found(1).commit(&life.get(1).unwrap(), 1000).unwrap();
    let timeline = life.get(1).unwrap();
    let number = timeline.configuration_number();
    timeline.note_archived(end);
    timeline.checkpoint().unwrap();
    world.disk.set_full(true);
    assert!(timeline.archive_anew(START, number).is_err());
    world.disk.set_full(false);
    timeline.archive_anew(START, number).unwrap();
    drop(timeline);
    drop(life);
    world.disk.lose_power();
    assert_eq!(world.open().get(1).unwrap().marks().archived_lsn, START);
}
