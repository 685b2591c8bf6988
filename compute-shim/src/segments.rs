//! The page cache: sparse relation files, filled on demand.
//!
//! A segment is resolved once, when PostgreSQL first names it: if the page server knows the
//! relation, a sparse file of the right size takes its place in the data directory. Its blocks
//! arrive when they are read. What PostgreSQL writes stays here until the compute ends.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use pgstrata_compute_shared::path::SegmentId;
use pgstrata_compute_shared::{Found, SEGMENT_BLOCKS, SLOTS, SharedMap, block, segment};
use pgstrata_ids::{Fork, RelTag};

use crate::pages::PageClient;

const BLOCK_SIZE: u64 = 8192;
/// Pages fetched in one request, at most.
const BATCH: u32 = 64;
/// Pages fetched ahead of the first read of a relation.
const FIRST_WINDOW: u32 = 4;

/// What a sequential reader has shown so far.
#[derive(Clone, Copy, Default)]
struct Window {
    next: u32,
    size: u32,
}

struct Mapped {
    file: File,
    window: Mutex<Window>,
}

#[derive(Default)]
struct Table {
    /// Database directories that were removed here.
    dropped: HashSet<(u32, u32)>,
    next_slot: u32,
}

/// The relation segments of a running compute.
pub struct Segments {
    map: SharedMap,
    pages: Arc<PageClient>,
    data: PathBuf,
    catalog_directory: String,
    table: Mutex<Table>,
    open: RwLock<HashMap<u32, Arc<Mapped>>>,
}

fn tag(id: &SegmentId) -> Option<RelTag> {
    let fork = Fork::from_number(id.fork)?;
    Some(RelTag { spc: id.spc, db: id.db, rel: id.rel, fork })
}

impl Segments {
    /// Of the data directory `data`. `catalog_directory` is the version's directory below a
    /// tablespace, such as `PG_15_202209061`.
    pub fn new(
        map: SharedMap,
        pages: Arc<PageClient>,
        data: PathBuf,
        catalog_directory: String,
    ) -> Segments {
        Segments {
            map,
            pages,
            data,
            catalog_directory,
            table: Mutex::default(),
            open: RwLock::default(),
        }
    }

    fn path(&self, id: &SegmentId) -> PathBuf {
        let directory = match id.spc {
            1664 => "global".to_owned(),
            1663 => format!("base/{}", id.db),
            spc => format!("pg_tblspc/{spc}/{}/{}", self.catalog_directory, id.db),
        };
        let fork = Fork::from_number(id.fork).map_or("", Fork::suffix);
        let mut name = format!("{}{fork}", id.rel);
        if id.segment > 0 {
            name.push_str(&format!(".{}", id.segment));
        }
        self.data.join(directory).join(name)
    }

    /// Puts a segment into the table. Says what it is.
    pub fn resolve(&self, id: &SegmentId) -> io::Result<Found> {
        // Asked before the lock is taken: the page server may be slow.
        let tag = tag(id).ok_or_else(|| io::Error::other("an unknown fork"))?;
        if let Some(found) = self.map.find(id) {
            return Ok(found);
        }
        // The free space map is only a hint, and the page server does not keep it.
        let known = match tag.fork {
            Fork::FreeSpace => None,
            _ => self.pages.size(tag)?,
        };
        let template = if known.is_none() && tag.fork == Fork::Main && id.segment == 0 {
            self.pages.size(tag.with_fork(Fork::Init))?
        } else {
            None
        };
        let mut table = self.table.lock();
        if let Some(found) = self.map.find(id) {
            return Ok(found);
        }
        let gone = table.dropped.contains(&(id.spc, id.db));
        match (known, template) {
            (Some(blocks), _) if !gone => self.place(&mut table, id, blocks),
            (None, Some(blocks)) if !gone => {
                self.copy_template(id, tag, blocks)?;
                self.insert(id, segment::KEPT, 0, 0)?;
                Ok(Found::Local)
            }
            _ => Ok(self.local(id)),
        }
    }

    fn insert(&self, id: &SegmentId, state: u32, slot: u32, blocks: u32) -> io::Result<u32> {
        self.map
            .insert(id, state, slot, blocks)
            .ok_or_else(|| io::Error::other("too many relation segments for one compute"))
    }

    /// A segment of which the page server has nothing.
    fn local(&self, id: &SegmentId) -> Found {
        self.map.insert_local(id);
        Found::Local
    }

    /// Makes the sparse file of a segment of a relation of `total` blocks.
    fn place(&self, table: &mut Table, id: &SegmentId, total: u32) -> io::Result<Found> {
        let first = u64::from(id.segment) * u64::from(SEGMENT_BLOCKS);
        let blocks = u64::from(total).saturating_sub(first).min(SEGMENT_BLOCKS.into()) as u32;
        // A relation that ends exactly at a segment's end may or may not have an empty segment
        // behind it; PostgreSQL makes one when it needs it.
        if blocks == 0 && id.segment > 0 {
            return Ok(self.local(id));
        }
        if table.next_slot as usize >= SLOTS {
            return Err(io::Error::other("too many relation segments for one compute"));
        }
        let path = self.path(id);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(u64::from(blocks) * BLOCK_SIZE)?;
        let slot = table.next_slot;
        table.next_slot += 1;
        let mapped = Mapped { file, window: Mutex::default() };
        // Who finds the entry looks for the file next.
        let mut open = self.open.write();
        let entry = self.insert(id, segment::MAPPED, slot, blocks)?;
        open.insert(entry, Arc::new(mapped));
        Ok(Found::Mapped(entry))
    }

