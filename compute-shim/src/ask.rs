//! Asking the page server's HTTP interface, wherever that is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pgstrata_http_client::{Access, Answer, Timing, agent, refusal};
use pgstrata_identity::Whom;

use crate::places::{Pageserver, Places};

/// Pause before it is asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// Where no page server is known, the broker may be about to say: it is waited for so long at least.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// How a page server is asked.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The longest answer, in time.
    pub answer: Duration,
    /// One that can't be reached is asked again for so long: it may be about to start.
    pub reach: Duration,
}

/// The answer to a GET of `path`. `what` is asked for, for messages.
pub fn pageserver(
    places: &Places,
    access: &Access,
    path: &str,
    query: &[(&str, &str)],
    what: &str,
    patience: Patience,
) -> Result<Vec<u8>> {
    let agent = agent(Timing { whole: patience.answer, silence: None }, access, Whom::Pageserver);
    let since = Instant::now();
    loop {
        let mut unreachable = None;
        for Pageserver { http, .. } in places.pageservers() {
            let url = format!("{}://{http}{path}", access.scheme());
            match agent.get(&url).query_pairs(query.iter().copied()).call() {
                Ok(response) => return answer(response, &http, what),
                Err(error) => unreachable = Some((http, error)),
            }
        }
        let reach = match unreachable {
            Some(_) => patience.reach,
            None => patience.reach.max(LEAST_PATIENCE),
        };
        if since.elapsed() < reach {
            std::thread::sleep(PAUSE);
            continue;
        }
        return Err(match unreachable {
            Some((http, error)) => {
                anyhow!(error).context(format!("page server {http} can't be asked"))
            }
            None => anyhow!("no page server is known: {}", places.describe()),
        });
    }
}

fn answer(mut response: Answer, http: &str, what: &str) -> Result<Vec<u8>> {
    let status = response.status();
    let body = response.body_mut().with_config().limit(u64::MAX).read_to_vec();
    let body = body.with_context(|| format!("page server {http} broke off its answer"))?;
    if !status.is_success() {
        bail!("page server {http} has no {what}: {}", refusal(&body));
    }
    Ok(body)
}
