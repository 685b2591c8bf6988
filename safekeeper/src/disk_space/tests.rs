use std::sync::Arc;

use pgstrata_sim::FaultyDisk;
use proptest::prelude::*;

use super::*;

fn given(warn: Option<u64>, slow: Option<u64>, refuse: Option<u64>) -> DiskArguments {
    DiskArguments { disk_warn: warn, disk_slow: slow, disk_refuse: refuse }
}

fn bounds(warn: u64, slow: u64, refuse: u64) -> Bounds {
    Bounds { warn, slow, refuse }
}

#[test]
fn bounds_that_are_not_given_are_parts_of_the_disk_and_not_much() {
    let none = DiskArguments::default();
    for (total, expected) in [
        // Of 100 MiB all but two can be used.
        (100 * MIB, bounds(10 * MIB, 5 * MIB, 2 * MIB)),
        (20 * GIB, bounds(2 * GIB, GIB, GIB * 2 / 5)),
        (10 * TIB, bounds(16 * GIB, 4 * GIB, GIB)),
        (0, bounds(0, 0, 0)),
    ] {
        let mut found = Bounds::new(&none, total);
        // What a hundredth loses by rounding.
        for (bound, exact) in [
            (&mut found.warn, expected.warn),
            (&mut found.slow, expected.slow),
            (&mut found.refuse, expected.refuse),
        ] {
            assert!(exact - *bound < 1000, "{bound} is not {exact}");
            *bound = exact;
        }
        assert_eq!(found, expected);
    }
    // Those that are given hold, and the others make room for them.
    for (given, expected) in [
        (given(None, None, Some(20 * GIB)), bounds(80 * GIB, 40 * GIB, 20 * GIB)),
        (given(None, Some(GIB), None), bounds(16 * GIB, GIB, GIB / 2)),
        (given(Some(GIB), None, None), bounds(GIB, GIB / 2, GIB / 4)),
        (given(Some(GIB), None, Some(GIB)), bounds(GIB, GIB, GIB)),
        (given(Some(0), Some(0), Some(0)), bounds(0, 0, 0)),
        (given(None, None, Some(0)), bounds(16 * GIB, 4 * GIB, 0)),
    ] {
        assert!(given.check().is_ok(), "{given:?}");
        assert_eq!(Bounds::new(&given, 10 * TIB), expected, "{given:?}");
    }
}

#[test]
fn bounds_in_no_order_are_refused_with_what_to_do() {
    for (given, expected) in [
        (given(Some(MIB), Some(GIB), None), "--disk-warn is 1.0 MiB, and --disk-slow 1.0 GiB"),
        (given(None, Some(MIB), Some(GIB)), "--disk-slow is 1.0 MiB, and --disk-refuse 1.0 GiB"),
        (given(Some(MIB), Some(0), Some(GIB)), "--disk-warn is 1.0 MiB, and --disk-refuse 1.0 GiB"),
    ] {
        let text = given.check().unwrap_err().to_string();
        assert!(text.starts_with(expected), "{text}");
    }
}

