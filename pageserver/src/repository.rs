//! All timelines of a page server: opening, importing, branching, and their background work.

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::{Mutex, RwLock};
use pgstrata_blob::{BlobError, Store};
use pgstrata_format::index::{Ancestor, TimelineIndex};
use pgstrata_ids::{Generation, Lsn, TenantId, TimelineId};
use tokio::runtime::Handle;

use crate::import;
use crate::layer::LayerSource;
use crate::receiver::{Safekeepers, follow};
use crate::remote::{RemoteIndex, index_object, list_timelines};
use crate::timeline::{Limits, Timeline};

/// The job that uploads what was ingested.
pub const FLUSH: &str = "flush";
/// The job that merges layers.
pub const COMPACT: &str = "compact";
/// How soon what failed on a timeline is tried again there.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// How soon a timeline that the object store did not give is asked for again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// How soon background work looks again.
const MOMENT: Duration = Duration::from_millis(20);
/// How long a request waits for WAL that may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// A position that PostgreSQL reports may lie behind a page header that no record follows yet.
const LONGEST_PAGE_HEADER: u64 = 40;

/// A request that can't be met as it was made: the caller's business, not a failure of ours.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    /// There is nothing of that name.
    #[error("{0}")]
    NotFound(String),
    /// It contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// It makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// There is no room for a request now: it may be made again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}: try again")]
pub struct Busy(pub String);

/// What is being done with names and timelines now. Everything that takes a while claims what it
/// is about first, so that the lock is held only to look and to note.
#[derive(Default)]
struct Underway {
    /// Names that are about to be given.
    names: HashSet<String>,
    /// Timelines that are made, renamed or deleted.
    changing: HashSet<TimelineId>,
    /// Timelines that branches are being made from, one for each.
    parents: Vec<TimelineId>,
}

/// A part of [`Underway`]; ends when this is dropped.
#[derive(Default)]
struct Claim<'a> {
    underway: Option<&'a Mutex<Underway>>,
    name: Option<String>,
    changing: Option<TimelineId>,
    parent: Option<TimelineId>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let Some(underway) = self.underway else { return };
        let mut underway = underway.lock();
        if let Some(name) = &self.name {
            underway.names.remove(name);
        }
        if let Some(id) = &self.changing {
            underway.changing.remove(id);
        }
        if let Some(parent) = &self.parent
            && let Some(at) = underway.parents.iter().position(|id| id == parent)
        {
            underway.parents.swap_remove(at);
        }
    }
}

/// At which moment a branch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Everything committed so far.
    Now,
    /// The last record boundary at or before this LSN.
    Lsn(Lsn),
    /// The last commit at or before this time, in microseconds since 2000-01-01.
    Time(i64),
}

/// The timeline that another began from, and where.
type Origin = Option<(Arc<Timeline>, Lsn)>;

/// A timeline that is in the store and can't be served.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Tenant.
    pub tenant: TenantId,
    /// Its name, if that could be read.
    pub name: Option<String>,
    /// Why.
    pub error: String,
    /// It was the object store that failed, which may answer later: the index is read again until it can be.
    pub is_tried_again: bool,
}

impl Broken {
    fn new(tenant: TenantId, error: &anyhow::Error) -> Broken {
        let failed = |cause: &(dyn std::error::Error + 'static)| {
            matches!(cause.downcast_ref(), Some(BlobError::Failed { .. }))
        };
        Broken {
            tenant,
            name: None,
            error: format!("{error:#}").replace('\n', " "),
            is_tried_again: error.chain().any(failed),
        }
    }

    /// One whose ancestor is not served (yet).
    fn without_ancestor(index: &TimelineIndex) -> Broken {
        Broken {
            tenant: index.tenant.parse().unwrap_or(TenantId([0; 16])),
            name: Some(index.name.clone()),
            error: "its ancestor can't be read".to_owned(),
            is_tried_again: true,
        }
    }
}

/// Background work on one timeline: true if there was any.
type Job = fn(&Timeline) -> Result<bool>;

