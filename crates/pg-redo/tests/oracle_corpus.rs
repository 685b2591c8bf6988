//! Records of every kind and branch that real servers of 15 and 18 wrote, replayed on the pages they were for, give the
//! pages that the servers had.
//!
//! `examples/oracle_corpus.rs` chose them. Which mistakes they notice: `docs/redo-mutants.md`.
#![allow(clippy::expect_used)]

mod support;

#[path = "support/corpus.rs"]
mod corpus;

use corpus::read_all;
use std::collections::BTreeSet;
use support::control;

#[test]
fn every_record_gives_the_page_that_the_server_had() {
    let cases = read_all(include_bytes!("oracle_corpus.zst"));
    let mut branches = BTreeSet::new();
    for case in &cases {
        let report = case.check();
        assert_eq!(report.unsupported, 0, "{:?}", report.unsupported_list);
        assert_eq!(report.mismatches, 0, "{}: {:?}", case.version.major(), report.mismatch_list);
        assert!(report.compared > 0, "nothing is compared");
        for (kind, names) in report.by_branch() {
            branches.extend(names.into_keys().map(|name| format!("{kind}: {name}")));
        }
    }
    assert!(cases.len() > 500, "{} cases", cases.len());
    assert!(branches.len() > 200, "{} branches", branches.len());
}
