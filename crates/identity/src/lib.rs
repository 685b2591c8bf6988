//! Who is on the other side of a connection, and who we are: roles in certificates, TLS that verifies them, and tokens.
//!
//! Knows nothing of HTTP or of PostgreSQL's protocol, and nothing of what a role may do: that is `listen`'s table. The
//! decisions behind it are in `docs/adr/0005-across-machines.md`.

mod certificate;
mod configs;
mod directory;
mod explain;
mod handshake;
mod lasting;
mod provider;
mod role;
mod small_file;
mod stream;
mod tls;
mod token;
mod token_keys;
mod trouble;
mod verify;
mod watched;

pub use certificate::{BadCertificate, Certificate, peer_role};
pub use configs::{Clients, Whom, client_without_certificate};
pub use directory::{CA_FILE, CERTIFICATE_FILE, Identity, KEY_FILE};
pub use explain::{TlsError, explain, explanation};
pub use provider::{install_provider, provider};
pub use role::{Kind, MAX_NAME, Role, RoleError};
pub use small_file::SmallFile;
pub use stream::Stream;
pub use tls::Tls;
pub use token::{MAX_TOKEN, Scope, SigningKey, TokenError, says_until};
pub use token_keys::Tokens;
pub use trouble::Trouble;

// Callers speak of these without a dependency of their own: there is one version and one provider.
pub use rustls;
