//! Directories of this machine: looked at with deadlines, and those that are in one mount together.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::disks::{self, Disk};
use super::finding::{Finding, Severity};
use super::later::Later;
use super::mounts::{self, Mount};
use super::place::{self, Keeps, Place, Seen};
use super::space;
use super::syncs::{self, Measured};

/// Where the kernel shows devices.
const SYS: &str = "/sys";
/// Longest wait for a disk to take what is written to measure it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// Where shared memory is.
const MEMORY: &str = "/dev/shm";

/// The directory of shared memory.
pub fn memory() -> Place {
    Place::new(MEMORY, MEMORY, Keeps::Memory)
}

/// Places of one kind in one mount.
struct Group {
    /// With the names of all, and the path of one that is there.
    place: Place,
    mount: Option<Mount>,
    device: (u64, u64),
    space: Option<space::Space>,
}

fn is_alike(group: &Group, seen: &Seen, mount: Option<&Mount>) -> bool {
    let (one, other) = (group.place.keeps, seen.place.keeps);
    let is_of_kind = one == other || (one.is_lasting() && other.is_lasting());
    is_of_kind && group.device == seen.device && group.mount.as_ref() == mount
}

/// What is found of one mount is said once.
fn grouped(seen: &[Seen], mounts: &[Mount]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for one in seen {
        let mount = mounts::of(mounts, &one.path);
        if let Some(group) = groups.iter_mut().find(|group| is_alike(group, one, mount)) {
            group.place.object = format!("{}, {}", group.place.object, one.place.object);
            continue;
        }
        let place = Place { path: one.path.clone(), ..one.place.clone() };
        groups.push(Group { place, mount: mount.cloned(), device: one.device, space: one.space });
    }
    groups
}

/// What a disk is called to tell it from others: by its file system's device where the kernel shows none.
fn disk_name(disk: Option<&Disk>, (major, minor): (u64, u64)) -> String {
    disk.map_or_else(|| format!("{major}:{minor}"), |disk| disk.name.clone())
}

/// Looks at each, all at the same time. Those that don't answer are findings.
fn look_at(places: Vec<Place>, deadline: Instant, findings: &mut Vec<Finding>) -> Vec<Seen> {
    let asked: Vec<_> = places
        .into_iter()
        .map(|place| (place.clone(), Later::start(move || place::look(place))))
        .collect();
    let mut seen = Vec::new();
    for (place, later) in asked {
        let (severity, text) = match later.wait(deadline) {
            Some(Ok(one)) => {
                seen.push(one);
                continue;
            }
            Some(Err((_, why))) => (Severity::Unknown, format!("not looked at: {why}")),
            None => {
                let severity =
                    if place.keeps.is_lasting() { Severity::Danger } else { Severity::Warning };
                let path = place.path.display();
                (severity, format!("{path} does not answer: see whether its disk does (dmesg)"))
            }
        };
        findings.push(Finding::new("mounts", &place.object, severity, &text));
    }
    seen
}

