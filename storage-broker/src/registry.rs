//! Who was heard of lately. Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pgstrata_ids::{TenantId, TimelineId};
use pgstrata_wire::broker::{
    Addresses, LONGEST_TIMELINE, Listing, MAX_LISTING, Publication, Role, TTL_S,
};

/// Most nodes that are remembered.
pub const MAX_NODES: usize = 1000;

/// Most timelines of one node.
pub const MAX_TIMELINES: usize = 20_000;

/// Longest text in a publication, a zone's name or an address, in bytes.
pub const MAX_TEXT: usize = 255;

/// Most timelines of all nodes.
pub const MAX_ALL_TIMELINES: usize = 900_000;

/// Longest that a node can be in a listing without its timelines, in bytes: five texts, of which
/// each byte may be written as six.
const LONGEST_NODE: usize = 5 * 6 * MAX_TEXT + 300;

// Whoever asks for everything can read it.
const _: () =
    assert!(MAX_NODES * LONGEST_NODE + MAX_ALL_TIMELINES * LONGEST_TIMELINE < MAX_LISTING);

/// What a publication was refused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// [`MAX_NODES`].
    Nodes,
    /// [`MAX_TIMELINES`].
    Timelines,
    /// [`MAX_ALL_TIMELINES`].
    AllTimelines,
    /// [`MAX_TEXT`].
    Text,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Registry {
    nodes: BTreeMap<(u8, u64), (Instant, Publication)>,
}

fn key(publication: &Publication) -> (u8, u64) {
    (u8::from(publication.role == Role::Pageserver), publication.node)
}

impl Registry {
    /// Takes note of what a node says, replacing what it said before.
    pub fn publish(&mut self, publication: Publication, now: Instant) -> Result<(), Full> {
        self.forget_silent(now);
        let Addresses { wal, pg, http, pages } = &publication.addresses;
        let texts = [wal, pg, http, pages].into_iter().flatten().chain([&publication.zone]);
        if texts.into_iter().any(|text| text.len() > MAX_TEXT) {
            return Err(Full::Text);
        }
        if publication.timelines.len() > MAX_TIMELINES {
            return Err(Full::Timelines);
        }
        let key = key(&publication);
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(&key) {
            return Err(Full::Nodes);
        }
        let others = self.nodes.iter().filter(|(other, _)| **other != key);
        let others: usize = others.map(|(_, (_, said))| said.timelines.len()).sum();
        if others + publication.timelines.len() > MAX_ALL_TIMELINES {
            return Err(Full::AllTimelines);
        }
        self.nodes.insert(key, (now, publication));
        Ok(())
    }

    fn forget_silent(&mut self, now: Instant) {
        let ttl = Duration::from_secs(TTL_S);
        self.nodes.retain(|_, (heard, _)| now.saturating_duration_since(*heard) <= ttl);
    }

    /// All nodes, with those of their timelines that match.
    pub fn list(
        &mut self,
        tenant: Option<TenantId>,
        timeline: Option<TimelineId>,
        now: Instant,
    ) -> Listing {
        self.forget_silent(now);
        let matching = |publication: &Publication| {
            let mut publication = publication.clone();
            publication.timelines.retain(|progress| {
                tenant.is_none_or(|tenant| progress.tenant_id == tenant)
                    && timeline.is_none_or(|timeline| progress.timeline_id == timeline)
            });
            publication
        };
        Listing { nodes: self.nodes.values().map(|(_, said)| matching(said)).collect() }
    }

