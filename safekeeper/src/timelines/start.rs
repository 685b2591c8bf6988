//! What a safekeeper does with its timelines when it starts.
//!
//! Those at rest are only listed. The others, which were open when the process ended, are opened before anything is served: a
//! crash may have left something of them half done, and there may be a tail that is to be proven, or WAL to be archived, which
//! nobody would come for.

use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use pgstrata_env::Disk;
use pgstrata_format::resting::TimelineSummary;
use pgstrata_ids::{TenantId, TimelineId};

use super::away::summary_of;
use super::following::Looks;
use super::opening::is_passing;
use super::resting::RestingFiles;
use super::slots::{Slot, Slots};
use super::{MOST_OPEN, TimelineKey, Timelines, TimelinesContext, left_behind};
use crate::ledger::Ledger;
use crate::storage_error::StorageError;
use crate::timeline::{AWAY, KEEP, Timeline, read_control};
use crate::wanted::Wanted;

/// So many are opened between looks whether too many are.
const BATCH: usize = 256;

impl Timelines {
    /// Finds everything in `directory`, and opens what is not at rest.
    pub fn open(context: TimelinesContext, directory: &Path) -> Result<Timelines, StorageError> {
        let disk = &context.shared.disk;
        let ledger = Ledger::open(Arc::clone(disk), directory, context.has_list)?;
        let node = context.shared.own.node;
        let (resting_files, found) = RestingFiles::open(Arc::clone(disk), directory, node)?;
        let key = |one: &TimelineSummary| (one.parameters.tenant, one.parameters.timeline);
        let mut resting: HashMap<TimelineKey, TimelineSummary> =
            found.resting.into_iter().map(|one| (key(&one), one)).collect();
        let timelines = Timelines {
            context,
            directory: directory.to_owned(),
            slots: Slots::new(),
            creating: Mutex::new(()),
            ledger,
            resting_files,
            wanted: Wanted::default(),
            looks: Looks::default(),
            are_undecided_noted: AtomicBool::new(false),
        };
        let mut opened = 0;
        for name in timelines.list(directory)? {
            let Ok(tenant) = name.parse::<TenantId>() else { continue };
            let of_tenant = directory.join(name);
            for name in timelines.list(&of_tenant)? {
                let inside = of_tenant.join(&name);
                if name.ends_with(".left") {
                    remove_left(timelines.context.shared.disk.as_ref(), &inside);
                }
                let Ok(timeline) = name.parse::<TimelineId>() else { continue };
                let key = (tenant, timeline);
                if let Some(summary) = resting.remove(&key) {
                    timelines.slots.insert(key, Slot::Resting(Arc::new(summary)));
                    continue;
                }
                timelines.open_one(key, &inside)?;
                opened += 1;
                if opened % BATCH == 0 && timelines.slots.open_keys().len() > MOST_OPEN {
                    match timelines.rest_all() {
                        // Then they stay open.
                        Err(StorageError::DiskFull { .. }) => {}
                        other => other?,
                    }
                }
            }
        }
        timelines.drop_marks(&found.awake)?;
        timelines.compare_with_ledger()?;
        Ok(timelines)
    }

