//! What a compute leaves behind when it is killed.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, signal, wait_gone};
use rustix::process::Signal;

/// System V segments that a process made, by the kernel's list.
fn segments_of(pid: u64) -> usize {
    let text = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    let creator = |line: &str| line.split_ascii_whitespace().nth(4).map(str::to_owned);
    text.lines().filter(|line| creator(line) == Some(pid.to_string())).count()
}

/// Where a compute's dynamic shared memory is.
fn dynamic_memory(cluster: &Cluster) -> PathBuf {
    std::fs::read_link(cluster.dir().join("computes/main/data/pg_dynshmem")).unwrap()
}

#[test]
fn a_killed_compute_leaves_no_shared_memory() {
    let cluster = Cluster::new();
    cluster.up();
    let report = cluster.json(&["compute", "list"])[0].clone();
    let postmaster = report["postgres_pid"].as_u64().unwrap();
    assert_eq!(segments_of(postmaster), 1, "the test looks for the wrong thing");
    let first = dynamic_memory(&cluster);
    // Segments of parallel workers.
    let mut client = cluster.client();
    client.batch_execute("create table t as select i from generate_series(1, 100000) i").unwrap();
    client.batch_execute("set parallel_setup_cost = 0; set parallel_tuple_cost = 0").unwrap();
    client.batch_execute("set min_parallel_table_scan_size = 0").unwrap();
    let plan = client.simple_query("explain (analyze) select sum(i) from t").unwrap();
    assert!(format!("{plan:?}").contains("Workers Launched: 2"), "{plan:?}");
    assert!(std::fs::read_dir(&first).unwrap().count() > 1, "{} is not used", first.display());

    signal(report["pid"].as_u64().unwrap(), Signal::KILL);
    wait_gone(postmaster);
    // Its other processes have the segment, too, and end with it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while segments_of(postmaster) > 0 {
        assert!(Instant::now() < deadline, "a segment is left");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Files are swept by the next compute, and go with one that ends.
    cluster.up();
    assert!(!first.exists());
    let second = dynamic_memory(&cluster);
    assert!(second.exists());
    cluster.cli(&["compute", "stop", "main"]);
    assert!(!second.exists());
}
