//! Version 2 of the protocol, as computes and readers of the release before speak it. Only safekeepers read it, and it is of use
//! only with timelines of before members had incarnations: `docs/protocols.md` says for how long.
//!
//! What is not here has the form that it has now.

use pgstrata_ids::{Incarnation, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{MAX_MEMBERS, ProposerId, Refusal};

use super::decode::{addresses, decode as decode_as_now, node, parameters, term};
use super::encode::{
    body as body_as_now, history, parameters as put_parameters, put_u64, put_u64s,
};
use super::{GREETING_KIND, GreetingReply, Message, RefusedReason, Status, VOTE_REQUEST_KIND};
use crate::field::{DecodeError, Fields, put_list};
use crate::frame::{Stamp, put_frame};
use crate::version::Version;

/// Its number.
pub const VERSION: Version = Version(2);

const MEMBERS_KIND: u8 = 9;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// A proposer introduces itself, and the timeline with its members.
    Greeting(Greeting),
    /// A proposer asks for a vote.
    VoteRequest(VoteRequest),
    /// A proposer: these are the members whose votes and acknowledgements I count. Only a refusal is answered.
    Members(Vec<(NodeId, Incarnation)>),
    /// Anything that is said as it is now.
    AsNow(Message<'a>),
}

/// See [`Said`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The timeline.
    pub parameters: TimelineParameters,
    /// Its members.
    pub nodes: Vec<NodeId>,
    /// Where members' WAL ports are, as far as known.
    pub addresses: Vec<(NodeId, String)>,
    /// Who speaks.
    pub proposer: ProposerId,
}

/// See [`Said`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VoteRequest {
    /// The term that it is about.
    pub term: Term,
    /// Who asks.
    pub proposer: ProposerId,
    /// Whose votes are counted.
    pub nodes: Vec<NodeId>,
}

/// The message of a verified frame.
pub fn decode(kind: u8, body: &[u8]) -> Result<Said<'_>, DecodeError> {
    let mut fields = Fields(body);
    let said = match kind {
        GREETING_KIND => Said::Greeting(Greeting {
            parameters: parameters(&mut fields)?,
            nodes: nodes(&mut fields)?,
            proposer: ProposerId(fields.array("proposer id")?),
            addresses: addresses(&mut fields)?,
        }),
        VOTE_REQUEST_KIND => Said::VoteRequest(VoteRequest {
            term: term(&mut fields)?,
            proposer: ProposerId(fields.array("proposer id")?),
            nodes: nodes(&mut fields)?,
        }),
        MEMBERS_KIND => {
            Said::Members(fields.list(2 * MAX_MEMBERS, "number of members", |fields| {
                Ok((node(fields)?, Incarnation(fields.array("incarnation")?)))
            })?)
        }
        3..=8 => return decode_as_now(kind, body).map(Said::AsNow),
        other => return Err(DecodeError::Kind(other)),
    };
    fields.end()?;
    Ok(said)
}

/// A configuration of then. Nothing ever changed the members: it was the first one.
fn nodes(fields: &mut Fields<'_>) -> Result<Vec<NodeId>, DecodeError> {
    let number = fields.u64("configuration number")?;
    let nodes = fields.list(MAX_MEMBERS, "number of members", node)?;
    let incoming = fields.list(MAX_MEMBERS, "number of members", node)?;
    let is_twice = |i: usize| nodes[..i].contains(&nodes[i]);
    match number == 1 && incoming.is_empty() && !nodes.is_empty() {
        true if !(0..nodes.len()).any(is_twice) => Ok(nodes),
        _ => Err(DecodeError::Impossible("configuration")),
    }
}

/// Appends the whole frame of an answer to `out`. What such clients can't be told is a panic: an election tells no such client
/// of configurations.
pub fn encode(message: &Message<'_>, known: &[(NodeId, Incarnation)], out: &mut Vec<u8>) {
    put_frame(message.kind(), Stamp::In(VERSION), out, |out| match message {
        Message::GreetingReply(reply) => greeting_reply(reply, known, out),
        Message::Status(said) => status(said, out),
        Message::Refused(reason) => body_as_now(&Message::Refused(refusal(reason)), out),
        Message::Vote(_)
        | Message::Ack(_)
        | Message::WalChunk(..)
        | Message::LastRecordReply(_) => body_as_now(message, out),
        other => unreachable!("kind {} is nothing that version {VERSION} has", other.kind()),
    });
}

fn greeting_reply(reply: &GreetingReply, known: &[(NodeId, Incarnation)], out: &mut Vec<u8>) {
    put_u64s(out, &[reply.node.0, reply.term.0, reply.flush_lsn.0, reply.commit_lsn.0]);
    out.extend_from_slice(&reply.incarnation.0);
    put_list(out, known.iter(), |out, (node, incarnation)| {
        put_u64(out, node.0);
        out.extend_from_slice(&incarnation.0);
    });
}

fn status(status: &Status, out: &mut Vec<u8>) {
    let lsns = [status.available_lsn.0, status.flush_lsn.0, status.commit_lsn.0];
    put_u64s(out, &[status.member.node.0, status.term.0]);
    put_u64s(out, &lsns);
    put_parameters(&status.parameters, out);
    put_u64(out, 1);
    put_list(out, status.configuration.nodes().iter(), |out, node| put_u64(out, node.0));
    put_list(out, [].iter(), |out, node: &NodeId| put_u64(out, node.0));
    history(&status.history, out);
}

/// Those that were not there yet are a text.
fn refusal(reason: &RefusedReason) -> RefusedReason {
    match reason {
        RefusedReason::Version(text) => RefusedReason::Mismatch(text.clone()),
        RefusedReason::Quorum(Refusal::Undecided { .. }) => {
            RefusedReason::Mismatch(reason.to_string())
        }
        known => known.clone(),
    }
}
