//! One timeline: its layers, how far it is ingested, and how its values are found.

mod believing;
mod compact;
mod flush;
mod read;
mod waiter;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pgstrata_ids::{Generation, Key, Lsn, SystemId, TenantId, TimelineId};
use pgstrata_pg_wal::PgVersion;
use quick_cache::sync::Cache;

use crate::layer::{Gathered, LayerFile, LayerMap, LayerSource, OpenLayer, split_flags};
use crate::lock::{Mutex, RwLock, Turn};
use crate::receiver::believing::Believing;
use crate::remote::RemoteIndex;
use crate::value::Database;
use read::CommitTimes;

pub use read::{ReadError, Unmakeable, boundary_key};
pub use waiter::LsnWaiter;

/// Bounds that a page server keeps.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// An open layer freezes at this size, in bytes of values.
    pub open_layer_bytes: usize,
    /// An open layer with anything in it freezes at this age, in seconds.
    pub open_layer_seconds: u64,
    /// Ingest waits while this many layers are frozen and not yet uploaded.
    pub frozen_layers: usize,
    /// L0 layers are compacted from this many on.
    pub level0_layers: usize,
    /// Compacted layers have about this many bytes.
    pub layer_bytes: usize,
    /// A page's chain of changes without an image is kept shorter than this.
    pub chain: u32,
    /// Compaction writes an image for a page whose chain is at least this long.
    pub compacted_chain: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            open_layer_bytes: 64 << 20,
            open_layer_seconds: 30,
            frozen_layers: 3,
            level0_layers: 6,
            layer_bytes: 64 << 20,
            chain: 64,
            compacted_chain: 16,
        }
    }
}

/// How many pages that can't be made are remembered, so that they can be shown.
const UNMAKEABLE_KEPT: usize = 1000;

/// How many safekeepers that sent rubbish are remembered.
const BAD_SOURCES_KEPT: usize = 16;

/// What never changes about a timeline.
#[derive(Clone)]
pub struct TimelineInfo {
    /// Tenant.
    pub tenant: TenantId,
    /// Timeline.
    pub id: TimelineId,
    /// First LSN that is this timeline's own.
    pub start_lsn: Lsn,
    /// Start of the last record before `start_lsn`.
    pub start_record: Lsn,
    /// Database system identifier.
    pub system_id: SystemId,
    /// PostgreSQL version.
    pub version: PgVersion,
    /// Bytes of a WAL segment.
    pub segment_size: u64,
    /// Creation time, RFC 3339.
    pub created: String,
}

/// What a read looks through, newest first.
#[derive(Clone)]
struct Layers {
    open: Arc<OpenLayer>,
    /// Newest first.
    frozen: Vec<Arc<OpenLayer>>,
    map: Arc<LayerMap>,
}

type DatabaseHistory = Arc<Vec<(Lsn, Database)>>;

/// What is remembered of databases.
#[derive(Default)]
struct Databases {
    histories: HashMap<(u32, u32), DatabaseHistory>,
    /// Counts what made a history be forgotten: what was read before is not remembered after.
    changes: u64,
}

/// A page as of an LSN, and how often [something was forgotten](Timeline::forgotten) before it was made.
type CachedPage = Arc<(Lsn, u64, [u8; 8192])>;

