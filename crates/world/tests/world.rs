//! Seeds that are run each time, and mistakes that have to be found.

use std::sync::atomic::{AtomicU64, Ordering};

use pgstrata_world::{Lie, Outcome, Plan, run};

/// Seeds of each run of the tests.
const SEEDS: u64 = 200;

fn seed(seed: u64) -> Outcome {
    run(&Plan::new(seed), None, false)
}

/// Calls for each of these numbers, on all cores.
fn each(numbers: u64, act: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers {
                        return;
                    }
                    act(number);
                }
            });
        }
    });
}

#[test]
fn what_is_committed_stays_whatever_goes_wrong() {
    let sum = std::sync::Mutex::new(Outcome::default());
    each(SEEDS, |number| {
        let outcome = seed(number);
        assert_eq!(outcome.violation, None, "seed {number}");
        sum.lock().unwrap().add(&outcome);
    });
    // It is no use if nothing happens.
    let sum = sum.into_inner().unwrap();
    let each_has = [sum.elections, sum.crashes, sum.copies, sum.archived, sum.trimmed];
    assert!(each_has.iter().all(|&count| count > SEEDS), "{sum:?}");
    let some_have = [
        sum.founded,
        sum.retired,
        sum.changes,
        sum.wipes,
        sum.led_on,
        sum.horizons,
        sum.rots,
        sum.mended,
    ];
    let is_recovered = [sum.recoveries, sum.given_up_bytes >> 10];
    assert!(is_recovered.iter().all(|&count| count > SEEDS / 50), "{sum:?}");
    assert!(sum.restorations > 0, "{sum:?}");
    let is_followed = [sum.streams, sum.followed_bytes >> 10];
    assert!(is_followed.iter().all(|&count| count > SEEDS), "{sum:?}");
    assert!(some_have.iter().all(|&count| count > SEEDS / 20), "{sum:?}");
    let connections_end = [sum.dials, sum.closed, sum.blocked, sum.file_reads];
    assert!(connections_end.iter().all(|&count| count > SEEDS), "{sum:?}");
    let archive_is_used = [
        sum.tails,
        sum.archive_asked,
        sum.archive_reads,
        sum.rests,
        sum.sent_away,
        sum.brought_back,
    ];
    assert!(archive_is_used.iter().all(|&count| count > SEEDS / 20), "{sum:?}");
}

#[test]
fn a_seed_is_the_same_world_each_time() {
    for number in 0..10 {
        let again = || run(&Plan::new(number), None, true);
        assert_eq!(again(), again(), "seed {number}");
    }
}

/// Each of these failed once: what was wrong is said in the change that mended it.
#[test]
fn what_once_failed_does_not_fail_again() {
    for number in REGRESSIONS {
        assert_eq!(seed(number).violation, None, "seed {number}");
    }
}

/// As plans were then: a change of what a seed means makes others of them, and the tests of the faults themselves stay.
const REGRESSIONS: [u64; 9] =
    [191, 203, 1970, 3925, 100_485, 2_177_703, 2_134_497, 3_049_410, 3_085_144];

#[test]
fn a_mistake_in_disks_or_drivers_is_found() {
    each(FOUND.len() as u64, |index| {
        let (lie, within) = FOUND[index as usize];
        let found =
            (0..within).any(|number| run(&Plan::new(number), Some(lie), false).violation.is_some());
        assert!(found, "{lie:?} is not found in {within} seeds");
    });
}

/// And in how many seeds.
const FOUND: [(Lie, u64); 47] = [
    // The long ones first.
    (Lie::AwayNameUnsynced, 9000),
    (Lie::OldTermIsJoint, 3000),
    (Lie::FlushedUnlooked, 1500),
    (Lie::WipedComesBack, 1000),
    (Lie::SwapWithoutCompare, 700),
    (Lie::AnyArchiveFollowed, 700),
    (Lie::CutNotZeroed, 600),
    (Lie::MendedUnsynced, 500),
    (Lie::JointNotUsed, 500),
    (Lie::RottenArchived, 400),
    (Lie::NoteNotLowered, 300),
    (Lie::BeginsBeyondArchive, 300),
    (Lie::VoteTwice, 300),
    (Lie::AnyLogMends, 250),
    (Lie::CutUnsynced, 200),
    (Lie::CacheBelieved, 200),
    (Lie::FollowsAnybody, 500),
    (Lie::FoundedAgain, 200),
    (Lie::SyncRetried, 150),
    (Lie::AnyLogLedOn, 60),
    (Lie::RottenNotTakenOut, 60),
    (Lie::AnswerToAnother, 60),
    (Lie::AwayBeforeArchived, 50),
    (Lie::AnyLogFollowed, 40),
    (Lie::SegmentNameUnsynced, 40),
    (Lie::DecisionNotTaken, 60),
    (Lie::AckAhead, 40),
    (Lie::ClockStands, 40),
    (Lie::AckCountsTwice, 30),
    (Lie::CopyBeyondCommit, 20),
    (Lie::WalUnsynced, 20),
    (Lie::SegmentUnsynced, 20),
    (Lie::ControlUnsynced, 20),
    (Lie::ControlNameUnsynced, 20),
    (Lie::NoteAhead, 20),
    (Lie::StaleAppendTaken, 20),
    (Lie::TrimBeforeArchive, 20),
    (Lie::LossWithinConnection, 20),
    (Lie::DonorIsFixed, 20),
    (Lie::TailBeyondCommit, 20),
    (Lie::TailInPlaceOfAnother, 20),
    (Lie::TailsDroppedFirst, 20),
    (Lie::FailureIsArchived, 20),
    (Lie::CommitAhead, 20),
    (Lie::FilesRecycled, 20),
    (Lie::VoteOfBefore, 20),
    (Lie::StreamBeyondCommit, 40),
];
