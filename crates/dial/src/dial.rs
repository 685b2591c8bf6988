//! Connecting to a `HOST:PORT`, by whichever of its addresses answers.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use pgstrata_identity::{Identity, Stream, Whom};

use crate::look_up;

/// How long a name may be looked up, besides: two name servers that are silent, as the system waits for them.
const LOOK_UP: Duration = Duration::from_secs(15);

/// Connects to the first address of `HOST:PORT` that answers. All of them together get `timeout`, after the name was looked
/// up, which may take 15 s where it was not known before: each an equal share of what is left, so that one that says nothing
/// leaves time for the next.
pub fn dial(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let found = look_up(address, Instant::now() + LOOK_UP)?;
    dial_until(&found, Instant::now() + timeout)
}

/// Connects as [`dial`] does, by `deadline`, the look-up of the name within it.
pub fn dial_by(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    dial_until(&look_up(address, deadline)?, deadline)
}

/// Connects as [`dial`] does, and makes sure by TLS, where we have an identity to show, that it is `whom` we mean.
pub fn dial_to(
    address: &str,
    whom: Whom,
    identity: Option<&Identity>,
    timeout: Duration,
) -> io::Result<Stream> {
    let tcp = dial(address, timeout)?;
    tcp.set_nodelay(true)?;
    match identity {
        None => Ok(Stream::from(tcp)),
        Some(identity) => {
            let deadline = Instant::now() + timeout;
            Stream::connect(tcp, identity.client(whom, &[]), host(address), deadline)
        }
    }
}

/// The host of `HOST:PORT`.
pub fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

fn dial_until(found: &[SocketAddr], deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for (tried, address) in found.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (found.len() - tried) as u32;
        if share.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_next_address_is_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        let refusing = SocketAddr::from(([127, 0, 0, 3], good.port()));
        let soon = || Instant::now() + Duration::from_secs(5);
        assert_eq!(dial_until(&[refusing, good], soon()).unwrap().peer_addr().unwrap(), good);
        let error = dial_until(&[refusing], soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(dial_until(&[good], Instant::now()).is_err());
        assert!(dial(&format!("localhost:{}", good.port()), Duration::from_secs(5)).is_ok());
    }

    #[test]
    fn hosts_are_told_from_ports() {
        let cases = [("a:1", "a"), ("[::1]:7", "::1"), ("10.0.0.1:0", "10.0.0.1"), ("a", "a")];
        assert!(cases.iter().all(|(address, expected)| host(address) == *expected));
    }

    #[test]
    fn an_address_that_says_nothing_leaves_time_for_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        // Full: what is connected is never accepted, so that the next connection waits.
        let full =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        full.listen(0).unwrap();
        let silent = full.local_addr().unwrap().as_socket().unwrap();
        let _waits = TcpStream::connect(silent).unwrap();
        let deadline = Instant::now() + Duration::from_millis(600);
        assert_eq!(dial_until(&[silent, good], deadline).unwrap().peer_addr().unwrap(), good);
    }
}
