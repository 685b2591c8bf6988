//! How far members are behind what is known to be committed.
//!
//! Of other members it is known what the broker last said, also of one that it has forgotten since: such a one falls
//! behind more and more, as it seems from here. Without a broker nothing is known of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use pgstrata_ids::{Lsn, NodeId};

use super::Known;
use crate::timeline::Overview;
use crate::timelines::{TimelineKey, Timelines};

/// Of all timelines, as of the last look. Who reads it waits for two pointers to be copied.
#[derive(Debug, Default)]
pub struct Lags(RwLock<Seen>);

type LagsOf = HashMap<TimelineKey, Vec<Lag>>;

/// What was last seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    open: Arc<LagsOf>,
    /// Of those at rest only what the broker says changes: they are looked at when it has said something new.
    resting: Arc<LagsOf>,
    listings: Option<u64>,
}

impl Seen {
    /// How far members are with a timeline.
    pub fn of(&self, key: TimelineKey) -> &[Lag] {
        let found = self.open.get(&key).or_else(|| self.resting.get(&key));
        found.map_or(&[], Vec::as_slice)
    }
}

/// How far one member is with one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lag {
    /// The member's node.
    pub node: NodeId,
    /// Committed WAL that it doesn't have, in bytes.
    pub bytes: u64,
    flush_lsn: Lsn,
    /// What was committed at a time, which it has not reached since.
    waits_for: Option<(Lsn, Instant)>,
}

impl Lag {
    fn new(node: NodeId) -> Lag {
        Lag { node, bytes: 0, flush_lsn: Lsn::INVALID, waits_for: None }
    }

    /// For so long there has been WAL that it doesn't have yet; nothing if it has all of it. Of one that is always so far
    /// behind, it rises up to that and begins anew.
    pub fn time(&self, now: Instant) -> Duration {
        self.waits_for.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since))
    }

    /// What is known a moment later.
    fn next(self, flush_lsn: Option<Lsn>, committed: Lsn, now: Instant) -> Lag {
        let flush_lsn = flush_lsn.unwrap_or(self.flush_lsn);
        let bytes = committed.saturating_sub(flush_lsn);
        let waits_for = match self.waits_for {
            Some((lsn, since)) if flush_lsn < lsn => Some((lsn, since)),
            _ => (bytes > 0).then_some((committed, now)),
        };
        Lag { node: self.node, bytes, flush_lsn, waits_for }
    }
}

impl Lags {
    /// What was last seen.
    pub fn last(&self) -> Seen {
        self.0.read().clone()
    }

    /// Looks at all timelines. Of many this takes a while, and nobody waits for it.
    pub fn look(&self, timelines: &Timelines, known: &Known) {
        let (before, now) = (self.last(), Instant::now());
        let own = timelines.context().shared.own;
        let look = |all: &mut dyn Iterator<Item = Overview>| -> Arc<LagsOf> {
            let mut lags = HashMap::new();
            for timeline in all {
                let configuration = &timeline.summary.configuration;
                if !configuration.is_known() || configuration.contains(own) {
                    let key = timeline.key();
                    lags.insert(key, of(&timeline, own.node, known, before.of(key), now));
                }
            }
            Arc::new(lags)
        };
        let keys = timelines.open_keys().into_iter();
        let open = keys.filter_map(|key| Some(timelines.get_open(key)?.overview()));
        let open = look(&mut { open });
        let listings = known.count();
        let resting = match before.listings == Some(listings) {
            true => Arc::clone(&before.resting),
            false => look(&mut timelines.resting().into_iter().map(Overview::of_resting)),
        };
        *self.0.write() = Seen { open, resting, listings: Some(listings) };
    }
}

fn of(timeline: &Overview, own: NodeId, known: &Known, before: &[Lag], now: Instant) -> Vec<Lag> {
    let (key, summary) = (timeline.key(), &timeline.summary);
    let committed = known.highest(key, |progress| progress.commit_lsn).max(summary.commit_lsn);
    let committed = committed.max(timeline.catch_up_target);
    let lag = |node: NodeId| {
        let before = before.iter().find(|lag| lag.node == node).copied();
        let flush_lsn = match node == own {
            true => Some(summary.flush_lsn),
            false => known.progress(node, key).map(|progress| progress.flush_lsn),
        };
        // One of which nothing was ever heard may have all of it.
        (before.is_some() || flush_lsn.is_some())
            .then(|| before.unwrap_or_else(|| Lag::new(node)).next(flush_lsn, committed, now))
    };
    summary.configuration.nodes().into_iter().filter_map(lag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_as_many_seconds_behind_as_what_it_lacks_is_old() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let told = |lag: Lag, flush: Option<u64>, committed: u64, seconds: u64| {
            let next = lag.next(flush.map(Lsn), Lsn(committed), at(seconds));
            (next, (next.bytes, next.time(at(seconds)).as_secs()))
        };
        let (lag, said) = told(Lag::new(NodeId(2)), Some(100), 100, 0);
        assert_eq!(said, (0, 0));
        // It keeps up: news of it are old, and what it lacked is there each time.
        let (lag, said) = told(lag, Some(100), 150, 1);
        assert_eq!(said, (50, 0));
        let (lag, said) = told(lag, Some(150), 200, 2);
        assert_eq!(said, (50, 0));
        // It does not go on, and then is not heard of any more.
        let (lag, said) = told(lag, Some(150), 300, 5);
        assert_eq!(said, (150, 3));
        let (lag, said) = told(lag, None, 400, 60);
        assert_eq!(said, (250, 58));
        // What it lacked first is there, and not all; then all.
        let (lag, said) = told(lag, Some(200), 400, 61);
        assert_eq!(said, (200, 0));
        let (lag, said) = told(lag, Some(300), 400, 70);
        assert_eq!(said, (100, 9));
        assert_eq!(told(lag, Some(400), 400, 71).1, (0, 0));
    }
}
