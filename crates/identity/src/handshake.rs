//! A handshake of blocking sockets that has an end, whatever the other side does.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use rustls::Connection;

use crate::explain::tls_error;

/// How long the other side may take to read why it is refused.
const MOMENT: Duration = Duration::from_millis(500);

/// Makes the handshake. `deadline` is for all of it: a client that sends a byte now and then ends it too. The socket's
/// timeouts are what they were before, unless it fails.
pub(crate) fn handshake(
    tcp: &TcpStream,
    session: &mut Connection,
    deadline: Instant,
) -> io::Result<()> {
    // What arrives on one that does not block is waited for by somebody else, with another deadline.
    tcp.set_nonblocking(false)?;
    let before = (tcp.read_timeout()?, tcp.write_timeout()?);
    let mut socket = tcp;
    while session.is_handshaking() || session.wants_write() {
        while session.wants_write() {
            tcp.set_write_timeout(Some(left(deadline)?))?;
            match session.write_tls(&mut socket).map_err(late) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        if !session.is_handshaking() {
            break;
        }
        tcp.set_read_timeout(Some(left(deadline)?))?;
        match session.read_tls(&mut socket).map_err(late) {
            Ok(0) => {
                let text = "the other side closed the connection during the TLS handshake";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if let Err(error) = session.process_new_packets() {
            tell_why(tcp, session, deadline);
            return Err(tls_error(error));
        }
    }
    tcp.set_read_timeout(before.0)?;
    tcp.set_write_timeout(before.1)
}

/// How much time there is yet: never none, which would mean forever.
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left.max(Duration::from_millis(1))),
        _ => Err(late(io::ErrorKind::TimedOut.into())),
    }
}

fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long")
        }
        _ => error,
    }
}

/// Sends the alert that says what is wrong, as far as it goes without waiting, and waits a moment until the other side has
/// read it: a connection that is closed while something lies unread is reset, and what was sent is lost with it.
fn tell_why(tcp: &TcpStream, session: &mut Connection, deadline: Instant) {
    let mut alert = Vec::new();
    while session.wants_write() && session.write_tls(&mut alert).is_ok() {}
    // The connection is lost, whatever comes of this.
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if rustix::net::send(tcp, &alert, flags).is_err() || tcp.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let until = deadline.min(Instant::now() + MOMENT);
    let mut socket = tcp;
    let mut unread = [0; 4096];
    while let Ok(left) = left(until)
        && tcp.set_read_timeout(Some(left)).is_ok()
        && socket.read(&mut unread).is_ok_and(|count| count > 0)
    {}
}
