//! `resting`: what a safekeeper knows of its timelines at rest without opening them.
//!
//! The header is that of its other files ([`crate::safekeeper`]); all integers are little endian.
//!
//! ```text
//! offset  size  field
//!      0     8  magic: "pgsSKrst"
//!      8     2  format version: 1
//!     10     2  reserved, 0
//!     12     4  length of the body in bytes
//!     16     4  CRC-32C of the body
//!     20     4  CRC-32C of bytes 0..20
//!     24     8  node id of the owner
//!     32     4  number of timelines, then of each:
//!            76  parameters, as in bytes 8..84 of a control body
//!             8  term
//!             8  commit LSN
//!             8  flush LSN
//!             8  available LSN
//!             8  archived LSN
//!             8  remote consistent LSN
//!             8  start of the last record, or the commit LSN if there is none
//!             8  number of segments
//!             8  configuration number
//!             4  number of members, then each: node id 8, incarnation 16
//!             4  number of incoming members, then likewise
//! ```
//!
//! It is a reason not to look at a timeline yet, and never one to believe something of it: who opens the timeline reads its
//! own files. A file that is lost or broken costs time at the next start, and nothing else.

use std::sync::Arc;

use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::Configuration;

use crate::FormatError;
use crate::bytes::Reader;
use crate::safekeeper::{Kind, MAX_TIMELINES, configuration, count, parameters};

const RESTING: Kind =
    Kind { what: "safekeeper's list of timelines at rest", magic: *b"pgsSKrst", version: 1 };

/// What others want to know of a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineSummary {
    /// What the timeline is.
    pub parameters: TimelineParameters,
    /// Highest promised term.
    pub term: Term,
    /// Known to be committed.
    pub commit_lsn: Lsn,
    /// End of the durable log.
    pub flush_lsn: Lsn,
    /// First byte on disk.
    pub available_lsn: Lsn,
    /// Seen in object storage before it.
    pub archived_lsn: Lsn,
    /// The page server no longer needs what is before it.
    pub remote_consistent_lsn: Lsn,
    /// Start of the last record of the log; the commit LSN if that is not known.
    pub last_record_lsn: Lsn,
    /// Segments on disk.
    pub segments: u64,
    /// Who its members are, as far as was heard here.
    pub configuration: Arc<Configuration>,
}

/// The bytes of a `resting` file of `node`.
pub fn encode_resting<'a>(
    node: NodeId,
    timelines: impl ExactSizeIterator<Item = &'a TimelineSummary>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + 256 * timelines.len());
    out.extend_from_slice(&node.0.to_le_bytes());
    out.extend_from_slice(&(timelines.len() as u32).to_le_bytes());
    for timeline in timelines {
        put(timeline, &mut out);
    }
    RESTING.encode(&out)
}

fn put(timeline: &TimelineSummary, out: &mut Vec<u8>) {
    let parameters = &timeline.parameters;
    out.extend_from_slice(&parameters.tenant.0);
    out.extend_from_slice(&parameters.timeline.0);
    out.extend_from_slice(&parameters.system_id.0.to_le_bytes());
    for value in [parameters.pg_version, parameters.pg_timeline, parameters.segment_size] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    out.extend_from_slice(&parameters.start_lsn.0.to_le_bytes());
    out.extend_from_slice(&parameters.ancestor.map_or([0; 16], |ancestor| ancestor.0));
    let configuration = &timeline.configuration;
    for value in [
        timeline.term.0,
        timeline.commit_lsn.0,
        timeline.flush_lsn.0,
        timeline.available_lsn.0,
        timeline.archived_lsn.0,
        timeline.remote_consistent_lsn.0,
        timeline.last_record_lsn.0,
        timeline.segments,
        configuration.number(),
    ] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    for group in [configuration.members(), configuration.incoming()] {
        out.extend_from_slice(&(group.len() as u32).to_le_bytes());
        for member in group {
            out.extend_from_slice(&member.node.0.to_le_bytes());
            out.extend_from_slice(&member.incarnation.0);
        }
    }
}

