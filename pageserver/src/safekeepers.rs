//! Which safekeepers may have a timeline's WAL: those named at start, and those the broker knows.
//!
//! Soft state both ways: without the broker the named ones are tried in turn, and what was last
//! heard of the others stays.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use pgstrata_ids::{Generation, Lsn, NodeId, TimelineId};
use pgstrata_wire::broker::{
    Addresses, LISTING_S, Listing, MAX_LISTING, PUBLISH_INTERVAL_S, Publication, Role, SILENCE_S,
    TimelineProgress,
};

use crate::lock::RwLock;
use crate::receiver::Safekeepers;
use crate::repository::Repository;
use crate::timeline::Timeline;

/// Bytes of a refusal that are read, at most.
const REFUSAL: u64 = 300;

/// Finds safekeepers, and tells the broker how far this page server is.
pub struct Discovery {
    fixed: Vec<String>,
    broker: Option<String>,
    heard: RwLock<Listing>,
    /// Timelines that any safekeeper has, of what was heard: asked for by every timeline that none has.
    known: RwLock<HashSet<TimelineId>>,
}

impl Discovery {
    /// With the addresses given on the command line, and the broker's URL.
    pub fn new(fixed: Vec<String>, broker: Option<String>) -> Discovery {
        let broker = broker.map(|url| url.trim_end_matches('/').to_owned());
        Discovery { fixed, broker, heard: RwLock::default(), known: RwLock::default() }
    }

    /// Talks with the broker from now on, until the repository is gone.
    pub fn start(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        node: NodeId,
        addresses: Addresses,
    ) -> Result<()> {
        let Some(broker) = self.broker.clone() else { return Ok(()) };
        let (discovery, repository) = (Arc::clone(self), Arc::downgrade(repository));
        let talk = move || {
            let agent = agent();
            let mut well = true;
            while let Some(publication) = publication(&repository, node, &addresses) {
                let exchanged = discovery.exchange(&agent, &broker, &publication);
                match news(&mut well, exchanged) {
                    Some(Ok(())) => tracing::info!("the broker is back"),
                    Some(Err(error)) => {
                        tracing::warn!("there is no exchange with the broker {broker}: {error:#}");
                    }
                    None => {}
                }
                std::thread::sleep(Duration::from_secs(PUBLISH_INTERVAL_S));
            }
        };
        std::thread::Builder::new()
            .name("broker".into())
            .spawn(talk)
            .context("can't start a thread")?;
        Ok(())
    }

    fn exchange(&self, agent: &ureq::Agent, broker: &str, said: &Publication) -> Result<()> {
        let published = agent.post(format!("{broker}/v1/publish")).send_json(said);
        accepted(published.map_err(explained)?)?;
        let listing = listing(agent, broker)?;
        let safekeepers = listing.nodes.iter().filter(|node| node.role == Role::Safekeeper);
        let timelines = safekeepers.flat_map(|node| &node.timelines);
        *self.known.write() = timelines.map(|entry| entry.timeline_id).collect();
        *self.heard.write() = listing;
        Ok(())
    }
}

/// What is long takes its time; one that says nothing is not waited for.
fn agent() -> ureq::Agent {
    let silence = Some(Duration::from_secs(SILENCE_S));
    ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(LISTING_S)))
        .timeout_connect(silence)
        .timeout_recv_response(silence)
        .timeout_per_read(silence)
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
}

fn listing(agent: &ureq::Agent, broker: &str) -> Result<Listing> {
    let answer = agent.get(format!("{broker}/v1/nodes")).call().map_err(explained)?;
    let mut answer = accepted(answer)?;
    let body = answer.body_mut().with_config().limit(MAX_LISTING as u64);
    let body = body.read_to_vec().map_err(explained)?;
    serde_json::from_slice(&body).context("its listing can't be read")
}

type Answer = ureq::http::Response<ureq::Body>;

/// An answer that is no refusal.
fn accepted(mut answer: Answer) -> Result<Answer> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let text = answer.body_mut().with_config().limit(REFUSAL).lossy_utf8(true).read_to_string();
    bail!("it answers {status}: {}", text.unwrap_or_default().trim())
}

