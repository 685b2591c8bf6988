//! When it is said that writes are refused for want of space: once when it begins, once a minute at most with how many they
//! were, and once when it is over. Who writes tries again and again, and each timeline, connection and thread does so for itself.
//!
//! What is said, and how the disk is looked at, is not decided here.

use std::time::{Duration, Instant};

/// How often it is said while it lasts, at most.
const EVERY: Duration = Duration::from_secs(60);

/// It is over when nothing was refused for so long, where the disk does not say how much it has.
const QUIET: Duration = Duration::from_secs(60);

/// What is to be said now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Say {
    /// It has begun.
    Begins,
    /// It goes on: so many writes were refused since it was said last.
    GoesOn(u64),
    /// It is over: so many writes were refused, all in all.
    Over(u64),
}

#[derive(Clone, Copy, Debug)]
struct Lack {
    said_at: Instant,
    refused_at: Instant,
    /// Refused since it was said last, and before.
    since: u64,
    before: u64,
}

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Said(Option<Lack>);

impl Said {
    /// Whether it was said, and is not over.
    pub fn is_told(&self) -> bool {
        self.0.is_some()
    }

    /// A write was refused.
    pub fn refused(&mut self, now: Instant) -> Option<Say> {
        match &mut self.0 {
            Some(lack) => {
                (lack.since, lack.refused_at) = (lack.since + 1, now);
                None
            }
            none => {
                *none = Some(Lack { said_at: now, refused_at: now, since: 1, before: 0 });
                Some(Say::Begins)
            }
        }
    }

    /// The disk was looked at: whether it is seen to have no space for WAL, and whether it was before.
    pub fn looked(&mut self, now: Instant, (before, is_full): (bool, bool)) -> Option<Say> {
        let Some(lack) = &mut self.0 else {
            self.0 = is_full.then_some(Lack { said_at: now, refused_at: now, since: 0, before: 0 });
            return is_full.then_some(Say::Begins);
        };
        let is_over =
            !is_full && (before || now.saturating_duration_since(lack.refused_at) >= QUIET);
        if is_over {
            let refused = lack.before + lack.since;
            self.0 = None;
            return Some(Say::Over(refused));
        }
        let is_due = now.saturating_duration_since(lack.said_at) >= EVERY;
        (is_due && lack.since > 0).then(|| {
            let count = std::mem::take(&mut lack.since);
            (lack.said_at, lack.before) = (now, lack.before + count);
            Say::GoesOn(count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_space_is_said_to_be_so_once_and_then_once_a_minute() {
        let (mut said, start) = (Said::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(said.looked(start, (false, false)), None);
        assert_eq!(said.looked(start, (false, true)), Some(Say::Begins));
        for second in 0..60 {
            assert_eq!(said.refused(at(second)), None);
            assert_eq!(said.refused(at(second)), None);
            assert_eq!(said.looked(at(second), (true, true)), None);
        }
        assert_eq!(said.looked(at(60), (true, true)), Some(Say::GoesOn(120)));
        // Nobody wanted anything: nothing is to be said.
        assert_eq!(said.looked(at(180), (true, true)), None);
        assert_eq!(said.refused(at(181)), None);
        assert_eq!(said.looked(at(181), (true, true)), Some(Say::GoesOn(1)));
        assert_eq!(said.looked(at(182), (true, false)), Some(Say::Over(121)));
        assert_eq!(said.looked(at(183), (false, false)), None);
    }

    #[test]
    fn what_only_the_system_refuses_is_over_when_it_refuses_nothing_for_a_while() {
        let (mut said, start) = (Said::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(said.refused(start), Some(Say::Begins));
        assert_eq!(said.refused(at(30)), None);
        assert_eq!(said.looked(at(59), (false, false)), None);
        assert_eq!(said.looked(at(60), (false, false)), Some(Say::GoesOn(2)));
        assert_eq!(said.looked(at(89), (false, false)), None);
        assert_eq!(said.looked(at(90), (false, false)), Some(Say::Over(2)));
        assert_eq!(said.refused(at(91)), Some(Say::Begins));
        // The disk is seen to be full by now: that goes on as one.
        assert_eq!(said.looked(at(92), (false, true)), None);
        assert_eq!(said.looked(at(93), (true, false)), Some(Say::Over(1)));
    }
}
