//! How fast a safekeeper copies what it lacks while others commit without it, all timelines together: those that it copies from have
//! commits to serve, on the same disks and networks.

use std::time::{Duration, Instant};

use clap::Args;
use parking_lot::Mutex;

/// So much of a bound may be taken at once, after nothing was taken for as long: what a member lacks after a restart is not
/// delayed.
const AT_ONCE: Duration = Duration::from_secs(1);

/// How WAL is fetched that is missing here.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatchUpArguments {
    /// Fetch WAL that is missing here at so many MiB/s, all timelines together, where others commit without it. 0: as fast as it can
    /// be had, as also where a commit waits for it, or nobody commits.
    #[arg(long, value_name = "MIB_PER_S", default_value_t = 48)]
    pub catch_up_rate: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When all that was taken would have been taken at that rate.
    taken_until: Mutex<Option<Instant>>,
}

impl Pace {
    /// At this rate.
    pub fn new(arguments: CatchUpArguments) -> Pace {
        let bytes_per_second = u64::from(arguments.catch_up_rate) << 20;
        Pace { bytes_per_second, taken_until: Mutex::default() }
    }

    /// Waits before so many bytes are fetched: as long as they and those before them take at the rate, less what may be taken at
    /// once.
    pub fn wait(&self, bytes: u64) {
        std::thread::sleep(self.take(bytes, Instant::now()));
    }

    fn take(&self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut taken_until = self.taken_until.lock();
        let rested = now.checked_sub(AT_ONCE).unwrap_or(now);
        let until = taken_until.unwrap_or(rested).max(rested) + takes;
        *taken_until = Some(until);
        until.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_it_comes_at_once_and_the_rest_in_its_time() {
        let pace = Pace::new(CatchUpArguments { catch_up_rate: 10 });
        let now = Instant::now() + Duration::from_secs(10);
        let take = |at: u64| pace.take(1 << 20, now + Duration::from_millis(at)).as_millis();
        assert!((0..10).all(|_| take(0) == 0));
        assert_eq!((take(0), take(0), take(100)), (100, 200, 200));
        // Whatever was left, no more than a second of it is.
        assert!((0..10).all(|_| take(60_000) == 0));
        assert_eq!(take(60_000), 100);
        // What is larger than that takes its time at once, and everybody's after it.
        assert_eq!(pace.take(100 << 20, now + Duration::from_secs(120)).as_secs(), 9);
        assert_eq!(take(120_000), 9100);
        let free = Pace::new(CatchUpArguments { catch_up_rate: 0 });
        assert_eq!(free.take(u64::MAX, now), Duration::ZERO);
    }
}
