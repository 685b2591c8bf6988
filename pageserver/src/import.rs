//! Taking in a data directory: a tar of a cluster that was shut down cleanly becomes the first
//! image layers of a timeline.
//!
//! The timeline starts at the first WAL segment after the cluster's last, so that its WAL is
//! whole segments from the very first byte: followers that start at a segment's start, as stock
//! ones do, find one.
//!
//! A cluster may be larger than memory: what is read goes through a [`Spool`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pgstrata_ids::{Fork, Key, Lsn, RelTag, SlruKind};
use pgstrata_pg_redo::ControlState;
use pgstrata_pg_wal::{ControlFile, DbState};

use crate::layer::{COMPLETE, PAGE};
use crate::origins::{self, ORIGINS_FILE};
use crate::spool::{Sorted, Spool};
use crate::value::{Database, RelSize, SlruExtent, encode_page, encode_present};

const BLOCK: usize = 8192;
const SEGMENT_BLOCKS: u32 = 131_072;
const SLRU_SEGMENT_PAGES: u64 = 32;
/// Values in memory before they go to the local disk.
const MEMORY: usize = 64 << 20;
/// `replorigin_checkpoint` may have 65,536 origins of 16 bytes; the others are far smaller.
const SMALL_FILE: u64 = 2 << 20;
/// Bytes of all prepared transactions: they are kept in memory until the control file is read.
const TWO_PHASE_LIMIT: u64 = 256 << 20;

/// What an archive holds, ready for layers.
pub struct Imported {
    /// Values with their flags, by key.
    pub values: Values,
    /// The control state.
    pub state: ControlState,
    /// Where the timeline starts.
    pub start_lsn: Lsn,
    /// Start of the last record before that.
    pub record_start: Lsn,
}

/// The values of an import, by key.
pub struct Values {
    sorted: Sorted,
    /// Init forks: the relations that start as these say.
    unlogged: BTreeSet<RelTag>,
}

impl Iterator for Values {
    type Item = Result<(Key, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let is_unlogged = |key: &Key| {
            key.rel().is_some_and(|rel| {
                matches!(rel.fork, Fork::Main | Fork::Visibility)
                    && self.unlogged.contains(&rel.with_fork(Fork::Init))
            })
        };
        self.sorted.find(|entry| !entry.as_ref().is_ok_and(|(key, _)| is_unlogged(key)))
    }
}

struct Collector {
    values: Spool,
    sizes: BTreeMap<RelTag, u32>,
    extents: BTreeMap<SlruKind, SlruExtent>,
    control: Option<ControlFile>,
    /// Whether the name has an epoch, the number in the name, content.
    two_phase: Vec<(bool, u64, Vec<u8>)>,
    two_phase_bytes: u64,
}

fn stored(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = vec![COMPLETE];
    write(&mut bytes);
    bytes
}

fn stored_page(page: &[u8; BLOCK]) -> Vec<u8> {
    let mut bytes = vec![COMPLETE | PAGE];
    encode_page(page, &mut bytes);
    bytes
}

/// Reads a tar of a data directory that was shut down cleanly. What does not fit into a bounded
/// part of memory goes to `directory` meanwhile.
pub fn read_archive(archive: impl Read, directory: &Path) -> Result<Imported> {
    let mut collector = Collector {
        values: Spool::new(directory, MEMORY),
        sizes: BTreeMap::new(),
        extents: BTreeMap::new(),
        control: None,
        two_phase: Vec::new(),
        two_phase_bytes: 0,
    };
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().context("the archive can't be read")? {
        let mut entry = entry.context("the archive can't be read")?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let path = path.trim_start_matches("./").trim_end_matches('/').to_owned();
        if entry.header().entry_type().is_dir() {
            collector.directory(&path)?;
        } else if entry.header().entry_type().is_file() {
            collector.file(&path, &mut entry).with_context(|| format!("file '{path}'"))?;
        } else if path.starts_with("pg_tblspc/") {
            bail!("'{path}': clusters with tablespaces can't be imported");
        }
    }
    collector.finish()
}

fn relation_name(name: &str) -> Option<(u32, Fork, u32)> {
    let (name, segment) = match name.split_once('.') {
        Some((name, segment)) => (name, segment.parse().ok()?),
        None => (name, 0),
    };
    let (rel, fork) = match name.split_once('_') {
        Some((rel, "vm")) => (rel, Fork::Visibility),
        Some((rel, "fsm")) => (rel, Fork::FreeSpace),
        Some((rel, "init")) => (rel, Fork::Init),
        Some(_) => return None,
        None => (name, Fork::Main),
    };
    Some((rel.parse().ok()?, fork, segment))
}

impl Collector {
    fn directory(&mut self, path: &str) -> Result<()> {
        match path.strip_prefix("base/").and_then(|db| db.parse().ok()) {
            Some(db) => {
                let value = stored(|to| Database::Created.encode(to));
                self.values.insert(Key::database(1663, db), value)
            }
            None => Ok(()),
        }
    }

