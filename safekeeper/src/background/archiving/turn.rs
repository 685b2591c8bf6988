//! One timeline's turn: what of it is to be archived next, whether that is this node's to do, and doing it. Who gives turns, and
//! what others have said, is not here.
//!
//! What others say is a hint where to look, never a reason to remove something: WAL counts
//! as archived on a node once that node has put it there, or has read it back and found it the
//! same as its own.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::{Lsn, NodeId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::broker::TimelineProgress;

use crate::archive::{Archive, Log, Tail};
use crate::chain_reader::{Ancestors, ChainReader};
use crate::checked_segment::{CheckedSegment, Reached, Trouble};
use crate::timeline::Timeline;
use crate::timelines::TimelineKey;

/// A member that finds something unarchived for this long takes the next turn: whoever is
/// before it can't.
const TURN: Duration = Duration::from_secs(15);

/// First and longest pause after an attempt that failed.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Segments of one timeline looked at before others have their turn.
const SEGMENTS_PER_TURN: usize = 4;

/// Who was given up, once that is read.
pub type GivenUpRead = Pin<Box<dyn Future<Output = Result<AllGivenUp, String>> + Send>>;

/// What a turn is taken in.
pub trait Around: Send + Sync {
    /// Who this node is.
    fn own(&self) -> NodeId;
    /// The time.
    fn now(&self) -> Instant;
    /// So long after the last that was committed of a timeline its tail is archived.
    fn tail_after(&self) -> Duration;
    /// How far a safekeeper is, as was heard of it last.
    fn progress(&self, node: NodeId, key: TimelineKey) -> Option<TimelineProgress>;
    /// How far a timeline is archived, by whoever said most.
    fn claimed(&self, key: TimelineKey) -> Lsn;
    /// Where the timelines are that it branched from.
    fn ancestors(&self) -> Arc<dyn Ancestors>;
    /// Reads which members of a timeline were given up, if any were.
    fn given_up(&self, key: TimelineKey) -> GivenUpRead;
}

/// What is to be archived next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The segment that ends there.
    Segment(Lsn),
    /// What there is of the last one, up to there.
    Tail(Lsn),
}

/// What is known of one timeline between rounds.
#[derive(Debug)]
pub struct State {
    reached: Reached,
    /// What is committed, and since when it is no more than that.
    commit_lsn: Lsn,
    quiet_since: Instant,
    /// What is archived, and since when it is no more than that although something is due.
    archived_lsn: Lsn,
    since: Instant,
    due: Option<Due>,
    retry_at: Instant,
    pause: Duration,
}

impl State {
    /// Of a timeline that nothing is known of.
    pub fn new(now: Instant) -> State {
        State {
            reached: Reached::default(),
            commit_lsn: Lsn::INVALID,
            quiet_since: now,
            archived_lsn: Lsn::INVALID,
            since: now,
            due: None,
            retry_at: now,
            pause: PAUSE.0,
        }
    }

    /// Finds what is to be archived next.
    pub fn look(&mut self, timeline: &Timeline, around: &dyn Around) {
        // In this order, so that what is archived is never more than what is committed.
        let archived_lsn = timeline.marks().archived_lsn;
        let commit_lsn = timeline.commit_lsn();
        if commit_lsn != self.commit_lsn {
            self.commit_lsn = commit_lsn;
            self.quiet_since = around.now();
        }
        let size = timeline.files().segment_size();
        let full = archived_lsn.segment_start(size).checked_add(size);
        self.due = match full.filter(|&full| full <= commit_lsn) {
            Some(full) => Some(Due::Segment(full)),
            None => {
                let has_tail = commit_lsn > archived_lsn.max(timeline.parameters().start_lsn);
                let quiet = around.now().saturating_duration_since(self.quiet_since);
                let is_quiet = quiet >= around.tail_after();
                (has_tail && is_quiet).then_some(Due::Tail(commit_lsn))
            }
        };
        if archived_lsn != self.archived_lsn || self.due.is_none() {
            self.archived_lsn = archived_lsn;
            self.since = around.now();
        }
    }

    /// What was found to be archived next.
    pub fn due(&self) -> Option<Due> {
        self.due
    }

