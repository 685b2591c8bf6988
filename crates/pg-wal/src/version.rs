//! The supported major versions of PostgreSQL and the numbers by which they are recognised.

use std::fmt;

/// A major version of PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PgVersion {
    /// PostgreSQL 15.
    V15,
    /// PostgreSQL 16.
    V16,
    /// PostgreSQL 17.
    V17,
    /// PostgreSQL 18.
    V18,
}

use PgVersion::{V15, V16, V17, V18};

impl PgVersion {
    /// All supported versions, oldest first.
    pub const ALL: [PgVersion; 4] = [V15, V16, V17, V18];

    /// The version of a major number such as 15.
    pub const fn from_major(major: u32) -> Option<PgVersion> {
        match major {
            15 => Some(V15),
            16 => Some(V16),
            17 => Some(V17),
            18 => Some(V18),
            _ => None,
        }
    }

    /// The major number.
    pub const fn major(self) -> u32 {
        match self {
            V15 => 15,
            V16 => 16,
            V17 => 17,
            V18 => 18,
        }
    }

    /// The magic number of WAL pages (`XLOG_PAGE_MAGIC`, access/xlog_internal.h).
    pub const fn wal_magic(self) -> u16 {
        match self {
            V15 => 0xD110,
            V16 => 0xD113,
            V17 => 0xD116,
            V18 => 0xD118,
        }
    }

    /// The version whose WAL pages have this magic number.
    pub const fn from_wal_magic(magic: u16) -> Option<PgVersion> {
        match magic {
            0xD110 => Some(V15),
            0xD113 => Some(V16),
            0xD116 => Some(V17),
            0xD118 => Some(V18),
            _ => None,
        }
    }

    /// `PG_CONTROL_VERSION` (catalog/pg_control.h).
    pub const fn control_version(self) -> u32 {
        match self {
            V15 | V16 => 1300,
            V17 => 1700,
            V18 => 1800,
        }
    }

    /// `CATALOG_VERSION_NO` (catalog/catversion.h). Unlike the control version it differs in every major version.
    pub const fn catalog_version(self) -> u32 {
        match self {
            V15 => 202_209_061,
            V16 => 202_307_071,
            V17 => 202_406_281,
            V18 => 202_506_291,
        }
    }

    /// The version with this catalog version.
    pub fn from_catalog_version(catalog_version: u32) -> Option<PgVersion> {
        PgVersion::ALL.into_iter().find(|version| version.catalog_version() == catalog_version)
    }

    /// Bytes of `pg_filenode.map` (utils/cache/relmapper.c).
    pub const fn relmap_size(self) -> usize {
        match self {
            V15 => 512,
            V16 | V17 | V18 => 524,
        }
    }

    /// Where the CRC lies in `pg_filenode.map`.
    pub const fn relmap_crc_offset(self) -> usize {
        match self {
            V15 => 504,
            V16 | V17 | V18 => 520,
        }
    }

    /// Bytes of an SLRU page number in a WAL record.
    pub const fn slru_page_number_size(self) -> usize {
        match self {
            V15 | V16 => 4,
            V17 | V18 => 8,
        }
    }

    /// Where the CRC lies in `pg_control`.
    pub const fn control_crc_offset(self) -> usize {
        match self {
            V15 | V16 | V17 => 288,
            V18 => 292,
        }
    }
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.major())
    }
}
