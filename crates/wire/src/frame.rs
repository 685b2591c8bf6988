//! The frame around every message between safekeepers, proposers and each other.
//!
//! ```text
//! offset  size  field
//!      0     1  kind
//!      1     1  version of the protocol that the body is of
//!      2     1  in a client's first frame, whose version is the lowest that it speaks: the highest; else 0
//!      3     1  reserved, 0
//!      4     4  length of the body in bytes, at most MAX_BODY
//!      8     4  CRC-32C of the body
//!     12     4  CRC-32C of bytes 0..12
//!     16        body
//! ```
//! Little endian. The header's own checksum means that a wrong length is never believed. The header is the same in all
//! versions, so that any two can find out that they have none in common ([`crate::version`]).

use crate::version::{Range, Version};

/// Size of the header in bytes.
pub const HEADER_SIZE: usize = 16;

/// Longest body in bytes.
pub const MAX_BODY: usize = 2 << 20;

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header's checksum is wrong.
    #[error("frame header is damaged or not of this protocol")]
    Header,
    /// Another version of the protocol than the one that was agreed on.
    #[error("frame is of version {found} of the protocol, and version {agreed} was agreed on")]
    Version {
        /// The frame's.
        found: Version,
        /// What both sides had agreed on.
        agreed: Version,
    },
    /// What it says of versions means nothing.
    #[error("frame offers versions {0} to {1} of the protocol, which is no range")]
    Offer(u8, u8),
    /// The body would be longer than [`MAX_BODY`].
    #[error("frame body of {0} bytes is over the limit of {MAX_BODY}")]
    TooLong(u32),
    /// The body's checksum is wrong.
    #[error("frame body is damaged")]
    Body,
}

/// A header that was read and verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Kind of the message.
    pub kind: u8,
    /// Version of the protocol.
    pub version: Version,
    /// What a client offers, if this is its first frame.
    pub offer: Range,
    /// Length of the body in bytes.
    pub body_size: usize,
    body_crc: u32,
}

impl FrameHeader {
    /// Reads a header; the body isn't needed yet.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<FrameHeader, FrameError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if crc32c::crc32c(&bytes[..12]) != word(12) {
            return Err(FrameError::Header);
        }
        let offer = Range::offered(bytes[1], bytes[2]);
        let offer = offer.ok_or(FrameError::Offer(bytes[1], bytes[2]))?;
        let length = word(4);
        if length as usize > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        Ok(FrameHeader {
            kind: bytes[0],
            version: offer.lowest(),
            offer,
            body_size: length as usize,
            body_crc: word(8),
        })
    }

    /// Checks the body against its checksum.
    pub fn verify(&self, body: &[u8]) -> Result<(), FrameError> {
        if crc32c::crc32c(body) == self.body_crc { Ok(()) } else { Err(FrameError::Body) }
    }
}

/// What a frame says of versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamp {
    /// A client's first: it is of the lowest version, and offers all.
    First(Range),
    /// Any other: it is of the version that was agreed on.
    In(Version),
}

