//! Layer files: a local copy of an immutable object, fetched when first read.
//!
//! The local copy is a cache; where the object store is a directory on this machine there is
//! none, and the object itself is read. Every block is checked when it is unpacked; a copy that
//! fails is thrown away and fetched again once, so that a bit flipped on the local disk costs a
//! download and never a wrong answer. A bit flipped in the object itself is an error.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use pgstrata_blob::{Store, open_regular};
use pgstrata_format::index::LayerEntry;
use pgstrata_format::layer::{self, BlockHandle, FOOTER_SIZE, Footer, HEADER_SIZE, LayerHeader};
use pgstrata_ids::{Key, Lsn, TenantId, TimelineId};

use super::{BlockCache, Descriptors, Gathered, split_flags};

use crate::lock::{RwLock, Turn, assert_none_held, wait_for};

/// Where layer files come from and are kept.
pub struct LayerSource {
    /// The object store.
    pub store: Store,
    /// Runs the store's asynchronous calls for threads that read.
    pub runtime: tokio::runtime::Handle,
    /// Unpacked blocks.
    pub cache: BlockCache,
    /// Open files.
    pub descriptors: Descriptors,
    /// The directory of local copies.
    pub directory: PathBuf,
    /// Bytes downloaded so far.
    pub downloaded: AtomicU64,
}

/// Where an opened layer's bytes are read.
enum Content {
    /// In the file of the layer, which is opened when it is needed.
    Local,
    /// In the object store, since no local copy could be made (a full disk).
    Remote { tried: Instant },
}

struct Opened {
    content: Content,
    index: Vec<BlockHandle>,
}

impl Opened {
    /// Whether it is time to see if a local copy can be made by now.
    fn is_stale(&self) -> bool {
        matches!(&self.content, Content::Remote { tried } if tried.elapsed() > LOCAL_RETRY)
    }
}

/// How often a layer without a local copy tries to get one.
const LOCAL_RETRY: Duration = Duration::from_secs(30);

/// One layer file.
pub struct LayerFile {
    number: u64,
    /// As the timeline's index has it.
    pub entry: LayerEntry,
    /// Changes after this LSN.
    pub start_lsn: Lsn,
    /// Changes up to this LSN.
    pub end_lsn: Lsn,
    /// Least key.
    pub min_key: Key,
    /// Greatest key.
    pub max_key: Key,
    tenant: TenantId,
    timeline: TimelineId,
    object: String,
    /// The local copy; or the object itself, where the store is a directory on this machine.
    local: PathBuf,
    is_object: bool,
    /// Every checksum of the file was seen to hold since this process knows it.
    verified: AtomicBool,
    source: Arc<LayerSource>,
    /// What readers use; the lock is held only to copy or to replace a pointer.
    opened: RwLock<Option<Arc<Opened>>>,
    /// Held by the one who opens or fetches the layer. Taken before `opened`, never after.
    opening: Turn<()>,
    obsolete: AtomicBool,
}

/// Hexadecimal text of a key, for the index.
pub fn key_text(key: &Key) -> String {
    key.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_key(text: &str) -> Result<Key> {
    let digits = text.as_bytes();
    if digits.len() != 2 * Key::SIZE || !text.is_ascii() {
        bail!("'{text}' is not a key");
    }
    let mut key = Key::MIN;
    for (at, byte) in key.0.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16)?;
    }
    Ok(key)
}

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

impl LayerFile {
    /// The layer that an index entry of (`tenant`, `timeline`) describes. Nothing is read yet.
    pub fn new(
        source: &Arc<LayerSource>,
        tenant: TenantId,
        timeline: TimelineId,
        entry: LayerEntry,
    ) -> Result<LayerFile> {
        let object = layer_object(tenant, timeline, &entry.name);
        let itself = source.store.local_path(&object);
        let is_object = itself.is_some();
        let copy = || source.directory.join(timeline.to_string()).join(&entry.name);
        Ok(LayerFile {
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            start_lsn: entry.start_lsn.parse()?,
            end_lsn: entry.end_lsn.parse()?,
            min_key: parse_key(&entry.min_key)?,
            max_key: parse_key(&entry.max_key)?,
            tenant,
            timeline,
            local: itself.unwrap_or_else(copy),
            is_object,
            verified: AtomicBool::new(false),
            object,
            source: Arc::clone(source),
            opened: RwLock::new(None),
            opening: Turn::new(()),
            obsolete: AtomicBool::new(false),
            entry,
        })
    }