/// The timelines of a page server.
pub struct Repository {
    store: Store,
    source: Arc<LayerSource>,
    runtime: Handle,
    generation: Generation,
    limits: Limits,
    safekeepers: Arc<dyn Safekeepers>,
    timelines: RwLock<BTreeMap<TimelineId, Arc<Timeline>>>,
    /// Those that are not served.
    broken: RwLock<BTreeMap<TimelineId, Broken>>,
    underway: Mutex<Underway>,
    followers: Mutex<HashMap<TimelineId, JoinHandle<()>>>,
    background: Mutex<Vec<JoinHandle<()>>>,
    stopping: AtomicBool,
    /// By job.
    failures: Arc<Mutex<BTreeMap<&'static str, Failures>>>,
}

/// What became of one job of the background.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    /// How often it failed.
    pub count: u64,
    /// What its first panics said.
    pub panics: Vec<String>,
}

impl Failures {
    /// A panic is a fault of the program; a few of them tell enough.
    const PANICS_KEPT: usize = 4;

    fn add(&mut self, error: &anyhow::Error) {
        self.count += 1;
        if let Some(Panicked(text)) = error.downcast_ref()
            && self.panics.len() < Failures::PANICS_KEPT
        {
            self.panics.push(text.clone());
        }
    }
}

/// A thread panicked.
#[derive(Debug, thiserror::Error)]
#[error("a panic: {0}")]
struct Panicked(String);

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".into())
}

impl Repository {
    /// Opens every timeline in the object store and starts to follow it.
    pub async fn open(
        source: Arc<LayerSource>,
        generation: Generation,
        limits: Limits,
        safekeepers: Arc<dyn Safekeepers>,
    ) -> Result<Arc<Repository>> {
        let store = source.store.clone();
        let mut indexes = HashMap::new();
        let mut broken = BTreeMap::new();
        for (tenant, id) in list_timelines(&store).await? {
            match RemoteIndex::open(&store, tenant, id, generation).await {
                Ok(index) => drop(indexes.insert(id, index)),
                Err(error) => drop(broken.insert(id, Broken::new(tenant, &error))),
            }
        }
        let repository = Arc::new(Repository {
            store,
            runtime: Handle::current(),
            source,
            generation,
            limits,
            safekeepers,
            timelines: RwLock::default(),
            broken: RwLock::new(broken),
            underway: Mutex::default(),
            followers: Mutex::default(),
            background: Mutex::default(),
            stopping: AtomicBool::new(false),
            failures: Arc::default(),
        });
        while !indexes.is_empty() {
            let before = indexes.len();
            let ids: Vec<_> = indexes.keys().copied().collect();
            for id in ids {
                let Some(ancestor) = repository.ancestor_of(&indexes[&id].current()) else {
                    continue;
                };
                let Some(index) = indexes.remove(&id) else { continue };
                let tenant = index.current().tenant.parse().unwrap_or(TenantId([0; 16]));
                let added = ancestor.and_then(|ancestor| repository.add(index, ancestor));
                if let Err(error) = added {
                    repository.note_broken(id, Broken::new(tenant, &error));
                }
            }
            if indexes.len() == before {
                for (id, index) in indexes.drain() {
                    repository.note_broken(id, Broken::without_ancestor(&index.current()));
                }
            }
        }
        for (id, broken) in repository.broken() {
            tracing::error!(timeline = %id, "not served: {}", broken.error);
        }
        for timeline in repository.all() {
            // What a reset left undone.
            let replaced = timeline.replaces().and_then(|id| repository.timeline(id).ok());
            if let Some(replaced) = replaced.filter(|replaced| !replaced.is_deleted()) {
                repository.finish_replacing(&replaced).await;
            }
        }
        for timeline in repository.all() {
            repository.start_following(&timeline)?;
        }
        repository.start_background()?;
        Ok(repository)
    }

    /// Where the timeline of an index began. `None` if its ancestor is not there (yet).
    fn ancestor_of(&self, index: &TimelineIndex) -> Option<Result<Origin>> {
        let Some(ancestor) = &index.ancestor else { return Some(Ok(None)) };
        let (parent, lsn) = match (ancestor.timeline.parse::<TimelineId>(), ancestor.lsn.parse()) {
            (Ok(parent), Ok(lsn)) => (parent, lsn),
            (Err(error), _) => return Some(Err(error.into())),
            (_, Err(error)) => return Some(Err(anyhow::Error::from(error))),
        };
        let parent = self.timelines.read().get(&parent).cloned()?;
        Some(Ok(Some((parent, lsn))))
    }