    fn file(&mut self, path: &str, content: &mut impl Read) -> Result<()> {
        let parts: Vec<_> = path.split('/').collect();
        let (spc, db, name) = match parts[..] {
            ["global", "pg_control"] => {
                let bytes = read_small(content)?;
                self.control = Some(ControlFile::decode(&bytes)?);
                return Ok(());
            }
            ["pg_twophase", name] => return self.two_phase(name, content),
            _ if path == ORIGINS_FILE => return self.origins(content),
            ["global", name] => (1664, 0, name),
            ["base", db, name] => match db.parse() {
                Ok(db) => (1663, db, name),
                Err(_) => return Ok(()),
            },
            [.., name] => {
                let directory = &path[..path.len() - name.len()];
                return self.slru(directory.trim_end_matches('/'), name, content);
            }
            [] => return Ok(()),
        };
        if name == "pg_filenode.map" {
            let value = [&[COMPLETE], &read_small(content)?[..]].concat();
            self.values.insert(Key::relmap(spc, db), value)?;
        } else if let Some((rel, fork, segment)) = relation_name(name)
            // Like everywhere else, the free space map is not kept.
            && fork != Fork::FreeSpace
        {
            self.relation(RelTag { spc, db, rel, fork }, segment, content)?;
        }
        Ok(())
    }

    fn relation(&mut self, rel: RelTag, segment: u32, content: &mut impl Read) -> Result<()> {
        let mut block = segment.checked_mul(SEGMENT_BLOCKS).context("its segment number")?;
        let mut page = [0; BLOCK];
        let size = self.sizes.entry(rel).or_insert(0);
        while read_page(content, &mut page)? {
            // A page of zeros is what a block without a value reads as.
            if page.iter().any(|&byte| byte != 0) {
                let value = stored_page(&page);
                self.values.insert(Key::rel_block(rel, block), value)?;
            }
            block += 1;
        }
        *size = (*size).max(block);
        Ok(())
    }

    fn slru(&mut self, directory: &str, name: &str, content: &mut impl Read) -> Result<()> {
        let Some(kind) = SlruKind::ALL.into_iter().find(|kind| kind.directory() == directory)
        else {
            return Ok(());
        };
        let Ok(segment) = u64::from_str_radix(name, 16) else { return Ok(()) };
        let mut number = segment * SLRU_SEGMENT_PAGES;
        let mut page = [0; BLOCK];
        while read_page(content, &mut page)? {
            let value = stored_page(&page);
            self.values.insert(Key::slru_page(kind, number), value)?;
            self.extents.entry(kind).or_default().add(number);
            number += 1;
        }
        Ok(())
    }

    /// A transaction that is prepared. Its name is an xid, since 17 with its epoch.
    fn two_phase(&mut self, name: &str, content: &mut impl Read) -> Result<()> {
        let xid = u64::from_str_radix(name, 16).context("no transaction's name")?;
        let mut file = Vec::new();
        content.take(TWO_PHASE_LIMIT + 1).read_to_end(&mut file)?;
        self.two_phase_bytes += file.len() as u64;
        ensure!(
            self.two_phase_bytes <= TWO_PHASE_LIMIT,
            "prepared transactions of more than {TWO_PHASE_LIMIT} bytes: commit some of them first"
        );
        self.two_phase.push((name.len() > 8, xid, file));
        Ok(())
    }

    fn origins(&mut self, content: &mut impl Read) -> Result<()> {
        for (node, remote_lsn) in origins::decode(&read_small(content)?)? {
            let mut progress = [0; 16];
            progress[..8].copy_from_slice(&remote_lsn.to_le_bytes());
            let value = stored(|to| encode_present(Some(&progress), to));
            self.values.insert(Key::origin(node), value)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Imported> {
        let control = self.control.context("the archive has no global/pg_control")?;
        ensure!(
            control.state == DbState::ShutDowned,
            "the cluster was not shut down cleanly (its state is {:?})",
            control.state
        );
        let mut state = ControlState::from_pg_control(&control);
        // The WAL of a branch is a history of its own, which begins with the import: its first
        // timeline is 1, however often the cluster was promoted before. No page has the number.
        state.tli = 1;
        // Unlogged relations start as their init forks say, as they do after a crash: nothing that
        // is not logged can be kept from here on.
        let unlogged: BTreeSet<_> =
            self.sizes.keys().filter(|rel| rel.fork == Fork::Init).copied().collect();
        for (rel, blocks) in self.sizes {
            let size = RelSize { blocks: Some(blocks), high_water: blocks };
            self.values.insert(Key::rel_size(rel), stored(|to| size.encode(to)))?;
        }
        for (kind, extent) in self.extents {
            self.values.insert(Key::slru_extent(kind), stored(|to| extent.encode(to)))?;
        }
        for (has_epoch, xid, file) in self.two_phase {
            let full_xid = if has_epoch { xid } else { state.full_xid(xid as u32) };
            let value = stored(|to| encode_present(Some(&file), to));
            self.values.insert(Key::two_phase(full_xid), value)?;
        }
        let full = state.encode();
        let value = stored(|to| {
            to.push(0);
            to.extend_from_slice(&full);
        });
        self.values.insert(Key::control_state(), value)?;
        let segment_size = u64::from(control.wal_segment_size);
        let start_lsn = control.checkpoint.segment_start(segment_size) + segment_size;
        let values = Values { sorted: self.values.sorted()?, unlogged };
        Ok(Imported { values, state, start_lsn, record_start: control.checkpoint })
    }
}

/// A file of which PostgreSQL writes a few kilobytes.
fn read_small(content: &mut impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    content.take(SMALL_FILE + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= SMALL_FILE, "it has more than {SMALL_FILE} bytes");
    Ok(bytes)
}

fn read_page(content: &mut impl Read, page: &mut [u8; BLOCK]) -> Result<bool> {
    let mut filled = 0;
    while filled < BLOCK {
        match content.read(&mut page[filled..])? {
            0 if filled == 0 => return Ok(false),
            0 => bail!("it ends inside a page"),
            count => filled += count,
        }
    }
    Ok(true)
}
