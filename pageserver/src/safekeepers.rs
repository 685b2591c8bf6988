//! Which safekeepers may have a timeline's WAL: those named at start, and those the broker knows.
//!
//! Soft state both ways: without the broker the named ones are tried in turn, and what was last
//! heard of the others stays.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result};
use pgstrata_http_client::{Access, Broker, News};
use pgstrata_identity::Identity;
use pgstrata_ids::{Generation, Lsn, NodeId, TenantId, TimelineId};
use pgstrata_listen::Security;
use pgstrata_wire::broker::{
    Addresses, Listing, PUBLISH_INTERVAL_S, Publication, Role, TimelineProgress,
};

use crate::lock::RwLock;
use crate::receiver::Safekeepers;
use crate::repository::Repository;
use crate::timeline::Timeline;

/// Finds safekeepers, and tells the broker how far this page server is.
pub struct Discovery {
    fixed: Vec<String>,
    broker: Option<String>,
    security: Security,
    heard: RwLock<Listing>,
    /// Timelines that any safekeeper has, of what was heard: asked for by every timeline that none has.
    known: RwLock<HashSet<(TenantId, TimelineId)>>,
}

impl Discovery {
    /// With the addresses given on the command line, and the broker's URL.
    pub fn new(fixed: Vec<String>, broker: Option<String>, security: Security) -> Discovery {
        Discovery { fixed, broker, security, heard: RwLock::default(), known: RwLock::default() }
    }

    /// Talks with the broker from now on, until the repository is gone.
    pub fn start(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        node: NodeId,
        addresses: Addresses,
    ) -> Result<()> {
        let access = Access::of(self.security.identity());
        let broker = self.broker.as_deref().map(|url| Broker::new(url, &access));
        let Some(broker) = broker else { return Ok(()) };
        let (discovery, repository) = (Arc::clone(self), Arc::downgrade(repository));
        let talk = move || {
            let mut news = News::default();
            while let Some(publication) = publication(&repository, node, &addresses) {
                let exchanged = broker.exchange(&publication);
                news.note(broker.url(), &exchanged);
                if let Ok(listing) = exchanged {
                    discovery.hear(listing);
                }
                std::thread::sleep(Duration::from_secs(PUBLISH_INTERVAL_S));
            }
        };
        std::thread::Builder::new()
            .name("broker".into())
            .spawn(talk)
            .context("can't start a thread")?;
        Ok(())
    }

    fn hear(&self, listing: Listing) {
        let safekeepers = listing.nodes.iter().filter(|node| node.role == Role::Safekeeper);
        let timelines = safekeepers.flat_map(|node| &node.timelines);
        *self.known.write() = timelines.map(|entry| (entry.tenant_id, entry.timeline_id)).collect();
        *self.heard.write() = listing;
    }
}

/// This page server's identity at the broker: every start is a new one.
pub fn node(generation: Generation) -> NodeId {
    NodeId(generation.0)
}

fn publication(
    repository: &Weak<Repository>,
    node: NodeId,
    addresses: &Addresses,
) -> Option<Publication> {
    let repository = repository.upgrade()?;
    let timelines = repository
        .branches()
        .iter()
        .map(|timeline| TimelineProgress {
            tenant_id: timeline.info.tenant,
            timeline_id: timeline.info.id,
            term: 0,
            flush_lsn: timeline.progress.lsn(),
            commit_lsn: Lsn::INVALID,
            archived_lsn: Lsn::INVALID,
            remote_consistent_lsn: timeline.remote_consistent_lsn(),
        })
        .collect();
    Some(Publication {
        node: node.0,
        role: Role::Pageserver,
        zone: String::new(),
        addresses: addresses.clone(),
        timelines,
    })
}

impl Safekeepers for Discovery {
    fn candidates(&self, timeline: &Timeline) -> Vec<String> {
        // Whoever may write WAL of one tenant may call it by the id of another's timeline.
        let is_it = |entry: &&TimelineProgress| {
            (entry.tenant_id, entry.timeline_id) == (timeline.info.tenant, timeline.info.id)
        };
        let heard = self.heard.read();
        let mut known: Vec<(Lsn, &String)> = heard
            .nodes
            .iter()
            .filter(|node| node.role == Role::Safekeeper)
            .filter_map(|node| {
                let progress = node.timelines.iter().find(is_it)?;
                Some((progress.commit_lsn, node.addresses.pg.as_ref()?))
            })
            .collect();
        known.sort_by_key(|(commit, _)| std::cmp::Reverse(*commit));
        let mut candidates: Vec<String> =
            known.into_iter().map(|(_, address)| address.clone()).collect();
        for address in &self.fixed {
            if !candidates.contains(address) {
                candidates.push(address.clone());
            }
        }
        candidates
    }

    fn identity(&self) -> Option<Identity> {
        self.security.identity().cloned()
    }

    fn is_known(&self, timeline: &Timeline) -> bool {
        self.known.read().contains(&(timeline.info.tenant, timeline.info.id))
    }
}
