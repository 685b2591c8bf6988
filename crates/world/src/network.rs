//! Connections between computes and safekeepers: what is sent comes in order, late, or, once the connection is gone, never.

use std::collections::VecDeque;

use pgstrata_ids::Lsn;
use pgstrata_quorum::{Ack, Configuration, Vote};
use pgstrata_safekeeper::wal::conversation::Conversation;
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::safekeeper::{GreetingReply, Message, RefusedReason};

use crate::plan::Time;

/// What arrives at a safekeeper.
#[derive(Clone, Debug)]
pub enum Parcel {
    /// Of messages, as they are cut on their way.
    Bytes(Vec<u8>),
    /// Nothing more comes: the other end is closed.
    Leave,
}

/// From a safekeeper.
#[derive(Clone, Debug)]
pub enum Reply {
    Greeting(GreetingReply),
    /// Others are the members from now on, or are about to be.
    Configuration(Configuration),
    Vote(Vote),
    Ack(Ack),
    Refused(RefusedReason),
}

impl Reply {
    /// Of a message, if a safekeeper says that to who writes.
    pub fn of(message: Message<'_>) -> Result<Reply, String> {
        match message {
            Message::GreetingReply(reply) => Ok(Reply::Greeting(reply)),
            Message::Configuration(decided, _) => Ok(Reply::Configuration(decided)),
            Message::Vote(vote) => Ok(Reply::Vote(vote)),
            Message::Ack(ack) => Ok(Reply::Ack(ack)),
            Message::Refused(reason) => Ok(Reply::Refused(reason)),
            other => Err(format!("a safekeeper says {other:?}")),
        }
    }

    pub fn message(self) -> Message<'static> {
        match self {
            Reply::Greeting(reply) => Message::GreetingReply(reply),
            Reply::Configuration(decided) => Message::Configuration(decided, Vec::new()),
            Reply::Vote(vote) => Message::Vote(vote),
            Reply::Ack(ack) => Message::Ack(ack),
            Reply::Refused(reason) => Message::Refused(reason),
        }
    }
}

/// The safekeeper's side of a connection: what ships, with the bytes that have come and were not taken.
pub struct Listener {
    pub conversation: Conversation<Vec<u8>>,
    pub input: FrameBuffer,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("input", &self.input.pending()).finish_non_exhaustive()
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Whose it is; a number beyond all computes is that of a safekeeper that has members elect.
    pub compute: usize,
    pub compute_life: u64,
    pub node: usize,
    pub node_life: u64,
    /// Nothing comes through any more, whether or not anybody knows.
    pub is_dead: bool,
    /// Its compute has closed it.
    pub is_left: bool,
    /// When the last message in either direction arrives, at the earliest.
    pub to_node: Time,
    pub to_compute: Time,
    /// When the safekeeper heard something last.
    pub heard: Time,
    /// Of a message that has not arrived whole, where each is looked at on its way.
    pub bytes: Vec<u8>,
    /// The end of what was sent on it.
    pub sent: Lsn,
    /// What has arrived, and was not taken.
    pub inbox: VecDeque<u8>,
    /// Nothing comes after that.
    pub is_over: bool,
    pub is_served: bool,
    /// While the safekeeper's end is open.
    pub listener: Option<Listener>,
    /// Whether it was answered on it.
    pub is_answered: bool,
}