    /// An unlogged relation starts as its init fork says.
    fn copy_template(&self, id: &SegmentId, tag: RelTag, blocks: u32) -> io::Result<()> {
        let init = tag.with_fork(Fork::Init);
        let file = File::create(self.path(id))?;
        let mut at = 0;
        while at < blocks {
            let pages = self.pages.pages(init, at, BATCH.min(blocks - at))?;
            if pages.is_empty() {
                return Err(io::Error::other(format!("{init} ends at block {at} of {blocks}")));
            }
            file.write_all_at(&pages, u64::from(at) * BLOCK_SIZE)?;
            at += (pages.len() as u64 / BLOCK_SIZE) as u32;
        }
        Ok(())
    }

    /// Puts every file of a database directory into place.
    pub fn list_database(&self, spc: u32, db: u32) -> io::Result<()> {
        for (rel, blocks) in self.pages.relations(spc, db)? {
            let mut segment = 0;
            loop {
                let fork = rel.fork as u8;
                let id = SegmentId { spc, db, rel: rel.rel, fork, segment };
                self.resolve(&id)?;
                segment += 1;
                if u64::from(segment) * u64::from(SEGMENT_BLOCKS) >= u64::from(blocks) {
                    break;
                }
            }
            if rel.fork == Fork::Init {
                let id = SegmentId { spc, db, rel: rel.rel, fork: 0, segment: 0 };
                self.resolve(&id)?;
            }
        }
        Ok(())
    }

    /// A database directory was removed: nothing of the page server's is in it any more.
    pub fn drop_database(&self, spc: u32, db: u32) {
        self.table.lock().dropped.insert((spc, db));
    }

    /// Brings blocks into the local file, and some that are likely to be wanted next.
    pub fn fill(&self, id: &SegmentId, first: u32, count: u32) -> io::Result<()> {
        let entry = match self.map.find(id) {
            Some(Found::Mapped(entry)) => entry,
            // It was unlinked meanwhile.
            Some(Found::Local) => return Ok(()),
            None => return Err(io::Error::other("a segment that was never resolved")),
        };
        let Some(mapped) = self.open.read().get(&entry).cloned() else {
            return Err(io::Error::other("a segment without a file"));
        };
        let known = self.map.blocks(entry);
        let end = first.saturating_add(count).min(known);
        let ahead = self.window(&mapped, first, end).min(known);
        let mut at = first;
        while at < end {
            at = self.fill_some(id, entry, &mapped, at, end, ahead)?;
        }
        Ok(())
    }

    /// How far to read: readers that go on where they left off get growing windows.
    fn window(&self, mapped: &Mapped, first: u32, end: u32) -> u32 {
        let mut window = mapped.window.lock();
        let sequential = first == window.next || first == 0;
        window.size = match sequential {
            true => (window.size * 2).clamp(FIRST_WINDOW, BATCH),
            false => 1,
        };
        let until = end.max(first.saturating_add(window.size));
        window.next = until;
        until
    }

    /// Fetches the next run of absent blocks in `at..ahead`; blocks before `end` must come.
    /// Returns how far everything is present.
    fn fill_some(
        &self,
        id: &SegmentId,
        entry: u32,
        mapped: &Mapped,
        at: u32,
        end: u32,
        ahead: u32,
    ) -> io::Result<u32> {
        let state = |number: u32| self.map.block(entry, number);
        let mut at = at;
        // What others fill or have is theirs; wait for the former.
        while at < end {
            match state(at).load(Ordering::Acquire) {
                block::ABSENT => break,
                block::FILLING => std::thread::sleep(Duration::from_micros(20)),
                _ => at += 1,
            }
        }
        let first = at;
        while at < ahead
            && at - first < BATCH
            && state(at)
                .compare_exchange(
                    block::ABSENT,
                    block::FILLING,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                )
                .is_ok()
        {
            at += 1;
        }
        if at == first {
            return Ok(at);
        }
        let result = self.fetch(id, mapped, first, at - first);
        let outcome = if result.is_ok() { block::CLEAN } else { block::ABSENT };
        for number in first..at {
            state(number).store(outcome, Ordering::Release);
        }
        result.map(|()| at)
    }

    fn fetch(&self, id: &SegmentId, mapped: &Mapped, first: u32, count: u32) -> io::Result<()> {
        let rel = tag(id).ok_or_else(|| io::Error::other("an unknown fork"))?;
        let base = id.segment * SEGMENT_BLOCKS;
        let pages = self.pages.pages(rel, base + first, count)?;
        if pages.len() as u64 != u64::from(count) * BLOCK_SIZE {
            return Err(io::Error::other(format!(
                "the page server sent {} bytes for {count} blocks of {rel} from {}",
                pages.len(),
                base + first
            )));
        }
        mapped.file.write_all_at(&pages, u64::from(first) * BLOCK_SIZE)
    }

    /// Bytes that the local relation files take.
    pub fn local_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let open = self.open.read();
        open.values()
            .filter_map(|mapped| mapped.file.metadata().ok())
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    }
}
