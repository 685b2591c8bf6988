//! What WebPKI verifies, and the role beside it.

use std::cell::RefCell;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

use crate::{BadCertificate, Certificate, Whom, peer_role};

thread_local! {
    /// Of whom the certificate says that it is which this thread refused last. rustls turns an error into the alert that its
    /// peer gets, and has no room in it for a name that the peer's own log is not to have; it is explained on this thread,
    /// next.
    static REFUSED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// See [`REFUSED`]; once.
pub(crate) fn take_refused() -> Option<String> {
    REFUSED.take()
}

/// Notes whose certificate it is that was refused. Nobody has vouched for what it says of itself, so that is repeated only
/// where it is a role, or a subject with nothing in it that could be taken for more than that.
fn note_refused(error: Error, certificate: &CertificateDer<'_>) -> Error {
    const LONGEST: usize = 100;
    let says = Certificate::read(certificate).ok().map(|certificate| match certificate.role() {
        Ok(role) => role.to_string(),
        Err(_) => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.=, ".contains(c);
            certificate.subject.chars().filter(|&c| plain(c)).take(LONGEST).collect()
        }
    });
    REFUSED.set(says);
    error
}

fn refused(why: BadCertificate) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

/// Verifies that a server is of our CA, has the name that it was asked for by, and is whom we want to talk to.
#[derive(Debug)]
pub(crate) struct ServerRole {
    pub(crate) web_pki: Arc<WebPkiServerVerifier>,
    pub(crate) expected: Whom,
}

impl ServerCertVerifier for ServerRole {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        REFUSED.take();
        // First: what a certificate says is believed only when somebody we trust has said it.
        let verified = self.web_pki.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        let verified = verified.map_err(|error| note_refused(error, end_entity))?;
        let found = peer_role(std::slice::from_ref(end_entity)).map_err(refused)?;
        match self.expected.is(&found) {
            true => Ok(verified),
            false => {
                let expected = self.expected.to_string();
                Err(refused(BadCertificate::SomebodyElse { found, expected }))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.web_pki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.web_pki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.web_pki.supported_verify_schemes()
    }
}

/// Verifies that a client is of our CA, and has a role, whichever: what each role may do is for the service to say.
#[derive(Debug)]
pub(crate) struct ClientRole {
    pub(crate) web_pki: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for ClientRole {
    fn offer_client_auth(&self) -> bool {
        self.web_pki.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.web_pki.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.web_pki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        REFUSED.take();
        let verified = self.web_pki.verify_client_cert(end_entity, intermediates, now);
        let verified = verified.map_err(|error| note_refused(error, end_entity))?;
        peer_role(std::slice::from_ref(end_entity)).map_err(refused)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.web_pki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.web_pki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.web_pki.supported_verify_schemes()
    }
}
