//! Who a local cluster belongs to where root runs this command: one user that is not root.
//!
//! A cluster is run by the owner of its directory. Where that is not root, root becomes that user before anything of the
//! cluster is looked at, for good: neither this process nor any that it starts can do then what the user can't. A new
//! cluster's directory is given to the user that `up` names, unless that one could not get there.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Gid, Uid, User, initgroups, setgid, setgroups, setuid};
use pgstrata_blob::Location;

use crate::cluster::ensure_user;
use crate::files;

/// What an owner can't read by itself, opened while we still could.
struct Programs {
    files: Vec<(&'static str, File)>,
    /// Where copies go.
    directory: PathBuf,
}

static PROGRAMS: OnceLock<Programs> = OnceLock::new();

const NAMES: [&str; 5] =
    ["storage-broker", "safekeeper", "pageserver", "compute-shim", "libpgstrata_preload.so"];

/// Becomes the owner of the cluster's directory, if we are root and it is there and another's.
pub fn become_owner(dir: &Path) -> Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    match fs::metadata(dir) {
        Ok(about) if about.uid() != 0 => {
            become_user(dir, Uid::from_raw(about.uid()), Gid::from_raw(about.gid()))
        }
        _ => Ok(()),
    }
}

/// Makes a new cluster's directory. Where we are root, it is `name`'s, whom we become, and so is the object store's, if
/// that is a directory.
pub fn prepare(dir: &Path, name: &str, object_store: Option<&Location>) -> Result<()> {
    if Uid::effective().is_root() && name != "root" {
        ensure_user(name)?;
        let user = User::from_name(name)?.with_context(|| format!("there is no user '{name}'"))?;
        let store = match object_store {
            Some(Location::Directory(path)) => Some(path.as_path()),
            _ => None,
        };
        let unusable = [Some(dir), store].into_iter().flatten().find(|path| !can_be(path, &user));
        match unusable {
            Some(path) => eprintln!(
                "pgstrata: all but PostgreSQL runs as root: {} can't be made {name}'s (empty, and \
                 in directories that {name} can enter). --run-as root leaves out this line",
                path.display()
            ),
            None => {
                for path in [Some(dir), store].into_iter().flatten() {
                    files::own_directory(path, 0o755, Some(&user))?;
                }
                return become_user(dir, user.uid, user.gid);
            }
        }
    }
    fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))
}

/// Whether a directory is a user's, or can be given to it.
fn can_be(path: &Path, user: &User) -> bool {
    let Ok(absolute) = std::path::absolute(path) else { return false };
    if !is_reachable(&absolute, user) {
        return false;
    }
    match fs::symlink_metadata(&absolute) {
        Err(_) => true,
        Ok(about) if !about.is_dir() => false,
        Ok(about) if about.uid() == user.uid.as_raw() => true,
        Ok(about) => {
            about.uid() == 0
                && fs::read_dir(&absolute).is_ok_and(|mut names| names.next().is_none())
        }
    }
}

/// Whether a user can get to a path through the directories above it, as far as they exist.
pub fn is_reachable(path: &Path, user: &User) -> bool {
    path.ancestors().skip(1).all(|parent| match fs::metadata(parent) {
        Ok(about) => {
            let mode = about.mode();
            mode & 0o001 != 0
                || (about.uid() == user.uid.as_raw() && mode & 0o100 != 0)
                || (about.gid() == user.gid.as_raw() && mode & 0o010 != 0)
        }
        // We are about to make it.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    })
}

fn become_user(dir: &Path, uid: Uid, gid: Gid) -> Result<()> {
    let user = User::from_uid(uid)?;
    remember_programs(dir, uid, gid)?;
    let name = user.as_ref().map_or_else(|| uid.to_string(), |user| user.name.clone());
    let become_it = || -> Result<()> {
        match &user {
            Some(user) => initgroups(&std::ffi::CString::new(user.name.as_str())?, gid)?,
            None => setgroups(&[gid])?,
        }
        setgid(gid)?;
        setuid(uid)?;
        // What /proc says of us is ours again.
        nix::sys::prctl::set_dumpable(true)?;
        Ok(())
    };
    become_it().with_context(|| format!("can't become user {name}, who owns {}", dir.display()))?;
    ensure!(setuid(Uid::from_raw(0)).is_err(), "user {name} can become root again");
    // SAFETY: this is the only thread: the command has started nothing yet.
    unsafe { std::env::set_var("HOME", "/") };
    Ok(())
}

/// Programs that lie where the owner can't get are opened now, and copied later, by the owner.
fn remember_programs(dir: &Path, uid: Uid, gid: Gid) -> Result<()> {
    let own = std::env::current_exe()?;
    let stand_in = User { uid, gid, ..User::from_uid(Uid::effective())?.context("no user 0")? };
    if is_reachable(&own, &stand_in) {
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
