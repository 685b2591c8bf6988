//! Where it is decided who the members of a timeline are: its object in object storage.
//!
//! What stands there is decided, and nothing else is. It is read when somebody names a configuration that is not known
//! here, or a timeline: once for each change of members, off the way of commits.

use std::time::Duration;

use bytes::Bytes;
use pgstrata_blob::{PutOutcome, Store};
use pgstrata_format::quorum::{self, Quorum};
use pgstrata_format::registration::{self, Registration};
use pgstrata_ids::{Member, NodeId, TimelineParameters};
use pgstrata_quorum::Chain;
use pgstrata_wire::safekeeper::RefusedReason;
use tokio::runtime::Handle;

use crate::timelines::TimelineKey;

/// Longest wait for object storage. A connection's thread waits for it, and the compute at its other end.
const PATIENCE: Duration = Duration::from_secs(4);

/// See the module.
#[derive(Clone, Debug)]
pub struct Decisions {
    store: Store,
    runtime: Handle,
}

/// The object of one timeline.
fn object_name(key: TimelineKey) -> String {
    format!("tenants/{}/timelines/{}/quorum", key.0, key.1)
}

fn unavailable(error: impl std::fmt::Display) -> RefusedReason {
    let text = format!("who the members are can't be found out: {error}");
    RefusedReason::Unavailable(text)
}

impl Decisions {
    /// Those in `store`. `runtime` waits for it.
    pub fn new(store: Store, runtime: Handle) -> Decisions {
        Decisions { store, runtime }
    }

    /// Waits on a thread that serves one connection.
    fn wait<T>(
        &self,
        work: impl Future<Output = Result<T, RefusedReason>>,
    ) -> Result<T, RefusedReason> {
        let waited = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await });
        waited.unwrap_or_else(|_| {
            let name = self.store.name();
            let seconds = PATIENCE.as_secs();
            Err(unavailable(format!("{name} has not answered for {seconds} s")))
        })
    }

    /// What is decided of a timeline; `None` if it was not founded. For a thread that may wait.
    pub fn read(&self, key: TimelineKey) -> Result<Option<Quorum>, RefusedReason> {
        self.wait(self.get(key))
    }

    async fn get(&self, key: TimelineKey) -> Result<Option<Quorum>, RefusedReason> {
        let name = object_name(key);
        let bytes = match self.store.get(&name, quorum::LIMIT).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(unavailable(error)),
        };
        let found = Quorum::decode(&bytes).map_err(|error| unavailable(format!("{name}: {error}")));
        let found = found?;
        let parameters = &found.parameters;
        if (parameters.tenant, parameters.timeline) != key {
            let other = parameters.timeline;
            return Err(unavailable(format!("{name} is of another timeline, {other}")));
        }
        Ok(Some(found))
    }

    /// Founds a timeline with these nodes as its first members, each in the life in which it registered last; or finds that
    /// somebody has founded it, with whomever.
    pub fn found(
        &self,
        parameters: &TimelineParameters,
        nodes: &[NodeId],
    ) -> Result<Quorum, RefusedReason> {
        self.wait(async {
            let mut members = Vec::new();
            for &node in nodes {
                members.push(self.registered(node).await?);
            }
            let chain = Chain::found(members).map_err(unavailable)?;
            let founded = Quorum { parameters: parameters.clone(), chain };
            // The store may be another cluster's by now.
            self.store.check_claim().await.map_err(unavailable)?;
            let key = (parameters.tenant, parameters.timeline);
            let bytes = Bytes::from(founded.encode());
            match self.store.put_if_absent(&object_name(key), bytes).await.map_err(unavailable)? {
                PutOutcome::Created => Ok(founded),
                // Also if it was an attempt of our own whose answer was lost.
                PutOutcome::Exists => {
                    let found = self.get(key).await?;
                    found.ok_or_else(|| unavailable("it was there, and is gone again"))
                }
            }
        })
    }

    async fn registered(&self, node: NodeId) -> Result<Member, RefusedReason> {
        let name = registration::object_name(node);
        let bytes = match self.store.get(&name, registration::LIMIT).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => {
                return Err(unavailable(format!(
                    "safekeeper {node} has never been started on {}",
                    self.store.name()
                )));
            }
            Err(error) => return Err(unavailable(error)),
        };
        let found = Registration::decode(&bytes, node);
        Ok(found.map_err(|error| unavailable(format!("{name}: {error}")))?.member)
    }

    /// Says who this safekeeper is, for those who found timelines.
    pub async fn register(&self, own: &Registration) -> Result<(), String> {
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        let name = registration::object_name(own.member.node);
        let put = self.store.put(&name, Bytes::from(own.encode())).await;
        put.map_err(|error| error.to_string())
    }
}
