//! Little-endian reads that cannot go out of bounds.
//!
//! PostgreSQL writes WAL in the machine's byte order; only little-endian builds are supported.

/// The input ended before the value did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncated;

impl std::fmt::Display for Truncated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("data ends too early")
    }
}

impl std::error::Error for Truncated {}

macro_rules! reads {
    ($($at:ident $next:ident $type:ty;)*) => {
        $(
            /// The integer at a byte offset.
            #[inline]
            pub fn $at(bytes: &[u8], at: usize) -> Result<$type, Truncated> {
                const SIZE: usize = size_of::<$type>();
                match bytes.get(at..).and_then(|rest| rest.first_chunk::<SIZE>()) {
                    Some(raw) => Ok(<$type>::from_le_bytes(*raw)),
                    None => Err(Truncated),
                }
            }
        )*

        impl<'a> Reader<'a> {
            $(
                /// The next integer.
                #[inline]
                pub fn $next(&mut self) -> Result<$type, Truncated> {
                    let value = $at(self.rest, 0)?;
                    self.rest = &self.rest[size_of::<$type>()..];
                    Ok(value)
                }
            )*
        }
    };
}

reads! {
    u8_at u8 u8;
    u16_at u16 u16;
    u32_at u32 u32;
    i32_at i32 i32;
    u64_at u64 u64;
    i64_at i64 i64;
}

/// Bytes read from front to back.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from their start.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// True at the end.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `length` bytes.
    #[inline]
    pub fn take(&mut self, length: usize) -> Result<&'a [u8], Truncated> {
        match self.rest.split_at_checked(length) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(Truncated),
        }
    }

    /// The next `N` bytes.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(*head)
            }
            None => Err(Truncated),
        }
    }
}
