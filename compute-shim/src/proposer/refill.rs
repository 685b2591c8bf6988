//! Reading what a lagging member misses from another safekeeper, within the same loop.

use std::io;
use std::time::Instant;

use bytes::Bytes;
use pgstrata_ids::{Lsn, NodeId, TenantId, Term, TimelineId};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::safekeeper::{Message, decode};

use super::connection::Connection;
use super::dialing::{Dialer, Dialing};
use super::link::DEAD_AFTER;
use super::poller::Poller;

/// Size of the receive buffer, in bytes.
const RECEIVE_BUFFER: usize = 512 << 10;

/// One read from a donor for a target.
#[derive(Debug)]
pub struct Refill {
    /// Index of the member that needs the bytes.
    pub target: usize,
    /// Who has them, and where.
    donor: (NodeId, String),
    dialing: Dialing,
    connection: Option<Connection>,
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
    /// The donor has the timeline, and is asked for the bytes: they are still to be sent.
    Opened,
    /// Nothing whole yet.
    Nothing,
    /// The donor has no more.
    End,
}

impl Refill {
    /// Reads `[at, end)` from the donor at `address`, once it is connected to.
    pub fn new(
        target: usize,
        donor: (NodeId, String),
        wanted: (TenantId, TimelineId),
        range: (Lsn, Lsn),
        term: Term,
    ) -> Refill {
        let input = FrameBuffer::new(RECEIVE_BUFFER);
        let (at, end) = range;
        let dialing = Dialing::default();
        Refill {
            target,
            donor,
            dialing,
            connection: None,
            at,
            paused: false,
            input,
            wanted,
            end,
            term,
        }
    }

    /// Connects if that isn't done, and asks then.
    pub fn connect(&mut self, dialer: &Dialer, poller: &Poller, token: u64) -> io::Result<()> {
        if self.connection.is_some() {
            return Ok(());
        }
        let (node, address) = &self.donor;
        let Some(made) = self.dialing.poll(*node, address, dialer) else { return Ok(()) };
        let mut connection = Connection::new(made?);
        poller.add(&connection, token, true)?;
        // What is wanted is said in the version that the donor's answer names.
        connection.push(&Message::Open(self.wanted.0, self.wanted.1));
        self.connection = Some(connection);
        Ok(())
    }

    /// Sends what is queued.
    pub fn writable(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        connection.flush()?;
        poller.change(&*connection, token, connection.blocked)
    }

    /// Receives once. False if there is nothing more now.
    pub fn receive(&mut self) -> io::Result<bool> {
        let Some(connection) = &mut self.connection else { return Ok(false) };
        connection.receive(&mut self.input)
    }

    /// An error if the donor has said nothing for long, although something is wanted of it: it may be gone without a word,
    /// and another one has the bytes. Until it is connected to, that has an end of its own.
    pub fn check_alive(&self, now: Instant) -> io::Result<()> {
        let Some(connection) = self.connection.as_ref().filter(|_| !self.paused) else {
            return Ok(());
        };
        let silent = now.saturating_duration_since(connection.last_received);
        if silent <= DEAD_AFTER {
            return Ok(());
        }
        let text = format!("safekeeper {} said nothing for {} s", self.donor.0, silent.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    }

    /// Whether the target may get more.
    pub fn set_paused(&mut self, paused: bool, poller: &Poller, token: u64) -> io::Result<()> {
        self.paused = paused;
        if let Some(connection) = &mut self.connection {
            // Nothing was wanted of it meanwhile, or nothing is from now on.
            connection.last_received = Instant::now();
        }
        match &self.connection {
            None => Ok(()),
            Some(connection) if paused => poller.pause(connection, token),
            Some(connection) => poller.change(connection, token, connection.blocked),
        }
    }

    /// Whether there may be more to receive although the socket has nothing more.
    pub fn holds_more(&self) -> bool {
        self.connection.as_ref().is_some_and(Connection::holds_more)
    }

    /// The next thing that was received whole.
    pub fn next(&mut self) -> io::Result<Refilled> {
        let invalid = |error: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidData, error.to_string())
        };
        let frame = self.input.next().map_err(|error| invalid(&error))?;
        let Some(frame) = frame else { return Ok(Refilled::Nothing) };
        let size = frame.size;
        let refilled = match decode(frame.kind, frame.body).map_err(|error| invalid(&error))? {
            Message::Status(_) => {
                if let Some(connection) = &mut self.connection {
                    connection.push(&Message::ReadWal(self.at, self.end, self.term));
                }
                Refilled::Opened
            }
            Message::WalChunk(_, []) => Refilled::End,
            Message::WalChunk(start, bytes) if start == self.at => {
                self.at = self.at + bytes.len() as u64;
                Refilled::Bytes(start, Bytes::copy_from_slice(bytes))
            }
            Message::Refused(reason) => return Err(io::Error::other(reason.to_string())),
            _ => return Err(invalid(&"unexpected message")),
        };
        self.input.consume(size);
        Ok(refilled)
    }
}
