//! The directory of public keys that tokens are verified by: `KID.pem` each, read anew when it changes.
//!
//! Two keys side by side are how one is exchanged: the new one's file comes, tokens are signed with it, and the old one's
//! file goes when the last token that it signed has expired.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;

use crate::role::is_name;
use crate::small_file::SmallFile;
use crate::token::{PublicKey, check};
use crate::watched::{LOOK_EVERY, Source, Stamp, Watched};
use crate::{Scope, TokenError, Trouble};

/// Keys in one directory.
const MAX_KEYS: usize = 64;
/// Names in one directory that are no keys' as well: it is read to the end only so far.
const MAX_NAMES: usize = 1024;
const MAX_KEY_BYTES: u64 = 16 * 1024;

const REMEDY: &str = "put there the public keys of 'pgstrata auth init' or 'rotate', each with the name that it has in token-keys";

/// The keys that tokens are believed by. Copies share what was read.
#[derive(Clone)]
pub struct Tokens(Arc<Watched<Directory>>);

impl Tokens {
    /// Reads a directory, which may be empty: then no token is believed.
    pub fn open(directory: &Path) -> Result<Tokens, Trouble> {
        Tokens::looking_every(directory, LOOK_EVERY)
    }

    /// As [`Tokens::open`], but files are looked at so often at most. For tests.
    #[doc(hidden)]
    pub fn looking_every(directory: &Path, every: Duration) -> Result<Tokens, Trouble> {
        Ok(Tokens(Arc::new(Watched::open(Directory { path: directory.to_owned() }, every)?)))
    }

    /// What a token is good for, if it is valid. Looks at the directory at most once a second, as
    /// [`Identity::server`](crate::Identity::server) does.
    pub fn check(&self, token: &str, now: Timestamp) -> Result<Scope, TokenError> {
        let keys = self.0.get();
        check(token, now, |kid| keys.get(kid))
    }

    /// What keeps the directory from being used as it is now; for the status.
    pub fn trouble(&self) -> Option<String> {
        self.0.trouble().map(|trouble| trouble.to_string())
    }
}

/// Which keys: they are public.
impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tokens").field(&self.0.source().path).finish()
    }
}

struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Files of keys, sorted. Hidden ones, and those that are none by their names, are somebody else's.
    fn files(&self) -> Result<Vec<(String, PathBuf)>, Trouble> {
        let unreadable = |error: std::io::Error| Trouble::unreadable(&self.path, &error, REMEDY);
        let mut files = Vec::new();
        for (number, entry) in std::fs::read_dir(&self.path).map_err(unreadable)?.enumerate() {
            if number >= MAX_NAMES {
                let what = format!("it holds more than {MAX_NAMES} files");
                return Err(Trouble::new(&self.path, what, REMEDY));
            }
            let name = entry.map_err(unreadable)?.file_name();
            let kid = name.to_str().and_then(|name| name.strip_suffix(".pem"));
            if let Some(kid) = kid.filter(|kid| is_name(kid)) {
                files.push((kid.to_owned(), self.path.join(&name)));
            }
        }
        if files.len() > MAX_KEYS {
            let what = format!("it holds more than {MAX_KEYS} keys");
            return Err(Trouble::new(
                &self.path,
                what,
                "take out those of tokens that have expired",
            ));
        }
        files.sort();
        Ok(files)
    }
}

impl Source for Directory {
    type Value = HashMap<String, PublicKey>;
    const WHAT: &'static str = "keys of tokens";

    fn stamps(&self) -> Result<Vec<Stamp>, Trouble> {
        // The directory's own tells nothing more, and changes with what does not matter.
        self.files()?.iter().map(|(_, path)| Stamp::of(path, REMEDY)).collect()
    }

    fn read(&self) -> Result<HashMap<String, PublicKey>, Trouble> {
        let key = |(kid, path): (String, PathBuf)| {
            let bytes = SmallFile::read(&path, MAX_KEY_BYTES, REMEDY)?.bytes;
            let key = SubjectPublicKeyInfoDer::from_pem_slice(&bytes)
                .ok()
                .and_then(|der| PublicKey::from_spki(&der));
            let what = "it is no public key of Ed25519 (SubjectPublicKeyInfo, PEM)";
            key.map(|key| (kid, key)).ok_or_else(|| Trouble::new(&path, what, REMEDY))
        };
        self.files()?.into_iter().map(key).collect()
    }
}