/// The contents of a `resting` file, which must belong to `node`.
pub fn decode_resting(bytes: &[u8], node: NodeId) -> Result<Vec<TimelineSummary>, FormatError> {
    let (_, mut reader) = RESTING.open(bytes)?;
    let owner = reader.u64()?;
    if owner != node.0 {
        return Err(FormatError::WrongOwner {
            what: RESTING.what,
            found: format!("safekeeper {owner}"),
            expected: format!("safekeeper {node}"),
        });
    }
    let count = count(&mut reader, MAX_TIMELINES)?;
    let timelines = (0..count).map(|_| take(&mut reader)).collect::<Result<_, _>>()?;
    RESTING.end(&reader)?;
    Ok(timelines)
}

fn take(reader: &mut Reader<'_>) -> Result<TimelineSummary, FormatError> {
    Ok(TimelineSummary {
        parameters: parameters(reader)?,
        term: Term(reader.u64()?),
        commit_lsn: Lsn(reader.u64()?),
        flush_lsn: Lsn(reader.u64()?),
        available_lsn: Lsn(reader.u64()?),
        archived_lsn: Lsn(reader.u64()?),
        remote_consistent_lsn: Lsn(reader.u64()?),
        last_record_lsn: Lsn(reader.u64()?),
        segments: reader.u64()?,
        configuration: {
            let number = reader.u64()?;
            Arc::new(configuration(reader, number)?)
        },
    })
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{Incarnation, Member, SystemId, TenantId, TimelineId};

    use super::*;

    const NODE: NodeId = NodeId(3);

    fn summary(id: u8) -> TimelineSummary {
        let member = |node: u64| Member { node: NodeId(node), incarnation: Incarnation([9; 16]) };
        let members = (1..=3).map(member).collect();
        TimelineSummary {
            parameters: TimelineParameters {
                tenant: TenantId([1; 16]),
                timeline: TimelineId([id; 16]),
                system_id: SystemId(7),
                pg_version: 17,
                pg_timeline: 1,
                segment_size: 16 << 20,
                start_lsn: Lsn(16 << 20),
                ancestor: (id > 2).then_some(TimelineId([2; 16])),
            },
            term: Term(4),
            commit_lsn: Lsn(0x0200_0100),
            flush_lsn: Lsn(0x0200_0101),
            available_lsn: Lsn(0x0100_0002),
            archived_lsn: Lsn(0x0200_0003),
            remote_consistent_lsn: Lsn(0x0200_0004),
            last_record_lsn: Lsn(0x0200_0005),
            segments: 2,
            configuration: Arc::new(Configuration::new(5, members).unwrap()),
        }
    }

    #[test]
    fn golden_resting() {
        let bytes = encode_resting(NODE, [summary(2)].iter());
        assert_eq!(bytes[..16], *b"pgsSKrst\x01\0\0\0\xf0\0\0\0");
        assert_eq!(bytes[24..36], [3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[36..52], [1; 16]);
        assert_eq!(bytes[52..68], [2; 16]);
        // After the parameters, the term and the commit LSN.
        assert_eq!(bytes[112..128], [4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0]);
        let members = [&[5, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0][..], &[0; 6], &[9; 16]].concat();
        assert_eq!(bytes[176..176 + members.len()], members);
        assert_eq!(decode_resting(&bytes, NODE), Ok(vec![summary(2)]));
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let timelines: Vec<_> = (1..5).map(summary).collect();
        let bytes = encode_resting(NODE, timelines.iter());
        assert_eq!(decode_resting(&bytes, NODE), Ok(timelines));
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 4;
            assert!(decode_resting(&broken, NODE).is_err(), "byte {at}");
            assert!(decode_resting(&bytes[..at], NODE).is_err(), "cut at {at}");
        }
        let wrong = decode_resting(&bytes, NodeId(4));
        assert!(matches!(wrong, Err(FormatError::WrongOwner { .. })), "{wrong:?}");
        let none = encode_resting(NODE, std::iter::empty());
        assert_eq!(decode_resting(&none, NODE), Ok(Vec::new()));
    }
}
