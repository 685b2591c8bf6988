//! Requests and answers of the services' HTTP interfaces: JSON, a module for each service. Fields may be added, in answers
//! and requests alike: whoever reads those of an older program finds a default, and an older program ignores what it does
//! not know. `versions.rs` has what each of them was when it was first released.

pub mod compute;
pub mod pageserver;
pub mod safekeeper;
#[cfg(test)]
mod versions;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a request failed, for programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// What it is about is not there. Status 404.
    NotFound,
    /// It does not fit what is there. Status 409.
    Conflict,
    /// It is not one that can be answered, whatever is there. Status 400.
    Invalid,
    /// It may be answered later. Status 503.
    Busy,
    /// There is no room for what it brings. Status 507.
    Full,
    /// It does not show whose it is, by a certificate or a token that is good. Status 401.
    Unauthenticated,
    /// Whose it is may not make it. Status 403.
    Forbidden,
    /// Anything else; the service's log may have more. Status 500.
    Failed,
    /// One that this program does not know.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Code {
    /// The status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Code::NotFound => 404,
            Code::Conflict => 409,
            Code::Invalid => 400,
            Code::Busy => 503,
            Code::Full => 507,
            Code::Unauthenticated => 401,
            Code::Forbidden => 403,
            Code::Failed | Code::Unknown => 500,
        }
    }

    /// What it says, for the documents of the interfaces.
    pub fn meaning(self) -> &'static str {
        match self {
            Code::NotFound => "What it is about is not there.",
            Code::Conflict => "It does not fit what is there.",
            Code::Invalid => "It is not one that can be answered, whatever is there.",
            Code::Busy => "It may be answered later.",
            Code::Full => "There is no room for what it brings.",
            Code::Unauthenticated => "It does not show whose it is.",
            Code::Forbidden => "Whose it is may not make it.",
            Code::Failed | Code::Unknown => "Something failed; the service's log may have more.",
        }
    }
}

/// The body of every answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// For programs.
    #[serde(default)]
    pub code: Code,
    /// For people, one line.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_other_versions_are_read() {
        let read = |text: &str| serde_json::from_str::<Failure>(text).unwrap();
        assert_eq!(read(r#"{"error":"no"}"#).code, Code::Unknown);
        assert_eq!(read(r#"{"code":"of_tomorrow","error":"no"}"#).code, Code::Unknown);
        let failure = Failure { code: Code::NotFound, error: "no".into() };
        let text = serde_json::to_string(&failure).unwrap();
        assert_eq!(text, r#"{"code":"not_found","error":"no"}"#);
        assert_eq!(read(&text), failure);
    }
}
