//! How much space is left on the disk, and what that means for WAL.
//!
//! Owns the bounds, the state that they make of what is free, and the last look at the disk. Archiving and trimming make
//! space, and are not slowed. What is refused here is refused as on a disk that is full, by [`StorageError::DiskFull`].
//!
//! | state | free space is below | what happens |
//! |---|---|---|
//! | fine | | |
//! | warns | `--disk-warn` | it is said: once in the log, in the status, as a metric |
//! | slows | `--disk-slow` | each batch of appends waits before it is taken, the longer the less is free |
//! | refuses | `--disk-refuse` | bytes that are new are refused; votes, configurations and trimming go on with what is left |
//!
//! A state is entered below its bound, and left when a quarter of the bound more is free. A WAL segment is made only where
//! `--disk-refuse` is still free after it, so that the last of a disk is never taken by a segment that just fitted.
//!
//! That writes are refused is said of the disk, and not of each who tries again ([`DiskSpace::note`], `said.rs`).

mod said;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use clap::Args;
use parking_lot::Mutex;
use pgstrata_env::{Disk, Space};

use self::said::{Said, Say};
use crate::storage_error::StorageError;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// How often the disk is looked at, besides each time that a segment is made.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Longest pause of one batch. A proposer gives a safekeeper up after 5 s without an answer.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A batch of so many bytes, the most that one has, waits as long as batches wait now; smaller ones less.
const WHOLE_BATCH: u64 = MIB;
/// The least that a batch counts as, in bytes: commits of one client wait a sixteenth.
const LEAST_BATCH: u64 = WHOLE_BATCH / 16;
/// The part of the longest pause with which slowing begins.
const LEAST_SHORTAGE: f64 = 1.0 / 8.0;

/// What free space means for WAL, the worst last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum DiskState {
    /// There is enough.
    #[default]
    Fine = 0,
    /// It is said that there is little.
    Warns = 1,
    /// Appends wait.
    Slows = 2,
    /// New WAL is refused.
    Refuses = 3,
}

/// The bounds as the command line gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct DiskArguments {
    /// Warn when less than this is free on the disk of --dir: a number with KiB, MiB, GiB or TiB, such as 20GiB; 0 for
    /// never. The warning is in the log, in /v1/status, in /metrics and in 'pgstrata status'. Without it: 10 % of the disk,
    /// 16 GiB at most, and twice --disk-slow at least.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub disk_warn: Option<u64>,

    /// Take WAL more slowly when less than this is free, so that archiving and trimming can win. A batch waits for half a
    /// second at most. Without it: 5 % of the disk, 4 GiB at most, and twice --disk-refuse at least.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub disk_slow: Option<u64>,

    /// Refuse WAL when less than this is free, and make no WAL segment that would leave less. What is left is for votes,
    /// configurations and trimming, so that it can recover, which it does by itself. The other members go on committing.
    /// Without it: 2 % of the disk, 1 GiB at most. With 0, WAL is refused when the disk is full.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub disk_refuse: Option<u64>,
}

impl DiskArguments {
    /// Refuses bounds that are given in no order in which they could be reached.
    pub fn check(&self) -> anyhow::Result<()> {
        let flags = [
            ("--disk-warn", self.disk_warn),
            ("--disk-slow", self.disk_slow),
            ("--disk-refuse", self.disk_refuse),
        ];
        let given =
            flags.iter().filter_map(|(flag, bound)| Some((flag, bound.filter(|&b| b > 0)?)));
        let given: Vec<_> = given.collect();
        for pair in given.windows(2) {
            let ((first, more), (second, less)) = (pair[0], pair[1]);
            ensure!(
                more >= less,
                "{first} is {}, and {second} {}: give {first} at least as much, since it is to come first",
                size(more),
                size(less)
            );
        }
        Ok(())
    }
}

