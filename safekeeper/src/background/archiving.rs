//! Uploading full segments, and removing from disk what nobody needs here any more.
//!
//! What others say is a hint where to look, never a reason to remove something: a segment counts
//! as archived on a node once that node has put it there, or has read it back and found it the
//! same as its own.

use std::collections::HashMap;
use std::sync::Arc;

use pgstrata_ids::NodeId;
use pgstrata_pg_wal::WalChecker;

use super::{Background, INTERVAL};
use crate::archive::Archive;
use crate::chain_reader::ChainReader;
use crate::checked_segment::CheckedSegment;
use crate::timeline::Timeline;
use crate::timelines::TimelineKey;

/// Segments of one timeline looked at before others have their turn.
const SEGMENTS_PER_TURN: usize = 4;

pub async fn run(background: Background) {
    let Some(archive) = background.archive.clone() else { return };
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // As many as there are timelines, of a few hundred bytes each.
    let mut reached: HashMap<TimelineKey, Option<WalChecker>> = HashMap::new();
    loop {
        interval.tick().await;
        for timeline in background.timelines.all() {
            let parameters = timeline.parameters();
            let reached = reached.entry((parameters.tenant, parameters.timeline)).or_default();
            if let Err(error) = advance(&background, &archive, &timeline, reached).await {
                let id = timeline.parameters().timeline;
                tracing::warn!(timeline = %id, %error, "WAL can't be archived; it will be tried again");
            }
            trim(&timeline).await;
        }
    }
}

/// One member uploads: the first, in an order that differs from timeline to timeline, of those
/// that have the next segment. Two that see it differently do no harm.
fn is_uploader(background: &Background, timeline: &Timeline) -> bool {
    let own = background.timelines.context().node;
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let wanted = timeline.marks().archived_lsn;
    let has_it = |node: NodeId| {
        let progress = background.known.progress(node, key);
        progress.is_some_and(|progress| progress.commit_lsn > wanted)
    };
    let configuration = timeline.configuration();
    let mut members = configuration.members().to_vec();
    let turn = usize::from(parameters.timeline.0[15]) % members.len().max(1);
    members.rotate_left(turn);
    members.into_iter().find(|&node| node == own || has_it(node)) == Some(own)
}

/// Moves on over segments that are in the archive: because others say so and this node has seen
/// that it is true, or because it put them there.
async fn advance(
    background: &Background,
    archive: &Arc<Archive>,
    timeline: &Arc<Timeline>,
    reached: &mut Option<WalChecker>,
) -> Result<(), String> {
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let size = u64::from(parameters.segment_size);
    for _ in 0..SEGMENTS_PER_TURN {
        let (from, commit_lsn) = (timeline.marks().archived_lsn, timeline.commit_lsn());
        let Some(to) = from.checked_add(size).filter(|&to| to <= commit_lsn) else {
            return Ok(());
        };
        let claimed = background.known.highest(key, |progress| progress.archived_lsn) >= to;
        let uploads = is_uploader(background, timeline);
        if !claimed && !uploads {
            return Ok(());
        }
        let timelines = Arc::clone(&background.timelines);
        let mut reader =
            ChainReader::new(timelines, Arc::clone(timeline), Some(Arc::clone(archive)));
        let number = from.segment_number(size);
        let segment =
            CheckedSegment::read(&mut reader, parameters, number, commit_lsn, reached).await?;
        if !(claimed && archive.holds(parameters, &segment).await?) {
            if !uploads {
                return Ok(());
            }
            archive.put(parameters, &segment).await?;
        }
        timeline.note_archived(to);
    }
    Ok(())
}

async fn trim(timeline: &Arc<Timeline>) {
    let timeline = Arc::clone(timeline);
    let trimmed = tokio::task::spawn_blocking(move || timeline.trim()).await;
    if let Ok(Err(error)) = trimmed {
        tracing::warn!(%error, "old WAL can't be removed");
    }
}
