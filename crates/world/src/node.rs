//! One safekeeper: what ships of it on a simulated disk, and what it may never go back on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use pgstrata_env::Disk;
use pgstrata_format::registration::Registration;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{
    Incarnation, Lsn, Member, NodeId, SMALLEST_SIMULATED, Term, TimelineParameters,
};
use pgstrata_quorum::{ProposerId, TermHistory};
use pgstrata_safekeeper::archive::Archive;
use pgstrata_safekeeper::background::mending::{Damaged, attempt};
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::identity;
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::mend::Sources;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::{Preparations, Preparer};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{AWAY, OpenContext, Timeline};
use pgstrata_safekeeper::timelines::{TimelineKey, Timelines, TimelinesContext};
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::RefusedReason;

use crate::lies::{Lie, LyingDisk};
use crate::truth::{Checked, Truth};

const DIRECTORY: &str = "/safekeeper";

/// Said of what is kept for people to look at.
const LEFT_BEHIND: &str = "went on without this safekeeper";

/// What became of a timeline that was at rest.
#[derive(Debug)]
pub enum Woken {
    /// It is open, or found to be damaged.
    IsOpen,
    /// The same, with WAL from object storage.
    IsBack,
    /// It rests on.
    NotYet(String),
}

/// What it said, durably: after a crash it has to have it.
#[derive(Clone, Debug, Default)]
struct Promised {
    term: Term,
    voted_for: Option<ProposerId>,
    configuration: u64,
    flush_lsn: Lsn,
    history: TermHistory,
}

/// What an operation that was cut short may have left otherwise.
#[derive(Clone, Debug)]
struct Underway {
    /// How much of the log may be gone.
    floor: Lsn,
    /// Whose the log may be by now.
    history: TermHistory,
}

/// Where every safekeeper finds the others, and what is archived.
#[derive(Clone, Debug)]
pub struct Outside {
    pub key: TimelineKey,
    pub decisions: Decisions,
    pub archive: Arc<Archive>,
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub member: Member,
    pub disk: SimDisk,
    lie: Option<Lie>,
    outside: Outside,
    /// The timeline's.
    directory: PathBuf,
    /// How often it was started.
    pub life: u64,
    pub is_up: bool,
    /// The power, or the process, ends in the middle of something.
    pub is_doomed: bool,
    pub loses_power: bool,
    pub back_after: u64,
    /// It never comes back.
    pub is_retired: bool,
    /// It has said in object storage who it is.
    pub is_registered: bool,
    timelines: Option<Arc<Timelines>>,
    preparations: Option<Preparations>,
    latch: Latch,
    /// Whether anybody may have been told that it has the timeline.
    is_known: bool,
    /// As it was opened last, and looked at.
    seen: Weak<Timeline>,
    promised: Promised,
    underway: Option<Underway>,
    /// Others keep the timeline, for all that it may know: its files may go.
    may_go: bool,
    /// Served bytes up to here were compared.
    compared: Lsn,
    /// Something of its log has rotted, and was not mended yet.
    pub is_rotten: bool,
    /// Its WAL was in object storage only when it was looked at last.
    was_away: bool,
    /// How often it was fetched since it was asked last.
    fetched: u64,
}

/// With what is there before: the safekeeper's own directory.
fn empty_disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    let made = disk.create_directory(Path::new(DIRECTORY));
    made.and_then(|()| disk.sync_directory(Path::new("/"))).expect("an empty disk that is well");
    disk
}

/// Of a disk that is full, or fails: then a start ends early, and is tried again.
fn is_of_the_disk(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<StorageError>() {
        Some(StorageError::DiskFull { .. } | StorageError::Failed { .. }) => true,
        Some(_) => false,
        None => cause.is::<std::io::Error>(),
    })
}