    /// Whether it may be tried now.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.retry_at
    }

    /// What an attempt came to.
    pub fn note(&mut self, timeline: &Timeline, advanced: Result<(), Trouble>, now: Instant) {
        self.pause = match &advanced {
            Ok(()) => PAUSE.0,
            Err(_) => (self.pause * 2).min(PAUSE.1),
        };
        if let Err(error) = &advanced {
            self.retry_at = now + self.pause;
            let id = timeline.parameters().timeline;
            tracing::warn!(timeline = %id, %error, "WAL can't be archived; it will be tried again");
        }
        timeline.note_archiving(advanced.err());
    }
}

/// One member uploads: the first, in an order that differs from timeline to timeline, of those
/// that have what is next; after it each of the others, if nothing comes of it. Two that see
/// it differently do no harm.
fn is_uploader(
    around: &dyn Around,
    timeline: &Timeline,
    configuration: &Configuration,
    waited: Duration,
) -> bool {
    let own = around.own();
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let wanted = timeline.marks().archived_lsn;
    let has_it = |node: NodeId| {
        let progress = around.progress(node, key);
        progress.is_some_and(|progress| progress.commit_lsn > wanted)
    };
    let mut members: Vec<NodeId> =
        configuration.members().iter().map(|member| member.node).collect();
    let turn = usize::from(parameters.timeline.0[15]) % members.len().max(1);
    members.rotate_left(turn);
    let able = members.into_iter().filter(|&node| node == own || has_it(node));
    let before = able.take_while(|&node| node != own).count();
    waited >= TURN * before as u32
}

/// Moves on over WAL that is in the archive: because others say so and this node has seen
/// that it is true, or because it put it there. True if it went as far as it may in one turn.
pub async fn advance(
    around: &dyn Around,
    archive: &Arc<Archive>,
    timeline: &Arc<Timeline>,
    state: &mut State,
) -> Result<bool, Trouble> {
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    for _ in 0..SEGMENTS_PER_TURN {
        // Once, and before anything is read: WAL is never said to be of a later configuration than it is, least of all of one
        // that this node is no member of.
        let configuration = timeline.configuration();
        if configuration.is_known() && !configuration.contains(timeline.member()) {
            return Ok(false);
        }
        let Some(due) = state.due else { return Ok(false) };
        let (Due::Segment(to) | Due::Tail(to)) = due;
        let claimed = around.claimed(key) >= to;
        let waited = around.now().saturating_duration_since(state.since);
        let uploads = is_uploader(around, timeline, &configuration, waited);
        if !claimed && !uploads {
            return Ok(false);
        }
        let number = configuration.number();
        let turn = Turn { around, archive, timeline, configuration: number, claimed, uploads };
        let is_there = match due {
            Due::Segment(_) => turn.segment(state).await?,
            Due::Tail(to) => turn.tail(to).await?,
        };
        if !is_there {
            return Ok(false);
        }
        let had_tail = timeline.marks().archived_lsn > Tail::start(parameters, Lsn(to.0 - 1));
        timeline.note_archived_as(to, number);
        if uploads && !timeline.is_left() && (had_tail || due == Due::Tail(to)) {
            // What is left of them costs some space, and goes with the next one.
            if let Err(error) = archive.drop_tails(parameters, to, number).await {
                tracing::info!(timeline = %parameters.timeline, error, "an old tail could not be removed");
            }
        }
        state.look(timeline, around);
    }
    Ok(true)
}

/// One look at something that is due.
struct Turn<'a> {
    around: &'a dyn Around,
    archive: &'a Arc<Archive>,
    timeline: &'a Arc<Timeline>,
    /// Number of the newest configuration when the turn began.
    configuration: u64,
    /// Whether somebody says that it is archived.
    claimed: bool,
    /// Whether it is this node's to archive it.
    uploads: bool,
}

