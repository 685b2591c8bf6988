//! Layers: immutable files of (key, LSN) -> value, sorted by key, then LSN.
//!
//! ```text
//! header, 136 bytes
//! offset  size  field
//!      0     8  magic "PGSLAYER"
//!      8     2  format version (1)
//!     10     1  kind: 1 delta, 2 image
//!     11     5  zero
//!     16    16  tenant
//!     32    16  timeline
//!     48     8  generation of the writer
//!     56     8  start LSN, exclusive (delta), or the image's LSN
//!     64     8  end LSN, inclusive
//!     72    18  least key
//!     90    18  greatest key
//!    108    24  zero
//!    132     4  CRC-32C of bytes 0..132
//!
//! blocks, each
//!      0     4  CRC-32C of the rest of the block
//!      4     1  codec: 0 plain, 1 zstd, 2 lz4
//!      5     4  length before compression
//!      9     -  entries: u8 flag (1: same key as the entry before in this block)
//!               [18 key unless flag 1], u64 LSN, u32 length, value
//!
//! index: per block: 18 first key, 8 first LSN, 8 offset, 4 length
//!
//! footer, 48 bytes
//!      0     8  offset of the index
//!      8     8  blocks
//!     16     8  entries
//!     24     4  CRC-32C of the index
//!     28     4  CRC-32C of the file before the index
//!     32     4  zero
//!     36     4  CRC-32C of bytes 0..36
//!     40     8  magic "PGSLAYER"
//! ```
//! Integers are little-endian. A delta layer holds every change with start < LSN <= end to the
//! keys in its range. Values of one (key, LSN) keep their order of insertion.

use std::cell::RefCell;

use pgstrata_ids::{Generation, Key, Lsn, TenantId, TimelineId};

use crate::FormatError;
use crate::bytes::Reader;

const MAGIC: [u8; 8] = *b"PGSLAYER";
const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_SIZE: usize = 136;
/// Bytes of the footer.
pub const FOOTER_SIZE: usize = 48;
const BLOCK_HEADER_SIZE: usize = 9;
const INDEX_ENTRY_SIZE: usize = 38;
/// Entries are packed into blocks until one has this many bytes.
const BLOCK_TARGET: usize = 16 * 1024;
/// No block may claim more: bounds what a reader allocates.
const BLOCK_LIMIT: usize = 1 << 30;
/// Nor more than its stored bytes can unpack to. A literal or match of lz4 has at most 255 bytes for each of its own; a
/// block of zstd has at least 4 bytes and gives at most 128 KiB.
const LZ4_RATIO: usize = 255;
const ZSTD_RATIO: usize = 128 * 1024 / 4;
const ZSTD_LEVEL: i32 = 3;
const WHAT: &str = "layer file";

/// What a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Every change of a range of LSNs.
    Delta,
    /// Every key of a range, as of one LSN.
    Image,
}

/// A layer's identity and extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerHeader {
    /// Delta or image.
    pub kind: LayerKind,
    /// Owner.
    pub tenant: TenantId,
    /// Owner.
    pub timeline: TimelineId,
    /// Generation of the page server that wrote it.
    pub generation: Generation,
    /// Changes after this LSN; of an image its LSN.
    pub start_lsn: Lsn,
    /// Changes up to and including this LSN.
    pub end_lsn: Lsn,
    /// Least key.
    pub min_key: Key,
    /// Greatest key.
    pub max_key: Key,
}

impl LayerHeader {
    fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = match self.kind {
            LayerKind::Delta => 1,
            LayerKind::Image => 2,
        };
        bytes[16..32].copy_from_slice(&self.tenant.0);
        bytes[32..48].copy_from_slice(&self.timeline.0);
        bytes[48..56].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.start_lsn.0.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.end_lsn.0.to_le_bytes());
        bytes[72..90].copy_from_slice(&self.min_key.0);
        bytes[90..108].copy_from_slice(&self.max_key.0);
        let crc = crc32c::crc32c(&bytes[..132]);
        bytes[132..136].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header from the first [`HEADER_SIZE`] bytes of a file.
    pub fn decode(bytes: &[u8]) -> Result<LayerHeader, FormatError> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(FormatError::Unwritten { what: WHAT });
        }
        if bytes.len() < HEADER_SIZE {
            return Err(FormatError::torn(WHAT, format!("{} bytes of header", bytes.len())));
        }
        let mut reader = Reader::new(WHAT, &bytes[..HEADER_SIZE]);
        if reader.array::<8>()? != MAGIC {
            return Err(FormatError::corrupt(WHAT, "it does not start with the layer magic"));
        }
        let version = reader.u16()?;
        if version > VERSION {
            return Err(FormatError::NewerVersion { what: WHAT, found: version, known: VERSION });
        }
        if version != VERSION {
            return Err(FormatError::corrupt(WHAT, format!("format version {version}")));
        }
        let crc = u32::from_le_bytes([bytes[132], bytes[133], bytes[134], bytes[135]]);
        if crc32c::crc32c(&bytes[..132]) != crc {
            return Err(FormatError::corrupt(WHAT, "the header's checksum does not match"));
        }
        let kind = match reader.u8()? {
            1 => LayerKind::Delta,
            2 => LayerKind::Image,
            other => return Err(FormatError::corrupt(WHAT, format!("kind {other}"))),
        };
        reader.take(5)?;
        Ok(LayerHeader {
            kind,
            tenant: TenantId(reader.array()?),
            timeline: TimelineId(reader.array()?),
            generation: Generation(reader.u64()?),
            start_lsn: Lsn(reader.u64()?),
            end_lsn: Lsn(reader.u64()?),
            min_key: reader.key()?,
            max_key: reader.key()?,
        })
    }
}

