//! Where the names in URLs are.

use std::time::{Duration, Instant};

use pgstrata_dial::look_up;
use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// For requests that may take longer.
const LONGEST: Duration = Duration::from_secs(60);

/// Looks up as all who connect do. It is asked for each request, also where a connection is kept that the request will take:
/// so that a name server that is silent must not keep it waiting.
#[derive(Debug)]
pub struct Looked;

impl Resolver for Looked {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let parts = uri.scheme().zip(uri.authority());
        let address = parts.and_then(|(scheme, to)| DefaultResolver::host_and_port(scheme, to));
        let address = address.ok_or_else(|| Error::BadUri(format!("{uri} names no host")))?;
        let found = look_up(&address, Instant::now() + (*timeout.after).min(LONGEST));
        let found = found.map_err(|error| match error.kind() {
            std::io::ErrorKind::TimedOut => Error::Timeout(timeout.reason),
            _ => Error::Io(error),
        })?;
        let mut addresses = self.empty();
        // As many as there is room for: names of services have one or two.
        let taken = found.into_iter().map_while(|address| addresses.try_push(address).ok());
        taken.for_each(drop);
        Ok(addresses)
    }
}
