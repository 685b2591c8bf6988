//! Disks below file systems: what the kernel knows of their write caches, and what is on one disk.
//!
//! A cache that the kernel knows of ("write back") is emptied by each sync, and is no danger. One that a disk has and denies
//! ("write through") can't be seen from here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::finding::{Finding, Severity};
use super::mounts::Mount;

const CACHES: &str = "write caches";
const ONE_DISK: &str = "disks";

/// Disks below disks that are followed, at most.
const DEPTH: usize = 8;

/// What the kernel says of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name, such as `sda`; that of what it is made of, where that is one.
    pub name: String,
    /// `write back` or `write through`.
    cache: Option<String>,
    /// Whether a single write can go past the cache.
    fua: Option<bool>,
    /// The file that it is made of.
    pub backing_file: Option<PathBuf>,
}

fn word(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The device that a mount is made of: of some file systems the number is none of a disk.
fn device_of(mount: &Mount, number: impl Fn(&str) -> Option<(u64, u64)>) -> (u64, u64) {
    match mount.device {
        (0, _) if mount.source.starts_with("/dev/") => {
            number(&mount.source).unwrap_or(mount.device)
        }
        device => device,
    }
}

/// The number of a device file.
fn number(source: &str) -> Option<(u64, u64)> {
    let device =
        fs::metadata(source).ok().map(|about| std::os::unix::fs::MetadataExt::rdev(&about))?;
    Some((nix::sys::stat::major(device), nix::sys::stat::minor(device)))
}

impl Disk {
    /// The disk of a mount, if the kernel shows one below `sys`, which is `/sys`.
    pub fn of(sys: &Path, mount: &Mount) -> Option<Disk> {
        let (major, minor) = device_of(mount, number);
        let own = sys.join(format!("dev/block/{major}:{minor}")).canonicalize().ok()?;
        let whole = match own.join("partition").exists() {
            true => own.parent()?.to_owned(),
            false => own,
        };
        let mut lowest = whole.clone();
        for _ in 0..DEPTH {
            let below: Vec<_> =
                fs::read_dir(lowest.join("slaves")).into_iter().flatten().flatten().collect();
            // What is made of several is a disk of its own: the kernel does not say which of them has what.
            let [one] = below.as_slice() else { break };
            lowest = one.path().canonicalize().ok()?;
            if lowest.join("partition").exists() {
                lowest.pop();
            }
        }
        Some(Disk {
            name: lowest.file_name()?.to_string_lossy().into_owned(),
            cache: word(&whole.join("queue/write_cache")),
            fua: word(&whole.join("queue/fua")).map(|text| text == "1"),
            backing_file: word(&whole.join("loop/backing_file")).map(PathBuf::from),
        })
    }
}

/// The write cache below a place. `is_in_memory` says whether a file is.
pub fn check_cache(
    object: &str,
    disk: Option<&Disk>,
    is_in_memory: impl Fn(&Path) -> bool,
) -> Finding {
    let finding = |severity, text: &str| Finding::new(CACHES, object, severity, text);
    let Some(disk) = disk else {
        let text = "not looked at: the kernel shows no disk below its file system";
        return finding(Severity::Unknown, text);
    };
    let name = &disk.name;
    if let Some(file) = disk.backing_file.as_deref().filter(|file| is_in_memory(file)) {
        let text = format!(
            "its disk {name} is the file {}, which is in memory: a restart of the machine empties it; keep it on a disk",
            file.display()
        );
        return finding(Severity::Danger, &text);
    }
    match (disk.cache.as_deref(), disk.fua) {
        (Some("write back"), fua) => {
            let how = if fua == Some(true) {
                "each sync empties, or passes by"
            } else {
                "each sync empties"
            };
            finding(Severity::Ok, &format!("disk {name} has a write cache, which {how}"))
        }
        (Some("write through"), _) => {
            let text = format!(
                "disk {name} says that it has no write cache that could be lost, and whether that is so can't be seen from here: \
                 look at its controller's, or at the hypervisor's, settings"
            );
            finding(Severity::Unknown, &text)
        }
        (other, _) => {
            let said = other.unwrap_or("nothing");
            let text =
                format!("not known: the kernel says {said} of the write cache of disk {name}");
            finding(Severity::Unknown, &text)
        }
    }
}

/// Whether a majority of a cluster's safekeepers, of which there are `count`, and its objects are on one disk. Those of
/// `safekeepers` are known with their disks; `objects` is the disk of an object store that is a directory.
pub fn check_one(
    count: usize,
    safekeepers: &[(String, String)],
    objects: Option<&str>,
) -> Option<Finding> {
    let mut by_disk: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (object, disk) in safekeepers {
        by_disk.entry(disk).or_default().push(object);
    }
    let crowded = by_disk.into_iter().find(|(_, on_it)| on_it.len() > count / 2);
    let Some((disk, on_it)) = crowded.filter(|_| count > 1) else {
        let several = (safekeepers.len() == count && count > 1)
            .then_some("no disk has a majority of the safekeepers");
        return several.map(|text| Finding::new(ONE_DISK, "safekeepers", Severity::Ok, text));
    };
    let and_objects = if objects == Some(disk) { ", and all objects," } else { "" };
    let text = format!(
        "{} of {count} safekeepers{and_objects} are on disk {disk}: what was committed may be lost with it. That is enough to try \
         things out; for more, put them on machines of their own",
        on_it.len()
    );
    Some(Finding::new(ONE_DISK, "safekeepers", Severity::Warning, &text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::mounts;
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn mount(device: &str) -> Mount {
        mounts::all(&format!("1 1 {device} / / rw - ext4 /dev/x rw")).remove(0)
    }

    /// As the kernel has them: a disk with a partition, a volume on that, and a file as a disk.
    fn sys() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let devices = sys.path().join("devices");
        write(devices.join("sda/queue/write_cache"), "write back\n");
        write(devices.join("sda/queue/fua"), "1\n");
        write(devices.join("sda/sda1/partition"), "1\n");
        write(devices.join("dm-0/queue/write_cache"), "write back\n");
        write(devices.join("dm-0/queue/fua"), "0\n");
        write(devices.join("loop3/queue/write_cache"), "write through\n");
        write(devices.join("loop3/loop/backing_file"), "/mem/disk.img\n");
        fs::create_dir_all(devices.join("dm-0/slaves")).unwrap();
        symlink(devices.join("sda/sda1"), devices.join("dm-0/slaves/sda1")).unwrap();
        fs::create_dir_all(sys.path().join("dev/block")).unwrap();
        for (number, path) in
            [("8:0", "sda"), ("8:1", "sda/sda1"), ("253:0", "dm-0"), ("7:3", "loop3")]
        {
            symlink(devices.join(path), sys.path().join("dev/block").join(number)).unwrap();
        }
        sys
    }

    #[test]
    fn a_write_cache_is_what_the_kernel_says() {
        let sys = sys();
        let check = |device: &str| {
            let disk = Disk::of(sys.path(), &mount(device));
            let found = check_cache("it", disk.as_ref(), |file| file.starts_with("/mem"));
            (found.severity, found.text)
        };
        for device in ["8:0", "8:1"] {
            let expected = "disk sda has a write cache, which each sync empties, or passes by";
            assert_eq!(check(device), (Severity::Ok, expected.to_owned()));
        }
        // A volume is on the disk that it is on.
        assert_eq!(
            check("253:0"),
            (Severity::Ok, "disk sda has a write cache, which each sync empties".into())
        );
        let (severity, text) = check("7:3");
        assert_eq!(severity, Severity::Danger);
        assert!(
            text.starts_with("its disk loop3 is the file /mem/disk.img, which is in memory"),
            "{text}"
        );
        fs::write(sys.path().join("devices/loop3/loop/backing_file"), "/disk.img").unwrap();
        let (severity, text) = check("7:3");
        assert_eq!(severity, Severity::Unknown);
        assert!(text.contains("whether that is so can't be seen from here"), "{text}");
        assert_eq!(check("0:40").0, Severity::Unknown);
    }

    #[test]
    fn a_file_system_of_no_disk_is_on_the_one_that_it_names() {
        let of = |source: &str| {
            let mount = mounts::all(&format!("1 1 0:40 / / rw - btrfs {source} rw")).remove(0);
            device_of(&mount, |source| (source == "/dev/sda1").then_some((8, 1)))
        };
        assert_eq!(of("/dev/sda1"), (8, 1));
        assert_eq!(of("/dev/gone"), (0, 40));
        assert_eq!(of("server:/export"), (0, 40));
        assert_eq!(device_of(&mount("8:2"), |_| Some((1, 1))), (8, 2));
    }

    #[test]
    fn a_majority_on_one_disk_is_warned_of() {
        let check = |count: usize, disks: &[&str], objects: Option<&str>| {
            let named: Vec<_> = disks
                .iter()
                .enumerate()
                .map(|(at, disk)| (format!("safekeeper-{}", at + 1), (*disk).to_owned()))
                .collect();
            check_one(count, &named, objects).map(|found| (found.severity, found.text))
        };
        let (severity, text) = check(3, &["sda", "sda", "sdb"], Some("sda")).unwrap();
        assert_eq!(severity, Severity::Warning);
        assert!(
            text.starts_with("2 of 3 safekeepers, and all objects, are on disk sda:"),
            "{text}"
        );
        let (_, text) = check(3, &["sdb", "sdb", "sdb"], Some("sda")).unwrap();
        assert!(text.starts_with("3 of 3 safekeepers are on disk sdb:"), "{text}");
        assert_eq!(check(3, &["sda", "sdb", "sdc"], Some("sda")).unwrap().0, Severity::Ok);
        assert_eq!(check(4, &["sda", "sda", "sdb", "sdb"], None).unwrap().0, Severity::Ok);
        // Of one there is no majority, and of those that are elsewhere nothing is known.
        for (count, disks) in [(1, &["sda"][..]), (3, &["sda"]), (3, &[]), (0, &[])] {
            assert_eq!(check(count, disks, Some("sda")), None, "{count}");
        }
    }
}
