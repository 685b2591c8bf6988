//! What those who run safekeepers see of them, and what becomes of one whose disk fills.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::broker::start_broker;
use common::cluster::{Cluster, Node};
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_ids::Lsn;

const START: Lsn = Lsn(SEGMENT_SIZE);
const LONG: Duration = Duration::from_secs(20);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} after {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The value of the one series that begins with this.
fn value(metrics: &str, series: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.starts_with(series))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Names of all metrics that are shown.
fn names(metrics: &str) -> BTreeSet<&str> {
    let typed = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    typed.filter_map(|rest| rest.split(' ').next()).collect()
}

/// Names of the metrics that the document's table lists.
fn documented(document: &str) -> BTreeSet<&str> {
    let named = document.lines().filter_map(|line| line.strip_prefix("| `"));
    named.filter_map(|rest| rest.split(['`', '{']).next()).collect()
}

#[test]
fn metrics_say_how_far_everybody_is_and_are_what_the_document_lists() {
    let broker = start_broker();
    let mut cluster = Cluster::start_with(3, &["--broker", &broker.url]);
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let end = writer.commit(10, 1000);
    // What is no segment is where the first is to be archived.
    let name = parameters.segment_name(1);
    let wal = format!("tenants/{}/timelines/{}/wal", parameters.tenant, parameters.timeline);
    let wal = cluster.dir.path().join("objects").join(wal);
    std::fs::create_dir_all(&wal).unwrap();
    std::fs::write(wal.join(format!("{name}.zst")), b"no segment").unwrap();
    cluster.nodes[2].wait_lsn("flush_lsn", end, LONG);
    // Until it was heard how far it was.
    let lag_of_third = "pgstrata_safekeeper_lag_bytes{member=\"3\"";
    wait_until("news of the third", || {
        value(&cluster.nodes[0].get("/metrics"), lag_of_third).is_some()
    });
    cluster.nodes[2].kill();
    let end = writer.commit(300, 10_000);
    let failed = "pgstrata_safekeeper_archiving_failed_timelines";
    for node in &cluster.nodes[..2] {
        wait_until("end of the log", || node.timeline_lsn("flush_lsn") == end);
    }
    let mut metrics = String::new();
    wait_until("lag and failure", || {
        // One of them archives.
        let all = cluster.nodes[..2].iter().map(|node| node.get("/metrics"));
        let fails = |metrics: &String| value(metrics, failed) == Some(1.0);
        let Some(found) = all.into_iter().find(fails) else { return false };
        metrics = found;
        value(&metrics, "pgstrata_safekeeper_lag_seconds{member=\"3\"").unwrap() > 2.0
    });
    let of = |series: &str| value(&metrics, series).unwrap();
    assert!(of(lag_of_third) > 2e6, "{metrics}");
    assert!(of("wal_bytes_written_total") >= 3e6 && of("wal_syncs_total") >= 2.0, "{metrics}");
    assert_eq!(
        of("wal_sync_duration_seconds_bucket{le=\"+Inf\"}"),
        of("wal_sync_duration_seconds_count")
    );
    assert!(of("wal_sync_duration_seconds_sum") > 0.0);
    assert!(of("pgstrata_safekeeper_archive_lag_bytes{") >= 3e6, "{metrics}");
    assert!(of("pgstrata_safekeeper_archiving_failed_timestamp_seconds{") > 1.7e9, "{metrics}");
    assert_eq!(of("pgstrata_safekeeper_connected_timelines"), 1.0);
    assert!(of("pgstrata_safekeeper_disk_free_bytes") > 0.0);
    assert!(of("pgstrata_safekeeper_disk_looked_at_timestamp_seconds") > 1.7e9);
    // Nothing is walked for it, and it is what is there.
    let directory = cluster.nodes[0].dir.join(parameters.tenant.to_string());
    let directory = directory.join(parameters.timeline.to_string());
    wait_until("size of what is there", || {
        let names = std::fs::read_dir(&directory).unwrap().filter_map(Result::ok);
        let segments = names.filter(|entry| entry.file_name().len() == 24).count();
        let size = value(&cluster.nodes[0].get("/metrics"), "wal_size_bytes").unwrap();
        size == segments as f64 * SEGMENT_SIZE as f64
    });
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let document = std::fs::read_to_string(document).unwrap();
    assert_eq!(names(&metrics), documented(&document));
    let helped = metrics.lines().filter_map(|line| line.strip_prefix("# HELP "));
    let helped: BTreeSet<&str> = helped.filter_map(|rest| rest.split(' ').next()).collect();
    assert_eq!(helped, names(&metrics));
    proposing.stop().unwrap();
    // It says what it is still to get, and gets it.
    cluster.nodes[2].start();
    cluster.nodes[2].wait_lsn("commit_lsn", end, LONG);
    let metrics = cluster.nodes[2].get("/metrics");
    assert_eq!(value(&metrics, "pgstrata_safekeeper_catch_up_bytes{"), Some(0.0));
    assert!(value(&metrics, "wal_bytes_written_total").unwrap() > 2e6, "{metrics}");
}

/// A file system in memory, unmounted when it goes out of scope.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where mounting is not allowed.
    fn mount(path: &Path, megabytes: u32) -> Option<SmallDisk> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=755"), "pgstrata-test"])
            .arg(path)
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then(|| SmallDisk(path.to_owned()))
    }

    fn resize(&self, megabytes: u32) {
        let option = format!("remount,size={megabytes}m");
        let resized = Command::new("mount").args(["-o", &option]).arg(&self.0).status();
        assert!(resized.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn disk_state(node: &Node) -> String {
    node.status()["disk_state"].as_str().unwrap().to_owned()
}

fn refused(node: &Node) -> f64 {
    let series = "pgstrata_safekeeper_refused_appends_total{reason=\"disk_low\"}";
    value(&node.get("/metrics"), series).unwrap()
}

#[test]
fn a_member_that_refuses_holds_nobody_up_and_comes_back_by_itself() {
    let mut cluster = Cluster::start(3);
    let node = &mut cluster.nodes[0];
    node.kill();
    // Nothing was founded yet: it may begin anew.
    std::fs::remove_dir_all(&node.dir).unwrap();
    std::fs::create_dir(&node.dir).unwrap();
    let Some(disk) = SmallDisk::mount(&node.dir, 12) else {
        return eprintln!("NOT TESTED: mounting a file system needs root and its capabilities");
    };
    let flags = ["--disk-warn", "8MiB", "--disk-slow", "6MiB", "--disk-refuse", "4MiB"];
    node.args.extend(flags.map(str::to_owned));
    node.start();
    assert_eq!(disk_state(node), "fine");
    let parameters = parameters(START);
    let (writer, proposing) = cluster.lead(&parameters, true);
    let first = proposing.commit_lsn();
    let mut states = vec!["fine".to_owned()];
    let deadline = Instant::now() + LONG;
    while refused(&cluster.nodes[0]) == 0.0 {
        assert!(Instant::now() < deadline, "nothing is refused: {states:?}");
        // It follows: otherwise the others are done before it has seen anything.
        let end = writer.commit(1, 200_000);
        let follows = || {
            cluster.nodes[0].timeline_lsn("flush_lsn") >= end || refused(&cluster.nodes[0]) > 0.0
        };
        wait_until("word of the first", follows);
        let state = disk_state(&cluster.nodes[0]);
        if states.last() != Some(&state) {
            states.push(state);
        }
    }
    assert!(
        states.contains(&"warns".to_owned()) && states.contains(&"slows".to_owned()),
        "{states:?}"
    );
    assert_eq!(disk_state(&cluster.nodes[0]), "refuses");
    let status = cluster.nodes[0].status();
    assert!(status["disk_warning"].as_str().unwrap().contains("give it a larger disk"), "{status}");
    // What is kept is there.
    assert!(status["free_bytes"].as_u64().unwrap() >= 4 << 20, "{status}");

    // The others commit, fast; it is tried again, and not without pause.
    let began = Instant::now();
    writer.commit(1, 200_000);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let before = refused(&cluster.nodes[0]);
    std::thread::sleep(Duration::from_secs(3));
    let tries = refused(&cluster.nodes[0]) - before;
    assert!((1.0..=10.0).contains(&tries), "{tries} in 3 s");

    // One more is away: a commit waits, and goes on when there is space, with nothing started anew.
    cluster.nodes[1].kill();
    let end = writer.write(1, 200_000);
    assert!(!writer.wait_commit(end, Duration::from_secs(1)));
    disk.resize(64);
    assert!(writer.wait_commit(end, LONG), "it takes no WAL again");
    cluster.nodes[0].wait_lsn("flush_lsn", end, LONG);
    assert_eq!(disk_state(&cluster.nodes[0]), "fine");
    assert_eq!(cluster.nodes[0].status()["disk_warning"], serde_json::Value::Null);
    writer.commit(10, 100_000);
    proposing.stop().unwrap();
    cluster.nodes[0].wait_lsn("commit_lsn", end, LONG);
    let bytes = cluster.nodes[0].read_all(first, end);
    assert!(bytes == writer.bytes()[..bytes.len()], "what was acknowledged is not there");
    // Its files are in the file system that goes.
    cluster.nodes[0].kill();
}
