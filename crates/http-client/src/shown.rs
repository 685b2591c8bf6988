//! The certificate that a service shows, for those who look after its validity.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use pgstrata_identity::{Certificate, Stream, Whom};

use crate::Access;

/// Connects to the HTTP interface at `host:port`, verifies who that is as every request does, and returns the certificate by
/// which it says so; `None` where there is no TLS. The name's look-up is the one wait that `patience` does not end: that is the
/// resolver's own.
pub fn certificate_of(
    address: &str,
    access: &Access,
    whom: Whom,
    patience: Duration,
) -> io::Result<Option<Certificate>> {
    let Some(config) = access.config(whom) else { return Ok(None) };
    let config = config().map_err(io::Error::other)?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let deadline = Instant::now() + patience;
    let mut failure = io::Error::other("its name has no address");
    for address in address.to_socket_addrs()? {
        // One that has no time left is not tried: a timeout of nothing is refused as no timeout.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let shown = TcpStream::connect_timeout(&address, left)
            .and_then(|tcp| Stream::connect(tcp, config.clone(), host, deadline));
        match shown {
            Ok(stream) => return Ok(stream.peer_certificate().cloned()),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}
