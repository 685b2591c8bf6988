//! All timelines of this safekeeper, by name.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Incarnation, NodeId, TenantId, TimelineId, TimelineParameters};
use pgstrata_quorum::{Configuration, Refusal};
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason};

use crate::decisions::Decisions;
use crate::ledger::Ledger;
use crate::storage_error::StorageError;
use crate::timeline::{KEEP, OpenContext, Timeline};
use crate::wanted::Wanted;

/// Most timelines of one safekeeper.
pub const MAX_TIMELINES: usize = 10_000;

/// A timeline's full name.
pub type TimelineKey = (TenantId, TimelineId);

/// What a safekeeper knows of a timeline that somebody greets it about.
#[derive(Clone, Debug)]
pub enum Greeted {
    /// It is a member, and this is its copy.
    Member(Arc<Timeline>),
    /// It is no member. These are.
    Elsewhere(Arc<Configuration>),
    /// Nobody has founded it yet. If its members were told by their nodes only, these are they.
    NotFounded(Option<Arc<Configuration>>),
}

#[derive(Clone, Debug)]
enum Slot {
    Open(Arc<Timeline>),
    /// Its files can't be used, for this reason. The others are served all the same.
    Damaged(String),
    /// Segments of it can't, for this reason, and are fetched from others: `crate::mend`.
    Mending(String),
}

