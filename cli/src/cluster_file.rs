//! The file that `--cluster` names: where a cluster's broker is, and how this command is let in.
//!
//! ```toml
//! broker = "https://broker.example.org:50051"
//! ca = "ca.pem"
//! # One of these three; 'ca' is for tokens, a certificate's directory has its own.
//! tls = "admin-me"
//! token = "eyJ..."
//! token_file = "token"
//! # Where the broker is not asked:
//! pageserver_http = "ps1.example.org:7001"
//! # Where WAL is that safekeepers no longer keep, for 'wal dump' and 'wal verify':
//! object_store = "s3://bucket/prefix"
//! s3_endpoint = "https://s3.example.org"
//! ```
//!
//! Paths are relative to the file, so that a directory with all of it may be moved. Whoever makes a mistake in it hears the
//! file, the field, and what to do; never what the token is.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use pgstrata_blob::Location;
use pgstrata_http_client::{Access, Bearer};
use pgstrata_identity::{CA_FILE, Identity, MAX_TOKEN, SmallFile};
use serde::Deserialize;
use ureq::http::Uri;

/// Bytes of the file, at most.
const LIMIT_BYTES: u64 = 64 << 10;
/// Of a file of CAs, at most.
const CA_LIMIT_BYTES: u64 = 256 << 10;

const REMEDY: &str = "name a file that 'pgstrata cluster export' wrote";
const TOKEN_REMEDY: &str = "put there what 'pgstrata auth token' prints";

/// What is written in it. No `Debug`: it may hold a token.
#[derive(Clone, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// URL of the broker.
    pub broker: String,
    /// Certificates of CAs.
    pub ca: Option<String>,
    /// Directory of a certificate.
    pub tls: Option<String>,
    /// A token.
    pub token: Option<String>,
    /// A file with one.
    pub token_file: Option<String>,
    /// The page server, if it is not the one that the broker names.
    pub pageserver_http: Option<String>,
    /// The object store.
    pub object_store: Option<String>,
    /// Its S3 endpoint, if it is not AWS.
    pub s3_endpoint: Option<String>,
}

/// Where WAL is that safekeepers no longer keep: a location, and an S3 endpoint.
pub type Archive = (String, Option<String>);

/// What became of it: files that it names were read.
pub struct ClusterFile {
    /// URL of the broker.
    pub broker: String,
    /// How services let us in.
    pub access: Access,
    /// The page server, as `host:port`, if the broker is not to be asked.
    pub pageserver_http: Option<String>,
    /// The object store, if it is said where that is.
    pub archive: Option<Archive>,
}

/// Whether a host, as it stands in an address, is this machine, whatever a resolver says.
fn is_loopback(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Refuses what is no `host:port`: it becomes part of a URL.
pub fn check_address(address: &str) -> Result<(), String> {
    let is_host = |host: &str| match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'))
    {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !host.is_empty() && host.bytes().all(fits)
        }
    };
    let parts = address.rsplit_once(':');
    let is_one = parts.is_some_and(|(host, port)| {
        is_host(host) && port.parse::<u16>().is_ok_and(|number| number.to_string() == port)
    });
    is_one.then_some(()).ok_or_else(|| format!("'{}' is no HOST:PORT", address.escape_debug()))
}

/// Refuses to speak in plain text with another machine.
pub fn check_plain(address: &str) -> Result<()> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    ensure!(
        is_loopback(host),
        "{address} is not on this machine, and is spoken to with TLS only: the cluster's file needs an https:// broker, and \
         'tls' or a token"
    );
    Ok(())
}

