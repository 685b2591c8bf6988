//! The disposable data directory: a skeleton, a clean start, and no relation data.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{Uid, User};
use pgstrata_compute_shared::CONTROL_FILE;
use pgstrata_ids::Lsn;
use pgstrata_pg_redo::ControlState;

use crate::plain_file::plain_file;
use crate::{access, conf, settings};

/// The skeleton's file with the encoded control state.
const CONTROL_STATE_FILE: &str = "pgstrata.control_state";
/// Largest of the files below that is kept, in bytes.
const MAX_KEPT: u64 = 16 << 20;

/// The configuration file.
const CONF: &str = "postgresql.conf";
/// What the names of earlier directories begin with after their own name, until they are removed.
const OLD: &str = ".old-";
/// What a new directory is called until all that is kept is in it.
const UNFINISHED: &str = ".unfinished";
/// What it is called from then until it takes the place of the old one.
const NEW: &str = ".new";
const POSTGRESQL_CONF: &str = "\
# Written once by the compute shim; your changes stay as long as this directory does.
# Settings that pgstrata needs are given on the command line and can't be changed here.
shared_buffers = 128MB
max_wal_size = 4GB
checkpoint_timeout = 15min
log_line_prefix = '%m [%p] '
";
/// A data directory under construction. When that ends, one way or the other, those before it are removed: their files
/// may be many, and nothing of a start is to wait for the same disk.
pub struct DataDirectory {
    path: PathBuf,
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .with_context(|| format!("can't write {}", path.display()))
}

/// A path of an archive, if it stays below where it is unpacked.
fn contained(path: &Path) -> Result<&Path> {
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(inside, "the skeleton has a path outside of itself: {}", path.display());
    Ok(path)
}

/// The path of another directory beside this one.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// The name of whom we, and so the server, run as.
fn server_user() -> Option<String> {
    let user = User::from_uid(Uid::effective()).ok()??;
    Some(user.name)
}

/// What a configuration file says that is not larger than one that is kept.
pub fn read_some(path: &Path) -> Result<String> {
    let file = plain_file(path, OpenOptions::new().read(true))?;
    let mut bytes = Vec::new();
    file.take(MAX_KEPT + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("can't read {}", path.display()))?;
    let name = path.display();
    ensure!(bytes.len() as u64 <= MAX_KEPT, "{name} has more than {MAX_KEPT} bytes");
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("can't move {} to {}", from.display(), to.display()))
}

/// Gives the directory of an earlier run another name. It has a file for each relation that was used: a start that
/// removed them first would take the longer the more there are.
fn set_aside(path: &Path) -> Result<()> {
    let free = (0u64..).map(|number| beside(path, &format!("{OLD}{number}")));
    match free.into_iter().find(|old| !exists(old)) {
        Some(old) if exists(path) => rename(path, &old),
        _ => Ok(()),
    }
}

fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("can't create {}", path.display()))
}

/// Takes over a file that people may have edited, if there is one. What is there and can't be taken over is an error,
/// and nothing was changed: the default in its place could let in everybody whom the file kept out.
fn keep(data: &Path, name: &str, to: &Path) -> Result<bool> {
    let from = data.join(name);
    let about = match from.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        about => about.with_context(|| format!("can't look at {}", from.display()))?,
    };
    // Also opens what it is a link to, and does not wait for a pipe's writer.
    let mut file = plain_file(&from, OpenOptions::new().read(true))?;
    let size = file.metadata()?.len();
    ensure!(size <= MAX_KEPT, "{} has {size} bytes: more than {MAX_KEPT}", from.display());
    let kept = match about.is_symlink() {
        // One into the directory would lead to nothing in the next.
        true if !from.canonicalize()?.starts_with(data.canonicalize()?) => {
            fs::read_link(&from).and_then(|target| symlink(target, to))
        }
        true => Err(ErrorKind::Unsupported.into()),
        // The same file: its bytes are as durable as they were.
        false => fs::hard_link(&from, to),
    };
    if kept.is_err() {
        let mut content = Vec::new();
        file.read_to_end(&mut content).with_context(|| format!("can't read {}", from.display()))?;
        write(to, &content)?;
    }
    Ok(true)
}

