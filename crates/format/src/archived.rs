//! What an object of archived WAL says of itself.
//!
//! An object is one zstd frame of WAL. Before it stands what it is, in a frame that zstd skips, so that `zstd -d` gives the WAL
//! and nothing else. Objects of older versions have none, and that of a full segment is read without it.
//!
//! ```text
//! offset  size  field
//!      0     4  magic of a frame that is skipped: 0x184D2A57
//!      4     4  length of what follows
//!      8     8  magic: "pgsWALex"
//!     16     2  format version: 1
//!     18     2  reserved, 0
//!     20     4  length of the body in bytes
//!     24     4  CRC-32C of the body
//!     28     4  CRC-32C of bytes 8..28
//!     32     8  LSN of the first byte of WAL
//!     40     8  end of the last record that is whole in what is archived up to there
//!     48     8  start of that record, 0 if it is not known
//!     56     8  number of the newest configuration that its writer knew
//!     64     4  number of term history entries, then 16 bytes each: term, LSN
//! ```
//!
//! All integers are little endian. The history is that of the log up to that end, all of which is committed: whoever has lost
//! everything else can go on from there. By the configuration it is told apart what is of members that were given up.

use pgstrata_ids::Lsn;
use pgstrata_quorum::{MAX_HISTORY, TermHistory};

use crate::FormatError;
use crate::safekeeper::{Kind, history};

const EXTENT: Kind = Kind { what: "archived WAL's own frame", magic: *b"pgsWALex", version: 1 };

const SKIPPED: [u8; 4] = 0x184D_2A57_u32.to_le_bytes();

/// Most bytes of one, with the frame around it.
pub const MAX_SIZE: u64 = 68 + 16 * MAX_HISTORY as u64;

/// What an object of archived WAL says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first byte.
    pub from: Lsn,
    /// End of the last whole record up to the object's end; before `from` if none ends in it.
    pub boundary: Lsn,
    /// Where that record starts, if that is known.
    pub last_record: Option<Lsn>,
    /// Number of the newest configuration that its writer knew.
    pub configuration: u64,
    /// Which term wrote which byte before the boundary.
    pub history: TermHistory,
}

impl Extent {
    /// The bytes that stand before the WAL.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(36 + 16 * self.history.entries().len());
        for lsn in [self.from, self.boundary, self.last_record.unwrap_or_default()] {
            body.extend_from_slice(&lsn.0.to_le_bytes());
        }
        body.extend_from_slice(&self.configuration.to_le_bytes());
        body.extend_from_slice(&(self.history.entries().len() as u32).to_le_bytes());
        for entry in self.history.entries() {
            body.extend_from_slice(&entry.term.0.to_le_bytes());
            body.extend_from_slice(&entry.lsn.0.to_le_bytes());
        }
        let inside = EXTENT.encode(&body);
        let mut out = SKIPPED.to_vec();
        out.extend_from_slice(&(inside.len() as u32).to_le_bytes());
        out.extend_from_slice(&inside);
        out
    }

    /// What an object begins with; `None` if that is WAL right away.
    pub fn decode(object: &[u8]) -> Result<Option<Extent>, FormatError> {
        let Some(rest) = object.strip_prefix(&SKIPPED) else { return Ok(None) };
        let torn = || FormatError::torn(EXTENT.what, format!("{} bytes", object.len()));
        let (length, rest) = rest.split_first_chunk().ok_or_else(torn)?;
        let length = u32::from_le_bytes(*length) as usize;
        let inside = rest.get(..length).ok_or_else(torn)?;
        let (_, mut reader) = EXTENT.open(inside)?;
        let (from, boundary) = (Lsn(reader.u64()?), Lsn(reader.u64()?));
        let last_record = Some(reader.u64()?).filter(|&lsn| lsn > 0).map(Lsn);
        let configuration = reader.u64()?;
        let history = history(&mut reader)?;
        let extent = Extent { from, boundary, last_record, configuration, history };
        EXTENT.end(&reader)?;
        if length as u64 != 60 + 16 * extent.history.entries().len() as u64 {
            return Err(FormatError::corrupt(EXTENT.what, "it is longer than it says"));
        }
        extent.check().map(Some)
    }

    fn check(self) -> Result<Extent, FormatError> {
        let impossible = |text: &str| Err(FormatError::corrupt(EXTENT.what, text));
        if self.last_record.is_some_and(|start| start >= self.boundary) {
            return impossible("its last record begins after its end");
        }
        match self.history.last() {
            Some(last) if last.lsn > self.boundary => {
                impossible("a term begins after the end of the log")
            }
            Some(_) => Ok(self),
            None => impossible("no term wrote it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::Term;
    use pgstrata_quorum::TermStart;
    use proptest::prelude::*;

    use super::*;

    fn extent() -> Extent {
        let entry = |term, lsn| TermStart { term: Term(term), lsn: Lsn(lsn) };
        Extent {
            from: Lsn(0x100_0000),
            boundary: Lsn(0x100_2000),
            last_record: Some(Lsn(0x100_1fd0)),
            configuration: 3,
            history: TermHistory::new(vec![entry(1, 0x100_0028), entry(4, 0x100_1000)]).unwrap(),
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = extent().encode();
        assert_eq!(bytes.len(), 100);
        assert_eq!(bytes[..20], *b"\x57\x2a\x4d\x18\x5c\0\0\0pgsWALex\x01\0\0\0");
        assert_eq!(bytes[32..68], {
            let lsns = [0x100_0000u64, 0x100_2000, 0x100_1fd0, 3].map(u64::to_le_bytes);
            [lsns.concat(), 2u32.to_le_bytes().to_vec()].concat()
        });
        assert_eq!(Extent::decode(&bytes), Ok(Some(extent())));
    }

    #[test]
    fn what_follows_is_not_looked_at_and_every_flipped_bit_is_found() {
        let bytes = [extent().encode(), b"WAL".to_vec()].concat();
        assert_eq!(Extent::decode(&bytes), Ok(Some(extent())));
        for at in 0..bytes.len() - 3 {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                // What does not begin as such a frame is WAL of an older version.
                let read = Extent::decode(&broken);
                assert!(read.is_err() || (at < 4 && read == Ok(None)), "byte {at} bit {bit}");
            }
            assert!(at < 4 || Extent::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let none = Extent { history: TermHistory::default(), ..extent() };
        let late = Extent { boundary: Lsn(0x100_0fff), last_record: None, ..extent() };
        let turned = Extent { last_record: Some(extent().boundary), ..extent() };
        for extent in [none, late, turned] {
            assert!(Extent::decode(&extent.encode()).is_err(), "{extent:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Extent::decode(&bytes);
            let _ = Extent::decode(&[&SKIPPED[..], &bytes].concat());
        }
    }
}
