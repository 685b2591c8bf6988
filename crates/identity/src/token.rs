//! Tokens: who has no certificate shows one. A JWT (RFC 7519) with an Ed25519 signature (RFC 8037), and nothing else of what
//! JWTs can be.
//!
//! | part | content |
//! |---|---|
//! | header | `alg`: `EdDSA`; `kid`: which key signed it; `typ`: `JWT`, if any |
//! | claims | `scope`; `exp`: until when, in seconds since 1970; `nbf`: from when on, if any; `iat`: since when, for people |
//! | signature | of the text of both before it |
//!
//! Each part in URL-safe base64 without padding. Ours rather than `jsonwebtoken`'s: that one knows ten algorithms where one
//! must be accepted, and comes with implementations of cryptography that are not ours.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use pgstrata_ids::TenantId;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use crate::role::{is_name, quoted};

/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 4096;

/// DER of an Ed25519 public key (RFC 8410) up to its 32 bytes.
const SPKI_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Hexadecimal digits of a key's id.
const KID_DIGITS: usize = 16;

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everything.
    Admin,
    /// What is one tenant's.
    Tenant(TenantId),
    /// Reading, of every tenant.
    Read,
}

/// `admin`, `tenant:` and a tenant's id, or `read`.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scope::Admin => f.write_str("admin"),
            Scope::Tenant(tenant) => write!(f, "tenant:{tenant}"),
            Scope::Read => f.write_str("read"),
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Scope, String> {
        let scope = match text {
            "admin" => Some(Scope::Admin),
            "read" => Some(Scope::Read),
            _ => text
                .strip_prefix("tenant:")
                .and_then(|tenant| tenant.parse().ok())
                .map(Scope::Tenant),
        };
        scope.ok_or_else(|| {
            format!(
                "{} is no scope: expected admin, read, or tenant: and a tenant's id (32 hexadecimal digits)",
                quoted(text)
            )
        })
    }
}

/// Why a token is refused. None of these has the token, or what its owner could be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Longer than [`MAX_TOKEN`].
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Not a token, or not one of this form.
    #[error("this is no token: {0}")]
    Malformed(&'static str),
    /// Signed by another algorithm than EdDSA.
    #[error("the token is signed by another algorithm than EdDSA")]
    WrongAlgorithm,
    /// Signed by a key that is not in the directory.
    #[error(
        "the token is signed by the key '{0}', which is not known here: its public key must be in the directory of token keys"
    )]
    UnknownKey(String),
    /// Not signed by the key that it names.
    #[error("the token's signature is not of the key '{0}'")]
    BadSignature(String),
    /// It was valid.
    #[error("the token expired at {0}: ask for a new one")]
    Expired(Timestamp),
    /// It will be valid.
    #[error("the token is valid from {0} on: see this machine's clock")]
    NotYetValid(Timestamp),
    /// It says nothing of what it is good for.
    #[error("the token has no scope")]
    NoScope,
    /// What it is good for is nothing here.
    #[error("the token's scope: {0}")]
    UnknownScope(String),
}

// Fields that JWS and JWT have beside these do not matter, but for `crit`, which says that some do.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    crit: Option<serde::de::IgnoredAny>,
}

#[derive(Serialize)]
struct OwnHeader<'a> {
    alg: &'static str,
    typ: &'static str,
    kid: &'a str,
}

#[derive(Deserialize, Serialize)]
struct Claims {
    scope: Option<String>,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<i64>,
}

/// Until when a token says that it is good, for whoever is about to show it: nobody has verified that. `None` where it is no
/// token.
pub fn says_until(token: &str) -> Option<Timestamp> {
    let claims = token.split('.').nth(1).filter(|_| token.len() <= MAX_TOKEN)?;
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Timestamp::from_second(claims.exp).ok()
}

/// A key that tokens are verified by: 32 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublicKey([u8; 32]);

impl PublicKey {
    /// From a SubjectPublicKeyInfo.
    pub(crate) fn from_spki(der: &[u8]) -> Option<PublicKey> {
        der.strip_prefix(&SPKI_PREFIX).and_then(|key| key.try_into().ok()).map(PublicKey)
    }

    /// Which key it is: the first digits of the SHA-256 of it, so that nobody needs to give it a name.
    fn id(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, &self.0);
        let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        hex[..KID_DIGITS].to_owned()
    }
}

fn decode(part: &str, what: &'static str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed(what))
}

fn time(seconds: i64) -> Result<Timestamp, TokenError> {
    Timestamp::from_second(seconds).map_err(|_| TokenError::Malformed("a time in it is none"))
}