/// Whether a name is one that [`set_aside`] gives.
fn is_old(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix);
    number.is_some_and(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Removes what was set aside, in the background; also what runs left that were killed meanwhile.
fn remove_old(path: &Path) {
    // Each round finds what another one is at.
    static REMOVING: Mutex<()> = Mutex::new(());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
    let (parent, prefix) = (parent.to_owned(), format!("{}{OLD}", name.to_string_lossy()));
    let remove = move || -> std::io::Result<()> {
        // Nothing is kept under the lock that a panic could leave half done.
        let _removing = REMOVING.lock().unwrap_or_else(PoisonError::into_inner);
        // One that can't be removed does not keep the others.
        for entry in fs::read_dir(parent)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if is_old(&name, &prefix)
                && let Err(error) = fs::remove_dir_all(&path)
            {
                let path = path.display();
                tracing::warn!("{path} can't be removed, and takes up space: {error}");
            }
        }
        Ok(())
    };
    let spawned = std::thread::Builder::new().name("remove old data".into()).spawn(move || {
        if let Err(error) = remove() {
            tracing::warn!("earlier data directories can't be looked for: {error}");
        }
    });
    if let Err(error) = spawned {
        tracing::warn!("an earlier data directory is removed at the next start: {error}");
    }
}

impl DataDirectory {
    /// Makes the directory, empty. What people may have edited stays, also when we are killed at any moment: the new
    /// directory is complete under another name before the old one loses its own.
    pub fn create(path: &Path) -> Result<DataDirectory> {
        let (unfinished, new) = (beside(path, UNFINISHED), beside(path, NEW));
        if exists(&new) && !exists(path) {
            rename(&new, path)?;
        }
        for left in [&unfinished, &new].into_iter().filter(|left| exists(left)) {
            fs::remove_dir_all(left).with_context(|| format!("can't remove {}", left.display()))?;
        }
        make_directory(&unfinished)?;
        for (name, default) in [
            ("postgresql.auto.conf", ""),
            (access::FILE, access::ON_LOOPBACK),
            ("pg_ident.conf", ""),
        ] {
            if !keep(path, name, &unfinished.join(name))? {
                write(&unfinished.join(name), default.as_bytes())?;
            }
        }
        // The first one is written when it is known what the branch needs, and whole: until then there is none.
        keep(path, CONF, &unfinished.join(CONF))?;
        rename(&unfinished, &new)?;
        set_aside(path)?;
        rename(&new, path)?;
        Ok(DataDirectory { path: path.to_owned() })
    }

    /// Writes the first `postgresql.conf` of this directory, and reads what the files ask for.
    /// `config_file` is read in its place, where that was given.
    pub fn settings(
        &self,
        sizes: settings::Sizes,
        config_file: Option<&str>,
    ) -> Result<Vec<conf::Entry>> {
        let whole = self.path.join(CONF);
        if !exists(&whole) {
            let half = self.path.join(UNFINISHED);
            write(&half, format!("{POSTGRESQL_CONF}{}", settings::first_sizes(sizes)).as_bytes())?;
            rename(&half, &whole)?;
        }
        conf::read(&self.path, config_file)
    }

    /// Has `pg_hba.conf` fit what the server listens on, unless somebody has changed it. Returns what it says.
    pub fn who_may_connect(&self, listen: &str) -> Result<String> {
        let text = self.read_kept(access::FILE)?;
        let is_link = self.path.join(access::FILE).is_symlink();
        if is_link || !access::is_ours(&text) {
            return Ok(text);
        }
        let map = server_user().map(|user| access::map(&user));
        let present = self.read_kept(access::MAP_FILE)?;
        let map = map.filter(|map| present.is_empty() || present == *map);
        let fitting = access::fitting(listen, map.is_some());
        if let Some(map) =
            map.filter(|map| fitting == access::BEYOND_LOOPBACK_MAPPED && present != *map)
        {
            self.put(access::MAP_FILE, &map)?;
        }
        if text != fitting {
            self.put(access::FILE, fitting)?;
        }
        Ok(fitting.to_owned())
    }

