//! One record's parts (access/xlogrecord.h, `DecodeXLogRecord` in access/transam/xlogreader.c).
//!
//! ```text
//! offset  size  field
//!      0     4  total length, without padding
//!      4     4  xid
//!      8     8  start of the previous record
//!     16     1  info            high half: opcode; 1 special relation update, 2 consistency images
//!     17     1  resource manager
//!     18     2  (padding)
//!     20     4  CRC-32C of bytes 24.., then of bytes 0..20
//! ```
//! Then fragment headers, each with an id: 0..32 block reference, 252 top-level xid, 253 origin, 254 main data with a
//! long length, 255 with a short one (always last). Then the fragments: per block its image and its data, then main data.

use crate::bytes::{Reader, Truncated};
use crate::decoder::Record;
use crate::error::{WalError, WalErrorKind};
use crate::image::{BlockImage, ImageHeader};
use pgstrata_ids::{Fork, Lsn, RelTag};
use smallvec::SmallVec;

pub(crate) const HEADER_SIZE: usize = 24;
pub(crate) const RMGR_XLOG: u8 = 0;
const RMGR_LAST_BUILT_IN: u8 = 21;
const RMGR_FIRST_CUSTOM: u8 = 128;

const ID_BLOCK_LAST: u8 = 32;
const ID_TOP_LEVEL_XID: u8 = 252;
const ID_ORIGIN: u8 = 253;
const ID_DATA_LONG: u8 = 254;
const ID_DATA_SHORT: u8 = 255;

const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;

pub(crate) fn is_valid_rmgr(rmgr: u8) -> bool {
    rmgr <= RMGR_LAST_BUILT_IN || rmgr >= RMGR_FIRST_CUSTOM
}

/// The fixed first bytes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Length of the whole record, in bytes.
    pub total_length: u32,
    /// Transaction, or 0.
    pub xid: u32,
    /// Start of the previous record.
    pub prev: Lsn,
    /// All eight info bits.
    pub info: u8,
    /// Resource manager.
    pub rmgr: u8,
}

impl RecordHeader {
    /// The info bits that belong to the resource manager.
    pub fn opcode(&self) -> u8 {
        self.info & 0xF0
    }
}

/// A block that a record refers to.
#[derive(Clone, Copy, Debug)]
pub struct BlockRef<'a> {
    /// The reference's number, which gives its role. Numbers may have gaps.
    pub id: u8,
    /// Relation and fork.
    pub rel: RelTag,
    /// Block number in the fork.
    pub block: u32,
    /// The page is rebuilt from zeros.
    pub will_init: bool,
    /// Full-page image, if any.
    pub image: Option<BlockImage<'a>>,
    /// Data registered for this block; empty if none.
    pub data: &'a [u8],
}

impl BlockRef<'_> {
    /// True if the image replaces the page, rather than being there for comparison only.
    pub fn has_applied_image(&self) -> bool {
        self.image.is_some_and(|image| image.is_applied())
    }
}

/// A record taken apart. Slices refer to the record's bytes.
#[derive(Clone, Debug)]
pub struct DecodedRecord<'a> {
    /// Where the record starts.
    pub lsn: Lsn,
    /// Where it ends: what redo writes into pages.
    pub end: Lsn,
    /// Fixed fields.
    pub header: RecordHeader,
    /// Block references, in ascending order of their ids.
    pub blocks: SmallVec<[BlockRef<'a>; 4]>,
    /// What belongs to no block.
    pub main_data: &'a [u8],
    /// Replication origin.
    pub origin: Option<u16>,
    /// Top-level transaction of `header.xid` (with `wal_level=logical`).
    pub top_level_xid: Option<u32>,
}

