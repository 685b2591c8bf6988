//! The headers of WAL pages (access/xlog_internal.h).
//!
//! ```text
//! offset  size  field
//!      0     2  magic          PgVersion
//!      2     2  info           1 first is contrecord, 2 long header, 4 backup-removable, 8 first is overwrite-contrecord
//!      4     4  tli
//!      8     8  pageaddr       position of the page itself
//!     16     4  rem_len        bytes still missing of the record that goes on here
//!     20     4  (padding)
//!     24     8  system id      first page of a segment only, as all below
//!     32     4  segment size
//!     36     4  page size
//! ```

use crate::bytes::Reader;
use crate::{PgVersion, WalErrorKind};
use pgstrata_ids::{Lsn, PAGE_SIZE};

pub(crate) const SHORT_SIZE: usize = 24;
pub(crate) const LONG_SIZE: usize = 40;
const FIRST_IS_CONTRECORD: u16 = 1;
const LONG_HEADER: u16 = 2;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 8;
const ALL_FLAGS: u16 = 0xF;

/// Bytes of the header of the page at this position: longer at a segment's start.
pub const fn page_header_size(page: Lsn, segment_size: u64) -> usize {
    if page.segment_offset(segment_size) == 0 { LONG_SIZE } else { SHORT_SIZE }
}

/// A WAL page's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// From the magic number.
    pub version: PgVersion,
    /// Timeline that wrote the page.
    pub tli: u32,
    /// Position of the page.
    pub address: Lsn,
    /// Bytes missing of the record that goes on here; `None` if the page starts with a record.
    pub continuation: Option<u32>,
    /// The page starts with an `OVERWRITE_CONTRECORD` in place of a continuation.
    pub overwrites_contrecord: bool,
    /// System identifier and segment size in bytes, in a segment's first page.
    pub segment: Option<(u64, u32)>,
}

impl PageHeader {
    /// Reads and checks the header of the page at `page`; `bytes` are at least [`page_header_size`].
    pub fn decode(bytes: &[u8], page: Lsn, segment_size: u64) -> Result<PageHeader, WalErrorKind> {
        const SHORT: WalErrorKind = WalErrorKind::Malformed("page header is cut off");
        let mut reader = Reader::new(bytes);
        let magic = reader.u16().map_err(|_| SHORT)?;
        let info = reader.u16().map_err(|_| SHORT)?;
        let tli = reader.u32().map_err(|_| SHORT)?;
        let address = Lsn(reader.u64().map_err(|_| SHORT)?);
        let remaining = reader.u32().map_err(|_| SHORT)?;
        if magic == 0 {
            return Err(WalErrorKind::ZeroPage);
        }
        let version = PgVersion::from_wal_magic(magic).ok_or(WalErrorKind::PageMagic(magic))?;
        if address < page {
            return Err(WalErrorKind::StalePage { found: address });
        }
        if address > page {
            return Err(WalErrorKind::PageAddress { found: address });
        }
        let long = info & LONG_HEADER != 0;
        let continued = info & FIRST_IS_CONTRECORD != 0;
        let overwrites_contrecord = info & FIRST_IS_OVERWRITE_CONTRECORD != 0;
        if info & !ALL_FLAGS != 0
            || long != (page_header_size(page, segment_size) == LONG_SIZE)
            || (continued && overwrites_contrecord)
        {
            return Err(WalErrorKind::PageInfo(info));
        }
        let segment = if long {
            reader.u32().map_err(|_| SHORT)?;
            let system_identifier = reader.u64().map_err(|_| SHORT)?;
            let found = reader.u32().map_err(|_| SHORT)?;
            let page_size = reader.u32().map_err(|_| SHORT)?;
            if u64::from(found) != segment_size || page_size as usize != PAGE_SIZE {
                return Err(WalErrorKind::Sizes { segment_size: found, page_size });
            }
            Some((system_identifier, found))
        } else {
            None
        };
        let continuation = continued.then_some(remaining);
        Ok(PageHeader { version, tli, address, continuation, overwrites_contrecord, segment })
    }

    /// Appends the header's bytes: 40 with `segment`, else 24.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut info = 0;
        if self.continuation.is_some() {
            info |= FIRST_IS_CONTRECORD;
        }
        if self.segment.is_some() {
            info |= LONG_HEADER;
        }
        if self.overwrites_contrecord {
            info |= FIRST_IS_OVERWRITE_CONTRECORD;
        }
        out.extend_from_slice(&self.version.wal_magic().to_le_bytes());
        out.extend_from_slice(&info.to_le_bytes());
        out.extend_from_slice(&self.tli.to_le_bytes());
        out.extend_from_slice(&self.address.0.to_le_bytes());
        out.extend_from_slice(&self.continuation.unwrap_or(0).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        if let Some((system_identifier, segment_size)) = self.segment {
            out.extend_from_slice(&system_identifier.to_le_bytes());
            out.extend_from_slice(&segment_size.to_le_bytes());
            out.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        }
    }
}
