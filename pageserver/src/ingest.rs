//! From WAL to the open layer: each record is decoded once and cut into what each key needs.
//!
//! One thread per timeline. Records are gathered into batches; a batch is inserted as a whole,
//! and only then does the timeline's progress include it, so readers see records whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pgstrata_ids::{Fork, Key, KeyKind, Lsn, RelTag, SlruKind};
use pgstrata_pg_redo::{Changed, ControlState, Effect, Effects, ValueRange, is_truncated};
use pgstrata_pg_wal::{DecodedRecord, WalDecoder};
use rustc_hash::FxHashMap;

use crate::layer::{COMPLETE, Change, PAGE};
use crate::origins::DO_NOT_REPLICATE;
use crate::timeline::{Timeline, boundary_key};
use crate::value::{
    Boundary, BoundaryKind, Database, RelSize, SlruExtent, encode_page, encode_present,
};

/// A batch is inserted at this size, in bytes of values.
const BATCH_BYTES: usize = 256 * 1024;
/// A boundary is noted at least every so many bytes of WAL.
const BOUNDARY_EVERY: u64 = 64 * 1024;
/// A full control state is stored at least every so many counters.
const COUNTERS_BEFORE_FULL: u32 = 512;
/// Pages of an SLRU segment file.
const SLRU_SEGMENT_PAGES: u64 = 32;

/// `wal_level` of a control file: 0 is minimal.
const WAL_LEVEL_REPLICA: i32 = 1;

/// Why WAL could not be ingested.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// Bytes that are no WAL, or not the WAL that goes on from here: another source may have better.
    #[error("{0:#}")]
    Bytes(anyhow::Error),
    /// Committed WAL that can't be understood, and must not be skipped: it stays so.
    #[error("{0:#}")]
    Wal(anyhow::Error),
    /// What was taken in after here was given up with the safekeepers that had it: it is forgotten, and taken from others.
    #[error("what was taken in after {0} was given up with the safekeepers that had it")]
    GivenUp(Lsn),
    /// What is needed besides can't be read or kept now. Ingest may go on with a new [`Ingest`].
    #[error("{0:#}")]
    Storage(anyhow::Error),
}

impl IngestError {
    fn wal(error: impl Into<anyhow::Error>) -> IngestError {
        IngestError::Wal(error.into())
    }
}

/// What one timeline's ingest keeps between records.
pub struct Ingest {
    timeline: Arc<Timeline>,
    decoder: WalDecoder,
    control: ControlState,
    /// Its values are those of the batch: changes refer to them where they were derived.
    effects: Effects,
    batch: Vec<Change>,
    sizes: FxHashMap<RelTag, RelSize>,
    slrus: FxHashMap<SlruKind, SlruExtent>,
    origins: FxHashMap<u16, Option<Lsn>>,
    changed_databases: Vec<(u32, u32)>,
    long_chains: Vec<Key>,
    counters: u32,
    last: (Lsn, Lsn),
    noted: Lsn,
    open_since: Option<Instant>,
}

impl Ingest {
    /// Goes on where the timeline's layers end.
    pub fn new(timeline: Arc<Timeline>) -> Result<Ingest> {
        let (lsn, record_start) = timeline.progress.last_record();
        // An earlier one may have ended between a change of databases and its announcement.
        timeline.forget_databases();
        let info = &timeline.info;
        let decoder = WalDecoder::new(lsn, info.segment_size)
            .with_prev(record_start)
            .with_version(info.version)
            .with_system_identifier(info.system_id.0);
        let control = timeline.control_state(lsn)?;
        Ok(Ingest {
            decoder,
            control,
            effects: Effects::new(),
            batch: Vec::new(),
            sizes: FxHashMap::default(),
            slrus: FxHashMap::default(),
            origins: FxHashMap::default(),
            changed_databases: Vec::new(),
            long_chains: Vec::new(),
            counters: COUNTERS_BEFORE_FULL,
            last: (lsn, record_start),
            noted: lsn,
            // What an earlier one left there is not to wait for more WAL to come.
            open_since: (timeline.open_layer().size() > 0).then(Instant::now),
            timeline,
        })
    }

