//! Pages of a data directory, with the changed ones kept in a temporary file: the directory is never written. Each of
//! several overlays on one directory has the blocks of its own partition only.
//!
//! Memory is bounded by an index entry per changed block (about 40 bytes for each 8 KiB); page contents are on disk.

use pgstrata_ids::{Fork, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{Loaded, Page, PageStore, partition};
use pgstrata_pg_wal::PgVersion;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const SPC_DEFAULT: u32 = 1663;
const SPC_GLOBAL: u32 = 1664;
/// Blocks per relation segment file.
const SEGMENT_BLOCKS: u32 = 131_072;
/// Files of the data directory that are kept open.
const OPEN_FILES: usize = 64;

/// The store.
pub struct Overlay {
    /// This partition, and how many there are.
    partition: (usize, usize),
    directory: PathBuf,
    version_directory: String,
    pages: BTreeMap<(RelTag, u32), u64>,
    scratch: File,
    slots: u64,
    free: Vec<u64>,
    /// Blocks of the directory's files from this one on are gone.
    cut: FxHashMap<RelTag, u32>,
    /// Databases whose files in the directory are gone.
    gone: FxHashSet<(u32, u32)>,
    files: FxHashMap<(RelTag, u32), Option<File>>,
}

impl Overlay {
    /// A store over a data directory, for one partition out of some number.
    pub fn new(
        directory: &Path,
        version: PgVersion,
        partition: (usize, usize),
    ) -> io::Result<Overlay> {
        Ok(Overlay {
            partition,
            directory: directory.to_owned(),
            version_directory: format!("PG_{version}_{}", version.catalog_version()),
            pages: BTreeMap::new(),
            scratch: tempfile::tempfile()?,
            slots: 0,
            free: Vec::new(),
            cut: FxHashMap::default(),
            gone: FxHashSet::default(),
            files: FxHashMap::default(),
        })
    }

    fn database_directory(&self, spc: u32, db: u32) -> PathBuf {
        match spc {
            SPC_DEFAULT => self.directory.join("base").join(db.to_string()),
            SPC_GLOBAL => self.directory.join("global"),
            _ => {
                let tablespace = self.directory.join("pg_tblspc").join(spc.to_string());
                tablespace.join(&self.version_directory).join(db.to_string())
            }
        }
    }

    fn read_base(&mut self, rel: RelTag, block: u32, page: &mut Page) -> io::Result<bool> {
        let hidden = self.gone.contains(&(rel.spc, rel.db))
            || self.cut.get(&rel).is_some_and(|blocks| block >= *blocks);
        if hidden {
            return Ok(false);
        }
        let segment = block / SEGMENT_BLOCKS;
        if !self.files.contains_key(&(rel, segment)) {
            if self.files.len() >= OPEN_FILES {
                self.files.clear();
            }
            let mut name = format!("{}{}", rel.rel, rel.fork.suffix());
            if segment > 0 {
                name = format!("{name}.{segment}");
            }
            let path = self.database_directory(rel.spc, rel.db).join(name);
            let file = match File::open(path) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            self.files.insert((rel, segment), file);
        }
        let Some(Some(file)) = self.files.get(&(rel, segment)) else { return Ok(false) };
        let offset = u64::from(block % SEGMENT_BLOCKS) * PAGE_SIZE as u64;
        match file.read_exact_at(page, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn forget(&mut self, gone: impl Fn(&(RelTag, u32)) -> bool, range: (RelTag, RelTag)) {
        let keys: Vec<_> = self
            .pages
            .range((range.0, 0)..=(range.1, u32::MAX))
            .map(|(key, _)| *key)
            .filter(|key| gone(key))
            .collect();
        for key in keys {
            self.free.extend(self.pages.remove(&key));
        }
    }

    /// The relation segments that the directory has in a database, with their blocks.
    fn base_relations(&self, spc: u32, db: u32) -> io::Result<Vec<(RelTag, Range<u32>)>> {
        let mut found = Vec::new();
        let entries = match std::fs::read_dir(self.database_directory(spc, db)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some((rel, fork, segment)) = name.to_str().and_then(parse_relation) else {
                continue;
            };
            let blocks = entry.metadata()?.len() / PAGE_SIZE as u64;
            let start = u64::from(segment) * u64::from(SEGMENT_BLOCKS);
            let bound = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
            found.push((RelTag { spc, db, rel, fork }, bound(start)..bound(start + blocks)));
        }
        Ok(found)
    }
}

/// `16384`, `16384_vm`, `16384.1`, `16384_vm.1`.
fn parse_relation(name: &str) -> Option<(u32, Fork, u32)> {
    let (name, segment) = match name.split_once('.') {
        Some((name, segment)) => (name, segment.parse().ok()?),
        None => (name, 0),
    };
    let (number, suffix) = name.split_at(name.find('_').unwrap_or(name.len()));
    let fork = Fork::ALL.into_iter().find(|fork| fork.suffix() == suffix)?;
    Some((number.parse().ok()?, fork, segment))
}

impl PageStore for Overlay {
    type Error = io::Error;

    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> io::Result<Loaded> {
        if let Some(slot) = self.pages.get(&(rel, block)) {
            self.scratch.read_exact_at(page, slot * PAGE_SIZE as u64)?;
            return Ok(Loaded::Page);
        }
        Ok(if self.read_base(rel, block, page)? { Loaded::Page } else { Loaded::Missing })
    }

    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> io::Result<()> {
        let slot = *self.pages.entry((rel, block)).or_insert_with(|| {
            self.free.pop().unwrap_or_else(|| {
                self.slots += 1;
                self.slots - 1
            })
        });
        self.scratch.write_all_at(page, slot * PAGE_SIZE as u64)
    }

    fn truncate(&mut self, rel: RelTag, blocks: u32) -> io::Result<()> {
        self.forget(|(_, block)| *block >= blocks, (rel, rel));
        let cut = self.cut.entry(rel).or_insert(blocks);
        *cut = blocks.min(*cut);
        Ok(())
    }

    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> io::Result<()> {
        Fork::ALL.into_iter().try_for_each(|fork| self.truncate(RelTag { spc, db, rel, fork }, 0))
    }

    fn drop_database(&mut self, spc: u32, db: u32) -> io::Result<()> {
        let first = RelTag { spc, db, rel: 0, fork: Fork::Main };
        let last = RelTag { spc, db, rel: u32::MAX, fork: Fork::Init };
        self.forget(|_| true, (first, last));
        self.gone.insert((spc, db));
        Ok(())
    }

    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> io::Result<()> {
        let first = RelTag { spc: from.0, db: from.1, rel: 0, fork: Fork::Main };
        let last = RelTag { rel: u32::MAX, fork: Fork::Init, ..first };
        let mut page = [0; PAGE_SIZE];
        let changed: Vec<_> =
            self.pages.range((first, 0)..=(last, u32::MAX)).map(|(key, _)| *key).collect();
        for (rel, blocks) in self.base_relations(from.0, from.1)? {
            for block in blocks {
                let (own, count) = self.partition;
                if partition(rel, block, count) != own {
                    continue;
                }
                if self.load(rel, block, &mut page)? == Loaded::Page {
                    self.store(RelTag { spc: to.0, db: to.1, ..rel }, block, &page)?;
                }
            }
        }
        for (rel, block) in changed {
            self.load(rel, block, &mut page)?;
            self.store(RelTag { spc: to.0, db: to.1, ..rel }, block, &page)?;
        }
        Ok(())
    }
}
