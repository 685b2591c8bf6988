//! Blocking services: a thread for each connection that has said what it wants.
//!
//! A connection costs a thread only once its client has said so much, in time. Until then it is a few hundred bytes, and
//! there is a bound for these too.

use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use crate::{Port, Shares};

/// How long a client may take to say what it wants.
pub const GREETING: Duration = Duration::from_secs(10);
/// How long an answer may take to leave: after that the client is taken for gone.
const SENDING: Duration = Duration::from_secs(60);
/// How soon a client that said a part is looked at again.
const MOMENT: Duration = Duration::from_millis(5);
/// Connections of clients that have not said yet what they want, on one port.
const GREETINGS: usize = 1024;

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

/// Accepts connections until the process ends. Each gets a thread that runs `serve`, once its
/// client has sent so many bytes; at most `most` have one at once, and half of them are one peer's.
pub async fn threads(
    listeners: Vec<TcpListener>,
    name: &'static str,
    bytes: usize,
    most: usize,
    serve: impl Fn(std::net::TcpStream) + Clone + Send + 'static,
) {
    let mut port = Port::new(listeners, name, GREETINGS / 2, GREETINGS);
    let shares = Shares::new(most.div_ceil(2), most);
    loop {
        let (stream, peer, greeting) = port.next().await;
        let (shares, serve) = (shares.clone(), serve.clone());
        tokio::spawn(async move {
            if let Err(error) = greeted(&stream, bytes).await {
                return tracing::debug!("{name} connection from {peer}: {error}");
            }
            let place = match shares.take(peer.ip()) {
                Ok(place) => place,
                Err(why) => return tracing::warn!("{name} connection from {peer} refused: {why}"),
            };
            drop(greeting);
            let blocking = stream.into_std().and_then(|stream| {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(SENDING))?;
                Ok(stream)
            });
            let spawned = blocking.and_then(|stream| {
                std::thread::Builder::new().name(name.into()).spawn(move || {
                    let _place = place;
                    serve(stream);
                })
            });
            if let Err(error) = spawned {
                tracing::error!("can't serve a connection: {error}");
            }
        });
    }
}
