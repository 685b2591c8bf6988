//! Stored values of blocks: an image, or the piece of one record that this block needs.
//!
//! ```text
//! byte 0     kind (1 image, 2 piece, 3 image then piece, 4 visibility clear, 5 visibility truncate)
//!            | 0x08 complete | version - 15 << 4 | 0x40 hint bits are logged | 0x80 rebuilt from zeros
//! image      info u8, hole offset u16, hole length u16, length u16, bytes
//! piece      rmgr u8, info u8, role u8 (the block's id in the record), xid u32,
//!            n u8, n other blocks of the record {id u8, block u32},
//!            length of main data (u8, or 255 and u32), main data, the block's own data to the end
//! clear      {heap block mod 32672 u16, bits u8} to the end
//! truncate   first heap block to clear, mod 32672, u16
//! ```
//! A value is keyed by the record's end, and applied to the block's content before it; a *complete* one needs none.

use crate::error::{Bad, Step};
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::bytes::Reader;
use pgstrata_pg_wal::{BlockImage, PgVersion};

const KIND_MASK: u8 = 0x07;
const KIND_IMAGE: u8 = 1;
const KIND_PIECE: u8 = 2;
const KIND_IMAGE_THEN_PIECE: u8 = 3;
const KIND_VISIBILITY_CLEAR: u8 = 4;
const KIND_VISIBILITY_TRUNCATE: u8 = 5;
const COMPLETE: u8 = 0x08;
const VERSION_SHIFT: u32 = 4;
const HINTS_LOGGED: u8 = 0x40;
const INIT: u8 = 0x80;
const LONG_MAIN: u8 = 255;

/// True if the value gives the block whatever it held before.
pub fn is_complete(value: &[u8]) -> bool {
    value.first().is_some_and(|tag| tag & COMPLETE != 0)
}

/// What a value says about its origin, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// A full-page image.
    Image,
    /// A piece of a record.
    Piece(crate::error::RecordKind),
    /// Visibility bits cleared by a heap change that does not name the map's block.
    VisibilityClear,
    /// Visibility bits cleared by a truncation.
    VisibilityTruncate,
}

/// The piece of a record that one block needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub version: PgVersion,
    pub rmgr: u8,
    pub info: u8,
    /// Id of this block in the record.
    pub role: u8,
    pub xid: u32,
    /// The page is rebuilt from zeros.
    pub init: bool,
    /// `XLogHintBitIsNeeded` when the record was written: data checksums or `wal_log_hints`.
    pub hints_logged: bool,
    refs: &'a [u8],
    pub main: &'a [u8],
    pub data: &'a [u8],
    /// Number of this block.
    pub block: u32,
    /// End of the record.
    pub end_lsn: Lsn,
}

impl<'a> Piece<'a> {
    /// The number of another block of the record.
    pub fn other_block(&self, id: u8) -> Option<u32> {
        let found = self.refs.chunks_exact(5).find(|other| other[0] == id)?;
        Some(u32::from_le_bytes([found[1], found[2], found[3], found[4]]))
    }

    /// The number of another block that must be there.
    pub fn needed_block(&self, id: u8) -> Step<u32> {
        self.other_block(id).ok_or(Bad("the record lacks a block reference"))
    }

    /// The opcode without the flag in the highest bit.
    pub fn opcode(&self) -> u8 {
        self.info & 0x70
    }

    /// A reader of the main data.
    pub fn main_reader(&self) -> Reader<'a> {
        Reader::new(self.main)
    }

    /// A reader of the block's data.
    pub fn data_reader(&self) -> Reader<'a> {
        Reader::new(self.data)
    }
}

