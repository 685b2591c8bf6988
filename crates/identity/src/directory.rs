//! The directory that says who we are and whom we believe: `ca.pem`, `cert.pem`, `key.pem`.
//!
//! The files are read anew when they change. A certificate and its key can't change in one moment, so what does not fit
//! together is left alone, and what was read before stays in use, until it does.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};

use crate::configs::Configs;
use crate::small_file::SmallFile;
use crate::verify::ServerRole;
use crate::watched::{LOOK_EVERY, Source, Stamp, Watched};
use crate::{Certificate, Clients, Role, Trouble, Whom, explain, provider};

/// The certificates of those CAs whose certificates are believed, one or several.
pub const CA_FILE: &str = "ca.pem";
/// Our certificate, and after it those that lead to a CA's, if it isn't one that issued it.
pub const CERTIFICATE_FILE: &str = "cert.pem";
/// The key of our certificate.
pub const KEY_FILE: &str = "key.pem";

const MAX_FILE_BYTES: u64 = 256 * 1024;
/// Certificates of one file.
const MAX_CERTIFICATES: usize = 64;

const REMEDY: &str = "make it with 'pgstrata auth issue', or put your own there";

/// Who we are, and whom we believe. Copies share what was read.
#[derive(Clone)]
pub struct Identity(Arc<Watched<Directory>>);

impl Identity {
    /// Reads a directory. It must hold a certificate with a role, which is valid now and of a CA in `ca.pem`, and its key.
    pub fn open(directory: &Path) -> Result<Identity, Trouble> {
        Identity::looking_every(directory, LOOK_EVERY)
    }

    /// As [`Identity::open`], but files are looked at so often at most. For tests.
    #[doc(hidden)]
    pub fn looking_every(directory: &Path, every: Duration) -> Result<Identity, Trouble> {
        let directory = Directory { path: directory.to_owned() };
        Ok(Identity(Arc::new(Watched::open(directory, every)?)))
    }

    /// How a server speaks, on this connection: the next one may have other certificates, so ask again for each. Of the
    /// protocols the first that the client offers too is chosen (ALPN); a client that offers none comes in as well.
    ///
    /// Looks at three files' metadata at most once a second, and reads them if they changed; a short wait for the disk,
    /// which only one thread has.
    pub fn server(&self, clients: Clients, protocols: &[&[u8]]) -> Arc<ServerConfig> {
        self.0.get().configs.server(clients, protocols)
    }

    /// How a client speaks, on this connection: see [`Identity::server`]. The server's certificate must be of our CA, have
    /// the name that the connection is for, and the role.
    ///
    /// In TLS 1.3 a client is done with its handshake before the server has looked at its certificate: a refusal comes as
    /// the error of the first read.
    pub fn client(&self, whom: Whom, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        self.0.get().configs.client(whom, protocols)
    }

    /// Our certificate with its key.
    pub(crate) fn own(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.get().own)
    }

    /// Who verifies servers.
    pub(crate) fn server_role(&self, expected: Whom) -> ServerRole {
        self.0.get().configs.server_role(expected)
    }

    /// Our role.
    pub fn role(&self) -> Role {
        self.0.get().role.clone()
    }

    /// Our certificate.
    pub fn certificate(&self) -> Certificate {
        self.0.get().certificate.clone()
    }

    /// What keeps the files from being used as they are now, or that our certificate has expired; for the status.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.0.trouble().map(|trouble| trouble.to_string());
        let expired = || {
            let not_after = self.certificate().not_after;
            let path = self.directory().join(CERTIFICATE_FILE);
            (not_after < Timestamp::now()).then(|| {
                Trouble::new(&path, format!("it expired at {not_after}"), REMEDY).to_string()
            })
        };
        trouble.or_else(expired)
    }

    /// Where it was read from.
    pub fn directory(&self) -> &Path {
        &self.0.source().path
    }
}

/// Without the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.directory()).finish()
    }
}

struct Directory {
    path: PathBuf,
}

struct Loaded {
    role: Role,
    certificate: Certificate,
    own: Arc<CertifiedKey>,
    configs: Configs,
}

impl Source for Directory {
    type Value = Loaded;
    const WHAT: &'static str = "certificates";

    fn stamps(&self) -> Result<Vec<Stamp>, Trouble> {
        let files = [CA_FILE, CERTIFICATE_FILE, KEY_FILE];
        files.iter().map(|name| Stamp::of(&self.path.join(name), REMEDY)).collect()
    }

