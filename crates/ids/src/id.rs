//! Names of tenants, timelines, nodes, terms and generations.

use std::fmt;
use std::str::FromStr;

/// The text was not an identifier of the kind asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdError {
    /// What was expected, for the message.
    pub expected: &'static str,
    /// What came instead.
    pub text: String,
}

impl fmt::Display for IdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' is not {}", self.text, self.expected)
    }
}

impl std::error::Error for IdError {}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<$name, IdError> {
                parse_hex(text)
                    .map($name)
                    .ok_or_else(|| IdError { expected: $expected, text: text.to_owned() })
            }
        }
    };
}

hex_id!(
    /// One PostgreSQL cluster (system identifier) and all its branches. 32 hexadecimal digits.
    TenantId,
    "a tenant id (32 hexadecimal digits)"
);
hex_id!(
    /// One branch's WAL history. 32 hexadecimal digits. Not PostgreSQL's timeline number, which
    /// stays the same on every branch.
    TimelineId,
    "a timeline id (32 hexadecimal digits)"
);

hex_id!(
    /// One life of a safekeeper's directory: random, made with it. A directory that was lost and
    /// made again has another one, and has forgotten what it promised. 32 hexadecimal digits.
    Incarnation,
    "an incarnation (32 hexadecimal digits)"
);

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(bytes)
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// A proposer's ballot number: at most one proposer wins a term.
    Term
);
number!(
    /// A safekeeper or page server. A safekeeper that lost its disk gets a new one.
    NodeId
);
number!(
    /// Which incarnation of a page server wrote an object; issued once each, increasing.
    Generation
);
number!(
    /// PostgreSQL's database system identifier, from `pg_control`.
    SystemId
);

/// A member of a timeline's quorum: a safekeeper, in one life of its directory. What the same node promised and stored in
/// another life is no word of this member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Which safekeeper.
    pub node: NodeId,
    /// Which life of its directory.
    pub incarnation: Incarnation,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.node, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_ids_round_trip() {
        let id = TenantId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xa, 0xb, 0xc, 0xd, 0xe, 0xff]);
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn malformed_ids_are_refused() {
        for text in
            ["", "00", "zz0102030405060708090a0b0c0d0eff", "+00102030405060708090a0b0c0d0eff"]
        {
            assert!(text.parse::<TimelineId>().is_err(), "{text:?}");
        }
    }
}
