//! What the broker last said; it stays when the broker is gone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use pgstrata_ids::{Lsn, Member, NodeId, TenantId, TimelineId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::broker::{Listing, Publication, Role, TTL_S, TimelineProgress};

use crate::timelines::TimelineKey;

/// See the module.
#[derive(Debug, Default)]
pub struct Known(RwLock<Heard>);

/// A broker that has said nothing for this long is as good as none.
const LATELY: Duration = Duration::from_secs(TTL_S);

#[derive(Debug, Default)]
struct Heard {
    listing: Listing,
    /// Listings that there were, and when the last one came.
    count: u64,
    at: Option<Instant>,
    /// Where in the listing a timeline is: nodes, and its places there. Each is looked up every
    /// second, and there may be many.
    places: HashMap<TimelineKey, Vec<(usize, usize)>>,
}

impl Heard {
    fn new(listing: Listing) -> Heard {
        let mut places: HashMap<TimelineKey, Vec<(usize, usize)>> = HashMap::new();
        for (node, said) in listing.nodes.iter().enumerate() {
            for (place, progress) in said.timelines.iter().enumerate() {
                let key = (progress.tenant_id, progress.timeline_id);
                places.entry(key).or_default().push((node, place));
            }
        }
        Heard { listing, count: 0, at: Some(Instant::now()), places }
    }

    /// What nodes say of a timeline.
    fn of(&self, key: TimelineKey) -> impl Iterator<Item = (&Publication, &TimelineProgress)> {
        let places = self.places.get(&key).into_iter().flatten();
        places.filter_map(|&(node, place)| {
            let said = self.listing.nodes.get(node)?;
            Some((said, said.timelines.get(place)?))
        })
    }
}

impl Known {
    /// Replaces what is known. Of a long listing this takes a while.
    pub fn replace(&self, listing: Listing) {
        let mut heard = Heard::new(listing);
        let before = &mut *self.0.write();
        heard.count = before.count + 1;
        *before = heard;
    }

    /// How many listings there were.
    pub fn count(&self) -> u64 {
        self.0.read().count
    }

    /// Whether the broker has said something lately.
    pub fn is_told(&self) -> bool {
        self.0.read().at.is_some_and(|at| at.elapsed() < LATELY)
    }

    /// The WAL port of a safekeeper.
    pub fn wal_address(&self, node: NodeId) -> Option<String> {
        let heard = self.0.read();
        let listing = &heard.listing;
        let mut safekeepers = listing.nodes.iter().filter(|said| said.role == Role::Safekeeper);
        safekeepers.find(|said| said.node() == node)?.addresses.wal.clone()
    }

    /// What a safekeeper says of a timeline.
    pub fn progress(&self, node: NodeId, key: (TenantId, TimelineId)) -> Option<TimelineProgress> {
        let heard = self.0.read();
        let found =
            heard.of(key).find(|(said, _)| said.role == Role::Safekeeper && said.node() == node);
        found.map(|(_, progress)| progress.clone())
    }

    /// The highest value that any node gives for a timeline.
    pub fn highest(
        &self,
        key: (TenantId, TimelineId),
        value: impl Fn(&TimelineProgress) -> Lsn,
    ) -> Lsn {
        let heard = self.0.read();
        heard.of(key).map(|(_, progress)| value(progress)).max().unwrap_or_default()
    }

    /// The zone that holds a majority of a configuration's members, if one does.
    pub fn majority_zone(&self, configuration: &Configuration) -> Option<String> {
        let heard = self.0.read();
        let listing = &heard.listing;
        let zone_of = |member: &Member| {
            let said = listing
                .nodes
                .iter()
                .find(|said| said.role == Role::Safekeeper && said.node() == member.node)?;
            Some(said.zone.clone()).filter(|zone| !zone.is_empty())
        };
        let members = configuration.members();
        let zones: Vec<String> = members.iter().filter_map(zone_of).collect();
        let crowded =
            |zone: &&String| zones.iter().filter(|other| other == zone).count() > members.len() / 2;
        zones.iter().find(crowded).filter(|_| members.len() > 1).cloned()
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_wire::broker::Addresses;

    use super::*;

    #[test]
    fn every_timeline_of_a_long_listing_is_found_at_once() {
        let key = |n: u32| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            (TenantId([1; 16]), TimelineId(id))
        };
        let progress = |n: u32, lsn: u64| TimelineProgress {
            tenant_id: key(n).0,
            timeline_id: key(n).1,
            term: 1,
            flush_lsn: Lsn(lsn),
            commit_lsn: Lsn(lsn),
            archived_lsn: Lsn(0),
            remote_consistent_lsn: Lsn(0),
        };
        let said = |node: u64, role| Publication {
            node,
            role,
            zone: String::new(),
            addresses: Addresses::default(),
            timelines: (0..20_000).map(|n| progress(n, u64::from(n) + node)).collect(),
        };
        let nodes = vec![
            said(3, Role::Pageserver),
            said(1, Role::Safekeeper),
            said(2, Role::Safekeeper),
            said(3, Role::Safekeeper),
        ];
        let known = Known::default();
        known.replace(Listing { nodes });
        let began = std::time::Instant::now();
        for n in 0..20_000 {
            assert_eq!(known.highest(key(n), |said| said.commit_lsn), Lsn(u64::from(n) + 3));
            let two = known.progress(NodeId(2), key(n)).unwrap();
            assert_eq!(two.commit_lsn, Lsn(u64::from(n) + 2));
        }
        // To look through all of it each time takes more than a second even where that is fast.
        assert!(began.elapsed() < std::time::Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!(known.highest(key(20_000), |said| said.commit_lsn), Lsn(0));
        assert!(known.progress(NodeId(4), key(1)).is_none());
    }

    #[test]
    fn a_majority_in_one_zone_is_seen() {
        let said = |node: u64, zone: &str| Publication {
            node,
            role: Role::Safekeeper,
            zone: zone.into(),
            addresses: Addresses::default(),
            timelines: Vec::new(),
        };
        let member = |node: u64| Member {
            node: NodeId(node),
            incarnation: pgstrata_ids::Incarnation([1; 16]),
        };
        let three = Configuration::new(1, (1..=3).map(member).collect()).unwrap();
        let known = Known::default();
        for (zones, expected) in
            [(["a", "b", "c"], None), (["a", "b", "b"], Some("b")), (["", "", ""], None)]
        {
            let nodes = zones.iter().zip(1..).map(|(zone, node)| said(node, zone)).collect();
            known.replace(Listing { nodes });
            assert_eq!(known.majority_zone(&three).as_deref(), expected);
        }
    }
}
