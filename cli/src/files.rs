//! Files that others may have had their hands on.
//!
//! Where root runs a cluster, PostgreSQL runs as another user, and whoever is its superuser can make files as that user.
//! Nothing that such a user can write is followed, opened by its path, or executed by us: directories that we put things
//! into are our own, the one directory that is given away is checked through a descriptor that does not follow links.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::unistd::{Uid, User};

/// Reads a small regular file. `None` if there is none. A pipe or a device is refused, and never waited for.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
    };
    let about = file.metadata()?;
    ensure!(about.is_file(), "{} is no regular file: put the right one there", path.display());
    ensure!(
        about.len() <= limit,
        "{} has {} bytes, and can't have more than {limit}: put the right one there",
        path.display(),
        about.len()
    );
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("can't read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= limit, "{} grows while it is read", path.display());
    Ok(Some(bytes))
}

/// Writes a file so that a crash leaves the old or the new one.
pub fn replace(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, dir.join(name))?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("can't write {}", dir.join(name).display()))
}

/// Makes a directory whose parent is ours, or takes the one that is there: not a link, and of us, of `user`, or of
/// `former`. It is then `user`'s, or ours without one.
pub fn own_directory(
    path: &Path,
    mode: u32,
    user: Option<&User>,
    former: Option<&User>,
) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("can't create {}", parent.display()))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("can't create {}", path.display()));
        }
        _ => {}
    }
    let directory = open_directory(path)?;
    let about = directory.metadata()?;
    let us = Uid::effective().as_raw();
    let known = [user, former].into_iter().flatten().map(|user| user.uid.as_raw());
    let is_known = known.chain([us]).any(|known| about.uid() == known);
    ensure!(
        is_known,
        "{} belongs to user {}, which is nobody of this cluster's: remove it",
        path.display(),
        about.uid()
    );
    let (owner, group) = match user {
        Some(user) => (user.uid.as_raw(), user.gid.as_raw()),
        None => (us, nix::unistd::Gid::effective().as_raw()),
    };
    if (about.uid(), about.gid()) != (owner, group) {
        fchown(&directory, Some(owner), Some(group))
            .with_context(|| format!("can't change the owner of {}", path.display()))?;
    }
    if user.is_none() && about.mode() & 0o7777 != mode {
        directory
            .set_permissions(fs::Permissions::from_mode(mode))
            .with_context(|| format!("can't change the mode of {}", path.display()))?;
    }
    Ok(())
}

fn open_directory(path: &Path) -> Result<File> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .with_context(|| format!("{} is no directory, or a link to one: remove it", path.display()))
}

/// Puts a program into a directory of ours, where others can read it, unless it is there. The directory holds nothing
/// else.
pub fn place_program(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    // One that somebody else could write: what is in it is nobody's.
    if let Ok(about) = fs::symlink_metadata(directory)
        && (!about.is_dir() || about.uid() != Uid::effective().as_raw())
    {
        let removed = match about.is_dir() {
            true => fs::remove_dir_all(directory),
            false => fs::remove_file(directory),
        };
        removed.with_context(|| format!("can't remove {}", directory.display()))?;
    }
    own_directory(directory, 0o755, None, None)?;
    // Through the descriptor that was checked.
    let opened = open_directory(directory)?;
    let inside = Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string());
    let place = inside.join(name);
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let mut present = Vec::new();
    let same = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(&place)
        .and_then(|file| file.take(content.len() as u64 + 1).read_to_end(&mut present))
        .is_ok_and(|_| present == content);
    if same {
        return Ok(());
    }
    // Renamed into place: the old one may be running.
    let temporary = inside.join(format!(".{name}.{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o755).open(&temporary).and_then(
            |mut file| {
                io::Write::write_all(&mut file, content)?;
                file.set_permissions(fs::Permissions::from_mode(0o755))?;
                fs::rename(&temporary, &place)
            },
        );
    written.with_context(|| format!("can't write {}", directory.join(name).display()))
}

/// Opens a file of ours for writing, emptied unless it is appended to; makes it where there is none. A pipe, a device or
/// a link in its place is refused, and never waited for.
pub fn open_for_writing(path: &Path, append: bool) -> Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let mut options = OpenOptions::new();
    options.create(true).append(append).write(true).custom_flags(flags.bits());
    let opened = options.open(path).and_then(|file| Ok((file.metadata()?.is_file(), file)));
    let is_other = match &opened {
        Ok((is_file, _)) => !is_file,
        // A pipe that nobody reads, and a link, can't be opened at all.
        Err(_) => fs::symlink_metadata(path).is_ok_and(|about| !about.is_file()),
    };
    ensure!(!is_other, "{} is no regular file: remove it", path.display());
    let (_, file) = opened.with_context(|| format!("can't open {}", path.display()))?;
    if !append {
        // Not while it is opened: then what is in its place would be emptied as well.
        file.set_len(0).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn s1_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o711)).unwrap();
        let link = directory.path().join("evil");
        symlink(&victim, &link).unwrap();
        let error = own_directory(&link, 0o700, None, None).unwrap_err().to_string();
        assert!(error.contains("link"), "{error}");
        assert_eq!(fs::metadata(&victim).unwrap().mode() & 0o777, 0o711);

        // A program's place that is a link to a file of ours, in a directory that is a link itself.
        let file = directory.path().join("file");
        fs::write(&file, "ours").unwrap();
        symlink(&file, victim.join("program")).unwrap();
        place_program(&link, "program", b"program").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"ours");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
        place_program(&victim, "program", b"program").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"ours");
        assert_eq!(fs::read(victim.join("program")).unwrap(), b"program");
    }

    #[test]
    fn s4_only_regular_files_of_bounded_size_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.json");
        assert!(read(&path, 10).unwrap().is_none());
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = read(&path, 10).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
        fs::remove_file(&path).unwrap();
        symlink("/dev/zero", &path).unwrap();
        assert!(read(&path, 10).is_err());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "0123456789").unwrap();
        assert_eq!(read(&path, 10).unwrap().unwrap(), b"0123456789");
        assert!(read(&path, 9).is_err());
    }
}
