//! Timelines that a commit may wait for: each lacks what the term that it follows began with.

use std::collections::HashSet;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::timelines::TimelineKey;

/// Each is in it once, so that there are no more than timelines.
#[derive(Debug, Default)]
pub struct Wanted {
    keys: Mutex<HashSet<TimelineKey>>,
    more: Notify,
}

impl Wanted {
    /// Has the timeline caught up with as soon as somebody is free.
    pub fn push(&self, key: TimelineKey) {
        self.keys.lock().insert(key);
        self.more.notify_one();
    }

    /// Any of them, which is taken out; waits until there is one.
    pub async fn next(&self) -> TimelineKey {
        loop {
            // In a statement of its own: nothing is held while it is waited.
            let key = self.take();
            match key {
                Some(key) => return key,
                None => self.more.notified().await,
            }
        }
    }

    /// Any of them, if there is one, which is taken out.
    pub fn take(&self) -> Option<TimelineKey> {
        let mut keys = self.keys.lock();
        let key = keys.iter().next().copied()?;
        keys.remove(&key);
        Some(key)
    }
}
