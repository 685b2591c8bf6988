//! Full-page images in records, and how a page is restored from one.
//!
//! The writer leaves out the hole between a standard page's line pointers and tuples, and may compress the rest. The
//! restored page has zeros in the hole, where the writer's page may hold stale bytes.

use crate::bytes::Reader;
use crate::pglz;
use crate::record::Malformed;
use pgstrata_ids::PAGE_SIZE;

const HAS_HOLE: u8 = 1;
const APPLY: u8 = 2;
const PGLZ: u8 = 4;
const LZ4: u8 = 8;
const ZSTD: u8 = 16;
const COMPRESSED: u8 = PGLZ | LZ4 | ZSTD;

/// How an image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// PostgreSQL's own.
    Pglz,
    /// One LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
}

/// A full-page image as it lies in a record.
#[derive(Clone, Copy, Debug)]
pub struct BlockImage<'a> {
    /// The page without its hole, possibly compressed.
    pub bytes: &'a [u8],
    /// Where the hole starts; 0 if there is none.
    pub hole_offset: u16,
    /// Bytes of the hole.
    pub hole_length: u16,
    info: u8,
}

/// An image that does not give a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("full-page image cannot be restored: {0}")]
pub struct ImageError(pub &'static str);

#[derive(Clone, Copy)]
pub(crate) struct ImageHeader {
    pub length: usize,
    hole_offset: u16,
    hole_length: u16,
    info: u8,
}

impl ImageHeader {
    pub fn decode(reader: &mut Reader<'_>) -> Result<ImageHeader, Malformed> {
        let length = reader.u16()?;
        let hole_offset = reader.u16()?;
        let info = reader.u8()?;
        let has_hole = info & HAS_HOLE != 0;
        let compressed = info & COMPRESSED != 0;
        if (info & COMPRESSED).count_ones() > 1 || info & !(COMPRESSED | HAS_HOLE | APPLY) != 0 {
            return Err(Malformed("an image has unknown flags"));
        }
        let page = PAGE_SIZE as u16;
        let hole_length = match (has_hole, compressed) {
            (true, true) => reader.u16()?,
            (true, false) => page.saturating_sub(length),
            (false, _) => 0,
        };
        let consistent = if has_hole {
            hole_offset != 0
                && hole_length != 0
                && length != page
                && u32::from(hole_offset) + u32::from(hole_length) <= u32::from(page)
        } else {
            hole_offset == 0 && (compressed || length == page)
        };
        if !consistent || length > page || (compressed && length == page) {
            return Err(Malformed("an image's hole and length contradict each other"));
        }
        Ok(ImageHeader { length: usize::from(length), hole_offset, hole_length, info })
    }

    pub fn with_bytes(self, bytes: &[u8]) -> BlockImage<'_> {
        BlockImage {
            bytes,
            hole_offset: self.hole_offset,
            hole_length: self.hole_length,
            info: self.info,
        }
    }
}

impl<'a> BlockImage<'a> {
    /// An image from the parts in which it was stored: the fields, [`BlockImage::info`], and the bytes.
    pub fn from_parts(
        info: u8,
        hole_offset: u16,
        hole_length: u16,
        bytes: &'a [u8],
    ) -> Result<BlockImage<'a>, ImageError> {
        if usize::from(hole_offset) + usize::from(hole_length) > PAGE_SIZE {
            return Err(ImageError("its hole is not in the page"));
        }
        Ok(BlockImage { bytes, hole_offset, hole_length, info })
    }

    /// Flags as in the record: 1 has a hole, 2 applied, 4 pglz, 8 lz4, 16 zstd.
    pub fn info(&self) -> u8 {
        self.info
    }

    /// True if redo puts the image in place of the page; false if it is there for `wal_consistency_checking` only.
    pub fn is_applied(&self) -> bool {
        self.info & APPLY != 0
    }

    /// How the bytes are compressed.
    pub fn compression(&self) -> Option<Compression> {
        match self.info & COMPRESSED {
            PGLZ => Some(Compression::Pglz),
            LZ4 => Some(Compression::Lz4),
            ZSTD => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// Bytes of the page without its hole.
    pub fn content_length(&self) -> usize {
        PAGE_SIZE - usize::from(self.hole_length)
    }

    /// Writes the page without its hole to `out`, which is [`BlockImage::content_length`] bytes.
    pub fn decompress(&self, out: &mut [u8]) -> Result<(), ImageError> {
        match self.compression() {
            None if self.bytes.len() == out.len() => out.copy_from_slice(self.bytes),
            None => return Err(ImageError("its length is wrong")),
            Some(Compression::Pglz) => {
                pglz::decompress(self.bytes, out)
                    .map_err(|_| ImageError("pglz data is corrupt"))?;
            }
            Some(Compression::Lz4) => match lz4_flex::block::decompress_into(self.bytes, out) {
                Ok(length) if length == out.len() => {}
                _ => return Err(ImageError("lz4 data is corrupt")),
            },
            Some(Compression::Zstd) => match zstd::bulk::decompress_to_buffer(self.bytes, out) {
                Ok(length) if length == out.len() => {}
                _ => return Err(ImageError("zstd data is corrupt")),
            },
        }
        Ok(())
    }

    /// Restores the page, with zeros in the hole.
    pub fn restore(&self, page: &mut [u8; PAGE_SIZE]) -> Result<(), ImageError> {
        let content = self.content_length();
        self.decompress(&mut page[..content])?;
        let start = usize::from(self.hole_offset);
        let end = start + usize::from(self.hole_length);
        page.copy_within(start..content, end);
        page[start..end].fill(0);
        Ok(())
    }
}
