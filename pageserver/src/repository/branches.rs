//! Making, renaming and deleting branches: names, claims, and the moments that branches start at.

use std::collections::HashSet;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use pgstrata_format::index::{Ancestor, TimelineIndex};
use pgstrata_ids::{Lsn, TenantId, TimelineId};

use super::{Busy, Refused, Repository};
use crate::import;
use crate::ingest::IngestError;
use crate::lock::{Mutex, wait_for};
use crate::remote::{RemoteIndex, index_object};
use crate::timeline::Timeline;

/// How long a request waits for WAL that may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// A position that PostgreSQL reports may lie behind a page header that no record follows yet.
const LONGEST_PAGE_HEADER: u64 = 40;

/// What is being done with names and timelines now. Everything that takes a while claims what it
/// is about first, so that the lock is held only to look and to note.
#[derive(Default)]
pub(super) struct Underway {
    /// Names that are about to be given.
    names: HashSet<String>,
    /// Timelines that are made, renamed or deleted.
    changing: HashSet<TimelineId>,
    /// Timelines that branches are being made from, one for each.
    parents: Vec<TimelineId>,
}

/// A part of [`Underway`]; ends when this is dropped.
#[derive(Default)]
struct Claim<'a> {
    underway: Option<&'a Mutex<Underway>>,
    name: Option<String>,
    changing: Option<TimelineId>,
    parent: Option<TimelineId>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let Some(underway) = self.underway else { return };
        let mut underway = underway.lock();
        if let Some(name) = &self.name {
            underway.names.remove(name);
        }
        if let Some(id) = &self.changing {
            underway.changing.remove(id);
        }
        if let Some(parent) = &self.parent
            && let Some(at) = underway.parents.iter().position(|id| id == parent)
        {
            underway.parents.swap_remove(at);
        }
    }
}

/// At which moment a branch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Everything committed so far.
    Now,
    /// The last record boundary at or before this LSN.
    Lsn(Lsn),
    /// The last commit at or before this time, in microseconds since 2000-01-01.
    Time(i64),
}

impl Repository {
    fn check_new_name(&self, name: &str) -> Result<()> {
        let refused = |why: String| anyhow::Error::from(Refused::Invalid(why));
        pgstrata_ids::check_branch_name(name).map_err(|error| refused(error.to_string()))?;
        if name.ends_with('/') || name.contains("//") {
            return Err(refused(format!("'{name}' is no branch name: a part of it is empty")));
        }
        Ok(())
    }