/// What all timelines of this process are opened with.
#[derive(Clone, Debug)]
pub struct TimelinesContext {
    /// What each of them shares.
    pub shared: OpenContext,
    /// Where it is decided who the members are.
    pub decisions: Decisions,
    /// Which life of its directory each safekeeper was in that was met before quorums said so.
    pub met: Arc<BTreeMap<NodeId, Incarnation>>,
    /// Whether the directory must have a list of timelines.
    pub has_list: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Timelines {
    context: TimelinesContext,
    directory: PathBuf,
    slots: RwLock<HashMap<TimelineKey, Slot>>,
    creating: Mutex<()>,
    ledger: Ledger,
    wanted: Wanted,
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
    /// Opens everything in `directory`.
    pub fn open(context: TimelinesContext, directory: &Path) -> Result<Timelines, StorageError> {
        let ledger = Ledger::open(Arc::clone(&context.shared.disk), directory, context.has_list)?;
        let timelines = Timelines {
            context,
            directory: directory.to_owned(),
            slots: RwLock::default(),
            creating: Mutex::new(()),
            ledger,
            wanted: Wanted::default(),
        };
        for tenant in timelines.names::<TenantId>(directory)? {
            let of_tenant = directory.join(tenant.to_string());
            timelines.remove_left(&of_tenant)?;
            for timeline in timelines.names::<TimelineId>(&of_tenant)? {
                timelines.open_one((tenant, timeline), &of_tenant.join(timeline.to_string()))?;
            }
        }
        timelines.compare_with_ledger()?;
        Ok(timelines)
    }

    /// What is here was here before, whether or not that was noted; what is noted and not here is lost.
    fn compare_with_ledger(&self) -> Result<(), StorageError> {
        let found: Vec<TimelineKey> = self.slots.read().keys().copied().collect();
        match self.ledger.add(found) {
            // What is here is served all the same; the next start tries again.
            Err(StorageError::DiskFull { .. }) => {
                tracing::warn!("the disk is full: the list of timelines lacks some that are here");
            }
            added => added?,
        }
        let lost = |key: &TimelineKey| !self.slots.read().contains_key(key);
        for key in self.ledger.entries().into_iter().filter(lost) {
            let directory = self.directory.join(key.0.to_string()).join(key.1.to_string());
            let text = format!(
                "{} is gone: what this safekeeper promised and stored of the timeline is lost, and it takes no part \
                 in it until it is made a member anew, with a new directory",
                directory.display()
            );
            tracing::error!(timeline = %key.1, error = %text, "timeline can't be served");
            self.slots.write().insert(key, Slot::Damaged(text));
        }
        Ok(())
    }

    fn names<T: std::str::FromStr>(&self, directory: &Path) -> Result<Vec<T>, StorageError> {
        let names = self.context.shared.disk.list(directory);
        let names = names.map_err(StorageError::wrap("list", directory))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn open_one(&self, key: TimelineKey, directory: &Path) -> Result<(), StorageError> {
        let names = self.context.shared.disk.list(directory);
        let names = names.map_err(StorageError::wrap("list", directory))?;
        if !names.iter().any(|name| name == "control") {
            let has_wal = names.iter().any(|name| name.len() == 24);
            if !has_wal {
                // A crash while it was created: nobody was told that it exists.
                return Ok(());
            }
        }
        let slot = match Timeline::open(&self.context.shared, directory) {
            Ok(opened) if opened.timeline.is_left() && names.iter().any(|name| name == KEEP) => {
                let text = format!(
                    "the members of this timeline went on without this safekeeper: what it has and they lack is in {}. \
                     If nothing is missed it is of no further use",
                    directory.display()
                );
                tracing::error!(timeline = %key.1, error = %text, "timeline can't be served");
                Slot::Damaged(text)
            }
            Ok(opened) if opened.timeline.is_left() => {
                drop(opened);
                return self.let_go(key, directory);
            }
            Ok(opened) => {
                let timeline = opened.timeline;
                tracing::info!(
                    timeline = %key.1,
                    term = %timeline.term(),
                    flush_lsn = %timeline.flush_lsn(),
                    commit_lsn = %timeline.commit_lsn(),
                    removed_bytes = opened.removed_bytes,
                    "timeline opened"
                );
                Slot::Open(Arc::new(timeline))
            }
            Err(error) => {
                tracing::error!(timeline = %key.1, %error, "timeline can't be served");
                let was_mended = matches!(self.slots.read().get(&key), Some(Slot::Mending(_)));
                match error.is_mendable() || (was_mended && error.is_of_reading()) {
                    true => {
                        self.context.shared.meters.found_damage();
                        Slot::Mending(error.to_string())
                    }
                    false => Slot::Damaged(error.to_string()),
                }
            }
        };
        self.slots.write().insert(key, slot);
        Ok(())
    }

    /// Removes what a crash left of what was being removed.
    fn remove_left(&self, of_tenant: &Path) -> Result<(), StorageError> {
        let names = self.context.shared.disk.list(of_tenant);
        for name in names.map_err(StorageError::wrap("list", of_tenant))? {
            let left = of_tenant.join(&name);
            if name.ends_with(".left")
                && let Err(error) = std::fs::remove_dir_all(&left)
            {
                tracing::warn!(directory = %left.display(), %error, "can't be removed");
            }
        }
        Ok(())
    }

    /// Removes what others keep by now. It may come back as a new member, with nothing.
    fn let_go(&self, key: TimelineKey, directory: &Path) -> Result<(), StorageError> {
        tracing::info!(timeline = %key.1, "others keep the timeline by now: its files are removed");
        self.ledger.remove(key)?;
        // Under a name that is no timeline's, so that a crash leaves nothing that could be taken for one.
        let left = directory.with_extension("left");
        let disk = self.context.shared.disk.as_ref();
        disk.rename(directory, &left).map_err(StorageError::wrap("rename", directory))?;
        if let Some(above) = directory.parent() {
            disk.sync_directory(above).map_err(StorageError::unsynced("sync directory", above))?;
        }
        if let Err(error) = std::fs::remove_dir_all(&left) {
            tracing::warn!(directory = %left.display(), %error, "can't be removed");
        }
        Ok(())
    }

    /// Who we are.
    pub fn context(&self) -> &TimelinesContext {
        &self.context
    }

    /// Those of which a proposer waits for what its term began with.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// All that can be served.
    pub fn all(&self) -> Vec<Arc<Timeline>> {
        let slots = self.slots.read();
        let open = slots.values().filter_map(|slot| match slot {
            Slot::Open(timeline) => Some(Arc::clone(timeline)),
            Slot::Damaged(_) | Slot::Mending(_) => None,
        });
        open.collect()
    }

    /// Those that can't, and why.
    pub fn damaged(&self) -> Vec<(TimelineKey, String)> {
        let slots = self.slots.read();
        let damaged = slots.iter().filter_map(|(key, slot)| match slot {
            Slot::Open(_) => None,
            Slot::Damaged(reason) | Slot::Mending(reason) => Some((*key, reason.clone())),
        });
        damaged.collect()
    }

    /// Those of which others may have what is damaged.
    pub fn mending(&self) -> Vec<TimelineKey> {
        let slots = self.slots.read();
        let mending = slots.iter().filter(|(_, slot)| matches!(slot, Slot::Mending(_)));
        mending.map(|(key, _)| *key).collect()
    }

    /// A timeline's log is found to be damaged: it is served no more, votes for nobody and counts for nothing, until it is
    /// mended. Waits for what is under way.
    pub fn take_out(&self, timeline: &Arc<Timeline>, why: &str) {
        let key = (timeline.parameters().tenant, timeline.parameters().timeline);
        // First, so that nothing goes on through it once it is no longer to be found here.
        timeline.retire(why);
        if let Some(slot) = self.slots.write().get_mut(&key)
            && matches!(slot, Slot::Open(open) if Arc::ptr_eq(open, timeline))
        {
            *slot = Slot::Mending(why.to_owned());
        }
        self.context.shared.meters.found_damage();
        tracing::error!(timeline = %key.1, error = %why, "timeline is served no more until it is mended");
    }

    /// Says what mending a timeline waits for.
    pub fn note_mending(&self, key: TimelineKey, why: String) {
        if let Some(Slot::Mending(reason)) = self.slots.write().get_mut(&key) {
            *reason = why;
        }
    }

    /// Opens a timeline that was mended. If it is damaged still, this is why.
    pub fn reopen(&self, key: TimelineKey) -> Result<(), String> {
        self.open_one(key, &self.directory_of(key)).map_err(|error| error.to_string())?;
        match self.get(key) {
            Ok(_) | Err(RefusedReason::UnknownTimeline) => Ok(()),
            Err(reason) => Err(reason.to_string()),
        }
    }

    /// Where a timeline's files are.
    pub fn directory_of(&self, key: TimelineKey) -> PathBuf {
        self.directory.join(key.0.to_string()).join(key.1.to_string())
    }

    /// The timeline of that name.
    pub fn get(&self, key: TimelineKey) -> Result<Arc<Timeline>, RefusedReason> {
        match self.slots.read().get(&key) {
            Some(Slot::Open(timeline)) => Ok(Arc::clone(timeline)),
            Some(Slot::Damaged(reason) | Slot::Mending(reason)) => {
                Err(RefusedReason::Storage(reason.clone()))
            }
            None => Err(RefusedReason::UnknownTimeline),
        }
    }

    /// What is known of a greeting's timeline. It is created here if it was founded with this safekeeper as a member, and
    /// never was here.
    pub fn greet(&self, greeting: &Greeting) -> Result<Greeted, RefusedReason> {
        self.greet_by(greeting, None)
    }

    /// The same, where what is decided has just been read.
    fn greet_by(
        &self,
        greeting: &Greeting,
        mut decided: Option<Quorum>,
    ) -> Result<Greeted, RefusedReason> {
        let parameters = &greeting.parameters;
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
                if !decided.chain.newest().contains(self.context.shared.own) {
                    return Ok(Greeted::Elsewhere(Arc::new(decided.chain.newest().clone())));
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
            return Ok(Greeted::Elsewhere(configuration));
        }
        if !greeting.addresses.is_empty() {
            timeline.note_addresses(&greeting.addresses);
        }
        Ok(Greeted::Member(timeline))
    }

    /// The timeline, as it is by a configuration of this number at least: created if it names this safekeeper, and the timeline
    /// never was here.
    pub fn heard_of(&self, key: TimelineKey, number: u64) -> Result<Arc<Timeline>, RefusedReason> {
        let timeline = match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => {
                let decided = self.context.decisions.read(key)?;
                let decided = decided.ok_or(RefusedReason::UnknownTimeline)?;
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

    /// Refuses to be a member again with a log that others went on without: it may have what was given up.
    fn refuse_given_up(
        &self,
        timeline: &Timeline,
        before: &Configuration,
        decided: &Quorum,
    ) -> Result<(), RefusedReason> {
        let member = self.context.shared.own;
        let first = &decided.chain.configurations()[0];
        let was_left_out =
            before.contains(member) && before.number() < first.number() && !first.contains(member);
        let kept = timeline.is_kept().map_err(|error| RefusedReason::Storage(error.to_string()))?;
        if !was_left_out && !kept {
            return Ok(());
        }
        let text = "the members of this timeline went on without this safekeeper, which may have what they lack: it \
                    becomes one again only with a new directory";
        Err(RefusedReason::Storage(text.into()))
    }

    fn take(&self, timeline: &Timeline, decided: &Quorum) -> Result<(), RefusedReason> {
        check_parameters(timeline.parameters(), &decided.parameters)?;
        let own = timeline.configuration();
        if !decided.chain.goes_on_from(&own) {
            let number = own.number();
            return Err(RefusedReason::Quorum(Refusal::OtherMembers { number }));
        }
        if !own.is_known() {
            self.check_first(&own, decided)?;
        }
        let newest = decided.chain.newest();
        if newest.contains(self.context.shared.own) {
            self.refuse_given_up(timeline, &own, decided)?;
        }
        if !newest.contains(self.context.shared.own)
            && !decided.chain.shows_leaving(self.context.shared.own)
        {
            // Others went on without its word, and may lack what it has.
            timeline.keep().map_err(|error| RefusedReason::Storage(error.to_string()))?;
        }
        self.find(timeline, newest);
        match timeline.configure(decided.chain.newest()) {
            Ok(None) => Ok(()),
            Ok(Some(Message::Refused(reason))) => Err(reason),
            Ok(Some(_)) => Err(RefusedReason::Storage("a configuration was answered".into())),
            Err(error) => Err(RefusedReason::Storage(error.to_string())),
        }
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
        let founded = self.context.decisions.found(parameters, nodes, own.is_some())?;
        check_parameters(&founded.parameters, parameters)?;
        let members = founded.chain.newest().nodes();
        tracing::info!(timeline = %parameters.timeline, ?members, "timeline founded");
        self.greet_by(greeting, Some(founded))
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
                "timeline {} was here before its members were written down, and its directory is gone: what this \
                 safekeeper promised and stored of it is lost",
                key.1
            )));
        }
        let _creating = self.creating.lock();
        match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => {}
            other => return other,
        }
        if self.slots.read().len() >= MAX_TIMELINES {
            return Err(RefusedReason::Storage(format!(
                "this safekeeper has {MAX_TIMELINES} timelines, the most it can have"
            )));
        }
        let directory = self.directory.join(key.0.to_string()).join(key.1.to_string());
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
        self.slots.write().insert(key, Slot::Open(Arc::clone(&timeline)));
        Ok(timeline)
    }

    /// The one timeline, if there is just one.
    pub fn only(&self) -> Option<Arc<Timeline>> {
        let slots = self.slots.read();
        match (slots.len(), slots.values().next()) {
            (1, Some(Slot::Open(timeline))) => Some(Arc::clone(timeline)),
            _ => None,
        }
    }
}
