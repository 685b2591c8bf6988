//! Typed reads at an LSN: pages, sizes, directories, SLRUs, control state, record boundaries.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use pgstrata_ids::{Fork, Key, KeyKind, Lsn, RelTag, SlruKind};
use pgstrata_pg_redo::ControlState;

use super::{CachedPage, DatabaseHistory, Timeline};
use crate::layer::{Gathered, Value};
use crate::value::{
    Boundary, BoundaryKind, Database, RelSize, SlruExtent, decode_page, decode_present, encode_page,
};

const DEFAULT_TABLESPACE: u32 = 1663;
/// Record boundaries are kept in buckets of this many bytes of WAL.
const BOUNDARY_BUCKET: u64 = 16 << 20;
/// Pages made from at least this many values are worth keeping.
const CACHED_CHAIN: usize = 8;

/// A read that the caller got wrong, as opposed to one that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// There is no such relation fork at that LSN.
    #[error("relation {rel} does not exist at {lsn}")]
    NoRelation {
        /// Relation fork.
        rel: RelTag,
        /// LSN asked for.
        lsn: Lsn,
    },
    /// The relation fork is shorter.
    #[error("relation {rel} has {blocks} blocks at {lsn}: block {block} does not exist")]
    NoBlock {
        /// Relation fork.
        rel: RelTag,
        /// Block asked for.
        block: u32,
        /// Blocks there are.
        blocks: u32,
        /// LSN asked for.
        lsn: Lsn,
    },
}

/// A page that can't be made from what is stored of it. Trying again changes nothing, and nothing
/// but reads of this page may fail for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} can't be made")]
pub struct Unmakeable(pub String);

