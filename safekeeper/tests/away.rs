//! Timelines of which nothing is here but what they promised: their WAL goes, comes back, and goes for good; and what of the archive
//! is believed then.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::lives::{DIRECTORY, Life, OWN, START, World, directory, key, nth};
use pgstrata_env::Disk;
use pgstrata_format::quorum::{AllGivenUp, GivenUp, Quorum};
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_quorum::TermHistory;
use pgstrata_quorum::{Configuration, ProposerId};
use pgstrata_safekeeper::archive::Tail;
use pgstrata_safekeeper::background::archiving::turn::{Around, Due, GivenUpRead, State, advance};
use pgstrata_safekeeper::chain_reader::Ancestors;
use pgstrata_safekeeper::timeline::Timeline;
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_wire::broker::TimelineProgress;
use pgstrata_wire::safekeeper::{Greeting, RefusedReason};

/// Segments of timeline `n` on the disk.
fn segments(world: &World, n: u8) -> Vec<String> {
    let names = world.disk.list(&directory(n)).unwrap();
    names.into_iter().filter(|name| name.len() == 24).collect()
}

/// What timeline `n` serves as committed.
fn served(life: &Life, n: u8, to: Lsn) -> Vec<u8> {
    let timeline = life.get(n).unwrap();
    assert!(timeline.commit_lsn() >= to, "{}", timeline.commit_lsn());
    let mut reading = timeline.read_range(START, to, Term(0)).unwrap();
    let mut bytes = vec![0; (to - START) as usize];
    let mut done = 0;
    while done < bytes.len() {
        done += reading.next(&mut bytes[done..]).unwrap();
    }
    bytes
}

#[test]
fn what_is_archived_goes_from_the_disk_and_comes_back_when_it_is_needed() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let end = log.commit(&timeline, 100_000).unwrap();
    let before = served(&life, 1, end);
    drop(timeline);
    // Not before it rests, nor before all of it is archived.
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    world.archive_tail(&life.get(1).unwrap());
    assert!(life.rest_as_it_is(1));
    assert_eq!(segments(&world, 1).len(), 1);
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
    assert_eq!(segments(&world, 1).len(), 0);
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    assert!(life.timelines.is_away(key(1)));
    let overview = &life.timelines.overviews()[0];
    assert_eq!((overview.size_bytes(), overview.summary.flush_lsn), (0, end));
    drop(life);
    world.disk.lose_power();

    // Nothing is fetched at a start; whether or not there is a list of what rests.
    for has_list in [true, false] {
        if !has_list {
            let list = Path::new(DIRECTORY).join("resting");
            world.disk.remove(&list).unwrap();
            world.disk.sync_directory(Path::new(DIRECTORY)).unwrap();
        }
        let life = world.open();
        assert!(!life.is_open(1) && life.timelines.is_away(key(1)));
        assert_eq!(segments(&world, 1), [""; 0], "{has_list} {:?}", world.disk.list(&directory(1)));
        let overview = &life.timelines.overviews()[0];
        assert_eq!(overview.summary.commit_lsn, end);
        assert_eq!(overview.summary.flush_lsn, end);
    }
    let life = world.open();
    assert!(served(&life, 1, end) == before);
    assert_eq!(segments(&world, 1).len(), 1);
    let timeline = life.get(1).unwrap();
    assert_eq!((timeline.flush_lsn(), timeline.term()), (end, Term(1)));
    let after = log.commit(&timeline, 500).unwrap();
    drop((timeline, life));
    world.disk.lose_power();
    let life = world.open();
    assert_eq!(life.get(1).unwrap().flush_lsn(), after);
    assert!(served(&life, 1, end) == before);
}

/// Stops at each operation while WAL goes from the disk, and while it comes back.
#[test]
fn wherever_it_stops_while_wal_goes_or_comes_back_all_of_it_is_there_then() {
    for comes_back in [false, true] {
        let mut whole = 0;
        for operations in 0..30 {
            for seed in 0..2 {
                let what = format!("back {comes_back}, {operations} operations, seed {seed}");
                let mut world = World::new(seed);
                let life = world.open();
                let mut log = life.found(1);
                let end = log.commit(&life.get(1).unwrap(), 20_000).unwrap();
                let before = served(&life, 1, end);
                world.archive_tail(&life.get(1).unwrap());
                assert!(life.rest_as_it_is(1));
                if comes_back {
                    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
                    world.disk.stop_after(operations);
                    whole += usize::from(life.get(1).is_ok());
                } else {
                    world.disk.stop_after(operations);
                    whole += usize::from(life.timelines.send_away(&[key(1)]).is_ok());
                }
                drop(life);
                world.disk.lose_power();
                let life = world.open();
                let timeline = life.get(1).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(timeline.flush_lsn(), end, "{what}");
                assert!(served(&life, 1, end) == before, "{what}");
                let next = log.commit(&timeline, 700).unwrap();
                drop((timeline, life));
                world.disk.lose_power();
                let life = world.open();
                assert_eq!(life.get(1).unwrap().flush_lsn(), next, "{what}");
            }
        }
        assert!((5..50).contains(&whole), "{comes_back}: {whole}");
    }
}