/// One timeline of one tenant.
pub struct Timeline {
    /// What never changes.
    pub info: TimelineInfo,
    /// Where it branched off.
    pub ancestor: Option<(Arc<Timeline>, Lsn)>,
    /// Bounds.
    pub limits: Limits,
    generation: Generation,
    source: Arc<LayerSource>,
    layers: RwLock<Layers>,
    /// How far ingest has come.
    pub progress: LsnWaiter,
    index: RemoteIndex,
    remote_consistent: AtomicU64,
    databases: RwLock<Databases>,
    /// By bucket of boundaries, of those that are whole; 48 bytes for 16 MiB of WAL.
    commit_times: RwLock<BTreeMap<u64, Option<CommitTimes>>>,
    pages: Cache<Key, CachedPage>,
    /// How often what was ingested was forgotten. Changed with the layers: whoever reads it first and the layers then has none that are
    /// older.
    rewinds: AtomicU64,
    /// Each time: the number of it, and after where up to where.
    partings: RwLock<Vec<(u64, Lsn, Lsn)>>,
    /// How often that had been in the ancestor when this was made of it.
    ancestor_rewinds: u64,
    /// Whose WAL is taken in.
    believing: Mutex<Believing>,
    /// When what is decided of the members was read last, or why it could not be.
    decided_at: Mutex<Option<(Instant, Option<String>)>>,
    /// What was taken in parts from the log after here; 0 if nothing is known of that.
    parts_at: AtomicU64,
    /// Pages that can't be made, and why; the first [`UNMAKEABLE_KEPT`].
    unmakeable: Mutex<BTreeMap<Key, String>>,
    /// Safekeepers that sent what is no WAL, and the last reason; at most [`BAD_SOURCES_KEPT`].
    bad_sources: Mutex<BTreeMap<String, String>>,
    /// What fails of the background work now, by job.
    trouble: Mutex<BTreeMap<&'static str, String>>,
    /// Why ingest stopped for good, if it did.
    failure: Mutex<Option<String>>,
    /// Held by whoever changes the set of layer files.
    flushing: Turn<()>,
    /// Held by whoever compacts: two at once would both write what is in the same layers.
    compacting: Turn<()>,
    stopping: AtomicBool,
    freeze_requested: AtomicBool,
    layer_serial: AtomicU64,
}

impl Timeline {
    /// A timeline as its index describes it.
    pub fn new(
        index: RemoteIndex,
        ancestor: Option<(Arc<Timeline>, Lsn)>,
        source: &Arc<LayerSource>,
        limits: Limits,
        generation: Generation,
    ) -> Result<Arc<Timeline>> {
        let current = index.current();
        let info = TimelineInfo {
            tenant: current.tenant.parse()?,
            id: current.timeline.parse()?,
            start_lsn: current.start_lsn.parse()?,
            start_record: current.start_record.parse()?,
            system_id: SystemId(current.system_id),
            version: PgVersion::from_major(current.pg_version).with_context(|| {
                format!("PostgreSQL {} is not supported (15 to 18 are)", current.pg_version)
            })?,
            segment_size: current.segment_size,
            created: current.created.clone(),
        };
        let consistent: Lsn = current.remote_consistent_lsn.parse()?;
        let record_start: Lsn = current.last_record.parse()?;
        let mut files = Vec::new();
        for entry in &current.layers {
            let file = LayerFile::new(source, info.tenant, info.id, entry.clone())
                .with_context(|| format!("layer '{}' of timeline {}", entry.name, info.id))?;
            files.push(Arc::new(file));
        }
        let ancestor_rewinds =
            ancestor.as_ref().map_or(0, |(ancestor, _)| ancestor.rewinds.load(Ordering::Acquire));
        Ok(Arc::new(Timeline {
            info,
            ancestor,
            limits,
            generation,
            source: Arc::clone(source),
            layers: RwLock::new(Layers {
                open: Arc::new(OpenLayer::new(consistent)),
                frozen: Vec::new(),
                map: Arc::new(LayerMap::new(files)),
            }),
            progress: LsnWaiter::new(consistent, record_start),
            index,
            remote_consistent: AtomicU64::new(consistent.0),
            databases: RwLock::default(),
            commit_times: RwLock::default(),
            pages: Cache::new(4096),
            rewinds: AtomicU64::new(0),
            partings: RwLock::default(),
            ancestor_rewinds,
            believing: Mutex::default(),
            decided_at: Mutex::default(),
            parts_at: AtomicU64::new(0),
            unmakeable: Mutex::default(),
            bad_sources: Mutex::default(),
            trouble: Mutex::default(),
            failure: Mutex::new(None),
            flushing: Turn::new(()),
            compacting: Turn::new(()),
            stopping: AtomicBool::new(false),
            freeze_requested: AtomicBool::new(false),
            layer_serial: AtomicU64::new(0),
        }))
    }

