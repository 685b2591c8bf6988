//! Connections between computes and safekeepers: what is sent comes in order, late, or, once the connection is gone, never.

use std::collections::VecDeque;

use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_quorum::{Ack, Append, Configuration, Elected, Vote, VoteRequest};
use pgstrata_safekeeper::timeline::{ComputeConnected, ProposerConnected};
use pgstrata_wire::safekeeper::RefusedReason;

use crate::plan::Time;

/// From a compute.
#[derive(Clone, Debug)]
pub enum Request {
    /// With the number of the newest configuration that it knows.
    Greet(u64),
    /// With these nodes, in the lives in which they were heard, as its members.
    Found(Vec<(NodeId, Option<Incarnation>)>),
    Vote(VoteRequest),
    Elected(Elected),
    Append(Append, Vec<u8>),
    Ping,
    /// Nothing more comes: its end is closed.
    Leave,
}

/// What arrives.
#[derive(Clone, Debug)]
pub enum Parcel {
    Whole(Request),
    /// Of messages, as they are cut on their way.
    Bytes(Vec<u8>),
}

/// From a safekeeper.
#[derive(Clone, Debug)]
pub enum Reply {
    Greeting {
        member: Member,
        /// None of a timeline that is not founded.
        configuration: Option<Configuration>,
        promised: Term,
    },
    /// Others are the members from now on, or are about to be.
    Configuration(Configuration),
    Vote(Vote),
    Ack(Ack),
    Refused(RefusedReason),
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
    /// Of a message that has not arrived whole.
    pub bytes: Vec<u8>,
    /// The end of what was sent on it.
    pub sent: Lsn,
    /// What has arrived and was not looked at.
    pub inbox: VecDeque<Request>,
    pub is_served: bool,
    pub proposer: Option<ProposerConnected>,
    /// The newest term that it asked for or won, as it said.
    pub asked: Term,
    pub greeted: Option<ComputeConnected>,
    /// Number of the configuration that its compute was told of last.
    pub told: u64,
}
