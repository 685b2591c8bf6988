//! Uploading full segments, and removing from disk what nobody needs here any more.
//!
//! What others say is a hint where to look, never a reason to remove something: a segment counts
//! as archived on a node once that node has put it there, or has read it back and found it the
//! same as its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, NodeId};

use super::{Background, INTERVAL};
use crate::archive::Archive;
use crate::chain_reader::ChainReader;
use crate::checked_segment::{CheckedSegment, Reached, Trouble};
use crate::timeline::Timeline;
use crate::timelines::TimelineKey;

/// A member that finds a full segment unarchived for this long takes the next turn: whoever is
/// before it can't.
const TURN: Duration = Duration::from_secs(15);

/// First and longest pause after an attempt that failed.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Segments of one timeline looked at before others have their turn.
const SEGMENTS_PER_TURN: usize = 4;

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
            let state = states.entry(key).or_insert_with(State::new);
            state.look(&timeline);
            if Instant::now() >= state.retry_at {
                let advanced = advance(&background, &archive, &timeline, state).await;
                has_more |= advanced.as_ref().is_ok_and(|&whole_turn| whole_turn);
                state.note(&timeline, advanced.map(|_| ()));
            }
            trim(&timeline).await;
        }
    }
}

/// What is known of one timeline between rounds.
struct State {
    reached: Reached,
    /// What is archived, and since when it is no more than that although there is a full segment.
    archived_lsn: Lsn,
    since: Instant,
    retry_at: Instant,
    pause: Duration,
}

impl State {
    fn new() -> State {
        let now = Instant::now();
        let archived_lsn = Lsn::INVALID;
        State {
            reached: Reached::default(),
            archived_lsn,
            since: now,
            retry_at: now,
            pause: PAUSE.0,
        }
    }

    fn look(&mut self, timeline: &Timeline) {
        let archived_lsn = timeline.marks().archived_lsn;
        let is_full = timeline.commit_lsn() >= archived_lsn + timeline.files().segment_size();
        if archived_lsn != self.archived_lsn || !is_full {
            self.archived_lsn = archived_lsn;
            self.since = Instant::now();
        }
    }

    fn note(&mut self, timeline: &Timeline, advanced: Result<(), Trouble>) {
        self.pause = match &advanced {
            Ok(()) => PAUSE.0,
            Err(_) => (self.pause * 2).min(PAUSE.1),
        };
        if let Err(error) = &advanced {
            self.retry_at = Instant::now() + self.pause;
            let id = timeline.parameters().timeline;
            tracing::warn!(timeline = %id, %error, "WAL can't be archived; it will be tried again");
        }
        timeline.note_archiving(advanced.err());
    }
}

/// One member uploads: the first, in an order that differs from timeline to timeline, of those
/// that have the next segment; after it each of the others, if nothing comes of it. Two that see
/// it differently do no harm.
fn is_uploader(background: &Background, timeline: &Timeline, waited: Duration) -> bool {
    let own = background.timelines.context().shared.own.node;
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let wanted = timeline.marks().archived_lsn;
    let has_it = |node: NodeId| {
        let progress = background.known.progress(node, key);
        progress.is_some_and(|progress| progress.commit_lsn > wanted)
    };
    let configuration = timeline.configuration();
    let mut members: Vec<NodeId> =
        configuration.members().iter().map(|member| member.node).collect();
    let turn = usize::from(parameters.timeline.0[15]) % members.len().max(1);
    members.rotate_left(turn);
    let able = members.into_iter().filter(|&node| node == own || has_it(node));
    let before = able.take_while(|&node| node != own).count();
    waited >= TURN * before as u32
}

/// Moves on over segments that are in the archive: because others say so and this node has seen
/// that it is true, or because it put them there. True if it went as far as it may in one turn.
async fn advance(
    background: &Background,
    archive: &Arc<Archive>,
    timeline: &Arc<Timeline>,
    state: &mut State,
) -> Result<bool, Trouble> {
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let size = u64::from(parameters.segment_size);
    for _ in 0..SEGMENTS_PER_TURN {
        let (from, commit_lsn) = (timeline.marks().archived_lsn, timeline.commit_lsn());
        let Some(to) = from.checked_add(size).filter(|&to| to <= commit_lsn) else {
            return Ok(false);
        };
        let claimed = background.known.highest(key, |progress| progress.archived_lsn) >= to;
        let uploads = is_uploader(background, timeline, state.since.elapsed());
        if !claimed && !uploads {
            return Ok(false);
        }
        let timelines = Arc::clone(&background.timelines);
        let mut reader =
            ChainReader::new(timelines, Arc::clone(timeline), Some(Arc::clone(archive)));
        let number = from.segment_number(size);
        let segment =
            CheckedSegment::read(&mut reader, parameters, number, commit_lsn, &mut state.reached)
                .await?;
        if !(claimed && archive.holds(parameters, &segment).await?) {
            if !uploads {
                return Ok(false);
            }
            archive.put(parameters, &segment).await?;
        }
        timeline.note_archived(to);
        state.look(timeline);
    }
    Ok(true)
}

async fn trim(timeline: &Arc<Timeline>) {
    let timeline = Arc::clone(timeline);
    let trimmed = tokio::task::spawn_blocking(move || timeline.trim()).await;
    if let Ok(Err(error)) = trimmed {
        tracing::warn!(%error, "old WAL can't be removed");
    }
}
