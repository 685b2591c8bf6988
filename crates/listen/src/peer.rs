//! Who is at the other end of a connection, and what he may do: one table for all ports. `docs/security.md` has it for
//! people, and a test compares the two.

use std::fmt;

use pgstrata_identity::{Role, Scope};
use pgstrata_ids::{NodeId, TenantId};

/// Who somebody is, as far as he has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Somebody on this machine, where nobody has to show who he is: on loopback, without TLS.
    Local,
    /// By his certificate.
    Certified(Role),
    /// By his token.
    Bearer(Scope),
    /// Nobody: TLS, without a certificate, and no token yet.
    Unknown,
}

/// What somebody may want. Those with a tenant are about what is that one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Learn whether a service is well.
    SeeHealth,
    /// See what a service does: its status, metrics.
    SeeService,
    /// Hear from the broker where services are.
    SeeNodes,
    /// Tell the broker where this safekeeper is, and how far.
    PublishSafekeeper(NodeId),
    /// The same for a page server.
    PublishPageserver,
    /// Be a compute to a safekeeper: ask for votes, append WAL.
    AppendWal(TenantId),
    /// Change who the members of timelines are.
    ChangeMembers,
    /// Read WAL of a safekeeper by its WAL port.
    ReadWal(TenantId),
    /// Follow committed WAL by PostgreSQL's protocol.
    FollowWal(TenantId),
    /// Tell a safekeeper what of it is in object storage.
    NoteIngested,
    /// Read pages by the page service.
    ReadPages(TenantId),
    /// See a branch: its row, its layers, its skeleton, single pages.
    SeeBranch(TenantId),
    /// Make, change or delete branches.
    ChangeBranch(TenantId),
    /// Take a base backup.
    TakeBackup(TenantId),
}

impl Peer {
    /// Whether he has anything to publish, as whichever safekeeper or page server.
    pub fn is_publisher(&self) -> bool {
        match self {
            Peer::Local => true,
            Peer::Certified(role) => matches!(role, Role::Safekeeper(_) | Role::Pageserver(_)),
            _ => false,
        }
    }

    /// Whether he may do that.
    pub fn may(&self, deed: Deed) -> bool {
        use Deed::*;
        match self {
            Peer::Local => true,
            Peer::Unknown => false,
            _ if deed == SeeHealth => true,
            Peer::Certified(Role::Safekeeper(own)) => match deed {
                PublishSafekeeper(node) => node == *own,
                // Votes and appends: an election where no compute is there to end a change of members.
                AppendWal(_) | ReadWal(_) | SeeService | SeeNodes => true,
                _ => false,
            },
            Peer::Certified(Role::Pageserver(_)) => matches!(
                deed,
                FollowWal(_) | NoteIngested | SeeService | SeeNodes | PublishPageserver
            ),
            Peer::Certified(Role::Broker(_)) => false,
            Peer::Certified(Role::Compute(own)) => match deed {
                AppendWal(tenant) | ReadWal(tenant) | FollowWal(tenant) | ReadPages(tenant)
                | SeeBranch(tenant) => tenant == *own,
                SeeNodes => true,
                _ => false,
            },
            // A person who votes or appends would be a compute that nobody fences.
            Peer::Certified(Role::Admin(_)) => matches!(
                deed,
                ReadWal(_)
                    | FollowWal(_)
                    | ChangeMembers
                    | SeeService
                    | SeeNodes
                    | SeeBranch(_)
                    | ChangeBranch(_)
                    | TakeBackup(_)
            ),
            Peer::Bearer(Scope::Admin) => matches!(
                deed,
                FollowWal(_)
                    | ChangeMembers
                    | SeeService
                    | SeeNodes
                    | SeeBranch(_)
                    | ChangeBranch(_)
                    | TakeBackup(_)
            ),
            Peer::Bearer(Scope::Read) => {
                matches!(deed, FollowWal(_) | SeeService | SeeNodes | SeeBranch(_) | TakeBackup(_))
            }
            Peer::Bearer(Scope::Tenant(own)) => match deed {
                FollowWal(tenant) | SeeBranch(tenant) | ChangeBranch(tenant)
                | TakeBackup(tenant) => tenant == *own,
                _ => false,
            },
        }
    }

    /// Refuses what he may not do, in words that name both.
    pub fn check(&self, deed: Deed) -> Result<(), Forbidden> {
        match self.may(deed) {
            true => Ok(()),
            false => Err(Forbidden { peer: self.clone(), deed }),
        }
    }

    /// The only tenant whose things he may see, if it is only one.
    pub fn only_tenant(&self) -> Option<TenantId> {
        match self {
            Peer::Certified(Role::Compute(tenant)) | Peer::Bearer(Scope::Tenant(tenant)) => {
                Some(*tenant)
            }
            _ => None,
        }
    }
}

