//! The oracle notices every rule that is broken on purpose.
//!
//! `cargo test -p pgstrata-pg-redo --features redo-faults`. The records come from real servers, with the pages they were
//! for; `examples/fault_corpus.rs` chose them.
#![allow(clippy::expect_used)]

mod support;

#[path = "support/corpus.rs"]
mod corpus;

use corpus::Case;
use pgstrata_pg_redo::faults::{self, FAULTS};
use std::path::Path;
use support::control;

fn case(name: &str) -> Case {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fault_corpus").join(name);
    Case::decode(&std::fs::read(path).unwrap_or_else(|error| panic!("{name}: {error}")))
}

#[test]
fn every_broken_rule_is_noticed() {
    assert!(FAULTS.len() >= 40, "{} faults", FAULTS.len());
    for (index, fault) in FAULTS.iter().enumerate() {
        let case = case(fault.name);
        let right = case.check();
        assert_eq!(right.mismatches, 0, "{}: {:?}", fault.name, right.mismatch_list);
        assert_eq!(right.unsupported, 0, "{}", fault.name);
        assert!(right.compared > 0, "{}: nothing is compared", fault.name);
        faults::set(Some(index));
        let wrong = case.check();
        faults::set(None);
        assert!(wrong.mismatches > 0, "{} is not noticed", fault.name);
    }
}

#[test]
fn no_two_faults_have_a_name() {
    let mut names: Vec<_> = FAULTS.iter().map(|fault| fault.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), FAULTS.len());
}
