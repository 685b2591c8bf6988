//! Object storage as the archive meets it: what ships, over memory, with operations that take their time, that are refused, or of
//! which the answer is lost. And what must be true of what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use bytes::Bytes;
use futures::FutureExt;
use parking_lot::Mutex;
use pgstrata_blob::{Interceptor, Location, Store, Verdict};
use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::{AllGivenUp, Quorum};
use pgstrata_ids::{Lsn, TimelineParameters};
use pgstrata_safekeeper::archive::{Archive, ArchiveReader, object_name};
use pgstrata_sim::Rng;
use tokio::runtime::{Builder, Handle, Runtime};
use zstd::bulk::Decompressor;

use crate::lies::Lie;
use crate::truth::{Checked, Truth};

/// A level of compression that takes next to no time.
const FAST: i32 = -7;

/// What waits for threads that compress. All worlds have the same: to make one takes a while.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let runtime = Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime without input and output")
    })
}

/// Something of somebody that goes on in steps.
pub type Task<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Where a task has got to.
#[derive(Debug)]
pub enum Step<T> {
    /// A request is on its way.
    Asks,
    /// What was asked for is done or refused, and the answer is on its way.
    IsAnswered,
    Done(T),
}

/// On the way to object storage and back.
#[derive(Debug)]
struct Way {
    rng: Rng,
    /// One operation in so many fails; none if 0.
    fails: u64,
    is_away: bool,
    /// Whether operations take time.
    is_slow: bool,
    is_pausing: bool,
    was_asked: bool,
    /// Objects that may be others by now.
    touched: Vec<String>,
}

/// See [`Way`]; and, for who makes that mistake, the store in which what must not be there yet replaces what is.
#[derive(Debug)]
struct Network(Mutex<Way>, Option<Store>);

impl Interceptor for Network {
    fn verdict(&self, action: &'static str, path: &str) -> Verdict {
        let mut way = self.0.lock();
        way.was_asked = true;
        if way.is_away {
            return Verdict::Refuse;
        }
        if matches!(action, "write" | "swap" | "delete") {
            way.touched.push(path.to_owned());
        }
        let is_decision = action == "write" && path.ends_with("/quorum");
        if let Some(store) = self.1.as_ref().filter(|_| is_decision) {
            let _ = store.delete(path).now_or_never();
        }
        let fails = way.fails;
        match fails > 0 && way.rng.one_in(fails) {
            true if way.rng.one_in(2) => Verdict::LoseAnswer,
            true => Verdict::Refuse,
            false => Verdict::Perform,
        }
    }

    fn pause(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut has_paused = false;
        Box::pin(poll_fn(move |_| {
            let mut way = self.0.lock();
            if has_paused || !way.is_slow {
                return Poll::Ready(());
            }
            (has_paused, way.is_pausing) = (true, true);
            Poll::Pending
        }))
    }
}

/// See the module.
pub struct Objects {
    runtime: &'static Runtime,
    network: Arc<Network>,
    /// The archive as safekeepers have it.
    pub archive: Arc<Archive>,
    /// What is there, without what goes wrong.
    store: Store,
    plain_archive: Archive,
    parameters: TimelineParameters,
    /// What is before the timeline's start in its first segment.
    before: Vec<u8>,
    seen: BTreeMap<String, Bytes>,
    /// Who the members are.
    decided: Option<Quorum>,
    segments: BTreeSet<u64>,
    tails: BTreeSet<(Lsn, String)>,
    /// Objects that there ever were, and those of them that were tails.
    counts: (u64, u64),
    decompressor: Decompressor<'static>,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects").field("seen", &self.seen.keys()).finish_non_exhaustive()
    }
}

impl Objects {
    /// None yet. `before` is what the first segment of the timeline has of its ancestor.
    pub fn new(
        parameters: TimelineParameters,
        before: Vec<u8>,
        rng: Rng,
        lie: Option<Lie>,
    ) -> Objects {
        let way = Way {
            rng,
            fails: 0,
            is_away: false,
            is_slow: false,
            is_pausing: false,
            was_asked: false,
            touched: Vec::new(),
        };
        let store = Store::open(&Location::Memory, None).expect("memory is always there");
        let replaced = (lie == Some(Lie::FoundedAgain)).then(|| store.clone());
        let network = Arc::new(Network(Mutex::new(way), replaced));
        let archive = Archive::new(store.intercepted(Arc::clone(&network) as _));
        Objects {
            runtime: runtime(),
            archive: Arc::new(archive.compressing(FAST)),
            network,
            plain_archive: Archive::new(store.clone()),
            store,
            parameters,
            before,
            seen: BTreeMap::new(),
            decided: None,
            segments: BTreeSet::new(),
            tails: BTreeSet::new(),
            counts: (0, 0),
            decompressor: Decompressor::new().expect("memory for it"),
        }
    }

