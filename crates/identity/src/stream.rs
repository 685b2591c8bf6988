//! A connection of blocking threads, with or without TLS.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::explain::tls_error;
use crate::{Certificate, Role, Tls};

/// A connection. One thread may read while another writes, as on a `TcpStream`: copies are the same connection, and
/// `&Stream` reads and writes too. It ends when its last copy goes.
///
/// Timeouts are the socket's: one that reading runs into loses nothing, and reading goes on after it; one that writing
/// runs into ends writing on a connection with TLS, because a part of a record may have left ([`Tls`]).
#[derive(Clone, Debug)]
pub enum Stream {
    /// Plain text, which is for loopback only.
    Plain(Arc<TcpStream>),
    /// TLS, whose handshake is done.
    Tls(Arc<Tls>),
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Stream {
        Stream::Plain(Arc::new(tcp))
    }
}

impl Stream {
    /// Makes a server's side of the handshake, which must be done by the deadline. Nothing of the client's may have been
    /// read yet.
    pub fn accept(
        tcp: TcpStream,
        config: Arc<ServerConfig>,
        deadline: Instant,
    ) -> io::Result<Stream> {
        let session = ServerConnection::new(config).map_err(tls_error)?;
        Ok(Stream::Tls(Arc::new(Tls::new(tcp, session.into(), deadline)?)))
    }

    /// A server's connection whose handshake somebody else has made; what is left of it must be done by the deadline.
    pub fn of_server(
        tcp: TcpStream,
        session: ServerConnection,
        deadline: Instant,
    ) -> io::Result<Stream> {
        Ok(Stream::Tls(Arc::new(Tls::new(tcp, session.into(), deadline)?)))
    }

    /// Makes a client's side of the handshake, which must be done by the deadline. `host` is the DNS name or IP address
    /// that the server's certificate must be valid for.
    ///
    /// That the server refuses *our* certificate is the error of the first read, not of this: so it is in TLS 1.3.
    pub fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        host: &str,
        deadline: Instant,
    ) -> io::Result<Stream> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            let text = format!("{} is no DNS name and no IP address", crate::role::quoted(host));
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let session = ClientConnection::new(config, name).map_err(tls_error)?;
        Ok(Stream::Tls(Arc::new(Tls::new(tcp, session.into(), deadline)?)))
    }

    /// Who the peer is, by its certificate: nobody where it showed none, or where there is no TLS.
    pub fn peer_role(&self) -> Option<&Role> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(tls) => tls.peer_role(),
        }
    }

    /// The certificate that says so: until when it is valid, for those who look after that.
    pub fn peer_certificate(&self) -> Option<&Certificate> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(tls) => tls.peer_certificate(),
        }
    }

    /// Whether there is TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self, Stream::Tls(_))
    }

    /// Whether reading would give something although nothing more comes from the socket: what was received with what was
    /// read before. Who waits for the socket to be readable asks this first.
    pub fn holds_more(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => tls.holds_more(),
        }
    }

    /// The protocol that both sides chose (ALPN), if they did.
    pub fn protocol(&self) -> Option<&[u8]> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(tls) => tls.protocol(),
        }
    }

    /// The socket, for its options. What is read from it or written to it is lost to TLS.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls.tcp(),
        }
    }

    /// How long reading may wait; see [`TcpStream::set_read_timeout`].
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp().set_read_timeout(timeout)
    }

    /// How long writing may wait; see [`TcpStream::set_write_timeout`], and what it ends above.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp().set_write_timeout(timeout)
    }

    /// See [`TcpStream::peer_addr`].
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.tcp().peer_addr()
    }

    /// Ends one or both directions, from any thread, without waiting: threads that read or write find out. The peer is told
    /// by TLS that writing ends on purpose, unless a write is under way, which this cuts off. On a socket that does not
    /// block, flush before: what has not left by then does not leave.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Stream::Plain(tcp) => tcp.shutdown(how),
            Stream::Tls(tls) => tls.shutdown(how),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => (&**tcp).read(buffer),
            Stream::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => (&**tcp).write(buffer),
            Stream::Tls(tls) => tls.write(&[IoSlice::new(buffer)]),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => (&**tcp).write_vectored(slices),
            Stream::Tls(tls) => tls.write(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(tcp) => (&**tcp).flush(),
            Stream::Tls(tls) => tls.flush(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self).flush()
    }
}