impl<'a> DecodedRecord<'a> {
    /// Takes a record apart.
    #[inline]
    pub fn decode(record: Record<'a>) -> Result<DecodedRecord<'a>, WalError> {
        // Filled where it lies: it is too large to be moved about for every record.
        let mut decoded = DecodedRecord {
            lsn: record.lsn,
            end: record.end,
            header: RecordHeader { total_length: 0, xid: 0, prev: Lsn::INVALID, info: 0, rmgr: 0 },
            blocks: SmallVec::new(),
            main_data: &[],
            origin: None,
            top_level_xid: None,
        };
        match decoded.fill(record.bytes) {
            Ok(()) => Ok(decoded),
            Err(malformed) => Err(WalErrorKind::Malformed(malformed.0).at(record.lsn)),
        }
    }

    fn fill(&mut self, bytes: &'a [u8]) -> Result<(), Malformed> {
        let mut reader = Reader::new(bytes);
        self.header = decode_header(&mut reader)?;
        if self.header.total_length as usize != bytes.len() {
            return Err(Malformed("length field differs from the record's length"));
        }
        let mut main_length = 0;
        // Payload follows the headers; when all that is left is payload, the headers are over.
        let mut payload = 0;
        while reader.rest().len() > payload {
            match reader.u8()? {
                ID_DATA_SHORT => {
                    main_length = usize::from(reader.u8()?);
                    payload += main_length;
                    break;
                }
                ID_DATA_LONG => {
                    main_length = reader.u32()? as usize;
                    payload = payload.checked_add(main_length).ok_or(Truncated)?;
                    break;
                }
                ID_ORIGIN => self.origin = Some(reader.u16()?),
                ID_TOP_LEVEL_XID => self.top_level_xid = Some(reader.u32()?),
                id if id <= ID_BLOCK_LAST => {
                    let before = self.blocks.last();
                    if before.is_some_and(|before| before.id >= id) {
                        return Err(Malformed("block references are out of order"));
                    }
                    let before = before.map(|before| before.rel);
                    let block = decode_block_header(&mut reader, id, before, bytes)?;
                    payload += block.data.len() + block.image.map_or(0, |image| image.bytes.len());
                    self.blocks.push(block);
                }
                _ => return Err(Malformed("unknown fragment id")),
            }
        }
        if reader.rest().len() != payload {
            return Err(Malformed("fragment lengths do not add up to the record's length"));
        }
        for block in &mut self.blocks {
            if let Some(image) = &mut block.image {
                image.bytes = reader.take(image.bytes.len())?;
            }
            block.data = reader.take(block.data.len())?;
        }
        self.main_data = reader.take(main_length)?;
        Ok(())
    }

    /// The block reference with this id.
    #[inline]
    pub fn block(&self, id: u8) -> Option<&BlockRef<'a>> {
        self.blocks.iter().find(|block| block.id == id)
    }

    /// Bytes of all full-page images.
    pub fn images_length(&self) -> usize {
        self.blocks.iter().filter_map(|block| block.image).map(|image| image.bytes.len()).sum()
    }
}

pub(crate) struct Malformed(pub &'static str);

impl From<Truncated> for Malformed {
    fn from(_: Truncated) -> Malformed {
        Malformed("a fragment header or fragment is cut off")
    }
}

fn decode_header(reader: &mut Reader<'_>) -> Result<RecordHeader, Truncated> {
    let total_length = reader.u32()?;
    let xid = reader.u32()?;
    let prev = Lsn(reader.u64()?);
    let info = reader.u8()?;
    let rmgr = reader.u8()?;
    reader.take(6)?;
    Ok(RecordHeader { total_length, xid, prev, info, rmgr })
}

/// A block reference whose image and data have their lengths, but do not lie where they should: that is known when all
/// headers are read. Until then they are the first bytes of `record`.
fn decode_block_header<'a>(
    reader: &mut Reader<'a>,
    id: u8,
    before: Option<RelTag>,
    record: &'a [u8],
) -> Result<BlockRef<'a>, Malformed> {
    let some = |length: usize| record.get(..length).ok_or(Truncated);
    let flags = reader.u8()?;
    let fork = Fork::from_number(flags & FORK_MASK).ok_or(Malformed("unknown fork"))?;
    let data = some(usize::from(reader.u16()?))?;
    if (flags & HAS_DATA != 0) == data.is_empty() {
        return Err(Malformed("a block's data flag contradicts its data length"));
    }
    let mut image = None;
    if flags & HAS_IMAGE != 0 {
        let header = ImageHeader::decode(reader)?;
        image = Some(header.with_bytes(some(header.length)?));
    }
    let rel = if flags & SAME_REL != 0 {
        before.ok_or(Malformed("first block refers to the relation before it"))?.with_fork(fork)
    } else {
        RelTag { spc: reader.u32()?, db: reader.u32()?, rel: reader.u32()?, fork }
    };
    let block = reader.u32()?;
    Ok(BlockRef { id, rel, block, will_init: flags & WILL_INIT != 0, image, data })
}
