//! Telling the broker how far we are, and hearing how far others are.

use std::time::Duration;

use anyhow::ensure;
use pgstrata_wire::broker::{Listing, MAX_LISTING, Publication, Role, TimelineProgress};

use super::{Background, INTERVAL};
use crate::timeline::Timeline;

/// Longest wait for the broker.
const TIMEOUT: Duration = Duration::from_millis(800);

pub async fn run(background: Background) {
    let Some(url) = &background.broker else { return };
    let client = match reqwest::Client::builder().timeout(TIMEOUT).build() {
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
            Err(error) if well => tracing::warn!(%error, "the broker can't be reached"),
            Ok(()) if !well => tracing::info!("the broker is back"),
            _ => {}
        }
        well = exchanged.is_ok();
    }
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
    let published = client.post(format!("{url}/v1/publish")).json(&publication).send().await?;
    published.error_for_status()?;
    let answer = client.get(format!("{url}/v1/nodes")).send().await?.error_for_status()?;
    let listing = read_listing(answer).await?;
    background.known.replace(listing);
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

/// Reads an answer, as far as one is sensibly long.
async fn read_listing(mut answer: reqwest::Response) -> anyhow::Result<Listing> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        body.extend_from_slice(&chunk);
        ensure!(body.len() <= MAX_LISTING, "it answers with more than {MAX_LISTING} bytes");
    }
    Ok(serde_json::from_slice(&body)?)
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
