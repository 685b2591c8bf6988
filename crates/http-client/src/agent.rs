//! Agents, and what answers mean.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use pgstrata_identity::{Identity, Whom};
use pgstrata_wire::http::Failure;
use ureq::Agent;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};

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
}

impl Access {
    /// That of a service: its certificate, if it has one.
    pub fn of(identity: Option<&Identity>) -> Access {
        identity.cloned().map_or(Access::Local, Access::Certificate)
    }

    /// What URLs begin with.
    pub fn scheme(&self) -> &'static str {
        match self {
            Access::Local => "http",
            Access::Certificate(_) => "https",
        }
    }

    fn config(&self, whom: Whom) -> Option<Config> {
        match self.clone() {
            Access::Local => None,
            Access::Certificate(identity) => {
                Some(Arc::new(move || identity.client(whom.clone(), &[PROTOCOL])))
            }
        }
    }
}

/// What makes requests of services of a kind, and keeps connections for the next.
pub fn agent(timing: Timing, access: &Access, whom: Whom) -> Agent {
    let config = Agent::config_builder()
        .timeout_global(Some(timing.whole))
        .timeout_connect(timing.silence)
        .timeout_recv_response(timing.silence)
        .timeout_per_read(timing.silence)
        .http_status_as_error(false)
        .proxy(None)
        .build();
    let connector = ().chain(TcpConnector::default()).chain(TlsConnector(access.config(whom)));
    Agent::with_parts(config, connector, DefaultResolver::default())
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
