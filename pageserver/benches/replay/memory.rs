//! Pages in memory, as redo finds and leaves them: what shared buffers and the kernel's page cache are to PostgreSQL.

use std::fs::File;
use std::path::Path;

use memmap2::{Advice, MmapMut};
use pgstrata_ids::{KeyKind, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pageserver::import::{Imported, read_archive};
use pgstrata_pageserver::value::decode_page;
use pgstrata_pg_redo::{Effect, Effects, ValueRange, apply_block, apply_slru};
use rustc_hash::FxHashMap;

pub type Page = [u8; 8192];
pub const NONE: u32 = u32::MAX;

/// A relation fork or an SLRU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Name {
    Relation(RelTag),
    Slru(u32),
}

/// Its pages: as the data directory had them, and where those lie that redo has touched.
#[derive(Clone, Default)]
struct Pages {
    base: Vec<Page>,
    places: Vec<u32>,
}

/// What a record does to one page.
#[derive(Clone, Copy)]
pub struct Change {
    pub place: u32,
    pub block: u32,
    pub kind: ChangeKind,
    pub lsn: Lsn,
    pub value: ValueRange,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    Block,
    Slru,
    /// The block was cut off or dropped.
    Zero,
}

/// Memory for pages; in huge pages, where the kernel has some. Each of its pages was touched once, as those of any server
/// were that runs for a while: a virtual machine may take longer for the first touch than for all of redo, or not.
pub struct Arena {
    memory: MmapMut,
    used: usize,
}

impl Arena {
    fn new(pages: usize) -> Arena {
        let mut memory = MmapMut::map_anon(pages * PAGE_SIZE).unwrap();
        // Without them it is only slower.
        let _ = memory.advise(Advice::HugePage);
        memory.iter_mut().step_by(4096).for_each(|byte| *std::hint::black_box(byte) = 0);
        Arena { memory, used: 0 }
    }

    /// All pages so far.
    #[inline]
    pub fn pages(&mut self) -> &mut [Page] {
        let used = self.used * PAGE_SIZE;
        self.memory[..used].as_chunks_mut().0
    }

    fn push(&mut self, page: Option<&Page>) -> u32 {
        let place = self.used;
        self.used += 1;
        // Fresh memory is zero.
        if let Some(page) = page {
            self.memory[place * PAGE_SIZE..self.used * PAGE_SIZE].copy_from_slice(page);
        }
        place as u32
    }
}

/// All pages.
pub struct Memory {
    names: FxHashMap<Name, u32>,
    /// What was looked up last.
    recent: Option<(Name, u32)>,
    files: Vec<Pages>,
    /// Pages that a copy has room for.
    room: usize,
    pub arena: Arena,
}

impl Memory {
    /// A data directory's.
    pub fn read(data: &Path) -> (Memory, Imported) {
        let mut imported = read_archive(File::open(data).unwrap(), &std::env::temp_dir()).unwrap();
        let mut memory = Memory {
            names: FxHashMap::default(),
            recent: None,
            files: Vec::new(),
            arena: Arena::new(1),
            room: 0,
        };
        let mut count = 0;
        for entry in imported.values.by_ref() {
            let (key, stored) = entry.unwrap();
            let name = match key.kind() {
                Ok(KeyKind::RelBlock) => Name::Relation(key.rel().unwrap()),
                Ok(KeyKind::SlruPage) => Name::Slru(key.a()),
                _ => continue,
            };
            let number = key.e();
            let file = memory.file(name);
            let base = &mut memory.files[file as usize].base;
            base.resize(number as usize + 1, [0; 8192]);
            decode_page(&stored[1..], &mut base[number as usize]).unwrap();
            count += 1;
        }
        // Room for what there is and what may come.
        memory.room = 2 * count + 131_072;
        (memory, imported)
    }

    /// A copy, with room for pages that redo touches.
    pub fn copy(&self) -> Memory {
        let arena = Arena::new(self.room);
        let (names, files) = (self.names.clone(), self.files.clone());
        Memory { names, recent: None, files, room: self.room, arena }
    }

    #[inline]
    fn file(&mut self, name: Name) -> u32 {
        match self.recent {
            Some((recent, file)) if recent == name => file,
            _ => self.find(name),
        }
    }

    fn find(&mut self, name: Name) -> u32 {
        let file = *self.names.entry(name).or_insert_with(|| {
            self.files.push(Pages::default());
            self.files.len() as u32 - 1
        });
        self.recent = Some((name, file));
        file
    }