/// A value taken apart.
pub(crate) enum Value<'a> {
    Image(BlockImage<'a>),
    Piece(Piece<'a>),
    ImageThenPiece(BlockImage<'a>, Piece<'a>),
    VisibilityClear(&'a [u8]),
    VisibilityTruncate(u16),
}

impl<'a> Value<'a> {
    pub fn decode(bytes: &'a [u8], block: u32, end_lsn: Lsn) -> Step<Value<'a>> {
        let mut reader = Reader::new(bytes);
        let tag = reader.u8()?;
        Ok(match tag & KIND_MASK {
            KIND_IMAGE => Value::Image(decode_image(&mut reader)?),
            KIND_PIECE => Value::Piece(decode_piece(&mut reader, tag, block, end_lsn)?),
            KIND_IMAGE_THEN_PIECE => {
                let image = decode_image(&mut reader)?;
                Value::ImageThenPiece(image, decode_piece(&mut reader, tag, block, end_lsn)?)
            }
            KIND_VISIBILITY_CLEAR => Value::VisibilityClear(reader.rest()),
            KIND_VISIBILITY_TRUNCATE => Value::VisibilityTruncate(reader.u16()?),
            _ => return Err(Bad("unknown kind of value")),
        })
    }
}

/// Resource manager, info bits and main data of a piece, without taking it apart: `None` if it is another kind of value,
/// or has much main data.
#[inline]
pub(crate) fn peek(value: &[u8]) -> Option<(u8, u8, &[u8])> {
    let &[tag, rmgr, info, _, _, _, _, _, others, ..] = value else { return None };
    let (&length, main) = value.get(9 + 5 * usize::from(others)..)?.split_first()?;
    let is_piece = tag & KIND_MASK == KIND_PIECE && length != LONG_MAIN;
    is_piece.then_some((rmgr, info, main.get(..length.into())?))
}

fn decode_image<'a>(reader: &mut Reader<'a>) -> Step<BlockImage<'a>> {
    let info = reader.u8()?;
    let hole_offset = reader.u16()?;
    let hole_length = reader.u16()?;
    let length = usize::from(reader.u16()?);
    Ok(BlockImage::from_parts(info, hole_offset, hole_length, reader.take(length)?)?)
}

fn decode_piece<'a>(reader: &mut Reader<'a>, tag: u8, block: u32, end_lsn: Lsn) -> Step<Piece<'a>> {
    let version = PgVersion::ALL[usize::from(tag >> VERSION_SHIFT & 3)];
    let rmgr = reader.u8()?;
    let info = reader.u8()?;
    let role = reader.u8()?;
    let xid = reader.u32()?;
    let others = usize::from(reader.u8()?);
    let refs = reader.take(others * 5)?;
    let main_length = match reader.u8()? {
        LONG_MAIN => reader.u32()? as usize,
        short => usize::from(short),
    };
    let main = reader.take(main_length)?;
    Ok(Piece {
        version,
        rmgr,
        info,
        role,
        xid,
        init: tag & INIT != 0,
        hints_logged: tag & HINTS_LOGGED != 0,
        refs,
        main,
        data: reader.rest(),
        block,
        end_lsn,
    })
}

/// What goes into a piece, apart from the other blocks' numbers.
pub(crate) struct PieceParts<'a> {
    pub version: PgVersion,
    pub rmgr: u8,
    pub info: u8,
    pub role: u8,
    pub xid: u32,
    pub init: bool,
    pub hints_logged: bool,
    pub main: &'a [u8],
    pub data: &'a [u8],
}

/// Appends an image.
pub(crate) fn encode_image(out: &mut Vec<u8>, image: &BlockImage<'_>) {
    out.push(KIND_IMAGE | COMPLETE);
    encode_image_body(out, image);
}

fn encode_image_body(out: &mut Vec<u8>, image: &BlockImage<'_>) {
    out.push(image.info());
    out.extend_from_slice(&image.hole_offset.to_le_bytes());
    out.extend_from_slice(&image.hole_length.to_le_bytes());
    // An image is at most a page, so its length fits.
    out.extend_from_slice(&(image.bytes.len() as u16).to_le_bytes());
    out.extend_from_slice(image.bytes);
}

/// Appends a piece, after an image if there is one that the record changes further. `others` are the ids and numbers of
/// the record's other blocks.
pub(crate) fn encode_piece(
    out: &mut Vec<u8>,
    parts: &PieceParts<'_>,
    image: Option<&BlockImage<'_>>,
    others: impl Iterator<Item = (u8, u32)>,
) {
    let mut tag = (parts.version as u8) << VERSION_SHIFT;
    tag |= if image.is_some() { KIND_IMAGE_THEN_PIECE } else { KIND_PIECE };
    if parts.init || image.is_some() {
        tag |= COMPLETE;
    }
    if parts.init {
        tag |= INIT;
    }
    if parts.hints_logged {
        tag |= HINTS_LOGGED;
    }
    out.push(tag);
    if let Some(image) = image {
        encode_image_body(out, image);
    }
    out.extend_from_slice(&[parts.rmgr, parts.info, parts.role]);
    out.extend_from_slice(&parts.xid.to_le_bytes());
    let count_at = out.len();
    out.push(0);
    for (id, block) in others {
        out.push(id);
        out.extend_from_slice(&block.to_le_bytes());
        out[count_at] += 1;
    }
    if parts.main.len() < usize::from(LONG_MAIN) {
        out.push(parts.main.len() as u8);
    } else {
        out.push(LONG_MAIN);
        out.extend_from_slice(&(parts.main.len() as u32).to_le_bytes());
    }
    out.extend_from_slice(parts.main);
    out.extend_from_slice(parts.data);
}

/// Appends a clear of visibility bits: pairs of a heap block's index in the map page, and the bits.
pub(crate) fn encode_visibility_clear(out: &mut Vec<u8>, clears: &[(u16, u8)]) {
    out.push(KIND_VISIBILITY_CLEAR);
    for (index, bits) in clears {
        out.extend_from_slice(&index.to_le_bytes());
        out.push(*bits);
    }
}

/// Appends a clear of all visibility bits from one heap block's index on.
pub(crate) fn encode_visibility_truncate(out: &mut Vec<u8>, first_index: u16) {
    out.push(KIND_VISIBILITY_TRUNCATE);
    out.extend_from_slice(&first_index.to_le_bytes());
}
