//! Bytes to messages.

use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, SystemId, TenantId, Term, TimelineId, TimelineParameters,
};
use pgstrata_quorum::{
    Ack, Append, Configuration, Elected, MAX_HISTORY, MAX_MEMBERS, ProposerId, Refusal,
    TermHistory, TermStart, Vote, VoteRequest,
};

use super::{
    APPEND_KIND, GREETING_KIND, Greeting, GreetingReply, MAX_ADDRESS, MAX_PAYLOAD, MAX_REASON,
    Message, PING_KIND, RefusedReason, Status, VOTE_REQUEST_KIND,
};
use crate::field::{DecodeError, Fields};

type Decoded<T> = Result<T, DecodeError>;

/// The message of a verified frame.
pub fn decode(kind: u8, body: &[u8]) -> Decoded<Message<'_>> {
    let mut fields = Fields(body);
    let message = match kind {
        GREETING_KIND => Message::Greeting(greeting(&mut fields)?),
        VOTE_REQUEST_KIND => Message::VoteRequest(VoteRequest {
            term: term(&mut fields)?,
            proposer: ProposerId(fields.array("proposer id")?),
            configuration: configuration(&mut fields)?,
        }),
        3 => Message::Elected(Elected { term: term(&mut fields)?, history: history(&mut fields)? }),
        APPEND_KIND => return append(fields),
        PING_KIND => Message::Ping,
        6 => {
            Message::Open(TenantId(fields.array("tenant")?), TimelineId(fields.array("timeline")?))
        }
        7 => Message::ReadWal(fields.lsn("start")?, fields.lsn("end")?, term(&mut fields)?),
        8 => Message::LastRecord(fields.lsn("position")?),
        10 => Message::Found(fields.list(MAX_MEMBERS, "number of members", first_member)?),
        11 => Message::Learn(
            TenantId(fields.array("tenant")?),
            TimelineId(fields.array("timeline")?),
            fields.u64("configuration number")?,
        ),
        65 => Message::GreetingReply(GreetingReply {
            node: node(&mut fields)?,
            term: term(&mut fields)?,
            flush_lsn: fields.lsn("flush LSN")?,
            commit_lsn: fields.lsn("commit LSN")?,
            incarnation: Incarnation(fields.array("incarnation")?),
            configuration: match fields.bool("configuration")? {
                true => Some(configuration(&mut fields)?),
                false => None,
            },
            addresses: addresses(&mut fields)?,
        }),
        66 => Message::Vote(vote(&mut fields)?),
        67 => Message::Ack(Ack {
            term: term(&mut fields)?,
            flush_lsn: fields.lsn("flush LSN")?,
            commit_lsn: fields.lsn("commit LSN")?,
        }),
        68 => Message::Refused(refused(&mut fields)?),
        69 => Message::Status(status(&mut fields)?),
        70 => {
            let start = fields.lsn("start")?;
            return Ok(Message::WalChunk(start, payload(fields.0)?));
        }
        71 => Message::LastRecordReply(fields.lsn("position")?),
        72 => Message::Configuration(configuration(&mut fields)?, addresses(&mut fields)?),
        other => return Err(DecodeError::Kind(other)),
    };
    fields.end()?;
    Ok(message)
}

fn payload(bytes: &[u8]) -> Decoded<&[u8]> {
    if bytes.len() > MAX_PAYLOAD {
        return Err(DecodeError::Impossible("number of WAL bytes"));
    }
    Ok(bytes)
}

