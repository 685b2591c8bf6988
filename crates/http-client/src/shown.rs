//! The certificate that a service shows, for those who look after its validity.

use std::io;
use std::time::{Duration, Instant};

use pgstrata_dial::{dial_by, host};
use pgstrata_identity::{Certificate, Stream, Whom};

use crate::Access;

/// Connects to the HTTP interface at `host:port`, verifies who that is as every request does, and returns the certificate by
/// which it says so; `None` where there is no TLS. All of it takes no longer than `patience`.
pub fn certificate_of(
    address: &str,
    access: &Access,
    whom: Whom,
    patience: Duration,
) -> io::Result<Option<Certificate>> {
    let Some(config) = access.config(whom) else { return Ok(None) };
    let config = config().map_err(io::Error::other)?;
    let deadline = Instant::now() + patience;
    let tcp = dial_by(address, deadline)?;
    let stream = Stream::connect(tcp, config, host(address), deadline)?;
    Ok(stream.peer_certificate().cloned())
}
