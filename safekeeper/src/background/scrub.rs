//! Reading all WAL that is here, slowly and again and again, to find what has rotted before somebody needs it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use crate::mend::check::{Found, check};
use crate::timeline::Timeline;
use crate::timelines::{TimelineKey, Timelines};

/// How often it is looked for a timeline whose turn it is.
const INTERVAL: Duration = Duration::from_secs(1);

/// Longest pause at once; it goes on with what is left.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How WAL is looked at that nobody reads.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubArguments {
    /// Read WAL on this disk, to find what has rotted and fetch it anew, at so many MiB/s. 0: not at all.
    #[arg(long, value_name = "MIB_PER_S", default_value_t = 10)]
    pub scrub_rate: u32,

    /// Read all of a timeline's WAL once in so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u32).range(1..))]
    pub scrub_every: u32,
}

/// Starts it, on a thread of its own.
pub fn start(timelines: Arc<Timelines>, arguments: ScrubArguments) -> io::Result<()> {
    if arguments.scrub_rate == 0 {
        return Ok(());
    }
    let scrub = move || run(&timelines, arguments);
    std::thread::Builder::new().name("scrub".into()).spawn(scrub).map(|_| ())
}

fn run(timelines: &Timelines, arguments: ScrubArguments) {
    let every = Duration::from_secs(arguments.scrub_every.into());
    // When the next turn of each is: as many as there are timelines.
    let mut due: HashMap<TimelineKey, Instant> = HashMap::new();
    loop {
        std::thread::sleep(INTERVAL);
        let here: HashSet<TimelineKey> = timelines.keys().into_iter().collect();
        due.retain(|key, _| here.contains(key));
        let now = Instant::now();
        for &key in &here {
            // Spread, so that a start opens nothing that is at rest just to look at it; and differently each time, so that
            // one that is often followed by another gets at all of them.
            let first = || now + every.mul_f64(rand::random());
            if *due.entry(key).or_insert_with(first) > now {
                continue;
            }
            due.insert(key, Instant::now() + every);
            if timelines.is_away(key) {
                continue;
            }
            // Of one that can't be opened others speak.
            if let Ok(timeline) = timelines.get(key)
                && !timeline.is_left()
            {
                scrub(&timeline, arguments.scrub_rate);
            }
        }
    }
}

/// Looks at all that is committed of one timeline.
fn scrub(timeline: &Timeline, rate_mib_s: u32) {
    let per_second = f64::from(rate_mib_s) * f64::from(1 << 20);
    let (began, mut done) = (Instant::now(), 0);
    let pause = |count: usize| {
        done += count;
        let due = Duration::from_secs_f64(done as f64 / per_second);
        Some(due.saturating_sub(began.elapsed()).min(LONGEST_PAUSE))
    };
    let (from, to) = (timeline.marks().available_lsn, timeline.commit_lsn());
    if let Found::Damaged(suspicion) = check(timeline, from, to, to, pause) {
        tracing::warn!(
            timeline = %timeline.parameters().timeline, at = %suspicion.at, why = suspicion.why, "WAL seems to be damaged"
        );
        timeline.suspect(suspicion.at, suspicion.why);
    }
}
