//! L0 to L1: many layers of every key become few layers of disjoint keys, and long chains of
//! changes of its input end in an image. Each compaction adds a run that reads look through: they are not merged yet, so a
//! read costs more the longer the history is.
//!
//! Compaction loses nothing: every (key, LSN) of its input is in its output, images come on top.
//! The order that makes a crash harmless: upload the new layers, name them (and no longer the old
//! ones) in the index, and only then let the old objects go.

use std::sync::Arc;

use anyhow::Result;
use pgstrata_format::layer::{Codec, LayerKind, LayerWriter};
use pgstrata_ids::{Key, KeyKind, Lsn};

use super::Timeline;
use crate::layer::{COMPLETE, Cursor, Gathered, LayerFile, LayerMap, PAGE};

impl Timeline {
    /// Whether there are enough L0 layers to compact.
    pub fn wants_compaction(&self) -> bool {
        self.layers.read().map.level0().len() >= self.limits.level0_layers
    }

    /// Compacts all present L0 layers into one run of L1 layers. Returns how many there were.
    pub fn compact(&self) -> Result<usize> {
        let _compacting = self.compacting.take();
        if !self.has_ancestors() {
            // Images need the pages that the branch started with.
            return Ok(0);
        }
        let map = Arc::clone(&self.layers.read().map);
        let old: Vec<_> = map.level0().to_vec();
        let (Some(newest), Some(oldest)) = (old.first(), old.last()) else { return Ok(0) };
        let (start, end) = (oldest.start_lsn, newest.end_lsn);
        let mut files = NewFiles::default();
        self.merge(&old, start, end, &mut files)?;

        let _flushing = self.flushing.take();
        let replaced = |name: &str| old.iter().any(|layer| layer.entry.name == name);
        self.index.update(|index| {
            index.layers.retain(|entry| !replaced(&entry.name));
            index.layers.extend(files.0.iter().map(|file| file.entry.clone()));
        })?;
        let mut layers = self.layers.write();
        let kept = layers.map.layers().filter(|layer| !replaced(&layer.entry.name)).cloned();
        layers.map = Arc::new(LayerMap::new(kept.chain(files.take())));
        drop(layers);
        old.iter().for_each(|layer| layer.set_obsolete());
        Ok(old.len())
    }

    fn merge(
        &self,
        old: &[Arc<LayerFile>],
        start: Lsn,
        end: Lsn,
        files: &mut NewFiles,
    ) -> Result<()> {
        // Oldest first, so that among equal (key, LSN) the order of insertion is kept.
        let mut cursors: Vec<Cursor> =
            old.iter().rev().map(|layer| layer.cursor()).collect::<Result<_>>()?;
        let mut writer =
            LayerWriter::new(self.layer_header(LayerKind::Delta, start, end), Codec::small());
        let mut gathered = Gathered::default();
        while let Some(key) = least_key(&mut cursors)? {
            if writer.size() >= self.limits.layer_bytes {
                let header = self.layer_header(LayerKind::Delta, start, end);
                let full = std::mem::replace(&mut writer, LayerWriter::new(header, Codec::small()));
                files.0.push(self.upload(full, 1)?);
            }
            let mut last = Lsn::INVALID;
            let (mut chain, mut complete) = (0, false);
            for cursor in &mut cursors {
                while let Some((at, lsn)) = cursor.peek()?
                    && at == key
                {
                    let stored = cursor.take();
                    complete = stored[0] & COMPLETE != 0;
                    chain = if complete { 0 } else { chain + 1 };
                    writer.push(key, lsn, stored);
                    last = lsn;
                }
            }
            let kind = key.kind()?;
            let mergeable = matches!(kind, KeyKind::RelBlock | KeyKind::SlruPage);
            if !mergeable || complete {
                continue;
            }
            gathered.clear();
            self.gather(&key, last, Lsn::INVALID, &mut gathered)?;
            if gathered.len() as u32 > self.limits.compacted_chain {
                let mut stored = vec![COMPLETE | PAGE];
                match self.materialise(&key, last, last, &mut stored) {
                    Ok(()) => writer.push(key, last, &stored),
                    // Its changes are kept as they are.
                    Err(error) => self.note_unmakeable(key, error)?,
                }
            }
        }
        if !writer.is_empty() {
            files.0.push(self.upload(writer, 1)?);
        }
        Ok(())
    }
}

/// Layers that no index names yet. Those that it never will are no use on the local disk.
#[derive(Default)]
pub(super) struct NewFiles(pub(super) Vec<Arc<LayerFile>>);

impl NewFiles {
    pub(super) fn take(&mut self) -> Vec<Arc<LayerFile>> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| file.forget_local());
    }
}

fn least_key(cursors: &mut [Cursor]) -> Result<Option<Key>> {
    let mut least = None;
    for cursor in cursors {
        if let Some((key, _)) = cursor.peek()?
            && least.is_none_or(|least| key < least)
        {
            least = Some(key);
        }
    }
    Ok(least)
}
