//! Timelines that a safekeeper has a copy of, and of which it is not decided yet who the members are: those of an older release. Nobody
//! who has no copy founds them as if they were new.
//!
//! A [document](crate::document) whose first line begins with "pgstrata-undecided ", at `undecided/ID`. The safekeeper writes it over
//! at each start at which there are any; it stays when there are none any more, and means nothing once a timeline is founded.

use pgstrata_ids::{NodeId, TenantId, TimelineId};
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::document::Kind;

const KIND: Kind = Kind {
    what: "safekeeper's list of undecided timelines",
    prefix: "pgstrata-undecided ",
    version: 1,
    first_version: 1,
    sealed_from: 1,
};

/// Before the node's number in the object's name.
pub const PREFIX: &str = "undecided/";

/// Bytes of one, at most: some 900,000 timelines.
pub const LIMIT: u64 = 64 << 20;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undecided {
    /// Whose list it is.
    pub node: NodeId,
    /// In any order.
    pub timelines: Vec<(TenantId, TimelineId)>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    id: u64,
    timelines: Vec<(String, String)>,
}

/// The object of a safekeeper.
pub fn object_name(node: NodeId) -> String {
    format!("{PREFIX}{node}")
}

/// Whose object has this name, if it is one.
pub fn node_of(name: &str) -> Option<NodeId> {
    let node = NodeId(name.strip_prefix(PREFIX)?.parse().ok()?);
    (object_name(node) == name).then_some(node)
}

impl Undecided {
    /// The object's bytes, which may be more than [`LIMIT`].
    pub fn encode(&self) -> Vec<u8> {
        let text = |(tenant, timeline): &(TenantId, TimelineId)| {
            (tenant.to_string(), timeline.to_string())
        };
        KIND.encode(&Document {
            id: self.node.0,
            timelines: self.timelines.iter().map(text).collect(),
        })
    }

    /// Reads the bytes of `node`'s object.
    pub fn decode(bytes: &[u8], node: NodeId) -> Result<Undecided, FormatError> {
        let document: Document = KIND.decode(bytes)?;
        KIND.check_node(document.id, node)?;
        let corrupt =
            |error: pgstrata_ids::IdError| FormatError::corrupt(KIND.what, error.to_string());
        let timeline = |(tenant, timeline): &(String, String)| {
            Ok((tenant.parse().map_err(corrupt)?, timeline.parse().map_err(corrupt)?))
        };
        let timelines = document.timelines.iter().map(timeline).collect::<Result<_, _>>()?;
        Ok(Undecided { node, timelines })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(count: u8) -> Undecided {
        let one = |number| (TenantId([number; 16]), TimelineId([number; 16]));
        Undecided { node: NodeId(7), timelines: (0..count).map(one).collect() }
    }

    #[test]
    fn round_trip_and_every_flipped_bit_is_found() {
        for count in [0, 1, 3] {
            assert_eq!(Undecided::decode(&list(count).encode(), NodeId(7)), Ok(list(count)));
        }
        let bytes = list(2).encode();
        let other = Undecided::decode(&bytes, NodeId(8));
        assert!(matches!(other, Err(FormatError::WrongOwner { .. })));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                assert!(Undecided::decode(&broken, NodeId(7)).is_err(), "byte {at} bit {bit}");
            }
        }
        assert_eq!(node_of(&object_name(NodeId(12))), Some(NodeId(12)));
        assert_eq!(node_of("undecided/012"), None);
        assert_eq!(node_of("safekeepers/12"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Undecided::decode(&bytes, NodeId(7));
        }
    }
}
