//! Who a local cluster belongs to where root runs this command: one user that is not root.
//!
//! A cluster is run by the owner of its directory. Where that is not root, root becomes that user before anything of the
//! cluster is looked at, for good: neither this process nor any that it starts can do then what the user can't. Root
//! stays root only where nobody else can make the directory another one. A new cluster's directory is made for the user
//! that `up` names, unless that one could not get there.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::OFlag;
use nix::unistd::{Uid, User, initgroups, setgid, setuid};
use pgstrata_blob::Location;

use crate::cluster::{STATE_FILE, ensure_user};
use crate::files;
use crate::way::{self, Way};

/// What an owner can't read by itself, opened while we still could.
struct Programs {
    files: Vec<(&'static str, File)>,
    /// Where copies go.
    directory: PathBuf,
}

static PROGRAMS: OnceLock<Programs> = OnceLock::new();
/// Whom root became.
static BECAME: OnceLock<String> = OnceLock::new();

const NAMES: [&str; 5] =
    ["storage-broker", "safekeeper", "pageserver", "compute-shim", "libpgstrata_preload.so"];

/// Looks at what is there while others make directories, each of which one of them has made then.
const MOST_TRIES: usize = 20;

/// The user that this process was not when it began, if it was root then.
pub fn became() -> Option<&'static str> {
    BECAME.get().map(String::as_str)
}

/// Becomes the owner of the cluster's directory, if we are root and it is there and another's.
pub fn become_owner(dir: &Path) -> Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    match fs::metadata(dir) {
        // Whoever can exchange the directory makes us work as himself at most.
        Ok(about) if about.uid() != 0 => {
            let user = User::from_uid(Uid::from_raw(about.uid()))?.with_context(|| {
                format!(
                    "{} belongs to user {}, which this machine does not know: give it to one that \
                     it does",
                    dir.display(),
                    about.uid()
                )
            })?;
            become_user(dir, &user)
        }
        Ok(_) => match stay_root(dir) {
            // Another command that makes the cluster has just given it to its user.
            Err(_) if fs::metadata(dir).is_ok_and(|about| about.uid() != 0) => become_owner(dir),
            stays => stays,
        },
        // Anything else but its absence is said where it is used.
        Err(_) => Ok(()),
    }
}

/// The same of an object store that is a directory: a link may lead elsewhere than when the cluster was made.
pub fn check_store(store: &Path) -> Result<()> {
    if Uid::effective().is_root() { stay_root(store) } else { Ok(()) }
}

/// Nobody but root may put into the directory what root then believes, or another one in its place.
fn stay_root(dir: &Path) -> Result<()> {
    let way = match way::roots(dir) {
        // Earlier versions made clusters there, which still run as root.
        Err(error) if dir.join(STATE_FILE).exists() => {
            let dir = dir.display();
            return Err(error.context(format!(
                "root does nothing in {dir}: give it to a user, as whom it runs then ('chown -R \
                 USER {dir}'), after ending what runs there as root ('kill' what {dir}/run/*.pid \
                 name)"
            )));
        }
        way => way?,
    };
    let mode = fs::metadata(&way.existing)?.mode();
    ensure!(
        mode & 0o022 == 0,
        "{} is root's, and others can write it: root believes nothing there. Take that right away \
         (chmod go-w), or make the cluster in a directory of its own",
        way.existing.display()
    );
    Ok(())
}

/// How a directory of a new cluster comes to be a user's.
enum Making {
    /// It is already.
    There,
    /// By root, whom nobody can mislead there.
    ByRoot(Way),
    /// By the user, in a directory of his.
    ByUser,
}

/// How a directory can become a user's, or why it can't.
fn making(path: &Path, user: &User) -> Result<Making> {
    ensure!(
        way::is_reachable(path, user),
        "{} is where {} can't get: a directory above it is closed",
        path.display(),
        user.name
    );
    match fs::metadata(path) {
        Ok(about) if !about.is_dir() => bail!("{} is no directory", path.display()),
        Ok(about) if is_of(&about, user) => return Ok(Making::There),
        _ => {}
    }
    match way_to_make(path, user) {
        // Another process made it since.
        Err(_) if fs::metadata(path).is_ok_and(|about| about.is_dir() && is_of(&about, user)) => {
            Ok(Making::There)
        }
        made => made,
    }
}

fn is_of(about: &fs::Metadata, user: &User) -> bool {
    about.uid() == user.uid.as_raw()
}

/// The same for one that is not there, or not the user's.
fn way_to_make(path: &Path, user: &User) -> Result<Making> {
    if fs::metadata(path).is_ok() {
        let way = way::roots(path)?;
        let empty = fs::read_dir(&way.existing)?.next().is_none();
        ensure!(empty, "{} is root's, and not empty", path.display());
        return Ok(Making::ByRoot(way));
    }
    let absolute = std::path::absolute(path)?;
    let parent = absolute.ancestors().find_map(|parent| fs::metadata(parent).ok());
    match parent {
        Some(about) if is_of(&about, user) => Ok(Making::ByUser),
        _ => Ok(Making::ByRoot(way::roots(path)?)),
    }
}

fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("can't create {}", path.display()))
}

/// Makes directories in which root works as root: its own, and nobody else's to write.
fn make_roots(dir: &Path, store: Option<&Path>) -> Result<()> {
    for path in [Some(dir), store].into_iter().flatten() {
        beside_others(|| make_missing(&way::roots(path)?).map(drop))?;
        stay_root(path)?;
    }
    Ok(())
}

/// Has directories made, and looks again at what is there if somebody else makes them in this moment.
fn beside_others(make: impl Fn() -> Result<()>) -> Result<()> {
    let mut tries = 1;
    loop {
        match make() {
            Err(error) if tries < MOST_TRIES && is_there_now(&error) => tries += 1,
            other => return other,
        }
    }
}

