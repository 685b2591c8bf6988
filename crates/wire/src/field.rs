//! Integers, identifiers and lists inside a message body. Little endian throughout.

use pgstrata_ids::{IdError, Lsn};

/// A body that no encoder makes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It ends too early.
    #[error("message ends inside {0}")]
    Short(&'static str),
    /// It goes on after its last field.
    #[error("message has {0} bytes too many")]
    Trailing(usize),
    /// A field has a value that it can't have.
    #[error("message has an impossible {0}")]
    Impossible(&'static str),
    /// A kind that this side doesn't know; perhaps the other one is newer.
    #[error("message kind {0} is unknown here; is the other side a newer version?")]
    Kind(u8),
}

impl From<IdError> for DecodeError {
    fn from(error: IdError) -> DecodeError {
        DecodeError::Impossible(error.expected)
    }
}

/// The fields of a body that weren't taken yet.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `count` bytes. `what` names the field in errors, here and below.
    pub fn bytes(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(DecodeError::Short(what))?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(DecodeError::Short(what))?;
        self.0 = rest;
        Ok(*taken)
    }

    /// The next `u8`.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        self.array(what).map(u8::from_le_bytes)
    }

    /// The next `u16`.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// The next `u32`.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// The next `u64`.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The next LSN.
    pub fn lsn(&mut self, what: &'static str) -> Result<Lsn, DecodeError> {
        self.u64(what).map(Lsn)
    }

    /// The next byte, which must be 0 or 1.
    pub fn bool(&mut self, what: &'static str) -> Result<bool, DecodeError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Impossible(what)),
        }
    }

    /// A list of at most `most` entries, its count before it.
    pub fn list<T>(
        &mut self,
        most: usize,
        what: &'static str,
        mut entry: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.u32(what)? as usize;
        if count > most {
            return Err(DecodeError::Impossible(what));
        }
        (0..count).map(|_| entry(self)).collect()
    }

    /// UTF-8 of at most `most` bytes, its length before it.
    pub fn text(&mut self, most: usize, what: &'static str) -> Result<String, DecodeError> {
        let length = usize::from(self.u16(what)?);
        if length > most {
            return Err(DecodeError::Impossible(what));
        }
        let bytes = self.bytes(length, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| DecodeError::Impossible(what))
    }

    /// Checks that nothing is left.
    pub fn end(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.0.len())) }
    }
}

/// Appends a list: its count, then its entries.
pub fn put_list<T>(
    out: &mut Vec<u8>,
    entries: impl ExactSizeIterator<Item = T>,
    mut entry: impl FnMut(&mut Vec<u8>, T),
) {
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for value in entries {
        entry(out, value);
    }
}

/// Appends text, cut at a character boundary to at most `most` bytes.
pub fn put_text(out: &mut Vec<u8>, text: &str, most: usize) {
    let cut = text.floor_char_boundary(most.min(usize::from(u16::MAX)));
    out.extend_from_slice(&(cut as u16).to_le_bytes());
    out.extend_from_slice(&text.as_bytes()[..cut]);
}
