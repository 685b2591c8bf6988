//! A connection of tasks, with or without TLS.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pgstrata_identity::rustls::ServerConfig;
use pgstrata_identity::{Stream, explanation, peer_role};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::Peer;

/// See the module.
#[derive(Debug)]
pub enum AsyncStream {
    /// Plain text, which is for loopback only.
    Plain(TcpStream),
    /// TLS, whose handshake is done.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncStream {
    /// Makes a server's side of the handshake. Whoever calls has a deadline for it. Nothing of the client's may have been
    /// read yet.
    pub async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> io::Result<AsyncStream> {
        let accepted = TlsAcceptor::from(config).accept(tcp).await;
        // What is wrong with a certificate, and whose it is.
        let explained = |error: io::Error| match explanation(&error) {
            Some(text) => io::Error::new(error.kind(), text),
            None => error,
        };
        Ok(AsyncStream::Tls(Box::new(accepted.map_err(explained)?)))
    }

    /// The same connection for a thread that may wait, for `writing` at most when it writes.
    pub fn into_blocking(self, writing: Duration) -> io::Result<Stream> {
        let (tcp, session) = match self {
            AsyncStream::Plain(tcp) => (tcp, None),
            AsyncStream::Tls(stream) => {
                let (tcp, session) = stream.into_inner();
                (tcp, Some(session))
            }
        };
        let tcp = tcp.into_std()?;
        tcp.set_nonblocking(false)?;
        tcp.set_write_timeout(Some(writing))?;
        match session {
            None => Ok(Stream::from(tcp)),
            Some(session) => Stream::of_server(tcp, session, Instant::now() + writing),
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> io::Result<Peer> {
        let AsyncStream::Tls(stream) = self else { return Ok(Peer::Local) };
        match stream.get_ref().1.peer_certificates() {
            None | Some([]) => Ok(Peer::Unknown),
            Some(chain) => match peer_role(chain) {
                Ok(role) => Ok(Peer::Certified(role)),
                // The verifier has read the same.
                Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            },
        }
    }

    /// The protocol that both sides chose (ALPN), if they did.
    pub fn protocol(&self) -> Option<&[u8]> {
        match self {
            AsyncStream::Plain(_) => None,
            AsyncStream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }
}

impl AsyncRead for AsyncStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            AsyncStream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            AsyncStream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for AsyncStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            AsyncStream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            AsyncStream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            AsyncStream::Plain(stream) => Pin::new(stream).poll_flush(context),
            AsyncStream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            AsyncStream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            AsyncStream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
