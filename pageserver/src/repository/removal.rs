//! What a deleted branch leaves outside the page server: its WAL, with the safekeepers and in object storage.
//!
//! That it is deleted is written into the object that says who keeps the WAL, which its safekeepers read in their turn. What is
//! archived is removed here; the page server's own objects stay.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use bytes::Bytes;
use pgstrata_blob::{CasOutcome, Store};
use pgstrata_format::quorum::{LIMIT, Quorum};
use pgstrata_ids::{TenantId, TimelineId};

use super::Repository;

/// A timeline, the one that it begins in, and whether it was deleted.
type Kin = BTreeMap<TimelineId, (Option<TimelineId>, bool)>;

/// Those deleted whose WAL nobody needs: no branch has them among its ancestors.
fn unneeded(kin: &Kin) -> BTreeSet<TimelineId> {
    let mut needed = BTreeSet::new();
    for (&id, &(_, is_deleted)) in kin {
        let mut at = Some(id).filter(|_| !is_deleted);
        while let Some(id) = at.filter(|id| needed.insert(*id)) {
            at = kin.get(&id).and_then(|(ancestor, _)| *ancestor);
        }
    }
    kin.keys().copied().filter(|id| !needed.contains(id)).collect()
}

impl Repository {
    /// Has the WAL of deleted branches removed that is not in `done` yet, in which they are then. What fails is tried again by
    /// the next call. Waits for the store.
    pub(super) fn remove_wal_of_deleted(&self, done: &mut BTreeSet<TimelineId>) {
        // One that can't be opened may begin in any other.
        if !self.broken().is_empty() {
            return;
        }
        let all = self.all();
        let kin = all.iter().map(|timeline| {
            let ancestor = timeline.ancestor.as_ref().map(|(parent, _)| parent.info.id);
            (timeline.info.id, (ancestor, timeline.is_deleted()))
        });
        let unneeded = unneeded(&kin.collect());
        for timeline in all {
            let id = timeline.info.id;
            if !unneeded.contains(&id) || done.contains(&id) {
                continue;
            }
            let removed =
                super::wait_for(&self.runtime, remove(&self.store, timeline.info.tenant, id));
            match removed {
                Ok(()) => {
                    done.insert(id);
                }
                Err(error) => {
                    tracing::warn!(timeline = %id, "WAL of a deleted branch can't be removed: {error:#}");
                }
            }
        }
    }
}

async fn remove(store: &Store, tenant: TenantId, id: TimelineId) -> Result<()> {
    let name = Quorum::object_name(tenant, id);
    loop {
        let (bytes, version) = match store.get_versioned(&name, LIMIT).await {
            Ok(found) => found,
            // No compute ever wrote to it.
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let quorum = Quorum::decode(&bytes).with_context(|| name.clone())?;
        if quorum.is_deleted {
            break;
        }
        store.check_claim().await?;
        let deleted = Bytes::from(Quorum { is_deleted: true, ..quorum }.encode());
        if let CasOutcome::Swapped(_) =
            store.compare_and_swap(&name, Some(&version), deleted).await?
        {
            tracing::info!(timeline = %id, "its branch is deleted: the WAL goes");
            break;
        }
    }
    for object in store.list(&format!("tenants/{tenant}/timelines/{id}/wal/")).await? {
        store.check_claim().await?;
        store.delete(&object.path).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_branch_begins_in_is_needed_also_if_it_was_deleted() {
        let id = |n: u8| TimelineId([n; 16]);
        let kin = |all: &[(u8, Option<u8>, bool)]| -> Kin {
            all.iter().map(|&(n, of, deleted)| (id(n), (of.map(id), deleted))).collect()
        };
        let unneeded = |all| unneeded(&kin(all)).into_iter().map(|id| id.0[0]).collect::<Vec<_>>();
        assert_eq!(unneeded(&[(1, None, false), (2, Some(1), true)]), [2]);
        // A reset leaves the one before as an ancestor.
        assert_eq!(unneeded(&[(1, None, true), (2, Some(1), true), (3, Some(2), false)]), [0; 0]);
        assert_eq!(unneeded(&[(1, None, true), (2, Some(1), true), (3, Some(1), false)]), [2]);
        assert_eq!(unneeded(&[(1, None, true), (2, Some(1), true), (3, Some(2), true)]), [1, 2, 3]);
        assert_eq!(unneeded(&[(1, None, false), (2, Some(1), false)]), [0; 0]);
    }
}