#[test]
fn a_size_is_a_number_with_its_unit() {
    for (text, bytes) in
        [("0", 0), ("64KiB", 64 * KIB), ("512MiB", 512 * MIB), ("20 GiB", 20 * GIB), ("1TiB", TIB)]
    {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
    for text in ["", "1", "20G", "20GB", "-1GiB", "1.5GiB", "GiB", "99999999999TiB", "10%"] {
        assert!(parse_size(text).unwrap_err().contains("such as 20GiB"), "{text}");
    }
    assert_eq!([size(0), size(100 * KIB), size(3 * GIB / 2)], ["0.0 KiB", "100.0 KiB", "1.5 GiB"]);
}

#[test]
fn a_state_is_entered_below_its_bound_and_left_a_quarter_above_it() {
    use DiskState::{Fine, Refuses, Slows, Warns};
    let bounds = bounds(1000, 400, 100);
    for (free, before, after) in [
        (1000, Fine, Fine),
        (999, Fine, Warns),
        (399, Fine, Slows),
        (0, Fine, Refuses),
        (1249, Warns, Warns),
        (1250, Warns, Fine),
        (499, Slows, Slows),
        (500, Slows, Warns),
        (124, Refuses, Refuses),
        (125, Refuses, Slows),
        (499, Refuses, Slows),
        (500, Refuses, Warns),
        (5000, Refuses, Fine),
    ] {
        assert_eq!(bounds.next(free, before), after, "{free} after {before:?}");
    }
}

fn bound_of(bounds: &Bounds, state: DiskState) -> u64 {
    match state {
        DiskState::Fine => u64::MAX,
        DiskState::Warns => bounds.warn,
        DiskState::Slows => bounds.slow,
        DiskState::Refuses => bounds.refuse,
    }
}

proptest! {
    #[test]
    fn a_state_does_not_flap(
        given in prop::array::uniform3(0..10_000u64),
        free in prop::collection::vec(0..15_000u64, 1..100),
    ) {
        let mut given = given;
        given.sort_unstable();
        let bounds = bounds(given[2], given[1], given[0]);
        let mut state = DiskState::Fine;
        for free in free {
            let next = bounds.next(free, state);
            // It gets worse below the bound of what it is then, and better a quarter above that of what it was.
            if next > state {
                prop_assert!(free < bound_of(&bounds, next));
            } else if next < state {
                prop_assert!(free >= raised(bound_of(&bounds, state)));
            }
            // Never better than the bounds say, and looking again changes nothing.
            prop_assert!(next >= bounds.state(free));
            prop_assert_eq!(bounds.next(free, next), next);
            state = next;
        }
    }

    #[test]
    fn what_is_free_may_go_up_and_down_by_less_than_a_quarter(
        bound in 100..10_000u64,
        ways in prop::collection::vec(0.0..1.0f64, 1..100),
    ) {
        let bounds = bounds(bound, 0, 0);
        let mut changes = 0;
        let mut state = DiskState::Fine;
        for way in ways {
            // Anywhere from a little below the bound to where it would be left.
            let low = bound - bound / 10;
            let free = low + ((raised(bound) - 1 - low) as f64 * way) as u64;
            let next = bounds.next(free, state);
            changes += u32::from(next != state);
            state = next;
        }
        prop_assert!(changes <= 1, "it changed {changes} times");
    }

    #[test]
    fn a_pause_grows_as_space_shrinks_and_is_never_long(
        given in prop::array::uniform2(0..10_000u64), less in 0..10_000u64, more in 0..10_000u64,
    ) {
        let bounds = bounds(20_000, given[0].max(given[1]), given[0].min(given[1]));
        let (less, more) = (less.min(more), less.max(more));
        prop_assert!(bounds.pause(less) >= bounds.pause(more));
        prop_assert!(bounds.pause(less) <= LONGEST_PAUSE);
        prop_assert!(bounds.pause(more) > Duration::ZERO);
    }
}

struct World {
    directory: tempfile::TempDir,
    disk: FaultyDisk,
}

impl World {
    fn new(total: u64) -> World {
        let world = World { directory: tempfile::tempdir().unwrap(), disk: FaultyDisk::default() };
        world.disk.resize(total);
        world
    }

    fn space(&self, given: DiskArguments) -> DiskSpace {
        DiskSpace::new(Arc::new(self.disk.clone()), self.directory.path(), given)
    }

    /// So many bytes are in use.
    fn uses(&self, bytes: u64) {
        let file = std::fs::File::create(self.directory.path().join("ballast")).unwrap();
        file.set_len(bytes).unwrap();
    }
}

const SMALL: DiskArguments = DiskArguments {
    disk_warn: Some(40 * MIB),
    disk_slow: Some(20 * MIB),
    disk_refuse: Some(10 * MIB),
};

#[test]
fn a_segment_that_would_take_what_is_kept_is_not_made() {
    let world = World::new(100 * MIB);
    let space = world.space(SMALL);
    let path = world.directory.path();
    world.uses(75 * MIB);
    space.check_room(15 * MIB, path).unwrap();
    let refused = space.check_room(16 * MIB, path).unwrap_err();
    assert!(matches!(refused, StorageError::DiskFull { kept_bytes: 1.., .. }), "{refused}");
    assert!(refused.to_string().contains("beside the last 10.0 MiB"), "{refused}");
    // It is shown, and what fits the segments that are there is taken; slowly.
    assert_eq!(space.last().state(), DiskState::Refuses);
    assert!(space.warning().unwrap().contains("doesn't fit the segments"), "{:?}", space.warning());
    space.check(path).unwrap();
    // A smaller one of another timeline fits, and changes nothing for the other.
    space.check_room(MIB, path).unwrap();
    assert_eq!(space.last().state(), DiskState::Refuses);
    // Just enough for it: it is made, if it is asked for.
    world.uses(74 * MIB);
    space.look();
    assert_eq!(space.last().state(), DiskState::Refuses);
    space.check_room(16 * MIB, path).unwrap();
    assert_eq!(space.last().state(), DiskState::Warns);
    // Or there is so much that it isn't wanted to be asked for.
    space.check_room(17 * MIB, path).unwrap_err();
    world.uses(50 * MIB);
    space.look();
    assert_eq!(space.last().state(), DiskState::Fine);
    assert_eq!(space.warning(), None);
}

#[test]
fn new_wal_is_refused_below_the_last_bound_with_the_same_words_each_time() {
    let world = World::new(100 * MIB);
    let space = world.space(SMALL);
    let path = world.directory.path();
    world.uses(91 * MIB);
    space.check(path).unwrap();
    space.look();
    let first = space.check(path).unwrap_err().to_string();
    world.uses(95 * MIB);
    space.look();
    assert_eq!(space.check(path).unwrap_err().to_string(), first);
    assert!(first.contains("free space on this disk"), "{first}");
    world.uses(88 * MIB);
    space.look();
    space.check(path).unwrap_err();
    world.uses(80 * MIB);
    space.look();
    space.check(path).unwrap();
}

#[test]
fn batches_wait_by_their_size_and_only_when_there_is_little() {
    let world = World::new(100 * MIB);
    let space = world.space(SMALL);
    space.pause(MIB);
    assert_eq!(space.paused(), Duration::ZERO);
    world.uses(90 * MIB);
    space.look();
    assert_eq!(space.last().state(), DiskState::Slows);
    let began = std::time::Instant::now();
    space.pause(MIB);
    assert!(began.elapsed() >= LONGEST_PAUSE);
    assert_eq!(space.paused(), LONGEST_PAUSE);
    space.pause(100);
    assert_eq!(space.paused(), LONGEST_PAUSE * 17 / 16);
}

#[test]
fn where_nothing_is_known_or_to_be_kept_nothing_is_refused() {
    // A file system that says nothing of itself.
    let world = World::new(0);
    let space = world.space(SMALL);
    let path = world.directory.path();
    assert_eq!(space.last().state(), DiskState::Fine);
    space.check(path).unwrap();
    space.check_room(16 * MIB, path).unwrap();
    // Nothing is to be kept: the system's word counts.
    world.disk.resize(MIB);
    let space = world.space(given(None, None, Some(0)));
    space.check(path).unwrap();
    space.check_room(16 * MIB, path).unwrap();
    // One that can't be asked.
    let gone = world.directory.path().join("gone");
    let space = DiskSpace::new(Arc::new(pgstrata_env::RealDisk), &gone, SMALL);
    assert_eq!((space.last().at, space.last().state()), (None, DiskState::Fine));
    space.check_room(16 * MIB, path).unwrap();
}

#[test]
fn a_warning_says_what_comes_next_as_far_as_it_comes() {
    let world = World::new(100 * MIB);
    world.uses(95 * MIB);
    let warns = |given: DiskArguments| world.space(given).warning().unwrap();
    let text = warns(given(Some(40 * MIB), Some(4 * MIB), Some(2 * MIB)));
    let next = "that is little, and WAL is taken more slowly below 4.0 MiB, and WAL is refused below 2.0 MiB. Free";
    assert!(
        text.starts_with("5.0 MiB of 100.0 MiB are free on the disk of ") && text.contains(next),
        "{text}"
    );
    let text = warns(given(Some(40 * MIB), Some(0), Some(0)));
    assert!(text.contains(": that is little. Free space there"), "{text}");
    let text = warns(given(Some(40 * MIB), Some(20 * MIB), Some(MIB)));
    assert!(
        text.contains(": WAL is taken more slowly, and it is refused below 1.0 MiB. Free"),
        "{text}"
    );
    let text = warns(given(Some(40 * MIB), Some(20 * MIB), Some(10 * MIB)));
    assert!(text.contains(": WAL is refused until there is more. Free"), "{text}");
}
