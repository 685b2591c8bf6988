//! Log sequence numbers: byte positions in one timeline's WAL.

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;

/// Size of a data page and of a WAL page, in bytes (stock builds only).
pub const PAGE_SIZE: usize = 8192;

/// Size of a WAL segment unless `initdb --wal-segsize` said otherwise, in bytes.
pub const SEGMENT_SIZE_DEFAULT: u64 = 16 * 1024 * 1024;

/// A byte position in the WAL. Printed as PostgreSQL prints it: `0/1A2B3C8`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// "No position": PostgreSQL's `InvalidXLogRecPtr`.
    pub const INVALID: Lsn = Lsn(0);
    /// Above every position.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// True unless this is [`Lsn::INVALID`].
    pub const fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The number of the segment that holds this byte.
    pub const fn segment_number(self, segment_size: u64) -> u64 {
        self.0 / segment_size
    }

    /// This byte's offset in its segment.
    pub const fn segment_offset(self, segment_size: u64) -> u64 {
        self.0 & (segment_size - 1)
    }

    /// The first byte of the segment that holds this byte.
    pub const fn segment_start(self, segment_size: u64) -> Lsn {
        Lsn(self.0 & !(segment_size - 1))
    }

    /// This byte's offset in its WAL page.
    pub const fn page_offset(self) -> u64 {
        self.0 & (PAGE_SIZE as u64 - 1)
    }

    /// Rounded up to 8 bytes, where records start.
    pub const fn align_up(self) -> Lsn {
        Lsn((self.0 + 7) & !7)
    }

    /// `self - other` in bytes, or 0 if `other` is later.
    pub const fn saturating_sub(self, other: Lsn) -> u64 {
        self.0.saturating_sub(other.0)
    }

    /// Later by `bytes`, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }
}

impl Add<u64> for Lsn {
    type Output = Lsn;
    fn add(self, bytes: u64) -> Lsn {
        Lsn(self.0 + bytes)
    }
}

impl Sub<Lsn> for Lsn {
    type Output = u64;
    /// Distance in bytes; `other` must not be later.
    fn sub(self, other: Lsn) -> u64 {
        debug_assert!(self >= other, "{self} is before {other}");
        self.0 - other.0
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not an LSN such as `0/1A2B3C8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LsnError(pub String);

impl fmt::Display for LsnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' is not an LSN (expected a form like 0/1A2B3C8)", self.0)
    }
}

impl std::error::Error for LsnError {}

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Lsn, LsnError> {
        let error = || LsnError(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(error)?;
        let part = |digits: &str| {
            let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            if digits.is_empty() || digits.len() > 8 || !hexadecimal {
                return Err(error());
            }
            u32::from_str_radix(digits, 16).map_err(|_| error())
        };
        Ok(Lsn(u64::from(part(high)?) << 32 | u64::from(part(low)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        for value in [0, 1, 0x1A2B3C8, u64::from(u32::MAX), 1 << 32, u64::MAX] {
            assert_eq!(Lsn(value).to_string().parse(), Ok(Lsn(value)));
        }
        assert_eq!("0/1a2b3c8".parse(), Ok(Lsn(0x1A2B3C8)));
    }

    #[test]
    fn malformed_text_is_refused() {
        for text in ["", "/", "0/", "/0", "1", "0/123456789", "0/+1", "x/1", "0/1 "] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn segment_arithmetic() {
        let lsn = Lsn(3 * SEGMENT_SIZE_DEFAULT + 8192 + 5);
        assert_eq!(lsn.segment_number(SEGMENT_SIZE_DEFAULT), 3);
        assert_eq!(lsn.segment_offset(SEGMENT_SIZE_DEFAULT), 8197);
        assert_eq!(lsn.segment_start(SEGMENT_SIZE_DEFAULT), Lsn(3 * SEGMENT_SIZE_DEFAULT));
        assert_eq!(lsn.page_offset(), 5);
        assert_eq!(lsn.align_up(), Lsn(3 * SEGMENT_SIZE_DEFAULT + 8200));
    }
}
