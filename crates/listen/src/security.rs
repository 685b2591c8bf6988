//! How a service shows who it is, and finds out who others are: `--tls` and `--token-keys`.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_identity::rustls::ServerConfig;
use pgstrata_identity::{Clients, Identity, Role, Stream, Tokens, Trouble};

use crate::Peer;

/// What the command line says.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SecurityArguments {
    /// Directory with this service's certificate (cert.pem, key.pem) and the CA of those that it believes (ca.pem), as
    /// 'pgstrata auth issue' makes it. They are read again when they change. Without it, everything is plain text, of
    /// loopback only, where everybody may do everything
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,

    /// Directory with the public keys of tokens that people and tools may show instead of a certificate, a file KID.pem
    /// for each
    #[arg(long, value_name = "DIR", requires = "tls")]
    pub token_keys: Option<PathBuf>,
}

/// See the module. Copies share what was read.
#[derive(Clone, Debug, Default)]
pub struct Security {
    identity: Option<Identity>,
    tokens: Option<Tokens>,
}

impl Security {
    /// Reads what the command line names.
    pub fn open(arguments: &SecurityArguments) -> Result<Security, Trouble> {
        let identity = arguments.tls.as_deref().map(Identity::open).transpose()?;
        let tokens = arguments.token_keys.as_deref().map(Tokens::open).transpose()?;
        Ok(Security { identity, tokens })
    }

    /// Refuses a certificate of somebody else: everybody whom it was shown to would refuse it.
    pub fn check_role(&self, expected: &str, is: impl Fn(&Role) -> bool) -> io::Result<()> {
        let Some(identity) = &self.identity else { return Ok(()) };
        let role = identity.role();
        match is(&role) {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "the certificate in {} is that of {role}, and this is {expected}: name its own (--tls)",
                identity.directory().display()
            ))),
        }
    }

    /// Who we are, where we have to show it.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Refuses an address that others can reach while nothing tells who they are.
    pub(crate) fn check_address(&self, address: SocketAddr) -> io::Result<()> {
        match self.identity.is_some() || address.ip().is_loopback() {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "{} can be reached from other machines, and authentication is not configured: listen on 127.0.0.1, \
                 or give this service a certificate (--tls)",
                address.ip()
            ))),
        }
    }

    /// How to speak on the next connection; `None` where it is plain text.
    pub fn server(&self, clients: Clients, protocols: &[&[u8]]) -> Option<Arc<ServerConfig>> {
        self.identity.as_ref().map(|identity| identity.server(clients, protocols))
    }

    /// Who shows this token.
    pub fn bearer(&self, token: &str) -> Result<Peer, String> {
        let Some(tokens) = &self.tokens else {
            return Err(
                "this service takes no tokens: it was started without --token-keys".to_owned()
            );
        };
        let scope = tokens.check(token, jiff::Timestamp::now());
        scope.map(Peer::Bearer).map_err(|error| error.to_string())
    }

    /// Makes a connection of it that was just accepted, with the handshake done by then if there is one, of a client that
    /// must have a certificate. On a thread that may wait.
    pub fn accept(&self, tcp: TcpStream, patience: Duration) -> io::Result<(Stream, Peer)> {
        match self.server(Clients::MustHaveCertificate, &[]) {
            None => Ok((Stream::from(tcp), Peer::Local)),
            Some(config) => {
                let stream = Stream::accept(tcp, config, Instant::now() + patience)?;
                let peer = peer_of(&stream);
                Ok((stream, peer))
            }
        }
    }
}

/// Who is at the other end of a connection with TLS.
pub fn peer_of(stream: &Stream) -> Peer {
    stream.peer_role().cloned().map_or(Peer::Unknown, Peer::Certified)
}
