//! Telling the broker how far we are, and hearing how far others are.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use pgstrata_wire::broker::{
    LISTING_S, Listing, MAX_LISTING, Publication, Role, SILENCE_S, TimelineProgress,
};

use super::{Background, INTERVAL};
use crate::timeline::Timeline;

/// Bytes of a refusal that are shown, at most.
const SHOWN: usize = 300;

pub async fn run(background: Background) {
    let Some(url) = &background.broker else { return };
    let client = match client() {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(%error, "the broker can't be used");
            return;
        }
    };
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut well = true;
    loop {
        interval.tick().await;
        let exchanged = exchange(&background, &client, url).await;
        match &exchanged {
            Err(error) if well => {
                let error = format!("{error:#}");
                tracing::warn!(error, "there is no exchange with the broker");
            }
            Ok(()) if !well => tracing::info!("the broker is back"),
            _ => {}
        }
        well = exchanged.is_ok();
    }
}

/// What is long takes its time; one that says nothing is not waited for.
fn client() -> reqwest::Result<reqwest::Client> {
    // The client panics without, though it speaks plain HTTP.
    pgstrata_identity::install_provider();
    let silence = Duration::from_secs(SILENCE_S);
    // A proxy is for the object store.
    reqwest::Client::builder().no_proxy().connect_timeout(silence).read_timeout(silence).build()
}

async fn exchange(
    background: &Background,
    client: &reqwest::Client,
    url: &str,
) -> anyhow::Result<()> {
    let timelines = background.timelines.all();
    let publication = Publication {
        node: background.timelines.context().node.0,
        role: Role::Safekeeper,
        zone: background.zone.clone(),
        addresses: background.addresses.clone(),
        timelines: timelines.iter().map(|timeline| progress(timeline)).collect(),
    };
    let url = url.trim_end_matches('/');
    let published = client.post(format!("{url}/v1/publish")).json(&publication).send().await;
    accepted(published.map_err(explained)?).await?;
    let (listing, known) = (listing(client, url).await?, Arc::clone(&background.known));
    tokio::task::spawn_blocking(move || known.replace(listing)).await?;
    for timeline in timelines {
        let key = (timeline.parameters().tenant, timeline.parameters().timeline);
        let known = &background.known;
        // A position that is not committed here is a mistake, or comes too early.
        let commit_lsn = timeline.commit_lsn();
        let consistent = known.highest(key, |progress| {
            Some(progress.remote_consistent_lsn)
                .filter(|&lsn| lsn <= commit_lsn)
                .unwrap_or_default()
        });
        timeline.note_consistent(consistent);
    }
    Ok(())
}

/// Asks for everything, for as long as the answer makes progress, within reason.
async fn listing(client: &reqwest::Client, url: &str) -> anyhow::Result<Listing> {
    let whole = async {
        let answer = client.get(format!("{url}/v1/nodes")).send().await.map_err(explained)?;
        read_body(accepted(answer).await?).await
    };
    let body = tokio::time::timeout(Duration::from_secs(LISTING_S), whole).await;
    let body = body.map_err(|_| anyhow!("its listing took more than {LISTING_S} s"))??;
    // A long one takes a second, which this thread's connections can't wait for.
    let parsed = tokio::task::spawn_blocking(move || serde_json::from_slice(&body)).await?;
    parsed.context("its listing can't be read")
}

/// Reads an answer, as far as one is sensibly long.
async fn read_body(mut answer: reqwest::Response) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(explained)? {
        body.extend_from_slice(&chunk);
        ensure!(body.len() <= MAX_LISTING, "it answers with more than {MAX_LISTING} bytes");
    }
    Ok(body)
}

/// An answer that is no refusal.
async fn accepted(mut answer: reqwest::Response) -> anyhow::Result<reqwest::Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let first = answer.chunk().await.ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(&first[..first.len().min(SHOWN)]);
    bail!("it answers {status}: {}", text.trim())
}

fn explained(error: reqwest::Error) -> anyhow::Error {
    match error.is_timeout() {
        true => anyhow!("it was silent for {SILENCE_S} s"),
        false => error.into(),
    }
}

fn progress(timeline: &Timeline) -> TimelineProgress {
    let marks = timeline.marks();
    TimelineProgress {
        tenant_id: timeline.parameters().tenant,
        timeline_id: timeline.parameters().timeline,
        term: timeline.term().0,
        flush_lsn: timeline.flush_lsn(),
        commit_lsn: timeline.commit_lsn(),
        archived_lsn: marks.archived_lsn,
        remote_consistent_lsn: marks.remote_consistent_lsn,
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_sim::slow_server;

    use super::*;

    #[tokio::test]
    async fn h13_a_long_listing_is_read_while_it_comes() {
        const PIECES: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n", "{\"no", "des\"", ":[]", "}"];
        let url = slow_server(PIECES, Duration::from_millis(500)).unwrap();
        assert_eq!(listing(&client().unwrap(), &url).await.unwrap(), Listing::default());
    }

    #[tokio::test]
    async fn h13_a_broker_that_is_silent_or_refuses_is_said_to() {
        const SILENT: &[&str] = &["HTTP/1.0 200 OK\r\n\r\n{\"nodes\":", "[]}"];
        let url = slow_server(SILENT, Duration::from_secs(SILENCE_S) * 3 / 2).unwrap();
        let error = listing(&client().unwrap(), &url).await.unwrap_err().to_string();
        assert!(error.contains("silent for 3 s"), "{error}");
        const REFUSES: &[&str] = &["HTTP/1.0 507 Insufficient Storage\r\n\r\nno more timelines\n"];
        let url = slow_server(REFUSES, Duration::ZERO).unwrap();
        let error = listing(&client().unwrap(), &url).await.unwrap_err().to_string();
        assert!(error.contains("507") && error.contains("no more timelines"), "{error}");
    }
}
