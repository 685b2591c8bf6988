//! One non-blocking connection: a queue of frames out, a buffer of frames in.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{AppendHead, Message, WAL, chosen, encode};

use super::backlog::Piece;
use super::network::Wire;

/// Pieces given to the system at once.
const MAX_SLICES: usize = 64;

/// Bytes given to the system for safekeepers, by all connections since the process started.
pub static SENT_BYTES: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
enum Part {
    Whole(Vec<u8>),
    Head(AppendHead),
    Payload(Bytes),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Part::Whole(bytes) => bytes,
            Part::Head(head) => &head.0,
            Part::Payload(bytes) => bytes,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Connection<W> {
    pub wire: W,
    /// What the next message says of versions: an offer, until the safekeeper chose.
    stamp: Stamp,
    queue: VecDeque<Part>,
    queued: usize,
    /// Bytes of the first part that were sent.
    sent: usize,
    /// True while room to write is waited for.
    pub blocked: bool,
    /// When something was last sent.
    pub last_sent: Instant,
    /// When something last came.
    pub last_received: Instant,
}

impl<W: Wire> Connection<W> {
    /// Over a wire that was made by now.
    pub fn new(wire: W, now: Instant) -> Connection<W> {
        Connection {
            wire,
            stamp: Stamp::First(WAL.speaks),
            queue: VecDeque::new(),
            queued: 0,
            sent: 0,
            blocked: false,
            last_sent: now,
            last_received: now,
        }
    }

    /// Bytes waiting to be sent.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Queues a message.
    pub fn push(&mut self, message: &Message<'_>) {
        let mut bytes = Vec::new();
        encode(message, self.stamp, &mut bytes);
        self.push_part(Part::Whole(bytes));
    }

    /// Queues an append; its bytes are shared, not copied.
    pub fn push_piece(&mut self, piece: &Piece) {
        let head = match self.stamp {
            Stamp::In(version) => piece.head.in_version(version),
            // Who has not greeted is sent no WAL.
            Stamp::First(_) => piece.head,
        };
        self.push_part(Part::Head(head));
        self.push_part(Part::Payload(piece.payload.clone()));
    }

    fn push_part(&mut self, part: Part) {
        self.queued += part.bytes().len();
        self.queue.push_back(part);
    }

    /// Sends what the system takes. While it takes no more, `blocked` is set.
    pub fn flush(&mut self, now: Instant) -> io::Result<()> {
        self.blocked = false;
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut count = 0;
            for (slot, part) in slices.iter_mut().zip(&self.queue) {
                let from = if count == 0 { self.sent } else { 0 };
                *slot = IoSlice::new(&part.bytes()[from..]);
                count += 1;
            }
            match self.wire.write_vectored(&slices[..count]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.last_sent = now;
                    self.advance(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // What TLS has encrypted, and the system did not take.
        match self.wire.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                Ok(())
            }
            flushed => flushed,
        }
    }

    fn advance(&mut self, written: usize) {
        SENT_BYTES.fetch_add(written as u64, Ordering::Relaxed);
        self.queued -= written;
        self.sent += written;
        while let Some(first) = self.queue.front() {
            let length = first.bytes().len();
            if self.sent < length {
                return;
            }
            self.sent -= length;
            self.queue.pop_front();
        }
    }

    /// Whether there is more to receive although the socket has nothing more: what came with what was received before.
    pub fn holds_more(&self) -> bool {
        self.wire.holds_more()
    }

    /// Receives what has come, and speaks the version of the first answer from then on. False if there is nothing more now.
    pub fn receive(&mut self, input: &mut FrameBuffer, now: Instant) -> io::Result<bool> {
        match input.fill(&mut self.wire) {
            Ok(true) => {
                self.last_received = now;
                let version = chosen(input);
                let version =
                    version.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                if let Some(version) = version {
                    self.stamp = Stamp::In(version);
                }
                Ok(true)
            }
            Ok(false) => {
                let text = match self.stamp {
                    // Of before there were versions to agree on.
                    Stamp::First(_) => {
                        "the safekeeper closed the connection without a word: if it is of an older release, upgrade the \
                         safekeeper first"
                    }
                    Stamp::In(_) => "the safekeeper closed the connection",
                };
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, text))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}
