//! Roles, and the URIs that certificates name them by.

use std::fmt;
use std::str::FromStr;

use pgstrata_ids::{NodeId, TenantId};

/// Longest name of a page server, broker or administrator, in bytes.
pub const MAX_NAME: usize = 63;

/// No URI of a role is longer, in bytes.
const MAX_URI: usize = 128;

const SCHEME: &str = "pgstrata://";

/// Who somebody is. See the table in `docs/adr/0005-across-machines.md` for what each may do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The safekeeper of this node id.
    Safekeeper(NodeId),
    /// A page server, by name.
    Pageserver(String),
    /// A broker, by name.
    Broker(String),
    /// Any compute of a tenant.
    Compute(TenantId),
    /// A person or a tool that may do everything.
    Admin(String),
}

/// A role without its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// See [`Role::Safekeeper`].
    Safekeeper,
    /// See [`Role::Pageserver`].
    Pageserver,
    /// See [`Role::Broker`].
    Broker,
    /// See [`Role::Compute`].
    Compute,
    /// See [`Role::Admin`].
    Admin,
}

/// A text that is no role; says which, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0)]
pub struct RoleError(String);

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 5] =
        [Kind::Safekeeper, Kind::Pageserver, Kind::Broker, Kind::Compute, Kind::Admin];

    fn as_str(self) -> &'static str {
        match self {
            Kind::Safekeeper => "safekeeper",
            Kind::Pageserver => "pageserver",
            Kind::Broker => "broker",
            Kind::Compute => "compute",
            Kind::Admin => "admin",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Kind, RoleError> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            RoleError(format!(
                "{} is no role: expected safekeeper, pageserver, broker, compute or admin",
                quoted(text)
            ))
        })
    }
}

/// A text of somebody else's, for a message: escaped, and not too long.
pub(crate) fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_URI).collect();
    let more = if short.len() < text.len() { "..." } else { "" };
    format!("'{}{more}'", short.escape_debug())
}

/// Names are also names of files and parts of URIs: none that is let through is empty, hidden, or means something there.
pub(crate) fn is_name(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && text.len() <= MAX_NAME && text.chars().all(valid)
}

impl Role {
    /// A role by its kind and name: a node id, a tenant id, or what somebody is called.
    pub fn named(kind: Kind, name: &str) -> Result<Role, RoleError> {
        let wrong = |expected: &str| {
            RoleError(format!("{} is no {kind}'s name: expected {expected}", quoted(name)))
        };
        let free = || match is_name(name) {
            true => Ok(name.to_owned()),
            false => Err(wrong(&format!(
                "letters, digits, '-', '_' and '.', at most {MAX_NAME}, a letter or digit first"
            ))),
        };
        let role = match kind {
            Kind::Safekeeper => {
                let node = name.parse().map_err(|_| wrong("its node id, such as 3"))?;
                Role::Safekeeper(NodeId(node))
            }
            Kind::Pageserver => Role::Pageserver(free()?),
            Kind::Broker => Role::Broker(free()?),
            Kind::Compute => {
                let expected = "its tenant's id, 32 hexadecimal digits";
                Role::Compute(name.parse().map_err(|_| wrong(expected))?)
            }
            Kind::Admin => Role::Admin(free()?),
        };
        // One role has one text: `+3`, `03` and capital digits are none.
        match role.name() == name {
            true => Ok(role),
            false => Err(wrong(&format!("'{}'", role.name()))),
        }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Role::Safekeeper(_) => Kind::Safekeeper,
            Role::Pageserver(_) => Kind::Pageserver,
            Role::Broker(_) => Kind::Broker,
            Role::Compute(_) => Kind::Compute,
            Role::Admin(_) => Kind::Admin,
        }
    }

    /// Its name: what stands last in its URI.
    pub fn name(&self) -> String {
        match self {
            Role::Safekeeper(node) => node.to_string(),
            Role::Compute(tenant) => tenant.to_string(),
            Role::Pageserver(name) | Role::Broker(name) | Role::Admin(name) => name.clone(),
        }
    }
}

/// The URI, such as `pgstrata://safekeeper/3`.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.kind(), self.name())
    }
}

impl FromStr for Role {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Role, RoleError> {
        let wrong = |why: &str| {
            RoleError(format!(
                "{} is no role's URI, such as pgstrata://safekeeper/3: {why}",
                quoted(text)
            ))
        };
        if text.len() > MAX_URI {
            return Err(wrong("it is too long"));
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| wrong("it begins otherwise"))?;
        let (kind, name) = rest.split_once('/').ok_or_else(|| wrong("it has no name"))?;
        let kind = kind.parse().map_err(|error: RoleError| wrong(&error.0))?;
        Role::named(kind, name).map_err(|error| wrong(&error.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_role() -> impl Strategy<Value = Role> {
        let name = "[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}";
        prop_oneof![
            any::<u64>().prop_map(|id| Role::Safekeeper(NodeId(id))),
            name.prop_map(Role::Pageserver),
            name.prop_map(Role::Broker),
            any::<[u8; 16]>().prop_map(|id| Role::Compute(TenantId(id))),
            name.prop_map(Role::Admin),
        ]
    }

    proptest! {
        #[test]
        fn roles_round_trip(role in any_role()) {
            prop_assert_eq!(role.to_string().parse::<Role>(), Ok(role.clone()));
            prop_assert_eq!(Role::named(role.kind(), &role.name()), Ok(role));
        }

        #[test]
        fn any_text_is_a_role_with_this_very_uri_or_none(
            text in prop_oneof![
                any::<String>(),
                "(pgstrata://)?(safekeeper|pageserver|broker|compute|admin|x)?/?.{0,40}",
                "pgstrata://(safekeeper|compute)/[+0-9a-fA-F]{1,33}",
            ]
        ) {
            match text.parse::<Role>() {
                Ok(role) => prop_assert_eq!(role.to_string(), text),
                Err(error) => {
                    let said = error.to_string();
                    prop_assert!(said.len() < 4000 && !said.contains('\n'), "{}", said);
                }
            }
        }
    }

    #[test]
    fn what_is_no_role() {
        for bad in [
            "",
            "pgstrata://",
            "pgstrata://safekeeper",
            "pgstrata://safekeeper/",
            "pgstrata://safekeeper/03",
            "pgstrata://safekeeper/+3",
            "pgstrata://safekeeper/18446744073709551616",
            "pgstrata://Safekeeper/3",
            "PGSTRATA://safekeeper/3",
            "pgstrata://safekeeper/3/",
            "pgstrata://compute/AA0102030405060708090a0b0c0d0eff",
            "pgstrata://compute/aa",
            "pgstrata://pageserver/..",
            "pgstrata://pageserver/a/b",
            "pgstrata://pageserver/a b",
            "pgstrata://broker/é",
            "pgstrata://admin/-x",
            " pgstrata://admin/x",
            "spiffe://safekeeper/3",
        ] {
            let error = bad.parse::<Role>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{bad}'")), "{error}");
        }
        let long = format!("pgstrata://admin/{}", "x".repeat(MAX_NAME + 1));
        assert!(long.parse::<Role>().is_err());
        let error = "pgstrata://admin/a\nb\u{7}".parse::<Role>().unwrap_err().to_string();
        assert!(error.contains(r"a\nb\u{7}"), "{error}");
    }
}
