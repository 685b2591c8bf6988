//! Archiving, by the shipped turns, each of which waits for object storage now and then; others go on meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::NodeId;
use pgstrata_safekeeper::background::archiving::turn::{Around, GivenUpRead, State, advance};
use pgstrata_safekeeper::chain_reader::Ancestors;
use pgstrata_safekeeper::checked_segment::Trouble;
use pgstrata_safekeeper::timeline::Timeline;
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_wire::broker::TimelineProgress;

use crate::ancestor::Before;
use crate::objects::{Step, Task};

use super::*;

mod lying;

/// A second of those who archive takes 5 ms here.
const TIMES_FASTER: u64 = 200;

/// Rounds in which all is archived once nobody writes, and how long one takes.
const MOST_ROUNDS: usize = 100;
const LONG: Time = 200_000;

/// What a safekeeper archives in.
#[derive(Debug)]
pub(super) struct Here {
    own: NodeId,
    begun: Instant,
    now: AtomicU64,
    tail_after: Duration,
    /// What it has heard of others, some of it long ago.
    heard: Mutex<BTreeMap<NodeId, TimelineProgress>>,
    before: Arc<Before>,
    /// Who was given up, as it stands where that is decided.
    given_up: Mutex<AllGivenUp>,
}

impl Here {
    pub(super) fn new(own: NodeId, tail_after: Time, before: Option<Arc<Timeline>>) -> Here {
        Here {
            own,
            begun: Instant::now(),
            now: AtomicU64::new(0),
            tail_after: Duration::from_micros(tail_after * TIMES_FASTER),
            heard: Mutex::default(),
            before: Arc::new(Before(before)),
            given_up: Mutex::default(),
        }
    }

    /// What is before the timeline.
    pub(super) fn before(&self) -> Arc<dyn Ancestors> {
        Arc::clone(&self.before) as _
    }

    pub(super) fn give_up(&self, all: AllGivenUp) {
        *self.given_up.lock() = all;
    }
}

impl Around for Here {
    fn own(&self) -> NodeId {
        self.own
    }

    fn now(&self) -> Instant {
        self.begun + Duration::from_micros(self.now.load(Ordering::Relaxed) * TIMES_FASTER)
    }

    fn tail_after(&self) -> Duration {
        self.tail_after
    }

    fn progress(&self, node: NodeId, _: TimelineKey) -> Option<TimelineProgress> {
        self.heard.lock().get(&node).cloned()
    }

    fn claimed(&self, _: TimelineKey) -> Lsn {
        let heard = self.heard.lock();
        heard.values().map(|progress| progress.archived_lsn).max().unwrap_or_default()
    }

    fn ancestors(&self) -> Arc<dyn Ancestors> {
        self.before()
    }

    fn given_up(&self, _: TimelineKey) -> GivenUpRead {
        Box::pin(std::future::ready(Ok(self.given_up.lock().clone())))
    }
}

/// What a safekeeper knows between its turns, and of which opening of its timeline.
#[derive(Debug)]
pub(super) struct Between {
    timeline: Weak<Timeline>,
    state: State,
}

/// What a turn came to.
type Advanced = (State, Result<bool, Trouble>);

/// A turn that waits for object storage.
pub(super) struct Turn {
    node: usize,
    timeline: Arc<Timeline>,
    task: Task<Advanced>,
    /// A request is on its way.
    asks: bool,
    /// Whoever took it has ended. What it has sent still gets there.
    is_orphan: bool,
}

impl Turn {
    /// Whether a safekeeper that is up takes it.
    pub(super) fn is_of(&self, node: usize) -> bool {
        self.node == node && !self.is_orphan
    }
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn").field("node", &self.node).finish_non_exhaustive()
    }
}

fn progress_of(timeline: &Timeline) -> TimelineProgress {
    let (marks, parameters) = (timeline.marks(), timeline.parameters());
    TimelineProgress {
        tenant_id: parameters.tenant,
        timeline_id: parameters.timeline,
        term: timeline.term().0,
        flush_lsn: timeline.flush_lsn(),
        commit_lsn: timeline.commit_lsn(),
        archived_lsn: marks.archived_lsn,
        remote_consistent_lsn: marks.remote_consistent_lsn,
    }
}

