//! A safekeeper's own small files: `identity` of the node, `timelines` that it took part in, `control`
//! of each of them.
//!
//! All have one header; all integers are little endian.
//!
//! ```text
//! offset  size  field
//!      0     8  magic: "pgsSKid\n" (identity), "pgsSKtml" (timelines), "pgsSKctl" (control)
//!      8     2  format version: identity 3, control 3, timelines 1
//!     10     2  reserved, 0
//!     12     4  length of the body in bytes
//!     16     4  CRC-32C of the body
//!     20     4  CRC-32C of bytes 0..20
//!     24        body
//!
//! identity body
//!      0     8  node id
//!      8    16  incarnation; version 1 had none
//! From version 3 on there is a `timelines` beside it: one that is missing is lost.
//!
//! timelines body
//!      0     4  number of timelines, then each: tenant id 16, timeline id 16
//!
//! control body
//!      0     8  node id of the owner
//!      8    16  tenant id
//!     24    16  timeline id
//!     40     8  system identifier
//!     48     4  PostgreSQL major version
//!     52     4  PostgreSQL timeline number
//!     56     4  WAL segment size
//!     60     8  start LSN
//!     68    16  ancestor timeline id, all zero if none
//!     84     8  highest promised term
//!     92    16  proposer that got the vote in it, all zero if none
//!    108     8  commit LSN
//!    116     8  flush LSN when this was written
//!    124     8  available LSN: WAL before it was trimmed
//!    132     8  archived LSN: this node has seen all WAL before it in object storage
//!    140     8  remote consistent LSN: the page server no longer needs what is before it; at most
//!               the commit LSN
//!    148     8  configuration number
//!    156     8  term that was promised when the configuration was taken
//!    164     4  number of members, then each: node id 8, incarnation 16
//!            4  number of incoming members, then likewise
//!            4  number of term history entries, then 16 bytes each: term, LSN
//!            4  number of addresses, then each: node id 8, length 2, text
//! ```
//!
//! `flushed`, written over in place and synced now and then:
//!
//! ```text
//!      0     8  magic: "pgsSKflu"
//!      8     8  LSN: everything before it was durable when this was written
//!     16     4  CRC-32C of bytes 0..16
//! ```
//!
//! Version 1 of the control file was the same, but its last two positions were what others said.
//! They are not believed: the archive is looked at again. Version 2 had members' node ids without
//! incarnations, and number 1 always: such a configuration counts as not known, until the timeline's quorum
//! object ([`crate::quorum`]) says which incarnations these are.
//!
//! Before there was `timelines`, a file `members` (magic "pgsSKmem", version 1) had the number of safekeepers that this one
//! had met, and of each the node id and the incarnation. It is still read: whom the quorum object names must be those.

use std::collections::{BTreeMap, BTreeSet};

use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, SystemId, TenantId, Term, TimelineId, TimelineParameters,
};
use pgstrata_quorum::{
    Configuration, ControlState, MAX_HISTORY, MAX_MEMBERS, ProposerId, TermHistory, TermStart,
};

use crate::FormatError;
use crate::bytes::Reader;

const HEADER_SIZE: usize = 24;
const IDENTITY: Kind = Kind { what: "safekeeper identity file", magic: *b"pgsSKid\n", version: 3 };
const MEMBERS: Kind = Kind { what: "safekeeper members file", magic: *b"pgsSKmem", version: 1 };
const CONTROL: Kind = Kind { what: "safekeeper control file", magic: *b"pgsSKctl", version: 3 };
const TIMELINES: Kind =
    Kind { what: "safekeeper's list of timelines", magic: *b"pgsSKtml", version: 1 };

pub(crate) struct Kind {
    pub(crate) what: &'static str,
    pub(crate) magic: [u8; 8],
    pub(crate) version: u16,
}

/// Everything about one timeline that a safekeeper keeps besides WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineControl {
    /// Whose file it is.
    pub node: NodeId,
    /// What the timeline is.
    pub parameters: TimelineParameters,
    /// Promises, history, members; its `start_lsn` is that of `parameters`.
    pub state: ControlState,
    /// End of the durable log at that time; it must not be shorter after a restart.
    pub flush_lsn: Lsn,
    /// First byte still on disk.
    pub available_lsn: Lsn,
    /// All WAL before it is in object storage.
    pub archived_lsn: Lsn,
    /// The page server no longer needs what is before it.
    pub remote_consistent_lsn: Lsn,
    /// Where the members' WAL ports were last known to be.
    pub addresses: Vec<(NodeId, String)>,
}

/// Most safekeepers in a `members` file.
pub const MAX_MEMBERS_MET: usize = 1000;

/// Most timelines in a `timelines` file.
pub const MAX_TIMELINES: usize = 1_000_000;

