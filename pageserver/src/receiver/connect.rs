//! Connections to safekeepers' PostgreSQL ports.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgstrata_identity::{Identity, Stream, Whom};

use super::messages::SSL_REQUEST;
use super::session::{SILENCE, TICK};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection, with TLS where we have an identity to show, on which reading waits for a [`TICK`].
pub fn connect(address: &str, identity: Option<&Identity>) -> Result<Stream> {
    let stream = open(address, identity)?;
    stream.set_read_timeout(Some(TICK))?;
    // One that takes nothing has long been silent.
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

fn open(address: &str, identity: Option<&Identity>) -> Result<Stream> {
    let mut tcp = pgstrata_dial::dial(address, CONNECT_TIMEOUT)?;
    tcp.set_nodelay(true)?;
    let Some(identity) = identity else { return Ok(Stream::from(tcp)) };
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    tcp.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    tcp.write_all(&SSL_REQUEST)?;
    let mut answer = [0];
    tcp.read_exact(&mut answer)?;
    ensure!(
        answer == *b"S",
        "it does not speak TLS, and this page server has a certificate to show"
    );
    let config = identity.client(Whom::Safekeeper(None), &[b"postgresql"]);
    let host = pgstrata_dial::host(address);
    Ok(Stream::connect(tcp, config, host, deadline)?)
}
