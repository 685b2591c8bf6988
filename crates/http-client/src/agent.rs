//! Agents, and what answers mean.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use pgstrata_identity::{Identity, Trouble, Whom, client_without_certificate};
use pgstrata_wire::http::Failure;
use ureq::Agent;
use ureq::unversioned::transport::{Connector, TcpConnector};

use crate::Bearer;
use crate::names::Looked;
use crate::tls::{Config, PROTOCOL, TlsConnector};

/// Bytes of a refusal that are read, at most.
const REFUSAL: u64 = 4096;

/// Bytes of one that is no `Failure` that are shown, at most.
const SHOWN: usize = 300;

/// An answer whose body was not read yet.
pub type Answer = ureq::http::Response<ureq::Body>;

/// How long a request may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// All of it, from the look-up of the name to the last byte.
    pub whole: Duration,
    /// The longest silence in it: until the connection is made, until the answer begins, within the answer.
    pub silence: Option<Duration>,
}

/// How we are let in, and make sure whom we ask.
#[derive(Clone, Debug, Default)]
pub enum Access {
    /// By being on the same machine: plain text.
    #[default]
    Local,
    /// By our certificate.
    Certificate(Identity),
    /// By a token, which is shown to those only whom the CAs in this file stand for.
    Token {
        /// Where their certificates are.
        ca: PathBuf,
        /// What is shown.
        bearer: Bearer,
    },
}

impl Access {
    /// That of a service: its certificate, if it has one.
    pub fn of(identity: Option<&Identity>) -> Access {
        identity.cloned().map_or(Access::Local, Access::Certificate)
    }

    /// That of who has a token. What can't be used of the file is said now, and not with the first request.
    pub fn token(ca: &Path, bearer: Bearer) -> Result<Access, Trouble> {
        client_without_certificate(ca, Whom::Broker, &[PROTOCOL])?;
        Ok(Access::Token { ca: ca.to_owned(), bearer })
    }

    /// The certificate, if that is what we show. Ports that speak no HTTP ask for one.
    pub fn identity(&self) -> Option<&Identity> {
        match self {
            Access::Certificate(identity) => Some(identity),
            Access::Local | Access::Token { .. } => None,
        }
    }

    /// What URLs begin with.
    pub fn scheme(&self) -> &'static str {
        match self {
            Access::Local => "http",
            Access::Certificate(_) | Access::Token { .. } => "https",
        }
    }

    pub(crate) fn config(&self, whom: Whom) -> Option<Config> {
        match self.clone() {
            Access::Local => None,
            Access::Certificate(identity) => {
                Some(Arc::new(move || Ok(identity.client(whom.clone(), &[PROTOCOL]))))
            }
            Access::Token { ca, .. } => {
                Some(Arc::new(move || client_without_certificate(&ca, whom.clone(), &[PROTOCOL])))
            }
        }
    }
}

/// What makes requests of services of a kind, and keeps connections for the next.
pub fn agent(timing: Timing, access: &Access, whom: Whom) -> Agent {
    let mut config = Agent::config_builder()
        .timeout_global(Some(timing.whole))
        .timeout_connect(timing.silence)
        .timeout_recv_response(timing.silence)
        .timeout_per_read(timing.silence)
        .http_status_as_error(false)
        .proxy(None);
    if let Access::Token { bearer, .. } = access {
        // Here, so that no request is made without. Where it goes was verified: the connector makes no other connections.
        config = config.middleware(bearer.clone());
    }
    let connector = ().chain(TcpConnector::default()).chain(TlsConnector(access.config(whom)));
    Agent::with_parts(config.build(), connector, Looked)
}

/// The words of a refusal, from its body.
pub fn refusal(body: &[u8]) -> String {
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => failure.error,
        Err(_) => {
            let text = String::from_utf8_lossy(&body[..body.len().min(SHOWN)]);
            text.trim().replace('\n', " ")
        }
    }
}

/// An answer that is no refusal; one that is becomes an error with its words.
pub fn accepted(mut answer: Answer) -> Result<Answer> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = answer.body_mut().with_config().limit(REFUSAL).read_to_vec().unwrap_or_default();
    bail!("it answers {status}: {}", refusal(&body))
}

/// Why there is no answer, or not a whole one.
pub fn explained(error: ureq::Error, timing: Timing) -> anyhow::Error {
    match (error, timing.silence) {
        (ureq::Error::Timeout(ureq::Timeout::Global), _) | (ureq::Error::Timeout(_), None) => {
            anyhow!("the exchange took more than {} s", timing.whole.as_secs())
        }
        (ureq::Error::Timeout(_), Some(silence)) => {
            anyhow!("it was silent for {} s", silence.as_secs())
        }
        (error, _) => error.into(),
    }
}