    /// Keeps the bytes just written as the local copy. It need not be durable.
    pub fn keep_local(&self, bytes: &[u8]) -> io::Result<()> {
        if self.is_object {
            // What was just written need not be read again to know what it is.
            self.verified.store(true, Ordering::Release);
            return Ok(());
        }
        write_local(&self.local, bytes)
    }

    fn open(&self) -> Result<Arc<Opened>> {
        let usable = || {
            let opened = self.opened.read().clone();
            opened.filter(|opened| !opened.is_stale())
        };
        if let Some(opened) = usable() {
            return Ok(opened);
        }
        // One fetches, the others wait for it.
        let _opening = self.opening.take();
        if let Some(opened) = usable() {
            return Ok(opened);
        }
        if self.is_object && !self.verified.load(Ordering::Acquire) {
            // As a download would: damage anywhere in it is found now, not when that block is read.
            self.fetch()?;
            self.verified.store(true, Ordering::Release);
        }
        let fresh = match self.open_local() {
            Ok(fresh) => fresh,
            Err(error) => {
                if self.local.exists() {
                    tracing::warn!(layer = %self.local.display(), "local copy refused: {error:#}");
                }
                self.download()?
            }
        };
        Ok(self.publish(fresh))
    }

    fn publish(&self, fresh: Opened) -> Arc<Opened> {
        let fresh = Arc::new(fresh);
        *self.opened.write() = Some(Arc::clone(&fresh));
        fresh
    }

    /// The layer's file, known to be this layer's.
    fn file(&self) -> Result<Arc<File>> {
        self.source.descriptors.get(self.number, || {
            let file = open_regular(&self.local)?;
            let size = file.metadata()?.len();
            if size != self.entry.size {
                bail!("the file has {size} bytes instead of {}", self.entry.size);
            }
            let mut header = [0; HEADER_SIZE];
            file.read_exact_at(&mut header, 0)?;
            self.check_owner(&LayerHeader::decode(&header)?)?;
            Ok(file)
        })
    }

    fn open_local(&self) -> Result<Opened> {
        // Opened anew: what was open may be a file that is not there any more.
        self.source.descriptors.forget(self.number);
        let size = self.file()?.metadata()?.len();
        self.open_content(Content::Local, size)
    }

    fn open_content(&self, content: Content, size: u64) -> Result<Opened> {
        let header = self.read(&content, 0, HEADER_SIZE)?;
        self.check_owner(&LayerHeader::decode(&header)?)?;
        let footer_at = size.checked_sub(FOOTER_SIZE as u64).context("the file is too short")?;
        let footer = Footer::decode(&self.read(&content, footer_at, FOOTER_SIZE)?, size)?;
        let index = self.read(&content, footer.index_offset, footer.index_length())?;
        Ok(Opened { content, index: footer.decode_index(&index)? })
    }

