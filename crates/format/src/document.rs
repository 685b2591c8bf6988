//! Text objects: one line that says what follows, and one JSON document.
//!
//! ```text
//! line 1: prefix, format version, " ", CRC-32C as 8 hexadecimal digits
//! rest:   the document
//! ```
//! The checksum is of the document; from a version on that each kind tells, of the line up to it and the document.
//! Text, because these are small, read rarely, and somebody will want to read them in an emergency.

use pgstrata_ids::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::FormatError;

/// Bytes in which the first line ends.
const LONGEST_LINE: usize = 64;

/// One kind of document.
pub(crate) struct Kind {
    /// For messages.
    pub what: &'static str,
    /// What its first line begins with, with the blank before the version.
    pub prefix: &'static str,
    /// The version that is written.
    pub version: u16,
    /// The oldest one that is read.
    pub first_version: u16,
    /// The first one whose checksum is of the version as well: another digit there would be one that is read, too.
    pub sealed_from: u16,
}

impl Kind {
    /// Refuses what another safekeeper wrote than the one whose it is by its name.
    pub(crate) fn check_node(&self, found: u64, node: NodeId) -> Result<(), FormatError> {
        match found == node.0 {
            true => Ok(()),
            false => Err(FormatError::WrongOwner {
                what: self.what,
                found: format!("safekeeper {found}"),
                expected: format!("safekeeper {node}"),
            }),
        }
    }

    pub(crate) fn encode(&self, document: &impl Serialize) -> Vec<u8> {
        // Strings, numbers and lists of them: nothing that JSON can't express.
        let body = serde_json::to_vec(document).unwrap_or_default();
        let checksum = self.checksum(self.version, &body);
        let mut bytes = format!("{}{} {checksum:08x}\n", self.prefix, self.version).into_bytes();
        bytes.extend_from_slice(&body);
        bytes
    }

    fn checksum(&self, version: u16, body: &[u8]) -> u32 {
        let before = match version >= self.sealed_from {
            true => crc32c::crc32c(format!("{}{version} ", self.prefix).as_bytes()),
            false => 0,
        };
        crc32c::crc32c_append(before, body)
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, FormatError> {
        let what = self.what;
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(FormatError::Unwritten { what });
        }
        let corrupt = |detail: &str| FormatError::corrupt(what, detail);
        let not_ours = || corrupt("its first line is not that of one");
        let end = bytes.iter().take(LONGEST_LINE).position(|&byte| byte == b'\n');
        let end = end.ok_or_else(not_ours)?;
        let (line, body) = (&bytes[..end], &bytes[end + 1..]);
        let fields = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.strip_prefix(self.prefix))
            .and_then(|rest| rest.split_once(' '))
            .ok_or_else(not_ours)?;
        let version: u16 = fields.0.parse().map_err(|_| corrupt("its version is no number"))?;
        if version > self.version {
            return Err(FormatError::NewerVersion { what, found: version, known: self.version });
        }
        if version < self.first_version || fields.0 != version.to_string() {
            return Err(corrupt("no version of pgstrata wrote its first line"));
        }
        if fields.1 != format!("{:08x}", self.checksum(version, body)) {
            return Err(corrupt("its checksum does not match"));
        }
        serde_json::from_slice(body).map_err(|error| corrupt(&error.to_string()))
    }
}
