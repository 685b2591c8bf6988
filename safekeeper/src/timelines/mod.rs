//! All timelines of this safekeeper, by name.

pub mod away;
pub mod believing;
mod deleting;
mod following;
pub mod former;
mod mending;
mod opening;
mod resting;
mod slots;
mod start;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pgstrata_format::quorum::Quorum;
use pgstrata_format::undecided::Undecided;
use pgstrata_ids::{Incarnation, Lsn, NodeId, TenantId, TimelineId, TimelineParameters};
use pgstrata_quorum::{Configuration, Refusal};
use pgstrata_wire::safekeeper::{Greeting, RefusedReason};

use self::deleting::refuse_deleted;
use self::resting::RestingFiles;
use self::slots::{Slot, Slots};
use crate::archive::Archive;
use crate::decisions::Decisions;
use crate::ledger::Ledger;
use crate::storage_error::StorageError;
use crate::timeline::{OpenContext, Timeline};
use crate::wanted::Wanted;

/// Most timelines of one safekeeper: what the broker hears of one node.
pub const MAX_TIMELINES: usize = 20_000;

/// Where more than this are open, those that nobody needs come to rest sooner.
pub const MOST_OPEN: usize = 500;

/// A timeline's full name.
pub type TimelineKey = (TenantId, TimelineId);

/// What a safekeeper knows of a timeline that somebody greets it about.
#[derive(Clone, Debug)]
pub enum Greeted {
    /// It is a member, and this is its copy.
    Member(Arc<Timeline>),
    /// It is no member. These are, and some of them are there.
    Elsewhere(Arc<Configuration>, Vec<(NodeId, String)>),
    /// Nobody has founded it yet. If its members were told by their nodes only, these are they.
    NotFounded(Option<Arc<Configuration>>),
}

/// What all timelines of this process are opened with.
#[derive(Clone, Debug)]
pub struct TimelinesContext {
    /// What each of them shares.
    pub shared: OpenContext,
    /// Where it is decided who the members are.
    pub decisions: Decisions,
    /// Where WAL is that is no longer on the disk, if anywhere.
    pub archive: Option<Arc<Archive>>,
    /// Which life of its directory each safekeeper was in that was met before quorums said so.
    pub met: Arc<BTreeMap<NodeId, Incarnation>>,
    /// Whether the directory must have a list of timelines.
    pub has_list: bool,
    /// Segments of a timeline have so many bytes at least: fewer are only simulated.
    pub smallest_segment: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Timelines {
    context: TimelinesContext,
    directory: PathBuf,
    slots: Slots,
    creating: Mutex<()>,
    ledger: Ledger,
    resting_files: RestingFiles,
    wanted: Wanted,
    looks: following::Looks,
    /// Whether those who found timelines can know of which there are copies here that were never founded.
    are_undecided_noted: AtomicBool,
}

impl TimelinesContext {
    fn check_segments(&self, parameters: &TimelineParameters) -> Result<(), RefusedReason> {
        let (size, smallest) = (parameters.segment_size, self.smallest_segment);
        match size >= smallest {
            true => Ok(()),
            false => Err(RefusedReason::Mismatch(format!(
                "WAL segments of {size} bytes are smaller than PostgreSQL has them: {smallest} bytes at least"
            ))),
        }
    }
}

/// Said of what is kept, and of no use here any more.
fn left_behind(directory: &Path) -> String {
    format!(
        "the members of this timeline went on without this safekeeper: what it has and they lack is in {}. It becomes a member \
         again only with a new directory",
        directory.display()
    )
}

/// Refuses what is another timeline of the same name.
fn check_parameters(
    ours: &TimelineParameters,
    theirs: &TimelineParameters,
) -> Result<(), RefusedReason> {
    match ours == theirs {
        true => Ok(()),
        false => Err(RefusedReason::Mismatch(format!(
            "timeline {} was created with other parameters: {ours:?} here, {theirs:?} there",
            ours.timeline
        ))),
    }
}

impl Timelines {
    /// Where a timeline's files are.
    pub fn directory_of(&self, key: TimelineKey) -> PathBuf {
        self.directory.join(key.0.to_string()).join(key.1.to_string())
    }

    /// Who we are.
    pub fn context(&self) -> &TimelinesContext {
        &self.context
    }

    /// Copies of an older release, of which it is not decided who the members are.
    pub fn undecided(&self) -> Undecided {
        Undecided { node: self.context.shared.own.node, timelines: self.slots.undecided() }
    }

    /// Whoever founds a timeline from now on can know of them.
    pub fn undecided_are_noted(&self) {
        self.are_undecided_noted.store(true, Ordering::Release);
    }

