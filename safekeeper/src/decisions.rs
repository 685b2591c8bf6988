//! Where it is decided who the members of a timeline are: its object in object storage.
//!
//! What stands there is decided, and nothing else is. It is read when somebody names a configuration that is not known
//! here, or a timeline: once for each change of members, off the way of commits.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::future::try_join_all;
use pgstrata_blob::{CasOutcome, PutOutcome, Store, Version};
use pgstrata_format::index::TimelineIndex;
use pgstrata_format::quorum::{self, Quorum};
use pgstrata_format::registration::{self, Registration};
use pgstrata_format::undecided::{self, Undecided};
use pgstrata_ids::{Incarnation, Member, NodeId, TimelineParameters};
use pgstrata_quorum::Chain;
use pgstrata_wire::safekeeper::RefusedReason;
use tokio::runtime::Handle;

use crate::timelines::TimelineKey;

/// Longest wait for object storage. A connection's thread waits for it, and the compute at its other end.
const PATIENCE: Duration = Duration::from_secs(4);

/// Longest wait for what is only good to know. With the other it is less than a compute waits for an answer.
const HINT_PATIENCE: Duration = Duration::from_millis(500);

/// Bytes of an index of layers, at most. That of a new timeline is short.
const INDEX_LIMIT: u64 = 256 << 20;

/// See the module.
#[derive(Clone, Debug)]
pub struct Decisions {
    store: Store,
    runtime: Handle,
}

/// Whether a decision was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// It stands.
    Yes,
    /// Another one came before it.
    No,
}

/// The object of one timeline.
fn object_name(key: TimelineKey) -> String {
    Quorum::object_name(key.0, key.1)
}