/// A number of bytes with its unit.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB)];
    let found = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let bytes = match found {
        Some((number, unit)) => {
            number.trim().parse().ok().and_then(|number: u64| number.checked_mul(unit))
        }
        None => (text == "0").then_some(0),
    };
    bytes.ok_or_else(|| {
        "it is no size: give a number with KiB, MiB, GiB or TiB, such as 20GiB, or 0 for never"
            .into()
    })
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let (unit, name) = match bytes {
        TIB.. => (TIB, "TiB"),
        GIB.. => (GIB, "GiB"),
        MIB.. => (MIB, "MiB"),
        _ => (KIB, "KiB"),
    };
    format!("{:.1} {name}", bytes as f64 / unit as f64)
}

/// Free space below which each state begins, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Of [`DiskState::Warns`].
    pub warn: u64,
    /// Of [`DiskState::Slows`].
    pub slow: u64,
    /// Of [`DiskState::Refuses`].
    pub refuse: u64,
}

impl Bounds {
    /// Those that were given, and for the others what becomes a file system of `total` bytes: parts of it, so that a small
    /// one can be filled too, and no more than what is of use.
    pub fn new(given: &DiskArguments, total: u64) -> Bounds {
        let part = |percent: u64, most: u64| (total / 100 * percent).min(most);
        // Those that are not given keep to the order of those that are.
        let below =
            |above: Option<u64>| above.filter(|&above| above > 0).map_or(u64::MAX, |a| a / 2);
        let refuse = given.disk_refuse.unwrap_or_else(|| {
            part(2, GIB).min(below(given.disk_slow)).min(below(given.disk_warn) / 2)
        });
        let slow = given.disk_slow.unwrap_or_else(|| {
            let least = part(5, 4 * GIB).max(refuse.saturating_mul(2));
            least.min(below(given.disk_warn)).max(refuse)
        });
        let warn =
            given.disk_warn.unwrap_or_else(|| part(10, 16 * GIB).max(slow.saturating_mul(2)));
        Bounds { warn, slow, refuse }
    }

    /// The state of a disk that was in none before.
    fn state(&self, free: u64) -> DiskState {
        match () {
            () if free < self.refuse => DiskState::Refuses,
            () if free < self.slow => DiskState::Slows,
            () if free < self.warn => DiskState::Warns,
            () => DiskState::Fine,
        }
    }

    /// The state after a look at the disk. It is left later than it is entered, so that it isn't left and entered again
    /// with each segment that is made and trimmed.
    fn next(&self, free: u64, before: DiskState) -> DiskState {
        let left = Bounds {
            warn: raised(self.warn),
            slow: raised(self.slow),
            refuse: raised(self.refuse),
        };
        self.state(free).max(before.min(left.state(free)))
    }

    /// How long a whole batch waits.
    fn pause(&self, free: u64) -> Duration {
        let span = self.slow.saturating_sub(self.refuse).max(1);
        let missing = self.slow.saturating_sub(free);
        let shortage = (missing as f64 / span as f64).clamp(LEAST_SHORTAGE, 1.0);
        LONGEST_PAUSE.mul_f64(shortage)
    }
}

fn raised(bound: u64) -> u64 {
    bound.saturating_add(bound / 4)
}

/// What a look at the disk has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// What is there; of no bytes where that is not known.
    pub space: Space,
    /// The bounds for it.
    pub bounds: Bounds,
    /// When; `None` if no look has succeeded.
    pub at: Option<SystemTime>,
    /// By the bounds.
    level: DiskState,
    /// Bytes of a segment that could not be made without taking what is kept; 0 if all could.
    lacks: u64,
}

impl Look {
    /// What it means for WAL. Where a segment could not be made, what fits the segments that are there is still taken.
    pub fn state(&self) -> DiskState {
        match self.lacks {
            0 => self.level,
            _ => DiskState::Refuses,
        }
    }

    /// The look after this one.
    fn next(&self, given: &DiskArguments, space: Space, at: SystemTime, wants: u64) -> Look {
        let bounds = Bounds::new(given, space.total);
        let is_known = space.total > 0;
        let level = if is_known { bounds.next(space.free, self.level) } else { DiskState::Fine };
        let mut look = Look { space, bounds, at: Some(at), level, lacks: self.lacks };
        look.lacks = match wants {
            _ if !look.fits(wants, bounds.refuse) => wants.max(self.lacks),
            _ if wants >= self.lacks || look.fits(self.lacks, raised(bounds.refuse)) => 0,
            _ => self.lacks,
        };
        look
    }

