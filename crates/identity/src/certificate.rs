//! What a certificate says: whose it is, which names it has, and until when it is valid.
//!
//! Reading is not believing: whether a certificate is of our CA, and valid now, is WebPKI's to say (`verify.rs`).

use std::net::IpAddr;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::role::quoted;
use crate::{Role, RoleError};

const SECONDS_A_DAY: i64 = 86_400;

/// A certificate that says of nobody who he is, or not clearly.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCertificate {
    /// There is no certificate.
    #[error("no certificate was shown")]
    Absent,
    /// It is no certificate of X.509.
    #[error("the certificate can't be read: {0}")]
    Malformed(String),
    /// It has no URI.
    #[error(
        "the certificate of {0} has no URI among its subject alternative names; one such as pgstrata://safekeeper/3 must be \
         there"
    )]
    NoRole(String),
    /// It has several URIs, these.
    #[error("the certificate has more than one URI among its subject alternative names: {}", .0.join(", "))]
    SeveralRoles(Vec<String>),
    /// Its URI is not a role's.
    #[error("the certificate's {0}")]
    NotARole(RoleError),
    /// It is somebody else's than expected.
    #[error("the certificate is of {found}, and {expected} was expected")]
    SomebodyElse {
        /// Whose it is.
        found: Role,
        /// Whose it should be.
        expected: String,
    },
}

/// The same as what is displayed: libraries print the errors of verifiers so.
impl std::fmt::Debug for BadCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// What is in a certificate, as far as anybody here asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whom it names as its subject, as in `CN=safekeeper-3`.
    pub subject: String,
    /// From when on it is valid.
    pub not_before: Timestamp,
    /// Until when.
    pub not_after: Timestamp,
    /// DNS names and IP addresses that it is valid for.
    pub names: Vec<String>,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// The URIs among its subject alternative names, quoted where one is no text.
    uris: Vec<String>,
}

impl Certificate {
    /// Reads the encoding (DER) of one certificate.
    pub fn read(der: &CertificateDer<'_>) -> Result<Certificate, BadCertificate> {
        let malformed =
            |error: &dyn std::fmt::Display| BadCertificate::Malformed(error.to_string());
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"there is something after its end"));
        }
        let time = |time: x509_parser::time::ASN1Time| {
            Timestamp::from_second(time.timestamp()).map_err(|error| malformed(&error))
        };
        let mut names = Vec::new();
        let mut uris = Vec::new();
        // An extension that is there twice is an error of this call.
        let alternative = parsed.subject_alternative_name().map_err(|error| malformed(&error))?;
        for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => names.extend(ip(bytes).map(|ip| ip.to_string())),
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                // One that is no text counts as one: it is not skipped to find a better one behind it.
                GeneralName::Invalid(_, bytes) => {
                    uris.push(String::from_utf8_lossy(bytes).into_owned());
                }
                _ => {}
            }
        }
        Ok(Certificate {
            subject: parsed.subject().to_string(),
            not_before: time(parsed.validity().not_before)?,
            not_after: time(parsed.validity().not_after)?,
            names,
            is_ca: parsed.is_ca(),
            uris,
        })
    }

    /// Whose it is: its one URI says so.
    pub fn role(&self) -> Result<Role, BadCertificate> {
        match self.uris.as_slice() {
            [] => Err(BadCertificate::NoRole(quoted(&self.subject))),
            [uri] => uri.parse().map_err(BadCertificate::NotARole),
            several => Err(BadCertificate::SeveralRoles(
                several.iter().take(4).map(|uri| quoted(uri)).collect(),
            )),
        }
    }

    /// For how many whole days it is valid yet; negative once it is not.
    pub fn days_left(&self, now: Timestamp) -> i64 {
        self.not_after.duration_since(now).as_secs().div_euclid(SECONDS_A_DAY)
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Who a peer is, by the chain that it showed, its own certificate first. For chains that the handshake has verified.
pub fn peer_role(chain: &[CertificateDer<'_>]) -> Result<Role, BadCertificate> {
    let own = chain.first().ok_or(BadCertificate::Absent)?;
    Certificate::read(own)?.role()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn with(names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "some-body");
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn refused(names: Vec<SanType>) -> String {
        peer_role(&[with(names)]).unwrap_err().to_string()
    }

    #[test]
    fn a_role_is_the_one_uri() {
        let names = vec![
            SanType::DnsName("sk3.example.com".try_into().unwrap()),
            uri("pgstrata://safekeeper/3"),
            SanType::IpAddress([10, 0, 0, 3].into()),
        ];
        let der = with(names);
        assert_eq!(
            peer_role(std::slice::from_ref(&der)).unwrap().to_string(),
            "pgstrata://safekeeper/3"
        );
        let certificate = Certificate::read(&der).unwrap();
        assert_eq!(certificate.names, ["sk3.example.com", "10.0.0.3"]);
        assert_eq!(certificate.subject, "CN=some-body");
        assert!(!certificate.is_ca);

        assert!(peer_role(&[]).unwrap_err().to_string().contains("no certificate"));
        let text = refused(vec![]);
        assert!(text.contains("CN=some-body") && text.contains("no URI"), "{text}");
        let text = refused(vec![uri("pgstrata://admin/a"), uri("https://x/")]);
        assert!(text.contains("'pgstrata://admin/a', 'https://x/'"), "{text}");
        let text = refused(vec![uri("spiffe://x/y")]);
        assert!(text.contains("'spiffe://x/y'"), "{text}");
    }

    #[test]
    fn days_are_whole_ones() {
        let mut certificate = Certificate::read(&with(vec![])).unwrap();
        certificate.not_after = Timestamp::from_second(10 * SECONDS_A_DAY).unwrap();
        let left = |second| certificate.days_left(Timestamp::from_second(second).unwrap());
        assert_eq!(left(0), 10);
        assert_eq!(left(1), 9);
        assert_eq!(left(10 * SECONDS_A_DAY - 1), 0);
        assert_eq!(left(10 * SECONDS_A_DAY + 1), -1);
    }

    proptest! {
        #[test]
        fn damage_is_an_error_at_most(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
            static DER: std::sync::LazyLock<Vec<u8>> =
                std::sync::LazyLock::new(|| with(vec![uri("pgstrata://broker/b")]).to_vec());
            let mut der = DER.clone();
            let at = at.index(der.len());
            der[at] = byte;
            if cut {
                der.truncate(at);
            }
            let _ = peer_role(&[CertificateDer::from(der)]);
        }
    }
}
