//! Timelines for those who follow the log. A safekeeper that was started just now, or was cut off, may not have heard that it was given
//! up: nobody follows it before it has looked where that is decided.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgstrata_wire::safekeeper::RefusedReason;

use super::{TimelineKey, Timelines};
use crate::timeline::Timeline;

/// It is not looked at again for so long: those who follow come and go.
const GOOD_FOR: Duration = Duration::from_secs(5);

/// When each was looked at last. There are no more than there are timelines that somebody followed.
#[derive(Debug, Default)]
pub struct Looks(Mutex<HashMap<TimelineKey, Instant>>);

impl Looks {
    fn last(&self, key: TimelineKey) -> Option<Instant> {
        self.0.lock().get(&key).copied()
    }

    fn note(&self, key: TimelineKey) {
        self.0.lock().insert(key, Instant::now());
    }

    /// It was removed, or is not to be followed.
    fn forget(&self, key: TimelineKey) {
        self.0.lock().remove(&key);
    }
}

impl Timelines {
    /// As [`Timelines::get`], for one whose log somebody wants to follow. May wait for object storage.
    pub fn get_to_follow(&self, key: TimelineKey) -> Result<Arc<Timeline>, RefusedReason> {
        let last = self.looks.last(key);
        if last.is_none_or(|last| last.elapsed() >= GOOD_FOR) {
            match self.look_at_decision(key) {
                // One that is not known yet was not looked at.
                Ok(()) if self.slots.configuration_number(key).is_none() => {}
                Ok(()) => self.looks.note(key),
                // It was a member after it was started, and hears of it as others do while object storage is away. That is waited for
                // once, and not by everybody who comes.
                Err(RefusedReason::Unavailable(_)) if last.is_some() => self.looks.note(key),
                Err(reason) => {
                    self.looks.forget(key);
                    return Err(reason);
                }
            }
        }
        let timeline = self.get(key).inspect_err(|_| self.looks.forget(key))?;
        match timeline.is_left() {
            true => Err(RefusedReason::UnknownTimeline),
            false => Ok(timeline),
        }
    }

    /// The same for what runs on the threads that serve many.
    pub async fn get_to_follow_async(
        self: &Arc<Self>,
        key: TimelineKey,
    ) -> Result<Arc<Timeline>, RefusedReason> {
        let timelines = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || timelines.get_to_follow(key)).await;
        found.unwrap_or_else(|error| Err(RefusedReason::Storage(error.to_string())))
    }
}
