//! Logical sizes of branches, for listings.
//!
//! A size is read from layers, which may have to come from the object store, and as of an LSN that ancestors may not
//! have ingested yet. A listing needs none of that: it shows what is known, waits for newer sizes for a moment only, and
//! they are there for the next one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;

use pgstrata_ids::{Lsn, TimelineId};

use crate::lock::Mutex;
use crate::serve::service::{Service, Work};
use crate::timeline::Timeline;

/// How long a listing waits for sizes that are not known yet.
const PATIENCE: Duration = Duration::from_millis(50);
const BLOCK: u64 = 8192;
/// The shared relations' directory.
const GLOBAL: (u32, u32) = (1664, 0);

/// What is known of one branch.
#[derive(Default)]
struct Known {
    /// As of when it was computed last, and what came of it.
    size: Option<(Lsn, u64)>,
    /// Somebody computes it: a second one would only wait for the same.
    is_computed: bool,
}

/// Sizes as they were computed last, of the branches that were listed last.
#[derive(Default)]
pub struct Sizes {
    known: Mutex<HashMap<TimelineId, Known>>,
}

impl Sizes {
    /// Those of these branches whose size is another now and is computed by nobody. Whoever asks computes it, and says so
    /// with [`Sizes::note`]. Branches that are gone are forgotten.
    fn claim(&self, branches: &[Arc<Timeline>]) -> Vec<(Arc<Timeline>, Lsn)> {
        let listed: HashSet<_> = branches.iter().map(|timeline| timeline.info.id).collect();
        let mut known = self.known.lock();
        known.retain(|id, _| listed.contains(id));
        let mut claimed = Vec::new();
        for timeline in branches {
            let lsn = timeline.progress.lsn();
            let one = known.entry(timeline.info.id).or_default();
            if !one.is_computed && one.size.is_none_or(|(at, _)| at != lsn) {
                one.is_computed = true;
                claimed.push((Arc::clone(timeline), lsn));
            }
        }
        claimed
    }

    fn note(&self, id: TimelineId, size: Option<(Lsn, u64)>) {
        if let Some(one) = self.known.lock().get_mut(&id) {
            one.is_computed = false;
            one.size = size.or(one.size);
        }
    }

    fn all(&self) -> HashMap<TimelineId, u64> {
        let known = self.known.lock();
        known.iter().filter_map(|(id, one)| Some((*id, one.size?.1))).collect()
    }
}

/// Bytes of all relations at `lsn`. An error while ancestors have not ingested what it needs.
pub fn logical_size(timeline: &Timeline, lsn: Lsn) -> anyhow::Result<u64> {
    timeline.wait(lsn, Duration::ZERO).map_err(anyhow::Error::msg)?;
    let mut blocks = 0u64;
    let mut databases = timeline.databases(lsn)?;
    databases.push(GLOBAL);
    databases.extend(timeline.implicit_databases(lsn)?);
    for (spc, db) in databases {
        let relations = timeline.relations(spc, db, lsn)?;
        blocks += relations.iter().map(|(_, size)| u64::from(*size)).sum::<u64>();
    }
    Ok(blocks * BLOCK)
}

impl Service {
    /// Sizes of these branches, as far as they are known within a moment, each as of its last record or as of an earlier
    /// listing.
    pub async fn sizes(&self, branches: &[Arc<Timeline>]) -> HashMap<TimelineId, u64> {
        let computing = self.known_sizes().claim(branches).into_iter().map(|(timeline, lsn)| {
            let service = self.clone();
            // A task of its own: it goes on when nobody waits for it any more.
            tokio::spawn(async move {
                let id = timeline.info.id;
                let size = service.run(Work::Size, move |_| logical_size(&timeline, lsn)).await;
                service.known_sizes().note(id, size.ok().map(|size| (lsn, size)));
            })
        });
        // Who is not done in time is not shown.
        let _ = tokio::time::timeout(PATIENCE, join_all(computing)).await;
        self.known_sizes().all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_could_not_be_read_is_the_one_of_before() {
        let (id, sizes) = (TimelineId([1; 16]), Sizes::default());
        sizes.known.lock().entry(id).or_default().is_computed = true;
        assert_eq!(sizes.all().get(&id), None);
        sizes.note(id, Some((Lsn(8), BLOCK)));
        sizes.note(id, None);
        assert_eq!(sizes.all().get(&id), Some(&BLOCK));
        assert!(!sizes.known.lock()[&id].is_computed);
        // Of a branch that is not listed any more nothing is kept.
        sizes.claim(&[]);
        sizes.note(id, Some((Lsn(16), BLOCK)));
        assert!(sizes.all().is_empty());
    }
}