    /// From now on one operation in so many fails; none if 0.
    pub fn begin_to_fail(&self, fails: u64) {
        self.network.0.lock().fails = fails;
    }

    /// The timeline is founded.
    pub fn found(&mut self, founded: &Quorum) {
        let name = Quorum::object_name(founded.parameters.tenant, founded.parameters.timeline);
        let put = self.runtime.block_on(self.store.put(&name, Bytes::from(founded.encode())));
        put.unwrap_or_else(|error| unreachable!("in memory: {error}"));
        self.decided = Some(founded.clone());
    }

    /// It answers, or not.
    pub fn set_away(&self, is_away: bool) {
        self.network.0.lock().is_away = is_away;
    }

    /// Nothing fails any more.
    pub fn be_well(&self) {
        let mut way = self.network.0.lock();
        (way.fails, way.is_away) = (0, false);
    }

    /// Waits for it, in no time.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.network.0.lock().is_slow = false;
        self.runtime.block_on(work)
    }

    /// For those that wait for it themselves.
    pub fn handle(&self) -> Handle {
        self.network.0.lock().is_slow = false;
        self.runtime.handle().clone()
    }

    /// A reader of what is archived.
    pub fn reader(&self) -> ArchiveReader {
        let given_up = self.decided.as_ref().map(|decided| decided.given_up.clone());
        ArchiveReader::new(Arc::clone(&self.archive)).without(given_up.unwrap_or_default())
    }

    /// What is there, for a mistake to change it.
    pub fn raw(&self) -> Store {
        self.store.intercepted(Arc::clone(&self.network) as _)
    }

    /// Goes on with a task until it waits for object storage, or is done.
    pub fn step<T>(&self, task: &mut Task<T>) -> Step<T> {
        {
            let mut way = self.network.0.lock();
            (way.is_slow, way.is_pausing, way.was_asked) = (true, false, false);
        }
        let pauses = || {
            let way = self.network.0.lock();
            way.is_pausing.then_some(match way.was_asked {
                true => Step::IsAnswered,
                false => Step::Asks,
            })
        };
        // Compression is another thread's, which is waited for.
        let step = self.runtime.block_on(poll_fn(|context| match task.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(Step::Done(done)),
            Poll::Pending => pauses().map_or(Poll::Pending, Poll::Ready),
        }));
        // Whoever waits for it on a thread of his own waits in no time.
        self.network.0.lock().is_slow = false;
        step
    }

    /// Objects that there ever were, and those of them that were tails.
    pub fn counts(&self) -> (u64, u64) {
        self.counts
    }

    /// Whether there is an object of a segment.
    pub fn has_segment(&self, number: u64) -> bool {
        self.segments.contains(&number)
    }

    /// Whether all of the timeline before `lsn` is archived.
    pub fn has_all_before(&self, lsn: Lsn) -> bool {
        let size = u64::from(self.parameters.segment_size);
        let start = self.parameters.start_lsn;
        let (first, last) = (start.segment_number(size), lsn.segment_number(size));
        let end = Lsn((last + 1) * size);
        (first..last).all(|number| self.has_segment(number))
            && (lsn <= start.max(Lsn(last * size))
                || self.has_segment(last)
                || self.tails.range((lsn, String::new())..(end, String::new())).next().is_some())
    }

    /// What was written since the last call is committed, byte for byte, and says of itself what is true; nothing is another
    /// thing than it was, and nothing is gone that is still of use. What is decided about the members, if that is new.
    pub fn check(&mut self, truth: &Truth) -> Checked<Option<Quorum>> {
        let touched = std::mem::take(&mut self.network.0.lock().touched);
        let mut decided = None;
        for name in touched {
            if name.ends_with("/quorum") {
                decided = self.check_decided(&name)?.or(decided);
                continue;
            }
            if !name.contains("/wal/") {
                continue;
            }
            // More than any object here has.
            let found = match self.runtime.block_on(self.plain_get(&name)) {
                Ok(found) => Some(found),
                Err(error) if error.is_not_found() => None,
                Err(error) => return Err(error.to_string()),
            };
            match (found, self.seen.get(&name)) {
                (Some(found), Some(before)) if found == *before => {}
                // Two may have replaced what is of who was given up, each with what is right.
                (Some(found), Some(_))
                    if self.decided.as_ref().is_some_and(|one| !one.given_up.is_empty())
                        && self.given_up_at(&name, &found)?.is_none() =>
                {
                    self.check_object(&name, &found, truth)?;
                    self.seen.insert(name, found);
                }
                (Some(_), Some(_)) => {
                    return Err(format!("{name} is another object than it was"));
                }
                (Some(found), None) => match self.given_up_at(&name, &found)? {
                    // Of who was given up, and has not heard of it: what it shares with those who went on is right there, and
                    // it may have removed what else had that. The rest counts for nothing, and all of it may be replaced.
                    Some(lsn) => {
                        let wal = self.wal_of(&name, &found)?;
                        let (from, _) = self.place(&name)?;
                        self.check_wal(&name, from, &wal[..(lsn - from) as usize], truth)?;
                        self.tails.retain(|(_, one)| *one != name);
                        self.tails.insert((lsn, name));
                    }
                    None => {
                        self.tails.retain(|(_, one)| *one != name);
                        self.check_object(&name, &found, truth)?;
                        self.seen.insert(name, found);
                    }
                },
                (None, None) => {
                    let had = self.tails.iter().find(|(_, one)| *one == name).cloned();
                    if let Some(had) = had {
                        self.tails.remove(&had);
                        self.check_kept(&name, had.0)?;
                    }
                }
                (None, Some(_)) => self.check_gone(&name)?,
            }
        }
        Ok(decided)
    }

    /// What an object is of: from where, and up to where.
    fn place(&self, name: &str) -> Checked<(Lsn, Lsn)> {
        let size = u64::from(self.parameters.segment_size);
        match self.segment_of(name) {
            Some(number) => Ok((Lsn(number * size), Lsn((number + 1) * size))),
            None => {
                let end = Self::tail_of(name).ok_or_else(|| format!("{name} is no WAL"))?;
                Ok((end.segment_start(size).max(self.parameters.start_lsn), end))
            }
        }
    }

    /// Up to where an object is of the log that goes on, if it is of who was given up: it may be replaced.
    fn given_up_at(&self, name: &str, object: &[u8]) -> Checked<Option<Lsn>> {
        let Some(decided) = self.decided.as_ref().filter(|one| !one.given_up.is_empty()) else {
            return Ok(None);
        };
        let extent = Extent::decode(object).map_err(|error| format!("{name}: {error}"))?;
        let number = extent.map_or(0, |extent| extent.configuration);
        let (from, to) = self.place(name)?;
        let denied = decided.given_up.denies(number, to);
        Ok(denied.map(|given_up| given_up.lsn.max(from)))
    }

    /// What those have archived who were given up counts no longer, but for what they had when they were.
    pub fn give_up(&mut self, decided: &Quorum) -> Checked {
        self.decided = Some(decided.clone());
        for (name, object) in self.seen.clone() {
            if let Some(lsn) = self.given_up_at(&name, &object)? {
                self.seen.remove(&name);
                match self.segment_of(&name) {
                    Some(number) => self.segments.remove(&number),
                    None => {
                        let end = Self::tail_of(&name).unwrap_or_default();
                        self.tails.remove(&(end, name.clone()))
                    }
                };
                self.tails.insert((lsn, name));
            }
        }
        Ok(())
    }

    /// How far the archived log goes, for who knows of those who were given up.
    pub fn newest(&self, given_up: &AllGivenUp) -> Checked<Lsn> {
        let newest = self.plain_archive.newest(&self.parameters, given_up);
        match self.runtime.block_on(newest) {
            Ok(newest) => Ok(newest.map_or(Lsn::INVALID, |extent| extent.boundary)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Whoever decides goes on from what was decided before.
    fn check_decided(&mut self, name: &str) -> Checked<Option<Quorum>> {
        let found = match self.runtime.block_on(self.plain_get(name)) {
            Ok(found) => Quorum::decode(&found).map_err(|error| format!("{name}: {error}"))?,
            // An attempt that was refused.
            Err(error) if error.is_not_found() && self.decided.is_none() => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let known = self.decided.as_ref().map(|known| known.chain.newest());
        let newest = found.chain.newest();
        match known {
            Some(known) if known == newest => return Ok(None),
            Some(known)
                if newest.number() == known.number() + 1
                    && found.chain.goes_on_from(known)
                    && (found.chain.configurations()[0].number() <= known.number()
                        || found.given_up.includes(known.number())) => {}
            None if newest.number() == 1 => {}
            known => return Err(format!("{newest:?} is decided after {known:?}")),
        }
        self.decided = Some(found.clone());
        Ok(Some(found))
    }

    async fn plain_get(&self, name: &str) -> Result<Bytes, pgstrata_blob::BlobError> {
        self.store.get(name, u64::MAX).await
    }

    fn segment_of(&self, name: &str) -> Option<u64> {
        let file = name.rsplit_once('/')?.1.strip_suffix(".zst")?;
        let number = self.parameters.segment_number(file)?;
        (object_name(&self.parameters, number) == name).then_some(number)
    }

    fn tail_of(name: &str) -> Option<Lsn> {
        let (_, end) = name.strip_suffix(".zst")?.rsplit_once('.')?;
        u64::from_str_radix(end, 16).ok().map(Lsn)
    }

    fn check_gone(&mut self, name: &str) -> Checked {
        self.seen.remove(name);
        if self.segment_of(name).is_some() {
            return Err(format!("{name} is removed"));
        }
        let end = Self::tail_of(name).unwrap_or_default();
        self.tails.remove(&(end, name.to_owned()));
        self.check_kept(name, end)
    }

    fn check_kept(&self, name: &str, end: Lsn) -> Checked {
        match self.has_all_before(end) {
            true => Ok(()),
            false => Err(format!("{name} is removed, and nothing else has what is in it")),
        }
    }

    fn check_object(&mut self, name: &str, object: &[u8], truth: &Truth) -> Checked {
        let extent = Extent::decode(object).map_err(|error| format!("{name}: {error}"))?;
        let wal = self.wal_of(name, object)?;
        let (from, to) = self.place(name)?;
        self.check_wal(name, from, &wal, truth)?;
        self.check_extent(name, extent, (from, to), truth)?;
        match self.segment_of(name) {
            Some(number) => self.segments.insert(number),
            None => self.tails.insert((to, name.to_owned())),
        };
        self.counts.0 += 1;
        self.counts.1 += u64::from(self.segment_of(name).is_none());
        Ok(())
    }

    /// All WAL of an object, which has as much as its name says.
    fn wal_of(&mut self, name: &str, object: &[u8]) -> Checked<Vec<u8>> {
        let size = self.parameters.segment_size as usize;
        let wal = self.decompressor.decompress(object, size);
        let wal = wal.map_err(|error| format!("{name}: {error}"))?;
        let (from, to) = self.place(name)?;
        match wal.len() as u64 == to - from {
            true => Ok(wal),
            false => Err(format!("{name} has {} bytes", wal.len())),
        }
    }

    /// This is committed, or the ancestor's.
    fn check_wal(&self, name: &str, from: Lsn, wal: &[u8], truth: &Truth) -> Checked {
        let ancestors = self.parameters.start_lsn.saturating_sub(from) as usize;
        let (before, own) = wal.split_at(ancestors.min(wal.len()));
        let first = self.before.len() - ancestors;
        if *before != self.before[first..first + before.len()] {
            return Err(format!("{name} is not what the ancestor wrote"));
        }
        match own.is_empty() {
            true => Ok(()),
            false => truth.check_served(name, from + ancestors as u64, own),
        }
    }

    fn check_extent(
        &self,
        name: &str,
        extent: Option<Extent>,
        (from, to): (Lsn, Lsn),
        truth: &Truth,
    ) -> Checked {
        let start = self.parameters.start_lsn;
        let newest = self.decided.as_ref().map_or(0, |decided| decided.chain.newest().number());
        let extent = extent.ok_or_else(|| format!("{name} does not say what it is"))?;
        let right = match extent.boundary > start {
            true => truth.history().up_to(extent.boundary),
            // A first record that fills it.
            false => truth.history().reached_by(start),
        };
        let is_right = extent.from == from
            && extent.boundary <= to
            && extent.configuration <= newest
            && extent.history == right;
        match is_right {
            true => Ok(()),
            false => Err(format!("{name} says {extent:?}, but what is committed is {right:?}")),
        }
    }

    /// All that is archived, as whoever goes on with it reads it.
    pub fn check_all(&self, truth: &Truth) -> Checked {
        let parameters = &self.parameters;
        let size = u64::from(parameters.segment_size);
        let mut reader = self.reader();
        let mut at = parameters.start_lsn;
        let mut buffer = vec![0; size as usize];
        while self.has_all_before(Lsn(at.0 + 1)) {
            let count = self.wait(reader.read(parameters, at, &mut buffer))?;
            truth.check_served("the archive", at, &buffer[..count])?;
            at = at + count as u64;
        }
        Ok(())
    }
}