impl Node {
    pub fn new(index: usize, seed: u64, lie: Option<Lie>, outside: Outside) -> Node {
        let number = index as u8 + 1;
        let disk = empty_disk(seed);
        let (tenant, timeline) = outside.key;
        let directory = Path::new(DIRECTORY).join(tenant.to_string()).join(timeline.to_string());
        let member = Member { node: NodeId(number.into()), incarnation: Incarnation([number; 16]) };
        Node {
            name: format!("safekeeper {number}"),
            member,
            disk,
            lie,
            outside,
            directory,
            life: 0,
            is_up: false,
            is_doomed: false,
            loses_power: false,
            back_after: 0,
            is_retired: false,
            is_registered: false,
            timelines: None,
            preparations: None,
            latch: Latch::default(),
            is_known: false,
            seen: Weak::new(),
            promised: Promised::default(),
            underway: None,
            may_go: false,
            compared: Lsn::INVALID,
            is_rotten: false,
            was_away: false,
            fetched: 0,
        }
    }

    /// Its directory is lost, and it comes back with another one.
    pub fn wipe(&mut self, seed: u64) {
        self.disk = empty_disk(seed);
        if self.lie != Some(Lie::WipedComesBack) {
            let [first, lives, ..] = self.member.incarnation.0;
            self.member.incarnation.0 = [first; 16];
            self.member.incarnation.0[1] = lives.wrapping_add(1);
        }
        self.forget();
    }

    /// It never had the timeline.
    fn forget(&mut self) {
        self.is_known = false;
        self.promised = Promised::default();
        self.underway = None;
        self.may_go = false;
        self.compared = Lsn::INVALID;
        self.is_rotten = false;
    }

    /// What it has, while its process runs.
    pub fn timelines(&self) -> Option<&Arc<Timelines>> {
        self.timelines.as_ref()
    }

    /// The timeline, if it is open.
    pub fn timeline(&self) -> Option<Arc<Timeline>> {
        self.timelines.as_ref()?.get_open(self.outside.key)
    }

    /// Nothing has happened with its timeline, which is not open; whoever needs it opens it.
    pub fn is_resting(&self) -> bool {
        self.timelines.as_ref().is_some_and(|timelines| !timelines.resting().is_empty())
    }

    /// Its log is damaged, or could not be opened, and it takes no part until that is over.
    pub fn is_mending(&self) -> bool {
        self.timelines.as_ref().is_some_and(|timelines| !timelines.mending().is_empty())
    }

    /// Members went on without it, which may have what they lack: it is of no use until it has an empty directory.
    pub fn is_left_behind(&self) -> bool {
        let damaged = self.timelines.as_ref().and_then(|timelines| timelines.damaged().pop());
        damaged.is_some_and(|(_, why)| why.contains(LEFT_BEHIND))
            || self.timeline().is_some_and(|timeline| timeline.is_kept().unwrap_or(false))
    }

    /// It could not be opened, and nothing of it is known to be wrong.
    pub fn is_unopened(&self) -> bool {
        let key = self.outside.key;
        self.timelines.as_ref().is_some_and(|timelines| timelines.is_unopened(key))
    }

    fn disk(&self) -> Arc<dyn Disk> {
        match self.lie {
            Some(lie) => Arc::new(LyingDisk::new(self.disk.clone(), lie)),
            None => Arc::new(self.disk.clone()),
        }
    }

    /// As `run` does it.
    fn open(&mut self) -> anyhow::Result<Timelines> {
        let disk = self.disk();
        let directory = Path::new(DIRECTORY);
        let Member { node, incarnation } = self.member;
        let own = identity::load_or_create(disk.as_ref(), directory, Some(node), || incarnation)?;
        self.latch = Latch::default();
        let (preparer, preparations) = Preparer::queue(self.latch.clone());
        self.preparations = Some(preparations);
        let shared = OpenContext {
            own: own.member,
            preparer,
            latch: self.latch.clone(),
            space: DiskSpace::new(Arc::clone(&disk), directory, DiskArguments::default()),
            disk,
            meters: Meters::new()?,
        };
        let context = TimelinesContext {
            shared,
            decisions: self.outside.decisions.clone(),
            archive: Some(Arc::clone(&self.outside.archive)),
            met: Arc::default(),
            has_list: own.has_list,
            smallest_segment: SMALLEST_SIMULATED,
        };
        Ok(Timelines::open(context, directory)?)
    }

    /// Whether it can't go on as it is: the process ends then.
    pub fn is_finished(&self) -> bool {
        self.disk.has_stopped() || self.latch.reason().is_some()
    }

    pub fn latch_reason(&self) -> Option<String> {
        self.latch.reason()
    }

