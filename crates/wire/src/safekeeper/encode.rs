//! Messages to bytes.

use pgstrata_ids::{Member, NodeId, TimelineParameters};
use pgstrata_quorum::{Append, Configuration, Refusal, TermHistory};

use super::{APPEND_KIND, MAX_ADDRESS, MAX_REASON, Message, RefusedReason, WAL};
use crate::field::{put_list, put_text};
use crate::frame::{HEADER_SIZE, Stamp, encode_header, put_frame, restamp};
use crate::version::Version;

const APPEND_FIELDS: usize = 32;

/// Appends the whole frame of `message` to `out`.
pub fn encode(message: &Message<'_>, stamp: Stamp, out: &mut Vec<u8>) {
    put_frame(message.kind(), stamp, out, |out| body(message, out));
}

/// Everything of an append's frame before its WAL bytes: the same for all members but for the version that each speaks,
/// so that one frame serves them all without copying the WAL, or looking at it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendHead(pub [u8; HEADER_SIZE + APPEND_FIELDS]);

impl AppendHead {
    /// The head for `append`, followed by `payload` of `append.length` bytes.
    pub fn new(append: &Append, payload: &[u8]) -> AppendHead {
        debug_assert_eq!(append.length, payload.len() as u64);
        let fields = append_fields(append);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&fields), payload);
        let length = (APPEND_FIELDS + payload.len()) as u32;
        let mut head = [0; HEADER_SIZE + APPEND_FIELDS];
        let stamp = Stamp::In(WAL.speaks.highest());
        head[..HEADER_SIZE].copy_from_slice(&encode_header(APPEND_KIND, stamp, length, crc));
        head[HEADER_SIZE..].copy_from_slice(&fields);
        AppendHead(head)
    }

    /// The same append in another version; its fields are the same in all.
    pub fn in_version(mut self, version: Version) -> AppendHead {
        if let Some(header) = self.0.first_chunk_mut::<HEADER_SIZE>() {
            *header = restamp(*header, version);
        }
        self
    }
}

fn append_fields(append: &Append) -> [u8; APPEND_FIELDS] {
    let mut fields = [0; APPEND_FIELDS];
    let values = [append.term.0, append.start.0, append.record_end.0, append.commit_lsn.0];
    for (slot, value) in fields.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    fields
}

pub(super) fn body(message: &Message<'_>, out: &mut Vec<u8>) {
    match message {
        Message::Greeting(greeting) => {
            parameters(&greeting.parameters, out);
            put_u64(out, greeting.known);
            out.extend_from_slice(&greeting.proposer.0);
            addresses(&greeting.addresses, out);
        }
        Message::VoteRequest(request) => {
            put_u64(out, request.term.0);
            out.extend_from_slice(&request.proposer.0);
            configuration(&request.configuration, out);
        }
        Message::Elected(elected) => {
            put_u64(out, elected.term.0);
            history(&elected.history, out);
        }
        Message::Append(append, payload) => {
            out.extend_from_slice(&append_fields(append));
            out.extend_from_slice(payload);
        }
        Message::Ping => {}
        Message::Open(tenant, timeline) => {
            out.extend_from_slice(&tenant.0);
            out.extend_from_slice(&timeline.0);
        }
        Message::ReadWal(from, to, term) => put_u64s(out, &[from.0, to.0, term.0]),
        Message::LastRecord(lsn) | Message::LastRecordReply(lsn) => put_u64(out, lsn.0),
        Message::GreetingReply(reply) => {
            put_u64s(out, &[reply.node.0, reply.term.0, reply.flush_lsn.0, reply.commit_lsn.0]);
            out.extend_from_slice(&reply.incarnation.0);
            out.push(u8::from(reply.configuration.is_some()));
            if let Some(known) = &reply.configuration {
                configuration(known, out);
            }
            addresses(&reply.addresses, out);
        }
        Message::Found(members) => put_list(out, members.iter(), |out, (node, incarnation)| {
            put_u64(out, node.0);
            out.push(u8::from(incarnation.is_some()));
            if let Some(incarnation) = incarnation {
                out.extend_from_slice(&incarnation.0);
            }
        }),
        Message::Learn(tenant, timeline, number) => {
            out.extend_from_slice(&tenant.0);
            out.extend_from_slice(&timeline.0);
            put_u64(out, *number);
        }
        Message::Configuration(decided, places) => {
            configuration(decided, out);
            addresses(places, out);
        }
        Message::Vote(vote) => {
            out.push(u8::from(vote.granted));
            put_u64s(out, &[vote.asked.0, vote.term.0, vote.flush_lsn.0, vote.commit_lsn.0]);
            history(&vote.history, out);
        }
        Message::Ack(ack) => put_u64s(out, &[ack.term.0, ack.flush_lsn.0, ack.commit_lsn.0]),
        Message::Refused(reason) => refused(reason, out),
        Message::Status(status) => {
            member(&status.member, out);
            put_u64(out, status.configured_in.0);
            out.push(u8::from(status.has_proposer));
            put_u64s(
                out,
                &[status.term.0, status.available_lsn.0, status.flush_lsn.0, status.commit_lsn.0],
            );
            parameters(&status.parameters, out);
            configuration(&status.configuration, out);
            history(&status.history, out);
        }
        Message::WalChunk(start, payload) => {
            put_u64(out, start.0);
            out.extend_from_slice(payload);
        }
    }
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64s(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|&value| put_u64(out, value));
}

