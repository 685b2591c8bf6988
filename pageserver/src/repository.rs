//! All timelines of a page server: opening them, finding them, and their background work.

mod branches;
mod removal;

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pgstrata_blob::{BlobError, Store};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Generation, Lsn, TenantId, TimelineId};
use tokio::runtime::Handle;

use crate::layer::LayerSource;
use crate::lock::{Mutex, RwLock, wait_for};
use crate::receiver::{Safekeepers, follow};
use crate::remote::{RemoteIndex, list_timelines};
use crate::timeline::{Limits, Timeline};
pub use branches::Moment;
use branches::Underway;

/// The job that uploads what was ingested.
pub const FLUSH: &str = "flush";
/// The job that merges layers.
pub const COMPACT: &str = "compact";
/// How soon what failed on a timeline is tried again there.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks for what deleted branches leave.
const REMOVAL_PAUSE: Duration = Duration::from_secs(2);

/// How soon a timeline that the object store did not give is asked for again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// How soon background work looks again.
const MOMENT: Duration = Duration::from_millis(20);

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

/// What is said of branches that have one name: how to tell them apart, and how to part them.
fn namesakes_text(name: &str, timelines: &[Arc<Timeline>]) -> String {
    let described = timelines.iter().map(|timeline| {
        let info = &timeline.info;
        format!("timeline {} (tenant {}, made {})", info.id, info.tenant, info.created)
    });
    format!(
        "{} branches are named '{name}', and none is found by that name: {}. Rename or delete one by its id, with 'POST \
         /v1/timelines/ID/rename?to=NAME' or 'DELETE /v1/timelines/ID' to the page server",
        timelines.len(),
        described.collect::<Vec<_>>().join(", ")
    )
}

/// Background work on one timeline: true if there was any.
type Job = fn(&Timeline) -> Result<bool>;

/// The timelines of a page server.
pub struct Repository {
    store: Store,
    source: Arc<LayerSource>,
    runtime: Handle,
    generation: Generation,
    /// See [`Repository::open_as`].
    has_parted: bool,
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
        Repository::open_as(source, generation, limits, safekeepers, false).await
    }

    /// The same. With `has_parted` what is in the store and what safekeepers have need not be one history: of the
    /// timelines that are in the store now, none takes in WAL any more.
    pub async fn open_as(
        source: Arc<LayerSource>,
        generation: Generation,
        limits: Limits,
        safekeepers: Arc<dyn Safekeepers>,
        has_parted: bool,
    ) -> Result<Arc<Repository>> {
        let store = source.store.clone();
        let mut indexes = HashMap::new();
        let mut broken = BTreeMap::new();
        for (tenant, id) in list_timelines(&store).await? {
            match RemoteIndex::open(&store, tenant, id, generation, has_parted).await {
                Ok(index) => drop(indexes.insert(id, index)),
                Err(error) => drop(broken.insert(id, Broken::new(tenant, &error))),
            }
        }
        let repository = Arc::new(Repository {
            store,
            runtime: Handle::current(),
            source,
            generation,
            has_parted,
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
        for (id, text) in repository.namesakes() {
            tracing::error!(timeline = %id, "{text}");
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
        if let Some(reason) = timeline.frozen() {
            timeline.fail(reason);
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
        let repository = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("removal".into())
            .spawn(move || repository.keep_removing())
            .context("can't start the removal thread")?;
        self.background.lock().push(thread);
        Ok(())
    }

    /// Removes what deleted branches leave, until the work is to end.
    fn keep_removing(&self) {
        let mut done = BTreeSet::new();
        let mut looked = Instant::now();
        while !self.stopping.load(Ordering::Acquire) {
            std::thread::sleep(MOMENT);
            if looked.elapsed() >= REMOVAL_PAUSE {
                self.remove_wal_of_deleted(&mut done);
                looked = Instant::now();
            }
        }
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
        let opened = RemoteIndex::open(&self.store, tenant, id, self.generation, self.has_parted);
        let index = wait_for(&self.runtime, opened).map_err(broken)?;
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

    /// Branches that share their name with others, and what is said of them. Page servers that write one object store at
    /// the same time leave such: neither sees what the other makes. The name finds none of them, because which one is
    /// meant is not ours to choose; each is served by its timeline's id.
    pub fn namesakes(&self) -> BTreeMap<TimelineId, String> {
        let mut by_name: BTreeMap<String, Vec<Arc<Timeline>>> = BTreeMap::new();
        for timeline in self.branches() {
            by_name.entry(timeline.name()).or_default().push(timeline);
        }
        let mut all = BTreeMap::new();
        for (name, timelines) in by_name.into_iter().filter(|(_, found)| found.len() > 1) {
            let text = namesakes_text(&name, &timelines);
            all.extend(timelines.iter().map(|timeline| (timeline.info.id, text.clone())));
        }
        all
    }

    /// A branch by its timeline's id.
    pub fn branch_of(&self, id: TimelineId) -> Result<Arc<Timeline>> {
        let timeline = self.timeline(id)?;
        let is_branch = self.branches().iter().any(|branch| branch.info.id == id);
        let gone = || Refused::NotFound(format!("the branch of timeline {id} was deleted")).into();
        is_branch.then_some(timeline).ok_or_else(gone)
    }

    /// A branch by name.
    pub fn branch(&self, name: &str) -> Result<Arc<Timeline>> {
        let mut found = self.branches();
        found.retain(|timeline| timeline.name() == name);
        if found.len() > 1 {
            anyhow::bail!(namesakes_text(name, &found));
        }
        found.pop().ok_or_else(|| {
            let broken = self.broken.read();
            let named = |broken: &&Broken| broken.name.as_deref() == Some(name);
            if let Some(broken) = broken.values().find(named) {
                return anyhow::anyhow!("branch '{name}' is not served: {}", broken.error);
            }
            let hint = "'pgstrata branch list' shows those that are";
            Refused::NotFound(format!("there is no branch '{name}' ({hint})")).into()
        })
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
