//! Why stored bytes were refused.

/// Stored bytes that can't be used. `what` names the kind and place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Nothing was ever written here (all zero, or empty).
    #[error("{what} is empty: it was never written")]
    Unwritten {
        /// Kind of file.
        what: &'static str,
    },
    /// The end is missing: the writer died, or the file was cut.
    #[error("{what} is cut short: {detail}")]
    Torn {
        /// Kind of file.
        what: &'static str,
        /// What was found.
        detail: String,
    },
    /// The bytes are not what was written.
    #[error("{what} is corrupt: {detail}")]
    Corrupt {
        /// Kind of file.
        what: &'static str,
        /// What did not match, and where.
        detail: String,
    },
    /// Written by a later version of pgstrata.
    #[error("{what} has format version {found}, and this pgstrata knows up to {known}: upgrade it")]
    NewerVersion {
        /// Kind of file.
        what: &'static str,
        /// Version in the file.
        found: u16,
        /// Latest version that this code reads.
        known: u16,
    },
    /// It belongs to someone else.
    #[error("{what} belongs to {found}, not to {expected}")]
    WrongOwner {
        /// Kind of file.
        what: &'static str,
        /// Owner in the file.
        found: String,
        /// Owner asked for.
        expected: String,
    },
}

impl FormatError {
    pub(crate) fn corrupt(what: &'static str, detail: impl Into<String>) -> FormatError {
        FormatError::Corrupt { what, detail: detail.into() }
    }

    pub(crate) fn torn(what: &'static str, detail: impl Into<String>) -> FormatError {
        FormatError::Torn { what, detail: detail.into() }
    }
}
