//! Serving HTTP: connections that end when no answer was sent for too long, and requests that tell whose they are.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use pgstrata_identity::Clients;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, timeout};

use crate::who::Caller;
use crate::{AsyncStream, GREETING, Port, Security, Sparing};

/// What both sides say of it in TLS (ALPN).
const PROTOCOL: &[u8] = b"http/1.1";

/// See [`HttpLimits::sending`].
const SENDING: Duration = Duration::from_secs(60);

/// What a connection may have in memory of requests that are read.
const REQUEST_BUFFER: usize = 64 * 1024;

/// What connections may take of an HTTP port.
#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Most at once.
    pub connections: usize,
    /// Of one peer.
    pub of_one_peer: usize,
    /// A request must have come whole, and been answered, within this time of the answer before it; an idle connection ends
    /// then too. Without it there is a limit for heads of requests only, and the rest is the service's.
    pub patience: Option<Duration>,
    /// How long what is sent may wait to be taken.
    pub sending: Duration,
}

impl Default for HttpLimits {
    fn default() -> HttpLimits {
        let patience = Some(Duration::from_secs(30));
        HttpLimits { connections: 512, of_one_peer: 384, patience, sending: SENDING }
    }
}

/// Serves until the process ends.
pub async fn serve_http(
    listeners: Vec<TcpListener>,
    limits: HttpLimits,
    security: Security,
    router: Router,
) {
    let mut port = Port::new(listeners, "HTTP", limits.of_one_peer, limits.connections);
    loop {
        let (stream, peer, place) = port.next().await;
        let (router, security) = (router.clone(), security.clone());
        tokio::spawn(async move {
            let _place = place;
            let stream = match secured(stream, &security).await {
                Ok(stream) => stream,
                Err(error) => return NOT_LET_IN.not_let_in("HTTP", peer, &error),
            };
            if let Err(error) = connection(stream, limits, security, router).await {
                tracing::debug!("HTTP connection from {peer}: {error}");
            }
        });
    }
}

static NOT_LET_IN: Sparing = Sparing::new();

async fn secured(tcp: TcpStream, security: &Security) -> io::Result<AsyncStream> {
    tcp.set_nodelay(true)?;
    match security.server(Clients::MayHaveCertificate, &[PROTOCOL]) {
        None => Ok(AsyncStream::Plain(tcp)),
        Some(config) => timeout(GREETING, AsyncStream::accept(tcp, config)).await?,
    }
}

async fn connection(
    stream: AsyncStream,
    limits: HttpLimits,
    security: Security,
    router: Router,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let caller = Caller { peer: stream.peer()?, security };
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(GREETING).max_buf_size(REQUEST_BUFFER);
    let stream = PatientStream::new(stream, limits);
    let served = builder.serve_connection(TokioIo::new(stream), service).await;
    Ok(served?)
}

/// A connection that gives up reading when nothing was written for too long, and writing when what was written is not taken.
#[derive(Debug)]
struct PatientStream {
    stream: AsyncStream,
    patience: Option<Duration>,
    sending: Duration,
    deadline: Pin<Box<Sleep>>,
    /// Since something waits to be taken: until when.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl PatientStream {
    fn new(stream: AsyncStream, limits: HttpLimits) -> PatientStream {
        let HttpLimits { patience, sending, .. } = limits;
        let deadline = Box::pin(tokio::time::sleep(patience.unwrap_or_default()));
        PatientStream { stream, patience, sending, deadline, stalled: None }
    }

    fn has_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.patience.is_some() && self.deadline.as_mut().poll(context).is_ready() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }

    /// What came of an attempt to send: one that waits does so until its time is over. TLS takes some writes that the other
    /// side does not, so that flushing waits where plain text would.
    fn sent<T>(
        &mut self,
        outcome: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            return outcome;
        }
        let sending = self.sending;
        let until = || Box::pin(tokio::time::sleep(sending));
        match self.stalled.get_or_insert_with(until).as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
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
        if let Poll::Ready(Ok(1..)) = &written {
            // Something was taken before it: TLS has room for some records only.
            self.stalled = None;
            if let Some(patience) = self.patience {
                let next = Instant::now() + patience;
                self.deadline.as_mut().reset(next);
            }
        }
        self.sent(written, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.stalled = None;
        }
        self.sent(flushed, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.sent(shut, context)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn serve(patience: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = HttpLimits { patience: Some(patience), ..HttpLimits::default() };
        let router = Router::new().route("/", post(|body: String| async move { body }));
        tokio::spawn(serve_http(vec![listener], limits, Security::default(), router));
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
    async fn who_takes_no_answers_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let sending = Duration::from_millis(500);
        // Also where there is no limit for the whole of a request.
        let limits = HttpLimits { patience: None, sending, ..HttpLimits::default() };
        let router = Router::new().route("/", get(|| async { "x".repeat(1 << 20) }));
        tokio::spawn(serve_http(vec![listener], limits, Security::default(), router));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let asks = async {
            loop {
                let asked = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
                if asked.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(20), asks).await.expect("it holds its place");
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
