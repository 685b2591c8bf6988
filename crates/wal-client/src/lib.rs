//! A blocking client of one safekeeper's WAL port, for reading.
//!
//! Used by proposers before they run and by safekeepers that catch up from each other.

use std::io::{self, Write};
use std::time::Duration;

use pgstrata_dial::dial_to;
use pgstrata_identity::{Identity, Stream, Whom};
use pgstrata_ids::{Lsn, NodeId, TenantId, Term, TimelineId};
use pgstrata_quorum::{Ack, Append, Elected, Vote, VoteRequest};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{
    Greeting, GreetingReply, Message, RefusedReason, Status, WAL, chosen, decode, encode,
};

/// Size of the receive buffer, in bytes.
const RECEIVE_BUFFER: usize = 512 << 10;

/// Why a safekeeper refused what was asked of it, if it is that what went wrong.
pub fn refusal_of(error: &io::Error) -> Option<&RefusedReason> {
    error.get_ref()?.downcast_ref()
}

/// One connection.
#[derive(Debug)]
pub struct SafekeeperClient {
    stream: Stream,
    /// What the next message says of versions.
    stamp: Stamp,
    input: FrameBuffer,
}

fn invalid(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

impl SafekeeperClient {
    /// Connects to the WAL port at `address`, `host:port`; `timeout` also bounds each later wait. With an identity to show
    /// it makes sure that this is the safekeeper of that id, or any.
    pub fn connect(
        address: &str,
        node: Option<NodeId>,
        identity: Option<&Identity>,
        timeout: Duration,
    ) -> io::Result<SafekeeperClient> {
        let stream = dial_to(address, Whom::Safekeeper(node), identity, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let stamp = Stamp::First(WAL.speaks);
        Ok(SafekeeperClient { stream, stamp, input: FrameBuffer::new(RECEIVE_BUFFER) })
    }

    fn send(&mut self, message: &Message<'_>) -> io::Result<()> {
        let mut bytes = Vec::new();
        encode(message, self.stamp, &mut bytes);
        self.stream.write_all(&bytes)
    }

    /// Waits for one message and lets `take` look at it.
    fn receive<T>(&mut self, take: impl FnOnce(Message<'_>) -> io::Result<T>) -> io::Result<T> {
        while self.input.next().map_err(invalid)?.is_none() {
            if !self.input.fill(&mut self.stream)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(version) = chosen(&mut self.input).map_err(invalid)? {
                self.stamp = Stamp::In(version);
            }
        }
        let Some(frame) = self.input.next().map_err(invalid)? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let size = frame.size;
        let taken = match decode(frame.kind, frame.body).map_err(invalid)? {
            Message::Refused(reason) => Err(io::Error::other(reason)),
            message => take(message),
        };
        self.input.consume(size);
        taken
    }

    /// Introduces itself as a proposer.
    pub fn greet(&mut self, greeting: &Greeting) -> io::Result<GreetingReply> {
        self.send(&Message::Greeting(greeting.clone()))?;
        self.receive(|message| match message {
            Message::GreetingReply(reply) => Ok(reply),
            _ => Err(invalid("expected an answer to a greeting")),
        })
    }

    /// Asks for a vote, after a greeting.
    pub fn vote(&mut self, request: &VoteRequest) -> io::Result<Vote> {
        self.send(&Message::VoteRequest(request.clone()))?;
        self.receive(|message| match message {
            Message::Vote(vote) => Ok(vote),
            _ => Err(invalid("expected a vote")),
        })
    }

    /// Says who won.
    pub fn elected(&mut self, elected: &Elected) -> io::Result<Ack> {
        self.send(&Message::Elected(elected.clone()))?;
        self.acknowledged()
    }

    /// Appends at most 1 MiB, and waits until it is durable.
    pub fn append(&mut self, append: Append, bytes: &[u8]) -> io::Result<Ack> {
        self.send(&Message::Append(append, bytes))?;
        self.acknowledged()
    }

    fn acknowledged(&mut self) -> io::Result<Ack> {
        loop {
            let ack = self.receive(|message| match message {
                Message::Ack(ack) => Ok(Some(ack)),
                // What came beside it: members that were decided on meanwhile.
                Message::Configuration(..) => Ok(None),
                _ => Err(invalid("expected an acknowledgement")),
            })?;
            if let Some(ack) = ack {
                return Ok(ack);
            }
        }
    }

    /// Chooses the timeline, once the safekeeper has taken the configuration of this number, or a later one.
    pub fn learn(
        &mut self,
        tenant: TenantId,
        timeline: TimelineId,
        number: u64,
    ) -> io::Result<Status> {
        self.send(&Message::Learn(tenant, timeline, number))?;
        self.receive(|message| match message {
            Message::Status(status) => Ok(status),
            _ => Err(invalid("expected a status")),
        })
    }

    /// Chooses the timeline.
    pub fn open(&mut self, tenant: TenantId, timeline: TimelineId) -> io::Result<Status> {
        self.send(&Message::Open(tenant, timeline))?;
        self.receive(|message| match message {
            Message::Status(status) => Ok(status),
            _ => Err(invalid("expected a status")),
        })
    }

    /// The start of the last record before the boundary `end`; `None` if the timeline has none.
    pub fn last_record(&mut self, end: Lsn) -> io::Result<Option<Lsn>> {
        self.send(&Message::LastRecord(end))?;
        self.receive(|message| match message {
            Message::LastRecordReply(lsn) => Ok(lsn.is_valid().then_some(lsn)),
            _ => Err(invalid("expected a record's position")),
        })
    }

    /// Appends WAL from `from` to at most `to` to `out`: what is committed, or with the current
    /// `term` what is durable. Returns where it ended.
    pub fn read_wal(
        &mut self,
        from: Lsn,
        to: Lsn,
        term: Term,
        out: &mut Vec<u8>,
    ) -> io::Result<Lsn> {
        self.send(&Message::ReadWal(from, to, term))?;
        let mut at = from;
        loop {
            let count = self.receive(|message| match message {
                Message::WalChunk(start, bytes)
                    if start == at && bytes.len() as u64 <= to.saturating_sub(at) =>
                {
                    out.extend_from_slice(bytes);
                    Ok(bytes.len())
                }
                _ => Err(invalid("expected the next WAL bytes")),
            })?;
            if count == 0 {
                return Ok(at);
            }
            at = at + count as u64;
        }
    }
}
