//! Creating a timeline, and opening one after a restart.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};

use parking_lot::{Mutex, RwLock};
use pgstrata_env::Disk;
use pgstrata_format::quorum::Quorum;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Lsn, Member, NodeId, Term};
use pgstrata_quorum::{Acceptor, ControlState};
use tokio::sync::watch;

use super::core::Core;
use super::{Marks, Timeline};
use crate::checked_segment::checker_after;
use crate::disk_space::DiskSpace;
use crate::latch::Latch;
use crate::meters::Meters;
use crate::segment::{FlushedNote, LogWriter, Preparer, SegmentFiles, recover};
use crate::storage_error::StorageError;

/// Largest control file that is read, in bytes.
const MAX_CONTROL_SIZE: u64 = 4 << 20;

/// What every timeline of this process shares.
#[derive(Clone, Debug)]
pub struct OpenContext {
    /// Who we are.
    pub own: Member,
    /// Where files are kept.
    pub disk: Arc<dyn Disk>,
    /// Makes segments ahead of their use.
    pub preparer: Preparer,
    /// Thrown by any failed write.
    pub latch: Latch,
    /// What is left of the disk.
    pub space: DiskSpace,
    /// What is counted.
    pub meters: Meters,
}

/// A timeline as found after a restart.
#[derive(Debug)]
pub struct Opened {
    /// The timeline.
    pub timeline: Timeline,
    /// Bytes after the last valid record, which were removed.
    pub removed_bytes: u64,
}

impl Timeline {
    /// Creates a timeline that was founded, in `directory`, durably.
    pub fn create(
        context: &OpenContext,
        directory: &Path,
        founded: &Quorum,
        addresses: &[(NodeId, String)],
    ) -> Result<Timeline, StorageError> {
        let disk = context.disk.as_ref();
        let wrap = || StorageError::wrap("create directory", directory);
        disk.create_directory(directory).map_err(wrap())?;
        for above in directory.ancestors().skip(1).take(2) {
            disk.sync_directory(above).map_err(StorageError::unsynced("sync directory", above))?;
        }
        let parameters = &founded.parameters;
        let start_lsn = parameters.start_lsn;
        let control = TimelineControl {
            node: context.own.node,
            parameters: parameters.clone(),
            state: ControlState::empty(start_lsn, founded.chain.newest().clone()),
            flush_lsn: start_lsn,
            available_lsn: start_lsn,
            archived_lsn: start_lsn.segment_start(u64::from(parameters.segment_size)),
            remote_consistent_lsn: start_lsn,
            addresses: addresses.to_vec(),
        };
        let timeline = Timeline::assemble(context, directory, control, start_lsn, None)?;
        {
            let mut core = timeline.core.lock();
            let stored = core.stored.clone();
            core.store(stored)?;
        }
        Ok(timeline)
    }

    /// Opens the timeline in `directory`; finds the end of its log.
    pub fn open(context: &OpenContext, directory: &Path) -> Result<Opened, StorageError> {
        let path = directory.join("control");
        let control = read_control(context, &path)?;
        let files =
            SegmentFiles::new(Arc::clone(&context.disk), directory, control.parameters.clone());
        let note = FlushedNote::open(context.disk.as_ref(), directory)?;
        let known_lsn = control.state.commit_lsn;
        let durable_lsn = control.flush_lsn.max(known_lsn).max(note.lsn());
        let available_lsn = control.available_lsn.max(control.parameters.start_lsn);
        let recovered = recover(&files, available_lsn, known_lsn, durable_lsn);
        let recovered = recovered.map_err(|error| match error {
            // A sector of a segment that is none any more: others may have what was in it.
            StorageError::Failed { action: "read", path, source } => {
                StorageError::DamagedLog { path, reason: format!("can't be read: {source}") }
            }
            other => other,
        })?;
        let timeline = Timeline::assemble(
            context,
            directory,
            control,
            recovered.flush_lsn,
            recovered.last_record,
        )?;
        // The control file says it seldom: whoever is left of several is to know what was committed.
        let term = timeline.history().last().map(|last| last.term);
        if let Some(term) = term.filter(|_| note.commit_lsn() > known_lsn) {
            timeline.learn_commit(term, note.commit_lsn())?;
        }
        Ok(Opened { timeline, removed_bytes: recovered.removed_bytes })
    }