/// Where one block lies, and what it starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHandle {
    /// Key of the first entry.
    pub first_key: Key,
    /// LSN of the first entry.
    pub first_lsn: Lsn,
    /// Offset in the file.
    pub offset: u64,
    /// Stored length.
    pub length: u32,
}

/// Packs sorted entries into the bytes of a layer file.
pub struct LayerWriter {
    file: Vec<u8>,
    header: LayerHeader,
    block: Vec<u8>,
    block_first: Option<(Key, Lsn)>,
    last_key: Option<Key>,
    last: Option<(Key, Lsn)>,
    index: Vec<u8>,
    blocks: u64,
    entries: u64,
    codec: Codec,
    compressed: Vec<u8>,
}

/// How blocks are compressed: what is written while WAL comes in has to be quick, what stays has to be small.
pub enum Codec {
    /// Fast.
    Lz4,
    /// Small. The compressor is kept from block to block: making one costs more than compressing a block.
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Codec {
    /// A compressor for layers that stay; the fast one if there is no memory for that.
    pub fn small() -> Codec {
        zstd::bulk::Compressor::new(ZSTD_LEVEL).map_or(Codec::Lz4, Codec::Zstd)
    }

    /// Compresses into `to`, replacing its content. Returns the codec's number, 0 if `block` did not get smaller.
    fn compress(&mut self, block: &[u8], to: &mut Vec<u8>) -> u8 {
        let (number, length) = match self {
            Codec::Lz4 => {
                to.resize(lz4_flex::block::get_maximum_output_size(block.len()), 0);
                (2, lz4_flex::block::compress_into(block, to).ok())
            }
            Codec::Zstd(compressor) => {
                to.resize(zstd::zstd_safe::compress_bound(block.len()), 0);
                (1, compressor.compress_to_buffer(block, &mut to[..]).ok())
            }
        };
        // Neither can fail with so much room; were one to, the plain bytes are as good.
        match length {
            Some(length) if length < block.len() => {
                to.truncate(length);
                number
            }
            _ => 0,
        }
    }
}

impl LayerWriter {
    /// Starts a layer. The header's key range is set from the entries.
    pub fn new(header: LayerHeader, codec: Codec) -> LayerWriter {
        LayerWriter {
            file: vec![0; HEADER_SIZE],
            header,
            block: Vec::with_capacity(2 * BLOCK_TARGET),
            block_first: None,
            last_key: None,
            last: None,
            index: Vec::new(),
            blocks: 0,
            entries: 0,
            codec,
            compressed: Vec::new(),
        }
    }

    /// Bytes so far, before the block under construction.
    pub fn size(&self) -> usize {
        self.file.len() + self.block.len()
    }

    /// True if nothing was added.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Appends an entry; keys, and LSNs within a key, must not decrease.
    pub fn push(&mut self, key: Key, lsn: Lsn, value: &[u8]) {
        self.push_parts(key, lsn, &[value]);
    }

