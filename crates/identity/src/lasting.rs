//! Configurations for libraries that keep theirs, such as HTTP clients with a pool of connections: they look at the
//! directory at each handshake, where [`Identity::client`] gives what is right for one connection.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::{Identity, Whom, provider};

/// What is asked at each handshake.
#[derive(Debug)]
struct Lasting {
    identity: Identity,
    whom: Whom,
}

impl Identity {
    /// How a client speaks, on all connections that a library will make with this. See [`Identity::client`]; connections
    /// that are open when files change stay as they are.
    pub fn lasting_client(&self, whom: Whom, protocols: &[&[u8]]) -> ClientConfig {
        let mut config = (*self.client(whom.clone(), protocols)).clone();
        let lasting = Arc::new(Lasting { identity: self.clone(), whom });
        config.client_auth_cert_resolver = Arc::clone(&lasting) as _;
        config.dangerous().set_certificate_verifier(lasting);
        config
    }
}

impl ResolvesClientCert for Lasting {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.identity.own())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Lasting {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifier = self.identity.server_role(self.whom.clone());
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
