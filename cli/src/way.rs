//! The way to a path, directory by directory: who could turn it into another one, and who can walk it.
//!
//! What root does in a directory is safe only while nobody else decides which one it is. A name is a promise of whoever
//! can change any of the directories and links that lead to it.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::User;

/// Links followed on one way, at most; as many as the kernel follows.
const MAX_LINKS: usize = 40;
/// Names in it are removed by their owners only.
const STICKY: u32 = 0o1000;
/// Group and others may write.
const OTHERS_WRITE: u32 = 0o022;

/// A path without links, as far as it exists.
#[derive(Debug, PartialEq, Eq)]
pub struct Way {
    /// What is there.
    pub existing: PathBuf,
    /// The names after it that are not.
    pub missing: Vec<OsString>,
}

fn is_roots(at: &Path, about: &Metadata) -> Result<()> {
    ensure!(about.uid() == 0, "{} belongs to user {}", at.display(), about.uid());
    // A link's mode says nothing. Nobody but root replaces what is root's in a directory with the sticky bit.
    let closed =
        about.is_symlink() || about.mode() & OTHERS_WRITE == 0 || about.mode() & STICKY != 0;
    ensure!(closed, "{} can be written by others than root", at.display());
    Ok(())
}

/// Follows a path, and refuses where anybody but root could make it lead elsewhere. While it does not refuse, what it
/// found stays so until root changes it.
pub fn roots(path: &Path) -> Result<Way> {
    walk(path, is_roots).with_context(|| format!("{} is not safe for root", path.display()))
}

/// Follows a path, with a look at each directory and each link on it, itself included.
fn walk(path: &Path, look: impl Fn(&Path, &Metadata) -> Result<()>) -> Result<Way> {
    let absolute = std::path::absolute(path)?;
    let mut ahead: Vec<OsString> =
        absolute.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        match Path::new(&name).components().next() {
            Some(Component::ParentDir) => {
                // `at` has no links: its text tells its parent.
                at.pop();
                continue;
            }
            Some(Component::CurDir) | None => continue,
            _ => {}
        }
        let next = at.join(&name);
        let about = match fs::symlink_metadata(&next) {
            Ok(about) => about,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let missing = std::iter::once(name).chain(ahead.into_iter().rev()).collect();
                return Ok(Way { existing: at, missing });
            }
            Err(error) => {
                return Err(error).with_context(|| format!("can't look at {}", next.display()));
            }
        };
        look(&next, &about)?;
        if !about.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            bail!("{} has too many links on its way", path.display());
        }
        let target = fs::read_link(&next)?;
        ahead.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
    }
    Ok(Way { existing: at, missing: Vec::new() })
}

fn may(about: &Metadata, user: &User, bits: u32) -> bool {
    let mode = about.mode();
    let shift = match () {
        () if about.uid() == user.uid.as_raw() => 6,
        () if about.gid() == user.gid.as_raw() => 3,
        () => 0,
    };
    (mode >> shift) & bits == bits
}

/// Whether a user can get to a path through the directories above it, as far as they exist.
pub fn is_reachable(path: &Path, user: &User) -> bool {
    let Ok(way) = walk(path, |_, _| Ok(())) else { return false };
    // The last one is not gone through if it is what is asked for.
    let through = match way.missing.is_empty() {
        true => way.existing.parent(),
        false => Some(way.existing.as_path()),
    };
    through.is_none_or(|last| {
        last.ancestors().all(|at| fs::metadata(at).is_ok_and(|about| may(&about, user, 0o1)))
    })
}

/// Whether a user can read a file, and execute it if it is a program and no library.
pub fn is_usable(path: &Path, user: &User) -> bool {
    let bits = if path.extension().is_some_and(|ending| ending == "so") { 0o4 } else { 0o5 };
    is_reachable(path, user) && fs::metadata(path).is_ok_and(|about| may(&about, user, bits))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use nix::unistd::Uid;

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn links_are_followed_as_the_kernel_does() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        fs::create_dir_all(place.join("a/b")).unwrap();
        symlink("a/./b", place.join("relative")).unwrap();
        symlink(place.join("relative"), place.join("a/absolute")).unwrap();
        symlink("loop", place.join("loop")).unwrap();
        let follow = |path: &str| walk(&place.join(path), |_, _| Ok(()));
        for path in ["a/b", "relative", "a/absolute", "relative/../b", "a/absolute/."] {
            let way = follow(path).unwrap();
            assert_eq!(way.existing, place.join(path).canonicalize().unwrap(), "{path}");
            assert!(way.missing.is_empty());
        }
        let way = follow("relative/x/y").unwrap();
        assert_eq!(way.existing, place.join("a/b"));
        assert_eq!(way.missing, ["x", "y"]);
        assert!(follow("loop").unwrap_err().to_string().contains("too many links"));
    }

    #[test]
    fn s1_root_goes_only_where_root_alone_decides() {
        if !Uid::effective().is_root() {
            return eprintln!("skipped: only root can make other users' directories");
        }
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        let [ours, open, sticky, theirs] =
            ["ours", "open", "sticky", "theirs"].map(|name| place.join(name));
        for directory in [&ours, &open, &sticky, &theirs] {
            fs::create_dir(directory).unwrap();
            fs::create_dir(directory.join("c")).unwrap();
        }
        mode(&open, 0o777);
        mode(&sticky, 0o1777);
        chown(&theirs, Some(65534), None).unwrap();
        symlink(&ours, theirs.join("link")).unwrap();
        symlink(&ours, sticky.join("root's")).unwrap();
        symlink(&ours, sticky.join("another's")).unwrap();
        std::os::unix::fs::lchown(sticky.join("another's"), Some(65534), None).unwrap();
        for path in ["ours", "ours/c", "ours/c/new", "sticky/c", "sticky/root's/c"] {
            roots(&place.join(path)).unwrap();
        }
        for (path, why) in [
            ("open/c", "written by others"),
            ("theirs/c", "belongs to user 65534"),
            ("theirs/link", "belongs to user 65534"),
            ("sticky/another's/c", "belongs to user 65534"),
        ] {
            let error = format!("{:#}", roots(&place.join(path)).unwrap_err());
            assert!(error.contains(why), "{path}: {error}");
        }
    }

    #[test]
    fn s1_a_way_is_walked_without_links() {
        if !Uid::effective().is_root() {
            return eprintln!("skipped: only root can make other users' directories");
        }
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        mode(place, 0o755);
        let nobody = User::from_name("nobody").unwrap().unwrap();
        fs::create_dir_all(place.join("closed/inside")).unwrap();
        mode(&place.join("closed"), 0o700);
        symlink(place.join("closed/inside"), place.join("link")).unwrap();
        assert!(is_reachable(&place.join("closed"), &nobody));
        assert!(is_reachable(&place.join("new/directory"), &nobody));
        for path in ["closed/inside", "closed/new", "link", "link/new"] {
            assert!(!is_reachable(&place.join(path), &nobody), "{path}");
        }
        let program = place.join("program");
        fs::write(&program, "").unwrap();
        mode(&program, 0o700);
        assert!(!is_usable(&program, &nobody));
        mode(&program, 0o755);
        assert!(is_usable(&program, &nobody));
    }
}
