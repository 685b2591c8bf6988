//! Keys of everything the page server versions: 18 bytes, ordered as they are stored.
//!
//! ```text
//! offset  size  field
//!      0     1  kind         KeyKind
//!      1     4  a            tablespace oid, or SLRU kind          (big endian)
//!      5     4  b            database oid                          (big endian)
//!      9     4  c            relation number, or high half         (big endian)
//!     13     1  d            fork
//!     14     4  e            block number, or low half             (big endian)
//! ```
//! Big endian makes byte order equal key order, so keys can be compared and prefixed as bytes.

use std::fmt;

/// A relation's fork, numbered as PostgreSQL's `ForkNumber`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Fork {
    /// The data itself.
    Main = 0,
    /// Free space map.
    FreeSpace = 1,
    /// Visibility map.
    Visibility = 2,
    /// Template of an unlogged relation.
    Init = 3,
}

impl Fork {
    /// All forks in number order.
    pub const ALL: [Fork; 4] = [Fork::Main, Fork::FreeSpace, Fork::Visibility, Fork::Init];

    /// The fork of PostgreSQL's number, if there is one.
    pub const fn from_number(number: u8) -> Option<Fork> {
        match number {
            0 => Some(Fork::Main),
            1 => Some(Fork::FreeSpace),
            2 => Some(Fork::Visibility),
            3 => Some(Fork::Init),
            _ => None,
        }
    }

    /// The suffix of the fork's file names: empty, `_fsm`, `_vm`, `_init`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Fork::Main => "",
            Fork::FreeSpace => "_fsm",
            Fork::Visibility => "_vm",
            Fork::Init => "_init",
        }
    }
}

/// One fork of one relation: what PostgreSQL calls a locator, and the fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelTag {
    /// Tablespace oid (1663 default, 1664 global).
    pub spc: u32,
    /// Database oid; 0 for shared relations.
    pub db: u32,
    /// Relation file number.
    pub rel: u32,
    /// Fork.
    pub fork: Fork,
}

impl RelTag {
    /// The same relation's other fork.
    pub const fn with_fork(self, fork: Fork) -> RelTag {
        RelTag { fork, ..self }
    }
}

impl fmt::Display for RelTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}{}", self.spc, self.db, self.rel, self.fork.suffix())
    }
}

/// The SLRUs whose pages follow from WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum SlruKind {
    /// `pg_xact`.
    Clog = 0,
    /// `pg_multixact/offsets`.
    MultiXactOffsets = 1,
    /// `pg_multixact/members`.
    MultiXactMembers = 2,
    /// `pg_commit_ts`.
    CommitTs = 3,
}

impl SlruKind {
    /// All kinds in number order.
    pub const ALL: [SlruKind; 4] = [
        SlruKind::Clog,
        SlruKind::MultiXactOffsets,
        SlruKind::MultiXactMembers,
        SlruKind::CommitTs,
    ];

    /// The directory below the data directory.
    pub const fn directory(self) -> &'static str {
        match self {
            SlruKind::Clog => "pg_xact",
            SlruKind::MultiXactOffsets => "pg_multixact/offsets",
            SlruKind::MultiXactMembers => "pg_multixact/members",
            SlruKind::CommitTs => "pg_commit_ts",
        }
    }

    /// The kind of a number stored in a key.
    pub const fn from_number(number: u8) -> Option<SlruKind> {
        match number {
            0 => Some(SlruKind::Clog),
            1 => Some(SlruKind::MultiXactOffsets),
            2 => Some(SlruKind::MultiXactMembers),
            3 => Some(SlruKind::CommitTs),
            _ => None,
        }
    }
}

/// What a key names. The numbers are stored; never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum KeyKind {
    /// One block of a relation fork.
    RelBlock = 1,
    /// The size of a relation fork, or that it is gone.
    RelSize = 2,
    /// That a (tablespace, database) directory exists, and what it was copied from.
    Database = 3,
    /// `pg_filenode.map` of a (tablespace, database).
    RelMap = 4,
    /// One page of an SLRU.
    SlruPage = 5,
    /// The first and last page of an SLRU.
    SlruExtent = 6,
    /// The state file of a prepared transaction (c, e: full transaction id).
    TwoPhase = 7,
    /// A tablespace's location.
    Tablespace = 8,
    /// Checkpoint counters and `pg_control` parameters.
    ControlState = 9,
    /// Times of commits (c, e: bucket).
    CommitTime = 10,
    /// Progress of a replication origin (c: node).
    Origin = 11,
}

impl KeyKind {
    const fn from_number(number: u8) -> Option<KeyKind> {
        match number {
            1 => Some(KeyKind::RelBlock),
            2 => Some(KeyKind::RelSize),
            3 => Some(KeyKind::Database),
            4 => Some(KeyKind::RelMap),
            5 => Some(KeyKind::SlruPage),
            6 => Some(KeyKind::SlruExtent),
            7 => Some(KeyKind::TwoPhase),
            8 => Some(KeyKind::Tablespace),
            9 => Some(KeyKind::ControlState),
            10 => Some(KeyKind::CommitTime),
            11 => Some(KeyKind::Origin),
            _ => None,
        }
    }
}

/// A key in its stored form. Ordering is byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; Key::SIZE]);

/// Bytes that are not a key of a known kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyError(pub [u8; Key::SIZE]);

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key of unknown kind {}", self.0[0])
    }
}

impl std::error::Error for KeyError {}