    /// The branch's name.
    pub fn name(&self) -> String {
        self.index.current().name.clone()
    }

    /// Gives the branch another name; durable on return.
    pub fn rename(&self, name: &str) -> Result<()> {
        self.index.update(|index| name.clone_into(&mut index.name)).map(drop)
    }

    /// Marks the branch deleted; durable on return.
    pub fn mark_deleted(&self) -> Result<()> {
        self.index.update(|index| index.deleted = true).map(drop)
    }

    /// The timeline whose place this one took, if any.
    pub fn replaces(&self) -> Option<TimelineId> {
        self.index.current().replaces.as_ref()?.parse().ok()
    }

    /// Why no WAL is taken in any more, if so.
    pub fn frozen(&self) -> Option<String> {
        self.index.current().frozen.clone()
    }

    /// Whether the branch was deleted.
    pub fn is_deleted(&self) -> bool {
        self.index.current().deleted
    }

    /// Everything up to here is in object storage.
    pub fn remote_consistent_lsn(&self) -> Lsn {
        Lsn(self.remote_consistent.load(Ordering::Acquire))
    }

    /// Stops ingest of this timeline for good, for a reason that people must see.
    pub fn fail(&self, reason: String) {
        tracing::error!(timeline = %self.info.id, "ingest stopped: {reason}");
        let mut failure = self.failure.lock();
        if failure.is_none() {
            *failure = Some(reason.clone());
        }
        self.progress.fail(reason);
    }

    /// Ingest can't go on for now, for a reason that people must see, and is tried again.
    pub fn stall(&self, reason: String) {
        tracing::warn!(timeline = %self.info.id, "ingest waits: {reason}");
        self.progress.stall(Some(reason));
    }

    /// Ingest goes on.
    pub fn go_on(&self) {
        self.progress.stall(None);
    }