/// As messages name him; nothing of his token but its scope.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local => f.write_str("a program on this machine"),
            Peer::Certified(role) => write!(f, "the certificate {role}"),
            Peer::Bearer(scope) => write!(f, "a token of scope {scope}"),
            Peer::Unknown => f.write_str("who shows neither a certificate nor a token"),
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Deed::SeeHealth => f.write_str("see whether this service is well"),
            Deed::SeeService => f.write_str("see what this service does"),
            Deed::SeeNodes => f.write_str("see where services are"),
            Deed::PublishSafekeeper(node) => write!(f, "speak for safekeeper {node}"),
            Deed::PublishPageserver => f.write_str("speak for a page server"),
            Deed::ChangeMembers => f.write_str("change who keeps WAL"),
            Deed::AppendWal(tenant) => write!(f, "be a compute of tenant {tenant}"),
            Deed::ReadWal(tenant) => write!(f, "read WAL of tenant {tenant} here"),
            Deed::FollowWal(tenant) => write!(f, "follow WAL of tenant {tenant}"),
            Deed::NoteIngested => f.write_str("speak for a page server"),
            Deed::ReadPages(tenant) => write!(f, "read pages of tenant {tenant} here"),
            Deed::SeeBranch(tenant) => write!(f, "see branches of tenant {tenant}"),
            Deed::ChangeBranch(tenant) => write!(f, "change branches of tenant {tenant}"),
            Deed::TakeBackup(tenant) => write!(f, "take a backup of tenant {tenant}"),
        }
    }
}

/// Somebody may not do that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forbidden {
    peer: Peer,
    deed: Deed,
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} may not {}", self.peer, self.deed)
    }
}

impl std::error::Error for Forbidden {}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TenantId = TenantId([0x11; 16]);
    const OTHER: TenantId = TenantId([0x22; 16]);

    /// Every deed, the name of its row, and the peers, by their columns, who may.
    const ROWS: [(&str, Deed); 14] = [
        ("learn whether it is well", Deed::SeeHealth),
        ("status, metrics", Deed::SeeService),
        ("where services are", Deed::SeeNodes),
        ("publish as safekeeper 3", Deed::PublishSafekeeper(NodeId(3))),
        ("publish as a page server", Deed::PublishPageserver),
        ("vote, append", Deed::AppendWal(T)),
        ("change members", Deed::ChangeMembers),
        ("read WAL", Deed::ReadWal(T)),
        ("follow WAL", Deed::FollowWal(T)),
        ("say what is ingested", Deed::NoteIngested),
        ("read pages", Deed::ReadPages(T)),
        ("see branches", Deed::SeeBranch(T)),
        ("change branches", Deed::ChangeBranch(T)),
        ("take a backup", Deed::TakeBackup(T)),
    ];

    fn columns() -> [(&'static str, Peer); 12] {
        let certified = |role| Peer::Certified(role);
        [
            ("safekeeper 3", certified(Role::Safekeeper(NodeId(3)))),
            ("another safekeeper", certified(Role::Safekeeper(NodeId(4)))),
            ("page server", certified(Role::Pageserver("a".into()))),
            ("broker", certified(Role::Broker("a".into()))),
            ("compute of T", certified(Role::Compute(T))),
            ("other compute", certified(Role::Compute(OTHER))),
            ("admin", certified(Role::Admin("a".into()))),
            ("token admin", Peer::Bearer(Scope::Admin)),
            ("token read", Peer::Bearer(Scope::Read)),
            ("token tenant:T", Peer::Bearer(Scope::Tenant(T))),
            ("other token", Peer::Bearer(Scope::Tenant(OTHER))),
            ("nobody", Peer::Unknown),
        ]
    }

    /// The table as the document has it.
    fn table() -> String {
        let mut text = String::from("| |");
        for (name, _) in columns() {
            text += &format!(" {name} |");
        }
        text += "\n|---|";
        text += &"---|".repeat(columns().len());
        for (name, deed) in ROWS {
            text += &format!("\n| {name} |");
            for (_, peer) in columns() {
                text += if peer.may(deed) { " yes |" } else { " - |" };
            }
        }
        text + "\n"
    }

    #[test]
    fn the_document_has_the_table_that_is_followed() {
        let document = include_str!("../../../docs/security.md");
        assert!(document.contains(&table()), "docs/security.md should have:\n{}", table());
    }

    #[test]
    fn on_this_machine_without_tls_everybody_may_do_everything() {
        assert!(ROWS.iter().all(|(_, deed)| Peer::Local.may(*deed)));
    }

    #[test]
    fn a_refusal_names_who_and_what() {
        let peer = Peer::Certified(Role::Pageserver("east".into()));
        let text = peer.check(Deed::AppendWal(T)).unwrap_err().to_string();
        assert!(text.contains("pgstrata://pageserver/east"), "{text}");
        assert!(text.contains("be a compute of tenant 1111"), "{text}");
    }
}
