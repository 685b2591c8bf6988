//! Runs the world with many seeds, on all cores: `world seeds=10000 from=0 [lie=WalUnsynced]`.
//!
//! Of the first seed that fails it shows what went wrong, the least that has to go wrong for it, and all that happened then.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pgstrata_world::{Lie, Outcome, Plan, minimise, run};

#[derive(Default)]
struct Sum {
    runs: u64,
    all: Outcome,
    failed: Option<u64>,
}

fn main() -> ExitCode {
    let (mut seeds, mut from, mut lie) = (1000, 0, None);
    for argument in std::env::args().skip(1) {
        let (name, value) = argument.split_once('=').unwrap_or((&argument, ""));
        match (name, value.parse::<u64>()) {
            ("seeds", Ok(value)) => seeds = value,
            ("from", Ok(value)) => from = value,
            ("lie", _) => lie = Lie::ALL.into_iter().find(|lie| format!("{lie:?}") == value),
            _ => {
                eprintln!("usage: world [seeds=N] [from=N] [lie=NAME]");
                return ExitCode::from(2);
            }
        }
    }
    let begun = Instant::now();
    let (next, sum) = (AtomicU64::new(from), Mutex::new(Sum::default()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| work(&next, from.saturating_add(seeds), lie, &sum));
        }
    });
    let sum = sum.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (all, seconds) = (&sum.all, begun.elapsed().as_secs_f64());
    println!(
        "{} seeds in {seconds:.1} s, {:.0} a second; a run: {} events, {:.2} simulated s, {:.1} elections, {:.1} crashes; \
         {} copies between safekeepers, {} of what a term began with, \
         {} objects of WAL, {} of them tails, the archive asked {} times and read {} times for others, {} segments removed, {} MB committed; {} founded, {} decisions about members, {} directories lost, {} safekeepers retired, \
         {} logs led on, {} newcomers begun at a horizon, {} logs rotten, {} mended; {} came to rest, {} were sent away, {} brought back; computes made {} connections, of which {} were closed by others, waited {} times for room, and read {} pieces from files; {} times a majority was given up, {} of them all, and {} KB with them; a page server followed on {} streams, and got {} MB",
        sum.runs,
        sum.runs as f64 / seconds,
        all.events / sum.runs.max(1),
        all.simulated_us as f64 / 1e6 / sum.runs as f64,
        all.elections as f64 / sum.runs as f64,
        all.crashes as f64 / sum.runs as f64,
        all.copies,
        all.beginnings,
        all.archived,
        all.tails,
        all.archive_asked,
        all.archive_reads,
        all.trimmed,
        all.committed_bytes >> 20,
        all.founded,
        all.changes,
        all.wipes,
        all.retired,
        all.led_on,
        all.horizons,
        all.rots,
        all.mended,
        all.rests,
        all.sent_away,
        all.brought_back,
        all.dials,
        all.closed,
        all.blocked,
        all.file_reads,
        all.recoveries,
        all.restorations,
        all.given_up_bytes >> 10,
        all.streams,
        all.followed_bytes >> 20,
    );
    match sum.failed {
        Some(seed) => {
            explain(seed, lie);
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn work(next: &AtomicU64, end: u64, lie: Option<Lie>, sum: &Mutex<Sum>) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return;
        }
        let outcome = run(&Plan::new(seed), lie, false);
        let mut sum = sum.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sum.runs += 1;
        sum.all.add(&outcome);
        if let Some(violation) = outcome.violation {
            println!("seed {seed}: {violation}");
            sum.failed = Some(sum.failed.map_or(seed, |first| first.min(seed)));
            // Those that are under way are finished.
            next.store(end, Ordering::Relaxed);
        }
    }
}

fn explain(seed: u64, lie: Option<Lie>) {
    let least = minimise(&Plan::new(seed), lie);
    let outcome = run(&least, lie, true);
    println!("\nthe least of seed {seed}: {least:#?}\n");
    outcome.trace.iter().for_each(|line| println!("{line}"));
    println!("\nseed {seed}: {}", outcome.violation.unwrap_or_default());
}