/// The bytes of a `timelines` file.
pub fn encode_timelines(timelines: &BTreeSet<(TenantId, TimelineId)>) -> Vec<u8> {
    let mut body = Vec::with_capacity(4 + 32 * timelines.len());
    body.extend_from_slice(&(timelines.len() as u32).to_le_bytes());
    for (tenant, timeline) in timelines {
        body.extend_from_slice(&tenant.0);
        body.extend_from_slice(&timeline.0);
    }
    TIMELINES.encode(&body)
}

/// The contents of a `timelines` file.
pub fn decode_timelines(bytes: &[u8]) -> Result<BTreeSet<(TenantId, TimelineId)>, FormatError> {
    let (_, mut reader) = TIMELINES.open(bytes)?;
    let count = count(&mut reader, MAX_TIMELINES)?;
    let timeline = |reader: &mut Reader<'_>| -> Result<_, FormatError> {
        Ok((TenantId(reader.array()?), TimelineId(reader.array()?)))
    };
    let timelines = (0..count).map(|_| timeline(&mut reader)).collect::<Result<_, _>>()?;
    TIMELINES.end(&reader)?;
    Ok(timelines)
}

/// The bytes of an `identity` file.
pub fn encode_identity(node: NodeId, incarnation: Incarnation) -> Vec<u8> {
    let mut body = node.0.to_le_bytes().to_vec();
    body.extend_from_slice(&incarnation.0);
    IDENTITY.encode(&body)
}

/// What an `identity` file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which safekeeper.
    pub node: NodeId,
    /// Which life of its directory; directories of the first version were made without.
    pub incarnation: Option<Incarnation>,
    /// Whether there must be a `timelines` file.
    pub has_list: bool,
}

/// The contents of an `identity` file.
pub fn decode_identity(bytes: &[u8]) -> Result<Identity, FormatError> {
    let (version, mut reader) = IDENTITY.open(bytes)?;
    let node = NodeId(reader.u64()?);
    let incarnation = match version {
        0 | 1 => None,
        _ => Some(Incarnation(reader.array()?)),
    };
    IDENTITY.end(&reader)?;
    Ok(Identity { node, incarnation, has_list: version >= 3 })
}

/// The contents of a `members` file.
pub fn decode_members(bytes: &[u8]) -> Result<BTreeMap<NodeId, Incarnation>, FormatError> {
    let (_, mut reader) = MEMBERS.open(bytes)?;
    let count = count(&mut reader, MAX_MEMBERS_MET)?;
    let member = |reader: &mut Reader<'_>| -> Result<_, FormatError> {
        Ok((NodeId(reader.u64()?), Incarnation(reader.array()?)))
    };
    let members = (0..count).map(|_| member(&mut reader)).collect::<Result<_, _>>()?;
    MEMBERS.end(&reader)?;
    Ok(members)
}

/// Size of what is written to a `flushed` file, in bytes: less than any disk's sector.
pub const FLUSHED_SIZE: usize = 2 * NOTE_SIZE;

/// One of the two notes in it.
const NOTE_SIZE: usize = 20;

const FLUSHED_MAGIC: [u8; 8] = *b"pgsSKflu";
const COMMITTED_MAGIC: [u8; 8] = *b"pgsSKcom";

