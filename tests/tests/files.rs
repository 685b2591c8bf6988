//! Base backups from the page server equal what stock PostgreSQL recovers to the same LSN, file by
//! file, at moments in the middle of transactions.
//!
//! `scripts/redo-files` compares, and its head says what exactly. `make test-all` does it for all versions, with more
//! moments, and with PostgreSQL's own suites: see `docs/redo.md`.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use pgstrata_tests::programs;

fn compare(major: u32, lsns: u32) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new(root.join("scripts/redo-files"))
        .args(["--lsns", &lsns.to_string(), &major.to_string(), "workload"])
        .arg(programs())
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "PostgreSQL {major}: {report}{complaints}");
    // What it is about did happen.
    let last = report.lines().last().unwrap();
    let count = |what: &str| -> u64 {
        let words: Vec<_> = last.split_once(what).unwrap().0.split_ascii_whitespace().collect();
        words.last().unwrap().parse().unwrap()
    };
    assert_eq!(count(" LSNs"), u64::from(lsns), "{report}");
    assert!(count(" with transactions") > 0, "{report}");
    assert!(count(" with prepared") > 0, "{report}");
    assert!(count(" pages") > 5000 * u64::from(lsns) / 2, "{report}");
    println!("PostgreSQL {major}: {last}");
}

#[test]
fn base_backups_equal_stock_recovery() {
    compare(15, 3);
}
