//! Messages of a client, after the startup packet.

use std::fmt;

use pgstrata_ids::Lsn;

use crate::DecodeError;
use crate::field::Fields;

/// Longest message that is taken from a client, in bytes: commands and status updates are short.
pub const MAX_MESSAGE: usize = 64 << 10;

/// What a client says.
#[derive(Clone, PartialEq, Eq)]
pub enum Frontend {
    /// A command.
    Query(String),
    /// How far it is.
    Status(StandbyStatus),
    /// Something else inside the copy; ignored by senders of WAL.
    CopyData,
    /// It wants no more.
    CopyDone,
    /// It gives up.
    CopyFail,
    /// It leaves.
    Terminate,
    /// What it was asked for.
    Password(String),
    /// A message of the extended protocol: not for replication.
    Unsupported(u8),
}

/// Without the password.
impl fmt::Debug for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Frontend::Query(text) => f.debug_tuple("Query").field(text).finish(),
            Frontend::Status(status) => f.debug_tuple("Status").field(status).finish(),
            Frontend::CopyData => f.write_str("CopyData"),
            Frontend::CopyDone => f.write_str("CopyDone"),
            Frontend::CopyFail => f.write_str("CopyFail"),
            Frontend::Terminate => f.write_str("Terminate"),
            Frontend::Password(_) => f.write_str("Password"),
            Frontend::Unsupported(kind) => f.debug_tuple("Unsupported").field(kind).finish(),
        }
    }
}

/// A standby status update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Received and written up to here.
    pub write_lsn: Lsn,
    /// Durable up to here.
    pub flush_lsn: Lsn,
    /// Applied up to here.
    pub apply_lsn: Lsn,
    /// True if it wants an answer at once.
    pub reply_requested: bool,
}

/// Takes the first message off `buffer`: the message and its size. `None` if more is needed.
pub fn split(buffer: &[u8]) -> Result<Option<(Frontend, usize)>, DecodeError> {
    let [kind, a, b, c, d, rest @ ..] = buffer else { return Ok(None) };
    let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
    if !(4..=MAX_MESSAGE).contains(&length) {
        return Err(DecodeError::Impossible("message length"));
    }
    let Some(body) = rest.get(..length - 4) else { return Ok(None) };
    Ok(Some((decode(*kind, body)?, length + 1)))
}

fn decode(kind: u8, body: &[u8]) -> Result<Frontend, DecodeError> {
    match kind {
        b'Q' => {
            let text = body.split(|&byte| byte == 0).next().unwrap_or_default();
            let text = std::str::from_utf8(text).map_err(|_| DecodeError::Impossible("query"))?;
            Ok(Frontend::Query(text.to_owned()))
        }
        b'd' if body.first() == Some(&b'r') => Ok(Frontend::Status(status(&body[1..])?)),
        b'd' => Ok(Frontend::CopyData),
        b'c' => Ok(Frontend::CopyDone),
        b'f' => Ok(Frontend::CopyFail),
        b'X' => Ok(Frontend::Terminate),
        b'p' => {
            let password = body.strip_suffix(&[0]).unwrap_or(body);
            let password = std::str::from_utf8(password);
            let password = password.map_err(|_| DecodeError::Impossible("password"))?;
            Ok(Frontend::Password(password.to_owned()))
        }
        other => Ok(Frontend::Unsupported(other)),
    }
}

fn status(body: &[u8]) -> Result<StandbyStatus, DecodeError> {
    let mut fields = Fields(body);
    let mut lsn = || fields.array("status update").map(|bytes| Lsn(u64::from_be_bytes(bytes)));
    let (write_lsn, flush_lsn, apply_lsn) = (lsn()?, lsn()?, lsn()?);
    lsn()?;
    let reply_requested = fields.u8("status update")? != 0;
    Ok(StandbyStatus { write_lsn, flush_lsn, apply_lsn, reply_requested })
}
