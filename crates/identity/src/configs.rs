//! What a server and a client say in TLS, made once of what lies in a directory.
//!
//! TLS 1.3 only, with nothing before the handshake is done (0-RTT is off). Sessions are not resumed: a resumed one takes
//! over whom the first handshake verified, without a certificate, so that one that has expired, has been exchanged, or is of
//! a CA that was taken out of `ca.pem` would be good for as long as tickets are. What that costs is a signature and a
//! verification on each side for a connection, and connections here are few and long.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_ids::{NodeId, TenantId};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::directory::read_roots;
use crate::verify::{ClientRole, ServerRole};
use crate::{Role, Trouble, provider};

/// Configurations that are kept of each kind. There are few kinds of peers and protocols; only tenants are many.
const KEPT: usize = 256;

/// Who may connect to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clients {
    /// Those with a certificate of our CA that names a role.
    MustHaveCertificate,
    /// These, and some that show no certificate at all, and will have to show a token. One that is not of our CA, or names
    /// no role, is refused here too.
    MayHaveCertificate,
}

/// Whom a client wants to talk to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Whom {
    /// This safekeeper, or any.
    Safekeeper(Option<NodeId>),
    /// Any page server.
    Pageserver,
    /// Any broker.
    Broker,
    /// A compute of this tenant.
    Compute(TenantId),
}

impl Whom {
    /// Whether this role is meant.
    pub fn is(&self, role: &Role) -> bool {
        match (self, role) {
            (Whom::Safekeeper(None), Role::Safekeeper(_)) => true,
            (Whom::Safekeeper(Some(expected)), Role::Safekeeper(found)) => expected == found,
            (Whom::Pageserver, Role::Pageserver(_)) | (Whom::Broker, Role::Broker(_)) => true,
            (Whom::Compute(expected), Role::Compute(found)) => expected == found,
            _ => false,
        }
    }
}

/// As messages name them.
impl fmt::Display for Whom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Whom::Safekeeper(None) => f.write_str("a safekeeper"),
            Whom::Safekeeper(Some(node)) => write!(f, "{}", Role::Safekeeper(*node)),
            Whom::Pageserver => f.write_str("a page server"),
            Whom::Broker => f.write_str("a broker"),
            Whom::Compute(tenant) => write!(f, "{}", Role::Compute(*tenant)),
        }
    }
}

type Protocols = Vec<Vec<u8>>;

/// Configurations made so far.
struct Made<K, T>(Mutex<HashMap<(K, Protocols), Arc<T>>>);

impl<K: Eq + Hash, T> Made<K, T> {
    fn get(&self, key: K, protocols: &[&[u8]], make: impl FnOnce(&K, Protocols) -> T) -> Arc<T> {
        let protocols: Protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let mut made = self.0.lock();
        let key = (key, protocols);
        if let Some(config) = made.get(&key) {
            return Arc::clone(config);
        }
        if made.len() >= KEPT {
            made.clear();
        }
        let config = Arc::new(make(&key.0, key.1.clone()));
        made.insert(key, Arc::clone(&config));
        config
    }
}

/// What is made of one reading of a directory.
pub(crate) struct Configs {
    web_pki: Arc<WebPkiServerVerifier>,
    /// Those without protocols, of which the others are copies.
    must: ServerConfig,
    may: ServerConfig,
    client: ClientConfig,
    servers: Made<Clients, ServerConfig>,
    clients: Made<Whom, ClientConfig>,
}

impl Configs {
    /// Of a certificate with its key, and the CAs that others' certificates are of. The error is a text.
    pub(crate) fn new(
        roots: &Arc<RootCertStore>,
        own: Arc<CertifiedKey>,
    ) -> Result<Configs, String> {
        let web_pki = server_verifier(roots)?;
        let resolver = Arc::new(SingleCertAndKey::from(own));
        let server = |clients: Clients| -> Result<ServerConfig, String> {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider());
            let verifier = match clients {
                Clients::MustHaveCertificate => verifier,
                Clients::MayHaveCertificate => verifier.allow_unauthenticated(),
            };
            let web_pki = verifier.build().map_err(|error| error.to_string())?;
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS13])
                .map_err(|error| error.to_string())?
                .with_client_cert_verifier(Arc::new(ClientRole { web_pki }))
                .with_cert_resolver(Arc::clone(&resolver) as _);
            // See the module.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            config.max_early_data_size = 0;
            Ok(config)
        };
        let client =
            client(&web_pki, Whom::Broker)?.with_client_cert_resolver(Arc::clone(&resolver) as _);
        Ok(Configs {
            must: server(Clients::MustHaveCertificate)?,
            may: server(Clients::MayHaveCertificate)?,
            client: without_resumption(client),
            web_pki,
            servers: Made(Mutex::default()),
            clients: Made(Mutex::default()),
        })
    }

    pub(crate) fn server(&self, clients: Clients, protocols: &[&[u8]]) -> Arc<ServerConfig> {
        self.servers.get(clients, protocols, |clients, protocols| {
            let mut config = match clients {
                Clients::MustHaveCertificate => self.must.clone(),
                Clients::MayHaveCertificate => self.may.clone(),
            };
            config.alpn_protocols = protocols;
            config
        })
    }

    pub(crate) fn server_role(&self, expected: Whom) -> ServerRole {
        ServerRole { web_pki: Arc::clone(&self.web_pki), expected }
    }

    pub(crate) fn client(&self, whom: Whom, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        self.clients.get(whom, protocols, |whom, protocols| {
            let mut config = self.client.clone();
            config.dangerous().set_certificate_verifier(Arc::new(self.server_role(whom.clone())));
            config.alpn_protocols = protocols;
            config
        })
    }
}

pub(crate) fn server_verifier(
    roots: &Arc<RootCertStore>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| error.to_string())
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client(web_pki: &Arc<WebPkiServerVerifier>, expected: Whom) -> Result<ClientBuilder, String> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| error.to_string())?;
    let verifier = Arc::new(ServerRole { web_pki: Arc::clone(web_pki), expected });
    // What is dangerous is a verifier that does less than WebPKI's: this one does that first.
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier))
}

fn without_resumption(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config
}

/// How somebody connects who has a token and no certificate: the server is verified by the CAs in this file, as
/// [`Identity::client`](crate::Identity::client) does, and by its role.
pub fn client_without_certificate(
    ca: &Path,
    whom: Whom,
    protocols: &[&[u8]],
) -> Result<Arc<ClientConfig>, Trouble> {
    let unusable = |what: String| Trouble::new(ca, what, "put the cluster's ca.pem there");
    let roots = Arc::new(read_roots(ca)?.0);
    let web_pki = server_verifier(&roots).map_err(unusable)?;
    let mut config =
        without_resumption(client(&web_pki, whom).map_err(unusable)?.with_no_client_auth());
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}