    /// Makes segments that were asked for.
    pub fn prepare(&mut self) -> bool {
        self.preparations.as_ref().is_some_and(Preparations::step)
    }

    /// An operation that may change the log begins: up to where the own one lasts whatever comes, and what may be the
    /// history then.
    pub fn begin(&mut self, history: &TermHistory, end: Lsn) {
        let Some(timeline) = self.timeline() else { return };
        let own = &self.promised;
        let shared = own.history.divergence(own.flush_lsn, history, end, timeline.commit_lsn());
        self.underway =
            Some(Underway { floor: shared.min(own.flush_lsn), history: history.clone() });
    }

    /// It ended while it was mended, and nobody depends on what it had.
    pub fn may_be_cut(&mut self) {
        let history = self.promised.history.clone();
        self.underway = Some(Underway { floor: Lsn::INVALID, history });
    }

    /// Something is done, and answered: what it says by now is promised.
    pub fn promise(&mut self, voted_for: Option<ProposerId>) {
        let Some(timeline) = self.timeline() else { return };
        let Ok((holding, configuration)) = timeline.holding() else { return };
        let term = timeline.term();
        let voted_for = match term > self.promised.term {
            true => voted_for,
            false => voted_for.or(self.promised.voted_for),
        };
        self.promised = Promised {
            term,
            voted_for,
            configuration: configuration.number(),
            flush_lsn: holding.flush_lsn,
            history: holding.history,
        };
        self.underway = None;
        self.may_go = timeline.is_left();
    }

    /// The process is gone, and what it had not made durable, as far as that is how it ends.
    pub fn end(&mut self, loses_power: bool) {
        self.timelines = None;
        self.preparations = None;
        match loses_power {
            true => self.disk.lose_power(),
            false => self.disk.end_process(),
        }
        self.is_up = false;
        self.is_doomed = false;
        self.life += 1;
    }

    /// Starts again, and looks at what it has.
    pub fn start(&mut self, truth: &mut Truth) -> Checked {
        self.is_up = true;
        self.is_registered = false;
        let names = self.disk.list(&self.directory).unwrap_or_default();
        if self.is_known && !self.may_go && !names.iter().any(|name| name == "control") {
            return Err(format!("{} has lost the timeline: {names:?}", self.name));
        }
        // It may have heard of that, and not have said so.
        self.may_go |= self.control().is_ok_and(|control| {
            let configuration = &control.state.configuration;
            configuration.is_known() && !configuration.contains(self.member)
        });
        match self.open() {
            Ok(timelines) => self.timelines = Some(Arc::new(timelines)),
            Err(error) if is_of_the_disk(&error) || self.disk.has_stopped() => {
                self.latch.throw("it can't be started now");
                return Ok(());
            }
            Err(error) => return Err(format!("{} can't be started: {error:#}", self.name)),
        }
        self.look(truth)
    }

    /// How often its WAL was fetched from object storage since the last call.
    pub fn take_fetched(&mut self) -> u64 {
        std::mem::take(&mut self.fetched)
    }

    /// What it says in object storage of itself.
    pub fn registration(&self) -> Registration {
        let number = self.member.node;
        Registration {
            member: self.member,
            zone: String::new(),
            wal: format!("safekeeper-{number}:5454"),
            http: format!("safekeeper-{number}:7676"),
        }
    }

    /// Looks at what has become of its timeline: one that was opened has what was promised of it.
    pub fn look(&mut self, truth: &mut Truth) -> Checked {
        let Some(timelines) = self.timelines.clone().filter(|_| !self.is_finished()) else {
            return Ok(());
        };
        let Some(timeline) = timelines.get_open(self.outside.key) else {
            self.was_away = timelines.is_away(self.outside.key);
            return self.look_at_unopened(&timelines);
        };
        self.fetched += u64::from(std::mem::take(&mut self.was_away));
        if !std::ptr::eq(self.seen.as_ptr(), Arc::as_ptr(&timeline)) {
            self.seen = Arc::downgrade(&timeline);
            self.look_at_opened(&timeline)?;
        }
        if !truth.has_given_up(timeline.configuration_number()) {
            truth.returned(&timeline.history(), timeline.commit_lsn())?;
        }
        self.check(truth)
    }