    /// Claims a name that no branch has, for a timeline that is made or gets another name.
    fn claim_name(&self, name: &str, id: Option<TimelineId>) -> Result<Claim<'_>> {
        self.check_new_name(name)?;
        let mut underway = self.underway.lock();
        let known = match self.branch(name) {
            Ok(_) => true,
            Err(error) => error.downcast_ref::<Refused>().is_none(),
        };
        if known || underway.names.contains(name) {
            anyhow::bail!(Refused::Conflict(format!("branch '{name}' exists already")));
        }
        let mut claim = Claim::default();
        if let Some(id) = id {
            claim.changing = Some(self.note_change(&mut underway, id)?);
        }
        underway.names.insert(name.to_owned());
        claim.name = Some(name.to_owned());
        claim.underway = Some(&self.underway);
        Ok(claim)
    }

    fn note_change(&self, underway: &mut Underway, id: TimelineId) -> Result<TimelineId> {
        if !underway.changing.insert(id) {
            let text = format!("timeline {id} is being changed by another request");
            anyhow::bail!(Refused::Conflict(text));
        }
        Ok(id)
    }

    /// Imports a data directory as a new tenant's first branch. Blocks.
    pub fn import(
        &self,
        tenant: TenantId,
        id: TimelineId,
        name: &str,
        archive: impl Read,
    ) -> Result<Arc<Timeline>> {
        let _claim = self.claim_name(name, Some(id))?;
        if self.timeline(id).err().is_none_or(|error| error.downcast_ref::<Refused>().is_none()) {
            anyhow::bail!(Refused::Conflict(format!("timeline {id} exists already")));
        }
        if let Some((lost, _)) = self.broken().into_iter().find(|(_, broken)| broken.name.is_none())
        {
            // An empty cluster in the place of one that only can't be read would be taken for it.
            anyhow::bail!(Refused::Conflict(format!(
                "the index of timeline {lost} can't be read, and may be that of '{name}': restore it \
                 or remove it before a cluster is imported"
            )));
        }
        let imported = import::read_archive(archive, &self.source.directory)
            .map_err(|error| Refused::Invalid(format!("can't import: {error:#}")))?;
        let state = &imported.state;
        let index = TimelineIndex {
            sequence: 1,
            generation: self.generation.0,
            tenant: tenant.to_string(),
            timeline: id.to_string(),
            name: name.to_owned(),
            ancestor: None,
            start_lsn: imported.start_lsn.to_string(),
            start_record: imported.record_start.to_string(),
            remote_consistent_lsn: imported.start_lsn.to_string(),
            last_record: imported.record_start.to_string(),
            system_id: state.control.system_identifier,
            pg_version: state.version().major(),
            segment_size: u64::from(state.control.wal_segment_size),
            created: jiff::Timestamp::now().to_string(),
            deleted: false,
            replaces: None,
            frozen: None,
            layers: Vec::new(),
        };
        // The index comes with the last of it: an import that fails half-way never was.
        let runtime = self.runtime.clone();
        let index = RemoteIndex::absent(&self.store, runtime, tenant, id, index);
        let timeline = Timeline::new(index, None, &self.source, self.limits, self.generation)?;
        timeline.import_image(imported.start_lsn, imported.record_start, imported.values)?;
        self.timelines.write().insert(id, Arc::clone(&timeline));
        self.start_following(&timeline)?;
        Ok(timeline)
    }

    /// Where a branch of `from` at `moment` starts, and the start of the record before. Blocks
    /// until everything before is ingested.
    pub fn resolve_moment(&self, from: &Timeline, moment: Moment) -> Result<(Lsn, Lsn)> {
        let lsn = match moment {
            Moment::Now => return Ok(from.progress.last_record()),
            Moment::Time(time) => {
                let (end, _) = from.progress.last_record();
                from.wait(end, PATIENCE).map_err(anyhow::Error::msg)?;
                let found = from.lsn_at_time(time, end)?.ok_or_else(|| {
                    let name = from.name();
                    Refused::Invalid(format!(
                        "branch '{name}' has no commit at or before that time"
                    ))
                })?;
                return Ok((found.0, Lsn(found.1.record_start)));
            }
            Moment::Lsn(lsn) => lsn,
        };
        if lsn < from.oldest_lsn() {
            let (name, oldest) = (from.name(), from.oldest_lsn());
            anyhow::bail!(Refused::Invalid(format!(
                "{lsn} is before the history of branch '{name}', which starts at {oldest}"
            )));
        }
        let reached = Lsn(lsn.0.saturating_sub(LONGEST_PAGE_HEADER).max(from.oldest_lsn().0));
        let wanted = if lsn.page_offset() <= LONGEST_PAGE_HEADER { reached } else { lsn };
        if from.progress.lsn() < wanted {
            from.progress.wait(wanted, PATIENCE.min(Duration::from_secs(3))).map_err(|error| {
                Refused::Invalid(format!(
                    "{lsn} is in the future of branch '{}': {error}",
                    from.name()
                ))
            })?;
        }
        let last = from.progress.last_record();
        if last.0 <= lsn {
            return Ok(last);
        }
        from.wait(lsn, PATIENCE).map_err(anyhow::Error::msg)?;
        match from.boundary_at_or_before(lsn)? {
            Some((end, boundary)) => Ok((end, Lsn(boundary.record_start))),
            None => {
                // Before the first record that was ingested there is only the base.
                let root = from.root();
                Ok((root.info.start_lsn, root.info.start_record))
            }
        }
    }

    /// Creates a branch: one index object. Blocks.
    pub fn create_branch(&self, name: &str, from: &str, moment: Moment) -> Result<Arc<Timeline>> {
        self.create_branch_as(name, from, moment, None)
    }

    /// Creates a branch in the place of the one that has its name, in one step for whoever looks: that one is there
    /// until the new one's index is, and from then on it is not. Blocks.
    pub fn replace_branch(&self, name: &str, from: &str, moment: Moment) -> Result<Arc<Timeline>> {
        let old = self.branch(name)?;
        let _claim = self.claim_for_deletion(&old)?;
        let new = self.create_branch_as(name, from, moment, Some(&old))?;
        if let Err(error) = old.mark_deleted() {
            // It is not there any more all the same, and the next start marks it.
            tracing::warn!(timeline = %old.info.id, "can't mark a replaced branch deleted: {error:#}");
        }
        old.stop();
        Ok(new)
    }

    pub(super) async fn finish_replacing(&self, replaced: &Arc<Timeline>) {
        let timeline = Arc::clone(replaced);
        let marked = tokio::task::spawn_blocking(move || timeline.mark_deleted()).await;
        match marked {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let id = replaced.info.id;
                tracing::warn!(timeline = %id, "can't mark a replaced branch deleted: {error:#}");
            }
            Err(panic) => tracing::error!("marking a branch deleted panicked: {panic}"),
        }
    }

    /// Where a branch starts, and whose WAL is before that: none of it was given up with safekeepers that had it.
    fn resolve_parent(
        &self,
        from: &Arc<Timeline>,
        moment: Moment,
    ) -> Result<(Arc<Timeline>, Lsn, Lsn)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (lsn, record_start) = self.resolve_moment(from, moment)?;
            // A moment before the parent's own start belongs to the parent's ancestor.
            let mut parent = Arc::clone(from);
            while let Some((ancestor, branch_lsn)) = &parent.ancestor
                && lsn < *branch_lsn
            {
                parent = Arc::clone(ancestor);
            }
            // What is durable was looked at before it was.
            if lsn <= parent.remote_consistent_lsn() {
                return Ok((parent, lsn, record_start));
            }
            match parent.check_taken() {
                Ok(()) => return Ok((parent, lsn, record_start)),
                Err(error) => {
                    let given_up = error.downcast_ref::<IngestError>();
                    let Some(&IngestError::GivenUp(parts_at)) = given_up else { return Err(error) };
                    // It comes anew from those who go on, who have all before that.
                    let left = deadline.saturating_duration_since(Instant::now());
                    parent.wait_out_doubt(parts_at, left).map_err(anyhow::Error::msg)?;
                }
            }
        }
    }

    fn create_branch_as(
        &self,
        name: &str,
        from: &str,
        moment: Moment,
        replaced: Option<&Timeline>,
    ) -> Result<Arc<Timeline>> {
        let from = self.branch(from)?;
        let (parent, lsn, record_start) = self.resolve_parent(&from, moment)?;
        let mut claim = match replaced {
            None => self.claim_name(name, None)?,
            // Whoever wants the name finds it taken, by the old one or the new one.
            Some(_) => Claim::default(),
        };
        claim.underway = Some(&self.underway);
        {
            let mut underway = self.underway.lock();
            if from.is_deleted() {
                let text = format!("branch '{}' was deleted meanwhile", from.name());
                anyhow::bail!(Refused::NotFound(text));
            }
            if underway.changing.contains(&from.info.id) {
                let text = format!("branch '{}' is being changed", from.name());
                anyhow::bail!(Busy(text));
            }
            underway.parents.push(from.info.id);
            claim.parent = Some(from.info.id);
        }
        let id = TimelineId(rand::random());
        let index = TimelineIndex {
            sequence: 1,
            generation: self.generation.0,
            tenant: parent.info.tenant.to_string(),
            timeline: id.to_string(),
            name: name.to_owned(),
            ancestor: Some(Ancestor { timeline: parent.info.id.to_string(), lsn: lsn.to_string() }),
            start_lsn: lsn.to_string(),
            // Kept here: the ancestor notes boundaries by batches, and may batch differently when
            // it ingests the same WAL again.
            start_record: record_start.to_string(),
            remote_consistent_lsn: lsn.to_string(),
            last_record: record_start.to_string(),
            system_id: parent.info.system_id.0,
            pg_version: parent.info.version.major(),
            segment_size: parent.info.segment_size,
            created: jiff::Timestamp::now().to_string(),
            deleted: false,
            replaces: replaced.map(|old| old.info.id.to_string()),
            frozen: None,
            layers: Vec::new(),
        };
        let tenant = parent.info.tenant;
        let index = wait_for(&self.runtime, async {
            let created = RemoteIndex::create(&self.store, tenant, id, index).await;
            if created.is_err() {
                // Its answer may have been lost: a branch that nobody was told of must not appear
                // at the next start. If this fails too, it does, and can be deleted.
                let _ = self.store.delete(&index_object(tenant, id)).await;
            }
            created
        })?;
        // Decided while that was written.
        if lsn > parent.remote_consistent_lsn()
            && let Err(error) = parent.check_taken()
        {
            wait_for(&self.runtime, self.store.delete(&index_object(tenant, id)))?;
            return Err(error);
        }
        let timeline = self.add(index, Some((parent, lsn)))?;
        self.start_following(&timeline)?;
        Ok(timeline)
    }

    /// Deletes a branch without children. What it shares with nobody is left to the scrub.
    pub fn delete_branch(&self, timeline: &Timeline) -> Result<()> {
        let _claim = self.claim_for_deletion(timeline)?;
        timeline.mark_deleted()?;
        timeline.stop();
        Ok(())
    }

    /// Claims a branch that is about to be deleted: it has no children, and none are being made.
    fn claim_for_deletion(&self, timeline: &Timeline) -> Result<Claim<'_>> {
        let name = timeline.name();
        let mut claim = Claim::default();
        {
            let mut underway = self.underway.lock();
            if underway.parents.contains(&timeline.info.id) {
                let text = format!("a branch of '{name}' is being made: delete that first");
                anyhow::bail!(Refused::Conflict(text));
            }
            claim.changing = Some(self.note_change(&mut underway, timeline.info.id)?);
            claim.underway = Some(&self.underway);
        }
        let children: Vec<_> = self
            .branches()
            .into_iter()
            .filter(|child| {
                child
                    .ancestor
                    .as_ref()
                    .is_some_and(|(parent, _)| parent.info.id == timeline.info.id)
            })
            .map(|child| child.name())
            .collect();
        if !children.is_empty() {
            let children = children.join(", ");
            let text = format!("branch '{name}' has children ({children}): delete them first");
            anyhow::bail!(Refused::Conflict(text));
        }
        Ok(claim)
    }

    /// Gives a branch another name.
    pub fn rename_branch(&self, timeline: &Timeline, new: &str) -> Result<()> {
        let _claim = self.claim_name(new, Some(timeline.info.id))?;
        timeline.rename(new)
    }
}
