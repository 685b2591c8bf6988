//! Agents, and what answers mean.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use pgstrata_wire::http::Failure;
use ureq::Agent;

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

/// What makes requests, and keeps connections for the next.
pub fn agent(timing: Timing) -> Agent {
    Agent::config_builder()
        .timeout_global(Some(timing.whole))
        .timeout_connect(timing.silence)
        .timeout_recv_response(timing.silence)
        .timeout_per_read(timing.silence)
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
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