    fn look_at_opened(&mut self, timeline: &Timeline) -> Checked {
        if !self.is_known {
            // Just created; or before, and nobody was told.
            self.is_known = true;
            self.compared = timeline.marks().available_lsn;
            self.promise(None);
            return Ok(());
        }
        self.check_promises(timeline)?;
        let voted_for = self.promised.voted_for.filter(|_| timeline.term() == self.promised.term);
        self.promise(voted_for);
        self.compared = timeline.marks().available_lsn;
        Ok(())
    }

    fn look_at_unopened(&mut self, timelines: &Timelines) -> Checked {
        let key = self.outside.key;
        if let Some((_, why)) = timelines.damaged().pop() {
            let is_kept = why.contains(LEFT_BEHIND);
            let is_passing = timelines.is_unopened(key);
            return match self.is_rotten || is_passing || is_kept {
                true => Ok(()),
                false => {
                    Err(format!("{} refuses what it has, and nothing rotted: {why}", self.name))
                }
            };
        }
        if self.is_known && timelines.keys().is_empty() {
            if !self.may_go {
                return Err(format!("{} has let go of the timeline", self.name));
            }
            self.forget();
        }
        Ok(())
    }

    /// Lets it come to rest if nothing is to be done with it, and nobody has it.
    pub fn let_rest(&mut self) -> bool {
        let Some(timelines) = self.timelines.clone() else { return false };
        if self.lie == Some(Lie::AwayBeforeArchived)
            && let Some(timeline) = self.timeline().filter(|timeline| !timeline.has_compute())
        {
            // By mistake.
            timeline.note_archived(timeline.commit_lsn());
            let _ = timeline.checkpoint();
        }
        timelines.let_rest(&[self.outside.key]).is_ok_and(|count| count > 0)
    }

    /// Has its WAL be in object storage only. True if it is.
    pub fn send_away(&mut self) -> bool {
        let Some(timelines) = &self.timelines else { return false };
        timelines.send_away(&[self.outside.key]).is_ok_and(|count| count > 0)
    }

    /// Somebody needs it: it is opened, with what is in object storage. It rests on if that can't be had now.
    pub fn wake(&mut self) -> Woken {
        let Some(timelines) = &self.timelines else { return Woken::NotYet("it is down".into()) };
        let was_away = timelines.is_away(self.outside.key);
        match timelines.get(self.outside.key) {
            Ok(_) if was_away => Woken::IsBack,
            Ok(_) => Woken::IsOpen,
            Err(reason) => Woken::NotYet(reason.to_string()),
        }
    }

    /// Looks where it is decided who the members are, and takes what stands there.
    pub fn learn(&mut self) -> Result<(), RefusedReason> {
        let (Some(timelines), Some(timeline)) = (&self.timelines, self.timeline()) else {
            return Err(RefusedReason::UnknownTimeline);
        };
        timelines.learn(&timeline)?;
        self.promise(None);
        Ok(())
    }

    fn check_promises(&self, timeline: &Timeline) -> Checked {
        let (name, before) = (&self.name, &self.promised);
        let control = self.control()?;
        let term = timeline.term();
        if term < before.term {
            return Err(format!("{name} promised term {}, and is back at {term}", before.term));
        }
        if term == before.term
            && before.voted_for.is_some()
            && control.state.voted_for != before.voted_for
        {
            return Err(format!("{name} forgot whom it voted for in term {term}"));
        }
        if timeline.configuration_number() < before.configuration {
            return Err(format!("{name} forgot configuration {}", before.configuration));
        }
        let flush_lsn = timeline.flush_lsn();
        let floor = self.underway.as_ref().map_or(before.flush_lsn, |underway| underway.floor);
        if flush_lsn < floor.min(before.flush_lsn) {
            return Err(format!("{name} acknowledged {floor}, and its log ends at {flush_lsn}"));
        }
        let history = timeline.history();
        let is_new = |underway: &Underway| underway.history == history;
        if history != before.history && !self.underway.as_ref().is_some_and(is_new) {
            return Err(format!(
                "{name} had the history {:?}, and has {history:?}",
                before.history
            ));
        }
        Ok(())
    }

