//! Locks that the services hold on their own directories while they run: what runs in a cluster's directory, whether it
//! can be seen from here or not.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::cluster::Cluster;
use crate::compute;
use crate::process::Process;

/// How long one that was just killed may still have its lock.
const PATIENCE: Duration = Duration::from_secs(3);

/// The lock file of a process of the cluster in `dir`, by the process's name: the broker, which keeps nothing, has none.
pub fn file_of(dir: &Path, name: &str) -> Option<PathBuf> {
    match name.split_once('-') {
        Some(("safekeeper", _)) => Some(dir.join(name).join("lock")),
        Some(("compute", branch)) => Some(dir.join("computes").join(branch).join("shim.lock")),
        None if name == "pageserver" => Some(dir.join(name).join("lock")),
        _ => None,
    }
}

/// Whether somebody holds the lock of a file. One that can't be opened, or is not there, nobody holds as far as we know.
pub fn is_held(path: &Path) -> bool {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) else {
        return false;
    };
    // Given back at once.
    matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
}

/// Whether a process that we don't know has the lock of one that we know, and keeps it.
fn runs_unseen(process: &Process, lock: &Path) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while process.pid().is_none() && is_held(lock) {
        if Instant::now() > deadline {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn refuse(cluster: &Cluster, name: &str, process: &Process, lock: Option<&Path>) -> Result<()> {
    ensure!(
        !lock.is_some_and(|lock| runs_unseen(process, lock)),
        "the cluster in {} runs in another container or process namespace: {name} has its directory, and is no process \
         that was started from here; go on there, or end it there ('pgstrata down')",
        cluster.dir.display()
    );
    Ok(())
}

/// Refuses a service that runs where we don't see it.
pub fn refuse_service_elsewhere(cluster: &Cluster, name: &str) -> Result<()> {
    let process = Process::new(&cluster.dir, name);
    refuse(cluster, name, &process, file_of(&cluster.dir, name).as_deref())
}

/// Refuses a branch's compute that runs where we don't see it.
pub fn refuse_compute_elsewhere(cluster: &Cluster, branch: &str) -> Result<()> {
    let lock = cluster.compute_path(branch)?.join("shim.lock");
    refuse(cluster, &format!("compute-{branch}"), &compute::process(cluster, branch), Some(&lock))
}

/// Refuses a cluster that runs where we don't see it: the notes of its processes and its ports must stay as they are.
pub fn refuse_running_elsewhere(cluster: &Cluster) -> Result<()> {
    for place in &cluster.state.safekeepers {
        refuse_service_elsewhere(cluster, &format!("safekeeper-{}", place.id))?;
    }
    refuse_service_elsewhere(cluster, "pageserver")?;
    cluster.state.computes.keys().try_for_each(|branch| refuse_compute_elsewhere(cluster, branch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_seen_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = file_of(directory.path(), "safekeeper-1").unwrap();
        assert!(!is_held(&path) && !path.exists());
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let open = || std::fs::File::create(&path).unwrap();
        let held = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
        assert!(is_held(&path));
        drop(held);
        assert!(!is_held(&path));
        Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
        assert_eq!(file_of(directory.path(), "storage-broker"), None);
        let compute = file_of(directory.path(), "compute-a-b%c").unwrap();
        assert!(compute.ends_with("computes/a-b%c/shim.lock"));
    }
}
