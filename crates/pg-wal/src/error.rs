//! What can be wrong with WAL, and whether it looks like its plain end.

use pgstrata_ids::Lsn;

/// WAL that cannot be read on, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at {lsn}")]
pub struct WalError {
    /// The page or record that is wrong.
    pub lsn: Lsn,
    /// What is wrong with it.
    pub kind: WalErrorKind,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalErrorKind {
    /// A record length of zero: nothing was written here yet.
    #[error("end of WAL: record length is zero")]
    ZeroLength,
    /// A page of zeros: nothing was written here yet.
    #[error("end of WAL: page header is zero")]
    ZeroPage,
    /// A page of a recycled segment that has not been overwritten yet.
    #[error("end of WAL: page still holds older WAL of {found}")]
    StalePage {
        /// The address in the page's header.
        found: Lsn,
    },
    /// The decoder was started at a position where no record can start.
    #[error("no record can start here")]
    BadStart,
    /// A page magic of no supported version.
    #[error("page magic {0:#06X} is of no supported PostgreSQL version")]
    PageMagic(u16),
    /// The magic differs from that of the pages before.
    #[error("page magic {0:#06X} is not that of the pages before")]
    OtherVersion(u16),
    /// Unknown or contradictory flags in a page header.
    #[error("page header has invalid flags {0:#06x}")]
    PageInfo(u16),
    /// A page address later than the page's position.
    #[error("page header says it is the page at {found}")]
    PageAddress {
        /// The address in the page's header.
        found: Lsn,
    },
    /// The page's timeline is older than that of the pages before.
    #[error("page is of timeline {found}, after pages of timeline {before}")]
    TimelineWentBack {
        /// Timeline of the page.
        found: u32,
        /// Timeline of the pages before it.
        before: u32,
    },
    /// The page's timeline is a later one than the log's.
    #[error("page is of timeline {found}, but the log is of timeline {own}")]
    LaterTimeline {
        /// Timeline of the page.
        found: u32,
        /// Timeline of the log.
        own: u32,
    },
    /// The segment belongs to another cluster.
    #[error("segment belongs to the cluster with system identifier {0}")]
    SystemIdentifier(u64),
    /// The segment has another size than the decoder was told.
    #[error("segment header says {segment_size} byte segments of {page_size} byte pages")]
    Sizes {
        /// Segment size, in bytes.
        segment_size: u32,
        /// WAL page size, in bytes.
        page_size: u32,
    },
    /// A record goes on, but the next page does not say so.
    #[error("page does not continue the record begun before")]
    NotContinued,
    /// A page continues a record although none is unfinished.
    #[error("page continues a record although the one before is complete")]
    UnexpectedContinuation,
    /// A page continues a record of another length.
    #[error("page continues a record with {found} bytes left, not {expected}")]
    ContinuationLength {
        /// Bytes left of the record that is being read.
        expected: u32,
        /// Bytes left according to the page's header.
        found: u32,
    },
    /// A record length that cannot be.
    #[error("record length {0} is impossible")]
    RecordLength(u32),
    /// A record longer than this decoder accepts.
    #[error("record length {0} is above the configured limit")]
    RecordTooLong(u32),
    /// A resource manager number that no server writes.
    #[error("resource manager number {0} is invalid")]
    ResourceManager(u8),
    /// The back link does not point to the record before.
    #[error("record's previous-record link is {found}, expected {expected}")]
    PreviousLink {
        /// The record before this one.
        expected: Lsn,
        /// What the record says.
        found: Lsn,
    },
    /// The back link does not point backwards.
    #[error("record's previous-record link {0} does not point backwards")]
    LinkNotBackwards(Lsn),
    /// The record's CRC does not match its bytes.
    #[error("record checksum is wrong")]
    Checksum,
    /// A page says that it starts by abandoning a torn record, but does not.
    #[error("no matching OVERWRITE_CONTRECORD after an abandoned record")]
    OverwriteContrecord,
    /// A record whose parts contradict each other.
    #[error("malformed record: {0}")]
    Malformed(&'static str),
}

impl WalErrorKind {
    pub(crate) fn at(self, lsn: Lsn) -> WalError {
        WalError { lsn, kind: self }
    }
}

impl WalError {
    /// True where nothing has been written yet, as at the end of every healthy log.
    ///
    /// A log whose last page was written while a record was still being copied into it may end with any other error
    /// too ([`WalErrorKind::Checksum`], a missing continuation): whoever follows a log that is being written must treat
    /// every error beyond the flushed position as "not yet", whoever knows that the bytes are durable must not.
    pub fn is_end_of_wal(&self) -> bool {
        use WalErrorKind::{StalePage, ZeroLength, ZeroPage};
        matches!(self.kind, ZeroLength | ZeroPage | StalePage { .. })
    }
}
