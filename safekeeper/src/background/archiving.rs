//! Uploading full segments, and removing from disk what nobody needs here any more.

use std::sync::Arc;

use pgstrata_ids::{Lsn, NodeId};

use super::{Background, INTERVAL};
use crate::archive::Archive;
use crate::chain_reader::ChainReader;
use crate::timeline::Timeline;

/// Segments of one timeline uploaded before others have their turn.
const SEGMENTS_PER_TURN: usize = 4;

pub async fn run(background: Background) {
    let Some(archive) = background.archive.clone() else { return };
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        for timeline in background.timelines.all() {
            if is_uploader(&background, &timeline)
                && let Err(error) = upload(&background, &archive, &timeline).await
            {
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

async fn upload(
    background: &Background,
    archive: &Arc<Archive>,
    timeline: &Arc<Timeline>,
) -> Result<(), String> {
    let parameters = timeline.parameters();
    let size = u64::from(parameters.segment_size);
    for _ in 0..SEGMENTS_PER_TURN {
        let from = timeline.marks().archived_lsn;
        let to = from + size;
        if to > timeline.commit_lsn() {
            return Ok(());
        }
        let timelines = Arc::clone(&background.timelines);
        let mut reader =
            ChainReader::new(timelines, Arc::clone(timeline), Some(Arc::clone(archive)));
        let mut segment = vec![0; size as usize];
        let mut done = 0;
        while done < segment.len() {
            let at = from + done as u64;
            let count = reader.read(at, &mut segment[done..]).await;
            done += count.map_err(|error| error.to_string())?;
        }
        archive.put(parameters, from.segment_number(size), &segment).await?;
        timeline.update_marks(|marks| marks.archived_lsn = marks.archived_lsn.max(to));
    }
    Ok(())
}

async fn trim(timeline: &Arc<Timeline>) {
    let marks = timeline.marks();
    let lsn: Lsn = marks.archived_lsn.min(marks.remote_consistent_lsn);
    let timeline = Arc::clone(timeline);
    let trimmed = tokio::task::spawn_blocking(move || timeline.trim(lsn)).await;
    if let Ok(Err(error)) = trimmed {
        tracing::warn!(%error, "old WAL can't be removed");
    }
}
