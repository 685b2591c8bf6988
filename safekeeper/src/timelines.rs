//! All timelines of this safekeeper, by name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use pgstrata_ids::{TenantId, TimelineId};
use pgstrata_quorum::Refusal;
use pgstrata_wire::safekeeper::{Greeting, RefusedReason};

use crate::storage_error::StorageError;
use crate::timeline::{OpenContext, Timeline};

/// Most timelines of one safekeeper.
pub const MAX_TIMELINES: usize = 10_000;

/// A timeline's full name.
pub type TimelineKey = (TenantId, TimelineId);

#[derive(Clone, Debug)]
enum Slot {
    Open(Arc<Timeline>),
    /// Its files can't be used, for this reason. The others are served all the same.
    Damaged(String),
}

/// See the module.
#[derive(Debug)]
pub struct Timelines {
    context: OpenContext,
    directory: PathBuf,
    slots: RwLock<HashMap<TimelineKey, Slot>>,
    creating: Mutex<()>,
}

impl Timelines {
    /// Opens everything in `directory`.
    pub fn open(context: OpenContext, directory: &Path) -> Result<Timelines, StorageError> {
        let timelines = Timelines {
            context,
            directory: directory.to_owned(),
            slots: RwLock::default(),
            creating: Mutex::new(()),
        };
        for tenant in timelines.names::<TenantId>(directory)? {
            let of_tenant = directory.join(tenant.to_string());
            for timeline in timelines.names::<TimelineId>(&of_tenant)? {
                timelines.open_one((tenant, timeline), &of_tenant.join(timeline.to_string()))?;
            }
        }
        Ok(timelines)
    }

    fn names<T: std::str::FromStr>(&self, directory: &Path) -> Result<Vec<T>, StorageError> {
        let names = self.context.disk.list(directory);
        let names = names.map_err(StorageError::wrap("list", directory))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn open_one(&self, key: TimelineKey, directory: &Path) -> Result<(), StorageError> {
        let names = self.context.disk.list(directory);
        let names = names.map_err(StorageError::wrap("list", directory))?;
        if !names.iter().any(|name| name == "control") {
            let has_wal = names.iter().any(|name| name.len() == 24);
            if !has_wal {
                // A crash while it was created: nobody was told that it exists.
                return Ok(());
            }
        }
        let slot = match Timeline::open(&self.context, directory) {
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
                Slot::Damaged(error.to_string())
            }
        };
        self.slots.write().insert(key, slot);
        Ok(())
    }

    /// Who we are.
    pub fn context(&self) -> &OpenContext {
        &self.context
    }

    /// All that can be served.
    pub fn all(&self) -> Vec<Arc<Timeline>> {
        let slots = self.slots.read();
        let open = slots.values().filter_map(|slot| match slot {
            Slot::Open(timeline) => Some(Arc::clone(timeline)),
            Slot::Damaged(_) => None,
        });
        open.collect()
    }

    /// Those that can't, and why.
    pub fn damaged(&self) -> Vec<(TimelineKey, String)> {
        let slots = self.slots.read();
        let damaged = slots.iter().filter_map(|(key, slot)| match slot {
            Slot::Open(_) => None,
            Slot::Damaged(reason) => Some((*key, reason.clone())),
        });
        damaged.collect()
    }

    /// The timeline of that name.
    pub fn get(&self, key: TimelineKey) -> Result<Arc<Timeline>, RefusedReason> {
        match self.slots.read().get(&key) {
            Some(Slot::Open(timeline)) => Ok(Arc::clone(timeline)),
            Some(Slot::Damaged(reason)) => Err(RefusedReason::Storage(reason.clone())),
            None => Err(RefusedReason::UnknownTimeline),
        }
    }

    /// The timeline of a greeting, created if it is new.
    pub fn greet(&self, greeting: &Greeting) -> Result<Arc<Timeline>, RefusedReason> {
        let parameters = &greeting.parameters;
        let key = (parameters.tenant, parameters.timeline);
        let timeline = match self.get(key) {
            Err(RefusedReason::UnknownTimeline) => self.create(key, greeting)?,
            other => other?,
        };
        if timeline.parameters() != parameters {
            return Err(RefusedReason::Mismatch(format!(
                "timeline {} was created with other parameters: {:?} here, {parameters:?} there",
                key.1,
                timeline.parameters()
            )));
        }
        // A second quorum under the same number is refused before it can ask for anything.
        if let Err(refusal) = timeline.check_configuration(&greeting.configuration) {
            return Err(RefusedReason::Quorum(refusal));
        }
        if !greeting.addresses.is_empty() {
            timeline.note_addresses(&greeting.addresses);
        }
        Ok(timeline)
    }

    fn create(
        &self,
        key: TimelineKey,
        greeting: &Greeting,
    ) -> Result<Arc<Timeline>, RefusedReason> {
        if !greeting.configuration.contains(self.context.node) {
            return Err(RefusedReason::Quorum(Refusal::NotMember));
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
        let created = Timeline::create(&self.context, &directory, greeting);
        let created = created.inspect_err(|error| {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.context.latch.throw(&error.to_string());
            }
        });
        let timeline =
            Arc::new(created.map_err(|error| RefusedReason::Storage(error.to_string()))?);
        tracing::info!(timeline = %key.1, start_lsn = %greeting.parameters.start_lsn, "timeline created");
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
