//! The broker's client: what one says of oneself, and what one hears of the others.

use std::time::Duration;

use anyhow::{Context, Result};
use pgstrata_identity::Whom;
use pgstrata_ids::TimelineId;
use pgstrata_wire::broker::{LISTING_S, Listing, MAX_LISTING, Publication, SILENCE_S};
use ureq::Agent;

use crate::{Access, Timing, accepted, agent, explained};

/// What is long takes its time; one that says nothing is not waited for.
const TIMING: Timing =
    Timing { whole: Duration::from_secs(LISTING_S), silence: Some(Duration::from_secs(SILENCE_S)) };

/// See the module.
#[derive(Debug)]
pub struct Broker {
    agent: Agent,
    url: String,
}

impl Broker {
    /// The one at `url`, such as `http://broker:50051`.
    pub fn new(url: &str, access: &Access) -> Broker {
        let agent = agent(TIMING, access, Whom::Broker);
        Broker { agent, url: url.trim_end_matches('/').to_owned() }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Tells what this node does, and hears everything.
    pub fn exchange(&self, said: &Publication) -> Result<Listing> {
        let published = self.agent.post(format!("{}/v1/publish", self.url)).send_json(said);
        accepted(published.map_err(|error| explained(error, TIMING))?)?;
        self.everything()
    }

    /// All nodes with all their timelines.
    pub fn everything(&self) -> Result<Listing> {
        self.list(&[])
    }

    /// All nodes, with their progress in one timeline at most: a short answer.
    pub fn nodes(&self, timeline: Option<TimelineId>) -> Result<Listing> {
        // Nobody has the timeline of all zeros.
        let timeline = timeline.unwrap_or(TimelineId([0; 16])).to_string();
        self.list(&[("timeline", &timeline)])
    }

    fn list(&self, query: &[(&str, &str)]) -> Result<Listing> {
        let request = self.agent.get(format!("{}/v1/nodes", self.url));
        let answer = request.query_pairs(query.iter().copied()).call();
        let mut answer = accepted(answer.map_err(|error| explained(error, TIMING))?)?;
        let body = answer.body_mut().with_config().limit(MAX_LISTING as u64).read_to_vec();
        let body = body.map_err(|error| explained(error, TIMING))?;
        serde_json::from_slice(&body).context("its listing can't be read")
    }
}

/// What is said of exchanges in the log: only what is another than it was before.
#[derive(Debug, Default)]
pub struct News {
    is_away: bool,
}

impl News {
    /// An exchange came to this end.
    pub fn note<T>(&mut self, url: &str, exchanged: &Result<T>) {
        match self.change(exchanged.is_ok()) {
            Some(true) => tracing::info!("the broker {url} is back"),
            Some(false) => {
                let error = exchanged.as_ref().err().map(|error| format!("{error:#}"));
                tracing::warn!(error, "there is no exchange with the broker {url}");
            }
            None => {}
        }
    }

    fn change(&mut self, is_well: bool) -> Option<bool> {
        let was_away = std::mem::replace(&mut self.is_away, !is_well);
        (was_away == is_well).then_some(is_well)
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_sim::slow_server;

    use super::*;

    #[test]
    fn h13_a_long_listing_is_read_while_it_comes() {
        const PIECES: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n", "{\"no", "des\"", ":[]", "}"];
        let url = slow_server(PIECES, Duration::from_millis(900)).unwrap();
        assert_eq!(Broker::new(&url, &Access::Local).everything().unwrap(), Listing::default());
    }

    #[test]
    fn h13_a_broker_that_is_silent_or_refuses_is_said_to() {
        const SILENT: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n{\"nodes\":", "[]}"];
        let url = slow_server(SILENT, Duration::from_secs(SILENCE_S) * 3 / 2).unwrap();
        let error = Broker::new(&url, &Access::Local).everything().unwrap_err().to_string();
        assert!(error.contains("silent for 3 s"), "{error}");
        const REFUSES: &[&str] = &[
            "HTTP/1.0 507 Insufficient Storage\r\n\r\n",
            r#"{"code":"full","error":"no more timelines"}"#,
        ];
        let url = slow_server(REFUSES, Duration::ZERO).unwrap();
        let error = Broker::new(&url, &Access::Local).everything().unwrap_err().to_string();
        assert!(error.contains("507") && error.ends_with("no more timelines"), "{error}");
    }

    #[test]
    fn a_broker_that_is_away_is_told_once() {
        let mut news = News::default();
        let told = [true, false, false, true, true].map(|is_well| news.change(is_well));
        assert_eq!(told, [None, Some(false), None, Some(true), None]);
    }
}
