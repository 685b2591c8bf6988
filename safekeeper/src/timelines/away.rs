//! Timelines of which this safekeeper keeps the promises and not the WAL: that is all in object storage, as this node has seen.
//!
//! The file `away` says so, durably before the first segment is removed. From then on segments may be here or not, and nothing
//! is concluded from that; before the timeline is opened all of them are fetched and checked, and only then the file goes. What
//! the timeline promised to have is in its control file all the time, and is what it has to have then.

use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use pgstrata_env::replace_file;
use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::{AllGivenUp, Quorum};
use pgstrata_format::resting::TimelineSummary;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::ControlState;
use pgstrata_wire::safekeeper::RefusedReason;
use tokio::runtime::Handle;

use super::slots::Slot;
use super::{TimelineKey, Timelines};
use crate::archive::{Archive, ArchiveError};
use crate::checked_segment::checker;
use crate::segment::SegmentFiles;
use crate::storage_error::StorageError;
use crate::timeline::{AWAY, OpenContext, has_marker, has_wal, is_archived, is_away, read_control};

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

/// The control file of a member that has what is archived, and has promised nothing else.
fn restored(
    decided: &Quorum,
    extent: &Extent,
    node: NodeId,
    addresses: &[(NodeId, String)],
) -> TimelineControl {
    let parameters = decided.parameters.clone();
    let (start_lsn, lsn) = (parameters.start_lsn, extent.boundary);
    // The next record links back to the last one.
    let last_record = extent.last_record.unwrap_or(lsn);
    let first = last_record.segment_start(u64::from(parameters.segment_size)).max(start_lsn);
    let term = extent.history.last().map_or(Term(0), |last| last.term);
    TimelineControl {
        node,
        parameters,
        state: ControlState {
            // It knew of these members before it promised anything. What it says of the term is that of others.
            configured_in: Term(0),
            term,
            history: extent.history.clone(),
            commit_lsn: lsn,
            ..ControlState::empty(start_lsn, decided.chain.newest().clone())
        },
        flush_lsn: lsn,
        available_lsn: first,
        archived_lsn: lsn,
        remote_consistent_lsn: start_lsn,
        addresses: addresses.to_vec(),
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
                && has_wal(&summary)
                && !is_away(&summary)
                && summary.configuration.contains(own)
                && self.context.archive.is_some();
            let sent = match may_go {
                true => send_away(&self.context.shared, &self.directory_of(key)),
                false => Ok(false),
            };
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

    /// What is archived of a timeline whose members were all lost, which goes to `least` at least. For threads that may wait.
    pub(super) fn find_restored(
        &self,
        decided: &Quorum,
        least: Lsn,
    ) -> Result<Extent, RefusedReason> {
        let later = |why: String| {
            let text = format!("its members were lost, and what is archived can't be had: {why}");
            RefusedReason::Unavailable(text)
        };
        let Some(archive) = &self.context.archive else {
            return Err(later("this safekeeper has no object store".to_owned()));
        };
        let newest = archive.newest(&decided.parameters, &decided.given_up);
        let newest = self.context.decisions.runtime().block_on(newest);
        let newest = newest.map_err(|error| later(error.to_string()))?;
        // None of them begins with less: what was decided is that they have it.
        let newest = newest.filter(|extent| extent.boundary >= least);
        newest.ok_or_else(|| later(format!("it was there up to {least}, and is not any more")))
    }

    /// Creates such a timeline, as one whose WAL is in object storage. For whoever creates timelines now.
    pub(super) fn create_restored(
        &self,
        decided: &Quorum,
        extent: &Extent,
        addresses: &[(NodeId, String)],
    ) -> Result<(), RefusedReason> {
        let parameters = &decided.parameters;
        let key = (parameters.tenant, parameters.timeline);
        let control = restored(decided, extent, self.context.shared.own.node, addresses);
        let created = self.store_restored(&self.directory_of(key), &control);
        let created = created.and_then(|()| self.ledger.add([key])).inspect_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.context.shared.latch.throw(&error.to_string());
            }
        });
        created.map_err(|error| RefusedReason::Storage(error.to_string()))?;
        tracing::warn!(
            timeline = %key.1, lsn = %extent.boundary,
            "its members were lost: it goes on with what is archived"
        );
        self.slots.insert(key, Slot::Resting(Arc::new(summary_of(&control))));
        Ok(())
    }

    fn store_restored(
        &self,
        directory: &Path,
        control: &TimelineControl,
    ) -> Result<(), StorageError> {
        let disk = self.context.shared.disk.as_ref();
        let wrap = StorageError::wrap("create directory", directory);
        disk.create_directory(directory).map_err(wrap)?;
        for above in directory.ancestors().skip(1).take(2) {
            disk.sync_directory(above).map_err(StorageError::unsynced("sync directory", above))?;
        }
        // First: without a control file it is nothing yet.
        for (name, bytes) in [(AWAY, Vec::new()), ("control", control.encode())] {
            let path = directory.join(name);
            replace_file(disk, &path, &bytes).map_err(StorageError::wrap("replace", &path))?;
        }
        Ok(())
    }

    /// Fetches the WAL of a timeline that was sent away, durably on return. For whoever has the timeline for himself, and may
    /// wait.
    pub(super) fn bring_back(
        &self,
        key: TimelineKey,
        control: &TimelineControl,
    ) -> Result<(), NotBack> {
        let Some(archive) = &self.context.archive else {
            return Err(NotBack::Later("this safekeeper has no object store".to_owned()));
        };
        // Who was given up may have archived something else since.
        let decided = self.context.decisions.read(key);
        let decided = decided.map_err(|reason| NotBack::Later(reason.to_string()))?;
        let given_up = decided.map(|quorum| quorum.given_up).unwrap_or_default();
        let (shared, runtime) = (&self.context.shared, self.context.decisions.runtime());
        let directory = self.directory_of(key);
        bring_back(shared, &directory, control, archive, &given_up, runtime)
    }
}

