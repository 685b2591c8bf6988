//! Files in directories that others can write: a pipe in the place of one must not hold us up.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Opens a regular file, and nothing else, without waiting.
pub fn plain_file(path: &Path, options: &mut OpenOptions) -> Result<File> {
    let file = options
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .with_context(|| format!("can't open {}", path.display()))?;
    ensure!(file.metadata()?.is_file(), "{} is no regular file: remove it", path.display());
    Ok(file)
}