#[test]
fn what_can_not_be_fetched_is_waited_for_and_what_is_gone_is_asked_for() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let end = log.commit(&life.get(1).unwrap(), 20_000).unwrap();
    world.archive_tail(&life.get(1).unwrap());
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
    let parameters = nth(1);
    let of = format!("tenants/{}/timelines/{}/wal/tail", parameters.tenant, parameters.timeline);
    let tails = world.objects.path().join(of);
    let tail = std::fs::read_dir(&tails).unwrap().next().unwrap().unwrap().path();

    // Object storage that can't be read.
    let aside = tails.with_extension("aside");
    std::fs::rename(&tails, &aside).unwrap();
    std::fs::write(&tails, "no directory").unwrap();
    let refused = life.get(1).unwrap_err();
    assert!(
        matches!(&refused, RefusedReason::Unavailable(why) if why.contains("object storage")),
        "{refused}"
    );
    assert!(life.timelines.damaged().is_empty() && life.timelines.is_away(key(1)));
    std::fs::remove_file(&tails).unwrap();
    std::fs::rename(&aside, &tails).unwrap();
    assert_eq!(life.get(1).unwrap().flush_lsn(), end);
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);

    // What is there is not what was: it has to come from other members then, or from there again.
    let mut bytes = std::fs::read(&tail).unwrap();
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    std::fs::write(&tail, &bytes).unwrap();
    assert!(life.get(1).is_err());
    assert_eq!(life.timelines.mending(), [key(1)]);
    drop(life);
    world.disk.lose_power();
    let life = world.open();
    assert!(life.get(1).is_err());
    assert_eq!(life.timelines.mending(), [key(1)]);
    assert!(world.latch.reason().is_none());
}

/// One that may lack everything is not taken for one of which all is in object storage: it asks for what others have.
#[test]
fn what_was_never_written_to_is_not_away() {
    let mut world = World::new(1);
    let life = world.open();
    life.found(1);
    assert!(life.rest_as_it_is(1));
    assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 0);
    assert!(!life.timelines.is_away(key(1)));
    assert!(!world.disk.list(&directory(1)).unwrap().contains(&"away".to_owned()));
    assert!(life.get(1).is_ok());
}

/// A timeline whose control file has rotted is damaged, before or after its WAL went; the safekeeper goes on with the others.
#[test]
fn a_control_file_that_rots_ends_nothing_but_its_timeline() {
    for is_away in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            world.archive_tail(&life.get(log.n).unwrap());
            assert!(life.rest_as_it_is(log.n));
        }
        if is_away {
            assert_eq!(life.timelines.send_away(&[key(1)]).unwrap(), 1);
        }
        world.disk.rot(&directory(1).join("control"), 60).unwrap();
        assert_eq!(life.timelines.send_away(&[key(1), key(2)]).unwrap(), 1);
        assert!(matches!(life.get(1), Err(RefusedReason::Storage(_))));
        assert_eq!(life.timelines.damaged().len(), 1);
        assert!(life.get(2).is_ok());
        assert_eq!(world.latch.reason(), None);
    }
}

