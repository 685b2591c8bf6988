//! Opening timelines when somebody needs them, and letting them come to rest when nobody does.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::resting::TimelineSummary;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_wire::safekeeper::RefusedReason;
use rustix::io::Errno;

use super::away::{NotBack, is_sent_away};
use super::slots::{Seen, Slot};
use super::{TimelineKey, Timelines, left_behind};
use crate::storage_error::StorageError;
use crate::timeline::{KEEP, Overview, Timeline, has_marker, is_away, read_control};

/// Longest wait for a timeline that is being opened, or comes to rest. Who asked has given up by then.
const PATIENCE: Duration = Duration::from_secs(30);

/// Timelines that come to rest together: others wait so long for them.
const BATCH: usize = 256;

/// Attempts to let everything come to rest before the process ends, and the pause between them.
const LAST_ATTEMPTS: usize = 5;
const LAST_PAUSE: Duration = Duration::from_millis(20);

/// Whether it may be opened later: nothing of it is wrong.
pub(super) fn is_passing(error: &StorageError) -> bool {
    match error {
        StorageError::DiskFull { .. } => true,
        StorageError::Failed { source, .. } => {
            let code = source.raw_os_error();
            [Errno::MFILE, Errno::NFILE, Errno::NOMEM]
                .iter()
                .any(|errno| Some(errno.raw_os_error()) == code)
        }
        _ => false,
    }
}

impl Timelines {
    /// All that are served, open or at rest.
    pub fn overviews(&self) -> Vec<Overview> {
        self.slots.overviews()
    }

    /// Those that rest.
    pub fn resting(&self) -> Vec<Arc<TimelineSummary>> {
        self.slots.resting()
    }

    /// Those that can't be served, and why, as far as that is known.
    pub fn damaged(&self) -> Vec<(TimelineKey, String)> {
        self.slots.damaged()
    }

    /// Names of all.
    pub fn keys(&self) -> Vec<TimelineKey> {
        self.slots.keys()
    }

    /// Names of those that are open.
    pub fn open_keys(&self) -> Vec<TimelineKey> {
        self.slots.open_keys()
    }

    /// The next name, in an order that begins anew after the last.
    pub fn next_after(&self, key: Option<TimelineKey>) -> Option<TimelineKey> {
        self.slots.next_after(key)
    }

    /// The timeline of that name, if it is open. While anybody has it, it stays so.
    pub fn get_open(&self, key: TimelineKey) -> Option<Arc<Timeline>> {
        match self.slots.see(key) {
            Seen::Open(timeline) => Some(timeline),
            _ => None,
        }
    }

