//! Directories of a cluster, and what each of them is for.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::space::Space;

/// What a directory keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// WAL that clients were told is durable.
    Wal,
    /// Pages and WAL of the past, for ever.
    Objects,
    /// What is made again from the other two.
    Cache,
    /// Shared memory, of which a part is put on disk where there is no room.
    Memory,
}

impl Keeps {
    /// Whether something is lost with it.
    pub fn is_lasting(self) -> bool {
        matches!(self, Keeps::Wal | Keeps::Objects)
    }
}

/// A directory that is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Whose it is.
    pub object: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it keeps.
    pub keeps: Keeps,
}

impl Place {
    /// See the fields.
    pub fn new(object: &str, path: impl Into<PathBuf>, keeps: Keeps) -> Place {
        Place { object: object.to_owned(), path: path.into(), keeps }
    }
}

/// What was seen of it.
#[derive(Debug)]
pub struct Seen {
    /// Which one.
    pub place: Place,
    /// Where it is without links; of one that is not there yet the nearest directory above it that is.
    pub path: PathBuf,
    /// Number of the file system's device, in the kernel's two parts.
    pub device: (u64, u64),
    /// Room in it.
    pub space: Option<Space>,
}

/// The nearest directory that is there, without links.
fn nearest(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find_map(|above| above.canonicalize().ok())
}

/// Looks at a directory, which may hang. The error is for people.
pub fn look(place: Place) -> Result<Seen, (Place, String)> {
    let Some(path) = nearest(&place.path) else {
        let text = format!("{} leads nowhere", place.path.display());
        return Err((place, text));
    };
    match fs::metadata(&path) {
        Ok(about) => {
            let device = about.dev();
            let device = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
            let space = Space::of(&path);
            Ok(Seen { place, path, device, space })
        }
        Err(error) => Err((place, format!("{}: {error}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_where_it_would_be() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, directory.path().join("link")).unwrap();
        for path in ["", "a/b/c", "link/a"] {
            let place = Place::new("x", directory.path().join(path), Keeps::Wal);
            let seen = look(place).unwrap();
            assert_eq!(seen.path, real, "{path}");
            assert!(seen.space.unwrap().total > 0);
        }
    }
}