fn encode_note(magic: [u8; 8], lsn: Lsn) -> [u8; NOTE_SIZE] {
    let mut out = [0; NOTE_SIZE];
    out[..8].copy_from_slice(&magic);
    out[8..16].copy_from_slice(&lsn.0.to_le_bytes());
    let crc = crc32c::crc32c(&out[..16]);
    out[16..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn decode_note(magic: [u8; 8], bytes: &[u8]) -> Option<Lsn> {
    let bytes: &[u8; NOTE_SIZE] = bytes.first_chunk()?;
    let lsn = Lsn(u64::from_le_bytes(*bytes[8..].first_chunk()?));
    (encode_note(magic, lsn) == *bytes).then_some(lsn)
}

/// The bytes of a `flushed` file: the log is durable up to `lsn`, and known to be committed up to `commit_lsn`.
pub fn encode_flushed(lsn: Lsn, commit_lsn: Lsn) -> [u8; FLUSHED_SIZE] {
    let mut out = [0; FLUSHED_SIZE];
    out[..NOTE_SIZE].copy_from_slice(&encode_note(FLUSHED_MAGIC, lsn));
    out[NOTE_SIZE..].copy_from_slice(&encode_note(COMMITTED_MAGIC, commit_lsn));
    out
}

/// How far the log was durable, by a `flushed` file; `None` if there is none or it can't be read: it is only ever a
/// reason to trust less.
pub fn decode_flushed(bytes: &[u8]) -> Option<Lsn> {
    decode_note(FLUSHED_MAGIC, bytes)
}

/// How far it was known to be committed, by the same file. Older releases neither write nor read it, and leave what is there, which
/// stays true.
pub fn decode_committed(bytes: &[u8]) -> Option<Lsn> {
    decode_note(COMMITTED_MAGIC, bytes.get(NOTE_SIZE..)?)
}

impl Kind {
    pub(crate) fn encode(&self, body: &[u8]) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(body);
        out
    }

    /// The version, and the body.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<(u16, Reader<'a>), FormatError> {
        let what = self.what;
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(FormatError::Unwritten { what });
        }
        let Some((header, body)) = bytes.split_at_checked(HEADER_SIZE) else {
            return Err(FormatError::torn(what, format!("{} bytes", bytes.len())));
        };
        let mut fields = Reader::new(what, header);
        if fields.array()? != self.magic {
            return Err(FormatError::corrupt(what, "the magic number is wrong"));
        }
        let version = fields.u16()?;
        fields.u16()?;
        let (length, body_crc, header_crc) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if crc32c::crc32c(&header[..20]) != header_crc {
            return Err(FormatError::corrupt(what, "the header's checksum is wrong"));
        }
        if version > self.version {
            return Err(FormatError::NewerVersion { what, found: version, known: self.version });
        }
        let Some(body) = body.get(..length as usize) else {
            let detail = format!("{} of {length} bytes after the header", body.len());
            return Err(FormatError::torn(what, detail));
        };
        if crc32c::crc32c(body) != body_crc {
            return Err(FormatError::corrupt(what, "the checksum is wrong"));
        }
        Ok((version, Reader::new(what, body)))
    }

    pub(crate) fn end(&self, reader: &Reader<'_>) -> Result<(), FormatError> {
        match reader.is_empty() {
            true => Ok(()),
            false => Err(FormatError::corrupt(self.what, "it goes on after its last field")),
        }
    }
}

impl TimelineControl {
    /// The bytes of a `control` file.
    pub fn encode(&self) -> Vec<u8> {
        let (parameters, state) = (&self.parameters, &self.state);
        let mut out = Vec::with_capacity(256 + 16 * state.history.entries().len());
        let put = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_le_bytes());
        let count = |out: &mut Vec<u8>, value: usize| {
            out.extend_from_slice(&(value as u32).to_le_bytes());
        };
        put(&mut out, self.node.0);
        out.extend_from_slice(&parameters.tenant.0);
        out.extend_from_slice(&parameters.timeline.0);
        put(&mut out, parameters.system_id.0);
        out.extend_from_slice(&parameters.pg_version.to_le_bytes());
        out.extend_from_slice(&parameters.pg_timeline.to_le_bytes());
        out.extend_from_slice(&parameters.segment_size.to_le_bytes());
        put(&mut out, parameters.start_lsn.0);
        out.extend_from_slice(&parameters.ancestor.map_or([0; 16], |ancestor| ancestor.0));
        put(&mut out, state.term.0);
        out.extend_from_slice(&state.voted_for.map_or([0; 16], |proposer| proposer.0));
        let positions = [state.commit_lsn, self.flush_lsn, self.available_lsn];
        for lsn in positions.into_iter().chain([self.archived_lsn, self.remote_consistent_lsn]) {
            put(&mut out, lsn.0);
        }
        put(&mut out, state.configuration.number());
        put(&mut out, state.configured_in.0);
        for group in [state.configuration.members(), state.configuration.incoming()] {
            count(&mut out, group.len());
            for member in group {
                put(&mut out, member.node.0);
                out.extend_from_slice(&member.incarnation.0);
            }
        }
        count(&mut out, state.history.entries().len());
        for entry in state.history.entries() {
            put(&mut out, entry.term.0);
            put(&mut out, entry.lsn.0);
        }
        count(&mut out, self.addresses.len());
        for (node, address) in &self.addresses {
            put(&mut out, node.0);
            let text = &address.as_bytes()[..address.len().min(usize::from(u16::MAX))];
            out.extend_from_slice(&(text.len() as u16).to_le_bytes());
            out.extend_from_slice(text);
        }
        CONTROL.encode(&out)
    }

    /// The contents of a `control` file, which must belong to `node`.
    pub fn decode(bytes: &[u8], node: NodeId) -> Result<TimelineControl, FormatError> {
        let (version, mut reader) = CONTROL.open(bytes)?;
        let owner = reader.u64()?;
        if owner != node.0 {
            return Err(FormatError::WrongOwner {
                what: CONTROL.what,
                found: format!("safekeeper {owner}"),
                expected: format!("safekeeper {node}"),
            });
        }
        let parameters = parameters(&mut reader)?;
        let term = Term(reader.u64()?);
        let voted_for = some_id(&mut reader)?.map(ProposerId);
        let commit_lsn = Lsn(reader.u64()?);
        let flush_lsn = Lsn(reader.u64()?);
        let available_lsn = Lsn(reader.u64()?);
        let mut archived_lsn = Lsn(reader.u64()?);
        let mut remote_consistent_lsn = Lsn(reader.u64()?);
        if version < 2 {
            let size = u64::from(parameters.segment_size);
            archived_lsn = available_lsn.segment_start(size).min(archived_lsn);
            remote_consistent_lsn = remote_consistent_lsn.min(commit_lsn);
        }
        let number = reader.u64()?;
        let (configured_in, configuration) = match version {
            0..=2 => (Term(0), configuration_of_nodes(&mut reader, number)?),
            _ => (Term(reader.u64()?), configuration(&mut reader, number)?),
        };
        let history = history(&mut reader)?;
        let addresses = addresses(&mut reader)?;
        CONTROL.end(&reader)?;
        let start_lsn = parameters.start_lsn;
        let state = ControlState {
            start_lsn,
            configuration,
            configured_in,
            term,
            voted_for,
            history,
            commit_lsn,
        };
        Ok(TimelineControl {
            node,
            parameters,
            state,
            flush_lsn,
            available_lsn,
            archived_lsn,
            remote_consistent_lsn,
            addresses,
        })
    }
}

