//! Failure zones of a local cluster's safekeepers.

#![allow(clippy::unwrap_used)]

use pgstrata_tests::Cluster;
use serde_json::{Value, json};

fn zones(status: &Value) -> Vec<&str> {
    let processes = status["processes"].as_array().unwrap();
    let safekeepers = processes.iter().filter(|process| process["role"] == "safekeeper");
    safekeepers.map(|process| process["zone"].as_str().unwrap()).collect()
}

#[test]
fn a_majority_in_one_zone_is_shown() {
    let cluster = Cluster::with(&["--zones", "a,b,b"], &[]);
    let line = cluster.refusal(&["up", "--safekeepers", "5", "--zones", "a,b,b"], 1);
    assert!(line.contains("3 zones were named for 5 safekeepers"), "{line}");
    cluster.refusal(&["up", "--zones", "a,,b"], 2);
    cluster.up();
    let status = cluster.status();
    assert_eq!(zones(&status), ["a", "b", "b"]);
    let warning = status["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("2 of 3 safekeepers are in zone 'b'"), "{warning}");
    let text = cluster.cli(&["status"]);
    assert!(text.lines().any(|line| line == format!("warning: {warning}")), "{text}");
    let titles = text.lines().next().unwrap();
    assert!(titles.ends_with("ZONE"), "{titles}");
    // They are remembered, and can't be others.
    cluster.cli(&["down"]);
    cluster.up();
    assert_eq!(zones(&cluster.status()), ["a", "b", "b"]);
    let line = cluster.refusal(&["up", "--zones", "a,b,c"], 1);
    assert!(line.contains("are in zones a,b,b"), "{line}");
}

#[test]
fn a_zone_for_each_safekeeper_is_no_reason_to_warn() {
    let cluster = Cluster::new();
    cluster.up();
    let status = cluster.status();
    assert_eq!(zones(&status), ["zone-a", "zone-b", "zone-c"]);
    assert_eq!(status["warnings"], json!([]));
    assert!(!cluster.cli(&["status"]).contains("warning"));
}
