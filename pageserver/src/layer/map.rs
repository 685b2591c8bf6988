//! Which layer files a timeline has, in the order in which a read looks at them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Result;
use pgstrata_ids::{Key, Lsn};

use super::{Gathered, LayerFile};

/// Compacted layers of one range of LSNs, disjoint and sorted by key.
#[derive(Clone)]
struct Run {
    start_lsn: Lsn,
    layers: Vec<Arc<LayerFile>>,
}

/// The layer files of a timeline. Immutable: a change makes a new map.
#[derive(Clone, Default)]
pub struct LayerMap {
    /// As frozen, newest first; each may hold any key.
    level0: Vec<Arc<LayerFile>>,
    /// Compacted, newest first. Older than every L0 layer.
    runs: Vec<Run>,
}

impl LayerMap {
    /// A map of these layers.
    pub fn new(layers: impl IntoIterator<Item = Arc<LayerFile>>) -> LayerMap {
        let mut level0 = Vec::new();
        let mut runs: BTreeMap<(Lsn, Lsn), Vec<Arc<LayerFile>>> = BTreeMap::new();
        for layer in layers {
            if layer.entry.level == 0 {
                level0.push(layer);
            } else {
                runs.entry((layer.end_lsn, layer.start_lsn)).or_default().push(layer);
            }
        }
        level0.sort_by_key(|layer| std::cmp::Reverse(layer.end_lsn));
        let runs = runs.into_iter().rev().map(|((_, start_lsn), mut layers)| {
            layers.sort_by_key(|layer| layer.min_key);
            Run { start_lsn, layers }
        });
        LayerMap { level0, runs: runs.collect() }
    }

    /// Every layer.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<LayerFile>> {
        self.level0.iter().chain(self.runs.iter().flat_map(|run| &run.layers))
    }

    /// L0 layers, newest first.
    pub fn level0(&self) -> &[Arc<LayerFile>] {
        &self.level0
    }

    /// Gathers values of `key` with `after` < LSN <= `lsn`, newest first. True when complete.
    pub fn gather(&self, key: &Key, lsn: Lsn, after: Lsn, into: &mut Gathered) -> Result<bool> {
        for layer in &self.level0 {
            if layer.end_lsn <= after {
                return Ok(false);
            }
            if layer.start_lsn < lsn && layer.gather(key, lsn, after, into)? {
                return Ok(true);
            }
        }
        self.gather_runs(key, lsn, after, into)
    }

    /// As [`LayerMap::gather`], from the compacted runs only.
    pub fn gather_runs(
        &self,
        key: &Key,
        lsn: Lsn,
        after: Lsn,
        into: &mut Gathered,
    ) -> Result<bool> {
        for run in &self.runs {
            // An image run has equal ends: it holds for reads at its LSN too.
            if run.start_lsn > lsn {
                continue;
            }
            let after_last = run.layers.partition_point(|layer| layer.min_key <= *key);
            let Some(layer) = after_last.checked_sub(1).map(|at| &run.layers[at]) else { continue };
            if layer.end_lsn <= after {
                return Ok(false);
            }
            if layer.gather(key, lsn, after, into)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds the keys in [`first`, `last`] that any layer starting before `lsn` has.
    pub fn list(&self, first: Key, last: Key, lsn: Lsn, keys: &mut BTreeSet<Key>) -> Result<()> {
        for layer in self.layers().filter(|layer| layer.start_lsn <= lsn) {
            layer.list(first, last, keys)?;
        }
        Ok(())
    }
}
