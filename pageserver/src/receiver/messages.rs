//! What is said to a safekeeper in PostgreSQL's replication protocol, and what its errors say.

use pgstrata_ids::{Lsn, TenantId, TimelineId};
use pgstrata_wire::postgres::CONFIGURATION;

const PROTOCOL_3: u32 = 196_608;

/// A start-up packet that asks for TLS.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// The start-up packet of a page server that wants this timeline.
pub fn startup(tenant: TenantId, timeline: TimelineId) -> Vec<u8> {
    let options = format!(
        "-c pgstrata.role=pageserver -c pgstrata.tenant={tenant} -c pgstrata.timeline={timeline}"
    );
    let mut body = PROTOCOL_3.to_be_bytes().to_vec();
    for text in [
        "user",
        "pageserver",
        "replication",
        "true",
        "application_name",
        "pageserver",
        "options",
        &options,
    ] {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    [&(body.len() as u32 + 4).to_be_bytes(), &body[..]].concat()
}

/// The query that asks which configuration of the members the safekeeper knows.
pub fn show_configuration() -> Vec<u8> {
    message(b'Q', format!("SHOW {CONFIGURATION}\0").as_bytes())
}

/// The one value of a row.
pub fn single_value(body: &[u8]) -> Option<&str> {
    let (count, rest) = body.split_first_chunk::<2>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(i32::from_be_bytes(*length)).ok()?;
    let is_all = u16::from_be_bytes(*count) == 1 && rest.len() == length;
    is_all.then_some(rest).and_then(|text| std::str::from_utf8(text).ok())
}

/// The query that starts the stream.
pub fn start_replication(from: Lsn) -> Vec<u8> {
    message(b'Q', format!("START_REPLICATION PHYSICAL {from} TIMELINE 1\0").as_bytes())
}

/// A standby status update.
pub fn status(received: Lsn, flushed: Lsn) -> Vec<u8> {
    let mut body = vec![b'r'];
    for lsn in [received, flushed, flushed] {
        body.extend_from_slice(&lsn.0.to_be_bytes());
    }
    body.extend_from_slice(&[0; 9]);
    message(b'd', &body)
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// The message field of an error response.
pub fn error_text(body: &[u8]) -> String {
    error_field(body, b'M').unwrap_or_else(|| "an error without a text".into())
}

/// A field of an error response.
pub fn error_field(body: &[u8], kind: u8) -> Option<String> {
    let text = body.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(&[kind]))?;
    Some(String::from_utf8_lossy(text).into())
}
