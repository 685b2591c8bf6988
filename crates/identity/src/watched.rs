//! Files that are read anew when they change under a running service.
//!
//! Somebody who asks for what was read makes the look, at most once in a while, and only one at a time: whoever asks
//! meanwhile gets what was read before, and waits for no disk. What can't be used leaves in use what was read before; it
//! is said in the log once, and is asked for by [`Watched::trouble`]. A look that found trouble is followed by a reading
//! whether or not a file changes: a descriptor may have been missing, or a certificate may have become valid.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, RwLock};

use crate::Trouble;

/// How often files are looked at, at most.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A file that was changed less than this before it was read may change once more without showing it: times of files have
/// the resolution of the kernel's clock tick, and on some file systems of seconds.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// One file's metadata: where these are the same, so is what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    path: PathBuf,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    /// Changes with the mode and by a rename too, and can't be set back, as `cp --preserve` does with the other.
    changed: (i64, i64),
}

impl Stamp {
    /// Of a file, or of what a link to one leads to: secrets are often mounted as links.
    pub(crate) fn of(path: &Path, remedy: &str) -> Result<Stamp, Trouble> {
        let about =
            fs::metadata(path).map_err(|error| Trouble::unreadable(path, &error, remedy))?;
        Ok(Stamp {
            path: path.to_owned(),
            inode: about.ino(),
            size_bytes: about.len(),
            modified: (about.mtime(), about.mtime_nsec()),
            changed: (about.ctime(), about.ctime_nsec()),
        })
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let latest = self.modified.0.max(self.changed.0);
        let until = now.saturating_sub(SETTLED_AFTER).as_secs();
        latest < 0 || (latest as u64) < until
    }
}

/// Where something is read from.
pub(crate) trait Source {
    /// What comes of it.
    type Value;

    /// For the log.
    const WHAT: &'static str;

    /// The metadata of all files that it comes of.
    fn stamps(&self) -> Result<Vec<Stamp>, Trouble>;

    /// Reads and checks all of them.
    fn read(&self) -> Result<Self::Value, Trouble>;
}

/// See the module.
pub(crate) struct Watched<S: Source> {
    source: S,
    every: Duration,
    /// Held to copy or set a pointer.
    current: RwLock<Arc<S::Value>>,
    /// Held across file I/O, by whoever makes the look: everybody else only tries it. `current` and `trouble` are taken
    /// inside of it.
    look: Mutex<Look>,
    trouble: Mutex<Option<Trouble>>,
}

/// What the last look saw.
struct Look {
    at: Instant,
    stamps: Vec<Stamp>,
    /// Whether a change since then would show in the metadata, and what was read is in use.
    settled: bool,
}

struct Reading<T> {
    value: T,
    stamps: Vec<Stamp>,
    settled: bool,
}

fn read<S: Source>(source: &S) -> Result<Reading<S::Value>, Trouble> {
    let before = source.stamps()?;
    let value = source.read()?;
    let stamps = source.stamps()?;
    let now = SystemTime::now();
    let settled = before == stamps && stamps.iter().all(|stamp| stamp.is_settled(now));
    Ok(Reading { value, stamps, settled })
}

impl<S: Source> Watched<S> {
    /// Reads for the first time: trouble is an error now.
    pub(crate) fn open(source: S, every: Duration) -> Result<Watched<S>, Trouble> {
        let Reading { value, stamps, settled } = read(&source)?;
        Ok(Watched {
            source,
            every,
            current: RwLock::new(Arc::new(value)),
            look: Mutex::new(Look { at: Instant::now(), stamps, settled }),
            trouble: Mutex::new(None),
        })
    }

    /// Where it comes from.
    pub(crate) fn source(&self) -> &S {
        &self.source
    }

    /// What was read last. Looks whether the files changed, if nobody did for a while.
    pub(crate) fn get(&self) -> Arc<S::Value> {
        self.look();
        Arc::clone(&self.current.read())
    }

    /// What keeps the newest files from being used. Looks as [`Watched::get`] does.
    pub(crate) fn trouble(&self) -> Option<Trouble> {
        self.look();
        self.trouble.lock().clone()
    }

    fn look(&self) {
        if let Some(mut look) = self.look.try_lock()
            && look.at.elapsed() >= self.every
        {
            self.look_now(&mut look);
            look.at = Instant::now();
        }
    }