#[test]
fn tails_are_removed_when_more_is_archived() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let archive = world.archive();
    let parameters = nth(1);
    let mut ends = Vec::new();
    for _ in 0..3 {
        ends.push(log.commit(&timeline, 3000).unwrap());
        world.archive_tail(&timeline);
    }
    let newest = |world: &World| {
        world.runtime.block_on(archive.newest(&parameters, &AllGivenUp::default())).unwrap()
    };
    let extent = newest(&world).unwrap();
    assert_eq!((extent.from, extent.boundary), (START, ends[2]));
    assert_eq!(extent.history, timeline.history());
    let tail = |end: Lsn| timeline.read_tail(end, 1).unwrap();
    for (drop_to, left) in [(ends[1], [false, true, true]), (ends[2], [false, false, true])] {
        world.runtime.block_on(archive.drop_tails(&parameters, drop_to, 1)).unwrap();
        for (end, is_left) in ends.iter().zip(left) {
            let tail = tail(*end);
            let found = world.runtime.block_on(archive.holds_tail(&parameters, &tail));
            assert_eq!(found, Ok(is_left), "{end}");
        }
    }
    // It counts from the begin of the segment.
    let part = world
        .runtime
        .block_on(archive.part(&parameters, 1, ends[2], &AllGivenUp::default()))
        .unwrap()
        .unwrap();
    assert_eq!((part.0, part.1.len() as u64), (START, ends[2] - START));
    // One that says something else than what is committed is never replaced.
    let mut other = tail(ends[2]);
    Arc::make_mut(&mut other.bytes)[500] ^= 1;
    let error = world.runtime.block_on(archive.put_tail(&parameters, &other)).unwrap_err();
    assert!(error.contains("differs"), "{error}");
}

/// Writes into the timeline's object that its branch was deleted.
fn decide_deleted(world: &World, n: u8) {
    let name = Quorum::object_name(key(n).0, key(n).1);
    let path = world.objects.path().join(name);
    let quorum = Quorum::decode(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, Quorum { is_deleted: true, ..quorum }.encode()).unwrap();
}

#[test]
fn what_was_deleted_goes_and_never_comes_back() {
    for rests in [false, true] {
        let mut world = World::new(1);
        let life = world.open();
        let mut logs = [life.found(1), life.found(2)];
        for log in &mut logs {
            log.commit(&life.get(log.n).unwrap(), 1000).unwrap();
            world.archive_tail(&life.get(log.n).unwrap());
        }
        assert!(!rests || life.rest_as_it_is(1));
        assert_eq!(life.timelines.look_at_decision(key(1)), Ok(()));
        assert!(life.get(1).is_ok());
        assert!(!rests || life.rest_as_it_is(1));
        decide_deleted(&world, 1);
        assert_eq!(life.timelines.look_at_decision(key(1)), Ok(()));
        assert!(world.disk.list(&directory(1)).is_err());
        assert!(life.timelines.keys() == [key(2)] && life.timelines.damaged().is_empty());
        let archived = |n| {
            world.runtime.block_on(world.archive().newest(&nth(n), &AllGivenUp::default())).unwrap()
        };
        assert!(archived(1).is_none() && archived(2).is_some());
        // Whoever comes for it is told, and it is not begun anew.
        let greeting = Greeting {
            parameters: nth(1),
            known: 0,
            addresses: Vec::new(),
            proposer: ProposerId([2; 16]),
        };
        let refused = life.timelines.greet(&greeting).unwrap_err().to_string();
        assert!(refused.contains("was deleted"), "{refused}");
        let refused = life.timelines.found(&greeting, &[(OWN.node, Some(OWN.incarnation))]);
        assert!(refused.unwrap_err().to_string().contains("was deleted"));
        assert_eq!(life.timelines.heard_of(key(1), 1).unwrap_err().to_string(), refused_text());
        drop(life);
        world.disk.lose_power();
        let life = world.open();
        assert!(life.timelines.keys() == [key(2)] && life.timelines.damaged().is_empty());
        assert!(life.get(2).is_ok());
    }
}

fn refused_text() -> String {
    RefusedReason::Mismatch(format!("timeline {} was deleted with its branch", key(1).1))
        .to_string()
}

/// Stops at each operation while what was deleted goes: it does not come to be damaged by that, and goes then.
#[test]
fn wherever_it_stops_while_what_was_deleted_goes_it_goes_in_the_end() {
    for operations in 0..8 {
        for seed in 0..4 {
            let mut world = World::new(seed);
            let life = world.open();
            let mut log = life.found(1);
            log.commit(&life.get(1).unwrap(), 1000).unwrap();
            decide_deleted(&world, 1);
            world.disk.stop_after(operations);
            let _ = life.timelines.look_at_decision(key(1));
            drop(life);
            world.disk.lose_power();
            let life = world.open();
            let what = format!("{operations} operations, seed {seed}");
            if !life.timelines.damaged().is_empty() {
                // The list of timelines still has it, and its directory is gone.
                panic!("{what}: {:?}", life.timelines.damaged());
            }
            life.timelines.look_at_decision(key(1)).unwrap();
            assert!(life.timelines.keys().is_empty(), "{what}");
            assert!(world.disk.list(&directory(1)).is_err(), "{what}");
        }
    }
}

