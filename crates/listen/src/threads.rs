//! Blocking services: a thread for each connection that has said what it wants.
//!
//! A connection costs a thread only once its client has said so much, in time. Until then it is a few hundred bytes, and
//! there is a bound for these too.

use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use pgstrata_identity::{Clients, Stream};
use pgstrata_wire::postgres::StartupPacket;

use crate::postgres::{Opened, open};
use crate::{AsyncStream, Peer, Port, Security, Shares, Sparing};

/// How long a client may take to say what it wants.
pub const GREETING: Duration = Duration::from_secs(10);
/// How long an answer may take to leave: after that the client is taken for gone.
const SENDING: Duration = Duration::from_secs(60);
/// How soon a client that said a part is looked at again.
const MOMENT: Duration = Duration::from_millis(5);
/// Connections of clients that have not said yet what they want, on one port.
const GREETINGS: usize = 1024;

static NOT_LET_IN: Sparing = Sparing::new();

/// Waits until `bytes` can be read without waiting.
async fn greeted(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let mut buffer = [0; 256];
    let deadline = Instant::now() + GREETING;
    loop {
        let peeked =
            timeout(deadline.saturating_duration_since(Instant::now()), stream.peek(&mut buffer));
        match peeked.await {
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(there)) if there >= bytes.min(buffer.len()) => return Ok(()),
            Ok(Ok(_)) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Ok(_)) => sleep(MOMENT).await,
            Ok(Err(error)) => return Err(error),
        }
    }
}

/// How a client of a port that takes certificates only is let in: it has begun to say something, and made the handshake.
pub async fn certified(
    tcp: TcpStream,
    bytes: usize,
    security: &Security,
) -> io::Result<Option<(Stream, Peer)>> {
    tcp.set_nodelay(true)?;
    greeted(&tcp, bytes).await?;
    let stream = match security.server(Clients::MustHaveCertificate, &[]) {
        None => AsyncStream::Plain(tcp),
        Some(config) => timeout(GREETING, AsyncStream::accept(tcp, config)).await??,
    };
    let peer = stream.peer()?;
    Ok(Some((stream.into_blocking(SENDING)?, peer)))
}

/// The same for a PostgreSQL port: see [`open`].
pub async fn postgres(
    tcp: TcpStream,
    security: &Security,
) -> io::Result<Option<(Stream, Peer, StartupPacket)>> {
    let Some(Opened { stream, peer, packet }) = open(tcp, security).await? else {
        return Ok(None);
    };
    Ok(Some((stream.into_blocking(SENDING)?, peer, packet)))
}

/// Accepts connections until the process ends. Each gets a thread that runs `serve`, once `greet` has let its client in;
/// at most `most` have one at once, and half of them are one peer's.
pub async fn threads<T, G>(
    listeners: Vec<TcpListener>,
    name: &'static str,
    most: usize,
    greet: impl Fn(TcpStream) -> G + Clone + Send + 'static,
    serve: impl Fn(T) + Clone + Send + 'static,
) where
    T: Send + 'static,
    G: Future<Output = io::Result<Option<T>>> + Send + 'static,
{
    let mut port = Port::new(listeners, name, GREETINGS / 2, GREETINGS);
    let shares = Shares::new(most.div_ceil(2), most);
    loop {
        let (stream, peer, greeting) = port.next().await;
        let (shares, serve, greet) = (shares.clone(), serve.clone(), greet.clone());
        tokio::spawn(async move {
            let client = match greet(stream).await {
                Ok(Some(client)) => client,
                Ok(None) => return,
                Err(error) => return NOT_LET_IN.not_let_in(name, peer, &error),
            };
            let place = match shares.take(peer.ip()) {
                Ok(place) => place,
                Err(why) => return tracing::warn!("{name} connection from {peer} refused: {why}"),
            };
            drop(greeting);
            let spawned = std::thread::Builder::new().name(name.into()).spawn(move || {
                let _place = place;
                serve(client);
            });
            if let Err(error) = spawned {
                tracing::error!("can't serve a connection: {error}");
            }
        });
    }
}
