//! The index of a timeline: what it is, how far it is durable, and which layers it has.
//!
//! A [document](crate::document) whose first line begins with "pgstrata-index ". The object is advanced by
//! compare-and-swap only; `sequence` makes every content unique.

use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::document::Kind;
use crate::layer::LayerKind;

const KIND: Kind = Kind {
    what: "timeline index",
    prefix: "pgstrata-index ",
    // 2 since branches can take another's place, 3 since they can be frozen: an older page server would not see it.
    version: 3,
    first_version: 1,
    sealed_from: 3,
};

/// One timeline, as object storage knows it. LSNs are in PostgreSQL's text form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineIndex {
    /// Advanced by every write.
    pub sequence: u64,
    /// Generation of the page server that wrote this.
    pub generation: u64,
    /// Tenant id.
    pub tenant: String,
    /// Timeline id.
    pub timeline: String,
    /// The branch's name.
    pub name: String,
    /// Where it branched off, if it has an ancestor.
    pub ancestor: Option<Ancestor>,
    /// Nothing before this LSN can be read from this timeline itself.
    pub start_lsn: String,
    /// Start of the last record before `start_lsn`: the back link of the first own record.
    pub start_record: String,
    /// Everything up to here is in the layers.
    pub remote_consistent_lsn: String,
    /// Start of the last record before `remote_consistent_lsn`.
    pub last_record: String,
    /// Database system identifier.
    pub system_id: u64,
    /// PostgreSQL major version.
    pub pg_version: u32,
    /// Bytes of a WAL segment.
    pub segment_size: u64,
    /// Creation time, RFC 3339.
    pub created: String,
    /// The branch was deleted. Its objects stay: nothing removes them yet.
    #[serde(default)]
    pub deleted: bool,
    /// The timeline whose place this one took, with its name: from the moment that this index exists, that one is
    /// deleted, whether or not its own index says so yet.
    #[serde(default)]
    pub replaces: Option<String>,
    /// Why no WAL is taken in any more, and never will be, if so: see `--parted` of the page server.
    #[serde(default)]
    pub frozen: Option<String>,
    /// Layers, oldest first.
    pub layers: Vec<LayerEntry>,
}

/// Where a branch begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// The ancestor's timeline id.
    pub timeline: String,
    /// The branch sees the ancestor up to here.
    pub lsn: String,
}

/// One layer of a timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Object name below the timeline's `layers/`.
    pub name: String,
    /// Delta or image.
    pub kind: LayerKind,
    /// 0 for a layer as frozen, 1 for a compacted one.
    pub level: u8,
    /// Changes after this LSN.
    pub start_lsn: String,
    /// Changes up to this LSN.
    pub end_lsn: String,
    /// Least key, hexadecimal.
    pub min_key: String,
    /// Greatest key, hexadecimal.
    pub max_key: String,
    /// Bytes of the object.
    pub size: u64,
}

impl TimelineIndex {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        KIND.encode(self)
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<TimelineIndex, FormatError> {
        KIND.decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> TimelineIndex {
        TimelineIndex {
            sequence: 7,
            generation: 2,
            tenant: "00".repeat(16),
            timeline: "11".repeat(16),
            name: "main".into(),
            ancestor: Some(Ancestor { timeline: "22".repeat(16), lsn: "0/10".into() }),
            start_lsn: "0/2000000".into(),
            start_record: "0/1FFFF00".into(),
            remote_consistent_lsn: "0/2000100".into(),
            last_record: "0/20000A0".into(),
            system_id: 42,
            pg_version: 15,
            segment_size: 16 << 20,
            created: "2026-01-01T00:00:00Z".into(),
            deleted: false,
            replaces: None,
            frozen: None,
            layers: vec![LayerEntry {
                name: "x".into(),
                kind: LayerKind::Delta,
                level: 0,
                start_lsn: "0/2000000".into(),
                end_lsn: "0/2000100".into(),
                min_key: "00".into(),
                max_key: "ff".into(),
                size: 10,
            }],
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(TimelineIndex::decode(&index().encode()), Ok(index()));
    }

    #[test]
    fn an_index_of_the_first_version_is_read() {
        let text = String::from_utf8(index().encode()).unwrap();
        let body =
            text.split_once('\n').unwrap().1.replace("\"replaces\":null,\"frozen\":null,", "");
        assert!(!body.contains("replaces") && !body.contains("frozen"));
        let checksum = crc32c::crc32c(body.as_bytes());
        let old = format!("pgstrata-index 1 {checksum:08x}\n{body}");
        assert_eq!(TimelineIndex::decode(old.as_bytes()), Ok(index()));
        for wrong in ["0", "01", "4"] {
            let other = old.replacen("index 1", &format!("index {wrong}"), 1);
            assert!(TimelineIndex::decode(other.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = index().encode();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                assert!(TimelineIndex::decode(&broken).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn empty_is_unwritten() {
        assert_eq!(TimelineIndex::decode(&[]), Err(FormatError::Unwritten { what: KIND.what }));
    }
}