fn append(mut fields: Fields<'_>) -> Decoded<Message<'_>> {
    let append = Append {
        term: term(&mut fields)?,
        start: fields.lsn("start")?,
        length: fields.0.len().saturating_sub(16) as u64,
        record_end: fields.lsn("record end")?,
        commit_lsn: fields.lsn("commit LSN")?,
    };
    Ok(Message::Append(append, payload(fields.0)?))
}

pub(super) fn term(fields: &mut Fields<'_>) -> Decoded<Term> {
    fields.u64("term").map(Term)
}

pub(super) fn node(fields: &mut Fields<'_>) -> Decoded<NodeId> {
    fields.u64("node id").map(NodeId)
}

fn greeting(fields: &mut Fields<'_>) -> Decoded<Greeting> {
    let parameters = parameters(fields)?;
    let known = fields.u64("configuration number")?;
    let proposer = ProposerId(fields.array("proposer id")?);
    let addresses = addresses(fields)?;
    Ok(Greeting { parameters, known, addresses, proposer })
}

pub(super) fn addresses(fields: &mut Fields<'_>) -> Decoded<Vec<(NodeId, String)>> {
    fields.list(2 * MAX_MEMBERS, "number of addresses", |fields| {
        Ok((node(fields)?, fields.text(MAX_ADDRESS, "address")?))
    })
}

fn member(fields: &mut Fields<'_>) -> Decoded<Member> {
    Ok(Member { node: node(fields)?, incarnation: Incarnation(fields.array("incarnation")?) })
}

fn first_member(fields: &mut Fields<'_>) -> Decoded<(NodeId, Option<Incarnation>)> {
    let node = node(fields)?;
    let incarnation = match fields.bool("incarnation")? {
        true => Some(Incarnation(fields.array("incarnation")?)),
        false => None,
    };
    Ok((node, incarnation))
}

fn vote(fields: &mut Fields<'_>) -> Decoded<Vote> {
    Ok(Vote {
        granted: fields.bool("vote")?,
        asked: term(fields)?,
        term: term(fields)?,
        flush_lsn: fields.lsn("flush LSN")?,
        commit_lsn: fields.lsn("commit LSN")?,
        history: history(fields)?,
    })
}

fn status(fields: &mut Fields<'_>) -> Decoded<Status> {
    let member = member(fields)?;
    let configured_in = term(fields)?;
    let has_proposer = fields.bool("proposer")?;
    let term = term(fields)?;
    let available_lsn = fields.lsn("available LSN")?;
    let flush_lsn = fields.lsn("flush LSN")?;
    let commit_lsn = fields.lsn("commit LSN")?;
    let parameters = parameters(fields)?;
    let configuration = configuration(fields)?;
    let history = history(fields)?;
    Ok(Status {
        member,
        parameters,
        configuration,
        configured_in,
        has_proposer,
        term,
        available_lsn,
        flush_lsn,
        commit_lsn,
        history,
    })
}

pub(super) fn parameters(fields: &mut Fields<'_>) -> Decoded<TimelineParameters> {
    let parameters = TimelineParameters {
        tenant: TenantId(fields.array("tenant")?),
        timeline: TimelineId(fields.array("timeline")?),
        system_id: SystemId(fields.u64("system id")?),
        pg_version: fields.u32("PostgreSQL version")?,
        pg_timeline: fields.u32("PostgreSQL timeline")?,
        segment_size: fields.u32("segment size")?,
        start_lsn: fields.lsn("start LSN")?,
        ancestor: match fields.bool("ancestor")? {
            true => Some(TimelineId(fields.array("ancestor")?)),
            false => None,
        },
    };
    match parameters.check_own() {
        Ok(()) => Ok(parameters),
        Err(_) => Err(DecodeError::Impossible("timeline parameter")),
    }
}

fn configuration(fields: &mut Fields<'_>) -> Decoded<Configuration> {
    let number = fields.u64("configuration number")?;
    let members = fields.list(MAX_MEMBERS, "number of members", member)?;
    let incoming = fields.list(MAX_MEMBERS, "number of members", member)?;
    Configuration::joint(number, members, incoming)
        .map_err(|_| DecodeError::Impossible("configuration"))
}

fn history(fields: &mut Fields<'_>) -> Decoded<TermHistory> {
    let entries = fields.list(MAX_HISTORY, "history length", |fields| {
        Ok(TermStart { term: term(fields)?, lsn: fields.lsn("term start")? })
    })?;
    TermHistory::new(entries).map_err(|_| DecodeError::Impossible("term history"))
}

fn refused(fields: &mut Fields<'_>) -> Decoded<RefusedReason> {
    let code = fields.u8("refusal")?;
    let (first, second) = (fields.u64("refusal")?, fields.u64("refusal")?);
    // It goes into logs and messages, of which it is a part of one line, whoever wrote it.
    let text = fields.text(MAX_REASON, "refusal")?;
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let quorum = match code {
        1 => Refusal::Fenced { promised: Term(first) },
        2 => Refusal::StaleConfiguration { current: first },
        3 => Refusal::NotMember,
        4 => Refusal::CommittedDiffers { divergence: Lsn(first), commit_lsn: Lsn(second) },
        // The text named what was wrong with our own message; the log over there has it.
        5 => Refusal::Malformed("the other side could not use it"),
        11 => Refusal::OtherMembers { number: first },
        15 => Refusal::Undecided { number: first, current: second },
        12 => Refusal::TermTooFar { asked: Term(first), promised: Term(second) },
        6 => return Ok(RefusedReason::Mismatch(text)),
        7 => return Ok(RefusedReason::UnknownTimeline),
        8 => return Ok(RefusedReason::Storage(text)),
        9 => return Ok(RefusedReason::Unavailable(text)),
        10 => return Ok(RefusedReason::InvalidWal(text)),
        13 => return Ok(RefusedReason::Forbidden(text)),
        14 => return Ok(RefusedReason::Version(text)),
        _ => return Err(DecodeError::Impossible("refusal")),
    };
    Ok(RefusedReason::Quorum(quorum))
}