fn is_there_now(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::AlreadyExists)
}

/// Makes a directory the user's, unless it is.
fn make_his(path: &Path, user: &User) -> Result<()> {
    beside_others(|| match making(path, user)? {
        Making::ByRoot(way) => make_for(&way, user),
        Making::There | Making::ByUser => Ok(()),
    })
}

/// Makes the missing directories, whatever the umask is. Returns the last one, which is for its owner alone; those above
/// it are gone through by others as well.
fn make_missing(way: &Way) -> Result<PathBuf> {
    let mut at = way.existing.clone();
    for (number, name) in way.missing.iter().enumerate() {
        at.push(name);
        let mode = if number + 1 == way.missing.len() { 0o700 } else { 0o755 };
        // It must not be there: somebody else would have made it since.
        DirBuilder::new()
            .mode(mode)
            .create(&at)
            .and_then(|()| fs::set_permissions(&at, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("can't create {}", at.display()))?;
    }
    Ok(at)
}

/// Makes the missing directories, and gives the last one away.
fn make_for(way: &Way, user: &User) -> Result<()> {
    let at = make_missing(way)?;
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(&at)
        .and_then(|directory| {
            let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
            std::os::unix::fs::fchown(directory, Some(uid), Some(gid))
        })
        .with_context(|| format!("can't give {} to {}", at.display(), user.name))
}

/// Makes a new cluster's directory. Where we are root, it is `name`'s, whom we become, and so is the object store's, if
/// that is a directory. `programs` are PostgreSQL's, which that user must be able to run.
pub fn prepare(
    dir: &Path,
    name: &str,
    object_store: Option<&Location>,
    programs: &Path,
) -> Result<()> {
    let store = match object_store {
        Some(Location::Directory(path)) => Some(path.as_path()),
        _ => None,
    };
    if !Uid::effective().is_root() {
        return create(dir);
    }
    if name == "root" {
        return make_roots(dir, store);
    }
    ensure_user(name)?;
    let user = User::from_name(name)?.with_context(|| format!("there is no user '{name}'"))?;
    ensure!(
        way::is_usable(&programs.join("postgres"), &user),
        "{name} can't run the programs in {}: put them where every user can",
        programs.display()
    );
    let paths = || [Some(dir), store].into_iter().flatten();
    // All of them, or none is made.
    match paths().try_for_each(|path| making(path, &user).map(drop)) {
        Ok(()) => {
            for path in paths() {
                make_his(path, &user)?;
            }
            become_user(dir, &user)?;
        }
        Err(why) => {
            make_roots(dir, store)?;
            eprintln!(
                "pgstrata: all but PostgreSQL runs as root: {why:#}. --run-as root leaves out this \
                 line"
            );
        }
    }
    // A directory of the user's own, which the user makes.
    create(dir)
}

fn become_user(dir: &Path, user: &User) -> Result<()> {
    remember_programs(dir, user)?;
    let become_it = || -> Result<()> {
        initgroups(&std::ffi::CString::new(user.name.as_str())?, user.gid)?;
        setgid(user.gid)?;
        // From here on nobody but root can look into this process, or at what it was started with: it is not made
        // dumpable again.
        Ok(setuid(user.uid)?)
    };
    let name = &user.name;
    become_it().with_context(|| format!("can't become user {name}, who owns {}", dir.display()))?;
    ensure!(setuid(Uid::from_raw(0)).is_err(), "user {name} can become root again");
    // Set once: a process becomes somebody once.
    let _ = BECAME.set(name.clone());
    // SAFETY: this is the only thread: the command has started nothing yet.
    unsafe { std::env::set_var("HOME", "/") };
    Ok(())
}

/// Programs that the owner can't run where they lie are opened now, and copied later, by the owner.
fn remember_programs(dir: &Path, user: &User) -> Result<()> {
    let own = std::env::current_exe()?;
    if NAMES.iter().all(|name| way::is_usable(&own.with_file_name(name), user)) {
        return Ok(());
    }
    let open = |name| Some((name, File::open(own.with_file_name(name)).ok()?));
    let files = NAMES.into_iter().filter_map(open).collect();
    let directory = std::path::absolute(dir)?.join("computes").join(".bin");
    // Set once: a process becomes somebody once.
    let _ = PROGRAMS.set(Programs { files, directory });
    Ok(())
}

/// The copy of one of our programs, if we could not run it where it is.
pub fn copied_program(name: &str) -> Result<Option<PathBuf>> {
    let Some(programs) = PROGRAMS.get() else { return Ok(None) };
    let found = programs.files.iter().find(|(known, _)| *known == name);
    let (_, file) = found.with_context(|| format!("{name} is not beside this program"))?;
    let mut content = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut content, 0).with_context(|| format!("can't read {name}"))?;
    files::place_program(&programs.directory, name, &content)?;
    Ok(Some(programs.directory.join(name)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Barrier;

    use super::*;

    /// Commands that make the same cluster at once, each of which may be at any step: none of them fails.
    #[test]
    fn a_directory_that_others_make_at_the_same_time() {
        if !Uid::effective().is_root() {
            return;
        }
        let user = User::from_name("nobody").unwrap().unwrap();
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for round in 0..300 {
            let path = parent.path().join(format!("{round}/a/b/cluster"));
            let all_are_there = Barrier::new(4);
            let make = || {
                all_are_there.wait();
                make_his(&path, &user)?;
                // What comes next is put into it.
                let _ = fs::write(path.join("lock"), b"");
                anyhow::Ok(())
            };
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
                threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
            });
            assert!(is_of(&fs::metadata(&path).unwrap(), &user));
        }
    }
}
