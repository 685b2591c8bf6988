//! Timelines at rest with which something is to be done after all.
//!
//! Of most of them the broker says so: others have more, or it can be trimmed here. What it doesn't say is looked for in one
//! timeline after the other, those that are open and settled too: whether other members were decided on, which stands in object
//! storage and needs no timeline to be opened; and, where no broker says anything, what the members have. However many there are, that
//! takes the same small part of the time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::catch_up::{Busy, pull};
use super::{Background, INTERVAL};
use crate::timelines::TimelineKey;

/// Timelines opened in one round.
const AT_ONCE: usize = 32;

/// A look at one timeline is followed by a pause of so many times its length.
const PAUSE_FACTOR: u32 = 50;

/// Each timeline is looked at once within this at most.
const SHORTEST_TURN: Duration = Duration::from_secs(10);

/// So long a broker has time for its first answer.
const BROKER_PATIENCE: Duration = Duration::from_secs(5);

/// Those that are to be opened. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Due(Arc<Mutex<BTreeSet<TimelineKey>>>);

/// Both ends.
pub fn due() -> (Due, Due) {
    let due = Due::default();
    (due.clone(), due)
}

impl Due {
    /// There are no more than there are timelines.
    pub fn add(&self, key: TimelineKey) {
        self.0.lock().insert(key);
    }

    fn take(&self) -> Vec<TimelineKey> {
        let mut due = self.0.lock();
        std::iter::from_fn(|| due.pop_first()).take(AT_ONCE).collect()
    }
}

pub async fn run(background: Background, due: Due, busy: Busy) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last: Option<TimelineKey> = None;
    // What the broker says is heard first.
    let broker_patience = background.broker.as_ref().map_or(Duration::ZERO, |_| BROKER_PATIENCE);
    let mut next_look = Instant::now() + broker_patience;
    let mut began_anew = next_look;
    loop {
        interval.tick().await;
        let handle = Handle::current();
        let keys = due.take();
        let mut looks_at = match Instant::now() >= next_look {
            true => background.timelines.next_after(last),
            false => None,
        };
        if looks_at.is_some() && looks_at <= last {
            // All had their turn.
            let is_early = began_anew.elapsed() < SHORTEST_TURN;
            (looks_at, next_look, began_anew) = match is_early {
                true => (None, began_anew + SHORTEST_TURN, began_anew),
                false => (looks_at, next_look, Instant::now()),
            };
        }
        if keys.is_empty() && looks_at.is_none() {
            continue;
        }
        let (background, busy) = (background.clone(), busy.clone());
        let worked = tokio::task::spawn_blocking(move || {
            for key in keys {
                // The loops that look at what is open do the rest. What can't be opened is in the status, or it comes again.
                if let Err(reason) = background.timelines.get(key) {
                    tracing::info!(timeline = %key.1, %reason, "can't be opened");
                }
            }
            let begun = Instant::now();
            if let Some(key) = looks_at {
                look(&background, &busy, key, &handle);
            }
            begun.elapsed()
        });
        // A panic there is reported by the runtime.
        let took: Duration = worked.await.unwrap_or_default();
        if looks_at.is_some() {
            last = looks_at;
            next_look = Instant::now() + took * PAUSE_FACTOR;
        }
    }
}

/// Looks whether there is something that nobody has said.
fn look(background: &Background, busy: &Busy, key: TimelineKey, handle: &Handle) {
    let timelines = &background.timelines;
    // What is in object storage only is not fetched for a look: nothing of it is to be proven, and whoever goes on with it comes for
    // it.
    let looked = timelines.look_at_decision(key);
    let done = match background.known.is_told() || timelines.is_away(key) || looked.is_err() {
        true => looked,
        false => timelines.get(key).map(|timeline| {
            let turn = busy.begin(key);
            if turn.is_some() && !timeline.is_left() && !timeline.has_proposer() {
                pull(background, &timeline, handle);
            }
        }),
    };
    if let Err(reason) = done {
        tracing::debug!(timeline = %key.1, %reason, "can't be looked at");
    }
}
