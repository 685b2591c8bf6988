//! What an S3 client is told from outside, checked before a library meets it.
//!
//! The S3 library panics on an endpoint that is no URL, and asks the metadata service of a cloud
//! machine when there are no credentials; people should hear what they forgot instead.

use http::Uri;

/// Variables with which endpoints are given.
const ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"];
/// Variables of which any says where credentials come from.
const CREDENTIALS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];

/// A variable that is set to something.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Keeps other processes of the same user out of this one's memory and environment, if credentials are in it: computes run
/// as that user, and whoever is superuser of a database has its rights. For the start of a service.
pub fn hide_credentials() -> std::io::Result<()> {
    if without_credentials() {
        return Ok(());
    }
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Whether nothing says where credentials come from.
pub(crate) fn without_credentials() -> bool {
    CREDENTIALS.iter().all(|name| variable(name).is_none())
}

/// Checks the endpoint given, or those in the environment.
pub(crate) fn check(endpoint: Option<&str>) -> Result<(), String> {
    match endpoint {
        Some(endpoint) => {
            check_endpoint(endpoint)?;
            // A server of one's own knows no metadata service.
            match without_credentials() {
                true => Err("AWS_ACCESS_KEY_ID is not set".into()),
                false => Ok(()),
            }
        }
        None => ENDPOINTS
            .iter()
            .filter_map(|name| variable(name))
            .try_for_each(|endpoint| check_endpoint(&endpoint)),
    }
}

fn check_endpoint(text: &str) -> Result<(), String> {
    let valid = text.parse::<Uri>().is_ok_and(|uri| {
        let authority = uri.authority().map(|authority| authority.as_str().to_owned());
        let host = uri.host().filter(|host| !host.is_empty()).map(|host| match uri.port_u16() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        });
        matches!(uri.scheme_str(), Some("http" | "https"))
            && host.is_some()
            && host == authority
            && uri.query().is_none()
    });
    match valid {
        true => Ok(()),
        false => {
            Err(format!("'{text}' is no endpoint (expected a URL like http://127.0.0.1:9000)"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_urls_with_a_host() {
        for good in
            ["http://127.0.0.1:9000", "https://s3.example.com", "http://[::1]:9000/", "http://h/x"]
        {
            assert_eq!(check_endpoint(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "h",
            "127.0.0.1:9000",
            "localhost:9000",
            "http://",
            "http://:9000",
            "ftp://h",
            "http://a b",
            "/x",
            "http://h:port",
            "http://h?x",
        ] {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
    }
}