    fn read(&self, content: &Content, offset: u64, length: usize) -> Result<Bytes> {
        // A local file may be on a disk that hangs as a store does.
        assert_none_held();
        match content {
            Content::Local => {
                let file = self.file()?;
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, offset)?;
                Ok(bytes.into())
            }
            Content::Remote { .. } => {
                let range = offset..offset.saturating_add(length as u64);
                let read = self.source.store.get_range(&self.object, range);
                Ok(wait_for(&self.source.runtime, read)?)
            }
        }
    }

    fn read_block(&self, opened: &Opened, handle: BlockHandle) -> Result<Vec<u8>> {
        let stored = self.read(&opened.content, handle.offset, handle.length as usize)?;
        Ok(layer::decode_block(&stored)?)
    }

    fn check_owner(&self, header: &LayerHeader) -> Result<()> {
        if (header.tenant, header.timeline) != (self.tenant, self.timeline) {
            bail!("the layer belongs to timeline {}", header.timeline);
        }
        if header.start_lsn != self.start_lsn || header.end_lsn != self.end_lsn {
            bail!("the layer holds {}..{}", header.start_lsn, header.end_lsn);
        }
        let (least, greatest) = (key_text(&header.min_key), key_text(&header.max_key));
        if (&least, &greatest) != (&self.entry.min_key, &self.entry.max_key) {
            bail!("the layer holds keys {least} to {greatest}");
        }
        // The name has the generation that wrote it.
        let generation = self.entry.name.split('-').nth(3).and_then(|text| text.parse().ok());
        if header.kind != self.entry.kind || Some(header.generation.0) != generation {
            bail!("the layer is a {:?} of generation {}", header.kind, header.generation);
        }
        Ok(())
    }

    /// The object's bytes, every checksum checked.
    fn fetch(&self) -> Result<Bytes> {
        let bytes =
            wait_for(&self.source.runtime, self.source.store.get(&self.object, self.entry.size))?;
        let size = bytes.len() as u64;
        let checked = layer::verify(&bytes)
            .map_err(anyhow::Error::from)
            .and_then(|(header, _, _)| self.check_owner(&header))
            .and_then(|()| match size == self.entry.size {
                true => Ok(()),
                false => bail!("it has {size} bytes instead of {}", self.entry.size),
            });
        checked.with_context(|| {
            format!(
                "layer object '{}' in {} can't be used; restore it from a copy",
                self.object,
                self.source.store.name()
            )
        })?;
        self.source.downloaded.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Makes a local copy and opens it. Where none can be kept, blocks are read from the object
    /// one by one: slower, but a full disk is no reason not to answer.
    fn download(&self) -> Result<Opened> {
        let bytes = self.fetch()?;
        if self.is_object {
            return self.open_local();
        }
        match write_local(&self.local, &bytes) {
            Ok(()) => self.open_local(),
            Err(error) => {
                let local = self.local.display();
                tracing::warn!("can't keep a local copy at {local}: {error}");
                let content = Content::Remote { tried: Instant::now() };
                self.open_content(content, bytes.len() as u64)
            }
        }
    }

    fn block(&self, opened: &Arc<Opened>, number: u32) -> Result<Arc<Vec<u8>>> {
        if let Some(block) = self.source.cache.get(self.number, number) {
            return Ok(block);
        }
        let block = Arc::new(self.checked_block(opened, number)?);
        self.source.cache.insert(self.number, number, Arc::clone(&block));
        Ok(block)
    }

    /// A block that passed its checks: of the local copy, or else of a fresh one. Everybody who
    /// reads blocks comes through here.
    fn checked_block(&self, opened: &Arc<Opened>, number: u32) -> Result<Vec<u8>> {
        let handle = opened.index[number as usize];
        let error = match self.read_block(opened, handle) {
            Ok(block) => return Ok(block),
            Err(error) => error,
        };
        tracing::warn!(layer = %self.local.display(), "block refused: {error:#}");
        let _opening = self.opening.take();
        // Somebody may have fetched it while we waited.
        let now = self.opened.read().clone();
        if let Some(now) = now.filter(|now| !Arc::ptr_eq(now, opened))
            && let Ok(block) = self.read_block(&now, handle)
        {
            return Ok(block);
        }
        let again = self.publish(self.download()?);
        self.read_block(&again, handle)
    }

    /// Gathers values of `key` with `after` < LSN <= `lsn`, newest first. True when complete.
    pub fn gather(&self, key: &Key, lsn: Lsn, after: Lsn, into: &mut Gathered) -> Result<bool> {
        if *key < self.min_key || *key > self.max_key {
            return Ok(false);
        }
        let opened = self.open()?;
        let after_last = opened
            .index
            .partition_point(|handle| (handle.first_key, handle.first_lsn) <= (*key, lsn));
        let mut found: Vec<(Lsn, std::ops::Range<usize>)> = Vec::new();
        for number in (0..after_last).rev() {
            let block = self.block(&opened, number as u32)?;
            found.clear();
            for entry in layer::entries(&block) {
                let entry = entry?;
                if entry.key > *key {
                    break;
                }
                if entry.key == *key && entry.lsn <= lsn && entry.lsn > after {
                    found.push((entry.lsn, entry.value));
                }
            }
            for (lsn, range) in found.iter().rev() {
                let (flags, value) = split_flags(&block[range.clone()]);
                if into.push(*lsn, flags, value) {
                    return Ok(true);
                }
            }
            if opened.index[number].first_key < *key {
                break;
            }
        }
        Ok(false)
    }

    /// Calls `each` with every entry whose key is in [`first`, `last`], in order.
    pub fn scan(&self, first: Key, last: Key, each: &mut dyn FnMut(Key, Lsn, &[u8])) -> Result<()> {
        if last < self.min_key || first > self.max_key {
            return Ok(());
        }
        let opened = self.open()?;
        let from =
            opened.index.partition_point(|handle| handle.first_key < first).saturating_sub(1);
        for number in from..opened.index.len() {
            if opened.index[number].first_key > last {
                break;
            }
            let block = self.block(&opened, number as u32)?;
            for entry in layer::entries(&block) {
                let entry = entry?;
                if entry.key >= first && entry.key <= last {
                    each(entry.key, entry.lsn, &block[entry.value]);
                }
            }
        }
        Ok(())
    }

    /// Adds the keys in [`first`, `last`] to `keys`.
    pub fn list(&self, first: Key, last: Key, keys: &mut BTreeSet<Key>) -> Result<()> {
        self.scan(first, last, &mut |key, _, _| {
            keys.insert(key);
        })
    }

    /// Every entry in order, a block at a time, past the cache: for compaction.
    pub fn cursor(self: &Arc<Self>) -> Result<Cursor> {
        Ok(Cursor {
            layer: Arc::clone(self),
            opened: self.open()?,
            next_block: 0,
            block: Vec::new(),
            entries: Vec::new(),
            at: 0,
        })
    }

    /// Removes the local copy of a layer that no index names.
    pub fn forget_local(&self) {
        self.source.descriptors.forget(self.number);
        if !self.is_object
            && let Err(error) = fs::remove_file(&self.local)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(layer = %self.local.display(), "can't remove the local copy: {error}");
        }
    }

    /// The object and the local copy go when the last reader is done. Call this only when the
    /// index that no longer names the layer is durable.
    pub fn set_obsolete(&self) {
        self.obsolete.store(true, Ordering::Release);
    }
}

