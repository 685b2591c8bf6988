//! The other safekeepers that this one has met as members of some timeline, and which life of
//! their directories that was.
//!
//! One that lost its directory has forgotten its promises: under its old node id it would vote
//! again with an empty log. Whoever met it before knows that it is another incarnation now.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_env::{Disk, replace_file};
use pgstrata_format::safekeeper::{MAX_MEMBERS_MET, decode_members, encode_members};
use pgstrata_ids::{Incarnation, NodeId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::safekeeper::RefusedReason;

use crate::identity::Identity;
use crate::latch::Latch;
use crate::storage_error::StorageError;

/// See the module.
#[derive(Debug)]
pub struct Members {
    own: Identity,
    disk: Arc<dyn Disk>,
    path: PathBuf,
    latch: Latch,
    met: Mutex<BTreeMap<NodeId, Incarnation>>,
}

impl Members {
    /// Those of a safekeeper's `directory`.
    pub fn open(
        own: Identity,
        disk: Arc<dyn Disk>,
        directory: &Path,
        latch: Latch,
    ) -> Result<Members, StorageError> {
        let path = directory.join("members");
        let met = match disk.open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(StorageError::wrap("open", &path)(error)),
            Ok(file) => {
                let most = 64 + MAX_MEMBERS_MET as u64 * 24;
                let size = file.size().map_err(StorageError::wrap("measure", &path))?.min(most);
                let mut bytes = vec![0; size as usize];
                file.read_at(&mut bytes, 0).map_err(StorageError::wrap("read", &path))?;
                decode_members(&bytes).map_err(|error| StorageError::Damaged {
                    path: path.clone(),
                    reason: error.to_string(),
                })?
            }
        };
        Ok(Members { own, disk, path, latch, met: Mutex::new(met) })
    }

    /// Who we are.
    pub fn own(&self) -> Identity {
        self.own
    }

    /// Those that were met of a configuration's members.
    pub fn known(&self, configuration: &Configuration) -> Vec<(NodeId, Incarnation)> {
        let met = self.met.lock();
        configuration.nodes().filter_map(|node| Some((node, *met.get(&node)?))).collect()
    }

    /// Keeps who the members are that somebody counts votes of, durably on return. Refused if one
    /// of them is not who it was.
    pub fn meet(&self, members: &[(NodeId, Incarnation)]) -> Result<(), RefusedReason> {
        // Held over the write: what is in memory is what is on disk, and it happens once for each
        // member of the cluster.
        let mut met = self.met.lock();
        let mut more = met.clone();
        for &(node, incarnation) in members {
            let known = match node == self.own.node {
                true => self.own.incarnation,
                false => *more.entry(node).or_insert(incarnation),
            };
            if known != incarnation {
                return Err(RefusedReason::Mismatch(other_incarnation(node)));
            }
        }
        if more == *met {
            return Ok(());
        }
        if more.len() > MAX_MEMBERS_MET {
            let text = format!("{MAX_MEMBERS_MET} safekeepers were met, the most that are kept");
            return Err(RefusedReason::Storage(text));
        }
        if let Some(reason) = self.latch.reason() {
            return Err(RefusedReason::Storage(StorageError::Latched(reason).to_string()));
        }
        let replaced = replace_file(self.disk.as_ref(), &self.path, &encode_members(&more))
            .map_err(StorageError::wrap("replace", &self.path));
        if let Err(error) = replaced {
            if !matches!(error, StorageError::DiskFull { .. }) {
                self.latch.throw(&error.to_string());
            }
            return Err(RefusedReason::Storage(error.to_string()));
        }
        *met = more;
        Ok(())
    }
}

/// What is wrong with a safekeeper that others knew as another incarnation.
fn other_incarnation(node: NodeId) -> String {
    format!(
        "safekeeper {node} has another directory than the one that joined: what it promised and \
         stored is lost, and under its old id it must not vote"
    )
}
