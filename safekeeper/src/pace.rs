//! How fast a safekeeper copies what it lacks while others commit without it, all timelines together: those that it copies from have
//! commits to serve, on the same disks and networks.

use std::time::{Duration, Instant};

use clap::Args;
use parking_lot::Mutex;
use pgstrata_ids::Lsn;
use pgstrata_quorum::Append;

/// So much of a bound may be taken at once, after nothing was taken for as long: what a member lacks after a restart is not
/// delayed.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A member that lacks no more than this of what others have, in bytes, is with them.
pub const WITH_THEM: u64 = 64 << 20;

/// So long after the last commit that was heard of others still commit, for all that is known.
const COMMITS: Duration = Duration::from_secs(1);

/// Longest wait with what a compute sends, which gives up who says nothing for five seconds. Where so many send at once that
/// each would have to wait longer, they are faster than the rate.
const LONGEST: Duration = Duration::from_secs(1);

/// How WAL is fetched that is missing here.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatchUpArguments {
    /// Fetch WAL that is missing here, and take what computes send of it, at so many MiB/s, all timelines together, where others
    /// commit without it. 0: as fast as it can be had, as also where a commit waits for it, or nobody commits.
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
        std::thread::sleep(self.take(bytes, Instant::now(), Duration::MAX));
    }

    /// The pause that is due after so many bytes were taken that a compute sent: a second at most. Whoever makes it holds nothing
    /// that others wait for.
    pub fn pause_after(&self, bytes: u64, now: Instant) -> Duration {
        self.take(bytes, now, LONGEST)
    }

    fn take(&self, bytes: u64, now: Instant, longest: Duration) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut taken_until = self.taken_until.lock();
        let rested = now.checked_sub(AT_ONCE).unwrap_or(now);
        let before = taken_until.unwrap_or(rested).max(rested);
        let until = match now.checked_add(longest) {
            // What others took stays taken.
            Some(latest) => (before + takes).min(latest).max(before),
            None => before + takes,
        };
        *taken_until = Some(until);
        until.saturating_duration_since(now).min(longest)
    }
}

/// What appends of one compute say of the commits of others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    commit_lsn: Lsn,
    committed_at: Option<Instant>,
}

impl Others {
    /// Takes note of an append. True if it brings what others have long committed while they go on committing: none of their
    /// commits waits for this member then.
    pub fn commit_without(&mut self, append: &Append, now: Instant) -> bool {
        let is_first = self.commit_lsn == Lsn::INVALID;
        if append.commit_lsn > self.commit_lsn {
            self.commit_lsn = append.commit_lsn;
            self.committed_at = Some(now).filter(|_| !is_first);
        }
        let end = append.start.checked_add(append.length).unwrap_or(append.start);
        let commit = |at: Instant| now.saturating_duration_since(at) < COMMITS;
        append.commit_lsn.saturating_sub(end) > WITH_THEM && self.committed_at.is_some_and(commit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_it_comes_at_once_and_the_rest_in_its_time() {
        let pace = Pace::new(CatchUpArguments { catch_up_rate: 10 });
        let now = Instant::now() + Duration::from_secs(10);
        let most = Duration::MAX;
        let take = |at: u64| pace.take(1 << 20, now + Duration::from_millis(at), most).as_millis();
        assert!((0..10).all(|_| take(0) == 0));
        assert_eq!((take(0), take(0), take(100)), (100, 200, 200));
        // Whatever was left, no more than a second of it is.
        assert!((0..10).all(|_| take(60_000) == 0));
        assert_eq!(take(60_000), 100);
        // What is larger than that takes its time at once, and everybody's after it.
        assert_eq!(pace.take(100 << 20, now + Duration::from_secs(120), most).as_secs(), 9);
        assert_eq!(take(120_000), 9100);
        let free = Pace::new(CatchUpArguments { catch_up_rate: 0 });
        assert_eq!(free.take(u64::MAX, now, most), Duration::ZERO);
    }

    #[test]
    fn who_may_not_wait_long_is_not_made_to_and_leaves_what_others_took() {
        let pace = Pace::new(CatchUpArguments { catch_up_rate: 10 });
        let now = Instant::now() + Duration::from_secs(10);
        let second = Duration::from_secs(1);
        assert_eq!(pace.take(60 << 20, now, second), second);
        assert_eq!(pace.take(1 << 20, now, second), second, "it is no later for that");
        assert_eq!(pace.take(50 << 20, now, Duration::MAX).as_secs(), 6);
        assert_eq!(pace.take(1 << 20, now, second), second);
        assert_eq!(pace.take(1 << 20, now, Duration::MAX).as_millis(), 6100);
    }

    #[test]
    fn a_compute_that_waits_for_this_member_or_commits_nothing_is_not_held_back() {
        let append = |start: u64, commit_lsn: u64| Append {
            term: pgstrata_ids::Term(1),
            start: Lsn(start << 20),
            length: 1 << 20,
            record_end: Lsn(start << 20),
            commit_lsn: Lsn(commit_lsn << 20),
        };
        let now = Instant::now();
        let at = |ms: u64| now + Duration::from_millis(ms);
        let mut others = Others::default();
        // Whether they commit is not known yet.
        assert!(!others.commit_without(&append(1, 1000), at(0)));
        assert!(others.commit_without(&append(2, 1001), at(10)));
        assert!(others.commit_without(&append(3, 1001), at(1000)), "that was just now");
        assert!(!others.commit_without(&append(4, 1001), at(1010)));
        assert!(others.commit_without(&append(5, 1002), at(1020)));
        // It has nearly all, or all.
        assert!(others.commit_without(&append(936, 1002), at(1020)));
        assert!(!others.commit_without(&append(937, 1002), at(1020)));
        assert!(!others.commit_without(&append(1002, 1003), at(1030)));
        assert!(!others.commit_without(&append(u64::MAX >> 20, 1003), at(1030)));
    }
}
