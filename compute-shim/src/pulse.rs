//! Whether this process hung: was stopped, or its machine.
//!
//! A deadline that passed meanwhile says nothing of whom it was for. What a hang did is told by what came late, not by
//! each of those who wait: there are too many, and the other ends' deadlines have passed as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often the pulse beats.
const BEAT: Duration = Duration::from_millis(100);
/// A beat that comes so much later was held up by more than a busy machine.
const HANG: Duration = Duration::from_secs(1);

/// What is known of the pulse.
#[derive(Debug, Default)]
struct Beats {
    /// Milliseconds at which it beat last.
    last: AtomicU64,
    hung: AtomicBool,
}

impl Beats {
    fn beat(&self, now: u64) {
        let last = self.last.swap(now, Ordering::AcqRel);
        if Beats::is_late(last, now) {
            self.hung.store(true, Ordering::Release);
        }
    }

    fn is_late(last: u64, now: u64) -> bool {
        now.saturating_sub(last) >= HANG.as_millis() as u64
    }

    /// Whoever runs again first after a hang may be somebody else than the pulse.
    fn take_hang(&self, now: u64) -> bool {
        let last = self.last.load(Ordering::Acquire);
        let hung = self.hung.swap(false, Ordering::AcqRel) || Beats::is_late(last, now);
        self.last.fetch_max(now, Ordering::AcqRel);
        hung
    }
}

/// The pulse of this process, on a thread of its own until the process ends.
#[derive(Debug)]
pub struct Pulse {
    since: Instant,
    beats: Arc<Beats>,
}

impl Pulse {
    /// Starts it.
    pub fn start() -> std::io::Result<Pulse> {
        let (since, beats) = (Instant::now(), Arc::new(Beats::default()));
        let beating = Arc::clone(&beats);
        std::thread::Builder::new().name("pulse".into()).spawn(move || {
            loop {
                std::thread::sleep(BEAT);
                beating.beat(since.elapsed().as_millis() as u64);
            }
        })?;
        Ok(Pulse { since, beats })
    }

    /// Whether this process hung for a second or more since this was asked last.
    pub fn take_hang(&self) -> bool {
        self.beats.take_hang(self.since.elapsed().as_millis() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h6_a_hang_is_noticed_once_whoever_runs_first_afterwards() {
        let beats = Beats::default();
        (1..=20).for_each(|beat| beats.beat(beat * 100));
        assert!(!beats.take_hang(2100), "beats that come in time");
        beats.beat(32_000);
        assert!(beats.take_hang(32_001), "the pulse came first");
        assert!(!beats.take_hang(32_002));
        assert!(beats.take_hang(62_000), "the pulse did not");
        beats.beat(62_001);
        assert!(!beats.take_hang(62_002));
    }
}