    /// Those of which a proposer waits for what its term began with.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// What is known of a greeting's timeline. It is created here if it was founded with this safekeeper as a member, and
    /// never was here.
    pub fn greet(&self, greeting: &Greeting) -> Result<Greeted, RefusedReason> {
        let key = (greeting.parameters.tenant, greeting.parameters.timeline);
        match self.greet_by(greeting, None) {
            // A compute that knows of this one only goes on from here.
            Err(RefusedReason::Storage(why)) if self.get_open(key).is_none() => {
                self.elsewhere(key).ok_or(RefusedReason::Storage(why))
            }
            greeted => greeted,
        }
    }

    /// The same, where what is decided has just been read.
    fn greet_by(
        &self,
        greeting: &Greeting,
        mut decided: Option<Quorum>,
    ) -> Result<Greeted, RefusedReason> {
        let parameters = &greeting.parameters;
        self.context.check_segments(parameters)?;
        let key = (parameters.tenant, parameters.timeline);
        let read = |decided: Option<Quorum>| match decided {
            Some(decided) => Ok(Some(decided)),
            None => self.context.decisions.read(key),
        };
        let timeline = match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => {
                let Some(decided) = read(decided.take())? else {
                    return Ok(Greeted::NotFounded(None));
                };
                check_parameters(&decided.parameters, parameters)?;
                refuse_deleted(&decided)?;
                let newest = decided.chain.newest();
                if !newest.contains(self.context.shared.own) {
                    let places = self.context.decisions.places(&newest.nodes());
                    return Ok(Greeted::Elsewhere(Arc::new(newest.clone()), places));
                }
                let timeline = self.create(&decided, &greeting.addresses)?;
                self.find(&timeline, decided.chain.newest());
                timeline
            }
            other => other?,
        };
        check_parameters(timeline.parameters(), parameters)?;
        let own = timeline.configuration();
        if (greeting.known > own.number() || !own.is_known())
            && let Some(decided) = read(decided)?
        {
            self.take(&timeline, &decided)?;
        } else if own.is_known() && !own.contains(self.context.shared.own) {
            self.look_again(&timeline)?;
        }
        let configuration = timeline.configuration();
        if greeting.known > configuration.number() {
            let (number, current) = (greeting.known, configuration.number());
            return Err(RefusedReason::Quorum(Refusal::Undecided { number, current }));
        }
        if !configuration.is_known() {
            return Ok(Greeted::NotFounded(Some(configuration)));
        }
        if !configuration.contains(self.context.shared.own) {
            let places = timeline.marks().addresses;
            return Ok(Greeted::Elsewhere(configuration, places));
        }
        if !greeting.addresses.is_empty() {
            timeline.note_addresses(&greeting.addresses);
        }
        Ok(Greeted::Member(timeline))
    }

    /// Looks whether others are the members by now of a timeline that this safekeeper is no member of: nobody tells who has left.
    /// While that can't be read, what was read before is said.
    fn look_again(&self, timeline: &Timeline) -> Result<(), RefusedReason> {
        let parameters = timeline.parameters();
        match self.context.decisions.read((parameters.tenant, parameters.timeline)) {
            Ok(Some(decided)) => {
                let newest = decided.chain.newest().number();
                match decided.is_deleted || newest > timeline.configuration_number() {
                    true => self.take(timeline, &decided),
                    false => Ok(()),
                }
            }
            Ok(None) => Ok(()),
            Err(error) => {
                let id = parameters.timeline;
                tracing::info!(timeline = %id, %error, "whether others are the members by now is not known");
                Ok(())
            }
        }
    }

