//! Where a tenant's objects are, and how a timeline's index advances.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use pgstrata_blob::claim::ClaimError;
use pgstrata_blob::{BlobError, CasOutcome, PutOutcome, Store, Version};
use pgstrata_format::index::TimelineIndex;
use pgstrata_ids::{Generation, TenantId, TimelineId};
use tokio::runtime::Handle;

use crate::lock::{RwLock, Turn, wait_for};

const GENERATIONS: &str = "pageserver/generations";

/// Longest index that is read, in bytes: that of some millions of layers.
const INDEX_LIMIT: u64 = 1 << 30;

/// How often a takeover is tried while another page server writes.
const TAKEOVER_ATTEMPTS: u32 = 10;

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
            match (tenant.parse(), timeline.parse()) {
                (Ok(tenant), Ok(timeline)) => found.push((tenant, timeline)),
                // No page server made it; what it did make is served.
                _ => tracing::error!("object '{}' is no index of a timeline", info.path),
            }
        }
    }
    Ok(found)
}

/// A timeline's index, as last written or read by us. Advanced by compare-and-swap only, so a
/// page server that was replaced finds out before it can hide the newer one's layers.
///
/// Two locks, taken in this order. Readers take the second only, which is held for as long as it
/// takes to copy a pointer: nobody who looks at an index waits for the object store.
pub struct RemoteIndex {
    store: Store,
    runtime: Handle,
    object: String,
    /// Held by the one who writes, until the store has answered. The version is `None` until the
    /// object is there.
    writer: Turn<Option<Version>>,
    /// The index as last written.
    published: RwLock<Arc<TimelineIndex>>,
    /// Set when another page server's index was found in the place of ours.
    lost: OnceLock<String>,
}

/// Why an index could not be written.
#[derive(Debug, thiserror::Error)]
enum SwapError {
    /// Somebody else's index is there.
    #[error("object '{0}' is another page server's")]
    Taken(String),
    /// None is there, as long as the store is away, or until somebody puts it back: no page server removes one.
    #[error(
        "object '{object}', which was there before, is not in {store} any more: put it back, or mount what it is in{why}"
    )]
    Missing {
        /// The index.
        object: String,
        /// The store.
        store: String,
        /// What is known of the store.
        why: String,
    },
    /// The store failed. What it holds is the old index, or this one if the answer was lost.
    #[error(transparent)]
    Store(#[from] BlobError),
}

/// Replaces the index `expected` by this one.
///
/// A write that failed may have got through nevertheless, with its answer lost. So what is there
/// is read back before anything is concluded: this very index is success, and an earlier one of
/// our own generation, which nobody else can have written, is what to replace.
async fn swap(
    store: &Store,
    object: &str,
    expected: Option<&Version>,
    index: &TimelineIndex,
) -> Result<Version, SwapError> {
    let bytes = Bytes::from(index.encode());
    let mut expected = expected.cloned();
    loop {
        let outcome = store.compare_and_swap(object, expected.as_ref(), bytes.clone()).await;
        if let Ok(CasOutcome::Swapped(version)) = outcome {
            return Ok(version);
        }
        let there = store.get_versioned(object, INDEX_LIMIT).await;
        if let Err(error) = outcome {
            return match there {
                // What failed in a directory, or was not waited for, may not be durable yet.
                Ok((there, version)) if there == bytes && store.local_path(object).is_none() => {
                    Ok(version)
                }
                _ => Err(error.into()),
            };
        }
        let there = match there {
            Ok((there, version)) if there == bytes => return Ok(version),
            Ok(there) => there,
            Err(error) if error.is_not_found() => return Err(missing(store, object).await),
            Err(error) => return Err(error.into()),
        };
        let ours = TimelineIndex::decode(&there.0).is_ok_and(|there| {
            (there.generation, there.timeline) == (index.generation, index.timeline.clone())
        });
        // Each turn needs another lost answer of an earlier write, and one of those is the last.
        if !ours || expected.is_none() || expected.as_ref() == Some(&there.1) {
            return Err(SwapError::Taken(object.to_owned()));
        }
        expected = Some(there.1);
    }
}

/// What it means that an index is not there which should be.
async fn missing(store: &Store, object: &str) -> SwapError {
    let missing =
        |why| SwapError::Missing { object: object.to_owned(), store: store.name().to_owned(), why };
    match store.check_claim().await {
        Ok(()) => missing(String::new()),
        Err(ClaimError::Held { .. }) => SwapError::Taken(object.to_owned()),
        Err(error) => missing(format!(" ({error})")),
    }
}