/// Whether the broker is spoken to with TLS, if its URL can be one.
fn is_https(broker: &str) -> Result<bool, String> {
    let example = "such as https://broker.example.org:50051";
    let uri: Uri = broker.parse().map_err(|_| format!("it is no URL, {example}"))?;
    let authority = uri.authority().ok_or_else(|| format!("it names no host, {example}"))?;
    if authority.as_str().contains('@') {
        return Err("it has a user's name in it: leave that out".to_owned());
    }
    if !["", "/"].contains(&uri.path()) || uri.query().is_some() {
        return Err(format!("nothing follows the port, {example}"));
    }
    match (uri.scheme_str(), is_loopback(authority.host())) {
        (Some("https"), _) => Ok(true),
        (Some("http"), true) => Ok(false),
        (Some("http"), false) => {
            Err("plain text is for this machine only: write https://, and give 'tls' or a token"
                .to_owned())
        }
        _ => Err(format!("it begins with http:// or https://, {example}")),
    }
}

/// The number of the line that a byte is in.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

impl Written {
    /// Reads a file, and nothing that it names.
    pub fn read(path: &Path) -> Result<Written> {
        let file = SmallFile::read(path, LIMIT_BYTES, REMEDY)?;
        let written =
            Written::parse(&file.bytes).map_err(|why| anyhow!("{}: {why}", path.display()))?;
        if written.token.is_some() {
            file.check_private()?;
        }
        Ok(written)
    }

    /// Reads the text of a file. The error says the line or the field, and never a value: it may be a token.
    pub fn parse(bytes: &[u8]) -> Result<Written, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
        let written: Written = toml::from_str(text).map_err(|error| {
            // Not how it is displayed, which shows the line.
            let message = error.message().replace('\n', " ");
            match error.span() {
                Some(span) => format!("line {}: {message}", line_of(text, span.start)),
                None => message,
            }
        })?;
        written.check()?;
        Ok(written)
    }

    /// What does not need other files.
    fn check(&self) -> Result<(), String> {
        let of = |field: &str, why: String| format!("'{field}': {why}");
        let secure = is_https(&self.broker).map_err(|why| of("broker", why))?;
        let ways = [
            ("tls", self.tls.is_some()),
            ("token", self.token.is_some()),
            ("token_file", self.token_file.is_some()),
        ];
        let given: Vec<_> = ways.iter().filter(|way| way.1).map(|way| way.0).collect();
        match (given.as_slice(), secure) {
            ([], true) => {
                return Err("it says nothing of how to be let in: give 'tls' (the directory of an admin's certificate), \
                            'token' or 'token_file'"
                    .to_owned());
            }
            ([], false) if self.ca.is_some() => {
                return Err(of("ca", "it is for https:// brokers: leave it out".to_owned()));
            }
            ([], false) => {}
            ([way], false) => {
                return Err(of(
                    way,
                    "it is not shown without TLS: write https:// for the broker".to_owned(),
                ));
            }
            (["tls"], true) => {}
            ([way], true) if self.ca.is_none() => {
                let why = "it is shown to services of known CAs only: give their ca.pem as 'ca'";
                return Err(of(way, why.to_owned()));
            }
            ([_], true) => {}
            (several, _) => {
                let named: Vec<_> = several.iter().map(|way| format!("'{way}'")).collect();
                return Err(format!("{} are one too many: keep one of them", named.join(" and ")));
            }
        }
        if let Some(address) = &self.pageserver_http {
            check_address(address).map_err(|why| of("pageserver_http", why))?;
            if !secure {
                check_plain(address).map_err(|why| of("pageserver_http", why.to_string()))?;
            }
        }
        match (&self.object_store, &self.s3_endpoint) {
            (None, Some(_)) => {
                let why = "it is that of 'object_store', which is not given".to_owned();
                return Err(of("s3_endpoint", why));
            }
            (Some(store), _) => {
                let location = store.parse::<Location>();
                location.map_err(|why| of("object_store", why.to_string().replace('\n', " ")))?;
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// As it is written into a file.
    pub fn to_text(&self) -> String {
        let mut text = String::from(
            "# How 'pgstrata --cluster FILE' finds a cluster and is let in. Paths are relative to this file.\n",
        );
        let fields = [
            ("broker", Some(&self.broker)),
            ("ca", self.ca.as_ref()),
            ("tls", self.tls.as_ref()),
            ("token", self.token.as_ref()),
            ("token_file", self.token_file.as_ref()),
            ("pageserver_http", self.pageserver_http.as_ref()),
            ("object_store", self.object_store.as_ref()),
            ("s3_endpoint", self.s3_endpoint.as_ref()),
        ];
        for (name, value) in fields {
            let Some(value) = value else { continue };
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name} = {}", quoted(value));
        }
        text
    }
}

/// A basic string of TOML.
fn quoted(value: &str) -> String {
    let mut text = String::from('"');
    for letter in value.chars() {
        match letter {
            '"' | '\\' => text.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _ = write!(text, "\\u{:04X}", u32::from(letter));
            }
            letter => text.push(letter),
        }
    }
    text.push('"');
    text
}

