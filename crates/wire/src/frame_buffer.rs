//! A reused buffer that turns a byte stream into frames.

use std::io::{self, Read};

use crate::frame::{self, Frame, FrameError, FrameHeader, HEADER_SIZE, MAX_BODY};
use crate::version::{Range, Version};

/// Received bytes that were not yet consumed.
#[derive(Debug)]
pub struct FrameBuffer {
    /// What the frames are of, once it was agreed on.
    agreed: Option<Version>,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl FrameBuffer {
    /// A buffer of `size` bytes, which is also the most that is received at once; it grows only
    /// when a longer frame comes.
    pub fn new(size: usize) -> FrameBuffer {
        let bytes = vec![0; size.max(HEADER_SIZE)];
        FrameBuffer { agreed: None, bytes, start: 0, end: 0 }
    }

    /// Reads what the stream has, at least one byte. Returns false at the end of the stream.
    pub fn fill(&mut self, stream: &mut impl Read) -> io::Result<bool> {
        self.make_room();
        loop {
            match stream.read(&mut self.bytes[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.start > 0 && self.bytes.len() - self.end < self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            self.bytes.resize(HEADER_SIZE + MAX_BODY, 0);
        }
    }

    /// Bytes that were received and not consumed yet.
    pub fn pending(&self) -> usize {
        self.end - self.start
    }

    /// The kind of the first frame, whole or not.
    pub fn kind(&self) -> Option<u8> {
        (self.start < self.end).then(|| self.bytes[self.start])
    }

    /// What the first frame says of versions, whole or not; `None` if its header isn't here yet.
    pub fn offer(&self) -> Result<Option<Range>, FrameError> {
        let Some(header) = self.bytes[self.start..self.end].first_chunk() else { return Ok(None) };
        Ok(Some(FrameHeader::decode(header)?.offer))
    }

    /// From now on all frames must be of this version.
    pub fn agree(&mut self, version: Version) {
        self.agreed = Some(version);
    }

    /// The version that was agreed on, if it was.
    pub fn agreed(&self) -> Option<Version> {
        self.agreed
    }

    /// The first whole frame, if there is one; [`FrameBuffer::consume`] it before the next.
    pub fn next(&self) -> Result<Option<Frame<'_>>, FrameError> {
        let frame = frame::split(&self.bytes[self.start..self.end])?;
        match (frame, self.agreed) {
            (Some(Frame { version, .. }), Some(agreed)) if version != agreed => {
                Err(FrameError::Version { found: version, agreed })
            }
            (frame, _) => Ok(frame),
        }
    }

    /// Drops the first `size` bytes.
    pub fn consume(&mut self, size: usize) {
        self.start += size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::frame::Stamp;

    const BUFFER_SIZE: usize = 512 << 10;

    fn header(kind: u8, version: u8, body: &[u8]) -> [u8; HEADER_SIZE] {
        let stamp = Stamp::In(Version(version));
        frame::encode_header(kind, stamp, body.len() as u32, crc32c::crc32c(body))
    }

    #[test]
    fn frames_of_another_version_than_agreed_are_refused() {
        let mut buffer = FrameBuffer::new(100);
        let stream = [header(1, 2, &[]), header(1, 3, &[])].concat();
        assert!(buffer.fill(&mut &stream[..10]).unwrap());
        assert_eq!(buffer.offer(), Ok(None));
        assert!(buffer.fill(&mut &stream[10..]).unwrap());
        assert_eq!(buffer.offer(), Ok(Range::new(2, 2)));
        assert!(buffer.next().unwrap().is_some());
        buffer.consume(HEADER_SIZE);
        assert!(buffer.next().unwrap().is_some(), "nothing was agreed on");
        buffer.agree(Version(2));
        let refused = FrameError::Version { found: Version(3), agreed: Version(2) };
        assert_eq!(buffer.next(), Err(refused));
    }

    #[test]
    fn frames_of_all_sizes_pass_in_pieces() {
        let mut stream = Vec::new();
        let bodies = [0, 1, 1000, BUFFER_SIZE, MAX_BODY, 7];
        for (kind, size) in bodies.into_iter().enumerate() {
            let body = vec![kind as u8; size];
            stream.extend_from_slice(&header(kind as u8, 2, &body));
            stream.extend_from_slice(&body);
        }
        for piece in [1000, 70_000, stream.len()] {
            let mut chunks = stream.chunks(piece);
            let mut current: &[u8] = &[];
            let mut buffer = FrameBuffer::new(BUFFER_SIZE);
            let mut seen = Vec::new();
            loop {
                if current.is_empty() {
                    current = chunks.next().unwrap_or_default();
                }
                if !buffer.fill(&mut current).unwrap() {
                    break;
                }
                while let Some(frame) = buffer.next().unwrap() {
                    seen.push((usize::from(frame.kind), frame.body.len()));
                    let size = frame.size;
                    buffer.consume(size);
                }
            }
            let expected: Vec<_> = bodies.into_iter().enumerate().collect();
            assert_eq!(seen, expected);
        }
    }
}
