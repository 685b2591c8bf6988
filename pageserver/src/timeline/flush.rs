//! From the open layer to an L0 file in object storage.
//!
//! Freezing swaps the open layer for an empty one. Flushing writes the frozen layer as a file,
//! uploads it, and names it in the index; only then does `remote_consistent_lsn` advance, which
//! is what allows safekeepers to drop the WAL.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use bytes::Bytes;
use pgstrata_format::index::LayerEntry;
use pgstrata_format::layer::{Codec, LayerHeader, LayerKind, LayerWriter};
use pgstrata_ids::{Key, Lsn};

use super::Timeline;
use super::compact::NewFiles;
use crate::layer::{LayerFile, LayerMap, OpenLayer, key_text, layer_object};
use crate::lock::wait_for;

impl Timeline {
    /// Frozen layers that wait for their upload.
    pub fn frozen_layers(&self) -> usize {
        self.layers.read().frozen.len()
    }

    /// Freezes the open layer if it has anything. Only the thread that ingests may call this.
    pub fn freeze(&self) {
        let mut layers = self.layers.write();
        if layers.open.is_empty() {
            return;
        }
        let end = layers.open.end_lsn();
        let full = std::mem::replace(&mut layers.open, Arc::new(OpenLayer::new(end)));
        layers.frozen.insert(0, full);
    }

    pub(super) fn layer_header(&self, kind: LayerKind, start: Lsn, end: Lsn) -> LayerHeader {
        LayerHeader {
            kind,
            tenant: self.info.tenant,
            timeline: self.info.id,
            generation: self.generation,
            start_lsn: start,
            end_lsn: end,
            min_key: Key::MAX,
            max_key: Key::MIN,
        }
    }

    /// Completes, uploads and describes a layer file. It is not in the index yet.
    pub(super) fn upload(&self, writer: LayerWriter, level: u8) -> Result<Arc<LayerFile>> {
        let (header, bytes) = writer.finish();
        let serial = self.layer_serial.fetch_add(1, Ordering::Relaxed);
        // The generation and the serial make the name unique among all writers ever.
        let name = format!(
            "{}{level}-{:016X}-{:016X}-{:08}-{serial:08}",
            if header.kind == LayerKind::Image { "image" } else { "delta" },
            header.start_lsn.0,
            header.end_lsn.0,
            self.generation.0,
        );
        let entry = LayerEntry {
            name,
            kind: header.kind,
            level,
            start_lsn: header.start_lsn.to_string(),
            end_lsn: header.end_lsn.to_string(),
            min_key: key_text(&header.min_key),
            max_key: key_text(&header.max_key),
            size: bytes.len() as u64,
        };
        let object = layer_object(self.info.tenant, self.info.id, &entry.name);
        let file = LayerFile::new(&self.source, self.info.tenant, self.info.id, entry)?;
        // A full local disk must not stop what is durable elsewhere: the copy is only a cache.
        if let Err(error) = file.keep_local(&bytes) {
            tracing::warn!("no local copy of layer '{}': {error}", file.entry.name);
        }
        let put = self.source.store.put(&object, Bytes::from(bytes));
        if let Err(error) = wait_for(&self.source.runtime, put) {
            // The next attempt is another file.
            file.forget_local();
            return Err(error.into());
        }
        Ok(Arc::new(file))
    }

    /// Uploads the oldest frozen layer. Returns false if there was none.
    pub fn flush_one(&self) -> Result<bool> {
        let _flushing = self.flushing.take();
        let Some(frozen) = self.layers.read().frozen.last().cloned() else { return Ok(false) };
        // Not uploaded in vain, again and again.
        self.check_taken()?;
        let (start, end) = (frozen.start_lsn(), frozen.end_lsn());
        let mut writer =
            LayerWriter::new(self.layer_header(LayerKind::Delta, start, end), Codec::Lz4);
        frozen.for_each_sorted(|key, lsn, flags, value| {
            writer.push_parts(key, lsn, &[&[flags], value]);
        });
        let record_start = self.record_start_at(end)?;
        let file = self.upload(writer, 0).context("can't upload a layer")?;
        let mut new = NewFiles(vec![Arc::clone(&file)]);
        self.check_taken()?;
        self.index.update(|index| {
            index.layers.push(file.entry.clone());
            index.remote_consistent_lsn = end.to_string();
            index.last_record = record_start.to_string();
            index.generation = self.generation.0;
        })?;
        let mut layers = self.layers.write();
        let files = new.take();
        layers.map = Arc::new(LayerMap::new(layers.map.layers().cloned().chain(files)));
        layers.frozen.pop();
        drop(layers);
        self.remote_consistent.store(end.0, Ordering::Release);
        // Decided between the look and that: it is too late, and said as soon as it is to be forgotten.
        if self.check_taken().is_ok() {
            self.believing.lock().durable(end);
        }
        Ok(true)
    }

    /// The start of the record that ends at `lsn`: ingest notes it whenever it freezes.
    fn record_start_at(&self, lsn: Lsn) -> Result<Lsn> {
        let boundary = self.boundary_at_or_before(lsn)?;
        let (end, boundary) = boundary.context("a layer without a record boundary")?;
        anyhow::ensure!(end == lsn, "no record boundary was noted at {lsn}");
        Ok(Lsn(boundary.record_start))
    }

    /// Freezes and uploads everything ingested. Only for a timeline whose ingest has ended.
    pub fn flush_all(&self) -> Result<()> {
        self.freeze();
        while self.flush_one()? {}
        Ok(())
    }

    /// Writes image layers for a base import: entries must come sorted by key.
    pub fn import_image(
        &self,
        lsn: Lsn,
        record_start: Lsn,
        entries: impl Iterator<Item = Result<(Key, Vec<u8>)>>,
    ) -> Result<()> {
        let _flushing = self.flushing.take();
        let mut files = NewFiles::default();
        let mut writer =
            LayerWriter::new(self.layer_header(LayerKind::Image, lsn, lsn), Codec::small());
        for entry in entries {
            let (key, stored) = entry?;
            if writer.size() >= self.limits.layer_bytes {
                let header = self.layer_header(LayerKind::Image, lsn, lsn);
                let full = std::mem::replace(&mut writer, LayerWriter::new(header, Codec::small()));
                files.0.push(self.upload(full, 1)?);
            }
            writer.push(key, lsn, &stored);
        }
        if !writer.is_empty() {
            files.0.push(self.upload(writer, 1)?);
        }
        self.index.update(|index| {
            index.layers.extend(files.0.iter().map(|file| file.entry.clone()));
            index.remote_consistent_lsn = lsn.to_string();
            index.last_record = record_start.to_string();
        })?;
        let mut layers = self.layers.write();
        layers.map = Arc::new(LayerMap::new(layers.map.layers().cloned().chain(files.take())));
        layers.open = Arc::new(OpenLayer::new(lsn));
        drop(layers);
        self.remote_consistent.store(lsn.0, Ordering::Release);
        self.progress.advance(lsn, record_start);
        Ok(())
    }
}
