//! Mounts: whether what is written into a directory is there after a restart, and after the power was cut.
//!
//! The kernel's list is `/proc/self/mountinfo` (`Documentation/filesystems/proc.rst`, 3.5).

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::finding::{Finding, Severity};
use super::place::{Keeps, Place};

const CHECK: &str = "mounts";

/// A file system at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub point: PathBuf,
    /// Number of its device, in the kernel's two parts.
    pub device: (u64, u64),
    /// What it is, such as `ext4`.
    pub kind: String,
    /// What it is made of, such as `/dev/sda1`.
    pub source: String,
    /// Options of the mount, and of the file system.
    options: Vec<String>,
}

/// Undoes the kernel's `\040` for a blank and the like.
fn unescaped(text: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\');
        let number = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let (byte, after) = match number.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => (byte, &after[3..]),
            None => (first, after),
        };
        bytes.push(byte);
        rest = after;
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// One line; `None` where it is of another form.
fn parse(line: &str) -> Option<Mount> {
    let (own, of_kind) = line.split_once(" - ")?;
    let own: Vec<&str> = own.split(' ').collect();
    let of_kind: Vec<&str> = of_kind.split(' ').collect();
    let (major, minor) = own.get(2)?.split_once(':')?;
    let options = [own.get(5)?, of_kind.get(2).unwrap_or(&"")];
    Some(Mount {
        point: unescaped(own.get(4)?),
        device: (major.parse().ok()?, minor.parse().ok()?),
        kind: (*of_kind.first()?).to_owned(),
        source: unescaped(of_kind.get(1)?).display().to_string(),
        options: options.iter().flat_map(|all| all.split(',')).map(str::to_owned).collect(),
    })
}

/// All mounts of a list.
pub fn all(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(parse).collect()
}

/// The mount that a path without links is in: the longest one, and of several at one place the last, which hides the others.
pub fn of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    above.max_by_key(|mount| mount.point.components().count())
}

impl Mount {
    /// Whether what is in it is in memory only.
    pub fn is_memory(&self) -> bool {
        let in_memory = ["tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"];
        let device = self.source.strip_prefix("/dev/").unwrap_or_default();
        let numbered = |name: &str| {
            let number = device.strip_prefix(name).unwrap_or_default();
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        };
        in_memory.contains(&self.kind.as_str()) || numbered("ram") || numbered("zram")
    }

    fn is_elsewhere(&self) -> bool {
        let network = [
            "9p",
            "afs",
            "ceph",
            "cifs",
            "coda",
            "glusterfs",
            "lustre",
            "ncpfs",
            "nfs",
            "nfs4",
            "orangefs",
            "smb3",
            "smbfs",
            "virtiofs",
            "vboxsf",
        ];
        network.contains(&self.kind.as_str()) || self.kind.starts_with("fuse")
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|one| one == option)
    }
}

/// What is wrong with the mount that a place is in, and how much.
fn troubles(place: &Place, mount: &Mount) -> Vec<(Severity, String)> {
    let (kind, point) = (&mount.kind, mount.point.display());
    let mut found = Vec::new();
    let mut say = |severity, text: String| found.push((severity, text));
    if !place.keeps.is_lasting() {
        // What is lost here is made again.
        if mount.has("ro") {
            say(Severity::Danger, format!("{point} is read-only: mount it with 'rw'"));
        }
        return found;
    }
    if mount.is_memory() {
        let text = format!(
            "it is on {kind} ({point}), which a restart of the machine empties: keep it on a disk"
        );
        say(Severity::Danger, text);
    }
    if mount.has("ro") {
        let text =
            format!("{point} is read-only, and nothing can be kept there: mount it with 'rw'");
        say(Severity::Danger, text);
    }
    if kind == "overlay" {
        match mount.has("volatile") {
            true => say(
                Severity::Danger,
                format!(
                    "it is on an overlay that is mounted 'volatile' ({point}), where no sync reaches a disk: use a volume"
                ),
            ),
            false => say(
                Severity::Warning,
                format!(
                    "it is on an overlay ({point}), which goes when its container is removed: use a volume"
                ),
            ),
        }
    }
    if mount.is_elsewhere() {
        let text = format!(
            "it is on {kind} ({point}): that what is synced is kept is up to {}, and can't be seen from here; a local disk can \
             be trusted more",
            mount.source
        );
        say(Severity::Warning, text);
    }
    for option in ["nobarrier", "barrier=0", "barrier=none"] {
        if mount.has(option) {
            let text = format!(
                "{point} is mounted with '{option}', so that what is synced may be in the disk's cache only when the power is \
                 cut: mount it without"
            );
            say(Severity::Danger, text);
        }
    }
    if mount.has("data=writeback") {
        let text = format!(
            "{point} is mounted with 'data=writeback', so that files may end in what was deleted before a crash: mount it \
             with 'data=ordered'"
        );
        say(Severity::Warning, text);
    }
    found
}