    /// As [`LayerWriter::push`], of a value in parts.
    pub fn push_parts(&mut self, key: Key, lsn: Lsn, value: &[&[u8]]) {
        debug_assert!(self.last.is_none_or(|last| last <= (key, lsn)), "entries out of order");
        if self.last.is_none() {
            self.header.min_key = key;
        }
        self.last = Some((key, lsn));
        self.entries += 1;
        if self.block_first.is_none() {
            self.block_first = Some((key, lsn));
        }
        if self.last_key == Some(key) {
            self.block.push(1);
        } else {
            self.block.push(0);
            self.block.extend_from_slice(&key.0);
            self.last_key = Some(key);
        }
        self.block.extend_from_slice(&lsn.0.to_le_bytes());
        let length = value.iter().map(|part| part.len()).sum::<usize>();
        self.block.extend_from_slice(&(length as u32).to_le_bytes());
        value.iter().for_each(|part| self.block.extend_from_slice(part));
        if self.block.len() >= BLOCK_TARGET {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        let Some((first_key, first_lsn)) = self.block_first.take() else { return };
        let offset = self.file.len();
        self.file.extend_from_slice(&[0; BLOCK_HEADER_SIZE]);
        let codec = self.codec.compress(&self.block, &mut self.compressed);
        let stored = if codec == 0 { &self.block } else { &self.compressed };
        self.file.extend_from_slice(stored);
        self.file[offset + 4] = codec;
        let raw_length = (self.block.len() as u32).to_le_bytes();
        self.file[offset + 5..offset + 9].copy_from_slice(&raw_length);
        let crc = crc32c::crc32c(&self.file[offset + 4..]);
        self.file[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());

        self.index.extend_from_slice(&first_key.0);
        self.index.extend_from_slice(&first_lsn.0.to_le_bytes());
        self.index.extend_from_slice(&(offset as u64).to_le_bytes());
        self.index.extend_from_slice(&((self.file.len() - offset) as u32).to_le_bytes());
        self.blocks += 1;
        self.block.clear();
        self.last_key = None;
    }

    /// Completes the file. Returns its header and bytes.
    pub fn finish(mut self) -> (LayerHeader, Vec<u8>) {
        self.end_block();
        if let Some((key, _)) = self.last {
            self.header.max_key = key;
        }
        self.file[..HEADER_SIZE].copy_from_slice(&self.header.encode());
        let mut footer = [0; FOOTER_SIZE];
        footer[0..8].copy_from_slice(&(self.file.len() as u64).to_le_bytes());
        footer[8..16].copy_from_slice(&self.blocks.to_le_bytes());
        footer[16..24].copy_from_slice(&self.entries.to_le_bytes());
        footer[24..28].copy_from_slice(&crc32c::crc32c(&self.index).to_le_bytes());
        footer[28..32].copy_from_slice(&crc32c::crc32c(&self.file).to_le_bytes());
        let crc = crc32c::crc32c(&footer[..36]);
        footer[36..40].copy_from_slice(&crc.to_le_bytes());
        footer[40..48].copy_from_slice(&MAGIC);
        self.file.extend_from_slice(&self.index);
        self.file.extend_from_slice(&footer);
        (self.header, self.file)
    }
}

/// A decoded footer: where the index lies, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Offset of the index.
    pub index_offset: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Number of entries.
    pub entries: u64,
    index_crc: u32,
    body_crc: u32,
}

impl Footer {
    /// Reads the last [`FOOTER_SIZE`] bytes of a file of `file_size` bytes.
    pub fn decode(bytes: &[u8], file_size: u64) -> Result<Footer, FormatError> {
        if bytes.len() != FOOTER_SIZE || bytes[40..48] != MAGIC {
            return Err(FormatError::torn(WHAT, "its footer is not there"));
        }
        let mut reader = Reader::new(WHAT, bytes);
        let (index_offset, blocks, entries) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (index_crc, body_crc) = (reader.u32()?, reader.u32()?);
        reader.u32()?;
        if reader.u32()? != crc32c::crc32c(&bytes[..36]) {
            return Err(FormatError::corrupt(WHAT, "the footer's checksum does not match"));
        }
        let size = blocks.checked_mul(INDEX_ENTRY_SIZE as u64);
        let rest = size.and_then(|size| size.checked_add(FOOTER_SIZE as u64));
        let end = rest.and_then(|rest| index_offset.checked_add(rest));
        if end != Some(file_size) {
            return Err(FormatError::torn(WHAT, format!("its size is {file_size}")));
        }
        Ok(Footer { index_offset, blocks, entries, index_crc, body_crc })
    }

    /// Length of the index in bytes.
    pub fn index_length(&self) -> usize {
        self.blocks as usize * INDEX_ENTRY_SIZE
    }