    /// What was open when the process ended is in no list any more, and so is what was removed just now.
    fn drop_marks(&self, marks: &BTreeSet<String>) -> Result<(), StorageError> {
        if marks.is_empty() {
            return Ok(());
        }
        match self.resting_files.store(|| self.slots.resting()) {
            Ok(()) => self.resting_files.remove_marks(marks),
            Err(StorageError::DiskFull { .. }) => {
                tracing::warn!("the disk is full: what rests can't be written down");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// What is here was here before, whether or not that was noted; what is noted and not here is lost.
    fn compare_with_ledger(&self) -> Result<(), StorageError> {
        match self.ledger.add(self.slots.keys()) {
            // What is here is served all the same; the next start tries again.
            Err(StorageError::DiskFull { .. }) => {
                tracing::warn!("the disk is full: the list of timelines lacks some that are here");
            }
            added => added?,
        }
        for key in self.ledger.entries().into_iter().filter(|&key| !self.slots.has(key)) {
            let directory = self.directory_of(key);
            let text = format!(
                "{} is gone: what this safekeeper promised and stored of the timeline is lost, and it takes no part \
                 in it until it is made a member anew, with a new directory",
                directory.display()
            );
            tracing::error!(timeline = %key.1, error = %text, "timeline can't be served");
            self.slots.insert(key, Slot::Damaged(text));
        }
        Ok(())
    }

    pub(super) fn list(&self, directory: &Path) -> Result<Vec<String>, StorageError> {
        let names = self.context.shared.disk.list(directory);
        names.map_err(StorageError::wrap("list", directory))
    }

    pub(super) fn open_one(&self, key: TimelineKey, directory: &Path) -> Result<(), StorageError> {
        let names = self.list(directory)?;
        if !names.iter().any(|name| name == "control") {
            let has_wal = names.iter().any(|name| name.len() == 24);
            if !has_wal {
                // A crash while it was created: nobody was told that it exists.
                return Ok(());
            }
        }
        if names.iter().any(|name| name == KEEP) {
            // Also where it never took who the members are by now. It is for people only: nothing of it is opened, or cut.
            let text = left_behind(directory);
            tracing::error!(timeline = %key.1, error = %text, "timeline can't be served");
            self.slots.insert(key, Slot::Damaged(text));
            return Ok(());
        }
        if names.iter().any(|name| name == AWAY)
            && let Some(summary) = self.summary_if_away(directory)
        {
            self.slots.insert(key, Slot::Resting(Arc::new(summary)));
            return Ok(());
        }
        let slot = match Timeline::open(&self.context.shared, directory) {
            Ok(opened) if opened.timeline.is_left() => {
                drop(opened);
                return self.let_go(key, directory);
            }
            Ok(opened) => {
                let timeline = opened.timeline;
                tracing::info!(
                    timeline = %key.1,
                    term = %timeline.term(),
                    flush_lsn = %timeline.flush_lsn(),
                    commit_lsn = %timeline.commit_lsn(),
                    removed_bytes = opened.removed_bytes,
                    "timeline opened"
                );
                Slot::Open(Arc::new(timeline))
            }
            // Mended it would be removed all the same.
            Err(error)
                if (error.is_mendable() || is_passing(&error)) && self.was_left(directory) =>
            {
                return self.let_go(key, directory);
            }
            Err(error) if is_passing(&error) => {
                tracing::error!(timeline = %key.1, %error, "timeline can't be opened now");
                Slot::Unopened(error.to_string())
            }
            Err(error) => {
                tracing::error!(timeline = %key.1, %error, "timeline can't be served");
                self.slot_of_damaged(key, &error)
            }
        };
        self.slots.insert(key, slot);
        Ok(())
    }

    /// What is known of a timeline whose WAL is in object storage, if it is a member's: it is fetched when somebody needs it. Of
    /// others there is nothing to fetch.
    fn summary_if_away(&self, directory: &Path) -> Option<TimelineSummary> {
        let control = read_control(&self.context.shared, &directory.join("control")).ok()?;
        let configuration = &control.state.configuration;
        let is_left = configuration.is_known() && !configuration.contains(self.context.shared.own);
        (!is_left).then(|| summary_of(&control))
    }

    /// Whether others are the members, by what the timeline's control file says.
    fn was_left(&self, directory: &Path) -> bool {
        let shared = &self.context.shared;
        read_control(shared, &directory.join("control")).is_ok_and(|control| {
            let configuration = &control.state.configuration;
            configuration.is_known() && !configuration.contains(shared.own)
        })
    }

    /// Removes what others keep by now, or nobody. It may come back as a new member, with nothing.
    pub(super) fn let_go(&self, key: TimelineKey, directory: &Path) -> Result<(), StorageError> {
        tracing::info!(timeline = %key.1, "the timeline is not kept here any more: its files are removed");
        self.ledger.remove(key)?;
        // Under a name that is no timeline's, so that a crash leaves nothing that could be taken for one.
        let disk = self.context.shared.disk.as_ref();
        let left = free_name(disk, directory)?;
        disk.rename(directory, &left).map_err(StorageError::wrap("rename", directory))?;
        if let Some(above) = directory.parent() {
            disk.sync_directory(above).map_err(StorageError::unsynced("sync directory", above))?;
        }
        self.slots.remove(key);
        remove_left(disk, &left);
        Ok(())
    }
}

/// What was there before may not have been removed to its end.
fn free_name(disk: &dyn Disk, directory: &Path) -> Result<PathBuf, StorageError> {
    for n in 0.. {
        let left = directory.with_extension(format!("{n}.left"));
        match disk.list(&left) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(left),
            Err(error) => return Err(StorageError::wrap("list", &left)(error)),
            Ok(_) => {}
        }
    }
    unreachable!("there are more names than files")
}

/// Removes what was being removed, also where a crash came in between.
fn remove_left(disk: &dyn Disk, left: &Path) {
    if let Err(error) = disk.remove_all(left) {
        tracing::warn!(directory = %left.display(), %error, "can't be removed");
    }
}