    fn read_kept(&self, name: &str) -> Result<String> {
        read_some(&self.path.join(name))
    }

    fn put(&self, name: &str, text: &str) -> Result<()> {
        let half = self.path.join(UNFINISHED);
        write(&half, text.as_bytes())?;
        rename(&half, &self.path.join(name))
    }

    /// Whether transactions are prepared that have not ended.
    pub fn has_prepared_transactions(&self) -> Result<bool> {
        let path = self.path.join("pg_twophase");
        let mut entries =
            fs::read_dir(&path).with_context(|| format!("can't list {}", path.display()))?;
        Ok(entries.next().is_some())
    }

    /// Unpacks a skeleton. Returns the control state that came with it.
    pub fn unpack(&self, archive: impl Read) -> Result<ControlState> {
        let mut state = None;
        let mut archive = tar::Archive::new(archive);
        for entry in archive.entries().context("the skeleton can't be read")? {
            let mut entry = entry.context("the skeleton can't be read")?;
            let name = entry.path()?.into_owned();
            let target = self.path.join(contained(&name)?);
            if entry.header().entry_type().is_dir() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&target)
                    .with_context(|| format!("can't create {}", target.display()))?;
                continue;
            }
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            if name == Path::new(CONTROL_STATE_FILE) {
                state = Some(ControlState::decode(&content)?);
            } else {
                write(&target, &content)?;
            }
        }
        match state {
            Some(state) => Ok(state),
            None => bail!("the skeleton has no control state"),
        }
    }

    /// Writes the control file, under the name that only the preload library knows.
    pub fn write_control_file(&self, bytes: &[u8]) -> Result<()> {
        write(&self.path.join(CONTROL_FILE), bytes)
    }

    /// Makes the server a hot standby: it answers queries, and refuses every write.
    pub fn make_standby(&self) -> Result<()> {
        write(&self.path.join("standby.signal"), b"")
    }

    /// Writes WAL that starts at `start` into segment files of full size.
    pub fn write_wal(
        &self,
        start: Lsn,
        bytes: &[u8],
        segment_size: u64,
        name: impl Fn(u64) -> String,
    ) -> Result<()> {
        let mut at = start;
        let end = start + bytes.len() as u64;
        while at < end {
            let number = at.segment_number(segment_size);
            let next = at.segment_start(segment_size) + segment_size;
            let from = (at - start) as usize;
            let to = (next.min(end) - start) as usize;
            let path = self.path.join("pg_wal").join(name(number));
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .and_then(|file| {
                    file.set_len(segment_size)?;
                    file.write_all_at(&bytes[from..to], at.segment_offset(segment_size))
                });
            file.with_context(|| format!("can't write {}", path.display()))?;
            at = next.min(end);
        }
        Ok(())
    }
}