fn impossible(error: impl std::fmt::Display) -> FormatError {
    FormatError::corrupt(CONTROL.what, error.to_string())
}

fn some_id(reader: &mut Reader<'_>) -> Result<Option<[u8; 16]>, FormatError> {
    let id = reader.array()?;
    Ok((id != [0; 16]).then_some(id))
}

pub(crate) fn parameters(reader: &mut Reader<'_>) -> Result<TimelineParameters, FormatError> {
    let parameters = TimelineParameters {
        tenant: TenantId(reader.array()?),
        timeline: TimelineId(reader.array()?),
        system_id: SystemId(reader.u64()?),
        pg_version: reader.u32()?,
        pg_timeline: reader.u32()?,
        segment_size: reader.u32()?,
        start_lsn: Lsn(reader.u64()?),
        ancestor: some_id(reader)?.map(TimelineId),
    };
    parameters.check_own().map_err(impossible)?;
    Ok(parameters)
}

pub(crate) fn count(reader: &mut Reader<'_>, most: usize) -> Result<usize, FormatError> {
    let count = reader.u32()? as usize;
    if count > most {
        return Err(impossible(format!("a list of {count} entries, at most {most} are possible")));
    }
    Ok(count)
}

pub(crate) fn configuration(
    reader: &mut Reader<'_>,
    number: u64,
) -> Result<Configuration, FormatError> {
    let group = |reader: &mut Reader<'_>| -> Result<Vec<Member>, FormatError> {
        let member = |reader: &mut Reader<'_>| -> Result<Member, FormatError> {
            Ok(Member { node: NodeId(reader.u64()?), incarnation: Incarnation(reader.array()?) })
        };
        let count = count(reader, MAX_MEMBERS)?;
        (0..count).map(|_| member(reader)).collect()
    };
    let (members, incoming) = (group(reader)?, group(reader)?);
    Configuration::joint(number, members, incoming).map_err(impossible)
}

/// The one of version 2 and before: of nobody is said which life of a directory is meant.
fn configuration_of_nodes(
    reader: &mut Reader<'_>,
    number: u64,
) -> Result<Configuration, FormatError> {
    let group = |reader: &mut Reader<'_>| -> Result<Vec<NodeId>, FormatError> {
        let count = count(reader, MAX_MEMBERS)?;
        (0..count).map(|_| reader.u64().map(NodeId)).collect()
    };
    let (nodes, incoming) = (group(reader)?, group(reader)?);
    if number != 1 || !incoming.is_empty() {
        let text = format!("membership configuration {number}, which nothing of that version made");
        return Err(impossible(text));
    }
    Configuration::unknown(&nodes).map_err(impossible)
}

pub(crate) fn history(reader: &mut Reader<'_>) -> Result<TermHistory, FormatError> {
    let count = count(reader, MAX_HISTORY)?;
    let entries = (0..count)
        .map(|_| Ok(TermStart { term: Term(reader.u64()?), lsn: Lsn(reader.u64()?) }))
        .collect::<Result<_, FormatError>>()?;
    TermHistory::new(entries).map_err(impossible)
}

fn addresses(reader: &mut Reader<'_>) -> Result<Vec<(NodeId, String)>, FormatError> {
    let count = count(reader, 2 * MAX_MEMBERS)?;
    let address = |reader: &mut Reader<'_>| {
        let node = NodeId(reader.u64()?);
        let length = usize::from(reader.u16()?);
        let text = String::from_utf8(reader.take(length)?.to_vec()).map_err(impossible)?;
        Ok((node, text))
    };
    (0..count).map(|_| address(reader)).collect()
}

#[cfg(test)]
#[path = "safekeeper_tests.rs"]
mod tests;
