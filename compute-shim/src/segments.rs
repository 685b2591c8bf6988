//! The page cache: sparse relation files, filled on demand.
//!
//! A segment is resolved once, when PostgreSQL first names it: if the page server knows the
//! relation, a sparse file of the right size takes its place in the data directory. Its blocks
//! arrive when they are read. What PostgreSQL writes stays here until the compute ends.
//!
//! Files are found through a descriptor of the run's own data directory: a thread that outlives the run works on what
//! was removed, and never on the files of the next one. Few files are open at any time, whatever the number of relations.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use pgstrata_compute_shared::path::SegmentId;
use pgstrata_compute_shared::{
    BLOCK_STATES, Found, SEGMENT_BLOCKS, STATES_UNIT, SharedMap, block, segment,
};
use pgstrata_ids::{Fork, RelTag};
use quick_cache::sync::Cache;
use rustix::fs::{Mode, OFlags, openat};

use crate::pages::PageClient;

const BLOCK_SIZE: u64 = 8192;
/// Pages fetched in one request, at most.
const BATCH: u32 = 64;
/// Blocks of an init fork, at most: those of stock PostgreSQL have fewer than ten, and it is in memory for a moment.
const LARGEST_TEMPLATE: u32 = 4096;
/// Pages fetched ahead of the first read of a relation.
const FIRST_WINDOW: u32 = 4;

/// What a sequential reader has shown so far.
#[derive(Clone, Copy, Default)]
struct Window {
    next: u32,
    size: u32,
}

/// An open segment.
struct Mapped {
    file: File,
    window: Mutex<Window>,
}

#[derive(Default)]
struct Table {
    /// Database directories that were removed here.
    dropped: HashSet<(u32, u32)>,
    /// Bytes of block states that are taken.
    states: u64,
}

/// The relation segments of a running compute.
pub struct Segments {
    map: SharedMap,
    pages: Arc<PageClient>,
    /// The data directory, which stays this one whatever is put in its place.
    data: OwnedFd,
    catalog_directory: String,
    table: Mutex<Table>,
    /// Inode numbers of the mapped segments' files, by entry.
    inodes: RwLock<HashMap<u32, u64>>,
    /// Those that are open.
    open: Cache<u32, Arc<Mapped>>,
}

fn tag(id: &SegmentId) -> Option<RelTag> {
    let fork = Fork::from_number(id.fork)?;
    Some(RelTag { spc: id.spc, db: id.db, rel: id.rel, fork })
}