impl World {
    /// What surrounds a safekeeper's next turn, and what it knows since its last one, with a look at what is due now.
    fn look_at(&mut self, index: usize, timeline: &Arc<Timeline>) -> (Arc<Here>, State) {
        let here = Arc::clone(&self.here[index]);
        here.now.store(self.now, Ordering::Relaxed);
        let between = self.between[index].take();
        // It is another one if it was opened anew.
        let known = between
            .filter(|between| std::ptr::eq(between.timeline.as_ptr(), Arc::as_ptr(timeline)));
        let mut state = known.map_or_else(|| State::new(here.now()), |between| between.state);
        state.look(timeline, here.as_ref());
        (here, state)
    }

    /// Stores what is due, and removes segments that nobody needs.
    pub(super) fn archive(&mut self, index: usize) -> Checked {
        self.hear_of_others(index);
        if self.turns.values().any(|turn| turn.is_of(index)) {
            return Ok(());
        }
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(()) };
        let (here, mut state) = self.look_at(index, &timeline);
        if state.due().is_none() || !state.is_due(here.now()) {
            self.between[index] = Some(Between { timeline: Arc::downgrade(&timeline), state });
            return self.trim(index, &timeline);
        }
        let (archive, own) = (Arc::clone(&self.objects.archive), Arc::clone(&timeline));
        let lie = self.lie.map(|lie| (lie, self.objects.raw()));
        let task = Box::pin(async move {
            let advanced = match lie {
                Some((lie, raw)) => {
                    lying::advance(lie, &raw, here.as_ref(), &archive, &own, &mut state).await
                }
                None => advance(here.as_ref(), &archive, &own, &mut state).await,
            };
            (state, advanced)
        });
        let turn = Turn { node: index, timeline, task, asks: false, is_orphan: false };
        let number = self.sequence;
        self.turns.insert(number, turn);
        self.go_on_archiving(number)
    }

    /// A turn goes on until it waits again.
    pub(super) fn go_on_archiving(&mut self, number: u64) -> Checked {
        let Some(mut turn) = self.turns.remove(&number) else { return Ok(()) };
        let index = turn.node;
        self.here[index].now.store(self.now, Ordering::Relaxed);
        let step = self.objects.step(&mut turn.task);
        self.check_objects()?;
        match step {
            Step::IsAnswered if turn.is_orphan => Ok(()),
            Step::Asks | Step::IsAnswered => {
                turn.asks = matches!(step, Step::Asks);
                self.turns.insert(number, turn);
                let slow = self.slow_until[index] > self.now || self.archiving.one_in(20);
                let delay = self.archiving.between(50, if slow { 20_000 } else { 500 });
                self.after(delay, Event::Archive(number));
                Ok(())
            }
            Step::Done(_) if turn.is_orphan => Ok(()),
            Step::Done(advanced) => self.end_turn(index, turn.timeline, advanced),
        }
    }

    fn end_turn(&mut self, index: usize, timeline: Arc<Timeline>, advanced: Advanced) -> Checked {
        let (mut state, advanced) = advanced;
        let name = self.nodes[index].name.clone();
        if let Err(trouble) = &advanced {
            self.log(|| format!("{name} can't archive: {trouble}"));
            // What is of who was given up is replaced, once that can be found out.
            if trouble.text.contains("differs") && self.quorum.given_up.is_empty() {
                return Err(format!("{name}: {trouble}"));
            }
        }
        state.note(&timeline, advanced.map(|_| ()), self.here[index].now());
        let archived_lsn = timeline.marks().archived_lsn;
        self.log(|| format!("{name} has seen all archived up to {archived_lsn}"));
        self.between[index] = Some(Between { timeline: Arc::downgrade(&timeline), state });
        self.trim(index, &timeline)?;
        self.settle(index)
    }

    fn trim(&mut self, index: usize, timeline: &Timeline) -> Checked {
        let start = self.parameters.start_lsn;
        let commit_lsn = timeline.commit_lsn();
        let consistent = commit_lsn.0 - self.rng.below(40_000).min(commit_lsn.0 - start.0);
        timeline.note_consistent(Lsn(consistent));
        let trimmed = timeline.trim();
        if let Ok(count @ 1..) = trimmed {
            self.outcome.trimmed += count;
            self.log(|| format!("safekeeper {} removes {count} segments", index + 1));
        }
        self.check_archived(index, timeline)
    }

    /// Where nobody writes any more and nothing goes wrong, all that is committed comes into the archive, and every member has
    /// seen that.
    pub(super) fn archive_all(&mut self) -> Checked {
        self.turns.clear();
        let members = self.quorum.chain.newest().members().to_vec();
        let members: Vec<usize> =
            members.iter().map(|member| self.node_of(member.node.0)).collect();
        let first = self.parameters.start_lsn.segment_number(SEGMENT_SIZE);
        let has_first = |&index: &usize| {
            let timeline = self.nodes[index].timeline();
            let end = Lsn((first + 1) * SEGMENT_SIZE);
            let has_it =
                |timeline: Arc<Timeline>| !timeline.is_left() && timeline.commit_lsn() >= end;
            let has_it = timeline.is_some_and(has_it);
            has_it && self.here[index].before.0.is_some()
        };
        if !self.objects.has_segment(first) && !members.iter().any(has_first) {
            // What the branch begins with is on none of them that has the rest.
            return Ok(());
        }
        for _ in 0..MOST_ROUNDS {
            self.now += LONG;
            let mut is_done = true;
            for &index in &members {
                is_done &= self.archive_now(index)?;
            }
            if is_done {
                return self.objects.check_all(&self.truth);
            }
        }
        let names: Vec<&str> =
            members.iter().map(|&index| self.nodes[index].name.as_str()).collect();
        Err(format!("what is committed is not archived by {names:?}, although all is well"))
    }

    /// A turn without pauses. Whether there is nothing more to do.
    fn archive_now(&mut self, index: usize) -> Checked<bool> {
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(false) };
        if timeline.is_left() {
            // It has not heard yet that it is a member again.
            return Ok(true);
        }
        for peer in (0..self.nodes.len()).filter(|&peer| peer != index) {
            if let Some(other) = self.nodes[peer].timeline() {
                let said = progress_of(&other);
                self.here[index].heard.lock().insert(self.nodes[peer].member.node, said);
            }
        }
        let (here, mut state) = self.look_at(index, &timeline);
        if state.due().is_some() && state.is_due(here.now()) {
            let archive = Arc::clone(&self.objects.archive);
            let turn = advance(here.as_ref(), &archive, &timeline, &mut state);
            let advanced = self.objects.wait(turn);
            if let Err(trouble) = &advanced {
                self.log(|| format!("safekeeper {} can't archive: {trouble}", index + 1));
            }
            state.note(&timeline, advanced.map(|_| ()), here.now());
            self.check_objects()?;
            self.check_archived(index, &timeline)?;
        }
        let start = timeline.parameters().start_lsn;
        let is_done = timeline.marks().archived_lsn >= timeline.commit_lsn()
            || timeline.commit_lsn() == start;
        self.between[index] = Some(Between { timeline: Arc::downgrade(&timeline), state });
        Ok(is_done)
    }

    /// What it counts as archived is, and so is what it has removed.
    pub(super) fn check_archived(&self, index: usize, timeline: &Timeline) -> Checked {
        if self.truth.has_given_up(timeline.configuration_number()) || timeline.is_retired() {
            return Ok(());
        }
        let marks = timeline.marks();
        for (lsn, does) in
            [(marks.available_lsn, "has removed"), (marks.archived_lsn, "counts as archived")]
        {
            if !self.objects.has_all_before(lsn) {
                let name = &self.nodes[index].name;
                return Err(format!(
                    "{name} {does} what is before {lsn}, and that is not archived"
                ));
            }
        }
        Ok(())
    }

    /// What was written is right; and what is decided by now is taken note of.
    pub(super) fn check_objects(&mut self) -> Checked {
        let Some(decided) = self.objects.check(&self.truth)? else { return Ok(()) };
        match self.is_founded {
            false => self.outcome.founded += 1,
            true => self.outcome.changes += 1,
        }
        if decided.given_up != self.quorum.given_up {
            self.give_up(&decided)?;
        }
        let newest = decided.chain.newest();
        self.log(|| format!("it is decided: {newest:?}"));
        self.is_founded = true;
        self.quorum = decided;
        Ok(())
    }

    /// What the broker has told it of others by now.
    fn hear_of_others(&mut self, index: usize) {
        for peer in 0..self.nodes.len() {
            let is_heard = peer != index && !self.is_cut_between(peer, index);
            if is_heard
                && let Some(timeline) = self.nodes[peer].timeline()
                && self.archiving.one_in(2)
            {
                let said = progress_of(&timeline);
                self.here[index].heard.lock().insert(self.nodes[peer].member.node, said);
            }
        }
    }

    /// The process that took them is gone. A request that is on its way may get there all the same.
    pub(super) fn leave_turns(&mut self, index: usize) {
        self.between[index] = None;
        let rng = &mut self.archiving;
        self.turns.retain(|_, turn| {
            if turn.is_of(index) {
                turn.is_orphan = true;
                return turn.asks && rng.one_in(2);
            }
            true
        });
    }
}
