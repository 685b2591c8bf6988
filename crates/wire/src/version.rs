//! Which version of a protocol two services speak: one agreement, by the WAL port and the page port alike.
//!
//! The first message of a connection is the client's. It is written in the lowest version that the client speaks, so that
//! every server with which it shares one can read it, and names the highest. The server takes the highest that both speak,
//! and its answer says which; everything after that, both ways, is of that version. Where there is none in common the
//! server's refusal, in the client's lowest version, names both ranges and says whom to upgrade.
//!
//! **A version is how things are said, never what they mean.** A vote, an acknowledgement and a commit LSN promise the same
//! in all versions of one range: members that were upgraded and members that were not follow one set of rules, and which
//! version a connection happens to agree on, an older one included, changes nothing in consensus. A change of a rule
//! raises the *lowest* version with the highest, and so can't be agreed on with anybody who follows the former rule.

use std::fmt;

/// A protocol's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u8);

impl fmt::Display for Version {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(to)
    }
}

/// The versions that one side speaks: all from the lowest to the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    lowest: Version,
    highest: Version,
}

impl Range {
    /// From the lowest to the highest, which is not below it; there is no version 0.
    pub const fn new(lowest: u8, highest: u8) -> Option<Range> {
        match 0 < lowest && lowest <= highest {
            true => Some(Range { lowest: Version(lowest), highest: Version(highest) }),
            false => None,
        }
    }

    /// As it crosses the network: without a highest version, which is what clients said before there were ranges, it is
    /// the lowest only.
    pub const fn offered(lowest: u8, highest: u8) -> Option<Range> {
        match highest {
            0 => Range::new(lowest, lowest),
            highest => Range::new(lowest, highest),
        }
    }

    /// The lowest.
    pub const fn lowest(self) -> Version {
        self.lowest
    }

    /// The highest.
    pub const fn highest(self) -> Version {
        self.highest
    }

    /// Whether this is one of them.
    pub fn contains(self, version: Version) -> bool {
        self.lowest <= version && version <= self.highest
    }

    /// All of them.
    pub fn all(self) -> impl Iterator<Item = Version> {
        (self.lowest.0..=self.highest.0).map(Version)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lowest == self.highest {
            true => write!(to, "version {}", self.lowest),
            false => write!(to, "versions {} to {}", self.lowest, self.highest),
        }
    }
}

/// A protocol, as this program speaks it.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// What it is called in errors.
    pub name: &'static str,
    /// Who answers.
    pub server: &'static str,
    /// What is spoken here.
    pub speaks: Range,
}

/// There is no version that both sides speak.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// The server found none.
    #[error(
        "the {client} speaks {offered} of the {protocol}, this {server} {speaks}: upgrade the {} first",
        if offered.lowest() > speaks.highest() { server } else { client }
    )]
    Apart {
        /// Which protocol.
        protocol: &'static str,
        /// Who asks.
        client: &'static str,
        /// What it speaks.
        offered: Range,
        /// Who is asked.
        server: &'static str,
        /// What is spoken here.
        speaks: Range,
    },
    /// The server answered in one that it was not offered.
    #[error(
        "the {server} answers in version {answered} of the {protocol}, which was not offered: this side speaks {speaks}"
    )]
    NotOffered {
        /// Which protocol.
        protocol: &'static str,
        /// Who answered.
        server: &'static str,
        /// In which version.
        answered: Version,
        /// What is spoken here.
        speaks: Range,
    },
}

impl Protocol {
    /// Server: the version to speak with a `client` that offers these, the highest that both speak.
    pub fn agree(&self, client: &'static str, offered: Range) -> Result<Version, VersionError> {
        let (protocol, server, speaks) = (self.name, self.server, self.speaks);
        let highest = offered.highest.min(speaks.highest);
        match offered.contains(highest) && speaks.contains(highest) {
            true => Ok(highest),
            false => Err(VersionError::Apart { protocol, client, offered, server, speaks }),
        }
    }

    /// Client: the version that a server answered in, if it is one that was offered.
    pub fn answered(&self, answered: Version) -> Result<Version, VersionError> {
        let (protocol, server, speaks) = (self.name, self.server, self.speaks);
        match speaks.contains(answered) {
            true => Ok(answered),
            false => Err(VersionError::NotOffered { protocol, server, answered, speaks }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn protocol(lowest: u8, highest: u8) -> Protocol {
        let speaks = Range::new(lowest, highest).unwrap();
        Protocol { name: "WAL protocol", server: "safekeeper", speaks }
    }

    fn range() -> impl Strategy<Value = Range> {
        (1u8..=255, 1u8..=255)
            .prop_map(|(one, other)| Range::new(one.min(other), one.max(other)).unwrap())
    }

    proptest! {
        #[test]
        fn the_highest_that_both_speak_is_agreed_on(ours in range(), offered in range()) {
            let server = Protocol { speaks: ours, ..protocol(1, 1) };
            // By looking at all.
            let expected = (0..=255).map(Version).rfind(|&v| ours.contains(v) && offered.contains(v));
            let agreed = server.agree("compute", offered);
            prop_assert_eq!(agreed.as_ref().ok().copied(), expected);
            // It does not matter who asks.
            let other = Protocol { speaks: offered, ..server };
            prop_assert_eq!(other.agree("compute", ours).ok(), expected);
            match agreed {
                Ok(version) => prop_assert_eq!(other.answered(version), Ok(version)),
                Err(error) => {
                    let text = error.to_string();
                    prop_assert_eq!(text.lines().count(), 1);
                    prop_assert!(text.contains(&ours.to_string()) && text.contains(&offered.to_string()));
                }
            }
        }

        #[test]
        fn any_two_bytes_are_a_range_or_refused(lowest: u8, highest: u8) {
            match Range::offered(lowest, highest) {
                Some(range) => {
                    prop_assert!(range.all().all(|version| range.contains(version)));
                    prop_assert_eq!(range.all().next(), Some(Version(lowest)));
                    let last = if highest == 0 { lowest } else { highest };
                    prop_assert_eq!(range.all().last(), Some(Version(last)));
                }
                None => prop_assert!(lowest == 0 || (highest != 0 && highest < lowest)),
            }
        }
    }

    #[test]
    fn who_is_behind_is_told_apart() {
        let text = |server: Protocol, lowest, highest| {
            server.agree("compute", Range::new(lowest, highest).unwrap()).unwrap_err().to_string()
        };
        assert_eq!(
            text(protocol(1, 2), 3, 4),
            "the compute speaks versions 3 to 4 of the WAL protocol, this safekeeper versions 1 to 2: upgrade the safekeeper first"
        );
        assert_eq!(
            text(protocol(3, 4), 2, 2),
            "the compute speaks version 2 of the WAL protocol, this safekeeper versions 3 to 4: upgrade the compute first"
        );
        assert_eq!(
            protocol(2, 3).answered(Version(4)).unwrap_err().to_string(),
            "the safekeeper answers in version 4 of the WAL protocol, which was not offered: this side speaks versions 2 to 3"
        );
    }
}
