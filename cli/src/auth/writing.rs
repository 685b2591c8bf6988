//! Directories and files of keys, which others see whole or not at all, and which outlive a crash once they are there.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::{Builder, NamedTempFile, TempDir};

/// Mode of what anybody may read.
pub const PUBLIC: u32 = 0o644;
/// Mode of keys.
pub const PRIVATE: u32 = 0o600;

/// Files in the making begin so: hidden, and taken for nothing by whoever looks.
const PREFIX: &str = ".pgstrata-";

fn sync(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("can't sync {}", directory.display()))
}

/// Writes a file, in place of another if there is one.
pub fn put(directory: &Path, name: &str, content: &str, mode: u32) -> Result<()> {
    let path = directory.join(name);
    let write = || -> std::io::Result<()> {
        // Of a new name, and its owner's alone: nobody has prepared it, and nobody reads a key in the meantime.
        let mut file = NamedTempFile::with_prefix_in(PREFIX, directory)?;
        file.write_all(content.as_bytes())?;
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("can't write {}", path.display()))?;
    sync(directory)
}

/// A directory in the making, its owner's alone, beside where it will be; gone again if nothing becomes of it.
pub fn stage(beside: &Path) -> Result<TempDir> {
    Builder::new()
        .prefix(PREFIX)
        .tempdir_in(beside)
        .with_context(|| format!("can't create a directory in {}", beside.display()))
}

/// Gives a directory its name. One that is there must be empty.
pub fn publish(stage: TempDir, parent: &Path, path: &Path) -> Result<()> {
    sync(stage.path())?;
    fs::rename(stage.path(), path).with_context(|| format!("can't create {}", path.display()))?;
    // It is there no more under the name by which it would be removed.
    let _ = stage.keep();
    sync(parent)
}

/// Puts the files of a staged directory into one that is there, each in place of the one of its name, in this order.
pub fn exchange(stage: &Path, directory: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        let to = directory.join(name);
        fs::rename(stage.join(name), &to)
            .with_context(|| format!("can't write {}: do it again", to.display()))?;
    }
    sync(directory)
}
