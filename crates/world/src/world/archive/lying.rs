//! Turns that make a mistake.

use std::sync::Arc;

use pgstrata_blob::Store;
use pgstrata_format::archived::Extent;
use pgstrata_ids::Lsn;
use pgstrata_safekeeper::archive::{Archive, Log, Tail};
use pgstrata_safekeeper::background::archiving::turn::{self, Due, State};
use pgstrata_safekeeper::checked_segment::{CheckedSegment, Trouble};
use pgstrata_safekeeper::timeline::Timeline;

use super::Here;
use crate::lies::Lie;

/// A turn, by somebody who makes this mistake, if it is one that is made here.
pub async fn advance(
    lie: Lie,
    raw: &Store,
    here: &Here,
    archive: &Arc<Archive>,
    timeline: &Arc<Timeline>,
    state: &mut State,
) -> Result<bool, Trouble> {
    let parameters = timeline.parameters();
    let configuration = timeline.configuration_number();
    let log = Log { configuration, history: timeline.history() };
    let to = match state.due() {
        Some(Due::Segment(to) | Due::Tail(to)) => to,
        None => return Ok(false),
    };
    match (lie, state.due()) {
        (Lie::TrimBeforeArchive, Some(Due::Segment(_))) => timeline.note_archived(to),
        (Lie::RottenArchived, Some(Due::Segment(_))) => {
            let advanced = turn::advance(here, archive, timeline, state).await;
            if let (Err(Trouble { is_damage: true, .. }), Some(Due::Segment(to))) =
                (&advanced, state.due())
            {
                archive.put(parameters, &unchecked(here, timeline, to)?, &log).await?;
                timeline.note_archived(to);
            }
            return advanced;
        }
        (Lie::TailBeyondCommit, Some(Due::Tail(_))) => {
            let size = timeline.files().segment_size();
            let end = timeline.flush_lsn().min(Lsn(to.segment_start(size).0 + size - 8));
            let from = Tail::start(parameters, end);
            let bytes = Arc::new(read(timeline, from, end)?);
            let history = log.history.up_to(end);
            let extent = Extent { from, boundary: end, last_record: None, configuration, history };
            archive.put_tail(parameters, &Tail { extent, bytes }).await?;
            timeline.note_archived(to);
        }
        (Lie::TailInPlaceOfAnother, Some(Due::Tail(_))) => {
            let directory = format!(
                "tenants/{}/timelines/{}/wal/tail/",
                parameters.tenant, parameters.timeline
            );
            let failed = |error: pgstrata_blob::BlobError| Trouble::from(error.to_string());
            let before = raw.list(&directory).await.map_err(failed)?;
            archive
                .put_tail(parameters, &timeline.read_tail(to, timeline.configuration_number())?)
                .await?;
            let after = raw.list(&directory).await.map_err(failed)?;
            let new = after.iter().find(|object| !before.contains(object));
            if let (Some(old), Some(new)) = (before.last(), new) {
                let object = raw.get(&new.path, u64::MAX).await.map_err(failed)?;
                raw.put(&old.path, object).await.map_err(failed)?;
            }
            timeline.note_archived(to);
        }
        (Lie::TailsDroppedFirst, Some(_)) => {
            archive.drop_tails(parameters, to, configuration).await?;
            return turn::advance(here, archive, timeline, state).await;
        }
        (Lie::FailureIsArchived, Some(_)) => {
            let advanced = turn::advance(here, archive, timeline, state).await;
            if advanced.is_err() {
                timeline.note_archived(to);
            }
            return advanced;
        }
        _ => return turn::advance(here, archive, timeline, state).await,
    }
    Ok(true)
}

fn read(timeline: &Timeline, from: Lsn, to: Lsn) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; to.saturating_sub(from) as usize];
    let mut reader = timeline.reader();
    let mut done = 0;
    while done < bytes.len() {
        match reader.read(from + done as u64, &mut bytes[done..]) {
            Ok(count @ 1..) => done += count,
            Ok(0) => return Err(format!("there is nothing at {}", from + done as u64)),
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(bytes)
}

/// The segment that ends there, whatever is in it.
fn unchecked(here: &Here, timeline: &Timeline, to: Lsn) -> Result<CheckedSegment, String> {
    let size = timeline.files().segment_size();
    let (from, start) = (Lsn(to.0 - size), timeline.parameters().start_lsn);
    let mut bytes = Vec::new();
    if from < start {
        let before = here.before.0.as_ref().ok_or("the ancestor is not here")?;
        bytes = read(before, from, start.min(to))?;
    }
    bytes.extend(read(timeline, from.max(start), to)?);
    Ok(CheckedSegment {
        number: from.segment_number(size),
        bytes: Arc::new(bytes),
        missing: 0,
        // Nothing is known to end in it.
        boundary: from.max(start),
        last_record: None,
    })
}
