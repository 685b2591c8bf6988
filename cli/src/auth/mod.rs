//! `auth`: a CA, certificates of services, computes and people, and tokens. Needs no cluster: what it makes is copied to
//! where it is used.
//!
//! The directory that it works in:
//!
//! | file | what | for whom |
//! |---|---|---|
//! | `ca.pem` | CAs whose certificates are believed; the first of them issues | everybody |
//! | `ca-key.pem` | that one's key | nobody else: whoever has it can be anybody |
//! | `token-keys/KID.pem` | public keys by which tokens are believed | services |
//! | `token-key.pem` | the private one of them that signs | nobody else |
//! | `ROLE-NAME/` | `ca.pem`, `cert.pem`, `key.pem` of one who was issued a certificate | him |

mod authority;
mod keys;
pub mod show;
pub mod writing;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use jiff::{SignedDuration, Span, SpanRelativeTo};
use pgstrata_identity::rustls::pki_types::ServerName;
use pgstrata_identity::{Kind, Scope};

/// Where everything is, unless `--dir` says otherwise. Not the cluster's directory: what lies here is not for services.
const DIRECTORY: &str = "pgstrata-auth";

/// The longest that a token may be valid.
const LONGEST_DAYS: i64 = 3650;

/// Verbs of `auth`.
#[derive(clap::Subcommand)]
pub enum AuthVerb {
    /// Make a CA, and a key that signs tokens, in a new directory
    Init,
    /// Issue a certificate for a service, a compute or a person; or renew it
    ///
    /// Makes the directory ROLE-NAME with ca.pem, cert.pem and key.pem, which is copied to where it is used and given to
    /// '--tls'. Doing it again renews the certificate, with another key, and with the same hosts unless others are given.
    /// Copied over the old files it is taken up by a running service, which needs no restart.
    Issue {
        /// safekeeper, pageserver, broker, compute or admin
        #[arg(long)]
        role: Kind,
        /// A safekeeper's node id, a compute's tenant id; what others are called
        #[arg(long)]
        name: String,
        /// DNS name or IP address that it is reached by; may be repeated [default: this machine only, for services]
        #[arg(long, value_parser = parse_host)]
        host: Vec<String>,
        /// How long it is valid
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=LONGEST_DAYS))]
        days: u32,
    },
    /// Print a token, which stands in for a certificate with HTTP and as PostgreSQL's password
    Token {
        /// admin (everything), read (reading, of every tenant), or tenant:ID
        #[arg(long, value_parser = parse_scope)]
        scope: Scope,
        /// How long it is valid, such as 30m, 1h or 7d
        #[arg(long, value_parser = parse_ttl)]
        ttl: SignedDuration,
    },
    /// Sign tokens with a new key from now on
    ///
    /// Tokens signed before are believed as long as services have the old key's file: take it out of token-keys, here and
    /// there, once they have expired, or at once if the old key has become known.
    Rotate,
    /// Show CAs, certificates, and until when they are valid
    Show {
        /// A directory with ca.pem, cert.pem and key.pem [default: all of --dir]
        directory: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `auth`, in the directory that `--dir` gave, if it did.
pub fn run(dir: Option<&Path>, verb: &AuthVerb) -> Result<()> {
    let dir = dir.unwrap_or(Path::new(DIRECTORY));
    match verb {
        AuthVerb::Init => authority::init(dir),
        AuthVerb::Issue { role, name, host, days } => {
            authority::issue(dir, *role, name, host, *days)
        }
        AuthVerb::Token { scope, ttl } => keys::token(dir, *scope, *ttl),
        AuthVerb::Rotate => keys::rotate(dir),
        AuthVerb::Show { directory, json } => show::show(dir, directory.as_deref(), *json),
    }
}

fn parse_host(text: &str) -> Result<String, String> {
    match ServerName::try_from(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("expected a DNS name or an IP address, without a port".to_owned()),
    }
}

fn parse_scope(text: &str) -> Result<Scope, String> {
    text.parse()
}

/// A day has 24 hours.
fn parse_ttl(text: &str) -> Result<SignedDuration> {
    let span: Span = text.parse().context("expected a duration such as 30m, 1h or 7d")?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours())?;
    let longest = SignedDuration::from_hours(24 * LONGEST_DAYS);
    ensure!(
        duration >= SignedDuration::from_secs(1) && duration <= longest,
        "expected a second at least, and {LONGEST_DAYS} days at most"
    );
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_a_number_and_a_unit() {
        for (text, seconds) in [
            ("1s", 1),
            ("30m", 1800),
            ("1h", 3600),
            ("1h30m", 5400),
            ("7d", 604_800),
            ("1w", 604_800),
        ] {
            assert_eq!(parse_ttl(text).unwrap().as_secs(), seconds, "{text}");
        }
        for text in ["", "1", "h", "0s", "-1h", "1 fortnight", "1mo", "1y", "99999d", "100ms"] {
            assert!(parse_ttl(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for good in ["localhost", "sk1.example.com", "10.0.0.1", "::1", "a_b"] {
            assert!(parse_host(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "host:5432", "*.example.com", "[::1]", "http://x", "é"] {
            assert!(parse_host(bad).is_err(), "{bad}");
        }
    }
}
