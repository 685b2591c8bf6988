//! Why a connection came to nothing, in words of what to do.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

use crate::verify::take_refused;

/// What rustls says, with our words; the kind of an [`io::Error`] that has it is `InvalidData`.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct TlsError {
    text: String,
    source: Error,
}

impl From<Error> for TlsError {
    fn from(source: Error) -> TlsError {
        TlsError { text: explain(&source), source }
    }
}

pub(crate) fn tls_error(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, TlsError::from(error))
}

/// The same for an error of a library that speaks TLS for us, if TLS is at the bottom of it.
pub fn explanation(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<Error>() {
            return Some(explain(error));
        }
        // What an `io::Error` was made of is not its source, but what that one's is.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// A line for a message or a log. A certificate that is refused is named by what it says of itself, on the thread that
/// refused it.
pub fn explain(error: &Error) -> String {
    if let Error::InvalidCertificate(CertificateError::Other(error)) = error {
        return error.to_string();
    }
    let text = in_words(error);
    let named = matches!(error, Error::InvalidCertificate(_)).then(take_refused).flatten();
    match named {
        Some(name) => format!("{text}; it says that it is of {name}"),
        None => text,
    }
}

fn in_words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate is not of a CA in ca.pem".into()
        }
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            "the certificate is of a CA that has the name of one in ca.pem, and is not it".into()
        }
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => format!("the certificate has expired ({error})"),
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => format!("the certificate is not valid yet: see both machines' clocks ({error})"),
        Error::InvalidCertificate(error) => format!("the certificate can't be believed: {error}"),
        Error::NoCertificatesPresented => "no certificate was shown, and one is needed here".into(),
        Error::InvalidMessage(_) => "the other side does not speak TLS".into(),
        Error::PeerIncompatible(error) => {
            format!("the other side does not speak TLS 1.3 as we do ({error:?})")
        }
        Error::NoApplicationProtocol => "the other side speaks another protocol within TLS".into(),
        Error::AlertReceived(alert) => format!("the other side refused: {}", alerted(*alert)),
        error => error.to_string(),
    }
}

fn alerted(alert: AlertDescription) -> String {
    let meaning = match alert {
        AlertDescription::CertificateRequired => "it needs a certificate of us",
        AlertDescription::UnknownCA => "our certificate is of a CA that is not in its ca.pem",
        AlertDescription::CertificateExpired => {
            "our certificate is not valid now by its clock, or has expired"
        }
        AlertDescription::CertificateUnknown => "it does not take our certificate's role",
        AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
            "it does not take our certificate"
        }
        AlertDescription::ProtocolVersion => "it does not speak TLS 1.3",
        AlertDescription::NoApplicationProtocol => "it speaks another protocol within TLS",
        AlertDescription::DecryptError => "a signature did not verify",
        _ => return format!("{alert:?}"),
    };
    format!("{meaning} ({alert:?})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_at_the_bottom_is_found() {
        let bottom = || Error::AlertReceived(AlertDescription::CertificateRequired);
        let expected = "the other side refused: it needs a certificate of us (CertificateRequired)";
        let as_others_do = io::Error::new(io::ErrorKind::InvalidData, bottom());
        let wrapped = io::Error::other(as_others_do);
        assert_eq!(explanation(&wrapped).unwrap(), expected);
        assert_eq!(explanation(&tls_error(bottom())).unwrap(), expected);
        assert_eq!(tls_error(bottom()).to_string(), expected);
        assert_eq!(explanation(&io::Error::from(io::ErrorKind::TimedOut)), None);
    }
}
