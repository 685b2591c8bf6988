//! Certificates and tokens: until when those are good by which services, computes and people are let in.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgstrata_identity::{CA_FILE, CERTIFICATE_FILE, Certificate, Identity, KEY_FILE, Tokens};

use super::finding::{Finding, Severity};
use crate::auth::show::certificates_in;

const CHECK: &str = "certificates";

/// Days that are left, below which it is said.
const DANGER_DAYS: i64 = 7;
const WARNING_DAYS: i64 = 30;

/// What is done about a certificate, and about a CA.
const ISSUE: &str = "renew it ('pgstrata auth issue'); a running service takes it up when it is copied over the old one";
const AUTHORITY: &str =
    "give everybody a new CA beside it in ca.pem, then certificates of that one";

/// A certificate, by what it is called, and what is done when it ends.
fn validity(
    object: &str,
    what: &str,
    certificate: &Certificate,
    now: Timestamp,
    remedy: &str,
) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, object, severity, text);
    let (from, until) = (certificate.not_before, certificate.not_after);
    if now < from {
        let text = format!(
            "{what} is valid from {from:.0} on, and this machine's clock says {now:.0}: see whether that is right"
        );
        return finding(Severity::Danger, &text);
    }
    if now > until {
        return finding(Severity::Danger, &format!("{what} expired at {until:.0}: {remedy}"));
    }
    let days = certificate.days_left(now);
    let said = format!("{what} is valid for {days} days yet, until {until:.0}");
    match days {
        ..DANGER_DAYS => finding(Severity::Danger, &format!("{said}: {remedy}")),
        DANGER_DAYS..WARNING_DAYS => finding(Severity::Warning, &format!("{said}: {remedy}")),
        _ => finding(Severity::Ok, &said),
    }
}

/// What a service showed; the error is why it showed none that is good, or could not be asked.
pub fn shown(
    object: &str,
    shown: Result<Option<&Certificate>, &io::Error>,
    now: Timestamp,
) -> Option<Finding> {
    match shown {
        Ok(Some(certificate)) => Some(validity(object, "its certificate", certificate, now, ISSUE)),
        // Plain text, of this machine.
        Ok(None) => None,
        // Of this kind are the errors of TLS.
        Err(why) if why.kind() == ErrorKind::InvalidData => {
            let text = format!("nobody who has this cluster's CA lets it in: {why}");
            Some(Finding::new(CHECK, object, Severity::Danger, &text))
        }
        Err(why) => {
            let text = format!("not looked at: it shows no certificate ({why})");
            Some(Finding::new(CHECK, object, Severity::Unknown, &text))
        }
    }
}

/// What lies in a directory that is given to `--tls`.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Own certificates and CAs, each with what it is called, or why they can't be read.
    found: Vec<(String, Certificate, &'static str)>,
    /// Why it can't be used.
    trouble: Option<String>,
    /// It can't be looked into by us.
    is_closed: bool,
}

impl Directory {
    /// Reads it.
    pub fn read(path: &Path) -> Directory {
        let is_closed = |name: &str| {
            File::open(path.join(name))
                .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        };
        let mut found = Vec::new();
        for certificate in certificates_in(&path.join(CERTIFICATE_FILE)).unwrap_or_default() {
            found.push((format!("the certificate of {}", certificate.subject), certificate, ISSUE));
        }
        for certificate in certificates_in(&path.join(CA_FILE)).unwrap_or_default() {
            found.push((format!("the CA {}", certificate.subject), certificate, AUTHORITY));
        }
        Directory {
            path: path.to_owned(),
            found,
            trouble: Identity::open(path).err().map(|trouble| trouble.to_string()),
            is_closed: [CERTIFICATE_FILE, CA_FILE, KEY_FILE].into_iter().any(is_closed),
        }
    }
}

/// What is in such a directory, of one whose it is.
pub fn directory(object: &str, directory: &Directory, now: Timestamp) -> Vec<Finding> {
    let Directory { path, found, trouble, is_closed } = directory;
    let mut findings: Vec<_> = found
        .iter()
        .map(|(what, certificate, remedy)| {
            let what = format!("{what} in {}", path.display());
            validity(object, &what, certificate, now, remedy)
        })
        .collect();
    // One that expired is no news.
    let is_said = findings.iter().any(|finding| finding.severity == Severity::Danger);
    match trouble {
        Some(_) if *is_closed => {
            let text = format!("not looked at: {} is closed to this user", path.display());
            findings.push(Finding::new(CHECK, object, Severity::Unknown, &text));
        }
        Some(trouble) if !is_said => {
            findings.push(Finding::new(CHECK, object, Severity::Danger, trouble));
        }
        _ => {}
    }
    findings
}