    /// Where a page lies. When it is touched first, it is brought there from the base, unless what it held does not
    /// matter, as in PostgreSQL. `None` if it does not exist and is not to be made.
    #[inline]
    fn place(&mut self, name: Name, number: u32, make: bool, complete: bool) -> Option<u32> {
        let file = self.file(name);
        let file = &mut self.files[file as usize];
        let at = number as usize;
        if let Some(&place) = file.places.get(at).filter(|&&place| place != NONE) {
            return Some(place);
        }
        let base = file.base.get(at);
        if base.is_none() && !make {
            return None;
        }
        let place = self.arena.push(base.filter(|_| !complete));
        if file.places.len() <= at {
            file.places.resize((at + 1).max(file.places.len() * 2), NONE);
        }
        file.places[at] = place;
        Some(place)
    }

    /// Gives the changes of pages that a record implies to `each`, in order. True if pages have to be copied now, by
    /// [`Memory::copy_databases`]: then all changes so far have to be applied first.
    #[inline]
    pub fn changes(
        &mut self,
        effects: &Effects,
        lsn: Lsn,
        mut each: impl FnMut(&mut Memory, Change),
    ) -> bool {
        let mut copies = false;
        let empty = ValueRange { start: 0, end: 0 };
        for effect in &effects.items {
            let (name, block, kind, value, make, complete) = match *effect {
                Effect::Block { rel, block, value, complete, extends } => {
                    (Name::Relation(rel), block, ChangeKind::Block, value, extends, complete)
                }
                Effect::SlruPage { kind, page, value, complete } => {
                    let name = Name::Slru(kind as u32);
                    (name, page as u32, ChangeKind::Slru, value, true, complete)
                }
                Effect::RelTruncate { rel, blocks } => {
                    for (place, block) in self.cut(Name::Relation(rel), blocks) {
                        each(
                            self,
                            Change { place, block, kind: ChangeKind::Zero, lsn, value: empty },
                        );
                    }
                    continue;
                }
                Effect::RelDrop { spc, db, rel } => {
                    self.forget(|tag| (tag.spc, tag.db, tag.rel) == (spc, db, rel));
                    continue;
                }
                Effect::DatabaseDrop { spc, db } => {
                    self.forget(|tag| (tag.spc, tag.db) == (spc, db));
                    continue;
                }
                Effect::DatabaseCreate { spc, db, copy_from } => {
                    self.forget(|tag| (tag.spc, tag.db) == (spc, db));
                    copies |= copy_from.is_some();
                    continue;
                }
                _ => continue,
            };
            if let Some(place) = self.place(name, block, make, complete) {
                each(self, Change { place, block, kind, lsn, value });
            }
        }
        copies
    }

    /// Cuts a file: the places of pages that were there, which are to be zeroed in their turn.
    fn cut(&mut self, name: Name, blocks: u32) -> Vec<(u32, u32)> {
        let file = self.file(name);
        let file = &mut self.files[file as usize];
        file.base.truncate(blocks as usize);
        let cut = file.places.iter().enumerate().skip(blocks as usize);
        cut.filter(|(_, place)| **place != NONE).map(|(at, place)| (*place, at as u32)).collect()
    }

    /// Drops files: who makes them again gets new pages.
    fn forget(&mut self, matches: impl Fn(RelTag) -> bool) {
        self.recent = None;
        self.names.retain(|name, _| !matches!(name, Name::Relation(tag) if matches(*tag)));
    }

    /// Copies files of databases.
    pub fn copy_databases(&mut self, effects: &Effects) {
        for effect in &effects.items {
            let Effect::DatabaseCreate { spc, db, copy_from: Some(from) } = *effect else {
                continue;
            };
            let sources: Vec<(RelTag, u32)> = self
                .names
                .iter()
                .filter_map(|(name, file)| match name {
                    Name::Relation(tag) if (tag.spc, tag.db) == from => Some((*tag, *file)),
                    _ => None,
                })
                .collect();
            for (tag, source) in sources {
                let Pages { mut base, places } = self.files[source as usize].clone();
                for (at, place) in places.iter().enumerate() {
                    if *place != NONE {
                        base.resize(base.len().max(at + 1), [0; 8192]);
                        base[at] = self.arena.pages()[*place as usize];
                    }
                }
                let file = self.file(Name::Relation(RelTag { spc, db, ..tag }));
                self.files[file as usize].base = base;
            }
        }
    }
}

/// Applies a change to its page.
#[inline]
pub fn apply(page: &mut Page, change: &Change, values: &[u8]) {
    let value = &values[change.value.start as usize..change.value.end as usize];
    match change.kind {
        ChangeKind::Block => apply_block(page, value, change.block, change.lsn).unwrap(),
        ChangeKind::Slru => apply_slru(page, value, change.lsn).unwrap(),
        ChangeKind::Zero => page.fill(0),
    }
}
