//! The raw disk: pieces are written over zeros, one after the other, and each is durable before it counts.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Barrier;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::Measured;

/// Of all files together, in bytes, and of one at least and at most: as long as a segment where that is not too much.
const ALL: u64 = 256 << 20;
const LEAST: u64 = 4 << 20;
const MOST: u64 = 16 << 20;

/// What O_DIRECT wants buffers and positions to be multiples of.
const ALIGNMENT: usize = 4096;

/// How pieces become durable.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Sync,
    Open(OFlags),
}

fn file(path: &Path, size: u64, way: Way) -> File {
    let file = File::create(path).unwrap();
    for at in (0..size).step_by(1 << 20) {
        file.write_all_at(&vec![0; 1 << 20], at).unwrap();
    }
    file.sync_all().unwrap();
    let flags = match way {
        Way::Sync => 0,
        Way::Open(flags) => flags.bits(),
    };
    OpenOptions::new().write(true).custom_flags(flags as i32).open(path).unwrap()
}

/// Runs with a buffer that O_DIRECT takes.
fn with_aligned<T>(piece: usize, what: impl FnOnce(&[u8]) -> T) -> T {
    let bytes = vec![7; piece + ALIGNMENT];
    let skip = bytes.as_ptr().align_offset(ALIGNMENT);
    what(&bytes[skip..skip + piece])
}

/// One piece after the other.
fn one_by_one(file: &File, size: u64, piece: usize, way: Way, time: Duration) -> Measured {
    let begun = Instant::now();
    let mut times = Vec::new();
    with_aligned(piece, |bytes| {
        for at in (0..).map(|n: u64| n * piece as u64 % size) {
            if begun.elapsed() > time {
                break;
            }
            let since = Instant::now();
            file.write_all_at(bytes, at).unwrap();
            if way == Way::Sync {
                file.sync_data().unwrap();
            }
            times.push(since.elapsed());
        }
    });
    measured(times, piece, begun)
}

fn measured(times: Vec<Duration>, piece: usize, begun: Instant) -> Measured {
    let seconds = begun.elapsed().as_secs_f64();
    Measured { bytes: (times.len() * piece) as u64, seconds, answers: times.len(), times }
}

/// A piece is written while the one before it is synced.
fn two_stages(file: &File, size: u64, piece: usize, time: Duration) -> Measured {
    let begun = Instant::now();
    // Whoever has written waits until the one before is durable.
    let (written, waiting) = sync_channel::<Instant>(0);
    let times = std::thread::scope(|scope| {
        let syncer = scope.spawn(move || {
            let one = |since: Instant| {
                file.sync_data().unwrap();
                since.elapsed()
            };
            waiting.into_iter().map(one).collect::<Vec<_>>()
        });
        with_aligned(piece, |bytes| {
            for at in (0..).map(|n: u64| n * piece as u64 % size) {
                if begun.elapsed() > time {
                    break;
                }
                let since = Instant::now();
                file.write_all_at(bytes, at).unwrap();
                written.send(since).unwrap();
            }
        });
        drop(written);
        syncer.join().unwrap()
    });
    measured(times, piece, begun)
}

/// Two pieces are on their way, each by a thread of its own.
fn two_at_once(file: &File, size: u64, piece: usize, way: Way, time: Duration) -> Measured {
    let begun = Instant::now();
    let next = std::sync::atomic::AtomicU64::new(0);
    let one = || {
        let mut times = Vec::new();
        with_aligned(piece, |bytes| {
            while begun.elapsed() < time {
                let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let since = Instant::now();
                file.write_all_at(bytes, n * piece as u64 % size).unwrap();
                if way == Way::Sync {
                    file.sync_data().unwrap();
                }
                times.push(since.elapsed());
            }
        });
        times
    };
    let times = std::thread::scope(|scope| {
        let other = scope.spawn(one);
        [one(), other.join().unwrap()].concat()
    });
    measured(times, piece, begun)
}

/// So many writers at once, each of a file of its own.
fn measure(writers: usize, piece: usize, way: Way, is_pipelined: bool, time: Duration) -> Measured {
    let directory = tempfile::tempdir().unwrap();
    let size = (ALL / writers as u64).clamp(LEAST, MOST);
    let barrier = Barrier::new(writers);
    std::thread::scope(|scope| {
        let one = |number: usize| {
            let (directory, barrier) = (&directory, &barrier);
            scope.spawn(move || {
                let file = file(&directory.path().join(number.to_string()), size, way);
                barrier.wait();
                match (is_pipelined, way) {
                    (false, _) => one_by_one(&file, size, piece, way, time),
                    (true, Way::Sync) => two_stages(&file, size, piece, time),
                    (true, Way::Open(_)) => two_at_once(&file, size, piece, way, time),
                }
            })
        };
        let running: Vec<_> = (0..writers).map(one).collect();
        Measured::together(running.into_iter().map(|one| one.join().unwrap()))
    })
}

/// All ways.
pub fn print_all(writers: usize, piece: usize, time: Duration) {
    let ways = [
        ("write + fdatasync", Way::Sync),
        ("O_DSYNC", Way::Open(OFlags::DSYNC)),
        ("O_DIRECT|O_DSYNC", Way::Open(OFlags::DSYNC.union(OFlags::DIRECT))),
    ];
    for (name, way) in ways {
        measure(writers, piece, way, false, time).print(&format!("raw {name}"));
        let name = format!("raw {name}, the next meanwhile");
        measure(writers, piece, way, true, time).print(&name);
    }
}
