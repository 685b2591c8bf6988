//! Ids and LSNs travel as text in JSON, as people read them: for `#[serde(with = "...")]`.
//!
//! What their text looks like is in [`form`].

use std::fmt::Display;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

/// Writes a value as its text.
pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Reads it back.
pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr,
    T::Err: Display,
    D: Deserializer<'de>,
{
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

/// The same of what may be null.
pub mod optional {
    use super::{Deserialize, Deserializer, Display, Error, FromStr, Serializer};

    /// Writes a value as its text, or null.
    pub fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    /// Reads it back.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

/// How such texts look, in the documents of the HTTP interfaces: for `#[schemars(with = "...")]`.
pub mod form {
    use std::borrow::Cow;

    use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

    macro_rules! form {
        ($(#[$doc:meta])* $name:ident, $schema:tt) => {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            pub struct $name;

            impl JsonSchema for $name {
                fn schema_name() -> Cow<'static, str> {
                    stringify!($name).into()
                }

                fn json_schema(_: &mut SchemaGenerator) -> Schema {
                    json_schema!($schema)
                }
            }
        };
    }

    form!(
        /// [`pgstrata_ids::Lsn`].
        Lsn,
        {
            "description": "A position in the WAL, as PostgreSQL prints it.",
            "type": "string",
            "pattern": "^[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}$",
            "examples": ["0/1A2B3C8"]
        }
    );
    form!(
        /// Any id of 128 bits: [`pgstrata_ids::TenantId`], [`pgstrata_ids::TimelineId`].
        Id,
        {
            "description": "An id: 32 hexadecimal digits.",
            "type": "string",
            "pattern": "^[0-9A-Fa-f]{32}$",
            "examples": ["0123456789abcdef0123456789abcdef"]
        }
    );
    form!(
        /// A name that a branch can get: [`pgstrata_ids::check_branch_name`].
        BranchName,
        {
            "description": "A branch's name. None has '..' in it, and no part between two '/' is empty.",
            "type": "string",
            "pattern": "^[0-9A-Za-z][0-9A-Za-z._/-]{0,99}$",
            "examples": ["main"]
        }
    );
    form!(
        /// A relation's fork: numbers of 32 bits.
        Relation,
        {
            "description": "TABLESPACE/DATABASE/RELATION[.fork].",
            "type": "string",
            "pattern": "^[0-9]{1,10}/[0-9]{1,10}/[0-9]{1,10}([._](main|fsm|vm|init))?$",
            "examples": ["1663/5/16384.vm"]
        }
    );
    form!(
        /// A time, as RFC 3339 has it.
        Time,
        {
            "description": "A time, as RFC 3339 has it.",
            "type": "string",
            "format": "date-time",
            "examples": ["2026-01-31T12:00:00Z"]
        }
    );
}
