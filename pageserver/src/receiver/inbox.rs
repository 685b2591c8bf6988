//! What has come from a safekeeper, as messages.

/// Longest message that is taken, in bytes, without its kind.
pub const MESSAGE_LIMIT: usize = 16 << 20;

/// Bytes that are held at first, which is also the most that is taken at once.
const USUAL_SIZE: usize = 256 << 10;

/// Kind and length.
const HEADER_SIZE: usize = 5;

/// A message of an impossible length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes")]
pub struct BadLength(pub usize);

/// A whole message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// What it is.
    pub kind: u8,
    /// What it says.
    pub body: &'a [u8],
}

impl Message<'_> {
    /// Bytes that it takes, with its header.
    pub fn size(&self) -> usize {
        HEADER_SIZE + self.body.len()
    }
}

/// See the module. Holds at most one message of the greatest length, or [`USUAL_SIZE`] bytes of shorter ones; it grows as bytes
/// of a long one come, not by what its header announces.
#[derive(Debug)]
pub struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Inbox {
        Inbox { bytes: vec![0; USUAL_SIZE], start: 0, end: 0 }
    }
}

impl Inbox {
    fn held(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Where bytes may be put. Empty only where it is full of a message that was not taken, or is refused.
    pub fn room(&mut self) -> &mut [u8] {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.bytes.len() - self.end < self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.bytes.len() && self.message() == Ok(None) {
            let size = (2 * self.bytes.len()).min(1 + MESSAGE_LIMIT);
            self.bytes.reserve_exact(size - self.end);
            self.bytes.resize(size, 0);
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes were put there.
    pub fn filled(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.end, "more than there was room for");
        self.end += count;
    }

    /// The first message, once it is whole; [`Inbox::consume`] its size before the next.
    pub fn message(&self) -> Result<Option<Message<'_>>, BadLength> {
        let Some((header, rest)) = self.held().split_first_chunk::<HEADER_SIZE>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if !(4..=MESSAGE_LIMIT).contains(&length) {
            return Err(BadLength(length));
        }
        Ok(rest.get(..length - 4).map(|body| Message { kind, body }))
    }

    /// Drops the first `size` bytes.
    pub fn consume(&mut self, size: usize) {
        assert!(size <= self.end - self.start, "more than there is");
        self.start += size;
    }

    /// Bytes of memory that are held.
    #[cfg(test)]
    pub fn size(&self) -> usize {
        self.bytes.capacity()
    }
}