impl Drop for LayerFile {
    fn drop(&mut self) {
        if !self.obsolete.load(Ordering::Acquire) {
            self.source.descriptors.forget(self.number);
            return;
        }
        self.forget_local();
        let (store, object) = (self.source.store.clone(), std::mem::take(&mut self.object));
        self.source.runtime.spawn(async move {
            // What stays behind is garbage that nothing names any more, and nothing removes yet.
            if let Err(error) = store.delete(&object).await {
                tracing::warn!("{error}");
            }
        });
    }
}

/// A position in a layer's entries.
pub struct Cursor {
    layer: Arc<LayerFile>,
    opened: Arc<Opened>,
    next_block: usize,
    block: Vec<u8>,
    entries: Vec<layer::Entry>,
    at: usize,
}

impl Cursor {
    /// The entry at the position, or `None` at the end.
    pub fn peek(&mut self) -> Result<Option<(Key, Lsn)>> {
        while self.at == self.entries.len() {
            if self.next_block == self.opened.index.len() {
                return Ok(None);
            }
            self.block = self.layer.checked_block(&self.opened, self.next_block as u32)?;
            self.next_block += 1;
            self.entries.clear();
            for entry in layer::entries(&self.block) {
                self.entries.push(entry?);
            }
            self.at = 0;
        }
        let entry = &self.entries[self.at];
        Ok(Some((entry.key, entry.lsn)))
    }

    /// The value at the position last peeked at, with its flags; moves on.
    pub fn take(&mut self) -> &[u8] {
        let range = self.entries[self.at].value.clone();
        self.at += 1;
        &self.block[range]
    }
}

fn write_local(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension("tmp");
    let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // What there is of it would only keep a full disk full.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The object that holds a layer.
pub fn layer_object(tenant: TenantId, timeline: TimelineId, name: &str) -> String {
    format!("tenants/{tenant}/timelines/{timeline}/layers/{name}")
}
