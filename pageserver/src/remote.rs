//! Where a tenant's objects are, and how a timeline's index advances.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use parking_lot::Mutex;
use pgstrata_blob::{CasOutcome, PutOutcome, Store, Version};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Generation, TenantId, TimelineId};
use tokio::runtime::Handle;

const GENERATIONS: &str = "pageserver/generations";

/// The object that holds a timeline's index.
pub fn index_object(tenant: TenantId, timeline: TimelineId) -> String {
    format!("tenants/{tenant}/timelines/{timeline}/index")
}

/// Takes the next generation. Two page servers never get the same one.
pub async fn take_generation(store: &Store) -> Result<Generation> {
    let taken = store.list(GENERATIONS).await?;
    let last = taken.iter().filter_map(|info| info.path.rsplit('/').next()?.parse::<u64>().ok());
    let mut next = last.max().unwrap_or(0) + 1;
    loop {
        let content = format!("{:016x}", rand::random::<u64>());
        let object = format!("{GENERATIONS}/{next:020}");
        if store.put_if_absent(&object, Bytes::from(content)).await? == PutOutcome::Created {
            return Ok(Generation(next));
        }
        next += 1;
    }
}

/// The timelines in the store, as (tenant, timeline).
pub async fn list_timelines(store: &Store) -> Result<Vec<(TenantId, TimelineId)>> {
    let mut found = Vec::new();
    for info in store.list("tenants").await? {
        let parts: Vec<_> = info.path.split('/').collect();
        if let ["tenants", tenant, "timelines", timeline, "index"] = parts[..] {
            found.push((
                tenant.parse().with_context(|| format!("object '{}'", info.path))?,
                timeline.parse().with_context(|| format!("object '{}'", info.path))?,
            ));
        }
    }
    Ok(found)
}

/// A timeline's index, as last written or read by us. Advanced by compare-and-swap only, so a
/// page server that was replaced finds out before it can hide the newer one's layers.
pub struct RemoteIndex {
    store: Store,
    runtime: Handle,
    object: String,
    state: Mutex<(Arc<TimelineIndex>, Version)>,
}

impl RemoteIndex {
    /// Creates the index of a new timeline.
    pub async fn create(
        store: &Store,
        tenant: TenantId,
        timeline: TimelineId,
        index: TimelineIndex,
    ) -> Result<RemoteIndex> {
        let object = index_object(tenant, timeline);
        let bytes = Bytes::from(index.encode());
        match store.compare_and_swap(&object, None, bytes).await? {
            CasOutcome::Swapped(version) => Ok(RemoteIndex {
                store: store.clone(),
                runtime: Handle::current(),
                object,
                state: Mutex::new((Arc::new(index), version)),
            }),
            CasOutcome::Conflict => bail!("timeline {timeline} exists already"),
        }
    }

    /// Reads the index and takes it over for `generation`.
    pub async fn open(
        store: &Store,
        tenant: TenantId,
        timeline: TimelineId,
        generation: Generation,
    ) -> Result<RemoteIndex> {
        let object = index_object(tenant, timeline);
        let (bytes, version) = store.get_versioned(&object).await?;
        let in_store = || format!("object '{object}' in {}", store.name());
        let mut index = TimelineIndex::decode(&bytes).with_context(in_store)?;
        let owner = (index.tenant.clone(), index.timeline.clone());
        if owner != (tenant.to_string(), timeline.to_string()) {
            bail!("{} is the index of timeline {}", in_store(), index.timeline);
        }
        if index.generation > generation.0 {
            bail!("{} was written by the later generation {}", in_store(), index.generation);
        }
        index.generation = generation.0;
        index.sequence += 1;
        let bytes = Bytes::from(index.encode());
        let CasOutcome::Swapped(version) =
            store.compare_and_swap(&object, Some(&version), bytes).await?
        else {
            bail!("{} is being written by another page server", in_store());
        };
        Ok(RemoteIndex {
            store: store.clone(),
            runtime: Handle::current(),
            object,
            state: Mutex::new((Arc::new(index), version)),
        })
    }

    /// The index as last written.
    pub fn current(&self) -> Arc<TimelineIndex> {
        Arc::clone(&self.state.lock().0)
    }

    /// Changes the index; durable on return. Must not be called from an asynchronous thread.
    ///
    /// A conflict means that another page server took the timeline: nothing we know about its
    /// layers holds any more, so the process ends rather than serve from a stale view.
    pub fn update(&self, change: impl FnOnce(&mut TimelineIndex)) -> Result<Arc<TimelineIndex>> {
        let mut state = self.state.lock();
        let mut index = (*state.0).clone();
        change(&mut index);
        index.sequence += 1;
        let bytes = Bytes::from(index.encode());
        let swap = self.store.compare_and_swap(&self.object, Some(&state.1), bytes);
        match self.runtime.block_on(swap)? {
            CasOutcome::Swapped(version) => {
                *state = (Arc::new(index), version);
                Ok(Arc::clone(&state.0))
            }
            CasOutcome::Conflict => {
                eprintln!(
                    "pageserver: another page server has taken over '{}'; this one stops",
                    self.object
                );
                std::process::exit(1);
            }
        }
    }
}