fn addresses(all: &[(NodeId, String)], out: &mut Vec<u8>) {
    put_list(out, all.iter(), |out, (node, address)| {
        put_u64(out, node.0);
        put_text(out, address, MAX_ADDRESS);
    });
}

fn member(member: &Member, out: &mut Vec<u8>) {
    put_u64(out, member.node.0);
    out.extend_from_slice(&member.incarnation.0);
}

pub(super) fn parameters(parameters: &TimelineParameters, out: &mut Vec<u8>) {
    out.extend_from_slice(&parameters.tenant.0);
    out.extend_from_slice(&parameters.timeline.0);
    put_u64(out, parameters.system_id.0);
    out.extend_from_slice(&parameters.pg_version.to_le_bytes());
    out.extend_from_slice(&parameters.pg_timeline.to_le_bytes());
    out.extend_from_slice(&parameters.segment_size.to_le_bytes());
    put_u64(out, parameters.start_lsn.0);
    out.push(u8::from(parameters.ancestor.is_some()));
    if let Some(ancestor) = parameters.ancestor {
        out.extend_from_slice(&ancestor.0);
    }
}

fn configuration(configuration: &Configuration, out: &mut Vec<u8>) {
    put_u64(out, configuration.number());
    for group in [configuration.members(), configuration.incoming()] {
        put_list(out, group.iter(), |out, one| member(one, out));
    }
}

pub(super) fn history(history: &TermHistory, out: &mut Vec<u8>) {
    put_list(out, history.entries().iter(), |out, entry| {
        put_u64s(out, &[entry.term.0, entry.lsn.0]);
    });
}

fn refused(reason: &RefusedReason, out: &mut Vec<u8>) {
    let (code, values, text): (u8, [u64; 2], &str) = match reason {
        RefusedReason::Quorum(Refusal::Fenced { promised }) => (1, [promised.0, 0], ""),
        RefusedReason::Quorum(Refusal::StaleConfiguration { current }) => (2, [*current, 0], ""),
        RefusedReason::Quorum(Refusal::NotMember) => (3, [0, 0], ""),
        RefusedReason::Quorum(Refusal::CommittedDiffers { divergence, commit_lsn }) => {
            (4, [divergence.0, commit_lsn.0], "")
        }
        RefusedReason::Quorum(Refusal::Malformed(what)) => (5, [0, 0], *what),
        RefusedReason::Quorum(Refusal::OtherMembers { number }) => (11, [*number, 0], ""),
        RefusedReason::Quorum(Refusal::Undecided { number, current }) => {
            (15, [*number, *current], "")
        }
        RefusedReason::Quorum(Refusal::TermTooFar { asked, promised }) => {
            (12, [asked.0, promised.0], "")
        }
        RefusedReason::Mismatch(text) => (6, [0, 0], text),
        RefusedReason::UnknownTimeline => (7, [0, 0], ""),
        RefusedReason::Storage(text) => (8, [0, 0], text),
        RefusedReason::Unavailable(text) => (9, [0, 0], text),
        RefusedReason::InvalidWal(text) => (10, [0, 0], text),
        RefusedReason::Forbidden(text) => (13, [0, 0], text),
        RefusedReason::Version(text) => (14, [0, 0], text),
    };
    out.push(code);
    put_u64s(out, &values);
    put_text(out, text, MAX_REASON);
}