/// The mount of a place.
pub fn check(place: &Place, mount: Option<&Mount>) -> Vec<Finding> {
    let finding = |severity, text: &str| Finding::new(CHECK, &place.object, severity, text);
    let Some(mount) = mount else {
        let text =
            format!("not looked at: {} is in no mount that can be seen", place.path.display());
        return vec![finding(Severity::Unknown, &text)];
    };
    let found = troubles(place, mount);
    if found.is_empty() && place.keeps != Keeps::Memory {
        let text = format!("{} is on {} ({})", place.path.display(), mount.kind, mount.source);
        return vec![finding(Severity::Ok, &text)];
    }
    found.iter().map(|(severity, text)| finding(*severity, text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 27 8:1 / /srv rw shared:5 master:1 - ext4 /dev/sda1 rw,barrier=0,data=writeback
31 30 0:40 / /srv/mem\\040ory rw,nosuid - tmpfs tmpfs rw,size=24683656k
32 27 0:41 / /net rw - nfs4 server:/export rw,vers=4.2,hard
33 27 8:17 / /ro ro,relatime - xfs /dev/sdb1 ro
34 27 0:42 / /layers rw - overlay overlay rw,lowerdir=/a,volatile
35 27 0:43 / /container rw - overlay overlay rw,lowerdir=/a
36 27 0:44 / /twice rw - tmpfs first rw
37 36 8:33 / /twice rw - btrfs /dev/sdc1 rw,nobarrier
38 27 1:0 / /ramdisk rw - ext4 /dev/ram0 rw
39 27 0:45 / /fuse rw - fuse.sshfs a@b: rw
a line of another form
40 27 x:y / /bad rw - ext4 /dev/sdz rw";

    fn found(path: &str, keeps: Keeps) -> Vec<(Severity, String)> {
        let place = Place::new("it", path, keeps);
        let mounts = all(LIST);
        let found = check(&place, of(&mounts, Path::new(path)));
        found.into_iter().map(|finding| (finding.severity, finding.text)).collect()
    }

    fn severities(path: &str, keeps: Keeps) -> Vec<Severity> {
        found(path, keeps).into_iter().map(|(severity, _)| severity).collect()
    }

    #[test]
    fn the_longest_mount_is_the_one() {
        let mounts = all(LIST);
        assert_eq!(mounts.len(), 12);
        for (path, point) in [
            ("/var/lib", "/"),
            ("/srv", "/srv"),
            ("/srvx", "/"),
            ("/srv/mem ory/deep", "/srv/mem ory"),
            ("/proc/1", "/proc"),
        ] {
            assert_eq!(of(&mounts, Path::new(path)).unwrap().point, Path::new(point), "{path}");
        }
        let last = of(&mounts, Path::new("/twice/x")).unwrap();
        assert_eq!((last.source.as_str(), last.device), ("/dev/sdc1", (8, 33)));
        assert_eq!(of(&[], Path::new("/")), None);
    }

    #[test]
    fn what_a_restart_or_a_power_cut_takes_is_a_danger() {
        use Severity::{Danger, Ok, Warning};
        for keeps in [Keeps::Wal, Keeps::Objects] {
            for (path, expected) in [
                ("/var/lib", &[Ok][..]),
                ("/srv/a", &[Danger, Warning]),
                ("/srv/mem ory/a", &[Danger]),
                ("/net/a", &[Warning]),
                ("/ro/a", &[Danger]),
                ("/layers/a", &[Danger]),
                ("/container/a", &[Warning]),
                ("/twice/a", &[Danger]),
                ("/ramdisk/a", &[Danger]),
                ("/fuse/a", &[Warning]),
            ] {
                assert_eq!(severities(path, keeps), expected, "{path}");
            }
        }
        let text = found("/srv/mem ory/a", Keeps::Wal).remove(0).1;
        assert_eq!(
            text,
            "it is on tmpfs (/srv/mem ory), which a restart of the machine empties: keep it on a disk"
        );
        assert_eq!(found("/var/lib", Keeps::Wal)[0].1, "/var/lib is on ext4 (/dev/vda)");
    }

    #[test]
    fn what_is_made_again_may_be_anywhere() {
        for path in ["/srv/mem ory/a", "/net/a", "/layers/a", "/srv/a", "/ramdisk/a"] {
            assert_eq!(severities(path, Keeps::Cache), [Severity::Ok], "{path}");
        }
        assert_eq!(severities("/ro/a", Keeps::Cache), [Severity::Danger]);
        assert_eq!(severities("/srv/mem ory", Keeps::Memory), []);
        let place = Place::new("it", "/x", Keeps::Wal);
        assert_eq!(check(&place, None)[0].severity, Severity::Unknown);
    }

    #[test]
    fn escapes_of_the_kernel_are_undone() {
        for (escaped, path) in [
            ("/a\\040b\\011c\\134d", "/a b\tc\\d"),
            ("/a\\04", "/a\\04"),
            ("/\\999", "/\\999"),
            ("\\", "\\"),
        ] {
            assert_eq!(unescaped(escaped), Path::new(path), "{escaped}");
        }
    }
}