/// Why no more WAL is taken in.
fn frozen(index: &TimelineIndex) -> String {
    let TimelineIndex { name, remote_consistent_lsn: lsn, .. } = index;
    format!(
        "another cluster directory wrote this branch to the object store, up to {lsn}, and the \
         safekeepers of this one may have another history of it: it can be read up to there, and \
         'pgstrata branch create NAME --from {name} --at {lsn}' makes a branch of it that can be \
         written"
    )
}

impl RemoteIndex {
    /// The index of a new timeline, which is not in the store before the first update.
    pub fn absent(
        store: &Store,
        runtime: Handle,
        tenant: TenantId,
        timeline: TimelineId,
        index: TimelineIndex,
    ) -> RemoteIndex {
        let object = index_object(tenant, timeline);
        RemoteIndex::known(store, runtime, object, index, None)
    }

    fn known(
        store: &Store,
        runtime: Handle,
        object: String,
        index: TimelineIndex,
        version: Option<Version>,
    ) -> RemoteIndex {
        RemoteIndex {
            store: store.clone(),
            runtime,
            object,
            writer: Turn::new(version),
            published: RwLock::new(Arc::new(index)),
            lost: OnceLock::new(),
        }
    }

    /// Creates the index of a new timeline.
    pub async fn create(
        store: &Store,
        tenant: TenantId,
        timeline: TimelineId,
        index: TimelineIndex,
    ) -> Result<RemoteIndex> {
        let index = RemoteIndex::absent(store, Handle::current(), tenant, timeline, index);
        let version = swap(store, &index.object, None, &index.current()).await?;
        *index.writer.take() = Some(version);
        Ok(index)
    }

    /// Reads the index and takes it over for `generation`. The one who had it may write meanwhile:
    /// its next write fails once we have it, so a few attempts are enough.
    pub async fn open(
        store: &Store,
        tenant: TenantId,
        timeline: TimelineId,
        generation: Generation,
        has_parted: bool,
    ) -> Result<RemoteIndex> {
        let object = index_object(tenant, timeline);
        let in_store = || format!("object '{object}' in {}", store.name());
        for attempt in 0..TAKEOVER_ATTEMPTS {
            let (bytes, version) = store.get_versioned(&object, INDEX_LIMIT).await?;
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
            if has_parted && index.frozen.is_none() {
                index.frozen = Some(frozen(&index));
            }
            match swap(store, &object, Some(&version), &index).await {
                Ok(version) => {
                    let runtime = Handle::current();
                    return Ok(RemoteIndex::known(store, runtime, object, index, Some(version)));
                }
                Err(SwapError::Taken(_)) => {
                    let pause = rand::random_range(10..50) << attempt.min(4);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                // As itself: whether it may answer later is seen by that.
                Err(SwapError::Store(error)) => return Err(error.into()),
                Err(error) => return Err(error.into()),
            }
        }
        bail!("{} is being written by another page server all the time", in_store())
    }

    /// Why this index is not ours any more, if it is not.
    pub fn lost(&self) -> Option<String> {
        self.lost.get().cloned()
    }

    /// The index as last written. Waits for nothing.
    pub fn current(&self) -> Arc<TimelineIndex> {
        Arc::clone(&self.published.read())
    }

    /// Changes the index; durable on return. Must not be called from an asynchronous thread.
    ///
    /// A conflict means that another page server took the timeline: nothing we know about its
    /// layers holds any more, and nothing is written from then on.
    pub fn update(&self, change: impl FnOnce(&mut TimelineIndex)) -> Result<Arc<TimelineIndex>> {
        let mut written = self.writer.take();
        if let Some(reason) = self.lost.get() {
            bail!("{reason}");
        }
        let mut index = (*self.current()).clone();
        change(&mut index);
        index.sequence += 1;
        let swapped = swap(&self.store, &self.object, written.as_ref(), &index);
        match wait_for(&self.runtime, swapped) {
            Ok(version) => {
                *written = Some(version);
                let index = Arc::new(index);
                *self.published.write() = Arc::clone(&index);
                Ok(index)
            }
            Err(SwapError::Taken(_)) if written.is_some() => {
                let owner = wait_for(&self.runtime, self.store.check_claim()).err();
                let owner = owner.map(|error| format!(": {error}")).unwrap_or_default();
                let reason = format!("another page server has taken over '{}'{owner}", self.object);
                bail!("{}", self.lost.get_or_init(|| reason))
            }
            Err(SwapError::Taken(_)) => bail!("timeline {} exists already", index.timeline),
            Err(error) => Err(error.into()),
        }
    }
}
