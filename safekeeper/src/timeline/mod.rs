//! One timeline of this safekeeper: its acceptor, its files, and who waits for its WAL.
//!
//! Everything that changes the log goes through one lock and is durable before it is answered.
//! Positions that others watch are published apart from it, so that a slow disk never keeps a
//! reader of committed WAL or of the status waiting.

mod core;
mod deciding;
mod open;
mod peers;
mod reading;
mod rest;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard, RwLock};
use pgstrata_env::{Disk, replace_file};
use pgstrata_ids::{Lsn, Member, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{
    Append, Configuration, Elected, Holding, PeerRange, ProposerId, TermHistory, VoteRequest,
};
use pgstrata_wire::safekeeper::{Message, RefusedReason, Status};
use tokio::sync::watch;

use self::core::Core;
pub use self::core::{Answer, Beginning, SYNC_EVERY};
pub use self::open::{OpenContext, Opened, read_control};
pub use self::peers::Missing;
pub use self::reading::{ReadOn, Reading};
pub use self::rest::{Overview, can_be_trimmed, has_wal, is_archived, is_away};
use crate::checked_segment::Trouble;
use crate::latch::Latch;
use crate::segment::{SegmentFiles, SegmentReader, last_record_before};
use crate::storage_error::StorageError;

/// The file that says that a timeline's others are not removed.
pub const KEEP: &str = "keep";

/// Notes durably that what is in a timeline's directory is not removed. For whoever writes to it alone.
pub fn note_kept(disk: &dyn Disk, directory: &Path, latch: &Latch) -> Result<(), StorageError> {
    let path = directory.join(KEEP);
    let noted = replace_file(disk, &path, b"").map_err(StorageError::wrap("write", &path));
    noted.inspect_err(|error| {
        if !matches!(error, StorageError::DiskFull { .. }) {
            latch.throw(&error.to_string());
        }
    })
}

/// The file that says that a timeline's WAL is in object storage, and may not be here.
pub const AWAY: &str = "away";

/// Whether a timeline's directory has such a file. One that can't be looked for now may be there.
pub fn has_marker(disk: &dyn Disk, directory: &Path, marker: &str) -> Result<bool, StorageError> {
    let path = directory.join(marker);
    match disk.open(&path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StorageError::wrap("open", &path)(error)),
    }
}

/// How far others are with this timeline; written down with the control file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// First byte still on disk.
    pub available_lsn: Lsn,
    /// This node has seen that all before it is in object storage.
    pub archived_lsn: Lsn,
    /// The page server no longer needs what is before it; never more than is committed here.
    pub remote_consistent_lsn: Lsn,
    /// Where the members' WAL ports were last known to be.
    pub addresses: Vec<(NodeId, String)>,
}

/// See the module.
#[derive(Debug)]
pub struct Timeline {
    own: Member,
    files: Arc<SegmentFiles>,
    core: Mutex<Core>,
    marks: Mutex<Marks>,
    /// No more than this is noted as archived; changed with the marks.
    archived_ceiling: AtomicU64,
    archiving_error: Mutex<Option<Trouble>>,
    archiving_failed_at: Mutex<Option<SystemTime>>,
    /// How far it is to be caught up from others, as last known.
    catch_up_target: AtomicU64,
    /// A commit LSN, and the start of the last record before it.
    last_committed: Mutex<Option<(Lsn, Lsn)>>,
    term: AtomicU64,
    flush_lsn: AtomicU64,
    commit_lsn: AtomicU64,
    /// Where the term begins that is followed; 0 while nobody has won the one that was promised last.
    beginning_lsn: AtomicU64,
    /// As last decided, for those who do not wait for the log.
    configuration: RwLock<Arc<Configuration>>,
    configuration_number: AtomicU64,
    commit_watch: watch::Sender<Lsn>,
    proposers: AtomicUsize,
    /// Those who greeted, elected or not.
    computes: AtomicUsize,
    appended: AtomicBool,
    /// It was read somewhere that it is decided who the members are.
    is_decided: AtomicBool,
    /// See [`Timeline::retire`].
    is_retired: AtomicBool,
    /// Where somebody who read met what is no WAL, and why that is none.
    suspected: Mutex<Option<Suspicion>>,
}

