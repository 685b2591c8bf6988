//! What HTTP handlers can do: look at what is in memory, and hand work to bounded pools.
//!
//! Handlers run on the few threads that serve everybody, so they never hold a [`Repository`]: what
//! blocks can only be written inside of [`Service::run`], on threads of its own. Each kind of work
//! has its own share of these, so that requests that wait take nothing from those that don't.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use pgstrata_ids::Lsn;
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::repository::{Busy, Repository};
use crate::serve::http::Failure;
use crate::serve::sizes::Sizes;
use crate::timeline::Timeline;

/// How long a request waits for a thread before it is told that there is none.
const QUEUE_PATIENCE: Duration = Duration::from_secs(10);
/// A wait for WAL holds a thread for so long at a time, and goes on only while its client is there.
const SLICE: Duration = Duration::from_millis(100);
/// How long a wait goes on while ingest is known not to move.
const STALL_PATIENCE: Duration = Duration::from_secs(5);

/// A kind of work, with its own number of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Answered from memory and a few layers.
    Read,
    /// Writes to the object store, or makes a directory.
    Change,
    /// Waits for WAL.
    Wait,
    /// Takes in a cluster.
    Import,
    /// Reads sizes of all relations, from many layers.
    Size,
}

impl Work {
    const ALL: [Work; 5] = [Work::Read, Work::Change, Work::Wait, Work::Import, Work::Size];

    const fn threads(self) -> usize {
        match self {
            Work::Read => 32,
            Work::Change => 32,
            Work::Wait => 64,
            Work::Import => 2,
            Work::Size => 2,
        }
    }
}

/// What handlers share. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    repository: Arc<Repository>,
    metrics: Arc<Metrics>,
    pools: [Arc<Semaphore>; Work::ALL.len()],
    sizes: Sizes,
}

impl Service {
    /// Serves these timelines.
    pub fn new(repository: Arc<Repository>, metrics: Arc<Metrics>) -> Service {
        let pools = Work::ALL.map(|work| Arc::new(Semaphore::new(work.threads())));
        let sizes = Sizes::default();
        Service { shared: Arc::new(Shared { repository, metrics, pools, sizes }) }
    }

    /// Runs work that may block. Once begun it is carried through, whatever becomes of the client.
    pub async fn run<T: Send + 'static>(
        &self,
        kind: Work,
        work: impl FnOnce(&Repository) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let pool = Arc::clone(&self.shared.pools[kind as usize]);
        let waited = tokio::time::timeout(QUEUE_PATIENCE, pool.acquire_owned()).await;
        let busy = || Busy(format!("too many requests of this kind at once ({kind:?})"));
        let permit = waited.map_err(|_| busy())?.map_err(|_| busy())?;
        let shared = Arc::clone(&self.shared);
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&shared.repository)
        });
        Ok(task.await??)
    }

    /// Waits until a branch can be read at `lsn`, or the client is gone.
    pub async fn wait(
        &self,
        find: impl Fn(&Repository) -> anyhow::Result<Arc<Timeline>> + Clone + Send + 'static,
        lsn: Lsn,
        patience: Duration,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let left = patience.saturating_sub(started.elapsed());
            let find = find.clone();
            let slice = move |repository: &Repository| {
                let timeline = find(repository)?;
                let waited = timeline.wait(lsn, SLICE.min(left));
                Ok((waited, timeline.has_failed(), timeline.failure().is_some()))
            };
            let (waited, failed, stalled) = self.run(Work::Wait, slice).await?;
            let Err(error) = waited else { return Ok(()) };
            let waited = started.elapsed();
            if failed {
                return Err(anyhow!(error).into());
            }
            if waited >= patience || stalled && waited >= STALL_PATIENCE {
                return Err(Busy(error).into());
            }
        }
    }

    /// What is known of branches' sizes.
    pub fn known_sizes(&self) -> &Sizes {
        &self.shared.sizes
    }

    /// The text of `/metrics`, from what is in memory.
    pub fn metrics(&self) -> Result<String, prometheus::Error> {
        let metrics = &self.shared.metrics;
        for timeline in self.shared.repository.branches() {
            metrics.observe(&timeline);
        }
        metrics.observe_repository(&self.shared.repository);
        metrics.text()
    }

    /// What threads said that panicked.
    pub fn panics(&self) -> Vec<String> {
        self.shared.repository.panics()
    }
}
