//! The place of each timeline: open, at rest, on the way from one to the other, or damaged.
//!
//! There is one [`Timeline`] of a directory at most. Who opens or closes one has its place for himself meanwhile; others wait
//! for that at the place's gate, and nobody holds the map for longer than a look at it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};
use pgstrata_format::resting::TimelineSummary;

use super::TimelineKey;
use crate::timeline::{Overview, Timeline};

/// Timelines that are opened at once: each reads a segment or two, in buffers of that size.
const OPENINGS: usize = 4;

/// A timeline's place.
#[derive(Debug)]
pub enum Slot {
    /// It is served, and in memory.
    Open(Arc<Timeline>),
    /// It is served, and opened when somebody needs it.
    Resting(Arc<TimelineSummary>),
    /// Somebody opens it, or lets it come to rest.
    Busy(Arc<Gate>, Arc<TimelineSummary>),
    /// Its files can't be used, for this reason. The others are served all the same.
    Damaged(String),
    /// Segments of it can't, for this reason, and are fetched from others: `crate::mend`.
    Mending(String),
    /// It could not be opened, for this reason, and nothing of it is wrong: that is tried again.
    Unopened(String),
}

/// What one finds at a timeline's place.
#[derive(Debug)]
pub enum Seen {
    Open(Arc<Timeline>),
    Resting,
    Busy(Arc<Gate>),
    Damaged(String),
    Mending(String),
    Nothing,
}

/// Those who wait for a place.
#[derive(Debug, Default)]
pub struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// False if it did not open in time.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let mut is_open = self.is_open.lock();
        while !*is_open {
            if self.opened.wait_until(&mut is_open, deadline).timed_out() {
                return *is_open;
            }
        }
        true
    }

    fn open(&self) {
        *self.is_open.lock() = true;
        self.opened.notify_all();
    }
}

/// See the module.
#[derive(Debug)]
pub struct Slots {
    map: RwLock<HashMap<TimelineKey, Slot>>,
    /// How many more may be opened at once.
    openings: Mutex<usize>,
    opened: Condvar,
}

/// Leave to open a timeline, until it is dropped.
#[derive(Debug)]
pub struct Leave<'a>(&'a Slots);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        *self.0.openings.lock() += 1;
        self.0.opened.notify_one();
    }
}

impl Slots {
    pub fn new() -> Slots {
        Slots { map: RwLock::default(), openings: Mutex::new(OPENINGS), opened: Condvar::new() }
    }

