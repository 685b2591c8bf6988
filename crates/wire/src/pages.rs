//! The page service: a compute shim asks a page server for pages as of an LSN.
//!
//! ```text
//! hello, client to server, 64 bytes
//!      0     8  magic "PGSTPAGE"
//!      8     4  lowest version that the client speaks
//!     12     4  highest version that it speaks; 0: the lowest only
//!     16    16  tenant
//!     32    16  timeline
//!     48    16  zero
//! request, 40 bytes
//!      0     4  kind: 1 pages, 2 size, 3 relations of a database
//!      4     4  request number, chosen by the client
//!      8     8  LSN
//!     16     4  tablespace
//!     20     4  database
//!     24     4  relation
//!     28     4  fork
//!     32     4  first block
//!     36     4  number of blocks
//! reply, 16 bytes and body
//!      0     4  status: 0 done, 1 no such relation, 2 error
//!      4     4  request number
//!      8     4  length of the body
//!     12     4  in the answer to a hello, the version that is spoken from here on, 0: version 1; else zero
//! ```
//! Little-endian. The body of an error is its text; of pages, the pages; of a size, u32 blocks; of
//! relations, for each {u32 relation, u32 fork, u32 blocks}. The hello is answered with a reply
//! of request number 0. Requests are pipelined and answered in order. Blocks past the relation's
//! end are not an error: the body is shorter. The hello and the head of a reply have this form in
//! all versions ([`crate::version`]).

use pgstrata_ids::{Fork, Lsn, RelTag, TenantId, TimelineId};

use crate::version::{Protocol, Range, Version};

/// The protocol.
pub const PAGES: Protocol = Protocol {
    name: "page protocol",
    server: "page server",
    speaks: match Range::new(1, 1) {
        Some(range) => range,
        None => panic!("no range"),
    },
};

/// Bytes of a hello.
pub const HELLO_SIZE: usize = 64;
/// Bytes of a request.
pub const REQUEST_SIZE: usize = 40;
/// Bytes of a reply before its body.
pub const REPLY_SIZE: usize = 16;
/// Most blocks of one request.
pub const BLOCKS_LIMIT: u32 = 256;
/// Longest body of a reply: bounds what a client allocates.
pub const BODY_LIMIT: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"PGSTPAGE";
/// What a server that knew of no ranges speaks, and says nothing of.
const UNSAID: Version = Version(1);

/// Bytes that are not a message of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// The peer speaks something else.
    #[error("the peer does not speak the page service's protocol")]
    Magic,
    /// What the peer says of versions means nothing.
    #[error(
        "the peer speaks versions {0} to {1} of the page service's protocol, which is no range"
    )]
    Versions(u32, u32),
    /// A field has no meaning.
    #[error("a page service message has {what} {value}")]
    Field {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
}

/// Who a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the client speaks.
    pub versions: Range,
    /// Tenant.
    pub tenant: TenantId,
    /// Timeline.
    pub timeline: TimelineId,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn id(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    id
}

impl Hello {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; HELLO_SIZE] {
        let mut bytes = [0; HELLO_SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = self.versions.lowest().0;
        bytes[12] = self.versions.highest().0;
        bytes[16..32].copy_from_slice(&self.tenant.0);
        bytes[32..48].copy_from_slice(&self.timeline.0);
        bytes
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8; HELLO_SIZE]) -> Result<Hello, PagesError> {
        if bytes[..8] != MAGIC {
            return Err(PagesError::Magic);
        }
        let (lowest, highest) = (word(bytes, 8), word(bytes, 12));
        let versions = match (u8::try_from(lowest), u8::try_from(highest)) {
            (Ok(lowest), Ok(highest)) => Range::offered(lowest, highest),
            _ => None,
        };
        Ok(Hello {
            versions: versions.ok_or(PagesError::Versions(lowest, highest))?,
            tenant: TenantId(id(bytes, 16)),
            timeline: TimelineId(id(bytes, 32)),
        })
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// `count` pages from `block` on.
    Pages {
        /// Relation fork.
        rel: RelTag,
        /// First block.
        block: u32,
        /// Number of blocks, at most [`BLOCKS_LIMIT`].
        count: u32,
    },
    /// A relation fork's size.
    Size {
        /// Relation fork.
        rel: RelTag,
    },
    /// All relation forks of a database's directory.
    Relations {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagesRequest {
    /// Chosen by the client, repeated in the reply.
    pub number: u32,
    /// As of when.
    pub lsn: Lsn,
    /// What.
    pub query: Query,
}

impl PagesRequest {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; REQUEST_SIZE] {
        let fields = |rel: RelTag| [rel.spc, rel.db, rel.rel, rel.fork as u32];
        let (kind, tag, block, count) = match self.query {
            Query::Pages { rel, block, count } => (1, fields(rel), block, count),
            Query::Size { rel } => (2, fields(rel), 0, 0),
            Query::Relations { spc, db } => (3, [spc, db, 0, 0], 0, 0),
        };
        let mut bytes = [0; REQUEST_SIZE];
        let mut put = |at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(0, kind);
        put(4, self.number);
        put(8, self.lsn.0 as u32);
        put(12, (self.lsn.0 >> 32) as u32);
        for (at, value) in tag.into_iter().enumerate() {
            put(16 + 4 * at, value);
        }
        put(32, block);
        put(36, count);
        bytes
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8; REQUEST_SIZE]) -> Result<PagesRequest, PagesError> {
        let number = word(bytes, 4);
        let lsn = Lsn(u64::from(word(bytes, 8)) | u64::from(word(bytes, 12)) << 32);
        let (spc, db) = (word(bytes, 16), word(bytes, 20));
        let rel = || {
            let fork = word(bytes, 28);
            u8::try_from(fork)
                .ok()
                .and_then(Fork::from_number)
                .map(|fork| RelTag { spc, db, rel: word(bytes, 24), fork })
                .ok_or(PagesError::Field { what: "fork", value: fork })
        };
        let query = match word(bytes, 0) {
            1 => {
                let count = word(bytes, 36);
                if count == 0 || count > BLOCKS_LIMIT {
                    return Err(PagesError::Field { what: "a number of blocks of", value: count });
                }
                Query::Pages { rel: rel()?, block: word(bytes, 32), count }
            }
            2 => Query::Size { rel: rel()? },
            3 => Query::Relations { spc, db },
            kind => return Err(PagesError::Field { what: "kind", value: kind }),
        };
        Ok(PagesRequest { number, lsn, query })
    }
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The body is the answer.
    Done,
    /// The relation fork does not exist at that LSN. No body.
    NoRelation,
    /// The body says what went wrong.
    Error,
}

