//! Keys of tokens, and tokens.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use jiff::{SignedDuration, Timestamp};
use pgstrata_identity::{Scope, SigningKey};

use super::authority::read_text;
use super::writing::{self, PRIVATE, PUBLIC};
use crate::out;

/// Public keys, one file each.
pub const KEYS_DIRECTORY: &str = "token-keys";
/// The private key that signs.
pub const SIGNING_KEY_FILE: &str = "token-key.pem";

/// Names of files of public keys, sorted.
pub fn public_keys(dir: &Path) -> Result<Vec<String>> {
    let path = dir.join(KEYS_DIRECTORY);
    let mut kids = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("can't read {}", path.display()))? {
        let name = entry?.file_name();
        let kid = name.to_str().and_then(|name| name.strip_suffix(".pem"));
        kids.extend(kid.filter(|kid| !kid.starts_with('.')).map(str::to_owned));
    }
    kids.sort();
    Ok(kids)
}

/// The key that signs tokens now.
pub fn signing_key(dir: &Path) -> Result<SigningKey> {
    let path = dir.join(SIGNING_KEY_FILE);
    SigningKey::from_pem(read_text(&path)?.as_bytes()).map_err(|error| {
        anyhow!("{}: {error}; 'pgstrata auth rotate' makes a new one", path.display())
    })
}

/// Makes a key that signs from now on. Returns its id.
pub fn make(dir: &Path) -> Result<String> {
    let (key, private) = SigningKey::generate().map_err(|error| anyhow!(error))?;
    let keys = dir.join(KEYS_DIRECTORY);
    fs::create_dir_all(&keys).with_context(|| format!("can't create {}", keys.display()))?;
    // First what believes it, then what signs with it.
    writing::put(&keys, &format!("{}.pem", key.kid()), &key.public_pem(), PUBLIC)?;
    writing::put(dir, SIGNING_KEY_FILE, &private, PRIVATE)?;
    Ok(key.kid().to_owned())
}

/// `auth token`.
pub fn token(dir: &Path, scope: Scope, ttl: SignedDuration) -> Result<()> {
    let key = signing_key(dir)?;
    let public = dir.join(KEYS_DIRECTORY).join(format!("{}.pem", key.kid()));
    // Whoever took it away wants its tokens believed no more.
    ensure!(
        public.exists(),
        "{} is not there, so no service would believe the token: 'pgstrata auth rotate' makes a new key",
        public.display()
    );
    let token = key.sign(scope, Timestamp::now(), ttl).map_err(|error| anyhow!(error))?;
    out::line(&token)
}

/// `auth rotate`.
pub fn rotate(dir: &Path) -> Result<()> {
    // In a directory of `init` only.
    let former = public_keys(dir)?;
    let path = dir.join(SIGNING_KEY_FILE);
    ensure!(path.exists(), "{} is not there: 'pgstrata auth init' makes it", path.display());
    let kid = make(dir)?;
    let keys = dir.join(KEYS_DIRECTORY);
    let keys = keys.display();
    out::line(&format!(
        "tokens are signed with the key {kid} from now on: copy {keys}/{kid}.pem to services first. Those signed before are \
         believed as long as these files are there: {}",
        former.iter().map(|kid| format!("{keys}/{kid}.pem")).collect::<Vec<_>>().join(", ")
    ))
}
