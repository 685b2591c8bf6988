//! One safekeeper: the shipped timeline on a simulated disk, and what it may never go back on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_env::{Disk, replace_file};
use pgstrata_format::quorum::{AllGivenUp, Quorum};
use pgstrata_format::resting::TimelineSummary;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{Chain, ProposerId, TermHistory};
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::mend::{DamagedLog, Fate, Lack, Sources, fate};
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::{Preparations, Preparer};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{AWAY, OpenContext, Timeline, read_control};
use pgstrata_safekeeper::timelines::away::{NotBack, bring_back, is_sent_away, send_away};
use pgstrata_sim::SimDisk;
use pgstrata_wire::safekeeper::RefusedReason;

use crate::lies::{Lie, LyingDisk};
use crate::objects::Objects;
use crate::truth::{Checked, Truth};

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

/// See the module.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub member: Member,
    pub disk: SimDisk,
    lie: Option<Lie>,
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
    pub timeline: Option<Arc<Timeline>>,
    preparations: Option<Preparations>,
    latch: Latch,
    /// Whether anybody was told that it has the timeline.
    is_known: bool,
    promised: Promised,
    underway: Option<Underway>,
    /// Served bytes up to here were compared.
    compared: Lsn,
    /// Something of its log has rotted, and was not mended yet.
    pub is_rotten: bool,
    /// That was found, and it takes no part until it is mended.
    pub is_mending: bool,
    /// Nothing has happened with its timeline, which is not open; whoever needs it opens it.
    pub is_resting: bool,
}

/// With what is there before: the safekeeper's own directory.
fn empty_disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    let made = disk.create_directory(Path::new("/safekeeper"));
    made.and_then(|()| disk.sync_directory(Path::new("/"))).expect("an empty disk that is well");
    disk
}