/// Members were given up at `ends[1]`, and one of them is there after all: what it archives then is not believed, and it
/// takes nothing away.
#[test]
fn what_is_archived_by_who_was_given_up_is_not_of_the_log_that_goes_on() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let archive = world.archive();
    let parameters = nth(1);
    let ends: Vec<Lsn> = (0..4).map(|_| log.commit(&timeline, 3000).unwrap()).collect();
    let tail = |end: Lsn, configuration: u64| timeline.read_tail(end, configuration).unwrap();
    let put = |tail: &Tail| world.runtime.block_on(archive.put_tail(&parameters, tail)).unwrap();
    let last_record = tail(ends[1], 1).extent.last_record;
    let given_up = AllGivenUp::default().with(GivenUp { number: 2, lsn: ends[1], last_record });
    let newest = || world.runtime.block_on(archive.newest(&parameters, &given_up)).unwrap();
    let part = |to: Lsn| {
        let part = archive.part(&parameters, 1, to, &given_up);
        world.runtime.block_on(part).unwrap().unwrap()
    };
    // Up to there it is right, whoever archived it.
    put(&tail(ends[1], 1));
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    put(&tail(ends[3], 1));
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    let drop_tails = |to: Lsn, configuration: u64| {
        let dropped = archive.drop_tails(&parameters, to, configuration);
        world.runtime.block_on(dropped).unwrap();
    };
    drop_tails(ends[3], 1);
    assert_eq!(newest(), Some(tail(ends[1], 1).extent));
    let (from, bytes) = part(ends[1]);
    assert_eq!((from, bytes.len() as u64), (START, ends[1] - START));
    assert_eq!(part(ends[2]).1.len() as u64, ends[1] - START);
    // The log goes on, and is archived; that stays.
    put(&tail(ends[2], 2));
    assert_eq!(newest(), Some(tail(ends[2], 2).extent));
    assert_eq!(part(ends[2]).1.len() as u64, ends[2] - START);
    drop_tails(ends[3], 1);
    assert_eq!(newest(), Some(tail(ends[2], 2).extent));
    // What is right, and said by who was given up, is said again.
    let replaced = |tail: &Tail| {
        let replaced = archive.replace_tail_given_up(&parameters, tail, &given_up);
        world.runtime.block_on(replaced).unwrap()
    };
    let of_before = archive.is_tail_of_before(&parameters, ends[3], 2);
    assert_eq!(world.runtime.block_on(of_before), Ok(true));
    assert!(!replaced(&tail(ends[3], 1)) && replaced(&tail(ends[3], 2)));
    assert!(!replaced(&tail(ends[3], 2)));
    assert_eq!(newest(), Some(tail(ends[3], 2).extent));
    drop_tails(ends[3], 2);
    assert_eq!(newest(), Some(tail(ends[3], 2).extent));
}

/// Members were given up twice. What of the archive both logs share goes as far as the later one says, whichever object says so.
#[test]
fn what_goes_furthest_of_what_is_shared_counts() {
    for (one, two) in [(1, 2), (2, 1)] {
        let mut world = World::new(1);
        let life = world.open();
        let mut log = life.found(1);
        let timeline = life.get(1).unwrap();
        let ends: Vec<Lsn> = (0..4).map(|_| log.commit(&timeline, 3000).unwrap()).collect();
        for (end, configuration) in [(ends[2], one), (ends[3], two)] {
            let tail = timeline.read_tail(end, configuration).unwrap();
            world.runtime.block_on(world.archive().put_tail(&nth(1), &tail)).unwrap();
        }
        let given_up = AllGivenUp::default()
            .with(GivenUp { number: 2, lsn: ends[0], last_record: None })
            .with(GivenUp { number: 3, lsn: ends[1], last_record: None });
        let newest = world.runtime.block_on(world.archive().newest(&nth(1), &given_up));
        assert_eq!(newest.unwrap().unwrap().boundary, ends[1], "{one} {two}");
    }
}

/// What a safekeeper's turn at archiving is taken in here: it hears in the middle of it that others went on without it.
#[derive(Debug)]
struct GivenUpMeanwhile {
    timeline: Arc<Timeline>,
    since: Instant,
}

impl Around for GivenUpMeanwhile {
    fn own(&self) -> NodeId {
        OWN.node
    }

    fn now(&self) -> Instant {
        self.since + Duration::from_secs(60)
    }

    fn tail_after(&self) -> Duration {
        Duration::ZERO
    }

