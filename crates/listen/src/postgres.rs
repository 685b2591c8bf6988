//! How a client of a PostgreSQL port is let in: TLS that is asked for or begun at once, and a certificate, or a token as the
//! password. What it says then is the service's.

use std::io;

use pgstrata_wire::postgres::{
    BackendWriter, Frontend, MAX_STARTUP, Startup, StartupPacket, split,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::{AsyncStream, GREETING, Peer, Security, Sparing};
use pgstrata_identity::Clients;

/// What both sides say of it in TLS (ALPN): PostgreSQL's clients of 17 and later.
const PROTOCOL: &[u8] = b"postgresql";
/// The first byte of a client that begins with TLS at once: a handshake record.
const HANDSHAKE: u8 = 0x16;
/// How many times a client may ask for encryption before it says what it wants.
const ENCRYPTION_REQUESTS: u32 = 2;
/// Bytes read at once.
const CHUNK: usize = 8 << 10;
/// SQLSTATE of those who are not let in.
const REFUSED: &str = "28000";

static REFUSED_CLIENTS: Sparing = Sparing::new();

/// A client that was let in.
#[derive(Debug)]
pub struct Opened {
    /// Its connection. Nothing that follows what it said was read.
    pub stream: AsyncStream,
    /// Who it is.
    pub peer: Peer,
    /// What it said when it connected.
    pub packet: StartupPacket,
}

/// Lets a client in, in time. `None` if it wanted something else than a session, or was refused, and was told.
pub async fn open(tcp: TcpStream, security: &Security) -> io::Result<Option<Opened>> {
    let opened = timeout(GREETING, open_slowly(tcp, security)).await;
    opened.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, "it did not say in time what it wants")
    })?
}

async fn open_slowly(tcp: TcpStream, security: &Security) -> io::Result<Option<Opened>> {
    tcp.set_nodelay(true)?;
    let mut first = [0];
    let mut stream = AsyncStream::Plain(tcp);
    if let AsyncStream::Plain(tcp) = &stream
        && tcp.peek(&mut first).await? == 1
        && first[0] == HANDSHAKE
    {
        stream = secure(stream, security).await?;
        // Bytes of another protocol that somebody passes on must not be taken for this one (as in PostgreSQL).
        if stream.protocol() != Some(PROTOCOL) {
            return Err(invalid("it begins with TLS, but not for PostgreSQL (ALPN)"));
        }
    }
    let mut requests = 0;
    loop {
        match read_startup(&mut stream).await? {
            Startup::SslRequest | Startup::GssRequest if requests == ENCRYPTION_REQUESTS => {
                return Err(invalid("it asks for encryption only"));
            }
            Startup::SslRequest
                if security.identity().is_some() && matches!(stream, AsyncStream::Plain(_)) =>
            {
                requests += 1;
                stream.write_all(b"S").await?;
                stream = secure(stream, security).await?;
            }
            Startup::SslRequest | Startup::GssRequest => {
                requests += 1;
                stream.write_all(b"N").await?;
                stream.flush().await?;
            }
            Startup::Cancel => return Ok(None),
            Startup::Session(packet) => return let_in(stream, packet, security).await,
        }
    }
}

async fn secure(stream: AsyncStream, security: &Security) -> io::Result<AsyncStream> {
    match (stream, security.server(Clients::MayHaveCertificate, &[PROTOCOL])) {
        (AsyncStream::Plain(tcp), Some(config)) => AsyncStream::accept(tcp, config).await,
        _ => Err(invalid("it begins with TLS, and this service has no certificate")),
    }
}

async fn let_in(
    mut stream: AsyncStream,
    packet: StartupPacket,
    security: &Security,
) -> io::Result<Option<Opened>> {
    let refused = match (&stream, security.identity()) {
        (AsyncStream::Plain(_), Some(_)) => {
            Err("this port speaks TLS only: connect with sslmode=verify-full".to_owned())
        }
        _ => match stream.peer()? {
            Peer::Unknown => ask_for_token(&mut stream, security).await?,
            peer => Ok(peer),
        },
    };
    match refused {
        Ok(peer) => Ok(Some(Opened { stream, peer, packet })),
        Err(text) => {
            let mut out = BackendWriter::default();
            out.error(true, REFUSED, &text);
            stream.write_all(&out.bytes).await?;
            stream.flush().await?;
            // It reads why before it meets the end.
            let _ = stream.shutdown().await;
            REFUSED_CLIENTS.refused("PostgreSQL", None, &text);
            Ok(None)
        }
    }
}

/// Asks for a password, which is a token: only inside TLS. The error is for the client.
async fn ask_for_token(
    stream: &mut AsyncStream,
    security: &Security,
) -> io::Result<Result<Peer, String>> {
    let mut out = BackendWriter::default();
    out.ask_for_password();
    stream.write_all(&out.bytes).await?;
    stream.flush().await?;
    let mut received = Vec::new();
    loop {
        if let Some((message, _)) = split(&received).map_err(|error| invalid(&error.to_string()))? {
            return Ok(match message {
                Frontend::Password(password) => {
                    security.bearer(&password).map_err(|error| error.to_string())
                }
                _ => Err("a token is needed as the password, or a client's certificate".to_owned()),
            });
        }
        let mut chunk = [0; CHUNK];
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        received.extend_from_slice(&chunk[..count]);
    }
}

/// Reads not one byte more than the packet: what follows may be TLS.
async fn read_startup(stream: &mut AsyncStream) -> io::Result<Startup> {
    let length = stream.read_u32().await? as usize;
    if !(8..=MAX_STARTUP).contains(&length) {
        return Err(invalid("the startup packet has an impossible length"));
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Startup::decode(&body).map_err(|error| invalid(&error.to_string()))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