impl Node {
    pub fn new(index: usize, seed: u64, lie: Option<Lie>) -> Node {
        let number = index as u8 + 1;
        let disk = empty_disk(seed);
        let directory = PathBuf::from("/safekeeper/tenant/timeline");
        let member = Member { node: NodeId(number.into()), incarnation: Incarnation([number; 16]) };
        Node {
            name: format!("safekeeper {number}"),
            member,
            disk,
            lie,
            directory,
            life: 0,
            is_up: true,
            is_doomed: false,
            loses_power: false,
            back_after: 0,
            is_retired: false,
            timeline: None,
            preparations: None,
            latch: Latch::default(),
            is_known: false,
            promised: Promised::default(),
            underway: None,
            compared: Lsn::INVALID,
            is_rotten: false,
            is_mending: false,
            is_resting: false,
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
        self.timeline = None;
        self.is_known = false;
        self.promised = Promised::default();
        self.underway = None;
        self.compared = Lsn::INVALID;
        (self.is_rotten, self.is_mending, self.is_resting) = (false, false, false);
    }

    fn context(&mut self) -> OpenContext {
        self.latch = Latch::default();
        let (preparer, preparations) = Preparer::queue(self.latch.clone());
        self.preparations = Some(preparations);
        let disk: Arc<dyn Disk> = match self.lie {
            Some(lie) => Arc::new(LyingDisk::new(self.disk.clone(), lie)),
            None => Arc::new(self.disk.clone()),
        };
        OpenContext {
            own: self.member,
            preparer,
            latch: self.latch.clone(),
            space: DiskSpace::new(Arc::clone(&disk), &self.directory, DiskArguments::default()),
            disk,
            // Its names are names that metrics may have.
            meters: Meters::new().unwrap_or_else(|error| unreachable!("{error}")),
        }
    }

    /// Creates the timeline if it never was here. True if it is there then.
    pub fn create(&mut self, founded: &Quorum) -> bool {
        if self.timeline.is_none() && !self.is_known {
            let context = self.context();
            match Timeline::create(&context, &self.directory, founded, &[]) {
                Ok(timeline) => self.timeline = Some(Arc::new(timeline)),
                Err(StorageError::DiskFull { .. }) => {}
                // As `Timelines::create` does.
                Err(error) => self.latch.throw(&error.to_string()),
            }
        }
        if let Some(timeline) = self.timeline.clone().filter(|_| !self.is_known) {
            self.is_known = true;
            self.compared = timeline.parameters().start_lsn;
            self.promise(&timeline, None);
        }
        self.timeline.is_some()
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
        let Some(timeline) = &self.timeline else { return };
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

    /// It is done, and answered: what it says by now is promised.
    pub fn promise(&mut self, timeline: &Timeline, voted_for: Option<ProposerId>) {
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
    }

    /// The process is gone, and what it had not made durable, as far as that is how it ends.
    pub fn end(&mut self, loses_power: bool) {
        self.timeline = None;
        self.preparations = None;
        match loses_power {
            true => self.disk.lose_power(),
            false => self.disk.end_process(),
        }
        self.is_resting = false;
        self.is_up = false;
        self.is_doomed = false;
        self.life += 1;
    }

    /// Starts again, and looks at what it has.
    pub fn start(&mut self, truth: &Truth) -> Checked {
        self.is_up = true;
        self.latch = Latch::default();
        self.is_mending = false;
        let names = self.disk.list(&self.directory).unwrap_or_default();
        if self.disk.has_stopped() {
            // It was woken, and has ended meanwhile.
            return Ok(());
        }
        if !names.iter().any(|name| name == "control") {
            return match self.is_known {
                true => Err(format!("{} has lost the timeline: {names:?}", self.name)),
                false => Ok(()),
            };
        }
        let context = self.context();
        if names.iter().any(|name| name == AWAY) {
            // It is at rest until somebody needs it, and what it promised is in its control file.
            self.is_resting = true;
            return Ok(());
        }
        let opened = match Timeline::open(&context, &self.directory) {
            Ok(opened) => opened,
            // Of a full disk, or of a disk that fails.
            Err(StorageError::DiskFull { .. } | StorageError::Failed { .. }) => {
                self.latch.throw("it can't be opened now");
                return Ok(());
            }
            Err(error) if self.is_rotten && error.is_mendable() => {
                self.is_mending = true;
                return Ok(());
            }
            Err(error) => {
                return Err(format!(
                    "{} refuses what it has, and nothing rotted: {error}",
                    self.name
                ));
            }
        };
        let timeline = Arc::new(opened.timeline);
        self.check_promises(&timeline)?;
        if timeline.is_left() {
            drop(timeline);
            self.let_go();
            return Ok(());
        }
        self.timeline = Some(Arc::clone(&timeline));
        // Founded, but nobody was told.
        self.is_known = true;
        let voted_for = self.promised.voted_for.filter(|_| timeline.term() == self.promised.term);
        self.promise(&timeline, voted_for);
        self.compared = timeline.marks().available_lsn;
        self.check(truth)
    }

    /// Lets it come to rest if nothing is to be done with it, as `Timelines::let_rest` does. For who has it alone.
    pub fn let_rest(&mut self) -> bool {
        let Some(timeline) = &self.timeline else { return false };
        let summary = timeline.at_rest();
        let is_own = |summary: TimelineSummary| summary.configuration.contains(self.member);
        if !summary.is_some_and(is_own) && !self.rests_early(timeline) {
            return false;
        }
        timeline.files().let_go();
        self.timeline = None;
        self.is_resting = true;
        true
    }

    /// A mistake: that not all of it is archived is not seen.
    fn rests_early(&self, timeline: &Timeline) -> bool {
        self.lie == Some(Lie::AwayBeforeArchived)
            && !timeline.has_compute()
            && timeline.stored_commit_lsn() == timeline.flush_lsn()
            && timeline.flush_lsn() > timeline.parameters().start_lsn
    }

    /// Has its WAL be in object storage only. True if it is.
    pub fn send_away(&mut self) -> bool {
        let context = self.context();
        let sent = match self.lie {
            Some(Lie::AwayBeforeArchived) => self.remove_all(&context),
            _ => send_away(&context, &self.directory),
        };
        match sent {
            Ok(is_away) => is_away,
            Err(StorageError::DiskFull { .. }) => false,
            Err(error) => {
                self.latch.throw(&error.to_string());
                false
            }
        }
    }

    fn remove_all(&self, context: &OpenContext) -> Result<bool, StorageError> {
        let failed = |error| StorageError::wrap("remove", &self.directory)(error);
        let disk = context.disk.as_ref();
        replace_file(disk, &self.directory.join(AWAY), b"").map_err(failed)?;
        for name in disk.list(&self.directory).map_err(failed)? {
            if name.len() == 24 {
                disk.remove(&self.directory.join(name)).map_err(failed)?;
            }
        }
        Ok(true)
    }

    /// Somebody needs it: opens it, with what is in object storage, as `Timelines::get` does. It rests on if that can't be had now.
    pub fn wake(&mut self, objects: &Objects, truth: &Truth) -> Checked<Woken> {
        let context = self.context();
        let is_passing = |error: &StorageError| matches!(error, StorageError::DiskFull { .. });
        let is_away = is_sent_away(&context, &self.directory);
        let control = read_control(&context, &self.directory.join("control"));
        let back = match (is_away, control) {
            (Ok(true), Ok(control)) => {
                let (archive, handle) = (&objects.archive, objects.handle());
                bring_back(
                    &context,
                    &self.directory,
                    &control,
                    archive,
                    &AllGivenUp::default(),
                    &handle,
                )
                .map(|()| Woken::IsBack)
            }
            (Ok(_), _) => Ok(Woken::IsOpen),
            (Err(error), _) => Err(NotBack::Storage(error)),
        };
        match back {
            Ok(woken) => {
                self.is_resting = false;
                self.start(truth)?;
                Ok(woken)
            }
            Err(NotBack::Later(why)) => Ok(Woken::NotYet(why)),
            Err(NotBack::Storage(error)) => {
                if !is_passing(&error) && !error.is_mendable() {
                    self.latch.throw(&error.to_string());
                }
                Ok(Woken::NotYet(error.to_string()))
            }
            Err(gone @ NotBack::Gone(_)) => Err(format!("{}: {gone}", self.name)),
        }
    }

    /// Others keep the timeline by now: its files go, as `Timelines::let_go` has it.
    fn let_go(&mut self) {
        let left = self.directory.with_extension(format!("left{}", self.life));
        let disk = &self.disk;
        let above = Path::new("/safekeeper/tenant");
        let gone = disk.rename(&self.directory, &left).and_then(|()| disk.sync_directory(above));
        match gone {
            Ok(()) => self.forget(),
            Err(error) => self.latch.throw(&error.to_string()),
        }
    }

    /// Takes what was decided of the timeline's members, and says so only once it is durable.
    pub fn follow(&mut self, decided: &Quorum) -> Result<(), RefusedReason> {
        let Some(timeline) = self.timeline.clone() else {
            return Err(RefusedReason::UnknownTimeline);
        };
        timeline.admit_decision(&decided.chain)?;
        timeline.follow_decision(&decided.chain)?;
        self.promise(&timeline, None);
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
    pub fn check(&mut self, truth: &Truth) -> Checked {
        let Some(timeline) = &self.timeline else { return Ok(()) };
        let available_lsn = timeline.marks().available_lsn;
        let commit_lsn = timeline.commit_lsn();
        let from = self.compared.max(available_lsn);
        // A failed write leaves positions that nobody is told of.
        if from >= commit_lsn || self.is_finished() {
            return Ok(());
        }
        self.compare(timeline, from, commit_lsn, truth)?;
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

    /// End of what it acknowledged, and has for all that is known.
    pub fn acknowledged(&self) -> Lsn {
        self.promised.flush_lsn
    }

    /// It takes no part in the timeline until it is mended.
    pub fn take_out(&mut self, why: &str) {
        if let Some(timeline) = self.timeline.take() {
            timeline.retire(why);
            self.is_mending = true;
        }
    }

    /// One attempt to mend, as `background::mending` makes it. Where the log was cut, if it was.
    pub fn mend(
        &mut self,
        sources: impl FnOnce(&TimelineControl) -> Sources,
        decided: &Chain,
        truth: &Truth,
    ) -> Checked<Result<Option<Lsn>, String>> {
        let context = self.context();
        let control = match read_control(&context, &self.directory.join("control")) {
            Ok(control) => control,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let names = self.disk.list(&self.directory).unwrap_or_default();
        match fate(&names, &control.state.configuration, Some(decided), self.member) {
            Fate::Mended => {}
            Fate::LetGo => {
                self.let_go();
                return Ok(Ok(None));
            }
            Fate::Kept => return Ok(Err("it is kept for others".into())),
        }
        let mut sources = sources(&control);
        let (disk, space) = (Arc::clone(&context.disk), context.space.clone());
        let log = DamagedLog::open(disk, &self.directory, control, space);
        let mended = match log.map_err(Lack::from).and_then(|log| log.mend(&mut sources)) {
            Ok(mended) => mended,
            Err(lack) => {
                if let Lack::Storage(error @ StorageError::Failed { .. }) = &lack
                    && !error.is_of_reading()
                {
                    self.latch.throw(&lack.to_string());
                }
                return Ok(Err(lack.to_string()));
            }
        };
        if self.is_finished() {
            return Ok(Err("it has ended meanwhile".into()));
        }
        if let Some(cut) = mended.cut {
            self.promised.flush_lsn = self.promised.flush_lsn.min(cut);
        }
        self.start(truth)?;
        if !self.is_mending && self.timeline.is_some() {
            self.is_rotten = false;
        }
        Ok(Ok(mended.cut))
    }
}