impl Stamp {
    /// Writes it into a header, and seals that.
    fn put(self, header: &mut [u8; HEADER_SIZE]) {
        (header[1], header[2]) = match self {
            Stamp::First(range) => (range.lowest().0, range.highest().0),
            Stamp::In(version) => (version.0, 0),
        };
        let crc = crc32c::crc32c(&header[..12]);
        header[12..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The header for a body of `length` bytes with the checksum `body_crc`.
pub fn encode_header(kind: u8, stamp: Stamp, length: u32, body_crc: u32) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    header[0] = kind;
    header[4..8].copy_from_slice(&length.to_le_bytes());
    header[8..12].copy_from_slice(&body_crc.to_le_bytes());
    stamp.put(&mut header);
    header
}

/// Appends a frame to `out`, whose body `body` appends.
pub(crate) fn put_frame(
    kind: u8,
    stamp: Stamp,
    out: &mut Vec<u8>,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let at = out.len();
    out.extend_from_slice(&[0; HEADER_SIZE]);
    body(out);
    let body = &out[at + HEADER_SIZE..];
    let header = encode_header(kind, stamp, body.len() as u32, crc32c::crc32c(body));
    out[at..at + HEADER_SIZE].copy_from_slice(&header);
}

/// The same header for another version.
pub fn restamp(mut header: [u8; HEADER_SIZE], version: Version) -> [u8; HEADER_SIZE] {
    Stamp::In(version).put(&mut header);
    header
}

/// The first frame of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Kind of the message.
    pub kind: u8,
    /// Version of the protocol that it is of.
    pub version: Version,
    /// The body, verified.
    pub body: &'a [u8],
    /// Size of header and body together, in bytes.
    pub size: usize,
}

/// The first frame of `buffer`; `None` if more bytes are needed.
pub fn split(buffer: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let Some(header) = buffer.first_chunk() else { return Ok(None) };
    let header = FrameHeader::decode(header)?;
    let size = HEADER_SIZE + header.body_size;
    let Some(body) = buffer.get(HEADER_SIZE..size) else { return Ok(None) };
    header.verify(body)?;
    Ok(Some(Frame { kind: header.kind, version: header.version, body, size }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TWO: Version = Version(2);

    fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
        stamped(kind, Stamp::In(TWO), body)
    }

    fn stamped(kind: u8, stamp: Stamp, body: &[u8]) -> Vec<u8> {
        let header = encode_header(kind, stamp, body.len() as u32, crc32c::crc32c(body));
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(
            frame(5, b"wal"),
            [5, 2, 0, 0, 3, 0, 0, 0, 151, 32, 172, 253, 82, 140, 141, 119, b'w', b'a', b'l']
        );
    }

    #[test]
    fn each_damage_is_named() {
        let good = frame(5, b"wal");
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            split(&bytes).map(|frame| frame.map(|frame| frame.kind))
        };
        assert_eq!(with(4, 9), Err(FrameError::Header));
        assert_eq!(with(17, b'x'), Err(FrameError::Body));
        let long = encode_header(5, Stamp::In(TWO), MAX_BODY as u32 + 1, 0);
        assert_eq!(split(&long), Err(FrameError::TooLong(MAX_BODY as u32 + 1)));
        for (version, highest) in [(0, 0), (0, 2), (3, 2)] {
            let mut header = encode_header(5, Stamp::In(TWO), 0, 0);
            (header[1], header[2]) = (version, highest);
            let crc = crc32c::crc32c(&header[..12]);
            header[12..].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(split(&header), Err(FrameError::Offer(version, highest)));
        }
    }

    #[test]
    fn a_first_frame_differs_by_its_offer_only() {
        let offer = Range::new(2, 4).unwrap();
        let first = stamped(5, Stamp::First(offer), b"wal");
        let header = FrameHeader::decode(first.first_chunk().unwrap()).unwrap();
        assert_eq!((header.version, header.offer), (TWO, offer));
        // What a server of version 2 looked at before there were ranges.
        let later = frame(5, b"wal");
        assert_eq!((&first[..2], first[3], &first[4..12]), (&later[..2], 0, &later[4..12]));
        let alone = FrameHeader::decode(later.first_chunk().unwrap()).unwrap();
        assert_eq!(alone.offer, Range::new(2, 2).unwrap());
        let again = restamp(*first.first_chunk().unwrap(), TWO);
        assert_eq!(again, later[..HEADER_SIZE]);
    }

    proptest! {
        #[test]
        fn any_cut_needs_more(kind: u8, body in prop::collection::vec(any::<u8>(), 0..100)) {
            let bytes = frame(kind, &body);
            for end in 0..bytes.len() {
                prop_assert_eq!(split(&bytes[..end]), Ok(None));
            }
            let whole = Frame { kind, version: TWO, body: &body, size: bytes.len() };
            prop_assert_eq!(split(&bytes), Ok(Some(whole)));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = split(&bytes);
        }
    }
}
