//! A cluster that a file tells of (`--cluster`): its broker says where services are, and they let us in by a certificate or
//! a token.
//!
//! What a branch's end is "now" is asked of safekeepers, because computes are known to nobody but whoever started them. A
//! client is told that it committed once a majority has the WAL on disk; that it is committed, a compute tells safekeepers a
//! moment later. So what any of them has on disk is waited for, as long as a compute is there that may commit it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use pgstrata_http_client::{Access, Broker};
use pgstrata_identity::Whom;
use pgstrata_ids::{Lsn, NodeId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::broker::{Listing, Publication, Role};
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper::{Status, Timeline};

use crate::cluster_file::{Archive, ClusterFile, check_address, check_plain};
use crate::http::{ANSWER_PATIENCE, Service};
use crate::members::Seen;
use crate::services::{Services, WalPlaces};
use crate::status::{Answers, PATIENCE, STATUS};

/// Services that are asked at once, at most.
const ASKED_AT_ONCE: usize = 64;
/// Longest wait until what safekeepers have on disk is committed. A compute takes some milliseconds.
const COMMIT_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// See the module.
pub struct Remote {
    /// The file.
    pub file: PathBuf,
    broker: Broker,
    access: Access,
    pageserver_http: Option<String>,
    archive: Option<Archive>,
    /// What the broker said first: a command does not take long.
    nodes: OnceLock<Listing>,
}

/// A safekeeper, and what it answered.
pub struct Asked {
    /// Which.
    pub node: NodeId,
    /// Its status.
    pub said: Result<Status>,
}

/// Asks many at the same time. In their order.
pub fn ask_each<T: Sync, A: Send>(all: &[T], ask: impl Fn(&T) -> A + Sync) -> Vec<A> {
    let mut answers = Vec::new();
    for some in all.chunks(ASKED_AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|one| scope.spawn(|| ask(one))).collect();
            for thread in threads {
                match thread.join() {
                    Ok(answer) => answers.push(answer),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
    }
    answers
}

/// Whether a branch's end can be told by those who answered: anything committed is on a majority, so that those who are
/// silent must be none.
fn is_enough(listed: usize, silent: usize) -> bool {
    listed > 0 && silent <= listed / 2
}

impl Remote {
    /// The cluster of a file.
    pub fn open(file: &Path) -> Result<Remote> {
        Ok(Remote::of(file, ClusterFile::read(file)?))
    }

    /// The cluster of what is in a file.
    pub fn of(file: &Path, content: ClusterFile) -> Remote {
        let ClusterFile { broker, access, pageserver_http, archive } = content;
        let broker = Broker::new(&broker, &access);
        let nodes = OnceLock::new();
        Remote { file: file.to_owned(), broker, access, pageserver_http, archive, nodes }
    }

    /// URL of the broker.
    pub fn broker_url(&self) -> &str {
        self.broker.url()
    }

    /// How to ask the broker's HTTP interface for what is not its listing.
    pub fn broker_service(&self, timeout: Duration) -> Result<Service> {
        let (scheme, rest) =
            self.broker.url().split_once("://").unwrap_or(("http", self.broker.url()));
        let host_ends = rest.rfind(']').unwrap_or(0);
        let port = if scheme == "https" { ":443" } else { ":80" };
        let port = if rest[host_ends..].contains(':') { "" } else { port };
        self.at("the broker", Whom::Broker, format!("{rest}{port}"), timeout)
    }

    /// All services that the broker has heard of lately.
    pub fn nodes(&self) -> Result<&[Publication]> {
        if let Some(listing) = self.nodes.get() {
            return Ok(&listing.nodes);
        }
        let listing = self.broker.nodes(None).with_context(|| {
            format!("the broker {}, which {} names", self.broker.url(), self.file.display())
        })?;
        Ok(&self.nodes.get_or_init(|| listing).nodes)
    }

    /// How to ask a node's HTTP interface.
    pub fn service(&self, node: &Publication, timeout: Duration) -> Result<Service> {
        let (name, whom) = match node.role {
            Role::Safekeeper => ("the safekeeper", Whom::Safekeeper(Some(node.node()))),
            Role::Pageserver => ("the page server", Whom::Pageserver),
            Role::Unknown => anyhow::bail!("this program does not know its role: upgrade it"),
        };
        let address = node.addresses.http.clone().context("it has no HTTP interface")?;
        self.at(name, whom, address, timeout)
    }

    fn at(
        &self,
        name: &'static str,
        whom: Whom,
        address: String,
        timeout: Duration,
    ) -> Result<Service> {
        check_address(&address).map_err(|why| anyhow!("the broker's listing: {why}"))?;
        if matches!(self.access, Access::Local) {
            check_plain(&address)?;
        }
        Ok(Service { name, address, timeout, access: self.access.clone(), whom, is_here: false })
    }

    fn safekeepers(&self) -> Result<Vec<&Publication>> {
        let nodes = self.nodes()?.iter();
        Ok(nodes.filter(|node| node.role == Role::Safekeeper).collect())
    }

    /// What all safekeepers say of themselves.
    pub fn statuses(&self) -> Result<Vec<Asked>> {
        let ask = |node: &&Publication| Asked {
            node: node.node(),
            said: self.service(node, PATIENCE).and_then(|service| service.get(STATUS, &[])),
        };
        Ok(ask_each(&Remote::safekeepers(self)?, ask))
    }

    /// Refuses to conclude anything from answers where those who gave none could have committed without them. Where nobody
    /// says who a timeline's members are, they are taken to be those that the broker lists.
    fn check_enough(&self, row: &Branch, asked: &[Asked]) -> Result<()> {
        let silent = |node: NodeId| !asked.iter().any(|one| one.node == node && one.said.is_ok());
        let is_enough = match self.configuration(row, asked) {
            Some(configuration) => !configuration.is_quorum(|member| silent(member.node)),
            None => {
                let count = asked.iter().filter(|one| one.said.is_err()).count();
                is_enough(asked.len(), count)
            }
        };
        let why = asked.iter().filter_map(|one| {
            let error = one.said.as_ref().err()?;
            Some(format!("safekeeper {}: {error:#}", one.node))
        });
        let why = Vec::from_iter(why.chain([format!("the broker lists {}", asked.len())]));
        ensure!(is_enough, "too few safekeepers answer ({})", why.join("; "));
        Ok(())
    }

    /// Who a timeline's members are, by whoever has heard last.
    pub fn configuration(&self, row: &Branch, asked: &[Asked]) -> Option<Configuration> {
        let heard = its(asked, row).filter_map(|timeline| timeline.quorum.as_ref());
        heard.max_by_key(|quorum| quorum.number)?.configuration()
    }

    /// Whether a compute writes to a branch, as safekeepers see it: one that does is connected to a majority.
    pub fn has_compute(&self, row: &Branch) -> Result<bool> {
        let unknown = || format!("whether branch '{}' has a compute can't be told", row.name);
        let asked = self.statuses().with_context(unknown)?;
        self.check_enough(row, &asked).with_context(unknown)?;
        Ok(its(&asked, row).any(|timeline| timeline.proposer_connected))
    }
}

/// What safekeepers have of a branch.
fn its<'a>(
    asked: impl IntoIterator<Item = &'a Asked>,
    row: &Branch,
) -> impl Iterator<Item = &'a Timeline> {
    let timeline_id = row.timeline_id;
    let timelines = asked.into_iter().filter_map(|one| one.said.as_ref().ok());
    timelines.flat_map(|said| &said.timelines).filter(move |one| one.timeline_id == timeline_id)
}