impl Drop for DataDirectory {
    fn drop(&mut self) {
        remove_old(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn h3_an_earlier_directory_is_removed_after_the_start() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("data");
        drop(DataDirectory::create(&path).unwrap());
        fs::create_dir_all(path.join("base/5")).unwrap();
        for number in 0..100 {
            fs::write(path.join(format!("base/5/{number}")), "x").unwrap();
        }
        fs::write(path.join("postgresql.auto.conf"), "a = 1").unwrap();
        // Left by one that was killed while it removed them, and somebody else's.
        fs::create_dir_all(place.path().join("data.old-0/base")).unwrap();
        fs::create_dir(place.path().join("data2.old-0")).unwrap();
        fs::create_dir(place.path().join("data.old-mine")).unwrap();
        // Not a directory, so it is not removed as one; the others are all the same.
        fs::write(place.path().join("data.old-1"), "").unwrap();

        drop(DataDirectory::create(&path).unwrap());
        let names = |at: &Path| {
            let entries = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
            names.sort();
            names
        };
        let kept = ["pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf"];
        assert_eq!(names(&path), kept);
        assert_eq!(fs::read(path.join("postgresql.auto.conf")).unwrap(), b"a = 1");
        let deadline = Instant::now() + Duration::from_secs(20);
        while names(place.path()) != ["data", "data.old-1", "data.old-mine", "data2.old-0"] {
            assert!(Instant::now() < deadline, "{:?}", names(place.path()));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_was_edited_outlives_a_kill_at_any_moment() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("data");
        let sizes = [
            ("max_connections", 200, 100),
            ("max_worker_processes", 8, 8),
            ("max_wal_senders", 10, 10),
            ("max_prepared_transactions", 0, 0),
            ("max_locks_per_transaction", 64, 64),
        ];
        // Killed before it was known what the branch needs: the next start writes it all.
        drop(DataDirectory::create(&path).unwrap());
        DataDirectory::create(&path).unwrap().settings(sizes, None).unwrap();
        let first = fs::read_to_string(path.join("postgresql.conf")).unwrap();
        assert!(first.contains("max_connections"), "{first}");
        let edited = |at: &Path, text: &str| fs::write(at.join("postgresql.conf"), text).unwrap();
        let now = || {
            drop(DataDirectory::create(&path).unwrap());
            fs::read_to_string(path.join("postgresql.conf")).unwrap()
        };
        edited(&path, "a = 1");
        // Killed while the new one was made: it is not believed.
        fs::create_dir(beside(&path, UNFINISHED)).unwrap();
        edited(&beside(&path, UNFINISHED), "a =");
        assert_eq!(now(), "a = 1");
        // Killed between the two renames.
        fs::rename(&path, beside(&path, ".old-7")).unwrap();
        fs::create_dir(beside(&path, NEW)).unwrap();
        edited(&beside(&path, NEW), "a = 2");
        assert_eq!(now(), "a = 2");
        // Killed before the first of them.
        fs::create_dir(beside(&path, NEW)).unwrap();
        edited(&beside(&path, NEW), "a = 2");
        edited(&path, "a = 3");
        assert_eq!(now(), "a = 3");
        // Elsewhere, and not ours to change.
        let elsewhere = place.path().join("elsewhere");
        fs::write(&elsewhere, "a = 4").unwrap();
        fs::remove_file(path.join("postgresql.conf")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, path.join("postgresql.conf")).unwrap();
        assert_eq!(now(), "a = 4");
        assert!(path.join("postgresql.conf").is_symlink());
    }

    #[test]
    fn what_can_not_be_kept_is_not_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("data");
        drop(DataDirectory::create(&path).unwrap());
        let hba = path.join("pg_hba.conf");
        let refused = |why: &str| {
            let error = format!("{:#}", DataDirectory::create(&path).err().unwrap());
            assert!(error.contains("pg_hba.conf") && error.contains(why), "{error}");
        };
        fs::remove_file(&hba).unwrap();
        symlink("nowhere", &hba).unwrap();
        refused("can't open");
        fs::remove_file(&hba).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &hba,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        refused("no regular file");
        fs::remove_file(&hba).unwrap();
        fs::File::create(&hba).unwrap().set_len(MAX_KEPT + 1).unwrap();
        refused("bytes");
        // A link into the directory itself.
        fs::remove_file(&hba).unwrap();
        fs::create_dir(path.join("conf.d")).unwrap();
        fs::write(path.join("conf.d/hba"), "local all all reject").unwrap();
        symlink("conf.d/hba", &hba).unwrap();
        for _ in 0..2 {
            drop(DataDirectory::create(&path).unwrap());
            assert_eq!(fs::read_to_string(&hba).unwrap(), "local all all reject");
        }
    }
}
