//! Nothing is found in the real core; every seeded fault is.

use super::{Beginning, Bounds, Outcome, explore};
use crate::Fault;

const NONE: Bounds = Bounds {
    records: [0, 0],
    beginning: Beginning::Fresh,
    five: false,
    crashes: 0,
    restarts: 0,
    duplicates: 0,
    reconnects: 0,
    copies: 0,
    follows: 0,
    proofs: 0,
    tidings: 0,
    changes: 0,
    undos: 0,
    learns: 0,
    made_up: 0,
    wipes: 0,
    pieces: false,
    late_flush: false,
};

const ELECTED: Bounds = Bounds { beginning: Beginning::Elected, ..NONE };

const HEARD: Bounds = Bounds { beginning: Beginning::Heard, ..NONE };

const DIVIDED: Bounds = Bounds { beginning: Beginning::Divided, records: [1, 1], ..NONE };

/// Everything within the bounds was visited, and nothing is wrong.
fn exhausts(bounds: Bounds) -> Outcome {
    let outcome = explore(bounds, None, 3_000_000, false);
    assert_eq!(outcome.violation, None, "{bounds:?}");
    assert!(outcome.complete, "{bounds:?}: {outcome:?}");
    println!("{bounds:?}: {outcome:?}");
    outcome
}

#[test]
fn two_elections_from_nothing_with_a_crash() {
    let outcome = exhausts(Bounds { crashes: 1, ..NONE });
    assert_eq!(outcome.highest_term, 2);
}

#[test]
fn two_computes_write_a_record_each() {
    let outcome = exhausts(Bounds { records: [1, 1], ..ELECTED });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 4));
}

#[test]
fn two_logs_that_part_and_a_third_term() {
    let outcome = exhausts(Bounds { restarts: 1, ..DIVIDED });
    assert_eq!(outcome.highest_term, 3);
}

#[test]
fn a_fourth_term_after_a_record_of_the_first_was_sent_along() {
    let bounds = Bounds { beginning: Beginning::Retaken, records: [2, 1], ..DIVIDED };
    let outcome = exhausts(Bounds { restarts: 1, proofs: 1, ..bounds });
    assert_eq!(outcome.highest_term, 4);
}

#[test]
fn a_crash_in_the_middle_of_anything() {
    exhausts(Bounds { records: [1, 0], crashes: 1, ..ELECTED });
}

#[test]
fn a_message_arrives_twice() {
    exhausts(Bounds { records: [1, 0], duplicates: 1, ..ELECTED });
}

#[test]
fn a_compute_reconnects() {
    exhausts(Bounds { records: [1, 0], reconnects: 1, ..ELECTED });
}

#[test]
fn syncs_come_late_and_records_in_pieces() {
    exhausts(Bounds { records: [1, 0], late_flush: true, pieces: true, ..ELECTED });
}

#[test]
fn l18_unsynced_logs_that_part_are_copied_over() {
    let bounds = Bounds { beginning: Beginning::Divided, records: [1, 2], ..ELECTED };
    exhausts(Bounds { late_flush: true, copies: 1, ..bounds });
}

#[test]
fn acceptors_copy_and_prove() {
    exhausts(Bounds { records: [1, 0], copies: 1, proofs: 1, tidings: 1, ..ELECTED });
}

/// What a term began with comes from whoever has it, and need not be committed.
#[test]
fn acceptors_copy_what_they_follow() {
    let outcome = exhausts(Bounds { follows: 2, restarts: 1, ..DIVIDED });
    assert_eq!(outcome.highest_term, 3);
    exhausts(Bounds { follows: 1, crashes: 1, records: [1, 0], ..ELECTED });
    let bounds = Bounds { beginning: Beginning::Retaken, records: [2, 1], ..DIVIDED };
    let outcome = exhausts(Bounds { follows: 1, restarts: 1, ..bounds });
    assert_eq!(outcome.highest_term, 4);
}

/// The third member is being replaced: both groups were elected by, and committed. Whoever campaigns may know any
/// configuration that was decided.
const JOINT: Bounds = Bounds { beginning: Beginning::Joint, records: [1, 1], ..NONE };

const REPLACED: Bounds = Bounds { beginning: Beginning::Replaced, ..JOINT };

#[test]
fn a_change_begins_while_a_compute_writes() {
    let changes = Bounds { changes: 1, ..ELECTED };
    let outcome = exhausts(Bounds { records: [1, 0], ..changes });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 2));
    let outcome = exhausts(Bounds { records: [0, 1], ..changes });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 2));
}

/// The compute writes on while acceptors hear of the change; then it takes the new members, or another one does.
#[test]
fn a_change_is_heard_of_while_a_compute_writes() {
    exhausts(Bounds { learns: 1, records: [1, 0], ..HEARD });
    exhausts(Bounds { changes: 1, ..HEARD });
}

/// The newcomer died for good: the first members go on, whoever has heard of the change.
#[test]
fn a_change_is_undone_while_a_compute_writes() {
    let undone = Bounds { changes: 1, undos: 1, ..ELECTED };
    let outcome = exhausts(Bounds { records: [1, 0], ..undone });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 2));
    exhausts(Bounds { undos: 1, learns: 1, ..HEARD });
}

#[test]
fn a_change_begins_again_after_it_was_undone() {
    exhausts(Bounds { undos: 1, changes: 1, ..HEARD });
}