impl Turn<'_> {
    /// Whether the next full segment is archived by now.
    async fn segment(&self, state: &mut State) -> Result<bool, Trouble> {
        let (timeline, archive, parameters) =
            (self.timeline, self.archive, self.timeline.parameters());
        let number = timeline.marks().archived_lsn.segment_number(timeline.files().segment_size());
        let ancestors = self.around.ancestors();
        let mut reader =
            ChainReader::new(ancestors, Arc::clone(timeline), Some(Arc::clone(archive)));
        let (reached, commit_lsn) = (&mut state.reached, timeline.commit_lsn());
        let segment =
            CheckedSegment::read(&mut reader, parameters, number, commit_lsn, reached).await?;
        let stored = self.store(&segment).await;
        // What is there counts for others only if they believe it, however right it is.
        let replaced = match &stored {
            Ok(true) if self.is_of_before(Due::Segment(Lsn(number))).await? => {
                self.replaces_given_up(&segment).await?
            }
            // Where that can't be found out either, the first trouble is what is told.
            Err(_) if self.may_write() => self.replaces_given_up(&segment).await.unwrap_or(false),
            _ => false,
        };
        if replaced {
            let why = stored.err().unwrap_or_default();
            tracing::warn!(timeline = %parameters.timeline, number, why, "replaced: members were given up in it");
            return Ok(true);
        }
        Ok(stored?)
    }

    /// Whether the object of a segment, by its number, or of a tail, by its end, is of an earlier configuration. Of the first one
    /// there is none.
    async fn is_of_before(&self, object: Due) -> Result<bool, String> {
        let (archive, parameters) = (self.archive, self.timeline.parameters());
        let configuration = self.configuration;
        match object {
            _ if configuration <= 1 => Ok(false),
            Due::Segment(Lsn(number)) => {
                archive.is_of_before(parameters, number, configuration).await
            }
            Due::Tail(end) => archive.is_tail_of_before(parameters, end, configuration).await,
        }
    }

    /// Whether it is this node's to write anything, still.
    fn may_write(&self) -> bool {
        self.uploads && !self.timeline.is_left()
    }

    async fn store(&self, segment: &CheckedSegment) -> Result<bool, String> {
        let parameters = self.timeline.parameters();
        if self.claimed && self.archive.holds(parameters, segment).await? {
            return Ok(true);
        }
        if self.may_write() {
            self.archive.put(parameters, segment, &self.log()).await?;
        }
        Ok(self.may_write())
    }

    /// What is there may be of a log that was given up in the middle of a record, or of who was given up.
    async fn replaces_given_up(&self, segment: &CheckedSegment) -> Result<bool, String> {
        let parameters = self.timeline.parameters();
        let (given_up, log) = (self.given_up().await?, self.log());
        self.archive.replace_given_up(parameters, segment, &log, &given_up).await
    }

    async fn given_up(&self) -> Result<AllGivenUp, String> {
        let parameters = self.timeline.parameters();
        self.around.given_up((parameters.tenant, parameters.timeline)).await
    }

    fn log(&self) -> Log {
        Log { configuration: self.configuration, history: self.timeline.history() }
    }

    /// Whether the tail that ends at `end` is archived by now.
    async fn tail(&self, end: Lsn) -> Result<bool, Trouble> {
        let timeline = Arc::clone(self.timeline);
        let number = self.configuration;
        let tail = tokio::task::spawn_blocking(move || timeline.read_tail(end, number)).await;
        let tail = tail.map_err(|error| error.to_string())??;
        let stored = self.store_tail(&tail).await;
        let replaced = match &stored {
            Ok(true) if self.is_of_before(Due::Tail(end)).await? => {
                self.replaces_tail_given_up(&tail).await?
            }
            Err(_) if self.may_write() => self.replaces_tail_given_up(&tail).await.unwrap_or(false),
            _ => false,
        };
        if replaced { Ok(true) } else { Ok(stored?) }
    }

    async fn replaces_tail_given_up(&self, tail: &Tail) -> Result<bool, String> {
        let parameters = self.timeline.parameters();
        let given_up = self.given_up().await?;
        self.archive.replace_tail_given_up(parameters, tail, &given_up).await
    }

    async fn store_tail(&self, tail: &Tail) -> Result<bool, String> {
        let parameters = self.timeline.parameters();
        if self.claimed && self.archive.holds_tail(parameters, tail).await? {
            return Ok(true);
        }
        if self.may_write() {
            self.archive.put_tail(parameters, tail).await?;
        }
        Ok(self.may_write())
    }
}