/// Everything about directories. `safekeepers` is how many the cluster has, wherever they are.
pub fn check(places: Vec<Place>, safekeepers: usize, deadline: Instant) -> Vec<Finding> {
    let mut findings = Vec::new();
    let list = Later::start(|| std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
    let seen = look_at(places, deadline, &mut findings);
    let mounts = mounts::all(&list.wait(deadline).unwrap_or_default());
    let groups = grouped(&seen, &mounts);
    let lasting = |group: &&Group| group.place.keeps.is_lasting();
    let until = deadline.min(Instant::now() + SYNC_PATIENCE);
    let measured: Vec<_> = groups
        .iter()
        .filter(lasting)
        .map(|group| {
            let (path, mount) = (group.place.path.clone(), group.mount.clone());
            let disk = Later::start(move || Disk::of(Path::new(SYS), &mount?));
            (disk, Later::start(move || syncs::measure(&path)))
        })
        .collect();
    let measured: Vec<_> = measured
        .into_iter()
        .map(|(disk, measured)| (disk.wait(deadline).flatten(), measured.wait(until)))
        .collect();
    for group in &groups {
        findings.extend(mounts::check(&group.place, group.mount.as_ref()));
        findings.extend(space::check(&group.place, group.space));
    }
    for (group, (disk, measured)) in groups.iter().filter(lasting).zip(&measured) {
        findings.extend(check_disk(group, &mounts, disk.as_ref(), measured.as_ref()));
    }
    let disks =
        || groups.iter().filter(lasting).zip(&measured).map(|(group, (disk, _))| (group, disk));
    let disk_of = |one: &Seen| {
        let mount = mounts::of(&mounts, &one.path);
        let mut of = disks().filter(|(group, _)| is_alike(group, one, mount));
        of.next().map(|(group, disk)| disk_name(disk.as_ref(), group.device))
    };
    let keeping = |keeps: Keeps| seen.iter().filter(move |one| one.place.keeps == keeps);
    let named = |one: &Seen| Some((one.place.object.clone(), disk_of(one)?));
    let wal: Vec<_> = keeping(Keeps::Wal).filter_map(named).collect();
    let objects = keeping(Keeps::Objects).find_map(disk_of);
    // Fewer may be known than there are here: the broker forgets those who are silent.
    let safekeepers = safekeepers.max(wal.len());
    findings.extend(disks::check_one(safekeepers, &wal, objects.as_deref()));
    findings
}

/// The disk below what lasts. Of what is in memory there is none.
fn check_disk(
    group: &Group,
    mounts: &[Mount],
    disk: Option<&Disk>,
    measured: Option<&io::Result<Measured>>,
) -> Vec<Finding> {
    let is_memory = group.mount.as_ref().is_some_and(Mount::is_memory);
    if is_memory {
        return Vec::new();
    }
    let Place { object, path, .. } = &group.place;
    let is_in_memory = |file: &Path| mounts::of(mounts, file).is_some_and(Mount::is_memory);
    vec![disks::check_cache(object, disk, is_in_memory), syncs::check(object, path, measured)]
}

/// Directories that a service was told to keep its things in.
pub fn places_of(
    program: &str,
    object: &str,
    dir: Option<PathBuf>,
    store: Option<PathBuf>,
) -> Vec<Place> {
    let keeps = if program == "safekeeper" { Keeps::Wal } else { Keeps::Cache };
    let own = dir.map(|dir| Place::new(object, dir, keeps));
    let store = store.map(|store| Place::new("objects", store, Keeps::Objects));
    own.into_iter().chain(store).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(object: &str, path: &str, keeps: Keeps, device: u64) -> Seen {
        let place = Place::new(object, path, keeps);
        Seen { path: path.into(), place, device: (8, device), space: None }
    }

    #[test]
    fn what_is_in_one_mount_is_said_once() {
        let mounts = mounts::all(
            "1 1 8:0 / / rw - ext4 /dev/sda rw\n2 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n3 1 0:9 / /mem rw - tmpfs t rw",
        );
        let all = [
            seen("safekeeper-1", "/a/1", Keeps::Wal, 0),
            seen("safekeeper-2", "/srv/2", Keeps::Wal, 1),
            seen("objects", "/a/o", Keeps::Objects, 0),
            seen("pageserver", "/a/p", Keeps::Cache, 0),
            seen("computes", "/a/c", Keeps::Cache, 0),
            // A file system below the mount, as of btrfs.
            seen("safekeeper-3", "/a/3", Keeps::Wal, 7),
        ];
        let groups = grouped(&all, &mounts);
        let named: Vec<_> = groups.iter().map(|group| group.place.object.as_str()).collect();
        assert_eq!(
            named,
            ["safekeeper-1, objects", "safekeeper-2", "pageserver, computes", "safekeeper-3"]
        );
        assert_eq!(groups[1].mount.as_ref().unwrap().source, "/dev/sda1");
    }

    #[test]
    fn a_directory_is_looked_at_from_end_to_end() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str, keeps| Place::new(name, directory.path().join(name), keeps);
        let places = vec![
            place("safekeeper-1", Keeps::Wal),
            place("safekeeper-2", Keeps::Wal),
            place("safekeeper-3", Keeps::Wal),
            place("objects", Keeps::Objects),
            place("computes", Keeps::Cache),
        ];
        let deadline = Instant::now() + Duration::from_secs(30);
        let findings = check(places, 3, deadline);
        let of = |check: &str| findings.iter().filter(|finding| finding.check == check).count();
        assert!(of("mounts") >= 2 && of("space") >= 2, "{findings:?}");
        let disks: Vec<_> = findings.iter().filter(|finding| finding.check == "disks").collect();
        assert_eq!(disks.len(), 1, "{findings:?}");
        assert!(
            disks[0].text.starts_with("3 of 3 safekeepers, and all objects, are on disk "),
            "{disks:?}"
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
    }
}
