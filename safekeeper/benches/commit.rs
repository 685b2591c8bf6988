//! Commit latency and append throughput of three safekeepers on one disk, beside the raw disk.
//!
//! `cargo bench -p pgstrata-safekeeper --bench commit`
#![allow(clippy::unwrap_used)] // A failed benchmark ends.

#[path = "../tests/common/mod.rs"]
mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::wal::{SEGMENT_SIZE, parameters};
use pgstrata_ids::Lsn;

fn percentiles(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{name}: p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99));
}

/// Overwrites of zeroed blocks, each made durable, by so many writers at once.
fn raw_disk(writers: usize) {
    let directory = tempfile::tempdir().unwrap();
    let write = |writer: usize| {
        let file = std::fs::File::create(directory.path().join(writer.to_string())).unwrap();
        file.write_all_at(&vec![0; 16 << 20], 0).unwrap();
        file.sync_all().unwrap();
        let block = [7; 8192];
        let one = |n: u64| {
            let started = Instant::now();
            file.write_all_at(&block, n * 512 % (16 << 20)).unwrap();
            file.sync_data().unwrap();
            started.elapsed()
        };
        (0..2000).map(one).collect::<Vec<_>>()
    };
    let times = std::thread::scope(|scope| {
        let running: Vec<_> = (0..writers).map(|n| scope.spawn(move || write(n))).collect();
        running.into_iter().flat_map(|one| one.join().unwrap()).collect()
    });
    percentiles(&format!("raw write + fdatasync, {writers} at once"), times);
}

/// A segment's worth at a time over zeroed files, as a safekeeper writes bulk loads, on one file.
fn raw_append() {
    let directory = tempfile::tempdir().unwrap();
    let (size, piece) = (64 << 20, vec![7; 1 << 20]);
    let file = std::fs::File::create(directory.path().join("file")).unwrap();
    file.write_all_at(&vec![0; size], 0).unwrap();
    file.sync_all().unwrap();
    let started = Instant::now();
    for at in (0..size).step_by(piece.len()) {
        file.write_all_at(&piece, at as u64).unwrap();
        file.sync_data().unwrap();
    }
    let rate = size as f64 / 1e6 / started.elapsed().as_secs_f64();
    println!("raw append, 1 MiB + fdatasync: {rate:.0} MB/s");
}

/// Where the files lie is `$TMPDIR`'s choice: on a file system in memory the same processes show what syncs cost.
fn main() {
    raw_append();
    raw_disk(1);
    raw_disk(3);
    for nodes in [1, 3] {
        let mut parameters = parameters(Lsn(SEGMENT_SIZE * 16));
        parameters.segment_size = 16 << 20;
        let cluster = Cluster::start(nodes);
        let (writer, proposing) = cluster.lead(&parameters, true);
        writer.commit(100, 200);
        let one = |_| {
            let started = Instant::now();
            writer.commit(1, 200);
            started.elapsed()
        };
        let times = (0..5000).map(one).collect();
        percentiles(&format!("commit of one record, {nodes} safekeepers"), times);
        let started = Instant::now();
        let total = 256u64 << 20;
        let from = writer.generator().at;
        while writer.generator().at - from < total {
            let end = writer.write(16, 60_000);
            // Keeps some in flight, as a bulk load does.
            let behind = Lsn(end.0.saturating_sub(8 << 20));
            assert!(writer.wait_commit(behind, Duration::from_secs(20)));
        }
        let end = writer.write(1, 8);
        assert!(writer.wait_commit(end, Duration::from_secs(20)));
        let seconds = started.elapsed().as_secs_f64();
        let rate = (end - from) as f64 / 1e6 / seconds;
        println!("bulk append, {nodes} safekeepers: {rate:.0} MB/s");
        proposing.stop().unwrap();
    }
}
