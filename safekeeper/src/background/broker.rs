//! Telling the broker how far we are, and hearing how far others are.

use pgstrata_http_client::{Access, Broker, News};
use pgstrata_wire::broker::{Listing, Publication, Role, TimelineProgress};

use super::{Background, INTERVAL};
use crate::timeline::Timeline;

/// Until the process ends. An exchange takes its time, so this is a thread's.
pub fn run(background: &Background, url: &str) {
    let broker = Broker::new(url, &Access::of(background.security.identity()));
    let mut news = News::default();
    loop {
        let exchanged = broker.exchange(&publication(background));
        news.note(broker.url(), &exchanged);
        if let Ok(listing) = exchanged {
            hear(background, listing);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn publication(background: &Background) -> Publication {
    Publication {
        node: background.timelines.context().shared.own.node.0,
        role: Role::Safekeeper,
        zone: background.zone.clone(),
        addresses: background.addresses.clone(),
        timelines: background
            .timelines
            .all()
            .iter()
            .filter(|timeline| !timeline.is_left())
            .map(|timeline| progress(timeline))
            .collect(),
    }
}

fn hear(background: &Background, listing: Listing) {
    let known = &background.known;
    known.replace(listing);
    for timeline in background.timelines.all() {
        let key = (timeline.parameters().tenant, timeline.parameters().timeline);
        // A position that is not committed here is a mistake, or comes too early.
        let commit_lsn = timeline.commit_lsn();
        let consistent = known.highest(key, |progress| {
            Some(progress.remote_consistent_lsn)
                .filter(|&lsn| lsn <= commit_lsn)
                .unwrap_or_default()
        });
        timeline.note_consistent(consistent);
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