    fn progress(&self, _: NodeId, _: TimelineKey) -> Option<TimelineProgress> {
        None
    }

    fn claimed(&self, _: TimelineKey) -> Lsn {
        let two = Member { node: NodeId(2), incarnation: Incarnation([2; 16]) };
        self.timeline.configure(&Configuration::new(2, vec![two]).unwrap()).unwrap();
        Lsn::INVALID
    }

    fn ancestors(&self) -> Arc<dyn Ancestors> {
        unreachable!("a tail has none")
    }

    fn given_up(&self, _: TimelineKey) -> GivenUpRead {
        Box::pin(async { Ok(AllGivenUp::default()) })
    }
}

#[test]
fn who_is_given_up_in_the_middle_of_its_turn_archives_nothing_more() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let (some, end) = (log.commit(&timeline, 3000).unwrap(), log.commit(&timeline, 3000).unwrap());
    // What others have archived since they went on.
    let theirs = timeline.read_tail(some, 2).unwrap();
    let archive = Arc::new(world.archive());
    world.runtime.block_on(archive.put_tail(&nth(1), &theirs)).unwrap();
    let since = Instant::now();
    let around = GivenUpMeanwhile { timeline: Arc::clone(&timeline), since };
    let mut state = State::new(since);
    state.look(&timeline, &around);
    assert_eq!(state.due(), Some(Due::Tail(end)));
    let turn = advance(&around, &archive, &timeline, &mut state);
    assert!(!world.runtime.block_on(turn).unwrap());
    let newest = world.runtime.block_on(archive.newest(&nth(1), &AllGivenUp::default()));
    assert_eq!(newest, Ok(Some(theirs.extent)));
}

/// Of a deleted branch nothing stays in object storage either if all that have it found it damaged.
#[test]
fn what_was_deleted_goes_from_the_archive_though_it_is_damaged_here() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    log.commit(&life.get(1).unwrap(), 1000).unwrap();
    world.archive_tail(&life.get(1).unwrap());
    assert!(life.rest_as_it_is(1));
    // What is left of what was removed before, and something else of that name.
    for left in ["left", "0.left"] {
        world.disk.create_directory(&directory(1).with_extension(left)).unwrap();
        world.disk.create(&directory(1).with_extension(left).join("file")).unwrap();
    }
    let segment = directory(1).join(nth(1).segment_name(1));
    world.disk.rot(&segment, 300).unwrap();
    assert!(life.get(1).is_err());
    assert_eq!(life.timelines.mending(), [key(1)]);
    decide_deleted(&world, 1);
    let decided = world.decisions().read(key(1)).unwrap().unwrap();
    life.timelines.delete_damaged(&decided).unwrap();
    assert!(life.timelines.keys().is_empty() && world.disk.list(&directory(1)).is_err());
    assert_eq!(world.latch.reason(), None);
    let newest = world.runtime.block_on(world.archive().newest(&nth(1), &AllGivenUp::default()));
    assert_eq!(newest, Ok(None));
}

/// Before what is shared with those who were given up there may be an object that does not say what log it is of: nothing in it goes
/// further, and it keeps nobody from going on with what is there.
#[test]
fn what_says_nothing_of_itself_does_not_hide_what_goes_further() {
    let mut world = World::new(1);
    let life = world.open();
    let mut log = life.found(1);
    let timeline = life.get(1).unwrap();
    let ends: Vec<Lsn> = (0..3).map(|_| log.commit(&timeline, 3000).unwrap()).collect();
    let mut older = timeline.read_tail(ends[0], 1).unwrap();
    older.extent.history = TermHistory::default();
    for tail in [older, timeline.read_tail(ends[2], 1).unwrap()] {
        world.runtime.block_on(world.archive().put_tail(&nth(1), &tail)).unwrap();
    }
    let newest = |given_up: &AllGivenUp| {
        let newest = world.runtime.block_on(world.archive().newest(&nth(1), given_up));
        newest.map(|extent| extent.unwrap().boundary).map_err(|error| error.to_string())
    };
    assert_eq!(newest(&AllGivenUp::default()), Ok(ends[2]));
    let point = |lsn| AllGivenUp::default().with(GivenUp { number: 2, lsn, last_record: None });
    assert_eq!(newest(&point(ends[1])), Ok(ends[1]));
    assert_eq!(newest(&point(ends[0])), Ok(ends[0]));
    // Nothing is shared that is known to be.
    assert!(newest(&point(START)).is_err());
}