    /// The timeline, as it is by a configuration of this number at least: created if it names this safekeeper, and the timeline
    /// never was here.
    pub fn heard_of(&self, key: TimelineKey, number: u64) -> Result<Arc<Timeline>, RefusedReason> {
        let timeline = match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => {
                let decided = self.context.decisions.read(key)?;
                let decided = decided.ok_or(RefusedReason::UnknownTimeline)?;
                refuse_deleted(&decided)?;
                if !decided.chain.newest().contains(self.context.shared.own) {
                    return Err(RefusedReason::UnknownTimeline);
                }
                let timeline = self.create(&decided, &[])?;
                self.find(&timeline, decided.chain.newest());
                timeline
            }
            other => other?,
        };
        if timeline.configuration_number() < number {
            self.learn(&timeline)?;
        }
        Ok(timeline)
    }

    /// Looks where it is decided who a timeline's members are, and takes what stands there.
    pub fn learn(&self, timeline: &Timeline) -> Result<(), RefusedReason> {
        let parameters = timeline.parameters();
        match self.context.decisions.read((parameters.tenant, parameters.timeline))? {
            Some(decided) => self.take(timeline, &decided),
            None => Ok(()),
        }
    }

    /// The same where it is decided; opens the timeline only if that is something new, and removes it if it was deleted.
    pub fn look_at_decision(&self, key: TimelineKey) -> Result<(), RefusedReason> {
        let Some(known) = self.slots.configuration_number(key) else { return Ok(()) };
        match self.context.decisions.read(key)? {
            Some(decided) if decided.is_deleted => self.delete(&decided),
            Some(decided) if decided.chain.newest().number() > known => {
                self.take(&*self.get(key)?, &decided)
            }
            // What was decided once is never gone: an empty directory may be in the place of the store.
            None if known > 0 => Err(RefusedReason::Unavailable(format!(
                "who the members are can't be found out: what was decided of timeline {} is not in object storage",
                key.1
            ))),
            _ => Ok(()),
        }
    }

    fn take(&self, timeline: &Timeline, decided: &Quorum) -> Result<(), RefusedReason> {
        check_parameters(timeline.parameters(), &decided.parameters)?;
        // It is removed in its turn.
        refuse_deleted(decided)?;
        let own = timeline.configuration();
        if !own.is_known() {
            // Whatever comes of it, nobody counts nodes any more.
            timeline.note_decided();
            // Else it was not founded with them just now, and the members are others' affair.
            if decided.chain.begins_with_the_first() {
                self.check_first(&own, decided)?;
            }
        }
        let is_member = decided.chain.newest().contains(self.context.shared.own);
        if decided.went_on_without(&own, self.context.shared.own) {
            // What it has may have been given up, also if it had left before. It is served to nobody, whether or not that can be
            // written down.
            let kept = timeline.keep();
            let why = self.serve_no_more(timeline);
            kept.map_err(|error| RefusedReason::Storage(error.to_string()))?;
            return Err(RefusedReason::Storage(why));
        }
        let admitted = timeline.admit_decision(&decided.chain);
        if is_member {
            self.leave_behind(timeline)?;
        }
        admitted?;
        self.find(timeline, decided.chain.newest());
        // What this node archived before it heard that others were given up may be told apart from theirs by nobody.
        if let Some(point) = decided.given_up.denies(own.number(), Lsn::MAX)
            && let Err(error) = timeline.archive_anew(point.lsn, own.number())
        {
            timeline.archived_anew();
            return Err(RefusedReason::Storage(error.to_string()));
        }
        let followed = timeline.follow_decision(&decided.chain);
        timeline.archived_anew();
        if !is_member {
            self.leave_behind(timeline)?;
        }
        followed
    }

    /// Serves a timeline no more that is kept for what others lack. An error, then, that says so.
    fn leave_behind(&self, timeline: &Timeline) -> Result<(), RefusedReason> {
        match timeline.is_kept().map_err(|error| RefusedReason::Storage(error.to_string()))? {
            true => Err(RefusedReason::Storage(self.serve_no_more(timeline))),
            false => Ok(()),
        }
    }

    /// Serves a timeline to nobody from now on: it counts as committed what was given up, and who believed that would have it too.
    /// Why that is.
    fn serve_no_more(&self, timeline: &Timeline) -> String {
        let parameters = timeline.parameters();
        let key = (parameters.tenant, parameters.timeline);
        let why = left_behind(&self.directory_of(key));
        timeline.retire(&why);
        if let Some(open) = self.get_open(key) {
            self.slots.end(key, &open, &why);
            tracing::error!(timeline = %key.1, error = %why, "timeline is served no more");
        }
        why
    }

    /// Whether this is said of a timeline that is kept for what others lack.
    pub fn is_left_behind(&self, key: TimelineKey, why: &str) -> bool {
        why == left_behind(&self.directory_of(key))
    }

    /// Who the members are of a timeline that can't be served here, if this safekeeper is none of them.
    fn elsewhere(&self, key: TimelineKey) -> Option<Greeted> {
        let decided = self.context.decisions.read(key).ok().flatten()?;
        let newest = decided.chain.newest();
        let is_one = decided.is_deleted || newest.contains(self.context.shared.own);
        let places = || self.context.decisions.places(&newest.nodes());
        (!is_one).then(|| Greeted::Elsewhere(Arc::new(newest.clone()), places()))
    }

    /// Notes where members say that they are, so that whoever hears of them here can go there.
    fn find(&self, timeline: &Timeline, configuration: &Configuration) {
        let nodes = configuration.nodes();
        let mut places = self.context.decisions.places(&nodes);
        let before = timeline.marks().addresses.into_iter();
        let known: Vec<NodeId> = places.iter().map(|(node, _)| *node).collect();
        places.extend(before.filter(|(node, _)| nodes.contains(node) && !known.contains(node)));
        timeline.note_addresses(&places);
    }

    /// Whether a timeline of before members had incarnations was founded with the members that it had.
    fn check_first(&self, own: &Configuration, decided: &Quorum) -> Result<(), RefusedReason> {
        let first = &decided.chain.configurations()[0];
        let same = |one: &[NodeId], two: &[NodeId]| {
            one.len() == two.len() && one.iter().all(|node| two.contains(node))
        };
        let stranger = first.all().find(|member| {
            let met = self.context.met.get(&member.node);
            met.is_some_and(|&met| met != member.incarnation)
        });
        match (same(&own.nodes(), &first.nodes()), stranger) {
            (true, None) => Ok(()),
            (false, _) => Err(RefusedReason::Quorum(Refusal::OtherMembers { number: 1 })),
            (true, Some(member)) => Err(RefusedReason::Mismatch(format!(
                "safekeeper {} has another directory than the one that joined: what it promised \
                 and stored is lost",
                member.node
            ))),
        }
    }

    /// Founds a greeting's timeline with these nodes as its first members, unless it is founded.
    pub fn found(
        &self,
        greeting: &Greeting,
        nodes: &[(NodeId, Option<Incarnation>)],
    ) -> Result<Greeted, RefusedReason> {
        let parameters = &greeting.parameters;
        self.context.check_segments(parameters)?;
        let own = match self.get((parameters.tenant, parameters.timeline)) {
            Ok(timeline) => Some(timeline.configuration()),
            Err(RefusedReason::UnknownTimeline) => None,
            Err(other) => return Err(other),
        };
        match &own {
            // It was, and its object may be lost: what it said is not decided anew.
            Some(own) if own.is_known() => return self.greet(greeting),
            Some(own) => {
                let had = own.nodes();
                let same =
                    had.len() == nodes.len() && nodes.iter().all(|(node, _)| had.contains(node));
                if !same {
                    let had: Vec<String> = had.iter().map(NodeId::to_string).collect();
                    return Err(RefusedReason::Mismatch(format!(
                        "the branch's members are the safekeepers {}, and no others",
                        had.join(", ")
                    )));
                }
            }
            None => {}
        }
        let founded = match own {
            Some(_) => self.context.decisions.found_older(parameters, nodes, &self.met_by_us())?,
            None => self.context.decisions.found(parameters, nodes)?,
        };
        check_parameters(&founded.parameters, parameters)?;
        let members = founded.chain.newest().nodes();
        tracing::info!(timeline = %parameters.timeline, ?members, "timeline founded");
        self.greet_by(greeting, Some(founded))
    }

    /// Whom this safekeeper has met under an older version, and itself.
    fn met_by_us(&self) -> BTreeMap<NodeId, Incarnation> {
        let own = self.context.shared.own;
        let mut met = BTreeMap::clone(&self.context.met);
        met.insert(own.node, own.incarnation);
        met
    }

    fn create(
        &self,
        decided: &Quorum,
        addresses: &[(NodeId, String)],
    ) -> Result<Arc<Timeline>, RefusedReason> {
        let key = (decided.parameters.tenant, decided.parameters.timeline);
        // Unless it came in later, with nothing: a first member had a copy.
        let came_later =
            |configuration: &Configuration| !configuration.contains(self.context.shared.own);
        if decided.is_older && !decided.chain.configurations().iter().any(came_later) {
            return Err(RefusedReason::Storage(format!(
                "timeline {} was there before its members were written down, and nothing of it is here: what this \
                 safekeeper may have promised and stored of it is lost. Make it a member anew (pgstrata safekeeper replace)",
                key.1
            )));
        }
        let restored = match decided.restored {
            Some(restored) => Some(self.find_restored(decided, restored.lsn)?),
            None => None,
        };
        let creating = self.creating.lock();
        match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => {}
            other => return other,
        }
        if self.slots.len() >= MAX_TIMELINES {
            return Err(RefusedReason::Storage(format!(
                "this safekeeper has {MAX_TIMELINES} timelines, the most it can have"
            )));
        }
        let directory = self.directory_of(key);
        if let Some(extent) = restored {
            self.create_restored(decided, &extent, addresses)?;
            drop(creating);
            return self.get(key);
        }
        let created = Timeline::create(&self.context.shared, &directory, decided, addresses);
        // Before it promises anything: from now on it is never begun anew.
        let created = created.and_then(|timeline| self.ledger.add([key]).map(|()| timeline));
        let created = created.inspect_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.context.shared.latch.throw(&error.to_string());
            }
        });
        let timeline =
            Arc::new(created.map_err(|error| RefusedReason::Storage(error.to_string()))?);
        tracing::info!(timeline = %key.1, start_lsn = %decided.parameters.start_lsn, "timeline created");
        self.slots.insert(key, Slot::Open(Arc::clone(&timeline)));
        Ok(timeline)
    }
}
