//! Uploading full segments, and the tail of a log that nobody writes to, and removing from disk what nobody needs here any more.

pub mod turn;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, NodeId};
use pgstrata_wire::broker::TimelineProgress;

use self::turn::{Around, GivenUpRead, State, advance};
use super::{Background, INTERVAL};
use crate::chain_reader::Ancestors;
use crate::timeline::Timeline;
use crate::timelines::TimelineKey;

pub async fn run(background: Background) {
    let Some(archive) = background.archive.clone() else { return };
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // As many as there are open timelines, of a few hundred bytes each.
    let mut states: HashMap<TimelineKey, State> = HashMap::new();
    let mut has_more = false;
    loop {
        if !std::mem::take(&mut has_more) {
            interval.tick().await;
        }
        let open = background.timelines.open_keys();
        states.retain(|key, _| open.binary_search(key).is_ok());
        for key in open {
            let Some(timeline) = background.timelines.get_open(key) else { continue };
            if timeline.is_left() {
                continue;
            }
            let state = states.entry(key).or_insert_with(|| State::new(Instant::now()));
            state.look(&timeline, &background);
            if state.is_due(Instant::now()) {
                let advanced = advance(&background, &archive, &timeline, state).await;
                has_more |= advanced.as_ref().is_ok_and(|&whole_turn| whole_turn);
                state.note(&timeline, advanced.map(|_| ()), Instant::now());
            }
            trim(&timeline).await;
        }
    }
}

impl Around for Background {
    fn own(&self) -> NodeId {
        self.timelines.context().shared.own.node
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn tail_after(&self) -> Duration {
        self.tail_after
    }

    fn progress(&self, node: NodeId, key: TimelineKey) -> Option<TimelineProgress> {
        self.known.progress(node, key)
    }

    fn claimed(&self, key: TimelineKey) -> Lsn {
        self.known.highest(key, |progress| progress.archived_lsn)
    }

    fn ancestors(&self) -> Arc<dyn Ancestors> {
        Arc::clone(&self.timelines) as _
    }

    fn given_up(&self, key: TimelineKey) -> GivenUpRead {
        let decisions = self.timelines.context().decisions.clone();
        Box::pin(async move {
            let decided = tokio::task::spawn_blocking(move || decisions.read(key)).await;
            let decided = decided.map_err(|error| error.to_string())?;
            let decided = decided.map_err(|reason| reason.to_string())?;
            Ok(decided.map(|quorum| quorum.given_up).unwrap_or_default())
        })
    }
}

async fn trim(timeline: &Arc<Timeline>) {
    let timeline = Arc::clone(timeline);
    let trimmed = tokio::task::spawn_blocking(move || timeline.trim()).await;
    match trimmed {
        // It is said of the disk.
        Ok(Err(error)) if error.is_for_want_of_space() => {}
        Ok(Err(error)) => tracing::warn!(%error, "old WAL can't be removed"),
        // A panic is reported by the runtime.
        Ok(Ok(_)) | Err(_) => {}
    }
}
