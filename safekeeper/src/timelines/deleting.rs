//! Timelines whose branch was deleted: what is here of them is removed, and what is archived.
//!
//! That they were stands in the timeline's object, for good, so that whoever was away hears of it later, and nothing of that name
//! begins anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::quorum::Quorum;
use pgstrata_wire::safekeeper::RefusedReason;

use super::slots::{Seen, Slot};
use super::{TimelineKey, Timelines};
use crate::storage_error::StorageError;

/// Longest wait for those who still read from a timeline, or archive it.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// Refuses what is deleted.
pub(super) fn refuse_deleted(decided: &Quorum) -> Result<(), RefusedReason> {
    match decided.is_deleted {
        false => Ok(()),
        true => {
            let id = decided.parameters.timeline;
            Err(RefusedReason::Mismatch(format!("timeline {id} was deleted with its branch")))
        }
    }
}

impl Timelines {
    /// Removes a timeline of which it is decided that it is deleted. For a thread that may wait. Where this ends early it begins
    /// again, as long as the timeline's directory is there.
    pub(super) fn delete(&self, decided: &Quorum) -> Result<(), RefusedReason> {
        let parameters = &decided.parameters;
        let key = (parameters.tenant, parameters.timeline);
        const WHY: &str = "the timeline was deleted";
        let summary = match self.slots.see(key) {
            Seen::Open(timeline) => {
                let summary = timeline.overview().summary;
                // First, so that nothing goes on through it.
                timeline.retire(WHY);
                self.slots.end(key, &timeline, WHY);
                let deadline = Instant::now() + PATIENCE;
                while Arc::strong_count(&timeline) > 1 && Instant::now() < deadline {
                    std::thread::sleep(PAUSE);
                }
                summary
            }
            Seen::Resting => match self.slots.take_resting(key) {
                Some(summary) => {
                    self.slots.give_back(key, Slot::Damaged(WHY.to_owned()));
                    summary
                }
                None => return Ok(()),
            },
            // Somebody is at it, or mends it; or its files are to be looked at by people.
            Seen::Busy(_) | Seen::Damaged(_) | Seen::Mending(_) | Seen::Nothing => return Ok(()),
        };
        // What can't be removed now is looked at again.
        self.remove_deleted(key, decided)
            .inspect_err(|_| self.slots.insert(key, Slot::Resting(summary)))
    }

    /// The same where nothing is done with it until it is mended, for whoever would mend it.
    pub fn delete_damaged(&self, decided: &Quorum) -> Result<(), RefusedReason> {
        let key = (decided.parameters.tenant, decided.parameters.timeline);
        match self.slots.is_mending(key) || self.slots.is_unopened(key) {
            true => self.remove_deleted(key, decided),
            false => Ok(()),
        }
    }

    fn remove_deleted(&self, key: TimelineKey, decided: &Quorum) -> Result<(), RefusedReason> {
        // Who deleted the branch has removed it; what was on its way then comes after.
        if let Some(archive) = &self.context.archive {
            let removed =
                self.context.decisions.runtime().block_on(archive.remove_all(&decided.parameters));
            if let Err(error) = removed {
                tracing::warn!(timeline = %key.1, error, "WAL of a deleted timeline is left in object storage");
            }
        }
        let directory = self.directory_of(key);
        tracing::info!(timeline = %key.1, "its branch was deleted");
        self.let_go(key, &directory).map_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.context.shared.latch.throw(&error.to_string());
            }
            RefusedReason::Storage(error.to_string())
        })
    }
}