    fn read(&self) -> Result<Loaded, Trouble> {
        let (roots, _) = read_roots(&self.path.join(CA_FILE))?;
        let roots = Arc::new(roots);
        let path = self.path.join(CERTIFICATE_FILE);
        let wrong = |what: String| Trouble::new(&path, what, REMEDY);
        let chain = read_certificates(&path)?;
        let certificate = Certificate::read(&chain[0]).map_err(|error| wrong(error.to_string()))?;
        let role = certificate.role().map_err(|error| wrong(error.to_string()))?;
        check_chain(&roots, &chain, &certificate).map_err(wrong)?;
        let key = read_key(&self.path.join(KEY_FILE))?;
        let own = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| {
            let key = self.path.join(KEY_FILE);
            match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    let what =
                        format!("it is not the key of the certificate in {CERTIFICATE_FILE}");
                    Trouble::new(&key, what, "put the two there that were made together")
                }
                error => Trouble::new(&key, error.to_string(), REMEDY),
            }
        })?;
        let own = Arc::new(own);
        let configs = Configs::new(&roots, Arc::clone(&own)).map_err(wrong)?;
        Ok(Loaded { role, certificate, own, configs })
    }
}

/// The certificates in a file, one at least.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Trouble> {
    let wrong = |what: String| Trouble::new(path, what, REMEDY);
    let bytes = SmallFile::read(path, MAX_FILE_BYTES, REMEDY)?.bytes;
    let found: Result<Vec<_>, pem::Error> =
        CertificateDer::pem_slice_iter(&bytes).take(MAX_CERTIFICATES + 1).collect();
    match found {
        Err(error) => Err(wrong(format!("it is no PEM: {error}"))),
        Ok(found) if found.is_empty() => Err(wrong("there is no certificate in it".to_owned())),
        Ok(found) if found.len() > MAX_CERTIFICATES => {
            Err(wrong(format!("it holds more than {MAX_CERTIFICATES} certificates")))
        }
        Ok(found) => Ok(found),
    }
}

/// The CAs in a file: to verify with, and to show.
pub(crate) fn read_roots(path: &Path) -> Result<(RootCertStore, Vec<Certificate>), Trouble> {
    let mut roots = RootCertStore::empty();
    let mut shown = Vec::new();
    for (number, der) in read_certificates(path)?.into_iter().enumerate() {
        let wrong = |what: &dyn fmt::Display| {
            Trouble::new(path, format!("certificate {} in it: {what}", number + 1), REMEDY)
        };
        let certificate = Certificate::read(&der).map_err(|error| wrong(&error))?;
        // Whoever has the key of a certificate in this file can be anybody: a service's own is not to get there by mistake.
        if !certificate.is_ca {
            return Err(wrong(&format!("that of {} is no CA's", certificate.subject)));
        }
        roots.add(der).map_err(|error| wrong(&error))?;
        shown.push(certificate);
    }
    Ok((roots, shown))
}

/// Whether others who have the same `ca.pem` believe our certificate, now: as a client's or a server's, at least one.
fn check_chain(
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    certificate: &Certificate,
) -> Result<(), String> {
    let now = Timestamp::now();
    // Said before WebPKI does: with the times.
    if now > certificate.not_after {
        return Err(format!("it expired at {}", certificate.not_after));
    }
    if now < certificate.not_before {
        let from = certificate.not_before;
        return Err(format!("it is valid from {from} on, and this machine's clock says {now}"));
    }
    let as_client = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| error.to_string())?
        .verify_client_cert(&chain[0], &chain[1..], UnixTime::now());
    let as_server = || -> Result<(), rustls::Error> {
        let algorithms = provider().signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(&chain[0])?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            roots,
            &chain[1..],
            UnixTime::now(),
            algorithms,
        )
    };
    match as_client {
        Ok(_) => Ok(()),
        Err(error) => as_server().map_err(|_| {
            format!("it is not one that the CAs in {CA_FILE} stand for: {}", explain(&error))
        }),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, Trouble> {
    let file = SmallFile::read(path, MAX_FILE_BYTES, REMEDY)?;
    file.check_private()?;
    PrivateKeyDer::from_pem_slice(&file.bytes).map_err(|error| {
        let what = match error {
            pem::Error::NoItemsFound => "there is no private key in it".to_owned(),
            // Nothing of its content.
            _ => "it is no PEM".to_owned(),
        };
        Trouble::new(path, what, REMEDY)
    })
}