/// What a token is good for, if it is signed by the key that it names, and valid.
pub(crate) fn check<'a>(
    token: &str,
    now: Timestamp,
    key_of: impl FnOnce(&str) -> Option<&'a PublicKey>,
) -> Result<Scope, TokenError> {
    if token.len() > MAX_TOKEN {
        return Err(TokenError::TooLong);
    }
    let parts = || {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        Some((signed, header, claims, signature))
    };
    let (signed, header, claims, signature) =
        parts().ok_or(TokenError::Malformed("it has not three parts with dots between"))?;
    let header: Header = serde_json::from_slice(&decode(header, "its header is no base64")?)
        .map_err(|_| TokenError::Malformed("its header is not a JWT's"))?;
    if header.alg != "EdDSA" {
        return Err(TokenError::WrongAlgorithm);
    }
    if header.crit.is_some() || header.typ.is_some_and(|kind| kind != "JWT") {
        return Err(TokenError::Malformed("its header asks for more than is done here"));
    }
    // A name, so that it can be shown: anybody could have written it.
    let kid =
        header.kid.filter(|kid| is_name(kid)).ok_or(TokenError::Malformed("it names no key"))?;
    let Some(key) = key_of(&kid) else { return Err(TokenError::UnknownKey(kid)) };
    let signature = decode(signature, "its signature is no base64")?;
    let key = UnparsedPublicKey::new(&ED25519, key.0);
    if key.verify(signed.as_bytes(), &signature).is_err() {
        return Err(TokenError::BadSignature(kid));
    }
    // From here on it is what somebody with the key wrote.
    let claims: Claims = serde_json::from_slice(&decode(claims, "its claims are no base64")?)
        .map_err(|_| TokenError::Malformed("its claims are none, or without a time of expiry"))?;
    let (until, from) = (time(claims.exp)?, claims.nbf.map(time).transpose()?);
    if now >= until {
        return Err(TokenError::Expired(until));
    }
    match from {
        Some(from) if now < from => return Err(TokenError::NotYetValid(from)),
        _ => {}
    }
    claims.scope.ok_or(TokenError::NoScope)?.parse().map_err(TokenError::UnknownScope)
}

/// A key that tokens are signed with.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    kid: String,
}

impl SigningKey {
    /// A new key: itself, and its file (PKCS #8, PEM).
    pub fn generate() -> Result<(SigningKey, String), String> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| "the system gives no random numbers".to_owned())?;
        let file = pem("PRIVATE KEY", document.as_ref());
        Ok((SigningKey::from_pem(file.as_bytes())?, file))
    }

    /// Reads a key's file, as [`SigningKey::generate`] or `openssl genpkey -algorithm ed25519` make it.
    pub fn from_pem(file: &[u8]) -> Result<SigningKey, String> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(file)
            .map_err(|_| "there is no private key (PKCS #8, PEM) in it".to_owned())?;
        // OpenSSL leaves the public key out.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| "its key is none of Ed25519".to_owned())?;
        let mut public = [0; 32];
        public.copy_from_slice(pair.public_key().as_ref());
        Ok(SigningKey { kid: PublicKey(public).id(), pair })
    }

    /// Its id, which tokens name it by, and which the name of its public file must be.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The file that verifies its tokens (SubjectPublicKeyInfo, PEM).
    pub fn public_pem(&self) -> String {
        pem("PUBLIC KEY", &[&SPKI_PREFIX, self.pair.public_key().as_ref()].concat())
    }

    /// A token that is good for `scope`, and for so long.
    pub fn sign(
        &self,
        scope: Scope,
        now: Timestamp,
        valid: SignedDuration,
    ) -> Result<String, String> {
        let until = now.checked_add(valid).map_err(|_| "it would expire too late".to_owned())?;
        let claims = Claims {
            scope: Some(scope.to_string()),
            exp: until.as_second(),
            nbf: None,
            iat: Some(now.as_second()),
        };
        let json = serde_json::to_vec(&claims).map_err(|error| error.to_string())?;
        let header = serde_json::to_vec(&OwnHeader { alg: "EdDSA", typ: "JWT", kid: &self.kid });
        Ok(self.sign_parts(&header.map_err(|error| error.to_string())?, &json))
    }

    /// Signs whatever these are.
    fn sign_parts(&self, header: &[u8], claims: &[u8]) -> String {
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.pair.sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

/// Without the key.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    // Base64 is ASCII: every 64 bytes are characters.
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[cfg(test)]
#[path = "token_tests.rs"]
mod tests;