    /// The timeline of that name. One at rest is opened: for threads that may wait for that.
    pub fn get(&self, key: TimelineKey) -> Result<Arc<Timeline>, RefusedReason> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.slots.see(key) {
                Seen::Open(timeline) => return Ok(timeline),
                Seen::Damaged(reason) => return Err(RefusedReason::Storage(reason)),
                // Others may have what is damaged: whoever asks may ask again.
                Seen::Mending(reason) => return Err(RefusedReason::Unavailable(reason)),
                Seen::Nothing => return Err(RefusedReason::UnknownTimeline),
                Seen::Resting => {
                    if let Some(summary) = self.slots.take_resting(key) {
                        return self.open_taken(key, summary, deadline);
                    }
                }
                Seen::Busy(gate) => {
                    if !gate.wait_until(deadline) {
                        return Err(too_slow(key));
                    }
                }
            }
        }
    }

    /// The same for what runs on the threads that serve many.
    pub async fn get_async(
        self: &Arc<Self>,
        key: TimelineKey,
    ) -> Result<Arc<Timeline>, RefusedReason> {
        if let Some(timeline) = self.get_open(key) {
            return Ok(timeline);
        }
        let timelines = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || timelines.get(key)).await;
        found.unwrap_or_else(|error| Err(RefusedReason::Storage(error.to_string())))
    }

    /// The one timeline, if there is just one. May wait, as [`Timelines::get`].
    pub fn only(&self) -> Option<Arc<Timeline>> {
        self.get(self.slots.only()?).ok()
    }

    /// Its name.
    pub fn only_key(&self) -> Option<TimelineKey> {
        self.slots.only()
    }

    fn open_taken(
        &self,
        key: TimelineKey,
        summary: Arc<TimelineSummary>,
        deadline: Instant,
    ) -> Result<Arc<Timeline>, RefusedReason> {
        let Some(_leave) = self.slots.wait_for_leave(deadline) else {
            self.slots.give_back(key, Slot::Resting(summary));
            return Err(too_slow(key));
        };
        // On disk it doesn't rest from now on, before anything is written to it.
        let woken = self.resting_files.wake(key).inspect_err(|error| {
            if !is_passing(error) {
                self.context.shared.latch.throw(&error.to_string());
            }
        });
        if let Err(error) = woken {
            self.slots.give_back(key, Slot::Resting(summary));
            return Err(RefusedReason::Storage(error.to_string()));
        }
        let directory = self.directory_of(key);
        let disk = self.context.shared.disk.as_ref();
        let ready = match has_marker(disk, &directory, KEEP) {
            // For people only: nothing of it is fetched, or opened.
            Ok(true) => {
                let why = left_behind(&directory);
                self.slots.give_back(key, Slot::Damaged(why.clone()));
                return Err(RefusedReason::Storage(why));
            }
            Ok(false) => self.bring_back_if_away(key, &directory),
            Err(error) => Err(NotBack::Storage(error)),
        };
        if let Err(not_back) = ready {
            let text = not_back.to_string();
            let is_said = match &not_back {
                NotBack::Storage(error) => self.context.shared.space.note(error),
                NotBack::Gone(_) | NotBack::Later(_) => false,
            };
            if !is_said {
                tracing::warn!(timeline = %key.1, error = text, "timeline can't be served now");
            }
            // Other members may have what is gone, or object storage again.
            let slot = match not_back {
                NotBack::Gone(_) => Slot::Mending(text.clone()),
                NotBack::Later(_) | NotBack::Storage(_) => Slot::Resting(summary),
            };
            self.slots.give_back(key, slot);
            return Err(RefusedReason::Unavailable(text));
        }
        match Timeline::open(&self.context.shared, &directory) {
            Ok(opened) => {
                let timeline = Arc::new(opened.timeline);
                let removed_bytes = opened.removed_bytes;
                tracing::debug!(timeline = %key.1, removed_bytes, "timeline opened");
                self.slots.give_back(key, Slot::Open(Arc::clone(&timeline)));
                Ok(timeline)
            }
            Err(error) => {
                let text = error.to_string();
                if !self.context.shared.space.note(&error) {
                    tracing::error!(timeline = %key.1, %error, "timeline can't be served");
                }
                let slot = match is_passing(&error) {
                    true => Slot::Resting(summary),
                    false => self.slot_of_damaged(key, &error),
                };
                let is_for_good = matches!(slot, Slot::Damaged(_));
                self.slots.give_back(key, slot);
                Err(match is_for_good {
                    true => RefusedReason::Storage(text),
                    false => RefusedReason::Unavailable(text),
                })
            }
        }
    }

    /// Has the timeline's WAL be here if it was in object storage only. Until it is, the timeline counts for nothing.
    fn bring_back_if_away(&self, key: TimelineKey, directory: &Path) -> Result<(), NotBack> {
        let brought = is_sent_away(&self.context.shared, directory)
            .map_err(NotBack::from)
            // What is wrong with the control file is found, and told of, when the timeline is opened.
            .map(|is_away| if is_away { self.control_of(directory) } else { None })
            .and_then(|control| control.map_or(Ok(()), |control| self.bring_back(key, &control)));
        brought.inspect_err(|not_back| match not_back {
            NotBack::Storage(error) if !is_passing(error) && !error.is_mendable() => {
                self.context.shared.latch.throw(&error.to_string());
            }
            _ => {}
        })
    }

    fn control_of(&self, directory: &Path) -> Option<TimelineControl> {
        read_control(&self.context.shared, &directory.join("control")).ok()
    }

    /// Writes down what rests.
    pub(super) fn store_resting(&self) -> Result<(), StorageError> {
        let own = self.context.shared.own;
        let stored = self.resting_files.store(|| {
            let all = self.slots.resting().into_iter();
            all.filter(|one| one.configuration.contains(own)).collect()
        });
        match stored {
            // The list before is as right, but for what takes how much space.
            Err(error) if self.context.shared.space.note(&error) => Ok(()),
            other => other.inspect_err(|error| self.context.shared.latch.throw(&error.to_string())),
        }
    }

    /// Whether none of its WAL is here: to look at it would fetch it.
    pub fn is_away(&self, key: TimelineKey) -> bool {
        self.slots.summary_of_resting(key).is_some_and(|summary| is_away(&summary))
    }

    /// Lets those of these timelines come to rest that are open, that nobody has, and with which nothing is to be done.
    /// Returns how many did. Waits for the disk.
    pub fn let_rest(&self, keys: &[TimelineKey]) -> Result<usize, StorageError> {
        let mut count = 0;
        for batch in keys.chunks(BATCH) {
            count += self.let_batch_rest(batch)?;
        }
        Ok(count)
    }

    fn let_batch_rest(&self, keys: &[TimelineKey]) -> Result<usize, StorageError> {
        let mut resting: HashMap<TimelineKey, Arc<TimelineSummary>> = HashMap::new();
        for &key in keys {
            let Some(timeline) = self.slots.take_open(key) else { continue };
            match timeline.at_rest() {
                Some(summary) => {
                    timeline.files().let_go();
                    drop(timeline);
                    resting.insert(key, Arc::new(summary));
                }
                None => self.slots.give_back(key, Slot::Open(timeline)),
            }
        }
        if resting.is_empty() {
            return Ok(0);
        }
        let own = self.context.shared.own;
        let stored = self.resting_files.store(|| {
            let all = self.slots.resting().into_iter().chain(resting.values().cloned());
            // What others keep by now is removed at the next start.
            all.filter(|one| one.configuration.contains(own)).collect()
        });
        let count = resting.len();
        for (key, summary) in resting {
            if stored.is_ok() && summary.configuration.contains(own) {
                self.resting_files.has_come_to_rest(key);
            }
            self.slots.give_back(key, Slot::Resting(summary));
        }
        match stored {
            // They are opened at the next start.
            Err(error) if self.context.shared.space.note(&error) => {}
            other => {
                other.inspect_err(|error| self.context.shared.latch.throw(&error.to_string()))?;
            }
        }
        Ok(count)
    }

    /// Forgets where members were.
    pub fn forget_peers(&self) -> anyhow::Result<()> {
        for keys in self.keys().chunks(BATCH) {
            for &key in keys {
                match self.get(key) {
                    Ok(timeline) => {
                        timeline.note_addresses(&[]);
                        timeline.checkpoint()?;
                    }
                    // It is in the status.
                    Err(_) if self.is_damaged(key) => {}
                    Err(reason) => anyhow::bail!("{reason}"),
                }
            }
            self.let_rest(keys)?;
        }
        Ok(())
    }

    fn is_damaged(&self, key: TimelineKey) -> bool {
        matches!(self.slots.see(key), Seen::Damaged(_) | Seen::Mending(_))
    }

    /// Writes down how far everything is, and lets all come to rest that can.
    pub fn rest_all(&self) -> Result<(), StorageError> {
        let keys = self.open_keys();
        for timeline in keys.iter().filter_map(|&key| self.get_open(key)) {
            match timeline.checkpoint() {
                // Taken out in this moment: the next start mends it.
                Err(error) if error.is_mendable() => {}
                written => written?,
            }
        }
        self.let_rest(&keys).map(|_| ())
    }

    /// The same at the end of the process, where those who only look at a timeline are waited for.
    pub fn end(&self) -> Result<(), StorageError> {
        for _ in 0..LAST_ATTEMPTS {
            self.rest_all()?;
            if self.open_keys().is_empty() {
                break;
            }
            std::thread::sleep(LAST_PAUSE);
        }
        Ok(())
    }
}

fn too_slow(key: TimelineKey) -> RefusedReason {
    let seconds = PATIENCE.as_secs();
    let text = format!("timeline {} could not be opened within {seconds} s", key.1);
    RefusedReason::Unavailable(text)
}
