//! Letting timelines come to rest that nobody has needed for a while.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::resting::TimelineSummary;
use pgstrata_ids::{Lsn, Term};

use super::{Background, INTERVAL};
use crate::timeline::{Timeline, is_away};
use crate::timelines::{MOST_OPEN, TimelineKey};

/// Where too many are open, they come to rest so long after the last that happened with them.
const SHORTEST: Duration = Duration::from_secs(10);

/// Time between two lists of what rests, which are written whole, in seconds.
const BETWEEN_LISTS: Duration = Duration::from_secs(30);

/// Timelines of which WAL is removed in one round.
const AWAY_AT_ONCE: usize = 64;

/// Until the process ends. It waits for the disk, so this is a thread's.
pub fn run(background: &Background) {
    let mut watch = Watch::default();
    let between = BETWEEN_LISTS.min(background.rest_after);
    let mut written_at: Option<Instant> = None;
    let mut resting = Resting::default();
    let mut looked_at: Option<Instant> = None;
    loop {
        std::thread::sleep(INTERVAL);
        let timelines = &background.timelines;
        let open = timelines.open_keys();
        watch.keep(&open);
        let now = Instant::now();
        for &key in &open {
            let Some(timeline) = timelines.get_open(key) else { continue };
            watch.look(key, State::of(&timeline), now);
        }
        if let Some(away_after) = background.away_after
            && looked_at.is_none_or(|at| now - at >= BETWEEN_LISTS.min(away_after))
        {
            looked_at = Some(now);
            let of = |one: &Arc<TimelineSummary>| (one.parameters.tenant, one.parameters.timeline);
            let here = timelines.resting().into_iter().filter(|one| !is_away(one));
            let keys = resting.for_long(here.map(|one| of(&one)).collect(), now, away_after);
            match timelines.send_away(&keys) {
                Ok(0) => {}
                Ok(count) => {
                    tracing::info!(count, "the WAL of timelines at rest is in object storage only")
                }
                // The latch is thrown: the process is about to end.
                Err(error) => tracing::error!(%error, "WAL that is archived could not be removed"),
            }
        }
        if written_at.is_some_and(|at| at.elapsed() < between) {
            continue;
        }
        let idle = watch.idle(now, background.rest_after);
        match timelines.let_rest(&idle) {
            Ok(0) => {}
            Ok(count) => {
                tracing::debug!(count, "timelines came to rest");
                written_at = Some(Instant::now());
            }
            // The latch is thrown: the process is about to end.
            Err(error) => tracing::error!(%error, "what rests could not be written down"),
        }
    }
}

/// Since when each timeline rests that has WAL here.
#[derive(Debug, Default)]
struct Resting(HashMap<TimelineKey, Instant>);

impl Resting {
    /// Those of these that have rested for so long, a few at a time, which then begin anew: what can't be sent away now is tried
    /// again as much later.
    fn for_long(
        &mut self,
        here: HashSet<TimelineKey>,
        now: Instant,
        long: Duration,
    ) -> Vec<TimelineKey> {
        self.0.retain(|key, _| here.contains(key));
        let mut keys = Vec::new();
        for key in here {
            let since = self.0.entry(key).or_insert(now);
            if keys.len() < AWAY_AT_ONCE && now.saturating_duration_since(*since) >= long {
                *since = now;
                keys.push(key);
            }
        }
        keys
    }
}

/// What changes when something happens with a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    term: Term,
    flush_lsn: Lsn,
    commit_lsn: Lsn,
    configuration: u64,
    /// Whether somebody else has it: whoever reads, writes or does something with it.
    is_used: bool,
}

impl State {
    /// Of one that whoever looks has once himself, beside its place.
    fn of(timeline: &Arc<Timeline>) -> State {
        State {
            term: timeline.term(),
            flush_lsn: timeline.flush_lsn(),
            commit_lsn: timeline.commit_lsn(),
            configuration: timeline.configuration_number(),
            is_used: Arc::strong_count(timeline) > 2,
        }
    }
}

/// Since when nothing has happened with each open timeline.
#[derive(Debug, Default)]
struct Watch(HashMap<TimelineKey, (State, Instant)>);

impl Watch {
    /// Forgets all but these, which are in order.
    fn keep(&mut self, open: &[TimelineKey]) {
        self.0.retain(|key, _| open.binary_search(key).is_ok());
    }

    fn look(&mut self, key: TimelineKey, state: State, now: Instant) {
        let seen = self.0.entry(key).or_insert((state, now));
        if seen.0 != state || state.is_used {
            *seen = (state, now);
        }
    }

    /// Those with which nothing has happened for so long; where there are too many, those for which that is so for longest.
    fn idle(&self, now: Instant, rest_after: Duration) -> Vec<TimelineKey> {
        let quiet = |since: Instant| now.saturating_duration_since(since);
        let mut idle: Vec<(Instant, TimelineKey)> = self
            .0
            .iter()
            .filter(|(_, (_, since))| quiet(*since) >= rest_after.min(SHORTEST))
            .map(|(key, (_, since))| (*since, *key))
            .collect();
        idle.sort_unstable();
        let too_many = self.0.len().saturating_sub(MOST_OPEN);
        let chosen = idle.into_iter().enumerate();
        let chosen = chosen.filter(|(n, (since, _))| *n < too_many || quiet(*since) >= rest_after);
        chosen.map(|(_, (_, key))| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{TenantId, TimelineId};

    use super::*;

    fn key(n: usize) -> TimelineKey {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_be_bytes());
        (TenantId([1; 16]), TimelineId(id))
    }

    fn state(flush: u64, is_used: bool) -> State {
        let (flush_lsn, commit_lsn) = (Lsn(flush), Lsn(1));
        State { term: Term(1), flush_lsn, commit_lsn, configuration: 1, is_used }
    }

    #[test]
    fn what_nothing_happens_with_is_idle() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let rest_after = Duration::from_secs(60);
        let mut watch = Watch::default();
        for seconds in 0..100 {
            watch.look(key(1), state(5, false), at(seconds));
            watch.look(key(2), state(5, seconds == 50), at(seconds));
            watch.look(key(3), state(5 + seconds / 90, false), at(seconds));
            watch.look(key(4), state(seconds, false), at(seconds));
        }
        assert_eq!(watch.idle(at(59), rest_after), []);
        assert_eq!(watch.idle(at(100), rest_after), [key(1)]);
        assert_eq!(watch.idle(at(111), rest_after), [key(1), key(2)]);
        assert_eq!(watch.idle(at(150), rest_after), [key(1), key(2), key(3)]);
        watch.keep(&[key(2), key(4)]);
        assert_eq!(watch.idle(at(200), rest_after), [key(2), key(4)]);
    }

    #[test]
    fn where_too_many_are_open_those_rest_sooner_that_were_needed_longest_ago() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut watch = Watch::default();
        for n in 0..MOST_OPEN + 3 {
            let used_at = if n % 100 == 7 { 1 } else { 2 };
            watch.look(key(n), state(1, false), at(used_at));
        }
        let idle = |seconds| watch.idle(at(seconds), Duration::from_secs(300));
        assert_eq!(idle(10), []);
        assert_eq!(idle(11), [key(7), key(107), key(207)]);
        assert_eq!(idle(12).len(), 3);
        assert_eq!(idle(302).len(), MOST_OPEN + 3);
    }
}