/// The head of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagesReply {
    /// How it went.
    pub status: Status,
    /// The request's number.
    pub number: u32,
    /// Bytes that follow.
    pub length: u32,
    /// In the answer to a hello, which version is spoken from here on.
    pub version: Option<Version>,
}

impl PagesReply {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; REPLY_SIZE] {
        let status: u32 = match self.status {
            Status::Done => 0,
            Status::NoRelation => 1,
            Status::Error => 2,
        };
        let mut bytes = [0; REPLY_SIZE];
        bytes[..4].copy_from_slice(&status.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12] = self.version.map_or(0, |version| version.0);
        bytes
    }

    /// The version that a server chose, if this is its answer to a hello.
    pub fn chosen(&self) -> Version {
        self.version.unwrap_or(UNSAID)
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8; REPLY_SIZE]) -> Result<PagesReply, PagesError> {
        let status = match word(bytes, 0) {
            0 => Status::Done,
            1 => Status::NoRelation,
            2 => Status::Error,
            value => return Err(PagesError::Field { what: "status", value }),
        };
        let length = word(bytes, 8);
        if length as usize > BODY_LIMIT {
            return Err(PagesError::Field { what: "a body of", value: length });
        }
        let version = match word(bytes, 12) {
            0 => None,
            value => {
                let known = u8::try_from(value);
                Some(known.map_err(|_| PagesError::Field { what: "a version", value })?)
            }
        };
        Ok(PagesReply { status, number: word(bytes, 4), length, version: version.map(Version) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn round_trips() {
        let (tenant, timeline) = (TenantId([1; 16]), TimelineId([2; 16]));
        for versions in [PAGES.speaks, Range::new(1, 255).unwrap(), Range::new(3, 7).unwrap()] {
            let hello = Hello { versions, tenant, timeline };
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Visibility };
        for query in [
            Query::Pages { rel, block: 77, count: 32 },
            Query::Size { rel },
            Query::Relations { spc: 1663, db: 5 },
        ] {
            let request = PagesRequest { number: 9, lsn: Lsn(0x1_2345_6789), query };
            assert_eq!(PagesRequest::decode(&request.encode()), Ok(request));
        }
        for status in [Status::Done, Status::NoRelation, Status::Error] {
            for version in [None, Some(Version(1)), Some(Version(255))] {
                let reply = PagesReply { status, number: 3, length: 8192, version };
                assert_eq!(PagesReply::decode(&reply.encode()), Ok(reply));
            }
        }
    }

    #[test]
    fn what_says_no_range_is_of_the_first_version() {
        let (tenant, timeline) = (TenantId([1; 16]), TimelineId([2; 16]));
        let mut bytes = Hello { versions: PAGES.speaks, tenant, timeline }.encode();
        bytes[12] = 0;
        assert_eq!(Hello::decode(&bytes).unwrap().versions, Range::new(1, 1).unwrap());
        bytes[8] = 0;
        assert_eq!(Hello::decode(&bytes), Err(PagesError::Versions(0, 0)));
        (bytes[8], bytes[9]) = (1, 1);
        assert_eq!(Hello::decode(&bytes), Err(PagesError::Versions(257, 0)));
        let reply = PagesReply { status: Status::Done, number: 0, length: 0, version: None };
        assert_eq!(reply.chosen(), Version(1));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in any::<[u8; 64]>()) {
            let _ = Hello::decode(&bytes);
            let mut request = [0; REQUEST_SIZE];
            request.copy_from_slice(&bytes[..REQUEST_SIZE]);
            let _ = PagesRequest::decode(&request);
            let mut reply = [0; REPLY_SIZE];
            reply.copy_from_slice(&bytes[..REPLY_SIZE]);
            let _ = PagesReply::decode(&reply);
        }
    }
}