/// A token in a file of its own.
pub fn read_token(path: &Path) -> Result<String> {
    // A line's end is no part of it.
    let file = SmallFile::read(path, MAX_TOKEN as u64 + 2, TOKEN_REMEDY)?;
    file.check_private()?;
    let text = String::from_utf8(file.bytes).unwrap_or_default().trim_end().to_owned();
    match Bearer::new(&text) {
        Ok(_) => Ok(text),
        Err(why) => bail!("{}: {why}; {TOKEN_REMEDY}", path.display()),
    }
}

/// A certificate's directory says itself whose certificates are believed: another list beside it would not be looked at.
fn check_same_authorities(ca: &Path, directory: &Path) -> Result<()> {
    let remedy = "leave 'ca' out, which is for tokens";
    let read = |path: &Path| SmallFile::read(path, CA_LIMIT_BYTES, remedy);
    let own = directory.join(CA_FILE);
    ensure!(
        read(ca)?.bytes == read(&own)?.bytes,
        "'ca' is not what {} is, which goes with the certificate in 'tls': {remedy}",
        own.display()
    );
    Ok(())
}

/// How services let us in, by what is written in a file in this directory.
fn access(written: &Written, directory: &Path) -> Result<Access> {
    let in_directory = |path: &String| directory.join(path);
    let ca = written.ca.as_ref().map(in_directory);
    if let Some(tls) = written.tls.as_ref().map(in_directory) {
        if let Some(ca) = ca {
            check_same_authorities(&ca, &tls)?;
        }
        return Ok(Access::Certificate(Identity::open(&tls).context("'tls'")?));
    }
    let token = match (&written.token, &written.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => read_token(&directory.join(file)).context("'token_file'")?,
        (None, None) => return Ok(Access::Local),
    };
    let bearer = Bearer::new(&token).map_err(|why| anyhow!("'token': {why}; {TOKEN_REMEDY}"))?;
    // Checked to be there.
    let ca = ca.context("'ca': it is missing")?;
    Access::token(&ca, bearer).context("'ca'")
}

impl ClusterFile {
    /// Reads a file, and what it names.
    pub fn read(path: &Path) -> Result<ClusterFile> {
        let directory = path.parent().unwrap_or(Path::new(""));
        let written = Written::read(path)?;
        ClusterFile::of(written, directory).with_context(|| path.display().to_string())
    }

    /// Of what is, or is to be, written in a file in this directory.
    pub fn of(written: Written, directory: &Path) -> Result<ClusterFile> {
        let access = access(&written, directory)?;
        let archive = match written.object_store {
            Some(store) => Some((in_place(&store, directory)?, written.s3_endpoint)),
            None => None,
        };
        let broker = written.broker.trim_end_matches('/').to_owned();
        Ok(ClusterFile { broker, access, pageserver_http: written.pageserver_http, archive })
    }
}

/// An object store's location, of which a directory is relative to the file's.
fn in_place(store: &str, directory: &Path) -> Result<String> {
    match store.parse::<Location>().context("'object_store'")? {
        Location::Directory(path) => Ok(PathBuf::from(directory).join(path).display().to_string()),
        _ => Ok(store.to_owned()),
    }
}

#[cfg(test)]
#[path = "cluster_file_tests.rs"]
mod tests;