    /// Why ingest stopped or waits, if it does.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone().or_else(|| self.progress.stalled())
    }

    /// Why another page server has this timeline now, if one has.
    pub fn lost(&self) -> Option<String> {
        self.index.lost()
    }

    /// Whether ingest stopped for good.
    pub fn has_failed(&self) -> bool {
        self.failure.lock().is_some()
    }

    /// Takes down that a page can't be made. An error if this is not what went wrong.
    pub fn note_unmakeable(&self, key: Key, error: anyhow::Error) -> Result<()> {
        if error.downcast_ref::<Unmakeable>().is_none() {
            return Err(error);
        }
        let mut unmakeable = self.unmakeable.lock();
        if unmakeable.len() < UNMAKEABLE_KEPT && !unmakeable.contains_key(&key) {
            let text = format!("{error:#}");
            tracing::error!(timeline = %self.info.id, "a page is left without an image: {text}");
            unmakeable.insert(key, text);
        }
        Ok(())
    }

    /// Pages that could not be made: how many are known, and why one of them.
    pub fn unmakeable(&self) -> (usize, Option<String>) {
        let unmakeable = self.unmakeable.lock();
        (unmakeable.len(), unmakeable.values().next().cloned())
    }

    /// Takes down that a safekeeper sent what is no WAL.
    pub fn note_bad_source(&self, address: &str, reason: String) {
        let mut bad = self.bad_sources.lock();
        if bad.len() < BAD_SOURCES_KEPT || bad.contains_key(address) {
            bad.insert(address.to_owned(), reason);
        }
    }

    /// Safekeepers that sent what is no WAL, since this process began.
    pub fn bad_sources(&self) -> BTreeMap<String, String> {
        self.bad_sources.lock().clone()
    }

    /// Takes down what became of a job of the background.
    pub fn set_trouble(&self, job: &'static str, trouble: Option<String>) {
        let mut all = self.trouble.lock();
        match trouble {
            Some(trouble) => all.insert(job, trouble),
            None => all.remove(job),
        };
    }

    /// Why a job of the background fails, if its last attempt did.
    pub fn trouble(&self, job: &str) -> Option<String> {
        self.trouble.lock().get(job).cloned()
    }

    /// Asks the background work of this timeline to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.progress.stop();
    }

    /// Waits until everything up to `lsn` can be read: here, and what ancestors have of it. After a
    /// restart an ancestor may have to ingest again what its branches start from.
    pub fn wait(&self, lsn: Lsn, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        self.progress.wait(lsn, timeout)?;
        let (mut timeline, mut lsn) = (self, lsn);
        while let Some((ancestor, branch_lsn)) = &timeline.ancestor {
            lsn = lsn.min(*branch_lsn);
            let left = deadline.saturating_duration_since(Instant::now());
            ancestor
                .progress
                .wait(lsn, left)
                .map_err(|error| format!("ancestor '{}': {error}", ancestor.name()))?;
            timeline = ancestor;
        }
        Ok(())
    }

    /// Whether the ancestors have everything that this timeline starts from.
    pub fn has_ancestors(&self) -> bool {
        self.wait(self.info.start_lsn, Duration::ZERO).is_ok()
    }

    /// The ancestor and the LSN from which on it is not looked at. An error while it has not
    /// ingested so much: what it would answer now would be older than what was asked for.
    fn ancestor_for(&self, lsn: Lsn) -> Result<Option<(&Timeline, Lsn)>> {
        let Some((ancestor, branch_lsn)) = &self.ancestor else { return Ok(None) };
        if ancestor.rewinds.load(Ordering::Acquire) > self.ancestor_rewinds {
            let is_in = |(count, parts_at, end): &(u64, Lsn, Lsn)| {
                *count > self.ancestor_rewinds && (*parts_at < *branch_lsn && *branch_lsn <= *end)
            };
            if let Some((_, parts_at, _)) = ancestor.partings.read().iter().find(|one| is_in(one)) {
                let (own, name) = (self.name(), ancestor.name());
                anyhow::bail!(
                    "branch '{own}' begins at {branch_lsn} of branch '{name}', and what that had after {parts_at} was given up with \
                     the safekeepers that had it"
                );
            }
        }
        let lsn = lsn.min(*branch_lsn);
        let reached = ancestor.progress.lsn();
        anyhow::ensure!(
            reached >= lsn,
            "branch '{}' is ingested up to {reached} only, and '{}' needs it up to {lsn}",
            ancestor.name(),
            self.name()
        );
        Ok(Some((ancestor, lsn)))
    }

    /// Whether [`Timeline::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn snapshot(&self) -> Layers {
        self.layers.read().clone()
    }

    /// How often something was forgotten, here or in ancestors: what was made before is not remembered after.
    fn forgotten(&self) -> u64 {
        let own = self.rewinds.load(Ordering::Acquire);
        own + self.ancestor.as_ref().map_or(0, |(ancestor, _)| ancestor.forgotten())
    }

    /// What has all up to `lsn`, for a read that found that it was ingested.
    fn snapshot_to(&self, lsn: Lsn) -> Result<Layers> {
        let layers = self.snapshot();
        if self.rewinds.load(Ordering::Acquire) > 0 && layers.open.end_lsn() < lsn {
            let (end, name) = (layers.open.end_lsn(), self.name());
            anyhow::bail!(
                "what was ingested of branch '{name}' after {end} was given up with the safekeepers that had it"
            );
        }
        Ok(layers)
    }

    /// The layer that takes changes now.
    pub fn open_layer(&self) -> Arc<OpenLayer> {
        Arc::clone(&self.layers.read().open)
    }

    /// Gathers the values of `key` with `after` < LSN <= `lsn`, newest first, through this
    /// timeline and its ancestors, until nothing older is needed.
    pub fn gather(&self, key: &Key, lsn: Lsn, after: Lsn, into: &mut Gathered) -> Result<()> {
        let (mut timeline, mut lsn) = (self, lsn);
        loop {
            let layers = timeline.snapshot_to(lsn)?;
            let own = std::iter::once(&layers.open).chain(&layers.frozen);
            for layer in own.filter(|layer| layer.start_lsn() < lsn) {
                if layer.gather(key, lsn, after, into) {
                    return Ok(());
                }
            }
            if layers.map.gather(key, lsn, after, into)? {
                return Ok(());
            }
            if timeline.ancestor.as_ref().is_some_and(|(_, branch_lsn)| *branch_lsn <= after) {
                return Ok(());
            }
            let Some(ancestor) = timeline.ancestor_for(lsn)? else { return Ok(()) };
            (timeline, lsn) = ancestor;
        }
    }

    /// The keys in [`first`, `last`] that may have a value at or before `lsn`, other than blocks and SLRU pages. Some may
    /// have later values only: a layer that goes on after `lsn` is not looked at more closely.
    pub fn list(&self, first: Key, last: Key, lsn: Lsn) -> Result<BTreeSet<Key>> {
        let mut keys = BTreeSet::new();
        let (mut timeline, mut lsn) = (self, lsn);
        loop {
            let layers = timeline.snapshot_to(lsn)?;
            layers.open.list(first, last, &mut keys);
            layers.frozen.iter().for_each(|layer| layer.list(first, last, &mut keys));
            layers.map.list(first, last, lsn, &mut keys)?;
            let Some(ancestor) = timeline.ancestor_for(lsn)? else { return Ok(keys) };
            (timeline, lsn) = ancestor;
        }
    }

    /// Every value of `key` with `after` < LSN <= `lsn`, oldest first, without flags.
    pub fn history(&self, key: &Key, after: Lsn, lsn: Lsn) -> Result<Vec<(Lsn, Vec<u8>)>> {
        let mut values = match &self.ancestor {
            Some((_, branch_lsn)) if *branch_lsn > after => match self.ancestor_for(lsn)? {
                Some((ancestor, lsn)) => ancestor.history(key, after, lsn)?,
                None => Vec::new(),
            },
            _ => Vec::new(),
        };
        let own = values.len();
        let layers = match lsn {
            Lsn::MAX => self.snapshot(),
            _ => self.snapshot_to(lsn)?,
        };
        let mut each = |at: Lsn, value: &[u8]| {
            if at > after && at <= lsn {
                values.push((at, value.to_vec()));
            }
        };
        for file in layers.map.layers() {
            file.scan(*key, *key, &mut |_, at, stored| each(at, split_flags(stored).1))?;
        }
        for layer in layers.frozen.iter().rev().chain(std::iter::once(&layers.open)) {
            layer.history(key, after, lsn, &mut each);
        }
        values[own..].sort_by_key(|(at, _)| *at);
        Ok(values)
    }

    /// The oldest ancestor, which started from an import.
    pub fn root(&self) -> &Timeline {
        match &self.ancestor {
            Some((ancestor, _)) => ancestor.root(),
            None => self,
        }
    }

    /// Asks ingest to freeze the open layer soon.
    pub fn request_freeze(&self) {
        self.freeze_requested.store(true, Ordering::Release);
    }

    /// Whether somebody asked for a freeze since the last call.
    pub fn take_freeze_request(&self) -> bool {
        self.freeze_requested.swap(false, Ordering::AcqRel)
    }

    /// The layer files, oldest first, and what is not in files yet.
    pub fn layer_files(&self) -> Vec<Arc<LayerFile>> {
        let mut files: Vec<_> = self.snapshot().map.layers().cloned().collect();
        files.sort_by_key(|file| (file.end_lsn, file.min_key));
        files
    }
}