    fn note_broken(&self, id: TimelineId, broken: Broken) {
        self.broken.write().insert(id, broken);
    }

    /// Timelines that are in the store and not served.
    pub fn broken(&self) -> BTreeMap<TimelineId, Broken> {
        self.broken.read().clone()
    }

    /// Lets go of a timeline that another page server has now.
    fn let_go(&self, timeline: &Timeline, reason: &str) {
        timeline.fail(reason.to_owned());
        timeline.stop();
        let error = anyhow::anyhow!("{reason}");
        let mut broken = Broken::new(timeline.info.tenant, &error);
        broken.name = Some(timeline.name());
        // First known as lost, so that it is never neither.
        self.note_broken(timeline.info.id, broken);
        self.timelines.write().remove(&timeline.info.id);
    }

    fn add(
        &self,
        index: RemoteIndex,
        ancestor: Option<(Arc<Timeline>, Lsn)>,
    ) -> Result<Arc<Timeline>> {
        let timeline = Timeline::new(index, ancestor, &self.source, self.limits, self.generation)?;
        self.timelines.write().insert(timeline.info.id, Arc::clone(&timeline));
        Ok(timeline)
    }

    fn start_following(&self, timeline: &Arc<Timeline>) -> Result<()> {
        if timeline.is_deleted() {
            return Ok(());
        }
        let safekeepers = Arc::clone(&self.safekeepers);
        let followed = Arc::clone(timeline);
        let failures = Arc::clone(&self.failures);
        let thread = std::thread::Builder::new()
            .name("ingest".into())
            .spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| follow(&followed, &*safekeepers)));
                if let Err(panic) = ended {
                    let text = format!("the ingest thread panicked: {}", panic_text(&*panic));
                    let error = Panicked(text.clone()).into();
                    failures.lock().entry("ingest").or_default().add(&error);
                    followed.fail(text);
                }
            })
            .context("can't start an ingest thread")?;
        self.followers.lock().insert(timeline.info.id, thread);
        Ok(())
    }

    fn start_background(self: &Arc<Self>) -> Result<()> {
        let jobs: [(&'static str, Job); 2] = [
            (FLUSH, Timeline::flush_one),
            (COMPACT, |timeline| Ok(timeline.wants_compaction() && timeline.compact()? > 0)),
        ];
        for (name, job) in jobs {
            let repository = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(name.into())
                .spawn(move || repository.work(name, job))
                .with_context(|| format!("can't start the {name} thread"))?;
            self.background.lock().push(thread);
        }
        let repository = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("reopen".into())
            .spawn(move || repository.keep_reopening())
            .context("can't start the reopen thread")?;
        self.background.lock().push(thread);
        Ok(())
    }

    /// Tries again to open timelines that the object store did not give, until the work is to end.
    fn keep_reopening(&self) {
        let mut tried = Instant::now();
        while !self.stopping.load(Ordering::Acquire) {
            std::thread::sleep(MOMENT);
            if tried.elapsed() < REOPEN_PAUSE {
                continue;
            }
            for (id, broken) in self.broken().into_iter().filter(|(_, one)| one.is_tried_again) {
                match self.reopen(id, broken.tenant) {
                    Ok(()) => tracing::info!(timeline = %id, "served again"),
                    Err(now) => self.note_broken(id, now),
                }
            }
            tried = Instant::now();
        }
    }

    /// Opens a timeline that is not served. An error says what is wrong with it now.
    fn reopen(&self, id: TimelineId, tenant: TenantId) -> Result<(), Broken> {
        let broken = |error: anyhow::Error| Broken::new(tenant, &error);
        let opened = RemoteIndex::open(&self.store, tenant, id, self.generation);
        let index = self.runtime.block_on(opened).map_err(broken)?;
        let current = index.current();
        let Some(ancestor) = self.ancestor_of(&current) else {
            return Err(Broken::without_ancestor(&current));
        };
        let timeline = ancestor.and_then(|ancestor| self.add(index, ancestor)).map_err(broken)?;
        self.broken.write().remove(&id);
        if let Some(replaced) = timeline.replaces().and_then(|id| self.timeline(id).ok())
            && let Err(error) = replaced.mark_deleted()
        {
            tracing::warn!(timeline = %replaced.info.id, "can't mark a replaced branch deleted: {error:#}");
        }
        self.start_following(&timeline).map_err(broken)
    }

    /// Does one job on every timeline, until the work is to end. What fails is tried again after a
    /// pause, which others do not wait for; what panics fails.
    fn work(&self, name: &'static str, job: Job) {
        let mut paused: HashMap<TimelineId, Instant> = HashMap::new();
        while !self.stopping.load(Ordering::Acquire) {
            let mut worked = false;
            let now = Instant::now();
            paused.retain(|_, until| *until > now);
            for timeline in self.all() {
                let id = timeline.info.id;
                if paused.contains_key(&id) {
                    continue;
                }
                let done = catch_unwind(AssertUnwindSafe(|| job(&timeline)))
                    .unwrap_or_else(|panic| Err(Panicked(panic_text(&*panic)).into()));
                match done {
                    Ok(did) => {
                        worked |= did;
                        timeline.set_trouble(name, None);
                    }
                    Err(error) => {
                        if let Some(reason) = timeline.lost() {
                            self.let_go(&timeline, &reason);
                            continue;
                        }
                        tracing::error!(timeline = %id, "can't {name}: {error:#}");
                        self.failures.lock().entry(name).or_default().add(&error);
                        timeline.set_trouble(name, Some(format!("{error:#}").replace('\n', " ")));
                        paused.insert(id, Instant::now() + FAILURE_PAUSE);
                    }
                }
            }
            if !worked {
                std::thread::sleep(MOMENT);
            }
        }
    }

    /// How often jobs of the background failed since this process began.
    pub fn failures(&self) -> BTreeMap<&'static str, Failures> {
        self.failures.lock().clone()
    }

    /// Threads that panicked: a fault of this program, which a restart may get around.
    pub fn panics(&self) -> Vec<String> {
        let failures = self.failures.lock();
        failures.values().flat_map(|failures| failures.panics.iter().cloned()).collect()
    }

    /// Every timeline, deleted ones too.
    pub fn all(&self) -> Vec<Arc<Timeline>> {
        self.timelines.read().values().cloned().collect()
    }

    /// Every branch.
    pub fn branches(&self) -> Vec<Arc<Timeline>> {
        let mut all = self.all();
        let replaced: HashSet<_> = all.iter().filter_map(|timeline| timeline.replaces()).collect();
        all.retain(|timeline| !timeline.is_deleted() && !replaced.contains(&timeline.info.id));
        all
    }

    /// A timeline by id.
    pub fn timeline(&self, id: TimelineId) -> Result<Arc<Timeline>> {
        let found = self.timelines.read().get(&id).cloned();
        found.ok_or_else(|| match self.broken.read().get(&id) {
            Some(broken) => anyhow::anyhow!("timeline {id} is not served: {}", broken.error),
            None => Refused::NotFound(format!("there is no timeline {id}")).into(),
        })
    }

    /// A branch by name.
    pub fn branch(&self, name: &str) -> Result<Arc<Timeline>> {
        let found = self.branches().into_iter().find(|timeline| timeline.name() == name);
        found.ok_or_else(|| {
            let broken = self.broken.read();
            let named = |broken: &&Broken| broken.name.as_deref() == Some(name);
            if let Some(broken) = broken.values().find(named) {
                return anyhow::anyhow!("branch '{name}' is not served: {}", broken.error);
            }
            let hint = "'pgstrata branch list' shows those that are";
            Refused::NotFound(format!("there is no branch '{name}' ({hint})")).into()
        })
    }

    fn check_new_name(&self, name: &str) -> Result<()> {
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if !first || name.len() > 100 || !name.chars().all(valid) || name.contains("..") {
            let rule =
                "letters, digits, '-', '_', '.' and '/', at most 100, a letter or digit first";
            anyhow::bail!(Refused::Invalid(format!("'{name}' is no branch name (use {rule})")));
        }
        Ok(())
    }

    /// Claims a name that no branch has, for a timeline that is made or gets another name.
    fn claim_name(&self, name: &str, id: Option<TimelineId>) -> Result<Claim<'_>> {
        self.check_new_name(name)?;
        let mut underway = self.underway.lock();
        let known = match self.branch(name) {
            Ok(_) => true,
            Err(error) => error.downcast_ref::<Refused>().is_none(),
        };
        if known || underway.names.contains(name) {
            anyhow::bail!(Refused::Conflict(format!("branch '{name}' exists already")));
        }
        let mut claim = Claim::default();
        if let Some(id) = id {
            claim.changing = Some(self.note_change(&mut underway, id)?);
        }
        underway.names.insert(name.to_owned());
        claim.name = Some(name.to_owned());
        claim.underway = Some(&self.underway);
        Ok(claim)
    }

    fn note_change(&self, underway: &mut Underway, id: TimelineId) -> Result<TimelineId> {
        if !underway.changing.insert(id) {
            let text = format!("timeline {id} is being changed by another request");
            anyhow::bail!(Refused::Conflict(text));
        }
        Ok(id)
    }

    /// Imports a data directory as a new tenant's first branch. Blocks.
    pub fn import(
        &self,
        tenant: TenantId,
        id: TimelineId,
        name: &str,
        archive: impl Read,
    ) -> Result<Arc<Timeline>> {
        let _claim = self.claim_name(name, Some(id))?;
        if self.timeline(id).err().is_none_or(|error| error.downcast_ref::<Refused>().is_none()) {
            anyhow::bail!(Refused::Conflict(format!("timeline {id} exists already")));
        }
        if let Some((lost, _)) = self.broken().into_iter().find(|(_, broken)| broken.name.is_none())
        {
            // An empty cluster in the place of one that only can't be read would be taken for it.
            anyhow::bail!(Refused::Conflict(format!(
                "the index of timeline {lost} can't be read, and may be that of '{name}': restore it \
                 or remove it before a cluster is imported"
            )));
        }
        let imported = import::read_archive(archive, &self.source.directory)
            .map_err(|error| Refused::Invalid(format!("can't import: {error:#}")))?;
        let state = &imported.state;
        let index = TimelineIndex {
            sequence: 1,
            generation: self.generation.0,
            tenant: tenant.to_string(),
            timeline: id.to_string(),
            name: name.to_owned(),
            ancestor: None,
            start_lsn: imported.start_lsn.to_string(),
            start_record: imported.record_start.to_string(),
            remote_consistent_lsn: imported.start_lsn.to_string(),
            last_record: imported.record_start.to_string(),
            system_id: state.control.system_identifier,
            pg_version: state.version().major(),
            segment_size: u64::from(state.control.wal_segment_size),
            created: jiff::Timestamp::now().to_string(),
            deleted: false,
            replaces: None,
            layers: Vec::new(),
        };
        // The index comes with the last of it: an import that fails half-way never was.
        let runtime = self.runtime.clone();
        let index = RemoteIndex::absent(&self.store, runtime, tenant, id, index);
        let timeline = Timeline::new(index, None, &self.source, self.limits, self.generation)?;
        timeline.import_image(imported.start_lsn, imported.record_start, imported.values)?;
        self.timelines.write().insert(id, Arc::clone(&timeline));
        self.start_following(&timeline)?;
        Ok(timeline)
    }

    /// Where a branch of `from` at `moment` starts, and the start of the record before. Blocks
    /// until everything before is ingested.
    pub fn resolve_moment(&self, from: &Timeline, moment: Moment) -> Result<(Lsn, Lsn)> {
        let lsn = match moment {
            Moment::Now => return Ok(from.progress.last_record()),
            Moment::Time(time) => {
                let (end, _) = from.progress.last_record();
                from.wait(end, PATIENCE).map_err(anyhow::Error::msg)?;
                let found = from.lsn_at_time(time, end)?.ok_or_else(|| {
                    let name = from.name();
                    Refused::Invalid(format!(
                        "branch '{name}' has no commit at or before that time"
                    ))
                })?;
                return Ok((found.0, Lsn(found.1.record_start)));
            }
            Moment::Lsn(lsn) => lsn,
        };
        if lsn < from.oldest_lsn() {
            let (name, oldest) = (from.name(), from.oldest_lsn());
            anyhow::bail!(Refused::Invalid(format!(
                "{lsn} is before the history of branch '{name}', which starts at {oldest}"
            )));
        }
        let reached = Lsn(lsn.0.saturating_sub(LONGEST_PAGE_HEADER).max(from.oldest_lsn().0));
        let wanted = if lsn.page_offset() <= LONGEST_PAGE_HEADER { reached } else { lsn };
        if from.progress.lsn() < wanted {
            from.progress.wait(wanted, PATIENCE.min(Duration::from_secs(3))).map_err(|error| {
                Refused::Invalid(format!(
                    "{lsn} is in the future of branch '{}': {error}",
                    from.name()
                ))
            })?;
        }
        let last = from.progress.last_record();
        if last.0 <= lsn {
            return Ok(last);
        }
        from.wait(lsn, PATIENCE).map_err(anyhow::Error::msg)?;
        match from.boundary_at_or_before(lsn)? {
            Some((end, boundary)) => Ok((end, Lsn(boundary.record_start))),
            None => {
                // Before the first record that was ingested there is only the base.
                let root = from.root();
                Ok((root.info.start_lsn, root.info.start_record))
            }
        }
    }

    /// Creates a branch: one index object. Blocks.
    pub fn create_branch(&self, name: &str, from: &str, moment: Moment) -> Result<Arc<Timeline>> {
        self.create_branch_as(name, from, moment, None)
    }

    /// Creates a branch in the place of the one that has its name, in one step for whoever looks: that one is there
    /// until the new one's index is, and from then on it is not. Blocks.
    pub fn replace_branch(&self, name: &str, from: &str, moment: Moment) -> Result<Arc<Timeline>> {
        let old = self.branch(name)?;
        let _claim = self.claim_for_deletion(&old)?;
        let new = self.create_branch_as(name, from, moment, Some(&old))?;
        if let Err(error) = old.mark_deleted() {
            // It is not there any more all the same, and the next start marks it.
            tracing::warn!(timeline = %old.info.id, "can't mark a replaced branch deleted: {error:#}");
        }
        old.stop();
        Ok(new)
    }

    async fn finish_replacing(&self, replaced: &Arc<Timeline>) {
        let timeline = Arc::clone(replaced);
        let marked = tokio::task::spawn_blocking(move || timeline.mark_deleted()).await;
        match marked {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let id = replaced.info.id;
                tracing::warn!(timeline = %id, "can't mark a replaced branch deleted: {error:#}");
            }
            Err(panic) => tracing::error!("marking a branch deleted panicked: {panic}"),
        }
    }

    fn create_branch_as(
        &self,
        name: &str,
        from: &str,
        moment: Moment,
        replaced: Option<&Timeline>,
    ) -> Result<Arc<Timeline>> {
        let from = self.branch(from)?;
        let (lsn, record_start) = self.resolve_moment(&from, moment)?;
        // A moment before the parent's own start belongs to the parent's ancestor.
        let mut parent = Arc::clone(&from);
        while let Some((ancestor, branch_lsn)) = &parent.ancestor
            && lsn < *branch_lsn
        {
            parent = Arc::clone(ancestor);
        }
        let mut claim = match replaced {
            None => self.claim_name(name, None)?,
            // Whoever wants the name finds it taken, by the old one or the new one.
            Some(_) => Claim::default(),
        };
        claim.underway = Some(&self.underway);
        {
            let mut underway = self.underway.lock();
            if from.is_deleted() {
                let text = format!("branch '{}' was deleted meanwhile", from.name());
                anyhow::bail!(Refused::NotFound(text));
            }
            if underway.changing.contains(&from.info.id) {
                let text = format!("branch '{}' is being changed", from.name());
                anyhow::bail!(Busy(text));
            }
            underway.parents.push(from.info.id);
            claim.parent = Some(from.info.id);
        }
        let id = TimelineId(rand::random());
        let index = TimelineIndex {
            sequence: 1,
            generation: self.generation.0,
            tenant: parent.info.tenant.to_string(),
            timeline: id.to_string(),
            name: name.to_owned(),
            ancestor: Some(Ancestor { timeline: parent.info.id.to_string(), lsn: lsn.to_string() }),
            start_lsn: lsn.to_string(),
            // Kept here: the ancestor notes boundaries by batches, and may batch differently when
            // it ingests the same WAL again.
            start_record: record_start.to_string(),
            remote_consistent_lsn: lsn.to_string(),
            last_record: record_start.to_string(),
            system_id: parent.info.system_id.0,
            pg_version: parent.info.version.major(),
            segment_size: parent.info.segment_size,
            created: jiff::Timestamp::now().to_string(),
            deleted: false,
            replaces: replaced.map(|old| old.info.id.to_string()),
            layers: Vec::new(),
        };
        let tenant = parent.info.tenant;
        let index = self.runtime.block_on(async {
            let created = RemoteIndex::create(&self.store, tenant, id, index).await;
            if created.is_err() {
                // Its answer may have been lost: a branch that nobody was told of must not appear
                // at the next start. If this fails too, it does, and can be deleted.
                let _ = self.store.delete(&index_object(tenant, id)).await;
            }
            created
        })?;
        let timeline = self.add(index, Some((parent, lsn)))?;
        self.start_following(&timeline)?;
        Ok(timeline)
    }

    /// Deletes a branch without children. What it shares with nobody is left to the scrub.
    pub fn delete_branch(&self, name: &str) -> Result<()> {
        let timeline = self.branch(name)?;
        let _claim = self.claim_for_deletion(&timeline)?;
        timeline.mark_deleted()?;
        timeline.stop();
        Ok(())
    }

    /// Claims a branch that is about to be deleted: it has no children, and none are being made.
    fn claim_for_deletion(&self, timeline: &Timeline) -> Result<Claim<'_>> {
        let name = timeline.name();
        let mut claim = Claim::default();
        {
            let mut underway = self.underway.lock();
            if underway.parents.contains(&timeline.info.id) {
                let text = format!("a branch of '{name}' is being made: delete that first");
                anyhow::bail!(Refused::Conflict(text));
            }
            claim.changing = Some(self.note_change(&mut underway, timeline.info.id)?);
            claim.underway = Some(&self.underway);
        }
        let children: Vec<_> = self
            .branches()
            .into_iter()
            .filter(|child| {
                child
                    .ancestor
                    .as_ref()
                    .is_some_and(|(parent, _)| parent.info.id == timeline.info.id)
            })
            .map(|child| child.name())
            .collect();
        if !children.is_empty() {
            let children = children.join(", ");
            let text = format!("branch '{name}' has children ({children}): delete them first");
            anyhow::bail!(Refused::Conflict(text));
        }
        Ok(claim)
    }

    /// Gives a branch another name.
    pub fn rename_branch(&self, old: &str, new: &str) -> Result<()> {
        let timeline = self.branch(old)?;
        let _claim = self.claim_name(new, Some(timeline.info.id))?;
        timeline.rename(new)
    }

    /// Ends ingest and all background work. What was not uploaded is forgotten with this process,
    /// and ingested again by the next one.
    pub fn stop(&self) {
        let timelines = self.all();
        timelines.iter().for_each(|timeline| timeline.stop());
        for (id, thread) in std::mem::take(&mut *self.followers.lock()) {
            if thread.join().is_err() {
                tracing::error!(timeline = %id, "the ingest thread panicked");
            }
        }
        self.stopping.store(true, Ordering::Release);
        for thread in std::mem::take(&mut *self.background.lock()) {
            if thread.join().is_err() {
                tracing::error!("a background thread panicked");
            }
        }
    }

    /// Ends ingest and puts everything ingested into object storage.
    pub fn shut_down(&self) {
        self.stop();
        for timeline in self.all() {
            if let Err(error) = timeline.flush_all() {
                // Not lost: the safekeepers keep what was not uploaded.
                tracing::warn!(timeline = %timeline.info.id, "can't flush: {error:#}");
            }
        }
    }

    /// The objects' names that timelines refer to, for accounting.
    pub fn object_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for timeline in self.all() {
            for file in timeline.layer_files() {
                if seen.insert((timeline.info.id, file.entry.name.clone())) {
                    bytes += file.entry.size;
                }
            }
        }
        bytes
    }
}
