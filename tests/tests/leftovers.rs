//! What a compute leaves behind when it is killed, and the benchmarks when they fail.

#![allow(clippy::unwrap_used)]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

/// In the place of `pgstrata`: its `up` leaves a cluster behind, and fails, or does not come back.
const STAND_IN: &str = r#"#!/bin/sh
case $3 in
up) mkdir "$2" && echo '{}' >"$2/cluster.json" && echo begun >>"${0%/*}/said"; END ;;
down) echo ended >>"${0%/*}/said" ;;
esac
"#;

#[test]
fn benchmarks_that_fail_end_what_they_started() {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("scripts/bench");
    for (end, is_told_to_end) in [("exit 1", false), ("exec sleep 60", true)] {
        let place = tempfile::tempdir().unwrap();
        let (temporary, said) = (place.path().join("temporary"), place.path().join("said"));
        std::fs::create_dir(&temporary).unwrap();
        let program = place.path().join("pgstrata");
        std::fs::write(&program, STAND_IN.replace("END", end)).unwrap();
        std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&bench)
            .arg(place.path())
            .args(["--quick", "--only", "start"])
            .env("TMPDIR", &temporary)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let text = || std::fs::read_to_string(&said).unwrap_or_default();
        let deadline = Instant::now() + Duration::from_secs(30);
        while text().is_empty() {
            assert!(Instant::now() < deadline, "nothing was started");
            std::thread::sleep(Duration::from_millis(10));
        }
        if is_told_to_end {
            signal(child.id().into(), Signal::TERM);
        }
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert_eq!(text(), "begun\nended\n");
        assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
    }
}
