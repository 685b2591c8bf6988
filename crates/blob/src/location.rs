//! Where an object store is: `s3://bucket/prefix`, a directory, or `memory://`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A parsed `--object-store` value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A local directory (created if missing).
    Directory(PathBuf),
    /// A bucket and a prefix inside it (possibly empty, never with a slash at either end).
    S3 {
        /// Bucket name.
        bucket: String,
        /// Prefix of every object.
        prefix: String,
    },
    /// This process's memory, for tests.
    Memory,
}

/// The text was no object store location.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an object store: {reason} (expected a directory or s3://bucket/prefix)")]
pub struct LocationError {
    text: String,
    reason: &'static str,
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Location, LocationError> {
        let error = |reason| LocationError { text: text.to_owned(), reason };
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(error("the bucket name is missing"));
            }
            let valid = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
            if !bucket.bytes().all(valid) {
                return Err(error("the bucket name has an invalid character"));
            }
            let prefix = prefix.trim_matches('/').to_owned();
            return Ok(Location::S3 { bucket: bucket.to_owned(), prefix });
        }
        if text == "memory://" {
            return Ok(Location::Memory);
        }
        let path = text.strip_prefix("file://").unwrap_or(text);
        if path.contains("://") {
            return Err(error("the scheme is not known"));
        }
        if path.is_empty() {
            return Err(error("it is empty"));
        }
        Ok(Location::Directory(PathBuf::from(path)))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Directory(path) => write!(f, "{}", path.display()),
            Location::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Location::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Location::Memory => write!(f, "memory://"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms() {
        let s3 = Location::S3 { bucket: "b".into(), prefix: "p/q".into() };
        assert_eq!("s3://b/p/q/".parse(), Ok(s3.clone()));
        assert_eq!(s3.to_string(), "s3://b/p/q");
        assert_eq!("file:///x".parse(), Ok(Location::Directory("/x".into())));
        assert_eq!("x/y".parse(), Ok(Location::Directory("x/y".into())));
        for text in ["s3://", "s3:///p", "gs://b", "", "s3://a b/c"] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