thread_local! {
    static BUFFERS: RefCell<Vec<Gathered>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` with a buffer that keeps its memory from read to read.
fn with_buffer<T>(work: impl FnOnce(&mut Gathered) -> T) -> T {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    buffer.clear();
    let result = work(&mut buffer);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

fn apply_block(page: &mut [u8; 8192], block: u32, value: Value<'_>) -> Result<()> {
    match value.is_page {
        true => decode_page(value.bytes, page),
        false => Ok(pgstrata_pg_redo::apply_block(page, value.bytes, block, value.lsn)?),
    }
}

/// The key of the bucket of boundaries that `lsn` falls into.
pub fn boundary_key(lsn: Lsn) -> Key {
    Key::commit_time(lsn.0 / BOUNDARY_BUCKET)
}

impl Timeline {
    /// The newest value of a key whose values are all complete.
    pub fn newest<T>(
        &self,
        key: &Key,
        lsn: Lsn,
        after: Lsn,
        decode: impl FnOnce(Lsn, &[u8]) -> Result<T>,
    ) -> Result<Option<T>> {
        with_buffer(|gathered| {
            self.gather(key, lsn, after, gathered)?;
            gathered.newest().map(|value| decode(value.lsn, value.bytes)).transpose()
        })
    }

    /// Forgets what is cached of a database's history: call after its key changed.
    pub fn database_changed(&self, spc: u32, db: u32) {
        let mut databases = self.databases.write();
        databases.changes += 1;
        databases.histories.remove(&(spc, db));
    }

    /// Forgets what is remembered of databases, when it is not known what changed.
    pub fn forget_databases(&self) {
        let mut databases = self.databases.write();
        databases.changes += 1;
        databases.histories.clear();
    }

    /// A database's history, up to `lsn` at least.
    fn database_history(&self, spc: u32, db: u32, lsn: Lsn) -> Result<DatabaseHistory> {
        let changes = {
            let databases = self.databases.read();
            if let Some(history) = databases.histories.get(&(spc, db)) {
                return Ok(Arc::clone(history));
            }
            databases.changes
        };
        let forgotten = self.forgotten();
        // While an ancestor is behind, there is no whole history to be remembered.
        let whole = self.has_ancestors();
        let end = if whole { Lsn::MAX } else { lsn };
        let mut history = Vec::new();
        for (lsn, value) in self.history(&Key::database(spc, db), Lsn::INVALID, end)? {
            history.push((lsn, Database::decode(&value)?));
        }
        let history = Arc::new(history);
        // Layers were read without the lock: what changed meanwhile is not to be hidden by this.
        let mut databases = self.databases.write();
        if whole && databases.changes == changes && self.forgotten() == forgotten {
            databases.histories.insert((spc, db), Arc::clone(&history));
        }
        Ok(history)
    }

    /// What a database's directory is at `lsn`, and since when; `None` if it never was.
    pub fn database(&self, spc: u32, db: u32, lsn: Lsn) -> Result<Option<(Lsn, Database)>> {
        let history = self.database_history(spc, db, lsn)?;
        let end = history.partition_point(|(at, _)| *at <= lsn);
        Ok(end.checked_sub(1).map(|last| history[last]))
    }

    /// Gathers a relation's values through the databases that its database was copied from.
    fn gather_rel(
        &self,
        key_of: impl Fn(u32, u32) -> Key,
        rel: RelTag,
        lsn: Lsn,
        after: Lsn,
        into: &mut Gathered,
    ) -> Result<()> {
        let (mut spc, mut db, mut lsn) = (rel.spc, rel.db, lsn);
        loop {
            let mut source = None;
            let mut floor = Lsn::INVALID;
            if db != 0
                && let Some((since, database)) = self.database(spc, db, lsn)?
            {
                // A directory that was dropped may be there again without a record that says so:
                // PostgreSQL makes it for the first relation in it. What came later counts.
                floor = match database {
                    Database::Dropped => since,
                    Database::Created | Database::Copied { .. } => Lsn(since.0 - 1),
                };
                if let Database::Copied { spc, db } = database {
                    source = Some((spc, db, since));
                }
            }
            self.gather(&key_of(spc, db), lsn, floor.max(after), into)?;
            match source {
                Some((from_spc, from_db, at)) if !into.is_complete() && at > after => {
                    (spc, db, lsn) = (from_spc, from_db, at);
                }
                _ => return Ok(()),
            }
        }
    }

    /// A relation fork's size and high-water mark at `lsn`.
    pub fn rel_size(&self, rel: RelTag, lsn: Lsn) -> Result<RelSize> {
        with_buffer(|gathered| {
            let key_of = |spc, db| Key::rel_size(RelTag { spc, db, ..rel });
            self.gather_rel(key_of, rel, lsn, Lsn::INVALID, gathered)?;
            match gathered.newest() {
                Some(value) => RelSize::decode(value.bytes),
                None => Ok(RelSize::NEVER),
            }
        })
    }

    /// A block at `lsn`, checked to exist. `lsn` must be ingested.
    pub fn block(&self, rel: RelTag, block: u32, lsn: Lsn, page: &mut [u8; 8192]) -> Result<()> {
        let size = self.rel_size(rel, lsn)?;
        let Some(blocks) = size.blocks else { bail!(ReadError::NoRelation { rel, lsn }) };
        if block >= blocks {
            bail!(ReadError::NoBlock { rel, block, blocks, lsn });
        }
        self.existing_block(rel, block, lsn, page)
    }

    /// A block at `lsn`; the caller knows that it exists. Blocks never written are zeros.
    pub fn existing_block(
        &self,
        rel: RelTag,
        block: u32,
        lsn: Lsn,
        page: &mut [u8; 8192],
    ) -> Result<()> {
        self.make_block(rel, block, lsn, page).map(drop)
    }

    /// As [`Timeline::existing_block`]. Says when the newest change was that it found.
    fn make_block(
        &self,
        rel: RelTag,
        block: u32,
        lsn: Lsn,
        page: &mut [u8; 8192],
    ) -> Result<Option<Lsn>> {
        let key = Key::rel_block(rel, block);
        // What was there before the database began anew, under the same name, is not this block.
        let since = self.database(rel.spc, rel.db, lsn)?.map_or(Lsn::INVALID, |(since, _)| since);
        let forgotten = self.forgotten();
        let is_it = |page: &CachedPage| page.1 == forgotten && page.0 <= lsn && page.0 >= since;
        let cached = self.pages.get(&key).filter(is_it);
        with_buffer(|gathered| {
            let after = cached.as_ref().map_or(Lsn::INVALID, |cached| cached.0);
            let key_of = |spc, db| Key::rel_block(RelTag { spc, db, ..rel }, block);
            self.gather_rel(key_of, rel, lsn, after, gathered)?;
            match &cached {
                Some(cached) if !gathered.is_complete() => page.copy_from_slice(&cached.2),
                _ => page.fill(0),
            }
            for value in gathered.oldest_first() {
                apply_block(page, block, value).map_err(|error| {
                    let what = format!("block {block} of {rel} at {}", value.lsn);
                    error.context(Unmakeable(what))
                })?;
            }
            // A page of before, and changes of after that, are none of either.
            anyhow::ensure!(
                self.forgotten() == forgotten,
                "what was ingested at {lsn} was given up with the safekeepers that had it"
            );
            let newest = gathered.newest().map(|newest| newest.lsn);
            let found = newest.or(cached.as_ref().map(|cached| cached.0));
            if let Some(newest) = gathered.newest()
                && (gathered.len() >= CACHED_CHAIN || cached.is_some())
            {
                // In a copied database the newest value may be the source's, from before the copy:
                // a time at which another database may have had this one's name.
                self.pages.insert(key, Arc::new((newest.lsn.max(since), forgotten, *page)));
            }
            Ok(found)
        })
    }

    /// A page of an SLRU at `lsn`; zeros if it was never written.
    pub fn slru_page(
        &self,
        kind: SlruKind,
        number: u64,
        lsn: Lsn,
        page: &mut [u8; 8192],
    ) -> Result<()> {
        self.make_slru_page(kind, number, lsn, page).map(drop)
    }

    fn make_slru_page(
        &self,
        kind: SlruKind,
        number: u64,
        lsn: Lsn,
        page: &mut [u8; 8192],
    ) -> Result<Option<Lsn>> {
        page.fill(0);
        with_buffer(|gathered| {
            self.gather(&Key::slru_page(kind, number), lsn, Lsn::INVALID, gathered)?;
            for value in gathered.oldest_first() {
                let applied = match value.is_page {
                    true => decode_page(value.bytes, page),
                    false => Ok(pgstrata_pg_redo::apply_slru(page, value.bytes, value.lsn)?),
                };
                applied.map_err(|error| {
                    let what = format!("{} page {number} at {}", kind.directory(), value.lsn);
                    error.context(Unmakeable(what))
                })?;
            }
            Ok(gathered.newest().map(|newest| newest.lsn))
        })
    }

    /// The pages that an SLRU has at `lsn`.
    pub fn slru_extent(&self, kind: SlruKind, lsn: Lsn) -> Result<SlruExtent> {
        let decode = |_, value: &[u8]| SlruExtent::decode(value);
        Ok(self.newest(&Key::slru_extent(kind), lsn, Lsn::INVALID, decode)?.unwrap_or_default())
    }

    /// Appends a block or SLRU page as of `lsn`, encoded as a page. A page is made from changes that
    /// were found only, the one at `changed` among them: an image hides what is older for good.
    pub fn materialise(&self, key: &Key, lsn: Lsn, changed: Lsn, to: &mut Vec<u8>) -> Result<()> {
        let mut page = [0; 8192];
        let found = match key.kind()? {
            KeyKind::RelBlock => {
                let rel = key.rel().context("a block key without a relation")?;
                self.make_block(rel, key.e(), lsn, &mut page)?
            }
            KeyKind::SlruPage => {
                let kind = SlruKind::from_number(key.a() as u8).context("an unknown SLRU")?;
                self.make_slru_page(kind, key.wide(), lsn, &mut page)?
            }
            other => bail!("{other:?} has no image"),
        };
        if found.is_none_or(|found| found < changed) {
            bail!(Unmakeable(format!(
                "the page of key {key:?}, whose change at {changed} is hidden"
            )));
        }
        encode_page(&page, to);
        Ok(())
    }

    /// The control state at `lsn`.
    pub fn control_state(&self, lsn: Lsn) -> Result<ControlState> {
        with_buffer(|gathered| {
            self.gather(&Key::control_state(), lsn, Lsn::INVALID, gathered)?;
            let mut state: Option<ControlState> = None;
            for value in gathered.oldest_first() {
                match (value.bytes.split_first(), &mut state) {
                    (Some((0, full)), _) => state = Some(ControlState::decode(full)?),
                    (Some((1, counters)), Some(state)) => state.apply_counters(counters)?,
                    _ => bail!("the control state at {} can't be read", value.lsn),
                }
            }
            state.with_context(|| format!("no control state at {lsn}"))
        })
    }

    /// The relation forks of a database directory at `lsn`, with their sizes in blocks.
    pub fn relations(&self, spc: u32, db: u32, lsn: Lsn) -> Result<Vec<(RelTag, u32)>> {
        let mut tags = BTreeSet::new();
        let (mut from_spc, mut from_db, mut at) = (spc, db, lsn);
        loop {
            let first = RelTag { spc: from_spc, db: from_db, rel: 0, fork: Fork::Main };
            let last = RelTag { rel: u32::MAX, fork: Fork::Init, ..first };
            let keys = self.list(Key::rel_size(first), Key::rel_size(last), at)?;
            tags.extend(keys.iter().filter_map(Key::rel).map(|tag| RelTag { spc, db, ..tag }));
            match self.database(from_spc, from_db, at)? {
                Some((since, Database::Copied { spc, db })) => {
                    (from_spc, from_db, at) = (spc, db, since);
                }
                _ => break,
            }
        }
        let mut relations = Vec::new();
        for tag in tags {
            if let Some(blocks) = self.rel_size(tag, lsn)?.blocks {
                relations.push((tag, blocks));
            }
        }
        Ok(relations)
    }

    /// The (tablespace, database) directories at `lsn`.
    pub fn databases(&self, lsn: Lsn) -> Result<Vec<(u32, u32)>> {
        let keys = self.list(Key::database(0, 0), Key::database(u32::MAX, u32::MAX), lsn)?;
        let mut found = Vec::new();
        for key in keys {
            let here = self.database(key.a(), key.b(), lsn)?;
            if here.is_some_and(|(_, database)| database != Database::Dropped) {
                found.push((key.a(), key.b()));
            }
        }
        Ok(found)
    }

    /// Directories of databases that no record announces: PostgreSQL makes them for the first
    /// relation of a database in a tablespace where the database itself is not (any more).
    pub fn implicit_databases(&self, lsn: Lsn) -> Result<Vec<(u32, u32)>> {
        let announced: BTreeSet<_> = self.databases(lsn)?.into_iter().collect();
        let databases: BTreeSet<u32> = announced.iter().map(|(_, db)| *db).collect();
        let tablespaces = self.present(Key::tablespace(0), Key::tablespace(u32::MAX), lsn)?;
        let tablespaces = tablespaces.iter().map(|(key, _)| key.a());
        let mut found = Vec::new();
        for spc in tablespaces.chain([DEFAULT_TABLESPACE]) {
            for db in databases.iter().filter(|db| !announced.contains(&(spc, **db))) {
                if self.has_relations(spc, *db, lsn)? {
                    found.push((spc, *db));
                }
            }
        }
        Ok(found)
    }

    fn has_relations(&self, spc: u32, db: u32, lsn: Lsn) -> Result<bool> {
        let first = RelTag { spc, db, rel: 0, fork: Fork::Main };
        let last = RelTag { rel: u32::MAX, fork: Fork::Init, ..first };
        for key in self.list(Key::rel_size(first), Key::rel_size(last), lsn)? {
            if let Some(rel) = key.rel()
                && self.rel_size(rel, lsn)?.blocks.is_some()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The relation map of a database directory at `lsn`, through copies.
    pub fn relmap(&self, spc: u32, db: u32, lsn: Lsn) -> Result<Option<Vec<u8>>> {
        with_buffer(|gathered| {
            let rel = RelTag { spc, db, rel: 0, fork: Fork::Main };
            self.gather_rel(Key::relmap, rel, lsn, Lsn::INVALID, gathered)?;
            Ok(gathered.newest().map(|value| value.bytes.to_vec()))
        })
    }

    /// Things that are there or not, with content: two-phase files, tablespaces, origins.
    pub fn present(&self, first: Key, last: Key, lsn: Lsn) -> Result<Vec<(Key, Vec<u8>)>> {
        let mut found = Vec::new();
        for key in self.list(first, last, lsn)? {
            let decode = |_, value: &[u8]| Ok(decode_present(value).map(<[u8]>::to_vec));
            if let Some(Some(content)) = self.newest(&key, lsn, Lsn::INVALID, decode)? {
                found.push((key, content));
            }
        }
        Ok(found)
    }

    /// How far replication origins have come, of those whose numbers are in the range.
    pub fn origins(&self, nodes: RangeInclusive<u16>, lsn: Lsn) -> Result<Vec<(u16, Lsn)>> {
        let found = self.present(Key::origin(*nodes.start()), Key::origin(*nodes.end()), lsn)?;
        found
            .into_iter()
            .map(|(key, content)| {
                let remote_lsn = content.first_chunk().context("an origin without its progress")?;
                Ok((key.c() as u16, Lsn(u64::from_le_bytes(*remote_lsn))))
            })
            .collect()
    }

    fn boundaries(&self, bucket: u64, lsn: Lsn) -> Result<Vec<(Lsn, Boundary)>> {
        let values = self.history(&Key::commit_time(bucket), Lsn::INVALID, lsn)?;
        values.into_iter().map(|(at, value)| Ok((at, Boundary::decode(&value)?))).collect()
    }

    /// The last noted record end at or before `lsn`.
    pub fn boundary_at_or_before(&self, lsn: Lsn) -> Result<Option<(Lsn, Boundary)>> {
        let mut bucket = lsn.0 / BOUNDARY_BUCKET;
        loop {
            if let Some(last) = self.boundaries(bucket, lsn)?.pop() {
                return Ok(Some(last));
            }
            if Lsn(bucket * BOUNDARY_BUCKET) < self.oldest_lsn() || bucket == 0 {
                return Ok(None);
            }
            bucket -= 1;
        }
    }

    /// Nothing before this LSN can be read.
    pub fn oldest_lsn(&self) -> Lsn {
        match &self.ancestor {
            Some((ancestor, _)) => ancestor.oldest_lsn(),
            None => self.info.start_lsn,
        }
    }

    /// The end of the last commit before the first commit later than `time` (microseconds since
    /// 2000-01-01): where recovery to that time stops. `None` if even the first is later.
    ///
    /// Clocks are set back, so commits of any age may follow each other: every one is looked at, and
    /// what was learnt of ranges that can't change any more is remembered.
    pub fn lsn_at_time(&self, time: i64, lsn: Lsn) -> Result<Option<(Lsn, Boundary)>> {
        let buckets = self.oldest_lsn().0 / BOUNDARY_BUCKET..=lsn.0 / BOUNDARY_BUCKET;
        if time == i64::MAX {
            for bucket in buckets.rev() {
                if let Some(last) = self.commits(bucket, lsn)?.last() {
                    return Ok(Some(*last));
                }
            }
            return Ok(None);
        }
        let mut best = None;
        for bucket in buckets {
            let times = self.commit_times(bucket, lsn)?;
            let Some(times) = times else { continue };
            if times.latest <= time {
                best = Some(times.last);
                continue;
            }
            let earlier = self.commits(bucket, lsn)?;
            let earlier = earlier.into_iter().take_while(|(_, commit)| commit.time <= time);
            return Ok(earlier.last().or(best));
        }
        Ok(best)
    }

    fn commits(&self, bucket: u64, lsn: Lsn) -> Result<Vec<(Lsn, Boundary)>> {
        let mut commits = self.boundaries(bucket, lsn)?;
        commits.retain(|(_, boundary)| boundary.kind == BoundaryKind::Commit);
        Ok(commits)
    }

    /// What times the commits of a bucket have, of those up to `lsn`.
    fn commit_times(&self, bucket: u64, lsn: Lsn) -> Result<Option<CommitTimes>> {
        let end = Lsn((bucket + 1) * BOUNDARY_BUCKET);
        if end <= lsn
            && let Some(times) = self.commit_times.read().get(&bucket)
        {
            return Ok(*times);
        }
        let forgotten = self.forgotten();
        let whole = end <= lsn && end <= self.progress.lsn() && self.has_ancestors();
        let commits = self.commits(bucket, lsn)?;
        let latest = commits.iter().map(|(_, commit)| commit.time).max();
        let times = latest.zip(commits.last().copied());
        let times = times.map(|(latest, last)| CommitTimes { latest, last });
        let mut remembered = self.commit_times.write();
        if whole && self.forgotten() == forgotten {
            remembered.insert(bucket, times);
        }
        Ok(times)
    }
}

/// Of the commits in one bucket of boundaries.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitTimes {
    /// The latest time.
    latest: i64,
    /// The last one.
    last: (Lsn, Boundary),
}