/// What somebody who read has met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Everything before it was right.
    pub at: Lsn,
    /// For people.
    pub why: String,
}

impl Timeline {
    /// What the timeline is.
    pub fn parameters(&self) -> &TimelineParameters {
        self.files.parameters()
    }

    /// The log is damaged: from now on nothing is promised, written, counted or served through this, whoever holds it. Waits
    /// for what is under way.
    pub fn retire(&self, why: &str) {
        self.core.lock().retired.get_or_insert_with(|| why.to_owned());
        self.is_retired.store(true, Ordering::Release);
        self.files.retire();
        // Those who wait for more see that there is none.
        self.commit_watch.send_modify(|_| ());
    }

    /// Whether it is out of use.
    pub fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::Acquire)
    }

    /// Somebody met what is no WAL: it is looked at in the background, and mended.
    pub fn suspect(&self, at: Lsn, why: String) {
        self.suspected.lock().get_or_insert(Suspicion { at, why });
    }

    /// What somebody has met since the last call.
    pub fn take_suspicion(&self) -> Option<Suspicion> {
        self.suspected.lock().take()
    }

    /// Its segment files.
    pub fn files(&self) -> &Arc<SegmentFiles> {
        &self.files
    }

    /// A reader of this timeline's own bytes.
    pub fn reader(&self) -> SegmentReader {
        SegmentReader::new(Arc::clone(&self.files))
    }

    /// The highest promised term.
    pub fn term(&self) -> Term {
        Term(self.term.load(Ordering::Acquire))
    }

    /// End of the durable log.
    pub fn flush_lsn(&self) -> Lsn {
        Lsn(self.flush_lsn.load(Ordering::Acquire))
    }

    /// What is known to be committed.
    pub fn commit_lsn(&self) -> Lsn {
        Lsn(self.commit_lsn.load(Ordering::Acquire))
    }

    /// Follows the commit LSN.
    pub fn watch_commit(&self) -> watch::Receiver<Lsn> {
        self.commit_watch.subscribe()
    }

    /// How far others are.
    pub fn marks(&self) -> Marks {
        self.marks.lock().clone()
    }

    /// This node has seen that everything before `lsn` is archived; written down later.
    pub fn note_archived(&self, lsn: Lsn) {
        self.note_archived_as(lsn, self.configuration_number());
    }

    /// The same of what was archived, or believed, by the configuration of this number. Where another one came meanwhile, that may
    /// count for nothing.
    pub fn note_archived_as(&self, lsn: Lsn, number: u64) {
        let lsn = lsn.min(self.commit_lsn());
        let mut marks = self.marks.lock();
        if number == self.configuration_number() {
            let ceiling = Lsn(self.archived_ceiling.load(Ordering::Acquire));
            marks.archived_lsn = marks.archived_lsn.max(lsn.min(ceiling));
        }
    }

    /// A later configuration is about to be taken, for which what this node knows to be archived after `lsn` counts for nothing: it
    /// was archived by one that was given up. Durable on return; until it [ends](Timeline::archived_anew) no more is noted.
    ///
    /// `number` is that of the configuration that is known before: where it was taken by now there is nothing to do.
    pub fn archive_anew(&self, lsn: Lsn, number: u64) -> Result<(), StorageError> {
        {
            let mut marks = self.marks.lock();
            if number != self.configuration_number() {
                return Ok(());
            }
            self.archived_ceiling.store(lsn.0, Ordering::Release);
            marks.archived_lsn = marks.archived_lsn.min(lsn);
        }
        // Also where another one lowered it, and may not have written it yet.
        self.checkpoint()
    }

    /// It was taken, or can't be.
    pub fn archived_anew(&self) {
        let _marks = self.marks.lock();
        self.archived_ceiling.store(u64::MAX, Ordering::Release);
    }

    /// Why the last attempt to archive failed, if it did.
    pub fn note_archiving(&self, error: Option<Trouble>) {
        if let Some(trouble) = &error {
            *self.archiving_failed_at.lock() = Some(SystemTime::now());
            if trouble.is_damage {
                self.suspect(self.marks().archived_lsn, trouble.text.clone());
            }
        }
        *self.archiving_error.lock() = error;
    }

    /// Why the last attempt to archive failed, if it did.
    pub fn archiving_error(&self) -> Option<Trouble> {
        self.archiving_error.lock().clone()
    }

    /// When an attempt to archive failed last, also if one has succeeded since.
    pub fn archiving_failed_at(&self) -> Option<SystemTime> {
        *self.archiving_failed_at.lock()
    }

    /// It is to be caught up to `lsn` from others.
    pub fn note_catch_up(&self, lsn: Lsn) {
        self.catch_up_target.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// The end of what it was ever to be caught up to.
    pub fn catch_up_target(&self) -> Lsn {
        Lsn(self.catch_up_target.load(Ordering::Acquire))
    }

    /// Bytes that it is still to get from others, as far as it was told what there is.
    pub fn catch_up_bytes(&self) -> u64 {
        self.catch_up_target().saturating_sub(self.flush_lsn())
    }

    /// A page server says that it no longer needs what is before `lsn`; written down later. It
    /// can't be done with what isn't committed.
    pub fn note_consistent(&self, lsn: Lsn) {
        let lsn = lsn.min(self.commit_lsn());
        let mut marks = self.marks.lock();
        marks.remote_consistent_lsn = marks.remote_consistent_lsn.max(lsn);
    }

    /// Where members' WAL ports are; written down later.
    pub fn note_addresses(&self, addresses: &[(NodeId, String)]) {
        self.marks.lock().addresses = addresses.to_vec();
    }

    /// True while a proposer that won an election is connected.
    pub fn has_proposer(&self) -> bool {
        self.proposers.load(Ordering::Acquire) > 0
    }

    /// True if anything was appended since the last call.
    pub fn has_appended_lately(&self) -> bool {
        self.appended.swap(false, Ordering::AcqRel)
    }

    /// True while a compute is connected that has greeted, elected or not.
    pub fn has_compute(&self) -> bool {
        self.has_proposer() || self.computes.load(Ordering::Acquire) > 0
    }

    /// Counts a proposer's connection until the guard is dropped.
    pub fn proposer_connected(self: &Arc<Self>) -> ProposerConnected {
        self.proposers.fetch_add(1, Ordering::AcqRel);
        ProposerConnected(Arc::clone(self))
    }

    /// Counts a compute that has greeted, for as long as the answer lives.
    pub fn compute_connected(self: &Arc<Self>) -> ComputeConnected {
        self.computes.fetch_add(1, Ordering::AcqRel);
        ComputeConnected(Arc::clone(self))
    }

    fn publish(&self, core: &Core) {
        self.term.store(core.acceptor.term().0, Ordering::Release);
        self.flush_lsn.store(core.acceptor.flush_lsn().0, Ordering::Release);
        self.commit_lsn.store(core.acceptor.commit_lsn().0, Ordering::Release);
        let followed = core.acceptor.followed().map_or(0, |followed| followed.lsn.0);
        self.beginning_lsn.store(followed, Ordering::Release);
    }

    /// Wakes those who wait for committed WAL, if there is more of it.
    pub fn wake_readers(&self) {
        let commit_lsn = self.commit_lsn();
        self.commit_watch.send_if_modified(|seen| {
            let more = commit_lsn > *seen;
            *seen = commit_lsn.max(*seen);
            more
        });
    }

    /// Answers a vote request.
    pub fn vote(&self, request: &VoteRequest) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let answer = core.promise(&[], |acceptor, outputs| acceptor.vote(request, outputs));
        self.publish(&core);
        answer
    }

    /// The same for who counts votes of these nodes: see [`pgstrata_quorum::Acceptor::vote_by_nodes`].
    pub fn vote_by_nodes(
        &self,
        asked: (Term, ProposerId),
        nodes: &[NodeId],
    ) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let answer =
            core.promise(&[], |acceptor, outputs| acceptor.vote_by_nodes(asked, nodes, outputs));
        self.publish(&core);
        answer
    }

    /// Follows the winner of a term.
    pub fn elected(&self, elected: &Elected) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let answer = core.promise(&[], |acceptor, outputs| acceptor.elected(elected, outputs));
        core.log.prepare();
        self.publish(&core);
        answer
    }

    /// Starts taking a proposer's bytes; nothing else happens on the timeline until it is done.
    pub fn batch(&self) -> Batch<'_> {
        Batch { core: self.core.lock(), timeline: self }
    }

    /// Takes committed bytes of a peer, durably up to the end of the last whole record among them.
    pub fn peer_range(&self, range: &PeerRange, payload: &[u8]) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let append = Append {
            term: Term(0),
            start: range.start,
            length: range.length,
            record_end: range.start,
            commit_lsn: range.commit_lsn,
        };
        core.reserve(&append)?;
        let mut answer =
            core.promise(payload, |acceptor, outputs| acceptor.peer_range(range, outputs))?;
        if answer.is_none() && range.start > core.acceptor.write_lsn() {
            let text = format!("the log ends before {} by now", range.start);
            answer = Some(Message::Refused(RefusedReason::Unavailable(text)));
        }
        // All of it is committed, and so is what is whole of it by now: the next piece may come after a restart.
        let whole = core.checker.position();
        if answer.is_none() && whole > core.acceptor.boundary_lsn() && whole < range.commit_lsn {
            // The own one, which agrees by now: what is merged in it may not be in the peer's.
            let history = core.acceptor.history().up_to(whole);
            let so_far = PeerRange { history, commit_lsn: whole, start: whole, length: 0 };
            answer =
                core.promise(&[], |acceptor, outputs| acceptor.peer_range(&so_far, outputs))?;
        }
        if answer.is_none() && core.acceptor.boundary_lsn() > core.acceptor.flush_lsn() {
            // Nobody is told: the answer is for a proposer.
            core.act(&[], |acceptor, outputs| acceptor.flush(outputs))?;
        }
        core.sync_long_record()?;
        self.publish(&core);
        drop(core);
        self.wake_readers();
        Ok(answer)
    }

    /// True if there is no byte of the log yet.
    pub fn is_empty(&self) -> bool {
        self.core.lock().acceptor.write_lsn() == self.parameters().start_lsn
    }

    /// Begins a log that is empty where another one begins that has been trimmed.
    pub fn begin_at(&self, beginning: &Beginning) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let answer = core.begin_at(beginning)?;
        if answer.is_none() {
            let mut marks = self.marks.lock();
            marks.available_lsn = beginning.available_lsn;
            marks.archived_lsn = beginning.available_lsn;
        }
        self.publish(&core);
        drop(core);
        self.wake_readers();
        Ok(answer)
    }

    /// Takes note of a proof that `lsn` of `term` is committed.
    pub fn learn_commit(&self, term: Term, lsn: Lsn) -> Result<(), StorageError> {
        let mut core = self.core.lock();
        core.act(&[], |acceptor, outputs| acceptor.learn_commit(term, lsn, outputs))?;
        self.publish(&core);
        drop(core);
        self.wake_readers();
        Ok(())
    }

    /// Writes down how far everything is.
    pub fn checkpoint(&self) -> Result<(), StorageError> {
        // The log first: what it has begun at, or was trimmed to, goes with the marks of that.
        let mut core = self.core.lock();
        let marks = self.marks();
        core.checkpoint(|stored| {
            stored.available_lsn = marks.available_lsn;
            stored.archived_lsn = marks.archived_lsn;
            stored.remote_consistent_lsn = marks.remote_consistent_lsn;
            stored.addresses = marks.addresses;
        })
    }

    /// Notes how far the log is durable, and committed, so that it survives a loss of power. Appends go on during the sync.
    pub fn note_flushed(&self) -> Result<(), StorageError> {
        let (raised, note, latch) = {
            let mut core = self.core.lock();
            if core.check_latch().is_err() {
                return Ok(());
            }
            let flush_lsn = core.acceptor.flush_lsn();
            let commit_lsn = core.acceptor.commit_lsn();
            let raised = core.note.raise(flush_lsn, commit_lsn);
            (raised, core.note.clone(), core.latch.clone())
        };
        raised.and_then(|()| note.sync()).inspect_err(|error| latch.throw(&error.to_string()))
    }

    /// The commit LSN that a restart would begin with.
    pub fn stored_commit_lsn(&self) -> Lsn {
        self.core.lock().stored.state.commit_lsn
    }

    /// The durable log, for a proof of what is committed, and by which members that is to be told. An error after a failed
    /// write: then the acceptor counts on what may not be durable.
    pub fn holding(&self) -> Result<(Holding, Configuration), StorageError> {
        let core = self.core.lock();
        core.check_latch()?;
        let flush_lsn = core.acceptor.flush_lsn();
        let history = core.acceptor.history().clone();
        let holding = Holding { member: self.own, flush_lsn, history };
        Ok((holding, core.acceptor.configuration().clone()))
    }

    /// Everything that is known, all of it durable: others conclude from it what is committed. An error after a failed
    /// write, as with [`Timeline::holding`].
    pub fn status(&self) -> Result<Status, StorageError> {
        let core = self.core.lock();
        let available_lsn = self.marks.lock().available_lsn;
        core.check_latch()?;
        let acceptor = &core.acceptor;
        Ok(Status {
            member: self.own,
            parameters: self.parameters().clone(),
            configuration: acceptor.configuration().clone(),
            configured_in: acceptor.configured_in(),
            has_proposer: self.computes.load(Ordering::Acquire) > 0,
            term: acceptor.term(),
            available_lsn,
            flush_lsn: acceptor.flush_lsn(),
            commit_lsn: acceptor.commit_lsn(),
            history: acceptor.history().clone(),
        })
    }

    /// The number of the configuration: it is asked for with each batch of appends.
    pub fn configuration_number(&self) -> u64 {
        self.configuration_number.load(Ordering::Acquire)
    }

    /// Whether that was noted.
    pub fn is_kept(&self) -> Result<bool, StorageError> {
        let disk = Arc::clone(&self.core.lock().disk);
        has_marker(disk.as_ref(), self.files.directory(), KEEP)
    }

    /// Notes durably that what is here is not removed, even if others keep the timeline.
    pub fn keep(&self) -> Result<(), StorageError> {
        // One at a time, like all that is written of a timeline: several may hear of it at once.
        let core = self.core.lock();
        core.check_latch()?;
        note_kept(core.disk.as_ref(), self.files.directory(), &core.latch)
    }

    /// Who this safekeeper is to the others.
    pub fn member(&self) -> Member {
        self.own
    }

    /// Whether others keep it by now: what is here is of no further use.
    pub fn is_left(&self) -> bool {
        let configuration = self.configuration.read();
        configuration.is_known() && !configuration.contains(self.own)
    }

    /// It is decided who the members are, also if that is not taken here.
    pub fn note_decided(&self) {
        self.is_decided.store(true, Ordering::Release);
    }

    /// Whether that was noted: whoever counts votes of nodes is not served any more.
    pub fn is_decided(&self) -> bool {
        self.is_decided.load(Ordering::Acquire)
    }

    /// The members.
    pub fn configuration(&self) -> Arc<Configuration> {
        Arc::clone(&self.configuration.read())
    }

    /// Takes a configuration that was decided, durably on return. An answer is a refusal.
    pub fn configure(&self, decided: &Configuration) -> Result<Answer, StorageError> {
        let mut core = self.core.lock();
        let answer = core.promise(&[], |acceptor, outputs| acceptor.configure(decided, outputs))?;
        // Under the core's lock, so that none is published after a later one.
        let taken = Arc::new(core.acceptor.configuration().clone());
        let number = taken.number();
        // First: whoever has seen the number finds it, or a later one.
        *self.configuration.write() = taken;
        self.configuration_number.store(number, Ordering::Release);
        Ok(answer)
    }

    /// Which term wrote which byte.
    pub fn history(&self) -> TermHistory {
        self.core.lock().acceptor.history().clone()
    }

    /// The start of the last record before a boundary of the durable log; `None` if this
    /// timeline has none there.
    pub fn last_record_before(&self, end: Lsn) -> Result<Option<Lsn>, StorageError> {
        last_record_before(&self.files, end)
    }

    /// The start of the last record before the stored commit LSN; the commit LSN itself if it is
    /// not here (a log that an older version trimmed) or there is none.
    fn last_committed_record(&self) -> Result<Lsn, StorageError> {
        let commit_lsn = self.stored_commit_lsn();
        if let Some((_, start)) = self.last_committed.lock().filter(|known| known.0 == commit_lsn) {
            return Ok(start);
        }
        let start = self.last_record_before(commit_lsn)?.unwrap_or(commit_lsn);
        *self.last_committed.lock() = Some((commit_lsn, start));
        Ok(start)
    }

    /// Removes segments that this node has seen archived and the page server no longer needs,
    /// keeping that of the last committed record's start: the next record links back to it.
    pub fn trim(&self) -> Result<u64, StorageError> {
        let size = self.files.segment_size();
        let marks = self.marks();
        let lsn = marks.archived_lsn.min(marks.remote_consistent_lsn);
        let keep = lsn.min(self.stored_commit_lsn()).segment_start(size);
        let available_lsn = keep.max(self.parameters().start_lsn);
        if available_lsn <= self.marks.lock().available_lsn {
            return Ok(0);
        }
        let keep = keep.min(self.last_committed_record()?.segment_start(size));
        let available_lsn = keep.max(self.parameters().start_lsn);
        if available_lsn <= self.marks.lock().available_lsn {
            return Ok(0);
        }
        // Written down first: a reader must never be promised what is gone.
        let before = std::mem::replace(&mut self.marks.lock().available_lsn, available_lsn);
        if let Err(error) = self.checkpoint() {
            // Nothing is gone yet. Where that was for lack of space, it is what makes some, so it is tried again.
            self.marks.lock().available_lsn = before;
            return Err(error);
        }
        self.files.remove(|number| number < keep.segment_number(size))
    }
}