    fn assemble(
        context: &OpenContext,
        directory: &Path,
        stored: TimelineControl,
        flush_lsn: Lsn,
        last_record: Option<Lsn>,
    ) -> Result<Timeline, StorageError> {
        let state = stored.state.clone();
        let acceptor = Acceptor::restore(context.own, state, flush_lsn).map_err(|error| {
            StorageError::DamagedLog { path: directory.to_owned(), reason: error.to_string() }
        })?;
        let parameters = stored.parameters.clone();
        let files = SegmentFiles::new(Arc::clone(&context.disk), directory, parameters);
        let files = Arc::new(files.on(context.space.clone()));
        files.count()?;
        let commit_lsn = acceptor.commit_lsn();
        let Term(term) = acceptor.term();
        let beginning_lsn = acceptor.followed().map_or(Lsn::INVALID, |followed| followed.lsn);
        let configuration_number = AtomicU64::new(acceptor.configuration().number());
        let configuration = RwLock::new(Arc::new(acceptor.configuration().clone()));
        let marks = Marks {
            available_lsn: stored.available_lsn,
            archived_lsn: stored.archived_lsn,
            remote_consistent_lsn: stored.remote_consistent_lsn,
            addresses: stored.addresses.clone(),
        };
        let core = Core {
            acceptor,
            log: LogWriter::new(Arc::clone(&files), context.preparer.clone(), flush_lsn),
            stored,
            disk: Arc::clone(&context.disk),
            control_path: directory.join("control"),
            latch: context.latch.clone(),
            checker: checker_after(files.parameters(), flush_lsn, last_record),
            files: Arc::clone(&files),
            note: FlushedNote::open(context.disk.as_ref(), directory)?,
            unsynced: 0,
            meters: context.meters.clone(),
            space: context.space.clone(),
            outputs: Vec::new(),
            retired: None,
        };
        Ok(Timeline {
            own: context.own,
            files,
            core: Mutex::new(core),
            marks: Mutex::new(marks),
            archiving_error: Mutex::new(None),
            archiving_failed_at: Mutex::new(None),
            archived_ceiling: AtomicU64::new(u64::MAX),
            catch_up_target: AtomicU64::new(0),
            last_committed: Mutex::new(None),
            term: AtomicU64::new(term),
            flush_lsn: AtomicU64::new(flush_lsn.0),
            commit_lsn: AtomicU64::new(commit_lsn.0),
            beginning_lsn: AtomicU64::new(beginning_lsn.0),
            configuration,
            configuration_number,
            commit_watch: watch::Sender::new(commit_lsn),
            proposers: AtomicUsize::new(0),
            computes: AtomicUsize::new(0),
            appended: AtomicBool::new(false),
            is_decided: AtomicBool::new(false),
            is_retired: AtomicBool::new(false),
            suspected: Mutex::new(None),
        })
    }
}

/// The control file at `path`, checked.
pub fn read_control(context: &OpenContext, path: &Path) -> Result<TimelineControl, StorageError> {
    let wrap = || StorageError::wrap("read", path);
    let file = context.disk.open(path).map_err(wrap())?;
    let size = file.size().map_err(wrap())?.min(MAX_CONTROL_SIZE);
    let mut bytes = vec![0; size as usize];
    let count = file.read_at(&mut bytes, 0).map_err(wrap())?;
    TimelineControl::decode(&bytes[..count], context.own.node)
        .map_err(|error| StorageError::Damaged { path: path.to_owned(), reason: error.to_string() })
}