impl Segments {
    /// Of the data directory `data`, with at most `max_open` segments open. `catalog_directory` is the version's
    /// directory below a tablespace, such as `PG_15_202209061`.
    pub fn new(
        map: SharedMap,
        pages: Arc<PageClient>,
        data: &Path,
        catalog_directory: String,
        max_open: usize,
    ) -> io::Result<Segments> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Segments {
            map,
            pages,
            data: rustix::fs::open(data, flags, Mode::empty())?,
            catalog_directory,
            table: Mutex::default(),
            inodes: RwLock::default(),
            open: Cache::new(max_open),
        })
    }

    /// Below the data directory.
    fn path(&self, id: &SegmentId) -> String {
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
        format!("{directory}/{name}")
    }

    fn open_at(&self, id: &SegmentId, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(File::from(openat(&self.data, self.path(id), flags, mode)?))
    }

    /// The open file of a mapped segment. `None` if the file was unlinked.
    fn mapped(&self, entry: u32, id: &SegmentId) -> io::Result<Option<Arc<Mapped>>> {
        if let Some(mapped) = self.open.get(&entry) {
            return Ok(Some(mapped));
        }
        let file = match self.open_at(id, OFlags::empty()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Another file may have taken its name.
        if self.inodes.read().get(&entry) != Some(&file.metadata()?.ino()) {
            return Ok(None);
        }
        let mapped = Arc::new(Mapped { file, window: Mutex::default() });
        self.open.insert(entry, Arc::clone(&mapped));
        Ok(Some(mapped))
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
        self.resolve_as(id, tag, known)
    }

    /// Puts a segment of a relation into the table of which the page server has `known` blocks.
    fn resolve_as(&self, id: &SegmentId, tag: RelTag, known: Option<u32>) -> io::Result<Found> {
        let template = if known.is_none() && tag.fork == Fork::Main && id.segment == 0 {
            self.template(tag)?
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
            (None, Some(pages)) if !gone => {
                let file = self.open_at(id, OFlags::CREATE | OFlags::TRUNC)?;
                file.write_all_at(&pages, 0)?;
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
        let states = u64::from(blocks).next_multiple_of(STATES_UNIT);
        let first_state = table.states;
        if first_state + states > BLOCK_STATES {
            return Err(io::Error::other("the relations that one compute has read are too large"));
        }
        let file = self.open_at(id, OFlags::CREATE | OFlags::TRUNC)?;
        file.set_len(u64::from(blocks) * BLOCK_SIZE)?;
        let inode = file.metadata()?.ino();
        // Who finds the entry looks for the file next.
        let mut inodes = self.inodes.write();
        let unit = (first_state / STATES_UNIT) as u32;
        let entry = self.insert(id, segment::MAPPED, unit, blocks)?;
        table.states += states;
        inodes.insert(entry, inode);
        drop(inodes);
        self.open.insert(entry, Arc::new(Mapped { file, window: Mutex::default() }));
        Ok(Found::Mapped(entry))
    }

    /// What an unlogged relation starts as: its init fork, which has a few pages. `None` for a relation without one.
    /// Asked without the lock on the table: the page server may be slow.
    fn template(&self, tag: RelTag) -> io::Result<Option<Vec<u8>>> {
        let init = tag.with_fork(Fork::Init);
        let Some(blocks) = self.pages.size(init)? else { return Ok(None) };
        if blocks > LARGEST_TEMPLATE {
            return Err(io::Error::other(format!(
                "{init} has {blocks} blocks, which no init fork has"
            )));
        }
        let mut template = Vec::new();
        let mut at = 0;
        while at < blocks {
            let pages = self.pages.pages(init, at, BATCH.min(blocks - at))?;
            if pages.is_empty() {
                return Err(io::Error::other(format!("{init} ends at block {at} of {blocks}")));
            }
            template.extend_from_slice(&pages);
            at += (pages.len() as u64 / BLOCK_SIZE) as u32;
        }
        Ok(Some(template))
    }

    /// Puts every file of a database directory into place.
    pub fn list_database(&self, spc: u32, db: u32) -> io::Result<()> {
        for (rel, blocks) in self.pages.relations(spc, db)? {
            let mut segment = 0;
            loop {
                let fork = rel.fork as u8;
                let id = SegmentId { spc, db, rel: rel.rel, fork, segment };
                if self.map.find(&id).is_none() && rel.fork != Fork::FreeSpace {
                    self.resolve_as(&id, rel, Some(blocks))?;
                }
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
        let Some(mapped) = self.mapped(entry, id)? else { return Ok(()) };
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use crate::places::{Places, Said};
    use pgstrata_http_client::Access;
    use pgstrata_ids::{Lsn, TenantId, TimelineId};
    use std::fs;

    const ID: SegmentId = SegmentId { spc: 1663, db: 5, rel: 1, fork: 0, segment: 0 };

    fn segments(data: &Path) -> Segments {
        fs::create_dir_all(data.join("base/5")).unwrap();
        let memory = Memory::new(16 << 20).unwrap();
        // Nobody is asked.
        let places = Places::start(Said::default(), &Access::Local, None).unwrap();
        let pages =
            PageClient::new(places, None, TenantId([1; 16]), TimelineId([2; 16]), Lsn(0x100_0000));
        Segments::new(memory.map, Arc::new(pages), data, "PG_15_202209061".into(), 16).unwrap()
    }

    #[test]
    fn l16_a_thread_of_an_earlier_run_does_not_touch_the_next_ones_files() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let earlier = segments(&data);
        let tag = tag(&ID).unwrap();
        fs::remove_dir_all(&data).unwrap();
        let next = segments(&data);
        next.resolve_as(&ID, tag, Some(3)).unwrap();
        fs::write(data.join("base/5/1"), [7; 3 * 8192]).unwrap();
        assert!(earlier.resolve_as(&ID, tag, Some(9)).is_err());
        assert_eq!(fs::read(data.join("base/5/1")).unwrap(), [7; 3 * 8192]);
    }

    #[test]
    fn h3_files_are_opened_again_and_never_others_of_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let segments = segments(&data);
        let mut entries = Vec::new();
        for rel in 1..=200 {
            let id = SegmentId { rel, ..ID };
            let Found::Mapped(entry) =
                segments.resolve_as(&id, tag(&id).unwrap(), Some(rel)).unwrap()
            else {
                panic!("it is mapped")
            };
            entries.push((id, entry));
        }
        assert!(segments.open.len() <= 16, "{} are open", segments.open.len());
        for (id, entry) in &entries {
            let mapped = segments.mapped(*entry, id).unwrap().unwrap();
            assert_eq!(mapped.file.metadata().unwrap().len(), u64::from(id.rel) * BLOCK_SIZE);
        }
        // One that is not open any more: its file goes, and another takes its name.
        let closed = entries.iter().find(|(_, entry)| segments.open.get(entry).is_none());
        let (id, entry) = *closed.unwrap();
        let path = data.join(segments.path(&id));
        fs::write(data.join("base/5/other"), b"other").unwrap();
        fs::rename(data.join("base/5/other"), &path).unwrap();
        assert!(segments.mapped(entry, &id).unwrap().is_none());
        fs::remove_file(&path).unwrap();
        assert!(segments.mapped(entry, &id).unwrap().is_none());
    }
}