/// See [`Timeline::proposer_connected`].
#[derive(Debug)]
pub struct ProposerConnected(Arc<Timeline>);

impl Drop for ProposerConnected {
    fn drop(&mut self) {
        self.0.proposers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// See [`Timeline::compute_connected`].
#[derive(Debug)]
pub struct ComputeConnected(Arc<Timeline>);

impl Drop for ComputeConnected {
    fn drop(&mut self) {
        self.0.computes.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Appends that are made durable together.
#[derive(Debug)]
pub struct Batch<'a> {
    core: MutexGuard<'a, Core>,
    timeline: &'a Timeline,
}

impl Batch<'_> {
    /// Takes one append's bytes. An answer is a refusal.
    pub fn append(&mut self, append: &Append, payload: &[u8]) -> Result<Answer, StorageError> {
        self.core.append(append, payload)
    }

    /// End of what was taken so far.
    fn write_lsn(&self) -> Lsn {
        self.core.acceptor.write_lsn()
    }

    /// Makes all of them durable; the answer is the acknowledgement. The caller sends it, then
    /// calls [`Timeline::wake_readers`].
    pub fn finish(mut self) -> Result<Answer, StorageError> {
        let answer = self.core.act(&[], |acceptor, outputs| acceptor.flush(outputs));
        let answer = answer.and_then(|answer| self.core.sync_long_record().map(|()| answer));
        self.timeline.publish(&self.core);
        self.timeline.appended.store(true, Ordering::Release);
        answer
    }
}
