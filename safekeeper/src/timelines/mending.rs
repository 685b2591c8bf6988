//! Timelines that are damaged: taken out of use, and opened again once they were mended (`crate::mend`).

use std::sync::Arc;

use pgstrata_wire::safekeeper::RefusedReason;

use super::slots::Slot;
use super::{TimelineKey, Timelines};
use crate::storage_error::StorageError;
use crate::timeline::Timeline;

impl Timelines {
    /// Those of which others may have what is damaged, and those that could not be opened.
    pub fn mending(&self) -> Vec<TimelineKey> {
        self.slots.mending()
    }

    /// A timeline's log is found to be damaged: it is served no more, votes for nobody and counts for nothing, until it is
    /// mended. Waits for what is under way.
    pub fn take_out(&self, timeline: &Arc<Timeline>, why: &str) {
        let key = (timeline.parameters().tenant, timeline.parameters().timeline);
        // First, so that nothing goes on through it once it is no longer to be found here.
        timeline.retire(why);
        self.slots.take_out(key, timeline, why);
        self.context.shared.meters.found_damage();
        tracing::error!(timeline = %key.1, error = %why, "timeline is served no more until it is mended");
    }

    /// Says what mending a timeline waits for.
    pub fn note_mending(&self, key: TimelineKey, why: String) {
        self.slots.note_mending(key, why);
    }

    /// Whether it could only not be opened, and nothing of it is known to be wrong.
    pub fn is_unopened(&self, key: TimelineKey) -> bool {
        self.slots.is_unopened(key)
    }

    /// Opens a timeline that was mended. If it is damaged still, this is why.
    pub fn reopen(&self, key: TimelineKey) -> Result<(), String> {
        let opened = self.open_one(key, &self.directory_of(key)).inspect_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) && !error.is_of_reading() {
                self.context.shared.latch.throw(&error.to_string());
            }
        });
        opened.map_err(|error| error.to_string())?;
        match self.get(key) {
            Ok(_) | Err(RefusedReason::UnknownTimeline) => Ok(()),
            Err(reason) => Err(reason.to_string()),
        }
    }

    /// Removes a timeline that is damaged and that others keep by now, who have what was here.
    pub fn let_go_damaged(&self, key: TimelineKey) -> Result<(), String> {
        if !self.slots.is_mending(key) && !self.slots.is_unopened(key) {
            return Ok(());
        }
        self.let_go(key, &self.directory_of(key)).map_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.context.shared.latch.throw(&error.to_string());
            }
            error.to_string()
        })
    }

    /// The place of a timeline that could not be opened.
    pub(super) fn slot_of_damaged(&self, key: TimelineKey, error: &StorageError) -> Slot {
        let was_mended = self.slots.is_mending(key);
        match error {
            _ if error.is_mendable() || (was_mended && error.is_of_reading()) => {
                self.context.shared.meters.found_damage();
                Slot::Mending(error.to_string())
            }
            // What could not be written is not written again: it is opened with what is on the device, as a restart does it.
            StorageError::Failed { .. } if !error.is_of_reading() => {
                Slot::Unopened(error.to_string())
            }
            _ => Slot::Damaged(error.to_string()),
        }
    }
}