    /// The position of the next byte to feed.
    pub fn position(&self) -> Lsn {
        self.decoder.feed_position()
    }

    /// Ingests bytes of committed WAL. After an error this ingest is of no use any more; the
    /// timeline has whole batches of records only.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), IngestError> {
        self.decoder.feed(bytes);
        // The decoder lends its buffer to the record, so it is taken out while records are read.
        let mut decoder = std::mem::replace(&mut self.decoder, WalDecoder::new(Lsn(0), 1 << 24));
        let result = self.drain(&mut decoder);
        self.decoder = decoder;
        result?;
        self.insert().map_err(IngestError::Storage)
    }

    fn drain(&mut self, decoder: &mut WalDecoder) -> Result<(), IngestError> {
        while let Some(record) = decoder.poll().map_err(|error| IngestError::Bytes(error.into()))? {
            let decoded = DecodedRecord::decode(record).map_err(IngestError::wal)?;
            let before = self.control.control.wal_level;
            self.effects.derive_next(&decoded, &mut self.control).map_err(IngestError::wal)?;
            let (start, end) = (decoded.lsn, decoded.end);
            if before >= WAL_LEVEL_REPLICA && self.control.control.wal_level < WAL_LEVEL_REPLICA {
                return Err(IngestError::Wal(anyhow::anyhow!(
                    "the record at {start} says wal_level=minimal: what such a server commits is                      not all in its WAL; branch from before {start}, and run with wal_level=replica"
                )));
            }
            self.apply(start, end)
                .with_context(|| format!("the record at {start}"))
                .map_err(IngestError::Storage)?;
            self.last = (end, start);
            if end.0 - self.noted.0 >= BOUNDARY_EVERY {
                self.note(BoundaryKind::Other, 0, end, start);
            }
            if self.effects.buf.len() >= BATCH_BYTES {
                self.insert().map_err(IngestError::Storage)?;
            }
        }
        Ok(())
    }

    /// Adds a change whose value `write` appends.
    fn put(&mut self, key: Key, lsn: Lsn, complete: bool, write: impl FnOnce(&mut Vec<u8>)) {
        self.put_flagged(key, lsn, if complete { COMPLETE } else { 0 }, write);
    }

    fn put_flagged(&mut self, key: Key, lsn: Lsn, flags: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let values = &mut self.effects.buf;
        let start = values.len();
        write(values);
        self.batch.push(Change { key, lsn, flags, value: start..values.len() });
    }

    fn note(&mut self, kind: BoundaryKind, time: i64, end: Lsn, start: Lsn) {
        let boundary = Boundary { kind, time, record_start: start.0 };
        self.put(boundary_key(end), end, true, |to| boundary.encode(to));
        self.noted = end;
    }

    fn apply(&mut self, start: Lsn, end: Lsn) -> Result<()> {
        // Taken out while changes are added beside the values.
        let items = std::mem::take(&mut self.effects.items);
        let result = items.iter().try_for_each(|effect| self.apply_effect(*effect, start, end));
        let changed = |effect: &Effect| match *effect {
            Effect::DatabaseCreate { spc, db, .. } | Effect::DatabaseDrop { spc, db } => {
                Some((spc, db))
            }
            _ => None,
        };
        if result.is_ok() && items.iter().any(|effect| changed(effect).is_some()) {
            // Sizes are looked up through the directories' histories, so these must be visible
            // before the next record. The record itself is whole in the batch.
            self.last = (end, start);
            self.changed_databases.extend(items.iter().filter_map(changed));
            self.insert()?;
        }
        self.effects.items = items;
        result
    }

    /// Adds a change whose value was derived already.
    fn put_derived(&mut self, key: Key, lsn: Lsn, complete: bool, value: ValueRange) {
        let value = value.start as usize..value.end as usize;
        self.batch.push(Change { key, lsn, flags: if complete { COMPLETE } else { 0 }, value });
    }

    fn put_present(&mut self, key: Key, lsn: Lsn, value: ValueRange) {
        let value = value.start as usize..value.end as usize;
        self.put(key, lsn, true, |to| {
            to.push(1);
            to.extend_from_within(value);
        });
    }

    fn apply_effect(&mut self, effect: Effect, start: Lsn, lsn: Lsn) -> Result<()> {
        match effect {
            Effect::Block { rel, block, value, complete, extends } => {
                if self.prepare_block(rel, block, complete, extends, lsn)? {
                    self.put_derived(Key::rel_block(rel, block), lsn, complete, value);
                }
            }
            Effect::RelCreate { rel } => {
                let size = self.size(rel)?;
                if size.blocks.is_none() {
                    self.set_size(rel, RelSize { blocks: Some(0), ..size }, lsn);
                }
            }
            Effect::RelTruncate { rel, blocks } => {
                let size = self.size(rel)?;
                match size.blocks {
                    Some(now) if now > blocks => {
                        self.set_size(rel, RelSize { blocks: Some(blocks), ..size }, lsn);
                    }
                    None if rel.fork == Fork::Main => {
                        self.set_size(rel, RelSize { blocks: Some(0), ..size }, lsn);
                    }
                    _ => {}
                }
            }
            Effect::RelDrop { spc, db, rel } => {
                for fork in Fork::ALL {
                    let rel = RelTag { spc, db, rel, fork };
                    let size = self.size(rel)?;
                    if size.blocks.is_some() {
                        self.set_size(rel, RelSize { blocks: None, ..size }, lsn);
                    }
                }
            }
            Effect::DatabaseCreate { spc, db, copy_from } => {
                let database = match copy_from {
                    Some((spc, db)) => Database::Copied { spc, db },
                    None => Database::Created,
                };
                self.put(Key::database(spc, db), lsn, true, |to| database.encode(to));
            }
            Effect::DatabaseDrop { spc, db } => {
                self.put(Key::database(spc, db), lsn, true, |to| Database::Dropped.encode(to));
            }
            Effect::TablespaceCreate { oid, path } => {
                self.put_present(Key::tablespace(oid), lsn, path);
            }
            Effect::TablespaceDrop { oid } => {
                self.put(Key::tablespace(oid), lsn, true, |to| encode_present(None, to));
            }
            Effect::RelMap { spc, db, file } => {
                self.put_derived(Key::relmap(spc, db), lsn, true, file);
            }
            Effect::SlruPage { kind, page, value, complete } => {
                self.put_derived(Key::slru_page(kind, page), lsn, complete, value);
                if self.slru(kind)?.add(page) {
                    self.put_slru(kind, lsn)?;
                }
            }
            Effect::SlruTruncate { kind, cutoff_page } => {
                self.slru(kind)?.retain(|page| !is_truncated(kind, page, cutoff_page));
                self.put_slru(kind, lsn)?;
            }
            Effect::SlruRemove { kind, first_page, end_page, max_page } => {
                let segment = |page: u64| page / SLRU_SEGMENT_PAGES;
                let count = segment(max_page) + 1;
                let length = (segment(end_page) + count - segment(first_page)) % count;
                let removed = |page| (segment(page) + count - segment(first_page)) % count < length;
                self.slru(kind)?.retain(|page| !removed(page));
                self.put_slru(kind, lsn)?;
            }
            Effect::SlruClear { kind } => {
                self.slru(kind)?.ranges.clear();
                self.put_slru(kind, lsn)?;
            }
            Effect::TwoPhasePut { full_xid, file } => {
                self.put_present(Key::two_phase(full_xid), lsn, file);
                self.note(BoundaryKind::Prepare, 0, lsn, start);
            }
            Effect::TwoPhaseRemove { full_xid } => {
                self.put(Key::two_phase(full_xid), lsn, true, |to| encode_present(None, to));
            }
            Effect::OriginProgress { node: DO_NOT_REPLICATE, .. } => {}
            Effect::OriginProgress { node, remote_lsn, local_lsn, force } => {
                // `replorigin_advance`: back only if the record says so.
                let before = self.origin(node)?;
                if !force && before.is_some_and(|before| before >= remote_lsn) {
                    return Ok(());
                }
                self.origins.insert(node, Some(remote_lsn));
                let mut content = [0; 16];
                content[..8].copy_from_slice(&remote_lsn.0.to_le_bytes());
                content[8..].copy_from_slice(&local_lsn.0.to_le_bytes());
                self.put(Key::origin(node), lsn, true, |to| encode_present(Some(&content), to));
            }
            Effect::OriginDrop { node } => {
                self.origins.insert(node, None);
                self.put(Key::origin(node), lsn, true, |to| encode_present(None, to));
            }
            Effect::Commit { time, .. } => self.note(BoundaryKind::Commit, time, lsn, start),
            Effect::RestorePoint { .. } => self.note(BoundaryKind::Other, 0, lsn, start),
            Effect::BackupEnd { .. } => {}
            Effect::Control(changed) => self.put_control(changed, lsn),
        }
        Ok(())
    }

    fn put_control(&mut self, changed: Changed, lsn: Lsn) {
        let key = Key::control_state();
        if changed == Changed::Full || self.counters >= COUNTERS_BEFORE_FULL {
            self.counters = 0;
            let full = self.control.encode();
            self.put(key, lsn, true, |to| {
                to.push(0);
                to.extend_from_slice(&full);
            });
        } else if changed == Changed::Counters {
            self.counters += 1;
            let counters = self.control.encode_counters();
            self.put(key, lsn, false, |to| {
                to.push(1);
                to.extend_from_slice(&counters);
            });
        }
    }

    fn size(&mut self, rel: RelTag) -> Result<RelSize> {
        if let Some(size) = self.sizes.get(&rel) {
            return Ok(*size);
        }
        let size = self.timeline.rel_size(rel, self.timeline.progress.lsn())?;
        self.sizes.insert(rel, size);
        Ok(size)
    }

    fn set_size(&mut self, rel: RelTag, size: RelSize, lsn: Lsn) {
        let high_water = size.high_water.max(size.blocks.unwrap_or(0));
        let size = RelSize { high_water, ..size };
        self.put(Key::rel_size(rel), lsn, true, |to| size.encode(to));
        self.sizes.insert(rel, size);
    }

    /// Grows the relation to hold a block that changes. False if the change must be dropped.
    ///
    /// Where the relation once was longer, older versions of blocks exist that must not shine
    /// through: blocks of the gap, and a block that starts from nothing, get an explicit zero.
    fn prepare_block(
        &mut self,
        rel: RelTag,
        block: u32,
        complete: bool,
        extends: bool,
        lsn: Lsn,
    ) -> Result<bool> {
        let size = self.size(rel)?;
        let now = size.blocks.unwrap_or(0);
        if size.blocks.is_some() && block < now {
            return Ok(true);
        }
        if !extends {
            return Ok(false);
        }
        let end = if complete { block } else { block.saturating_add(1) };
        for zero in now..end.min(size.high_water) {
            let key = Key::rel_block(rel, zero);
            self.put_flagged(key, lsn, COMPLETE | PAGE, |to| encode_page(&[0; 8192], to));
        }
        self.set_size(rel, RelSize { blocks: Some(block.saturating_add(1)), ..size }, lsn);
        Ok(true)
    }

    fn slru(&mut self, kind: SlruKind) -> Result<&mut SlruExtent> {
        if !self.slrus.contains_key(&kind) {
            let extent = self.timeline.slru_extent(kind, self.timeline.progress.lsn())?;
            self.slrus.insert(kind, extent);
        }
        self.slrus.get_mut(&kind).context("just inserted")
    }

    /// How far a replication origin has come.
    fn origin(&mut self, node: u16) -> Result<Option<Lsn>> {
        if let Some(progress) = self.origins.get(&node) {
            return Ok(*progress);
        }
        let found = self.timeline.origins(node..=node, self.timeline.progress.lsn())?;
        let progress = found.first().map(|(_, remote_lsn)| *remote_lsn);
        self.origins.insert(node, progress);
        Ok(progress)
    }

    fn put_slru(&mut self, kind: SlruKind, lsn: Lsn) -> Result<()> {
        let extent = self.slru(kind)?.clone();
        self.put(Key::slru_extent(kind), lsn, true, |to| extent.encode(to));
        Ok(())
    }

    /// Makes the batch visible.
    fn insert(&mut self) -> Result<()> {
        let (end, start) = self.last;
        if self.timeline.progress.lsn() == end {
            return Ok(());
        }
        if self.noted != end {
            // Every batch ends at a boundary: a layer may be frozen here.
            self.note(BoundaryKind::Other, 0, end, start);
        }
        let open = self.timeline.open_layer();
        let bound = self.timeline.limits.chain;
        open.insert(&self.batch, &mut self.effects.buf, bound, &mut self.long_chains);
        open.set_end_lsn(end);
        // Before anybody may read as of now, what was remembered of earlier goes.
        for (spc, db) in self.changed_databases.drain(..) {
            self.timeline.database_changed(spc, db);
            self.sizes.retain(|rel, _| (rel.spc, rel.db) != (spc, db));
        }
        self.timeline.progress.advance(end, start);
        self.batch.clear();
        self.shorten_chains(end)?;
        self.open_since.get_or_insert_with(Instant::now);
        self.freeze_if_due(false);
        Ok(())
    }

    /// Long chains get an image, so that whoever reads the page next does not replay them all.
    fn shorten_chains(&mut self, lsn: Lsn) -> Result<()> {
        if self.long_chains.is_empty() {
            return Ok(());
        }
        let mut images = Vec::new();
        let mut bytes = Vec::new();
        self.long_chains.sort_unstable();
        self.long_chains.dedup();
        for key in std::mem::take(&mut self.long_chains) {
            if !matches!(key.kind()?, KeyKind::RelBlock | KeyKind::SlruPage) {
                continue;
            }
            let start = bytes.len();
            if let Err(error) = self.timeline.materialise(&key, lsn, Lsn::INVALID, &mut bytes) {
                bytes.truncate(start);
                self.timeline.note_unmakeable(key, error)?;
                continue;
            }
            images.push(Change { key, lsn, flags: COMPLETE | PAGE, value: start..bytes.len() });
        }
        let bound = self.timeline.limits.chain;
        let open = self.timeline.open_layer();
        open.insert(&images, &mut bytes, bound, &mut Vec::new());
        Ok(())
    }

    /// Freezes the open layer if it is large or old enough, and waits while too many layers wait
    /// for their upload: the safekeepers keep what is not read.
    pub fn freeze_if_due(&mut self, now: bool) {
        let Some(since) = self.open_since else { return };
        let limits = self.timeline.limits;
        let old = since.elapsed() >= Duration::from_secs(limits.open_layer_seconds);
        let now = now || self.timeline.take_freeze_request();
        if now || old || self.timeline.open_layer().size() >= limits.open_layer_bytes {
            while self.timeline.frozen_layers() >= limits.frozen_layers
                && !self.timeline.is_stopping()
                // They are forgotten.
                && !self.timeline.is_in_doubt()
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.timeline.freeze();
            self.open_since = None;
        }
    }
}