    /// Whether so much is free after a segment of so many bytes was made; true where nothing is to be kept or known.
    fn fits(&self, segment: u64, kept: u64) -> bool {
        let is_asked = segment > 0 && kept > 0 && self.space.total > 0;
        !is_asked || self.space.free >= segment.saturating_add(kept)
    }

    /// How long a whole batch waits.
    fn pause(&self) -> Duration {
        match self.state() {
            DiskState::Fine | DiskState::Warns => Duration::ZERO,
            DiskState::Slows => self.bounds.pause(self.space.free),
            DiskState::Refuses => LONGEST_PAUSE,
        }
    }

    /// What is to be said of the disk of `directory`, if anything.
    fn warning(&self, directory: &Path) -> Option<String> {
        let Bounds { slow, refuse, .. } = self.bounds;
        // Bounds that are turned off are never reached.
        let then = |what: &str, bound: u64| match bound {
            0 => String::new(),
            _ => format!(", and {what} below {}", size(bound)),
        };
        let what = match self.state() {
            DiskState::Fine => return None,
            DiskState::Warns => format!(
                "that is little{}{}",
                then("WAL is taken more slowly", slow),
                then("WAL is refused", refuse)
            ),
            DiskState::Slows => {
                format!("WAL is taken more slowly{}", then("it is refused", refuse))
            }
            DiskState::Refuses if self.level < DiskState::Refuses => format!(
                "WAL that doesn't fit the segments that are there is refused, since {} are to stay free after one more",
                size(refuse)
            ),
            DiskState::Refuses => "WAL is refused until there is more".to_owned(),
        };
        Some(format!(
            "{} of {} are free on the disk of {}: {what}. Free space there, or give it a larger disk",
            size(self.space.free),
            size(self.space.total),
            directory.display()
        ))
    }
}

/// The disk of one directory, and what was last seen of it. Clones share that.
#[derive(Clone, Debug)]
pub struct DiskSpace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    given: DiskArguments,
    /// Taken for a moment only, never while the disk is asked.
    last: Mutex<Look>,
    /// [`DiskState`] by the bounds, and how long a whole batch waits in microseconds: of the last look, for each batch.
    level: AtomicU8,
    pause_us: AtomicU64,
    paused_us: AtomicU64,
    /// Taken for a moment only.
    said: Mutex<Said>,
}

impl DiskSpace {
    /// Looks at the disk of `directory`, which exists, for the first time.
    pub fn new(disk: Arc<dyn Disk>, directory: &Path, given: DiskArguments) -> DiskSpace {
        let space = DiskSpace(Arc::new(Inner {
            disk,
            directory: directory.to_owned(),
            given,
            last: Mutex::default(),
            level: AtomicU8::new(0),
            pause_us: AtomicU64::new(0),
            paused_us: AtomicU64::new(0),
            said: Mutex::default(),
        }));
        space.look();
        space
    }

