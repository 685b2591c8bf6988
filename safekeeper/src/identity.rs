//! Which node this directory belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, bail};
use pgstrata_env::{Disk, replace_file};
use pgstrata_format::safekeeper::{
    MAX_MEMBERS_MET, decode_identity, decode_members, encode_identity, encode_timelines,
};
use pgstrata_ids::{Incarnation, Member, NodeId, TenantId};

/// Largest file that is read, in bytes.
const MAX_SIZE: u64 = 64 + MAX_MEMBERS_MET as u64 * 24;

/// Whose a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// Who, in this life of it.
    pub member: Member,
    /// Whether it must have a list of timelines: one of an older version gets it now.
    pub has_list: bool,
}

/// Reads the identity of `directory`, or makes the directory `wanted`'s if it is new, with an incarnation that nobody has had: `draw`
/// gives one.
pub fn load_or_create(
    disk: &dyn Disk,
    directory: &Path,
    wanted: Option<NodeId>,
    draw: impl Fn() -> Incarnation,
) -> anyhow::Result<Own> {
    let path = directory.join("identity");
    if let Some(bytes) = read_if_there(disk, &path)? {
        let found = decode_identity(&bytes).with_context(|| path.display().to_string())?;
        let node = found.node;
        if let Some(wanted) = wanted.filter(|wanted| *wanted != node) {
            bail!(
                "{} belongs to safekeeper {node}, not {wanted}: check --dir and --id",
                directory.display()
            );
        }
        // Directories of the first version have none yet, and have forgotten nothing.
        let incarnation = found.incarnation.unwrap_or_else(draw);
        return Ok(Own { member: Member { node, incarnation }, has_list: found.has_list });
    }
    let Some(node) = wanted else {
        bail!("{} is new: give this safekeeper a node id with --id", directory.display());
    };
    if node.0 == 0 {
        bail!("0 is no node id: give --id a number above it");
    }
    disk.create_directory(directory)
        .with_context(|| format!("can't create {}", directory.display()))?;
    let occupied = disk.list(directory)?.iter().any(|name| name.parse::<TenantId>().is_ok());
    if occupied {
        bail!(
            "{} holds timelines but no identity: if a safekeeper's identity file was lost, give it a \
             new id and an empty directory",
            directory.display()
        );
    }
    let member = Member { node, incarnation: draw() };
    let list = directory.join("timelines");
    replace_file(disk, &list, &encode_timelines(&BTreeSet::new()))
        .with_context(|| format!("can't write {}", list.display()))?;
    write(disk, directory, member)?;
    Ok(Own { member, has_list: true })
}

/// An incarnation that nobody has had.
pub fn draw() -> Incarnation {
    Incarnation(rand::random())
}

/// Those that a directory of an older version has met: a file that is no longer written.
pub fn met(disk: &dyn Disk, directory: &Path) -> anyhow::Result<BTreeMap<NodeId, Incarnation>> {
    let path = directory.join("members");
    match read_if_there(disk, &path)? {
        None => Ok(BTreeMap::new()),
        Some(bytes) => decode_members(&bytes).with_context(|| path.display().to_string()),
    }
}

fn read_if_there(disk: &dyn Disk, path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match read(disk, path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

fn read(disk: &dyn Disk, path: &Path) -> std::io::Result<Vec<u8>> {
    let file = disk.open(path)?;
    let mut bytes = vec![0; file.size()?.min(MAX_SIZE) as usize];
    let count = file.read_at(&mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Writes down whose directory it is; from then on it has a list of timelines.
pub fn write(disk: &dyn Disk, directory: &Path, own: Member) -> anyhow::Result<()> {
    let path = directory.join("identity");
    replace_file(disk, &path, &encode_identity(own.node, own.incarnation))
        .with_context(|| format!("can't write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use pgstrata_env::RealDisk;

    use super::*;

    #[test]
    fn an_identity_is_taken_once() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("sk");
        let load = |id: Option<u64>| load_or_create(&RealDisk, &inside, id.map(NodeId), draw);
        assert!(load(None).is_err());
        assert!(load(Some(0)).is_err());
        let first = load(Some(4)).unwrap();
        assert_eq!(first.member.node, NodeId(4));
        assert_eq!(load(None).unwrap(), first);
        assert!(load(Some(5)).unwrap_err().to_string().contains("belongs to safekeeper 4"));
        std::fs::write(inside.join("identity"), b"rubbish").unwrap();
        assert!(load(Some(4)).is_err());
    }

    #[test]
    fn s4_an_identity_that_is_no_file_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let load = || load_or_create(&RealDisk, directory.path(), Some(NodeId(1)), draw);
        let error = format!("{:#}", load().unwrap_err());
        assert!(error.contains("identity") && error.contains("no regular file"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let error = format!("{:#}", load().unwrap_err());
        assert!(error.contains("identity") && error.contains("no regular file"), "{error}");
    }
}