fn explained(error: ureq::Error) -> anyhow::Error {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Global) => {
            anyhow!("one exchange took more than {LISTING_S} s")
        }
        ureq::Error::Timeout(_) => anyhow!("it was silent for {SILENCE_S} s"),
        error => error.into(),
    }
}

/// What to tell of an exchange: only what is another than it was before.
fn news(well: &mut bool, exchanged: Result<()>) -> Option<Result<()>> {
    let before = std::mem::replace(well, exchanged.is_ok());
    (before != *well).then_some(exchanged)
}

/// This page server's identity at the broker: every start is a new one.
pub fn node(generation: Generation) -> NodeId {
    NodeId(generation.0)
}

fn publication(
    repository: &Weak<Repository>,
    node: NodeId,
    addresses: &Addresses,
) -> Option<Publication> {
    let repository = repository.upgrade()?;
    let timelines = repository
        .branches()
        .iter()
        .map(|timeline| TimelineProgress {
            tenant_id: timeline.info.tenant,
            timeline_id: timeline.info.id,
            term: 0,
            flush_lsn: timeline.progress.lsn(),
            commit_lsn: Lsn::INVALID,
            archived_lsn: Lsn::INVALID,
            remote_consistent_lsn: timeline.remote_consistent_lsn(),
        })
        .collect();
    Some(Publication {
        node: node.0,
        role: Role::Pageserver,
        zone: String::new(),
        addresses: addresses.clone(),
        timelines,
    })
}

impl Safekeepers for Discovery {
    fn candidates(&self, timeline: &Timeline) -> Vec<String> {
        let heard = self.heard.read();
        let mut known: Vec<(Lsn, &String)> = heard
            .nodes
            .iter()
            .filter(|node| node.role == Role::Safekeeper)
            .filter_map(|node| {
                let progress =
                    node.timelines.iter().find(|entry| entry.timeline_id == timeline.info.id)?;
                Some((progress.commit_lsn, node.addresses.pg.as_ref()?))
            })
            .collect();
        known.sort_by_key(|(commit, _)| std::cmp::Reverse(*commit));
        let mut candidates: Vec<String> =
            known.into_iter().map(|(_, address)| address.clone()).collect();
        for address in &self.fixed {
            if !candidates.contains(address) {
                candidates.push(address.clone());
            }
        }
        candidates
    }

    fn is_known(&self, timeline: &Timeline) -> bool {
        self.known.read().contains(&timeline.info.id)
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_sim::slow_server;

    use super::*;

    #[test]
    fn a_long_listing_is_read_while_it_comes() {
        const PIECES: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n", "{\"no", "des\"", ":[]", "}"];
        let url = slow_server(PIECES, Duration::from_millis(600)).unwrap();
        assert_eq!(listing(&agent(), &url).unwrap(), Listing::default());
    }

    #[test]
    fn a_broker_that_is_silent_or_refuses_is_said_to() {
        const SILENT: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n{\"nodes\":", "[]}"];
        let url = slow_server(SILENT, Duration::from_secs(SILENCE_S) * 3 / 2).unwrap();
        let error = listing(&agent(), &url).unwrap_err().to_string();
        assert!(error.contains("silent for 3 s"), "{error}");
        const REFUSES: &[&str] = &["HTTP/1.0 507 Insufficient Storage\r\n\r\nno more timelines\n"];
        let url = slow_server(REFUSES, Duration::ZERO).unwrap();
        let error = listing(&agent(), &url).unwrap_err().to_string();
        assert!(error.contains("507") && error.contains("no more timelines"), "{error}");
    }

    #[test]
    fn a_broker_that_is_away_is_told_once() {
        let mut well = true;
        let mut told = |ok: bool| {
            let exchanged = if ok { Ok(()) } else { Err(anyhow!("away")) };
            news(&mut well, exchanged).map(|told| told.is_ok())
        };
        let all = [true, false, false, true, true].map(&mut told);
        assert_eq!(all, [None, Some(false), None, Some(true), None]);
    }
}