    fn look_now(&self, look: &mut Look) {
        if look.settled && self.source.stamps().is_ok_and(|stamps| stamps == look.stamps) {
            return;
        }
        match read(&self.source) {
            Ok(Reading { value, stamps, settled }) => {
                *self.current.write() = Arc::new(value);
                let was_troubled = self.trouble.lock().take().is_some();
                if was_troubled || stamps != look.stamps {
                    tracing::info!("{} were read anew", S::WHAT);
                }
                look.stamps = stamps;
                look.settled = settled;
            }
            Err(trouble) => {
                look.settled = false;
                let before = self.trouble.lock().replace(trouble.clone());
                if before.as_ref() != Some(&trouble) {
                    tracing::warn!("{} stay as they were: {trouble}", S::WHAT);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

    use super::*;
    use crate::SmallFile;

    struct Text {
        path: PathBuf,
        readings: AtomicUsize,
    }

    impl Source for Text {
        type Value = String;
        const WHAT: &'static str = "texts";

        fn stamps(&self) -> Result<Vec<Stamp>, Trouble> {
            Ok(vec![Stamp::of(&self.path, "put it there")?])
        }

        fn read(&self) -> Result<String, Trouble> {
            self.readings.fetch_add(1, Ordering::SeqCst);
            let bytes = SmallFile::read(&self.path, 100, "make it shorter")?.bytes;
            String::from_utf8(bytes).map_err(|_| Trouble::new(&self.path, "no text", "write text"))
        }
    }

    fn age(path: &Path, by: Duration) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - by).unwrap();
    }

    #[test]
    fn what_changes_is_read_anew_and_trouble_keeps_the_old() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("text");
        let open = || {
            let readings = AtomicUsize::new(0);
            Watched::open(Text { path: path.clone(), readings }, Duration::ZERO)
        };
        assert!(open().err().unwrap().to_string().contains("not there; put it there"));
        fs::write(&path, "one").unwrap();
        let watched = open().unwrap();
        assert_eq!(*watched.get(), "one");
        // Same length, perhaps within one tick of the clock: it is seen because the first reading was no settled one.
        fs::write(&path, "two").unwrap();
        assert_eq!(*watched.get(), "two");
        fs::write(&path, [0xff]).unwrap();
        assert_eq!(*watched.get(), "two");
        assert_eq!(watched.trouble().unwrap().what, "no text");
        fs::write(&path, "x".repeat(101)).unwrap();
        assert!(watched.trouble().unwrap().what.contains("longer"));
        fs::remove_file(&path).unwrap();
        assert_eq!(*watched.get(), "two");
        assert!(watched.trouble().unwrap().what.contains("not there"));
        fs::create_dir(&path).unwrap();
        assert!(watched.trouble().unwrap().what.contains("no regular file"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "three").unwrap();
        assert_eq!(*watched.get(), "three");
        assert_eq!(watched.trouble(), None);
    }

    #[test]
    fn what_does_not_change_is_not_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("text");
        fs::write(&path, "one").unwrap();
        let text = Text { path: path.clone(), readings: AtomicUsize::new(0) };
        let watched = Watched::open(text, Duration::ZERO).unwrap();
        // The time of the last change of metadata can't be set: it has to pass.
        std::thread::sleep(SETTLED_AFTER + Duration::from_millis(1100));
        watched.get();
        let readings = watched.source().readings.load(Ordering::SeqCst);
        (0..100).for_each(|_| drop(watched.get()));
        assert_eq!(watched.source().readings.load(Ordering::SeqCst), readings);
        age(&path, Duration::from_secs(100));
        watched.get();
        assert_eq!(watched.source().readings.load(Ordering::SeqCst), readings + 1);
    }

    struct Slow {
        path: PathBuf,
        is_slow: AtomicBool,
        begun: mpsc::Sender<()>,
        go_on: Barrier,
    }

    impl Source for Slow {
        type Value = ();
        const WHAT: &'static str = "slow things";

        fn stamps(&self) -> Result<Vec<Stamp>, Trouble> {
            Ok(vec![Stamp::of(&self.path, "")?])
        }

        fn read(&self) -> Result<(), Trouble> {
            if self.is_slow.swap(false, Ordering::SeqCst) {
                self.begun.send(()).unwrap();
                self.go_on.wait();
            }
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_somebody_elses_reading() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        let (begun, has_begun) = mpsc::channel();
        let go_on = Barrier::new(2);
        let slow = Slow { path, is_slow: AtomicBool::new(false), begun, go_on };
        let watched = Watched::open(slow, Duration::ZERO).unwrap();
        watched.source().is_slow.store(true, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| watched.get());
            has_begun.recv_timeout(Duration::from_secs(10)).unwrap();
            // The reading is under way, and goes on only after these have come back.
            watched.get();
            assert_eq!(watched.trouble(), None);
            watched.source().go_on.wait();
            reader.join().unwrap();
        });
    }
}