    /// Reads the index from its bytes.
    pub fn decode_index(&self, bytes: &[u8]) -> Result<Vec<BlockHandle>, FormatError> {
        if bytes.len() != self.index_length() || crc32c::crc32c(bytes) != self.index_crc {
            return Err(FormatError::corrupt(WHAT, "the index's checksum does not match"));
        }
        let mut reader = Reader::new(WHAT, bytes);
        let mut handles = Vec::with_capacity(self.blocks as usize);
        while !reader.is_empty() {
            handles.push(BlockHandle {
                first_key: reader.key()?,
                first_lsn: Lsn(reader.u64()?),
                offset: reader.u64()?,
                length: reader.u32()?,
            });
        }
        Ok(handles)
    }
}

/// Checks every checksum of a whole file in memory, and returns its header, footer and index.
pub fn verify(file: &[u8]) -> Result<(LayerHeader, Footer, Vec<BlockHandle>), FormatError> {
    let header = LayerHeader::decode(file)?;
    let Some(footer_start) = file.len().checked_sub(FOOTER_SIZE) else {
        return Err(FormatError::torn(WHAT, format!("{} bytes", file.len())));
    };
    let footer = Footer::decode(&file[footer_start..], file.len() as u64)?;
    let body = footer.index_offset as usize;
    let index = footer.decode_index(&file[body..footer_start])?;
    if crc32c::crc32c(&file[..body]) != footer.body_crc {
        return Err(FormatError::corrupt(WHAT, "the file's checksum does not match"));
    }
    Ok((header, footer, index))
}

thread_local! {
    /// Kept from block to block, like the compressor.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// Checks and unpacks one stored block.
pub fn decode_block(stored: &[u8]) -> Result<Vec<u8>, FormatError> {
    if stored.len() < BLOCK_HEADER_SIZE {
        return Err(FormatError::torn(WHAT, "a block ends inside its header"));
    }
    let crc = u32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]);
    if crc32c::crc32c(&stored[4..]) != crc {
        return Err(FormatError::corrupt(WHAT, "a block's checksum does not match"));
    }
    let length = u32::from_le_bytes([stored[5], stored[6], stored[7], stored[8]]) as usize;
    if length > BLOCK_LIMIT {
        return Err(FormatError::corrupt(WHAT, format!("a block of {length} bytes")));
    }
    let payload = &stored[BLOCK_HEADER_SIZE..];
    let ratio = match stored[4] {
        0 => 1,
        1 => ZSTD_RATIO,
        _ => LZ4_RATIO,
    };
    if length > payload.len().saturating_mul(ratio) {
        return Err(FormatError::corrupt(WHAT, format!("a block too short for {length} bytes")));
    }
    let broken = |error: &dyn std::fmt::Display| {
        FormatError::corrupt(WHAT, format!("a block does not unpack: {error}"))
    };
    let plain = match stored[4] {
        0 => payload.to_vec(),
        1 => DECOMPRESSOR.with_borrow_mut(|kept| {
            if kept.is_none() {
                *kept = zstd::bulk::Decompressor::new().ok();
            }
            let kept = kept.as_mut().ok_or_else(|| broken(&"no memory"))?;
            kept.decompress(payload, length).map_err(|error| broken(&error))
        })?,
        2 => lz4_flex::block::decompress(payload, length).map_err(|error| broken(&error))?,
        codec => return Err(FormatError::corrupt(WHAT, format!("a block of codec {codec}"))),
    };
    if plain.len() != length {
        return Err(FormatError::corrupt(WHAT, "a block's length does not match"));
    }
    Ok(plain)
}

/// One entry of an unpacked block; `value` is its range in the block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: Key,
    /// LSN.
    pub lsn: Lsn,
    /// Where in the block the value lies.
    pub value: std::ops::Range<usize>,
}

/// Iterates over the entries of an unpacked block.
pub struct Entries<'a> {
    block: &'a [u8],
    at: usize,
    key: Option<Key>,
}

/// The entries of an unpacked block, in order.
pub fn entries(block: &[u8]) -> Entries<'_> {
    Entries { block, at: 0, key: None }
}

impl Entries<'_> {
    fn read(&mut self) -> Result<Entry, FormatError> {
        let mut reader = Reader::new(WHAT, &self.block[self.at..]);
        let mut size = 1 + 8 + 4;
        if reader.u8()? == 0 {
            self.key = Some(reader.key()?);
            size += Key::SIZE;
        }
        let key = self.key.ok_or_else(|| FormatError::corrupt(WHAT, "a block without a key"))?;
        let lsn = Lsn(reader.u64()?);
        let length = reader.u32()? as usize;
        reader.take(length)?;
        let start = self.at + size;
        self.at = start + length;
        Ok(Entry { key, lsn, value: start..self.at })
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.block.len() {
            return None;
        }
        let entry = self.read();
        if entry.is_err() {
            self.at = self.block.len();
        }
        Some(entry)
    }
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
