//! Telling the broker how far we are, and hearing how far others are.

use std::time::{Duration, Instant};

use pgstrata_format::resting::TimelineSummary;
use pgstrata_http_client::{Access, Broker, News};
use pgstrata_ids::{Lsn, Member};
use pgstrata_wire::broker::{Listing, Publication, Role, TTL_S, TimelineProgress};

use super::waking::Due;
use super::{Background, INTERVAL, Known};
use crate::timeline::can_be_trimmed;
use crate::timelines::TimelineKey;

/// The pause after an exchange is so many times as long as that took...
const PAUSE_FACTOR: u32 = 20;

/// ... as long as both take no longer than this: the broker is not to forget who is there.
const LONGEST_ROUND: Duration = Duration::from_secs(TTL_S / 2);

/// Until the process ends. An exchange takes its time, so this is a thread's.
pub fn run(background: &Background, url: &str, due: &Due) {
    let broker = Broker::new(url, &Access::of(background.security.identity()));
    let mut news = News::default();
    loop {
        let begun = Instant::now();
        let exchanged = broker.exchange(&publication(background));
        news.note(broker.url(), &exchanged);
        if let Ok(listing) = exchanged {
            hear(background, listing, due);
        }
        std::thread::sleep(pause_after(begun.elapsed()));
    }
}

/// With thousands of timelines an exchange is work, for the broker too, so that there are fewer.
fn pause_after(took: Duration) -> Duration {
    (took * PAUSE_FACTOR).min(LONGEST_ROUND.saturating_sub(took)).max(INTERVAL)
}

fn publication(background: &Background) -> Publication {
    let own = background.timelines.context().shared.own;
    Publication {
        node: background.timelines.context().shared.own.node.0,
        role: Role::Safekeeper,
        zone: background.zone.clone(),
        addresses: background.addresses.clone(),
        timelines: background
            .timelines
            .overviews()
            .iter()
            .filter(|timeline| !is_left(&timeline.summary, own))
            .map(|timeline| progress(&timeline.summary))
            .collect(),
    }
}

fn is_left(summary: &TimelineSummary, own: Member) -> bool {
    summary.configuration.is_known() && !summary.configuration.contains(own)
}

fn hear(background: &Background, listing: Listing, due: &Due) {
    let (known, timelines) = (&background.known, &background.timelines);
    known.replace(listing);
    let own = timelines.context().shared.own;
    for summary in timelines.resting() {
        if !is_left(&summary, own) && is_due(&summary, known) {
            due.add((summary.parameters.tenant, summary.parameters.timeline));
        }
    }
    for key in timelines.open_keys() {
        let Some(timeline) = timelines.get_open(key) else { continue };
        timeline.note_consistent(consistent(known, key, timeline.commit_lsn()));
    }
}

/// Up to where nobody needs what is here. A position that is committed nowhere is a mistake, or comes too early; whoever is still
/// catching up has others' word for it, and removes what it has got so far.
fn consistent(known: &Known, key: TimelineKey, commit_lsn: Lsn) -> Lsn {
    let committed = known.highest(key, |progress| progress.commit_lsn).max(commit_lsn);
    let told = known.highest(key, |progress| {
        Some(progress.remote_consistent_lsn).filter(|&lsn| lsn <= committed).unwrap_or_default()
    });
    told.min(commit_lsn)
}

/// Whether something is to be done with a timeline at rest, by what others say: they have more, or no longer need what is
/// here.
fn is_due(summary: &TimelineSummary, known: &Known) -> bool {
    let key = (summary.parameters.tenant, summary.parameters.timeline);
    let committed = known.highest(key, |progress| progress.commit_lsn);
    let told = consistent(known, key, summary.commit_lsn);
    let consistent = told.max(summary.remote_consistent_lsn);
    committed > summary.commit_lsn || can_be_trimmed(summary, consistent)
}

fn progress(summary: &TimelineSummary) -> TimelineProgress {
    TimelineProgress {
        tenant_id: summary.parameters.tenant,
        timeline_id: summary.parameters.timeline,
        term: summary.term.0,
        flush_lsn: summary.flush_lsn,
        commit_lsn: summary.commit_lsn,
        archived_lsn: summary.archived_lsn,
        remote_consistent_lsn: summary.remote_consistent_lsn,
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{TenantId, TimelineId};
    use pgstrata_wire::broker::{Addresses, LISTING_S};

    use super::*;

    #[test]
    fn who_catches_up_removes_what_others_are_done_with() {
        let key = (TenantId([1; 16]), TimelineId([2; 16]));
        let says = |node, role, commit_lsn, remote_consistent_lsn| Publication {
            node,
            role,
            zone: String::new(),
            addresses: Addresses::default(),
            timelines: vec![TimelineProgress {
                tenant_id: key.0,
                timeline_id: key.1,
                term: 1,
                flush_lsn: commit_lsn,
                commit_lsn,
                archived_lsn: Lsn::INVALID,
                remote_consistent_lsn,
            }],
        };
        let heard = |nodes: Vec<Publication>| {
            let known = Known::default();
            known.replace(Listing { nodes });
            consistent(&known, key, Lsn(100))
        };
        let pages = |lsn| says(9, Role::Pageserver, Lsn::INVALID, Lsn(lsn));
        let member = || says(2, Role::Safekeeper, Lsn(1000), Lsn::INVALID);
        assert_eq!(heard(vec![]), Lsn::INVALID);
        assert_eq!(heard(vec![pages(90)]), Lsn(90));
        assert_eq!(heard(vec![pages(900)]), Lsn::INVALID, "nobody says that so much is committed");
        assert_eq!(heard(vec![pages(900), member()]), Lsn(100), "it is caught up with so far");
        assert_eq!(heard(vec![pages(1001), member()]), Lsn::INVALID);
    }

    #[test]
    fn there_are_fewer_exchanges_where_one_takes_long_but_nobody_is_forgotten() {
        let pause = |ms| pause_after(Duration::from_millis(ms)).as_millis();
        assert_eq!([pause(0), pause(20), pause(100), pause(300)], [1000, 1000, 2000, 4700]);
        assert_eq!([pause(2500), pause(6000)], [2500, 1000]);
        // Of one that takes as long as any may, too.
        for took in (0..=LISTING_S).map(Duration::from_secs) {
            assert!(took + pause_after(took) < Duration::from_secs(TTL_S), "{took:?}");
        }
    }
}
