//! Who a safekeeper is: what it says of itself when it starts, for those who found timelines and change members.
//!
//! A [document](crate::document) whose first line begins with "pgstrata-safekeeper ", at `safekeepers/ID`. The safekeeper
//! writes it over at each start; it stays when the safekeeper is gone.

use pgstrata_ids::{Incarnation, Member, NodeId};
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::document::Kind;

const KIND: Kind = Kind {
    what: "safekeeper's registration",
    prefix: "pgstrata-safekeeper ",
    version: 1,
    first_version: 1,
    sealed_from: 1,
};

/// Bytes of one, at most: a zone and three addresses of 255 bytes each, which JSON may write as 6 each.
pub const LIMIT: u64 = 16 << 10;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Which safekeeper, in which life of its directory.
    pub member: Member,
    /// Failure zone; empty if it has none.
    pub zone: String,
    /// Its WAL port, as `host:port`.
    pub wal: String,
    /// Its HTTP port.
    pub http: String,
}

#[derive(Serialize, Deserialize)]
struct Document {
    id: u64,
    incarnation: String,
    zone: String,
    wal: String,
    http: String,
}

/// The object of a safekeeper.
pub fn object_name(node: NodeId) -> String {
    format!("safekeepers/{node}")
}

impl Registration {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        KIND.encode(&Document {
            id: self.member.node.0,
            incarnation: self.member.incarnation.to_string(),
            zone: self.zone.clone(),
            wal: self.wal.clone(),
            http: self.http.clone(),
        })
    }

    /// Reads the bytes of `node`'s object.
    pub fn decode(bytes: &[u8], node: NodeId) -> Result<Registration, FormatError> {
        let document: Document = KIND.decode(bytes)?;
        KIND.check_node(document.id, node)?;
        let incarnation: Incarnation =
            document.incarnation.parse().map_err(|error: pgstrata_ids::IdError| {
                FormatError::corrupt(KIND.what, error.to_string())
            })?;
        let member = Member { node, incarnation };
        Ok(Registration { member, zone: document.zone, wal: document.wal, http: document.http })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registration(zone: &str) -> Registration {
        let member = Member { node: NodeId(7), incarnation: Incarnation([8; 16]) };
        let (zone, wal, http) = (zone.to_owned(), "h:1".to_owned(), "h:2".to_owned());
        Registration { member, zone, wal, http }
    }

    #[test]
    fn round_trip_and_every_flipped_bit_is_found() {
        let bytes = registration("a").encode();
        assert!(bytes.ends_with(
            br#"{"id":7,"incarnation":"08080808080808080808080808080808","zone":"a","wal":"h:1","http":"h:2"}"#
        ));
        assert_eq!(Registration::decode(&bytes, NodeId(7)), Ok(registration("a")));
        let other = Registration::decode(&bytes, NodeId(8));
        assert!(matches!(other, Err(FormatError::WrongOwner { .. })));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                assert!(Registration::decode(&broken, NodeId(7)).is_err(), "byte {at} bit {bit}");
            }
        }
        let longest = registration(&"\u{1}".repeat(255));
        assert!(longest.encode().len() as u64 <= LIMIT);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Registration::decode(&bytes, NodeId(7));
        }
    }
}
