//! What the broker last said; it stays when the broker is gone.

use parking_lot::RwLock;
use pgstrata_ids::{Lsn, NodeId, TenantId, TimelineId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::broker::{Listing, Role, TimelineProgress};

/// See the module.
#[derive(Debug, Default)]
pub struct Known(RwLock<Listing>);

impl Known {
    /// Replaces what is known.
    pub fn replace(&self, listing: Listing) {
        *self.0.write() = listing;
    }

    /// The WAL port of a safekeeper.
    pub fn wal_address(&self, node: NodeId) -> Option<String> {
        let listing = self.0.read();
        let mut safekeepers = listing.nodes.iter().filter(|said| said.role == Role::Safekeeper);
        safekeepers.find(|said| said.node() == node)?.addresses.wal.clone()
    }

    /// What a safekeeper says of a timeline.
    pub fn progress(&self, node: NodeId, key: (TenantId, TimelineId)) -> Option<TimelineProgress> {
        let listing = self.0.read();
        let of_node = |said: &&pgstrata_wire::broker::Publication| {
            said.role == Role::Safekeeper && said.node() == node
        };
        let said = listing.nodes.iter().find(of_node)?;
        let matching =
            |progress: &&TimelineProgress| (progress.tenant_id, progress.timeline_id) == key;
        said.timelines.iter().find(matching).cloned()
    }

    /// The highest value that any node gives for a timeline.
    pub fn highest(
        &self,
        key: (TenantId, TimelineId),
        value: impl Fn(&TimelineProgress) -> Lsn,
    ) -> Lsn {
        let listing = self.0.read();
        let progress = listing.nodes.iter().flat_map(|said| &said.timelines);
        let matching =
            progress.filter(|progress| (progress.tenant_id, progress.timeline_id) == key);
        matching.map(value).max().unwrap_or_default()
    }

    /// The zone that holds a majority of a configuration's members, if one does.
    pub fn majority_zone(&self, configuration: &Configuration) -> Option<String> {
        let listing = self.0.read();
        let zone_of = |node: &NodeId| {
            let said = listing
                .nodes
                .iter()
                .find(|said| said.role == Role::Safekeeper && said.node() == *node)?;
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
    use pgstrata_wire::broker::{Addresses, Publication};

    use super::*;

    #[test]
    fn a_majority_in_one_zone_is_seen() {
        let said = |node: u64, zone: &str| Publication {
            node,
            role: Role::Safekeeper,
            zone: zone.into(),
            addresses: Addresses::default(),
            timelines: Vec::new(),
        };
        let three = Configuration::new(1, vec![NodeId(1), NodeId(2), NodeId(3)]).unwrap();
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
