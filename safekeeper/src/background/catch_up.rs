//! Catching up from other members and the archive: while no proposer runs, and where one does not send what is missing, since
//! it is not its own. Which timelines, and when: each second those that may lack something, a few at a time; and at once those
//! of which a proposer waits for what its term began with.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgstrata_ids::Lsn;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::{Background, INTERVAL, pulling};
use crate::timeline::Timeline;
use crate::timelines::TimelineKey;

/// Timelines that are caught up with at once, each from one member: what they take of the network is bounded.
const AT_ONCE: usize = 4;

/// The same, of those that a commit may wait for.
const WANTED_AT_ONCE: usize = 8;

/// Times that what a commit may wait for is looked for at once. After that it is as the others are.
const ATTEMPTS: u32 = 8;

/// Pause after the first of them; it grows by as much each time.
const PAUSE: Duration = Duration::from_millis(20);

/// Rounds between looks at timelines of a compute that seem to be complete.
const FULL_LOOK: u64 = 10;

pub async fn run(background: Background, busy: Busy) {
    tokio::join!(in_rounds(&background, &busy), as_wanted(&background, &busy));
}

/// The timelines that somebody is at. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<Mutex<HashSet<TimelineKey>>>);

/// Nobody else is at it, until this is dropped.
#[derive(Debug)]
pub struct Turn(Busy, TimelineKey);

impl Busy {
    /// `None` while somebody else is at it.
    pub fn begin(&self, key: TimelineKey) -> Option<Turn> {
        self.0.lock().insert(key).then(|| Turn(self.clone(), key))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

fn key(timeline: &Timeline) -> TimelineKey {
    (timeline.parameters().tenant, timeline.parameters().timeline)
}

async fn in_rounds(background: &Background, busy: &Busy) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    // Where each timeline's log ended in the last round: as many as there are open timelines.
    let mut ended: HashMap<TimelineKey, Lsn> = HashMap::new();
    for round in 0u64.. {
        interval.tick().await;
        let open = background.timelines.open_keys();
        ended.retain(|key, _| open.binary_search(key).is_ok());
        for key in open {
            let Some(timeline) = background.timelines.get_open(key) else { continue };
            let flush_lsn = timeline.flush_lsn();
            let is_fed = ended.insert(key, flush_lsn) != Some(flush_lsn);
            if timeline.is_left() || !may_lag(background, &timeline, round, is_fed) {
                continue;
            }
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            if let Some(turn) = busy.begin(key) {
                let background = background.clone();
                tokio::spawn(async move { catch_up(&background, timeline, (turn, place)).await });
            }
        }
    }
}

async fn as_wanted(background: &Background, busy: &Busy) {
    let places = Arc::new(Semaphore::new(WANTED_AT_ONCE));
    loop {
        let key = background.timelines.wanted().next().await;
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (background, busy) = (background.clone(), busy.clone());
        tokio::spawn(async move {
            // It may be gone, or damaged, since it was wanted.
            let Ok(timeline) = background.timelines.get_async(key).await else { return };
            let place = Arc::new(place);
            for attempt in 1..=ATTEMPTS {
                if let Some(turn) = busy.begin(key) {
                    let held = (turn, Arc::clone(&place));
                    catch_up(&background, Arc::clone(&timeline), held).await;
                }
                if !timeline.lacks_beginning() {
                    break;
                }
                tokio::time::sleep(PAUSE * attempt).await;
            }
        });
    }
}

/// Asks all members, and gets what is missing here. For a thread that may wait, and that has the timeline's turn.
pub fn pull(background: &Background, timeline: &Arc<Timeline>, handle: &Handle) {
    let id = timeline.parameters().timeline;
    if let Err(error) = pulling::catch_up(background, timeline, handle) {
        let space = &background.timelines.context().shared.space;
        match error.downcast_ref().is_some_and(|error| space.note(error)) {
            true => tracing::debug!(timeline = %id, %error, "catching up waits"),
            false => tracing::info!(timeline = %id, %error, "catching up will be tried again"),
        }
    }
}

/// What is `held` is given back at the end.
async fn catch_up<T: Send + 'static>(background: &Background, timeline: Arc<Timeline>, held: T) {
    let (background, handle) = (background.clone(), Handle::current());
    let caught_up = tokio::task::spawn_blocking(move || {
        let _held = held;
        pull(&background, &timeline, &handle);
    });
    // A panic there is reported by the runtime; the next round tries again.
    let _ = caught_up.await;
}

/// True if others may have more, or know more to be committed. `is_fed`: its log has grown since the last look.
fn may_lag(background: &Background, timeline: &Timeline, round: u64, is_fed: bool) -> bool {
    let key = key(timeline);
    let committed = background.known.highest(key, |progress| progress.commit_lsn);
    if timeline.has_proposer() {
        let is_behind = committed > timeline.flush_lsn()
            || timeline.lacks_beginning()
            || round.is_multiple_of(FULL_LOOK);
        return is_behind && !is_fed;
    }
    let unproven = timeline.flush_lsn() > timeline.commit_lsn();
    // While it is made a member, or another one is, no compute may have reached it yet.
    let changes = !timeline.configuration().incoming().is_empty();
    // Where nothing of that is so it is looked at in its turn, as those at rest are: `waking.rs`.
    unproven || changes || committed > timeline.commit_lsn()
}
