//! Timelines of which this safekeeper keeps the promises and not the WAL: that is all in object storage, as this node has seen.
//!
//! The file `away` says so, durably before the first segment is removed. From then on segments may be here or not, and nothing
//! is concluded from that; before the timeline is opened all of them are fetched and checked, and only then the file goes. What
//! the timeline promised to have is in its control file all the time, and is what it has to have then.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use pgstrata_env::replace_file;
use pgstrata_format::resting::TimelineSummary;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Lsn, TimelineParameters};

use super::slots::Slot;
use super::{TimelineKey, Timelines};
use crate::archive::{Archive, ArchiveError};
use crate::checked_segment::checker;
use crate::segment::SegmentFiles;
use crate::storage_error::StorageError;
use crate::timeline::{AWAY, is_archived, is_away, read_control};

/// Why a timeline's WAL is not here.
#[derive(Debug, thiserror::Error)]
pub enum NotBack {
    /// It may come later.
    #[error("the timeline's WAL is in object storage, and can't be fetched: {0}")]
    Later(String),
    /// Object storage hasn't got what was seen there. Other members may.
    #[error("the timeline's WAL is not in object storage any more: {0}")]
    Gone(String),
    /// It can't be written here.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What is known of a timeline that is not opened, by its control file.
pub fn summary_of(control: &TimelineControl) -> TimelineSummary {
    let state = &control.state;
    TimelineSummary {
        parameters: control.parameters.clone(),
        term: state.term,
        commit_lsn: state.commit_lsn,
        flush_lsn: control.flush_lsn,
        available_lsn: control.available_lsn,
        archived_lsn: control.archived_lsn,
        remote_consistent_lsn: control.remote_consistent_lsn,
        last_record_lsn: state.commit_lsn,
        segments: 0,
        configuration: Arc::new(state.configuration.clone()),
    }
}

impl Timelines {
    /// Removes the WAL of those of these timelines that rest and of which all of it is in object storage. Returns how many
    /// these were. Waits for the disk.
    pub fn send_away(&self, keys: &[TimelineKey]) -> Result<usize, StorageError> {
        let own = self.context.shared.own;
        let mut count = 0;
        for &key in keys {
            let Some(summary) = self.slots.take_resting(key) else { continue };
            let may_go = is_archived(&summary)
                && !is_away(&summary)
                && summary.configuration.contains(own)
                && self.context.archive.is_some();
            let sent = if may_go { self.send_one_away(key) } else { Ok(false) };
            let is_gone = matches!(sent, Ok(true));
            let summary = match is_gone {
                true => Arc::new(TimelineSummary { segments: 0, ..(*summary).clone() }),
                false => summary,
            };
            self.slots.give_back(key, Slot::Resting(summary));
            count += usize::from(is_gone);
            match sent {
                // What would make room for itself waits until there is some.
                Err(StorageError::DiskFull { .. }) => {}
                other => {
                    other
                        .inspect_err(|error| self.context.shared.latch.throw(&error.to_string()))?;
                }
            }
        }
        if count > 0 {
            self.store_resting()?;
        }
        Ok(count)
    }

    fn send_one_away(&self, key: TimelineKey) -> Result<bool, StorageError> {
        let disk = self.context.shared.disk.as_ref();
        let directory = self.directory_of(key);
        // By what is durable, and not by what is in a list.
        let control = read_control(&self.context.shared, &directory.join("control"))?;
        if !is_archived(&summary_of(&control)) {
            return Ok(false);
        }
        let marker = directory.join(AWAY);
        replace_file(disk, &marker, b"").map_err(StorageError::wrap("write", &marker))?;
        for name in self.list(&directory)? {
            if control.parameters.segment_number(&name).is_some() {
                let path = directory.join(name);
                disk.remove(&path).map_err(StorageError::wrap("remove", &path))?;
            }
        }
        // What came back with a loss of power would take its space until somebody needs it.
        disk.sync_directory(&directory).map_err(StorageError::unsynced("sync", &directory))?;
        Ok(true)
    }

    /// Whether the timeline in `directory` may lack WAL that is in object storage.
    pub(super) fn is_sent_away(&self, directory: &Path) -> Result<bool, StorageError> {
        let marker = directory.join(AWAY);
        match self.context.shared.disk.open(&marker) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StorageError::wrap("open", &marker)(error)),
        }
    }

    /// Fetches the WAL of a timeline that was sent away, durably on return. For whoever has the timeline for himself, and may
    /// wait.
    pub(super) fn bring_back(&self, key: TimelineKey) -> Result<(), NotBack> {
        let directory = self.directory_of(key);
        let shared = &self.context.shared;
        let control = read_control(shared, &directory.join("control"))?;
        let parameters = &control.parameters;
        let Some(archive) = &self.context.archive else {
            return Err(NotBack::Later("this safekeeper has no object store".to_owned()));
        };
        let files = SegmentFiles::new(Arc::clone(&shared.disk), &directory, parameters.clone());
        let files = files.on(shared.space.clone());
        let from = control.available_lsn.max(parameters.start_lsn);
        let end = control.flush_lsn;
        let size = files.segment_size();
        let mut checker = checker(parameters, from.segment_start(size).max(parameters.start_lsn));
        if checker.feed_position() == parameters.start_lsn {
            checker = checker.at_boundary();
        }
        let runtime = self.context.decisions.runtime();
        while checker.feed_position() < end {
            let at = checker.feed_position();
            let to = (at.segment_start(size) + size).min(end);
            let wal = runtime.block_on(fetch(archive, parameters, at, to))?;
            let skipped = at.segment_offset(size) as usize;
            let mut segment = vec![0; size as usize];
            segment[skipped..][..wal.len()].copy_from_slice(&wal);
            checker.check(&wal).map_err(|error| {
                NotBack::Gone(format!("what is there is no WAL that goes on here: {error}"))
            })?;
            files.replace(at.segment_number(size), &segment)?;
        }
        if checker.is_synced() && checker.position() != end {
            let text = format!("it has no record that ends at {end}");
            return Err(NotBack::Gone(text));
        }
        self.note_back(&directory)?;
        tracing::info!(timeline = %key.1, %from, %end, "WAL fetched from object storage");
        Ok(())
    }

    /// What is here is all that there is from now on.
    pub(super) fn note_back(&self, directory: &Path) -> Result<(), StorageError> {
        let (disk, marker) = (self.context.shared.disk.as_ref(), directory.join(AWAY));
        match disk.remove(&marker) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed.map_err(StorageError::wrap("remove", &marker))?,
        }
        disk.sync_directory(directory).map_err(StorageError::unsynced("sync directory", directory))
    }
}

/// Archived WAL of one segment.
async fn fetch(
    archive: &Archive,
    parameters: &TimelineParameters,
    from: Lsn,
    to: Lsn,
) -> Result<Vec<u8>, NotBack> {
    let number = from.segment_number(u64::from(parameters.segment_size));
    let found = archive.part(parameters, number).await.map_err(|error| match error {
        ArchiveError::Away(why) => NotBack::Later(why),
        ArchiveError::Damaged(why) => NotBack::Gone(why),
    })?;
    let missing = || NotBack::Gone(format!("nothing there has WAL from {from} to {to}"));
    let (first, bytes) = found.ok_or_else(missing)?;
    let start = from.0.checked_sub(first.0).ok_or_else(missing)? as usize;
    let wal = bytes.get(start..start + (to - from) as usize).ok_or_else(missing)?;
    Ok(wal.to_vec())
}
