//! A listener for HTTP whose connections end when no answer was sent for too long.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

use crate::{Place, Port};

/// Connections of one HTTP port.
const CONNECTIONS: usize = 512;

/// Of one peer.
const OF_ONE_PEER: usize = 384;

/// A request must have come whole, and been answered, within this time of the answer before it;
/// an idle connection ends then too.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub struct PatientListener {
    port: Port,
    patience: Duration,
}

impl PatientListener {
    /// A listener with the usual limits.
    pub fn new(listeners: Vec<TcpListener>) -> PatientListener {
        let port = Port::new(listeners, "HTTP", OF_ONE_PEER, CONNECTIONS);
        PatientListener { port, patience: PATIENCE }
    }

    /// Waits only so long.
    pub fn with_patience(self, patience: Duration) -> PatientListener {
        PatientListener { patience, ..self }
    }
}

impl axum::serve::Listener for PatientListener {
    type Io = PatientStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (PatientStream, SocketAddr) {
        let (stream, peer, place) = self.port.next().await;
        (PatientStream::new(stream, place, self.patience), peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.port.local_addr()
    }
}

/// A connection that gives up reading when nothing was written for too long.
#[derive(Debug)]
pub struct PatientStream {
    stream: TcpStream,
    patience: Duration,
    deadline: Pin<Box<Sleep>>,
    _place: Place,
}

impl PatientStream {
    fn new(stream: TcpStream, place: Place, patience: Duration) -> PatientStream {
        let deadline = Box::pin(tokio::time::sleep(patience));
        PatientStream { stream, patience, deadline, _place: place }
    }

    fn has_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl AsyncRead for PatientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.has_time(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PatientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // A client that takes nothing runs into the same deadline.
        self.has_time(context)?;
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if matches!(written, Poll::Ready(Ok(count)) if count > 0) {
            let next = Instant::now() + self.patience;
            self.deadline.as_mut().reset(next);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::post;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn serve(patience: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = PatientListener::new(vec![listener]).with_patience(patience);
        let router = Router::new().route("/", post(|body: String| async move { body }));
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    #[tokio::test]
    async fn s3_a_slow_request_is_given_up() {
        let address = serve(Duration::from_millis(500)).await;
        let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n";
        // In the head, and in the body.
        for already in [0, head.len()] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&head.as_bytes()[..already]).await.unwrap();
            let rest = &head.as_bytes()[already..];
            let slow = rest.iter().chain(std::iter::repeat(&b'x')).take(100);
            let mut sent = 0;
            for byte in slow {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                sent += 1;
            }
            assert!(sent < 100, "it was listened to for {sent} bytes");
        }
    }

    #[tokio::test]
    async fn a_quick_client_asks_again_and_again() {
        let address = serve(Duration::from_millis(500)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        for _ in 0..5 {
            let request = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello";
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; 512];
            let count = stream.read(&mut answer).await.unwrap();
            assert!(answer[..count].ends_with(b"hello"));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
