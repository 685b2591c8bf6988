//! Requests to the services' HTTP interfaces.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pgstrata_http_client::{Access, Answer, Timing};
use pgstrata_identity::Whom;
use pgstrata_wire::http::Failure;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;

/// Bytes of an answer, at most.
const BODY_LIMIT: u64 = 1 << 30;

/// Longest wait for an answer that takes no time. A machine that is moved, or short of memory, may stand still for half a
/// minute, and goes on by itself.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(45);
/// Longest wait for work: longer than the page server takes for any.
const WORK_PATIENCE: Duration = Duration::from_secs(180);

/// Runs asynchronous work from this synchronous program.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    // What hangs in a directory keeps its thread for ever.
    runtime.shutdown_background();
    outcome
}

/// One service, as an HTTP server.
pub struct Service {
    /// What people call it.
    pub name: &'static str,
    /// `host:port`.
    pub address: String,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// How it lets us in.
    pub access: Access,
    /// Who it must be.
    pub whom: Whom,
    /// Whether it is one that `up` starts, on this machine.
    pub is_here: bool,
}

/// What a service does not do, in its own words.
#[derive(Debug)]
pub struct Refused(pub Failure);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.error)
    }
}

impl std::error::Error for Refused {}

/// A query's names and values.
pub type Pairs<'a> = &'a [(&'a str, &'a str)];

impl Service {
    /// The page server.
    pub fn pageserver(address: &str) -> Service {
        Service::pageserver_by(address, &Access::Local)
    }

    /// One on another machine.
    pub fn pageserver_by(address: &str, access: &Access) -> Service {
        Service {
            name: "the page server",
            timeout: ANSWER_PATIENCE,
            ..Service::local(address, access)
        }
    }

    /// One that `up` starts.
    pub fn local(address: &str, access: &Access) -> Service {
        let (address, access) = (address.to_owned(), access.clone());
        let timeout = ANSWER_PATIENCE;
        Service { name: "it", address, timeout, access, whom: Whom::Pageserver, is_here: true }
    }

    /// The same for a request that may take long, such as one that waits for WAL: first it is asked whether it answers
    /// at all.
    pub fn patient(self) -> Result<Service> {
        self.get_bytes("/healthz", &[])?;
        Ok(Service { timeout: WORK_PATIENCE, ..self })
    }

    fn agent(&self) -> Agent {
        let timing = Timing { whole: self.timeout, silence: None };
        pgstrata_http_client::agent(timing, &self.access, self.whom.clone())
    }

    /// The body of an answer; an error response becomes an error with the service's own words.
    fn body(&self, answer: Result<Answer, ureq::Error>) -> Result<Vec<u8>> {
        let mut response = match answer {
            Err(ureq::Error::Timeout(_)) if !self.is_here => bail!(
                "{} at {} does not answer within {} s: is it up, and is it reached by that name from here?",
                self.name,
                self.address,
                self.timeout.as_secs()
            ),
            answer if !self.is_here => answer
                .with_context(|| format!("{} at {} can't be asked", self.name, self.address))?,
            Err(ureq::Error::Timeout(_)) => bail!(
                "{} does not answer within {} s: if its process hangs, end it, and 'pgstrata up' \
                 starts it again",
                self.name,
                self.timeout.as_secs()
            ),
            answer => answer.with_context(|| {
                format!("{} can't be asked; is it up? ('pgstrata status' tells)", self.name)
            })?,
        };
        let status = response.status();
        let body = response.body_mut().with_config().limit(BODY_LIMIT).read_to_vec()?;
        if !status.is_success() {
            return match serde_json::from_slice::<Failure>(&body) {
                Ok(failure) => Err(Refused(failure).into()),
                Err(_) => bail!("{} answered {status}", self.name),
            };
        }
        Ok(body)
    }

    /// What its clock says, as the head of any of its answers does (`Date`), if it does.
    pub fn date(&self) -> Result<Option<String>> {
        let answer = self.agent().get(self.url("/healthz")).call();
        let answer = answer.with_context(|| format!("{} can't be asked", self.name))?;
        let date = answer.headers().get(ureq::http::header::DATE);
        Ok(date.and_then(|date| date.to_str().ok()).map(str::to_owned))
    }

    fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T> {
        serde_json::from_slice(body)
            .with_context(|| format!("{} answered something unexpected", self.name))
    }

    fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.access.scheme(), self.address)
    }

    /// GET of bytes.
    pub fn get_bytes(&self, path: &str, query: Pairs<'_>) -> Result<Vec<u8>> {
        let request = self.agent().get(self.url(path)).query_pairs(query.iter().copied());
        self.body(request.call())
    }

    /// GET of JSON.
    pub fn get<T: DeserializeOwned>(&self, path: &str, query: Pairs<'_>) -> Result<T> {
        self.parse(&self.get_bytes(path, query)?)
    }

    /// POST of bytes, for JSON.
    pub fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        query: Pairs<'_>,
        body: &[u8],
    ) -> Result<T> {
        let request = self.agent().post(self.url(path)).query_pairs(query.iter().copied());
        self.parse(&self.body(request.send(body))?)
    }

    /// POST of JSON, for JSON.
    pub fn post_json<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let request = self.agent().post(self.url(path));
        self.parse(&self.body(request.send_json(body))?)
    }

    /// DELETE, for JSON.
    pub fn delete<T: DeserializeOwned>(&self, path: &str, query: Pairs<'_>) -> Result<T> {
        let request = self.agent().delete(self.url(path)).query_pairs(query.iter().copied());
        self.parse(&self.body(request.call())?)
    }
}

/// A GET that may fail quickly, for what is only good to know.
pub fn try_get<T: DeserializeOwned>(address: &str, path: &str, timeout: Duration) -> Option<T> {
    Service { timeout, ..Service::local(address, &Access::Local) }.get(path, &[]).ok()
}

/// Whether a service answers at all.
pub fn is_well(address: &str, timeout: Duration) -> bool {
    Service { timeout, ..Service::local(address, &Access::Local) }
        .get_bytes("/healthz", &[])
        .is_ok()
}