/// Removes the WAL of a timeline that nobody has open, if by what is durable here all of it is in object storage. True if it did.
pub fn send_away(shared: &OpenContext, directory: &Path) -> Result<bool, StorageError> {
    let disk = shared.disk.as_ref();
    // By what is durable, and not by what is in a list.
    let control = match read_control(shared, &directory.join("control")) {
        Ok(control) => control,
        // Whoever needs the timeline meets that; the others go on.
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "its WAL stays here");
            return Ok(false);
        }
    };
    if !is_archived(&summary_of(&control)) {
        return Ok(false);
    }
    let marker = directory.join(AWAY);
    replace_file(disk, &marker, b"").map_err(StorageError::wrap("write", &marker))?;
    let names = disk.list(directory).map_err(StorageError::wrap("list", directory))?;
    for name in names {
        if control.parameters.segment_number(&name).is_some() {
            let path = directory.join(name);
            disk.remove(&path).map_err(StorageError::wrap("remove", &path))?;
        }
    }
    // What came back with a loss of power would take its space until somebody needs it.
    disk.sync_directory(directory).map_err(StorageError::unsynced("sync", directory))?;
    Ok(true)
}

/// Whether the timeline in `directory` may lack WAL that is in object storage.
pub fn is_sent_away(shared: &OpenContext, directory: &Path) -> Result<bool, StorageError> {
    has_marker(shared.disk.as_ref(), directory, AWAY)
}

/// Fetches the WAL of a timeline that was sent away and that nobody else has, durably on return. `runtime` waits for it.
pub fn bring_back(
    shared: &OpenContext,
    directory: &Path,
    control: &TimelineControl,
    archive: &Archive,
    given_up: &AllGivenUp,
    runtime: &Handle,
) -> Result<(), NotBack> {
    let parameters = &control.parameters;
    let files = SegmentFiles::new(Arc::clone(&shared.disk), directory, parameters.clone());
    let files = files.on(shared.space.clone());
    let from = control.available_lsn.max(parameters.start_lsn);
    let end = control.flush_lsn;
    let size = files.segment_size();
    let mut checker = checker(parameters, from.segment_start(size).max(parameters.start_lsn));
    if checker.feed_position() == parameters.start_lsn {
        checker = checker.at_boundary();
    }
    while checker.feed_position() < end {
        let at = checker.feed_position();
        let to = (at.segment_start(size) + size).min(end);
        let mut segment = vec![0; size as usize];
        {
            let fetched = fetch(archive, parameters, (at, to), given_up);
            let (bytes, place) = runtime.block_on(fetched)?;
            let wal = &bytes[place];
            checker.check(wal).map_err(|error| {
                NotBack::Gone(format!("what is there is no WAL that goes on here: {error}"))
            })?;
            segment[at.segment_offset(size) as usize..][..wal.len()].copy_from_slice(wal);
        }
        files.replace(at.segment_number(size), &segment)?;
    }
    if checker.is_synced() && checker.position() != end {
        let text = format!("it has no record that ends at {end}");
        return Err(NotBack::Gone(text));
    }
    note_back(shared, directory)?;
    tracing::info!(timeline = %parameters.timeline, %from, %end, "WAL fetched from object storage");
    Ok(())
}

/// What is here is all that there is from now on.
pub fn note_back(shared: &OpenContext, directory: &Path) -> Result<(), StorageError> {
    let (disk, marker) = (shared.disk.as_ref(), directory.join(AWAY));
    match disk.remove(&marker) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        removed => removed.map_err(StorageError::wrap("remove", &marker))?,
    }
    disk.sync_directory(directory).map_err(StorageError::unsynced("sync directory", directory))
}

/// Archived WAL of one segment, and where in it is what is asked for.
async fn fetch(
    archive: &Archive,
    parameters: &TimelineParameters,
    (from, to): (Lsn, Lsn),
    given_up: &AllGivenUp,
) -> Result<(Arc<Vec<u8>>, Range<usize>), NotBack> {
    let number = from.segment_number(u64::from(parameters.segment_size));
    let found =
        archive.part(parameters, number, to, given_up).await.map_err(|error| match error {
            ArchiveError::Away(why) => NotBack::Later(why),
            ArchiveError::Damaged(why) => NotBack::Gone(why),
            older @ ArchiveError::Older(_) => NotBack::Gone(older.to_string()),
        })?;
    let missing = || NotBack::Gone(format!("nothing there has WAL from {from} to {to}"));
    let (first, bytes) = found.ok_or_else(missing)?;
    let start = from.0.checked_sub(first.0).ok_or_else(missing)? as usize;
    let place = start..start + (to - from) as usize;
    match bytes.get(place.clone()) {
        Some(_) => Ok((bytes, place)),
        None => Err(missing()),
    }
}