    fn control(&self) -> Checked<TimelineControl> {
        let bytes = self.disk.read_all(&self.directory.join("control"));
        let bytes = bytes.map_err(|error| format!("{}: {error}", self.name))?;
        TimelineControl::decode(&bytes, self.member.node)
            .map_err(|error| format!("the control file of {}: {error}", self.name))
    }

    /// What it serves as committed is that, as far as it was not looked at before.
    fn check(&mut self, truth: &Truth) -> Checked {
        let Some(timeline) = self.timeline() else { return Ok(()) };
        let available_lsn = timeline.marks().available_lsn;
        let commit_lsn = timeline.commit_lsn();
        let from = self.compared.max(available_lsn);
        // A failed write leaves positions that nobody is told of.
        let is_given_up = truth.has_given_up(timeline.configuration_number());
        if from >= commit_lsn || self.is_finished() || is_given_up {
            return Ok(());
        }
        self.compare(&timeline, from, commit_lsn, truth)?;
        self.compared = commit_lsn;
        Ok(())
    }

    /// All that it has.
    pub fn check_all(&mut self, truth: &Truth) -> Checked {
        self.compared = Lsn::INVALID;
        self.check(truth)
    }

    fn compare(&self, timeline: &Timeline, from: Lsn, to: Lsn, truth: &Truth) -> Checked {
        if self.is_rotten {
            return self.compare_checked(timeline, from, to, truth);
        }
        let mut reader = timeline.reader();
        let mut at = from;
        let mut buffer = vec![0; (to - from).min(64 << 10) as usize];
        while at < to {
            let want = buffer.len().min((to - at) as usize);
            let count = reader.read(at, &mut buffer[..want]);
            let count = count.map_err(|error| format!("{}: {error}", self.name))?;
            if count == 0 {
                return Err(format!("{} lacks {at}, which it says it has", self.name));
            }
            truth.check_served(&self.name, at, &buffer[..count])?;
            at = at + count as u64;
        }
        Ok(())
    }

    /// What is handed out of a rotten log is right, or is not handed out.
    fn compare_checked(&self, timeline: &Timeline, from: Lsn, to: Lsn, truth: &Truth) -> Checked {
        let mut at = from;
        let mut buffer = vec![0; (to - from).min(64 << 10) as usize];
        let Ok(mut reading) = timeline.read_range(from, to, Term(0)) else { return Ok(()) };
        while at < to {
            match reading.next(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    truth.check_served(&self.name, at, &buffer[..count])?;
                    at = at + count as u64;
                }
                // It is looked into in the background.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Whether none of its segments was removed but those that it has trimmed.
    pub fn has_all_segments(&self) -> bool {
        let names = self.disk.list(&self.directory).unwrap_or_default();
        !names.iter().any(|name| name == AWAY)
    }

    /// Where its log is durable for all that stands in its control file.
    pub fn noted(&self) -> Lsn {
        let control = self.control().map(|control| control.flush_lsn.max(control.state.commit_lsn));
        control.unwrap_or_default()
    }

    /// The file of one of its segments.
    pub fn segment_path(&self, timeline: &TimelineParameters, number: u64) -> PathBuf {
        self.directory.join(timeline.segment_name(number))
    }

    /// The log that it has for all that is known: which term wrote which of it, and where it ends.
    pub fn log(&self) -> (&TermHistory, Lsn) {
        (&self.promised.history, self.promised.flush_lsn)
    }

    /// End of what it acknowledged, and has for all that is known.
    pub fn acknowledged(&self) -> Lsn {
        self.promised.flush_lsn
    }

    /// One attempt to mend. Where the log was cut, if it was. `may_go`: others keep it by now.
    pub fn mend(
        &mut self,
        may_go: bool,
        ask: impl FnOnce(&Damaged<'_>) -> Sources,
    ) -> Result<Option<Lsn>, String> {
        let Some(timelines) = self.timelines.clone() else { return Err("it is down".into()) };
        let before = self.may_go;
        self.may_go |= may_go;
        let attempted = attempt(&timelines, self.outside.key, ask);
        if attempted.is_err() && !self.is_finished() {
            self.may_go = before;
        }
        let cut = attempted?;
        if self.is_finished() {
            return Err("it has ended meanwhile".into());
        }
        if let Some(cut) = cut {
            self.promised.flush_lsn = self.promised.flush_lsn.min(cut);
        }
        Ok(cut)
    }
}