    /// Number of nodes remembered, by role: safekeepers, page servers.
    pub fn counts(&mut self, now: Instant) -> [usize; 2] {
        self.forget_silent(now);
        let pageservers = self.nodes.keys().filter(|(role, _)| *role == 1).count();
        [self.nodes.len() - pageservers, pageservers]
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::Lsn;
    use pgstrata_wire::broker::TimelineProgress;

    use super::*;

    fn says(node: u64, role: Role, timelines: &[u8]) -> Publication {
        let progress = |&id: &u8| TimelineProgress {
            tenant_id: TenantId([1; 16]),
            timeline_id: TimelineId([id; 16]),
            term: 1,
            flush_lsn: Lsn(8),
            commit_lsn: Lsn(8),
            archived_lsn: Lsn(0),
            remote_consistent_lsn: Lsn(0),
        };
        let timelines = timelines.iter().map(progress).collect();
        let addresses = Addresses::default();
        Publication { node, role, zone: String::new(), addresses, timelines }
    }

    #[test]
    fn the_silent_are_forgotten() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut registry = Registry::default();
        registry.publish(says(1, Role::Safekeeper, &[1, 2]), at(0)).unwrap();
        registry.publish(says(1, Role::Pageserver, &[2]), at(5)).unwrap();
        assert_eq!(registry.counts(at(5)), [1, 1]);
        let listing = registry.list(None, Some(TimelineId([1; 16])), at(10));
        let lengths: Vec<usize> = listing.nodes.iter().map(|node| node.timelines.len()).collect();
        assert_eq!(lengths, [1, 0]);
        assert_eq!(registry.counts(at(11)), [0, 1]);
        assert_eq!(registry.list(Some(TenantId([9; 16])), None, at(11)).nodes[0].timelines, []);
        assert_eq!(registry.counts(at(16)), [0, 0]);
    }

    #[test]
    fn s3_memory_is_bounded() {
        let now = Instant::now();
        let mut registry = Registry::default();
        for node in 0..MAX_NODES as u64 {
            registry.publish(says(node, Role::Safekeeper, &[]), now).unwrap();
        }
        let one_more = registry.publish(says(u64::MAX, Role::Safekeeper, &[]), now);
        assert_eq!(one_more, Err(Full::Nodes));
        assert_eq!(registry.publish(says(5, Role::Safekeeper, &[1]), now), Ok(()));
        let mut zone = says(5, Role::Safekeeper, &[1]);
        zone.zone = "z".repeat(MAX_TEXT + 1);
        assert_eq!(registry.publish(zone, now), Err(Full::Text));
        let mut address = says(5, Role::Safekeeper, &[1]);
        address.addresses.pg = Some("a".repeat(MAX_TEXT + 1));
        assert_eq!(registry.publish(address, now), Err(Full::Text));
        let long = says(5, Role::Safekeeper, &vec![1; MAX_TIMELINES + 1]);
        assert_eq!(registry.publish(long, now), Err(Full::Timelines));
    }

    #[test]
    fn s3_a_listing_of_everything_is_not_too_long_to_be_read() {
        let now = Instant::now();
        let mut registry = Registry::default();
        let full = vec![1; MAX_TIMELINES];
        let nodes = (MAX_ALL_TIMELINES / MAX_TIMELINES) as u64;
        for node in 0..nodes {
            registry.publish(says(node, Role::Safekeeper, &full), now).unwrap();
        }
        let one_more = registry.publish(says(nodes, Role::Safekeeper, &[1]), now);
        assert_eq!(one_more, Err(Full::AllTimelines));
        // Who was there before may say something new, and those without timelines are heard.
        assert_eq!(registry.publish(says(0, Role::Safekeeper, &full), now), Ok(()));
        assert_eq!(registry.publish(says(nodes, Role::Pageserver, &[]), now), Ok(()));
        let mut longest = says(0, Role::Safekeeper, &[]);
        longest.zone = "\u{1}".repeat(MAX_TEXT);
        let text = Some(longest.zone.clone());
        let [wal, pg, http, pages] = std::array::from_fn(|_| text.clone());
        longest.addresses = Addresses { wal, pg, http, pages };
        longest.node = u64::MAX;
        assert!(serde_json::to_string(&longest).unwrap().len() < LONGEST_NODE);
    }
}