    /// Waits for its turn to open a timeline; `None` if it doesn't come in time.
    pub fn wait_for_leave(&self, deadline: Instant) -> Option<Leave<'_>> {
        let mut openings = self.openings.lock();
        while *openings == 0 {
            if self.opened.wait_until(&mut openings, deadline).timed_out() && *openings == 0 {
                return None;
            }
        }
        *openings -= 1;
        Some(Leave(self))
    }

    pub fn see(&self, key: TimelineKey) -> Seen {
        match self.map.read().get(&key) {
            Some(Slot::Open(timeline)) => Seen::Open(Arc::clone(timeline)),
            Some(Slot::Resting(_)) => Seen::Resting,
            Some(Slot::Busy(gate, _)) => Seen::Busy(Arc::clone(gate)),
            Some(Slot::Damaged(reason)) => Seen::Damaged(reason.clone()),
            Some(Slot::Mending(reason) | Slot::Unopened(reason)) => Seen::Mending(reason.clone()),
            None => Seen::Nothing,
        }
    }

    /// Number of the configuration that is known of a timeline that is served.
    pub fn configuration_number(&self, key: TimelineKey) -> Option<u64> {
        match self.map.read().get(&key)? {
            Slot::Open(timeline) => Some(timeline.configuration_number()),
            Slot::Resting(summary) | Slot::Busy(_, summary) => Some(summary.configuration.number()),
            Slot::Damaged(_) | Slot::Mending(_) | Slot::Unopened(_) => None,
        }
    }

    /// Whether there is one of that name.
    pub fn has(&self, key: TimelineKey) -> bool {
        self.map.read().contains_key(&key)
    }

    pub fn len(&self) -> usize {
        self.map.read().len()
    }

    /// Puts a timeline where none was.
    pub fn insert(&self, key: TimelineKey, slot: Slot) {
        self.map.write().insert(key, slot);
    }

    /// Forgets one that is not open, if it is there.
    pub fn remove(&self, key: TimelineKey) {
        let removed = self.map.write().remove(&key);
        debug_assert!(!matches!(removed, Some(Slot::Open(_) | Slot::Busy(..))), "{removed:?}");
    }

    /// Takes one that rests for oneself, to open it.
    pub fn take_resting(&self, key: TimelineKey) -> Option<Arc<TimelineSummary>> {
        let mut map = self.map.write();
        let slot = map.get_mut(&key)?;
        let Slot::Resting(summary) = slot else { return None };
        let summary = Arc::clone(summary);
        *slot = Slot::Busy(Arc::default(), Arc::clone(&summary));
        Some(summary)
    }

    /// Takes one that is open and that nobody else has.
    pub fn take_open(&self, key: TimelineKey) -> Option<Arc<Timeline>> {
        let mut map = self.map.write();
        let slot = map.get_mut(&key)?;
        let Slot::Open(timeline) = slot else { return None };
        // Nobody can get it meanwhile but from here, and nobody has a weak one.
        if Arc::strong_count(timeline) > 1 {
            return None;
        }
        let summary = timeline.overview().summary;
        match std::mem::replace(slot, Slot::Busy(Arc::default(), summary)) {
            Slot::Open(timeline) => Some(timeline),
            other => {
                *slot = other;
                None
            }
        }
    }

    /// Gives a place back that was taken.
    pub fn give_back(&self, key: TimelineKey, slot: Slot) {
        let before = self.map.write().insert(key, slot);
        match before {
            Some(Slot::Busy(gate, _)) => gate.open(),
            other => debug_assert!(false, "a place was given back that nobody had: {other:?}"),
        }
    }

    /// Names of all.
    pub fn keys(&self) -> Vec<TimelineKey> {
        self.map.read().keys().copied().collect()
    }

    /// Names of those that are open, in order.
    pub fn open_keys(&self) -> Vec<TimelineKey> {
        let is_open = |slot: &Slot| matches!(slot, Slot::Open(_));
        let map = self.map.read();
        let open = map.iter().filter(|(_, slot)| is_open(slot));
        let mut keys: Vec<TimelineKey> = open.map(|(key, _)| *key).collect();
        keys.sort_unstable();
        keys
    }

    /// What is known of those that rest.
    pub fn resting(&self) -> Vec<Arc<TimelineSummary>> {
        let map = self.map.read();
        let resting = map.values().filter_map(|slot| match slot {
            Slot::Resting(summary) => Some(Arc::clone(summary)),
            _ => None,
        });
        resting.collect()
    }

    /// What is known of one that rests.
    pub fn summary_of_resting(&self, key: TimelineKey) -> Option<Arc<TimelineSummary>> {
        match self.map.read().get(&key)? {
            Slot::Resting(summary) => Some(Arc::clone(summary)),
            _ => None,
        }
    }

    /// All that are served.
    pub fn overviews(&self) -> Vec<Overview> {
        let map = self.map.read();
        let served = map.values().filter_map(|slot| match slot {
            Slot::Open(timeline) => Some(timeline.overview()),
            Slot::Resting(summary) => Some(Overview::of_resting(Arc::clone(summary))),
            // It has files open, still or soon.
            Slot::Busy(_, summary) => {
                Some(Overview { is_open: true, ..Overview::of_resting(Arc::clone(summary)) })
            }
            Slot::Damaged(_) | Slot::Mending(_) | Slot::Unopened(_) => None,
        });
        served.collect()
    }

    /// Those of which it is not known here who the members are; what is damaged may be of them.
    pub fn undecided(&self) -> Vec<TimelineKey> {
        let map = self.map.read();
        let undecided = map.iter().filter(|(_, slot)| match slot {
            Slot::Open(timeline) => !timeline.configuration().is_known(),
            Slot::Resting(summary) | Slot::Busy(_, summary) => !summary.configuration.is_known(),
            Slot::Damaged(_) | Slot::Mending(_) | Slot::Unopened(_) => true,
        });
        undecided.map(|(key, _)| *key).collect()
    }

    /// Those that can't be served, and why.
    pub fn damaged(&self) -> Vec<(TimelineKey, String)> {
        let map = self.map.read();
        let damaged = map.iter().filter_map(|(key, slot)| match slot {
            Slot::Damaged(reason) | Slot::Mending(reason) | Slot::Unopened(reason) => {
                Some((*key, reason.clone()))
            }
            _ => None,
        });
        damaged.collect()
    }

    /// Those of which others may have what is damaged, and those that could not be opened.
    pub fn mending(&self) -> Vec<TimelineKey> {
        let map = self.map.read();
        let is_one = |slot: &Slot| matches!(slot, Slot::Mending(_) | Slot::Unopened(_));
        let mending = map.iter().filter(|(_, slot)| is_one(slot));
        mending.map(|(key, _)| *key).collect()
    }

    /// Says why it can't be served yet, if it is being mended. False if it isn't.
    pub fn note_mending(&self, key: TimelineKey, why: String) -> bool {
        match self.map.write().get_mut(&key) {
            Some(Slot::Mending(reason) | Slot::Unopened(reason)) => {
                *reason = why;
                true
            }
            _ => false,
        }
    }

    /// Has one mended that is open.
    pub fn take_out(&self, key: TimelineKey, timeline: &Arc<Timeline>, why: &str) {
        if let Some(slot) = self.map.write().get_mut(&key)
            && matches!(slot, Slot::Open(open) if Arc::ptr_eq(open, timeline))
        {
            *slot = Slot::Mending(why.to_owned());
        }
    }

    /// Serves one that is open no more.
    pub fn end(&self, key: TimelineKey, timeline: &Arc<Timeline>, why: &str) {
        if let Some(slot) = self.map.write().get_mut(&key)
            && matches!(slot, Slot::Open(open) if Arc::ptr_eq(open, timeline))
        {
            *slot = Slot::Damaged(why.to_owned());
        }
    }

    /// Whether it is being mended.
    pub fn is_mending(&self, key: TimelineKey) -> bool {
        matches!(self.map.read().get(&key), Some(Slot::Mending(_)))
    }

    /// Whether it is to be opened when that can be done.
    pub fn is_unopened(&self, key: TimelineKey) -> bool {
        matches!(self.map.read().get(&key), Some(Slot::Unopened(_)))
    }

    /// The name of the only one, if there is just one.
    pub fn only(&self) -> Option<TimelineKey> {
        let map = self.map.read();
        map.keys().next().copied().filter(|_| map.len() == 1)
    }

    /// The first name after `key`, or the first one.
    pub fn next_after(&self, key: Option<TimelineKey>) -> Option<TimelineKey> {
        let map = self.map.read();
        let after = map.keys().filter(|&&other| key.is_none_or(|key| other > key)).min();
        after.or_else(|| map.keys().min()).copied()
    }
}