impl Key {
    /// Bytes of a stored key.
    pub const SIZE: usize = 18;
    /// Below every key.
    pub const MIN: Key = Key([0; Key::SIZE]);
    /// Above every key.
    pub const MAX: Key = Key([0xFF; Key::SIZE]);

    fn new(kind: KeyKind, a: u32, b: u32, c: u32, d: u8, e: u32) -> Key {
        let mut bytes = [0; Key::SIZE];
        bytes[0] = kind as u8;
        bytes[1..5].copy_from_slice(&a.to_be_bytes());
        bytes[5..9].copy_from_slice(&b.to_be_bytes());
        bytes[9..13].copy_from_slice(&c.to_be_bytes());
        bytes[13] = d;
        bytes[14..18].copy_from_slice(&e.to_be_bytes());
        Key(bytes)
    }

    /// A block of a relation fork.
    pub fn rel_block(rel: RelTag, block: u32) -> Key {
        Key::new(KeyKind::RelBlock, rel.spc, rel.db, rel.rel, rel.fork as u8, block)
    }

    /// The size of a relation fork.
    pub fn rel_size(rel: RelTag) -> Key {
        Key::new(KeyKind::RelSize, rel.spc, rel.db, rel.rel, rel.fork as u8, 0)
    }

    /// A database's directory in a tablespace.
    pub fn database(spc: u32, db: u32) -> Key {
        Key::new(KeyKind::Database, spc, db, 0, 0, 0)
    }

    /// The relation map of a database in a tablespace.
    pub fn relmap(spc: u32, db: u32) -> Key {
        Key::new(KeyKind::RelMap, spc, db, 0, 0, 0)
    }

    /// A page of an SLRU.
    pub fn slru_page(kind: SlruKind, page: u64) -> Key {
        Key::new(KeyKind::SlruPage, kind as u32, 0, (page >> 32) as u32, 0, page as u32)
    }

    /// The extent of an SLRU.
    pub fn slru_extent(kind: SlruKind) -> Key {
        Key::new(KeyKind::SlruExtent, kind as u32, 0, 0, 0, 0)
    }

    /// A prepared transaction's state.
    pub fn two_phase(full_xid: u64) -> Key {
        Key::new(KeyKind::TwoPhase, 0, 0, (full_xid >> 32) as u32, 0, full_xid as u32)
    }

    /// A tablespace.
    pub fn tablespace(oid: u32) -> Key {
        Key::new(KeyKind::Tablespace, oid, 0, 0, 0, 0)
    }

    /// The control state.
    pub fn control_state() -> Key {
        Key::new(KeyKind::ControlState, 0, 0, 0, 0, 0)
    }

    /// A bucket of commit times.
    pub fn commit_time(bucket: u64) -> Key {
        Key::new(KeyKind::CommitTime, 0, 0, (bucket >> 32) as u32, 0, bucket as u32)
    }

    /// A replication origin's progress.
    pub fn origin(node: u16) -> Key {
        Key::new(KeyKind::Origin, 0, 0, u32::from(node), 0, 0)
    }

    /// What the key names.
    pub fn kind(&self) -> Result<KeyKind, KeyError> {
        KeyKind::from_number(self.0[0]).ok_or(KeyError(self.0))
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    /// Field `a`: tablespace oid or SLRU kind.
    pub fn a(&self) -> u32 {
        self.word(1)
    }

    /// Field `b`: database oid.
    pub fn b(&self) -> u32 {
        self.word(5)
    }

    /// Field `c`: relation number or a high half.
    pub fn c(&self) -> u32 {
        self.word(9)
    }

    /// Field `e`: block number or a low half.
    pub fn e(&self) -> u32 {
        self.word(14)
    }

    /// The 64-bit number in fields `c` and `e`.
    pub fn wide(&self) -> u64 {
        u64::from(self.c()) << 32 | u64::from(self.e())
    }

    /// The relation fork of a block or size key.
    pub fn rel(&self) -> Option<RelTag> {
        match self.kind() {
            Ok(KeyKind::RelBlock | KeyKind::RelSize) => {
                let fork = Fork::from_number(self.0[13])?;
                Some(RelTag { spc: self.a(), db: self.b(), rel: self.c(), fork })
            }
            _ => None,
        }
    }

    /// The key just above this one, for exclusive bounds.
    pub fn next(&self) -> Key {
        let mut bytes = self.0;
        for byte in bytes.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                return Key(bytes);
            }
        }
        Key::MAX
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind(), self.rel()) {
            (Ok(KeyKind::RelBlock), Some(rel)) => write!(f, "block {rel}:{}", self.e()),
            (Ok(KeyKind::RelSize), Some(rel)) => write!(f, "size {rel}"),
            (Ok(kind), _) => {
                write!(f, "{kind:?} {}/{}/{}", self.a(), self.b(), self.wide())
            }
            (Err(error), _) => fmt::Display::fmt(&error, f),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_order_is_block_order() {
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main };
        assert!(Key::rel_block(rel, 255) < Key::rel_block(rel, 256));
        assert!(Key::rel_block(rel, u32::MAX) < Key::rel_block(rel.with_fork(Fork::Init), 0));
        assert_eq!(Key::rel_block(rel, 7).rel(), Some(rel));
        assert_eq!(Key::rel_block(rel, 7).e(), 7);
    }

    #[test]
    fn next_is_the_least_key_above() {
        let rel = RelTag { spc: 1, db: 2, rel: 3, fork: Fork::Main };
        assert_eq!(Key::rel_block(rel, 7).next(), Key::rel_block(rel, 8));
        assert_eq!(Key::MAX.next(), Key::MAX);
    }
}
