//! TLS for requests: the certificate that we show, and that the other side is who we mean.

use std::fmt;
use std::io::{Read, Write};
use std::sync::Arc;

use pgstrata_identity::Trouble;
use pgstrata_identity::rustls::pki_types::ServerName;
use pgstrata_identity::rustls::{ClientConfig, ClientConnection, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport,
    TransportAdapter,
};

/// What both sides say of it in TLS (ALPN).
pub const PROTOCOL: &[u8] = b"http/1.1";

/// How to speak on the next connection: certificates may have been exchanged since the last.
pub type Config = Arc<dyn Fn() -> Result<Arc<ClientConfig>, Trouble> + Send + Sync>;

/// Puts TLS around connections of `https` URLs.
pub struct TlsConnector(pub Option<Config>);

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConnector")
    }
}

fn tls(error: impl fmt::Display) -> Error {
    Error::Io(std::io::Error::other(error.to_string()))
}

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, TlsTransport>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        let Some(transport) = chained else { return Ok(None) };
        let config = match (&self.0, details.needs_tls()) {
            (None, false) => return Ok(Some(Either::A(transport))),
            (Some(config), true) => config().map_err(tls)?,
            (None, true) => {
                return Err(tls("an https URL, and no certificate to show or token: see --tls"));
            }
            (Some(_), false) => {
                return Err(tls("an http URL, and others are asked with TLS only: see --tls"));
            }
        };
        let host = details.uri.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let name = ServerName::try_from(host.to_owned()).map_err(tls)?;
        let mut session = ClientConnection::new(config, name).map_err(tls)?;
        let mut socket = TransportAdapter::new(transport.boxed(), details.current_time.clone());
        socket.set_timeout(details.timeout);
        session.complete_io(&mut socket).map_err(Error::Io)?;
        let stream = StreamOwned { conn: session, sock: socket };
        let (input, output) =
            (details.config.input_buffer_size(), details.config.output_buffer_size());
        let buffers = LazyBuffers::new(input, output);
        Ok(Some(Either::B(TlsTransport { buffers, stream })))
    }
}

/// A connection with TLS.
pub struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsTransport")
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.get_mut().set_timeout(timeout);
        Ok(self.stream.write_all(&self.buffers.output()[..amount])?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.get_mut().set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