    /// Looks every second, for ever, on a thread of its own: a disk may keep who asks waiting.
    pub fn keep_looking(&self) -> std::io::Result<()> {
        let space = self.clone();
        let run = move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                space.look();
            }
        };
        std::thread::Builder::new().name("disk-space".into()).spawn(run).map(|_| ())
    }

    /// Looks at the disk now.
    pub fn look(&self) {
        self.look_for(0);
    }

    /// Looks at the disk, on which a segment of so many bytes is to be made.
    fn look_for(&self, wants: u64) -> Look {
        let asked = self.0.disk.space(&self.0.directory);
        let at = SystemTime::now();
        let (before, after) = {
            let mut last = self.0.last.lock();
            let before = *last;
            // One that fails changes nothing, and its time is not known.
            if let Ok(space) = &asked {
                *last = before.next(&self.0.given, *space, at, wants);
            }
            self.0.level.store(last.level as u8, Ordering::Release);
            self.0.pause_us.store(last.pause().as_micros() as u64, Ordering::Release);
            (before, *last)
        };
        if let Err(error) = asked {
            tracing::debug!(directory = %self.0.directory.display(), %error, "can't tell what is free");
        }
        self.tell(before.state(), &after);
        after
    }

    /// Says what changed, once; and that writes are refused, as `said.rs` has it.
    fn tell(&self, before: DiskState, after: &Look) {
        let is_full = |state| state == DiskState::Refuses;
        let full = (is_full(before), is_full(after.state()));
        let say = self.0.said.lock().looked(Instant::now(), full);
        let text = after.warning(&self.0.directory);
        match say {
            Some(Say::GoesOn(writes)) => {
                let free_bytes = after.space.free;
                let directory = self.0.directory.display();
                tracing::warn!(writes, free_bytes, %directory, "writes were refused for want of space since this was said last");
            }
            Some(Say::Over(writes)) => {
                let (free_bytes, directory) = (after.space.free, self.0.directory.display());
                tracing::info!(writes, free_bytes, %directory, "no write is refused for want of space any more");
            }
            Some(Say::Begins) | None => {}
        }
        if before == after.state() {
            return;
        }
        match (after.state(), text) {
            // It was said when the system refused something first.
            (DiskState::Refuses, _) if say != Some(Say::Begins) => {}
            (DiskState::Refuses, Some(text)) => tracing::error!("{text}"),
            (_, Some(text)) => tracing::warn!("{text}"),
            (_, None) => {
                let free_bytes = after.space.free;
                tracing::info!(free_bytes, "there is enough space on the disk again");
            }
        }
    }

    /// Whether it is for want of space that a write was refused: then it is counted, and said of the disk. Looks at the disk
    /// where that is new.
    pub fn note(&self, error: &StorageError) -> bool {
        if !error.is_for_want_of_space() {
            return false;
        }
        if !self.0.said.lock().is_told() {
            self.look();
        }
        let say = self.0.said.lock().refused(Instant::now());
        // The disk has more than is kept, and refuses all the same, as where there is a quota; or nothing is kept.
        if say == Some(Say::Begins) {
            tracing::error!("{error}");
        }
        true
    }

    /// What was last seen.
    pub fn last(&self) -> Look {
        *self.0.last.lock()
    }

    /// What is to be said, if anything.
    pub fn warning(&self) -> Option<String> {
        self.last().warning(&self.0.directory)
    }

    /// Refuses new bytes for what is in `path`, if there is too little space for any: as cheap as reading a number.
    pub fn check(&self, path: &Path) -> Result<(), StorageError> {
        if self.0.level.load(Ordering::Acquire) < DiskState::Refuses as u8 {
            return Ok(());
        }
        let kept_bytes = self.last().bounds.refuse;
        Err(StorageError::DiskFull { action: "write WAL in", path: path.to_owned(), kept_bytes })
    }

    /// Refuses a segment of so many bytes, unless what is kept is free after it was made too. Looks at the disk.
    pub fn check_room(&self, bytes: u64, path: &Path) -> Result<(), StorageError> {
        let look = self.look_for(bytes);
        let (action, kept_bytes) = ("make WAL segment", look.bounds.refuse);
        match look.fits(bytes, kept_bytes) {
            true => Ok(()),
            false => Err(StorageError::DiskFull { action, path: path.to_owned(), kept_bytes }),
        }
    }

    /// Whether batches wait at all.
    pub fn has_pauses(&self) -> bool {
        self.0.pause_us.load(Ordering::Acquire) > 0
    }

    /// How long a batch of so many bytes has to wait, half a second at most, which is counted as done. Whoever waits holds nothing
    /// that others wait for.
    pub fn take_pause(&self, bytes: u64) -> Duration {
        let whole = self.0.pause_us.load(Ordering::Acquire);
        let pause_us = whole * bytes.clamp(LEAST_BATCH, WHOLE_BATCH) / WHOLE_BATCH;
        self.0.paused_us.fetch_add(pause_us, Ordering::Relaxed);
        Duration::from_micros(pause_us)
    }

    /// Waits for that long.
    pub fn pause(&self, bytes: u64) {
        if self.has_pauses() {
            std::thread::sleep(self.take_pause(bytes));
        }
    }

    /// How long all batches have waited.
    pub fn paused(&self) -> Duration {
        Duration::from_micros(self.0.paused_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests;
