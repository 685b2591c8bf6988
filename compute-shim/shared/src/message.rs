//! Requests of the preload library to the daemon: fixed-size messages on a Unix stream socket.
//!
//! ```text
//! request, 32 bytes: u32 kind, u32 tablespace, u32 database, u32 relation, u32 fork,
//!                    u32 segment, u32 first block, u32 blocks     (native byte order)
//! reply, 8 bytes:    i32 errno (0: done), u32 table entry of a mapped segment (none: 2^32 - 1)
//! ```

use crate::path::SegmentId;

/// Bytes of a request.
pub const REQUEST_SIZE: usize = 32;
/// Bytes of a reply.
pub const REPLY_SIZE: usize = 8;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RequestKind {
    /// Put the segment into the table, and its file into place if the page server knows it.
    Resolve = 1,
    /// Bring blocks into the local file.
    Fill = 2,
    /// The same, without a reply, for blocks that will be wanted soon.
    Prefetch = 3,
    /// Put every file of a database directory into place, before it is listed.
    ListDatabase = 4,
    /// A database directory was removed.
    DropDatabase = 5,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub kind: RequestKind,
    /// Of which segment (of a directory: only tablespace and database).
    pub id: SegmentId,
    /// First block in the segment.
    pub block: u32,
    /// Number of blocks.
    pub count: u32,
}

impl Request {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; REQUEST_SIZE] {
        let id = &self.id;
        let words = [
            self.kind as u32,
            id.spc,
            id.db,
            id.rel,
            u32::from(id.fork),
            id.segment,
            self.block,
            self.count,
        ];
        let mut bytes = [0; REQUEST_SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// Reads a message; `None` if it is none.
    pub fn decode(bytes: &[u8; REQUEST_SIZE]) -> Option<Request> {
        let mut words = [0; 8];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        let kind = match words[0] {
            1 => RequestKind::Resolve,
            2 => RequestKind::Fill,
            3 => RequestKind::Prefetch,
            4 => RequestKind::ListDatabase,
            5 => RequestKind::DropDatabase,
            _ => return None,
        };
        let fork = u8::try_from(words[4]).ok()?;
        let id = SegmentId { spc: words[1], db: words[2], rel: words[3], fork, segment: words[5] };
        Some(Request { kind, id, block: words[6], count: words[7] })
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// 0, or the error that the library reports to PostgreSQL.
    pub errno: i32,
    /// The segment's entry in the table if it is mapped, or [`NO_ENTRY`].
    pub entry: u32,
}

/// The segment's local file is all there is.
pub const NO_ENTRY: u32 = u32::MAX;

impl Reply {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; REPLY_SIZE] {
        let mut bytes = [0; REPLY_SIZE];
        bytes[..4].copy_from_slice(&self.errno.to_ne_bytes());
        bytes[4..].copy_from_slice(&self.entry.to_ne_bytes());
        bytes
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8; REPLY_SIZE]) -> Reply {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Reply { errno: i32::from_ne_bytes([a, b, c, d]), entry: u32::from_ne_bytes([e, f, g, h]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let id = SegmentId { spc: 1663, db: 5, rel: 16384, fork: 2, segment: 1 };
        let request = Request { kind: RequestKind::Fill, id, block: 7, count: 3 };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        assert_eq!(Request::decode(&[0; REQUEST_SIZE]), None);
        let reply = Reply { errno: -5, entry: 9 };
        assert_eq!(Reply::decode(&reply.encode()), reply);
    }
}