#[test]
fn a_change_ends_while_a_compute_writes() {
    let outcome = exhausts(JOINT);
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 4));
}

#[test]
fn a_crash_after_a_change() {
    exhausts(Bounds { crashes: 1, records: [1, 0], ..JOINT });
}

#[test]
fn a_configuration_that_somebody_made_up_elects_nobody() {
    let made_up = Bounds { made_up: 1, ..ELECTED };
    let outcome = exhausts(Bounds { records: [1, 1], ..made_up });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 4));
    exhausts(Bounds { changes: 1, ..made_up });
}

#[test]
fn a_directory_is_lost_while_a_compute_writes() {
    let outcome = exhausts(Bounds { wipes: 1, records: [1, 0], ..ELECTED });
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 2));
}

#[test]
fn faulty_memberships_are_found() {
    finds(Fault::MessengerBelieved, Bounds { made_up: 1, records: [1, 0], ..ELECTED });
    finds(Fault::WipedComesBack, Bounds { wipes: 1, records: [1, 0], ..ELECTED });
}

#[test]
fn faulty_changes_of_members_are_found() {
    finds(Fault::JointIsNew, Bounds { changes: 1, records: [1, 1], ..ELECTED });
    finds(Fault::JointIsOld, Bounds { records: [2, 0], ..JOINT });
    finds(Fault::NewTooEarly, Bounds { changes: 2, records: [1, 0], ..ELECTED });
    finds(Fault::OldTermIsJoint, Bounds { changes: 1, records: [1, 0], ..HEARD });
    finds(Fault::UndoneTooLate, Bounds { undos: 1, ..REPLACED });
    finds(Fault::StaleConfigurationTaken, REPLACED);
    finds(Fault::ConfigurationNotPersisted, REPLACED);
}

/// Any two of them may be gone.
#[test]
fn five_acceptors_commit_what_three_of_them_have() {
    let five = Bounds { five: true, records: [0, 1], ..ELECTED };
    let outcome = exhausts(five);
    assert_eq!((outcome.highest_term, outcome.most_committed), (2, 2));
    exhausts(Bounds { crashes: 1, ..five });
    exhausts(Bounds { wipes: 1, ..five });
    exhausts(Bounds { five: true, ..DIVIDED });
}

#[test]
fn faults_are_found_among_five_acceptors_too() {
    let five = Bounds { five: true, ..NONE };
    finds(Fault::VoteTwice, five);
    finds(Fault::SmallQuorum, five);
}

/// The fault is found, with the nearest states first, or else with the deepest.
fn finds(fault: Fault, bounds: Bounds) {
    let mut outcome = explore(bounds, Some(fault), 100_000, true);
    if outcome.violation.is_none() {
        outcome = explore(bounds, Some(fault), 3_000_000, false);
    }
    let Some(violation) = outcome.violation else {
        panic!("{fault:?} was not found: {outcome:?}");
    };
    println!("{fault:?}: {} after {} states", violation.what, outcome.states);
}

#[test]
fn faulty_votes_are_found() {
    finds(Fault::VoteNotPersisted, Bounds { crashes: 1, ..NONE });
    finds(Fault::VoteTwice, NONE);
    finds(Fault::SmallQuorum, NONE);
    let unsynced = Bounds { records: [1, 0], late_flush: true, crashes: 1, proofs: 1, ..ELECTED };
    finds(Fault::VoteKeepsUnsynced, unsynced);
}

#[test]
fn faulty_durability_is_found() {
    let crash = Bounds { records: [1, 0], crashes: 1, ..ELECTED };
    finds(Fault::AckBeforeSync, crash);
    finds(Fault::HistoryNotPersisted, crash);
    finds(Fault::HistoryBeforeTruncate, Bounds { records: [1, 1], ..crash });
    finds(Fault::FlushInsideRecord, Bounds { pieces: true, ..crash });
}

#[test]
fn faulty_commits_are_found() {
    // Figure 8 of the Raft paper: the third term's winner sends along a record of the first.
    let more_terms = Bounds { beginning: Beginning::Retaken, restarts: 1, ..DIVIDED };
    finds(Fault::EmptyTermForgotten, more_terms);
    let longer = Bounds { beginning: Beginning::RetakenLonger, records: [2, 1], ..more_terms };
    finds(Fault::CommitOlderTerm, Bounds { pieces: true, ..longer });
    finds(Fault::CommitBeyondLog, Bounds { records: [2, 0], late_flush: true, ..ELECTED });
    finds(Fault::AppendOldTerm, Bounds { records: [1, 0], ..ELECTED });
    let copies = Bounds { records: [1, 1], copies: 1, proofs: 1, ..ELECTED };
    finds(Fault::PeerBeyondCommit, copies);
    finds(Fault::AnyLogShared, Bounds { follows: 1, ..more_terms });
    finds(Fault::ProofIgnoresAdoption, Bounds { proofs: 1, ..more_terms });
}

#[test]
fn faulty_truncation_is_found() {
    let again = Bounds { restarts: 1, ..DIVIDED };
    finds(Fault::WrongDivergence, again);
    finds(Fault::TruncateBelowCommit, Bounds { records: [1, 0], tidings: 1, ..ELECTED });
    finds(Fault::DonorByLength, Bounds { records: [2, 1], ..again });
}