/// A directory that is given to `--token-keys`. Keys do not expire.
pub fn token_keys(object: &str, directory: &Path) -> Finding {
    match Tokens::open(directory) {
        Ok(_) => {
            let text = format!("tokens are verified by the keys in {}", directory.display());
            Finding::new(CHECK, object, Severity::Ok, &text)
        }
        Err(_)
            if std::fs::read_dir(directory)
                .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied) =>
        {
            let text = format!("not looked at: {} is closed to this user", directory.display());
            Finding::new(CHECK, object, Severity::Unknown, &text)
        }
        Err(trouble) => Finding::new(CHECK, object, Severity::Danger, &trouble.to_string()),
    }
}

/// A token, by when it says that it ends.
pub fn token(object: &str, until: Option<Timestamp>, now: Timestamp) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, object, severity, text);
    match until {
        None => finding(Severity::Unknown, "its token does not say until when it is good"),
        Some(until) if until <= now => {
            let text =
                format!("its token expired at {until:.0}: make another ('pgstrata auth token')");
            finding(Severity::Danger, &text)
        }
        Some(until) => finding(Severity::Ok, &format!("its token is good until {until:.0}")),
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_identity::rustls::pki_types::CertificateDer;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    const DAY: i64 = 86_400;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// One that is valid on the days 10 to 100.
    fn certificate() -> Certificate {
        let key = KeyPair::generate().unwrap();
        let der = CertificateParams::default().self_signed(&key).unwrap().der().to_vec();
        let mut certificate = Certificate::read(&CertificateDer::from(der)).unwrap();
        (certificate.not_before, certificate.not_after) = (at(10 * DAY), at(100 * DAY));
        certificate
    }

    #[test]
    fn a_certificate_is_said_before_it_ends() {
        use Severity::{Danger, Ok, Warning};
        let certificate = certificate();
        let on = |second: i64| shown("it", Result::Ok(Some(&certificate)), at(second)).unwrap();
        for (second, expected) in [
            (10 * DAY - 1, Danger),
            (10 * DAY, Ok),
            (70 * DAY, Ok),
            (70 * DAY + 1, Warning),
            (93 * DAY, Warning),
            (93 * DAY + 1, Danger),
            (100 * DAY, Danger),
            (100 * DAY + 1, Danger),
        ] {
            assert_eq!(on(second).severity, expected, "{second}: {:?}", on(second));
        }
        assert_eq!(
            on(95 * DAY).text,
            "its certificate is valid for 5 days yet, until 1970-04-11T00:00:00Z: renew it ('pgstrata auth issue'); a running \
             service takes it up when it is copied over the old one"
        );
        assert!(on(101 * DAY).text.starts_with("its certificate expired at 1970-04-11T00:00:00Z:"));
        assert!(on(DAY).text.starts_with("its certificate is valid from 1970-01-11T00:00:00Z on"));
        assert_eq!(shown("it", Result::Ok(None), at(0)), None);
        let failed = |kind: ErrorKind| shown("it", Err(&kind.into()), at(0)).unwrap().severity;
        assert_eq!(failed(ErrorKind::InvalidData), Danger);
        assert_eq!(failed(ErrorKind::ConnectionRefused), Severity::Unknown);
    }

    #[test]
    fn what_is_in_a_directory_is_said_once() {
        let of = |trouble: Option<&str>, is_closed: bool, day: i64| {
            let found = vec![
                ("the certificate of CN=a".to_owned(), certificate(), ISSUE),
                ("the CA CN=b".to_owned(), certificate(), AUTHORITY),
            ];
            let trouble = trouble.map(str::to_owned);
            let read = Directory { path: "/tls".into(), found, trouble, is_closed };
            let findings = directory("it", &read, at(day * DAY));
            findings.into_iter().map(|finding| finding.severity).collect::<Vec<_>>()
        };
        use Severity::{Danger, Ok, Unknown, Warning};
        assert_eq!(of(None, false, 20), [Ok, Ok]);
        assert_eq!(of(None, false, 80), [Warning, Warning]);
        assert_eq!(of(Some("others can read the key"), false, 20), [Ok, Ok, Danger]);
        assert_eq!(of(Some("it expired"), false, 101), [Danger, Danger]);
        assert_eq!(of(Some("it can't be read"), true, 20), [Ok, Ok, Unknown]);
    }

    #[test]
    fn a_directory_that_is_empty_is_a_danger() {
        let place = tempfile::tempdir().unwrap();
        let findings = directory("it", &Directory::read(place.path()), at(0));
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].severity, Severity::Danger);
        assert!(findings[0].text.contains("ca.pem: it is not there"), "{findings:?}");
        assert_eq!(token_keys("it", &place.path().join("none")).severity, Severity::Danger);
    }

    #[test]
    fn a_token_ends_when_it_says() {
        let token = |until: i64| token("it", Some(at(until)), at(100)).severity;
        assert_eq!([token(100), token(101)], [Severity::Danger, Severity::Ok]);
        assert_eq!(super::token("it", None, at(0)).severity, Severity::Unknown);
    }
}