fn unwritable(error: impl std::fmt::Display) -> RefusedReason {
    let text = format!("who the members are to be can't be written to object storage: {error}");
    RefusedReason::Unavailable(text)
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

    /// What waits for object storage.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
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

    /// The same, and which version of the object it is, for [`Decisions::swap`].
    pub fn read_versioned(
        &self,
        key: TimelineKey,
    ) -> Result<Option<(Quorum, Version)>, RefusedReason> {
        self.wait(self.get_versioned(key))
    }

    /// Decides, if nobody else did since that version was read.
    pub fn swap(
        &self,
        key: TimelineKey,
        version: &Version,
        next: &Quorum,
    ) -> Result<Swapped, RefusedReason> {
        self.wait(async {
            self.store.check_claim().await.map_err(unavailable)?;
            let bytes = Bytes::from(next.encode());
            let swapped =
                self.store.compare_and_swap(&object_name(key), Some(version), bytes).await;
            match swapped.map_err(unwritable)? {
                CasOutcome::Swapped(_) => Ok(Swapped::Yes),
                CasOutcome::Conflict => Ok(Swapped::No),
            }
        })
    }

    /// What a safekeeper said of itself when it was started last.
    pub fn registration(&self, node: NodeId) -> Result<Option<Registration>, RefusedReason> {
        self.wait(self.get_registration(node))
    }

    /// The same of several, in their order, all asked at once.
    pub fn registrations(
        &self,
        nodes: &[NodeId],
    ) -> Result<Vec<Option<Registration>>, RefusedReason> {
        self.wait(self.get_registrations(nodes))
    }

    /// Where those are of these that registered, as far as that is told soon: for hints.
    pub fn places(&self, nodes: &[NodeId]) -> Vec<(NodeId, String)> {
        let asked =
            async { tokio::time::timeout(HINT_PATIENCE, self.get_registrations(nodes)).await };
        let found = match self.runtime.block_on(asked) {
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => return Vec::new(),
        };
        found.into_iter().flatten().map(|one| (one.member.node, one.wal)).collect()
    }

    async fn get(&self, key: TimelineKey) -> Result<Option<Quorum>, RefusedReason> {
        Ok(self.get_versioned(key).await?.map(|(found, _)| found))
    }

    async fn get_versioned(
        &self,
        key: TimelineKey,
    ) -> Result<Option<(Quorum, Version)>, RefusedReason> {
        let name = object_name(key);
        let (bytes, version) = match self.store.get_versioned(&name, quorum::LIMIT).await {
            Ok(found) => found,
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
        Ok(Some((found, version)))
    }

    /// Founds a timeline with these nodes as its first members, each in the life in which it registered last, which is that
    /// in which it was heard, if it was; or finds that somebody has founded it, with whomever.
    pub fn found(
        &self,
        parameters: &TimelineParameters,
        nodes: &[(NodeId, Option<Incarnation>)],
    ) -> Result<Quorum, RefusedReason> {
        self.found_with(parameters, nodes, None)
    }

    /// The same of a timeline that was there before there was this object: with whoever was `met` then, whatever has become of
    /// them. Who has another directory since, or none, has lost what it promised, and is a member all the same: a majority of the
    /// others has what was committed, and another one can take its place. `nodes` says of those who have a copy in which life
    /// they were heard, which must be the one that was met.
    pub fn found_older(
        &self,
        parameters: &TimelineParameters,
        nodes: &[(NodeId, Option<Incarnation>)],
        met: &BTreeMap<NodeId, Incarnation>,
    ) -> Result<Quorum, RefusedReason> {
        self.found_with(parameters, nodes, Some(met))
    }

    fn found_with(
        &self,
        parameters: &TimelineParameters,
        nodes: &[(NodeId, Option<Incarnation>)],
        met: Option<&BTreeMap<NodeId, Incarnation>>,
    ) -> Result<Quorum, RefusedReason> {
        let is_older = met.is_some();
        self.wait(async {
            let ids: Vec<NodeId> = nodes.iter().map(|(node, _)| *node).collect();
            let nothing_lost = async {
                match is_older {
                    true => Ok(()),
                    false => {
                        self.refuse_older((parameters.tenant, parameters.timeline)).await?;
                        self.refuse_lost(parameters).await
                    }
                }
            };
            let (found, ()) = tokio::try_join!(self.get_registrations(&ids), nothing_lost)?;
            let member = |(&(node, heard), found): (&(NodeId, Option<Incarnation>), _)| match met
                .and_then(|met| met.get(&node))
            {
                // It has a copy: others may have met it as it is now, and can found it with that one.
                Some(met) if heard.is_some_and(|heard| heard != *met) => Err(unavailable(format!(
                    "safekeeper {node} has a copy of it in another directory than the one that was met here"
                ))),
                Some(&incarnation) => Ok(Member { node, incarnation }),
                None => self.registered(node, heard, found),
            };
            let members = nodes.iter().zip(found).map(member);
            let members = members.collect::<Result<Vec<Member>, RefusedReason>>()?;
            let chain = Chain::found(members).map_err(unavailable)?;
            let founded = Quorum { is_older, ..Quorum::founded(parameters.clone(), chain) };
            // The store may be another cluster's by now.
            self.store.check_claim().await.map_err(unavailable)?;
            let key = (founded.parameters.tenant, founded.parameters.timeline);
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

    /// Refuses a timeline of which safekeepers have copies of an older release: only they know who its members are.
    async fn refuse_older(&self, key: TimelineKey) -> Result<(), RefusedReason> {
        let lists = self.store.list(undecided::PREFIX).await.map_err(unavailable)?;
        let mut having = Vec::new();
        for node in lists.iter().filter_map(|list| undecided::node_of(&list.path)) {
            let name = undecided::object_name(node);
            let bytes = match self.store.get(&name, undecided::LIMIT).await {
                Ok(bytes) => bytes,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(unavailable(error)),
            };
            let list = Undecided::decode(&bytes, node)
                .map_err(|error| unavailable(format!("{name}: {error}")))?;
            if list.timelines.contains(&key) {
                having.push(node.to_string());
            }
        }
        match having.is_empty() {
            true => Ok(()),
            false => Err(unavailable(format!(
                "an older release began the branch, and safekeepers {} have copies of it: name those to the compute",
                having.join(", ")
            ))),
        }
    }

    /// Says of which timelines this safekeeper has copies of an older release, if of any.
    pub async fn note_undecided(&self, list: &Undecided) -> Result<(), String> {
        if list.timelines.is_empty() {
            return Ok(());
        }
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        let (name, bytes) = (undecided::object_name(list.node), list.encode());
        if bytes.len() as u64 > undecided::LIMIT {
            let count = list.timelines.len();
            return Err(format!(
                "{count} timelines of an older release are more than {name} can have"
            ));
        }
        self.store.put(&name, Bytes::from(bytes)).await.map_err(|error| error.to_string())
    }

    /// Refuses a timeline of which there is WAL already, though nothing says who has it: what is lost is not founded anew.
    async fn refuse_lost(&self, parameters: &TimelineParameters) -> Result<(), RefusedReason> {
        let key = (parameters.tenant, parameters.timeline);
        let of_timeline = format!("tenants/{}/timelines/{}", key.0, key.1);
        let lost = |what: String| {
            let name = object_name(key);
            unavailable(format!("{name} is gone, but {what}: put it back"))
        };
        let archived =
            self.store.list(&format!("{of_timeline}/wal/")).await.map_err(unavailable)?;
        if let Some(segment) = archived.first() {
            return Err(lost(format!("{} is there", segment.path)));
        }
        let index = format!("{of_timeline}/index");
        let bytes = match self.store.get(&index, INDEX_LIMIT).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(unavailable(error)),
        };
        let found = TimelineIndex::decode(&bytes);
        let found = found.map_err(|error| unavailable(format!("{index}: {error}")))?;
        match found.remote_consistent_lsn == found.start_lsn {
            true => Ok(()),
            false => Err(lost(format!("{index} has it up to {}", found.remote_consistent_lsn))),
        }
    }

    /// The member that a registration is of, which must be the one that was heard.
    fn registered(
        &self,
        node: NodeId,
        heard: Option<Incarnation>,
        found: Option<Registration>,
    ) -> Result<Member, RefusedReason> {
        let Some(found) = found else {
            let name = self.store.name();
            return Err(unavailable(format!("safekeeper {node} has never been started on {name}")));
        };
        match heard.is_none_or(|heard| heard == found.member.incarnation) {
            true => Ok(found.member),
            false => Err(unavailable(format!(
                "its registration is not of the directory with which safekeeper {node} answers: it has not \
                 registered yet, or another one has registered under its id"
            ))),
        }
    }

    async fn get_registrations(
        &self,
        nodes: &[NodeId],
    ) -> Result<Vec<Option<Registration>>, RefusedReason> {
        try_join_all(nodes.iter().map(|&node| self.get_registration(node))).await
    }

    async fn get_registration(&self, node: NodeId) -> Result<Option<Registration>, RefusedReason> {
        let name = registration::object_name(node);
        let bytes = match self.store.get(&name, registration::LIMIT).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(unavailable(error)),
        };
        let found = Registration::decode(&bytes, node);
        found.map(Some).map_err(|error| unavailable(format!("{name}: {error}")))
    }

    /// Says who this safekeeper is, for those who found timelines.
    pub async fn register(&self, own: &Registration) -> Result<(), String> {
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        let name = registration::object_name(own.member.node);
        let put = self.store.put(&name, Bytes::from(own.encode())).await;
        put.map_err(|error| error.to_string())
    }
}