/// The most that any of them has on disk.
fn flushed(asked: &[Asked], row: &Branch) -> Option<Lsn> {
    its(asked, row).map(|timeline| timeline.flush_lsn).max()
}

impl Services for Remote {
    fn pageserver(&self) -> Result<Service> {
        if let Some(address) = &self.pageserver_http {
            return self.at("the page server", Whom::Pageserver, address.clone(), ANSWER_PATIENCE);
        }
        // The one that was started last: its node id is its generation.
        let nodes = self.nodes()?.iter().filter(|node| node.role == Role::Pageserver);
        match nodes.max_by_key(|node| node.node) {
            Some(node) => self.service(node, ANSWER_PATIENCE),
            None => bail!(
                "the broker {} has heard of no page server lately: is one up, with this --broker?",
                self.broker.url()
            ),
        }
    }

    fn answers(&self) -> Answers {
        let asked = self.statuses().unwrap_or_default();
        Answers::of_safekeepers(
            asked.into_iter().filter_map(|one| Some((one.node, one.said.ok()?))),
        )
    }

    fn committed(&self, row: &Branch) -> Result<Option<Lsn>> {
        let deadline = Instant::now() + COMMIT_PATIENCE;
        let unknown = || {
            format!(
                "how far branch '{}' is committed can't be told; name a moment with --at",
                row.name
            )
        };
        let mut asked = self.statuses().with_context(unknown)?;
        self.check_enough(row, &asked).with_context(unknown)?;
        // What came in later is not what was asked for.
        let Some(mut wanted) = flushed(&asked, row) else { return Ok(None) };
        loop {
            // What a compute cut off, because it was of another one that nobody let commit, is wanted no more.
            wanted = wanted.min(flushed(&asked, row).unwrap_or(wanted));
            let committed = its(&asked, row).map(|timeline| timeline.commit_lsn).max();
            if committed >= Some(wanted) {
                return Ok(committed);
            }
            let may_be = its(&asked, row).any(|timeline| timeline.proposer_connected);
            if !may_be || Instant::now() > deadline {
                let known = committed.unwrap_or_default();
                eprintln!(
                    "pgstrata: warning: safekeepers have WAL of branch '{}' up to {wanted}, and know that it is committed up to \
                     {known}: what follows counts when its compute is started again",
                    row.name
                );
                return Ok(committed);
            }
            std::thread::sleep(LOOK_EVERY);
            asked = self.statuses().with_context(unknown)?;
        }
    }

    fn safekeepers(&self) -> Result<Vec<Seen>> {
        let mut seen = Vec::new();
        for (node, asked) in Remote::safekeepers(self)?.into_iter().zip(self.statuses()?) {
            let address = node.addresses.wal.clone().unwrap_or_default();
            let service = self.service(node, ANSWER_PATIENCE)?;
            seen.push(Seen { node: asked.node, address, service, said: asked.said });
        }
        Ok(seen)
    }

    fn wal_places(&self) -> Result<WalPlaces> {
        ensure!(
            !matches!(self.access, Access::Token { .. }),
            "WAL ports of safekeepers take certificates only: give 'tls' in {}, in place of a token",
            self.file.display()
        );
        let mut safekeepers = Vec::new();
        for node in Remote::safekeepers(self)? {
            let Some(address) = node.addresses.wal.clone() else { continue };
            check_address(&address).map_err(|why| anyhow!("the broker's listing: {why}"))?;
            if matches!(self.access, Access::Local) {
                check_plain(&address)?;
            }
            safekeepers.push((Some(node.node()), address));
        }
        let identity = self.access.identity().cloned();
        Ok(WalPlaces { safekeepers, identity, archive: self.archive.clone() })
    }
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
