//! Whose an object store is: the claim of the one cluster directory that may write it.
//!
//! A [document](crate::document) whose first line begins with "pgstrata-claim ". It is replaced by compare-and-swap
//! only, with a new token each time that the cluster is started. So a directory that holds an earlier token is a copy of
//! one that was started since, or was taken back to what it was before.

use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::document::Kind;

const KIND: Kind = Kind {
    what: "claim on an object store",
    prefix: "pgstrata-claim ",
    version: 1,
    first_version: 1,
    sealed_from: 1,
};

/// Bytes of a claim, at most: a path has 4,096, which JSON may write as 6 each, and the rest is short.
pub const LIMIT: u64 = 32 << 10;

/// Where a cluster's directory is, as far as a copy of it would differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The machine's id; empty where it has none.
    pub machine: String,
    /// Its host name, for people.
    pub host: String,
    /// The directory.
    pub path: String,
    /// Device number of its file system, which may be another one after the machine started again.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
}

impl Place {
    /// Whether what is here now can be the directory that was there: it is on the same machine, and was at most renamed
    /// in its file system, or its file system's number changed while it stayed at its path.
    fn may_be(&self, other: &Place) -> bool {
        self.machine == other.machine
            && self.inode == other.inode
            && (self.path == other.path || self.device == other.device)
    }
}

/// Who may write a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Random, and another one at every start.
    pub token: String,
    /// Where the directory was then.
    pub place: Place,
    /// When that was, RFC 3339.
    pub since: String,
    /// Inode number of the store, if that is a directory: where it is another one, the claim was copied with the store.
    #[serde(default)]
    pub store_inode: Option<u64>,
}

/// Why a directory may not write a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It holds the claim's token, but is elsewhere: it was copied, or moved to another file system or machine.
    Elsewhere,
    /// Another directory started after this one did.
    Another,
}

impl Claim {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        KIND.encode(self)
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Claim, FormatError> {
        KIND.decode(bytes)
    }

    /// Whether this claim was made in the store that it is in, as far as inode numbers tell.
    pub fn is_of(&self, store_inode: Option<u64>) -> bool {
        self.store_inode.is_none() || self.store_inode == store_inode
    }

    /// Whether a directory at `place` that holds `tokens` is the one that made this claim.
    pub fn check(&self, tokens: &[&str], place: &Place) -> Result<(), Refusal> {
        match tokens.contains(&self.token.as_str()) {
            false => Err(Refusal::Another),
            true if place.may_be(&self.place) => Ok(()),
            true => Err(Refusal::Elsewhere),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            machine: "m".into(),
            host: "h".into(),
            path: "/a/cluster".into(),
            device: 7,
            inode: 12,
        }
    }

    fn claim() -> Claim {
        Claim {
            token: "now".into(),
            place: place(),
            since: "2026-01-01T00:00:00Z".into(),
            store_inode: Some(3),
        }
    }

    #[test]
    fn round_trip_and_every_flipped_bit_is_found() {
        let bytes = claim().encode();
        assert_eq!(Claim::decode(&bytes), Ok(claim()));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                assert!(Claim::decode(&broken).is_err(), "byte {at} bit {bit}");
            }
        }
        let longest = Place { path: "\u{1}".repeat(4096), host: "x".repeat(64), ..place() };
        assert!((Claim { place: longest, ..claim() }).encode().len() as u64 <= LIMIT);
    }

    #[test]
    fn who_holds_the_token_and_is_where_it_was_is_the_same() {
        let check = |tokens: &[&str], place: &Place| claim().check(tokens, place);
        assert_eq!(check(&["before", "now"], &place()), Ok(()));
        // Renamed; and its file system mounted anew.
        assert_eq!(check(&["now"], &Place { path: "/b".into(), ..place() }), Ok(()));
        assert_eq!(check(&["now"], &Place { device: 8, ..place() }), Ok(()));
        // The name of a host may change.
        assert_eq!(check(&["now"], &Place { host: "g".into(), ..place() }), Ok(()));
    }

    #[test]
    fn a_copy_or_what_was_taken_back_is_not() {
        let check = |tokens: &[&str], place: &Place| claim().check(tokens, place);
        assert_eq!(check(&["before"], &place()), Err(Refusal::Another));
        assert_eq!(check(&[], &place()), Err(Refusal::Another));
        let elsewhere = Err(Refusal::Elsewhere);
        assert_eq!(check(&["now"], &Place { machine: "n".into(), ..place() }), elsewhere);
        assert_eq!(check(&["now"], &Place { inode: 13, ..place() }), elsewhere);
        // The roots of two file systems, one made from a snapshot of the other's.
        let mounted = Place { path: "/b".into(), device: 8, ..place() };
        assert_eq!(check(&["now"], &mounted), elsewhere);
    }
}
