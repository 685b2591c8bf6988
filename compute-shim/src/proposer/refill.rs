//! Reading what a lagging member misses from another safekeeper, within the same loop.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use pgstrata_ids::{Lsn, TenantId, Term, TimelineId};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::safekeeper::{Message, decode};

use super::connection::Connection;
use super::poller::Poller;

/// Size of the receive buffer, in bytes.
const RECEIVE_BUFFER: usize = 512 << 10;

/// One read from a donor for a target.
#[derive(Debug)]
pub struct Refill {
    /// Index of the member that needs the bytes.
    pub target: usize,
    pub connection: Connection,
    /// The next byte to come.
    pub at: Lsn,
    /// True while the target can't take more.
    pub paused: bool,
    input: FrameBuffer,
    wanted: (TenantId, TimelineId),
    end: Lsn,
    term: Term,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Refilled {
    /// The next bytes.
    Bytes(Lsn, Bytes),
    /// Nothing whole yet.
    Nothing,
    /// The donor has no more.
    End,
}

impl Refill {
    /// Starts to read `[at, end)` from the donor at `address`.
    pub fn start(
        target: usize,
        address: SocketAddr,
        wanted: (TenantId, TimelineId),
        range: (Lsn, Lsn),
        term: Term,
        poller: &Poller,
        token: u64,
    ) -> io::Result<Refill> {
        let connection = Connection::open(address)?;
        poller.add(&connection, token, true)?;
        let input = FrameBuffer::new(RECEIVE_BUFFER);
        let (at, end) = range;
        Ok(Refill { target, connection, at, paused: false, input, wanted, end, term })
    }

    /// Asks once the connection is made.
    pub fn writable(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        if self.connection.finish_connecting()? {
            self.connection.push(&Message::Open(self.wanted.0, self.wanted.1));
            self.connection.push(&Message::ReadWal(self.at, self.end, self.term));
        }
        self.connection.flush()?;
        poller.change(&self.connection, token, self.connection.blocked)
    }

    /// Receives once.
    pub fn receive(&mut self) -> io::Result<()> {
        self.connection.receive(&mut self.input).map(|_| ())
    }

    /// The next thing that was received whole.
    pub fn next(&mut self) -> io::Result<Refilled> {
        let invalid = |error: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidData, error.to_string())
        };
        loop {
            let frame = self.input.next().map_err(|error| invalid(&error))?;
            let Some(frame) = frame else { return Ok(Refilled::Nothing) };
            let size = frame.size;
            let refilled = match decode(frame.kind, frame.body).map_err(|error| invalid(&error))? {
                Message::Status(_) => None,
                Message::WalChunk(_, []) => Some(Refilled::End),
                Message::WalChunk(start, bytes) if start == self.at => {
                    self.at = self.at + bytes.len() as u64;
                    Some(Refilled::Bytes(start, Bytes::copy_from_slice(bytes)))
                }
                Message::Refused(reason) => return Err(io::Error::other(reason.to_string())),
                _ => return Err(invalid(&"unexpected message")),
            };
            self.input.consume(size);
            if let Some(refilled) = refilled {
                return Ok(refilled);
            }
        }
    }
}
