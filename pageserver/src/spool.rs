//! Sorting more values than fit into memory: runs on the local disk, merged when they are read.
//!
//! Owns the files of the runs, which have no names: they go with the process, however it ends.
//!
//! ```text
//! run, for each value: 18 key, u32 length, u32 CRC-32C of key and value, value
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use pgstrata_ids::Key;

/// Runs of one level before they become one run of the next.
const FAN_IN: usize = 64;
/// What an entry takes in memory besides its value.
const ENTRY_BYTES: usize = 64;
const HEAD: usize = Key::SIZE + 8;
/// No value is longer: bounds what a reader allocates.
const VALUE_LIMIT: usize = 1 << 30;

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Takes values in any order.
pub struct Spool {
    directory: PathBuf,
    bound: usize,
    memory: BTreeMap<Key, Vec<u8>>,
    bytes: usize,
    /// Those of higher levels are older.
    levels: Vec<Vec<File>>,
}

impl Spool {
    /// Keeps about `bound` bytes in memory, and what is more in `directory`.
    pub fn new(directory: &Path, bound: usize) -> Spool {
        let directory = directory.to_owned();
        Spool { directory, bound, memory: BTreeMap::new(), bytes: 0, levels: Vec::new() }
    }

    /// Adds a value. The last one of a key counts.
    pub fn insert(&mut self, key: Key, value: Vec<u8>) -> Result<()> {
        self.bytes += value.len() + ENTRY_BYTES;
        if let Some(before) = self.memory.insert(key, value) {
            self.bytes -= before.len() + ENTRY_BYTES;
        }
        if self.bytes < self.bound {
            return Ok(());
        }
        self.bytes = 0;
        let full = std::mem::take(&mut self.memory);
        let run = self.write(full.into_iter().map(Ok))?;
        self.add(run, 0)
    }

    fn add(&mut self, run: File, level: usize) -> Result<()> {
        if self.levels.len() == level {
            self.levels.push(Vec::new());
        }
        self.levels[level].push(run);
        if self.levels[level].len() < FAN_IN {
            return Ok(());
        }
        let runs = std::mem::take(&mut self.levels[level]);
        let merged = self.write(Sorted::new(BTreeMap::new(), runs.into_iter().rev())?)?;
        self.add(merged, level + 1)
    }

    fn write(&self, values: impl Iterator<Item = Result<(Key, Vec<u8>)>>) -> Result<File> {
        let file = unnamed(&self.directory)
            .with_context(|| format!("can't make a file in {}", self.directory.display()))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        for entry in values {
            let (key, value) = entry?;
            writer.write_all(&key.0)?;
            writer.write_all(&(value.len() as u32).to_le_bytes())?;
            writer.write_all(&checksum(&key, &value).to_le_bytes())?;
            writer.write_all(&value)?;
        }
        Ok(writer.into_inner().map_err(io::IntoInnerError::into_error)?)
    }

    /// Everything, sorted by key.
    pub fn sorted(self) -> Result<Sorted> {
        let newest_first = self.levels.into_iter().flat_map(|level| level.into_iter().rev());
        Sorted::new(self.memory, newest_first)
    }
}

fn checksum(key: &Key, value: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&key.0), value)
}

fn unnamed(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("import-{}-{serial}.tmp", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

enum Source {
    Memory(std::collections::btree_map::IntoIter<Key, Vec<u8>>),
    Run(BufReader<File>),
}

impl Source {
    fn next(&mut self) -> Result<Option<(Key, Vec<u8>)>> {
        let reader = match self {
            Source::Memory(values) => return Ok(values.next()),
            Source::Run(reader) => reader,
        };
        let mut head = [0; HEAD];
        match reader.read(&mut head[..1])? {
            0 => return Ok(None),
            _ => reader.read_exact(&mut head[1..])?,
        }
        let mut key = Key::MIN;
        key.0.copy_from_slice(&head[..Key::SIZE]);
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = word(Key::SIZE) as usize;
        ensure!(length <= VALUE_LIMIT, "a temporary file of the import is damaged");
        let mut value = vec![0; length];
        reader.read_exact(&mut value)?;
        let expected = word(Key::SIZE + 4);
        ensure!(checksum(&key, &value) == expected, "a temporary file of the import is damaged");
        Ok(Some((key, value)))
    }
}

/// The values of a [`Spool`], by key.
pub struct Sorted {
    /// Newest first.
    sources: Vec<Source>,
    next: Vec<Option<Vec<u8>>>,
    heap: BinaryHeap<Reverse<(Key, usize)>>,
}

impl Sorted {
    fn new(memory: BTreeMap<Key, Vec<u8>>, runs: impl Iterator<Item = File>) -> Result<Sorted> {
        let mut sources = vec![Source::Memory(memory.into_iter())];
        for mut run in runs {
            run.rewind()?;
            sources.push(Source::Run(BufReader::with_capacity(64 * 1024, run)));
        }
        let next = vec![None; sources.len()];
        let mut sorted = Sorted { sources, next, heap: BinaryHeap::new() };
        for at in 0..sorted.sources.len() {
            sorted.advance(at)?;
        }
        Ok(sorted)
    }

    fn advance(&mut self, at: usize) -> Result<()> {
        if let Some((key, value)) = self.sources[at].next()? {
            self.next[at] = Some(value);
            self.heap.push(Reverse((key, at)));
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Option<(Key, Vec<u8>)>> {
        let Some(Reverse((key, at))) = self.heap.pop() else { return Ok(None) };
        let value = self.next[at].take();
        self.advance(at)?;
        // Older ones of the same key.
        while let Some(Reverse((other, at))) = self.heap.peek().copied()
            && other == key
        {
            self.heap.pop();
            self.advance(at)?;
        }
        Ok(value.map(|value| (key, value)))
    }
}

impl Iterator for Sorted {
    type Item = Result<(Key, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pop().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn what_is_sorted_is_what_a_map_has(
            entries in proptest::collection::vec((0..500u32, 0..40usize), 0..2000),
            bound in 100..20_000usize,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let mut spool = Spool::new(directory.path(), bound);
            let mut map = BTreeMap::new();
            for (number, (key, length)) in entries.into_iter().enumerate() {
                let (key, value) = (Key::database(1, key), vec![number as u8; length]);
                spool.insert(key, value.clone()).unwrap();
                map.insert(key, value);
            }
            let sorted: Vec<_> = spool.sorted().unwrap().map(Result::unwrap).collect();
            prop_assert_eq!(sorted, map.into_iter().collect::<Vec<_>>());
            // Nothing is left behind, not even while it is there.
            prop_assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }
}
