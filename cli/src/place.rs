//! Where a cluster is, and whether its directory was moved or copied since it was last started.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use pgstrata_blob::{Location, claim};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cluster::{Cluster, STATE_FILE, STATE_LIMIT, State, free_ports};
use crate::files;
use crate::process::{DYING_PATIENCE, Process};

/// A cluster's directory, as it was when the cluster was last started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Home {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Home {
    fn of(dir: &Path) -> Result<Home> {
        let about = fs::metadata(dir).with_context(|| format!("can't read {}", dir.display()))?;
        Ok(Home { path: dir.to_owned(), device: about.dev(), inode: about.ino() })
    }
}

/// Where a directory is, and on which machine.
pub fn here(dir: &Path) -> Result<claim::Place> {
    let Home { path, device, inode } = Home::of(dir)?;
    let word = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Ok(claim::Place {
        // Containers may have none.
        machine: word("/etc/machine-id"),
        host: word("/proc/sys/kernel/hostname"),
        path: path.display().to_string(),
        device,
        inode,
    })
}

/// What became of a directory.
enum Place {
    Same,
    /// Another directory is where it was: a copy, perhaps, or what was put back.
    Replaced,
    Moved,
    /// It is another directory, and none is where it was: a copy too, perhaps, of one that was moved since.
    Another,
    /// Its original is there.
    Copy(PathBuf),
}

/// Whether the cluster of this tenant is in `dir`. What can't be read may be it.
fn holds(dir: &Path, tenant: &str) -> bool {
    match files::read(&dir.join(STATE_FILE), STATE_LIMIT) {
        Ok(None) => false,
        Ok(Some(bytes)) => serde_json::from_slice::<Value>(&bytes)
            .map_or(true, |state| state.get("tenant").and_then(Value::as_str) == Some(tenant)),
        Err(_) => true,
    }
}

fn place(cluster: &Cluster) -> Result<Place> {
    let Some(home) = &cluster.state.home else { return Ok(Place::Same) };
    let here = Home::of(&cluster.dir)?;
    if here.path == home.path {
        // A file system's device number may be another one after the machine started again.
        return Ok(if here.inode == home.inode { Place::Same } else { Place::Replaced });
    }
    if (here.device, here.inode) == (home.device, home.inode) {
        return Ok(Place::Moved);
    }
    Ok(match holds(&home.path, &cluster.state.tenant) {
        true => Place::Copy(home.path.clone()),
        false => Place::Another,
    })
}

/// A store inside the cluster's directory is remembered by its path there, so that it follows the directory.
pub fn remembered_store(dir: &Path, store: &str) -> String {
    match Path::new(store).strip_prefix(dir) {
        Ok(inside) if !inside.as_os_str().is_empty() => inside.display().to_string(),
        _ => store.to_owned(),
    }
}

/// Earlier versions remembered the path of the default store, wherever the directory went. Where it is certain that it
/// was the default, it is again.
pub fn migrate_store(cluster: &mut Cluster) {
    let state = &mut cluster.state;
    state.object_store = remembered_store(&cluster.dir, &state.object_store);
    let store = Path::new(&state.object_store);
    let Some(parent) = store.parent().filter(|_| store.is_absolute()) else { return };
    let was_default = store.ends_with("objects") && cluster.dir.join("objects").is_dir();
    if !was_default {
        return;
    }
    let copied = parent.join(STATE_FILE).exists() && holds(parent, &state.tenant);
    if copied || !store.exists() {
        let about = fs::metadata(parent).ok();
        state.home = Some(Home {
            path: parent.to_owned(),
            device: about.as_ref().map_or(0, MetadataExt::dev),
            inode: about.as_ref().map_or(0, MetadataExt::ino),
        });
        state.object_store = "objects".to_owned();
    }
}

/// Whether the objects are where only this directory leads to.
fn store_is_inside(cluster: &Cluster) -> Result<bool> {
    let location: Location = cluster.state.object_store.parse()?;
    let Location::Directory(path) = location else { return Ok(false) };
    // A link in the directory leads to what a copy of it would share.
    let inside = |path: PathBuf| path.starts_with(&cluster.dir);
    Ok(path.is_relative() && cluster.dir.join(path).canonicalize().is_ok_and(inside))
}

fn refuse_shared_store(cluster: &Cluster, original: &Path) -> Result<()> {
    ensure!(
        store_is_inside(cluster)?,
        "{} is a copy of the cluster in {}, and both have their objects in {}, where only one can \
         write: go on with that one, or end it for good ('pgstrata --dir {} down'), and 'pgstrata \
         --dir {} up --take-over' goes on here",
        cluster.dir.display(),
        original.display(),
        cluster.state.object_store,
        original.display(),
        cluster.dir.display()
    );
    Ok(())
}

/// What runs has its own directory open, which this one is not: it must not be ended from here.
fn refuse_running_elsewhere(cluster: &Cluster) -> Result<()> {
    ensure!(
        !processes(cluster).any(|process| process.is_anothers()),
        "{} is not the directory that the running processes of its cluster were started in: if it \
         is a copy, end them where the original is now; if not, end them by their process ids",
        cluster.dir.display()
    );
    Ok(())
}

/// Refuses to work with a copy that `up` has not made a cluster of its own: what it remembers of processes and ports is
/// its original's.
pub fn check(cluster: &Cluster) -> Result<()> {
    if let Place::Copy(original) = place(cluster)? {
        refuse_shared_store(cluster, &original)?;
        bail!(
            "{} is a copy of the cluster in {}: 'pgstrata up' makes it a cluster of its own",
            cluster.dir.display(),
            original.display()
        );
    }
    // Whatever is remembered of its place: earlier versions remembered none, and a copy may have been put in its original's.
    refuse_running_elsewhere(cluster)
}

/// Remembers where the cluster is now. A copy becomes a cluster of its own, unless it would share its objects and does
/// not take them over.
pub fn settle(cluster: &mut Cluster, take_over: bool) -> Result<()> {
    match place(cluster)? {
        Place::Same => refuse_running_elsewhere(cluster)?,
        Place::Replaced | Place::Another => {
            refuse_running_elsewhere(cluster)?;
            // Its original may run somewhere, or start again: they must not meet on a port that both remember. Clients
            // know those of computes, which are only taken if they are free.
            if !anything_runs(cluster) {
                renew_ports(&mut cluster.state, false)?;
            }
        }
        Place::Moved => ensure!(
            !anything_runs(cluster),
            "the cluster in {} was moved while it ran: run 'pgstrata down' first",
            cluster.dir.display()
        ),
        Place::Copy(original) => {
            if !take_over {
                refuse_shared_store(cluster, &original)?;
            }
            part_from_original(cluster)?;
        }
    }
    cluster.state.home = Some(Home::of(&cluster.dir)?);
    Ok(())
}

/// Whether any process of the cluster runs.
pub fn anything_runs(cluster: &Cluster) -> bool {
    processes(cluster).any(|process| process.pid().is_some())
}

/// Waits for what was killed and is not gone yet: it would be taken for what runs, and nobody would start it. One that
/// never ends is left to be found silent.
pub fn wait_for_dying(cluster: &Cluster) {
    let deadline = Instant::now() + DYING_PATIENCE;
    processes(cluster).for_each(|process| process.wait_while_dying(deadline));
}

fn processes(cluster: &Cluster) -> impl Iterator<Item = Process> {
    let state = &cluster.state;
    let safekeepers = state.safekeepers.iter().map(|place| format!("safekeeper-{}", place.id));
    let computes = state.computes.keys().map(|branch| format!("compute-{branch}"));
    let services = ["storage-broker", "pageserver"].map(str::to_owned);
    let names = services.into_iter().chain(safekeepers).chain(computes);
    names.map(|name| Process::new(&cluster.dir, &name))
}

/// The processes that are noted in a copy are its original's, and so are the ports.
fn part_from_original(cluster: &mut Cluster) -> Result<()> {
    let run = cluster.dir.join("run");
    match fs::remove_dir_all(&run) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("can't remove {}", run.display()));
        }
        _ => {}
    }
    cluster.state.copy = Some(format!("{:08x}", rand::random::<u32>()));
    renew_ports(&mut cluster.state, true)
}

/// Chooses other ports for all services, and for computes if they too are to have others: none that is remembered. One
/// that is free now may be that of a service of the original that is down.
fn renew_ports(state: &mut State, of_computes: bool) -> Result<()> {
    let (http, pages, pg) = &mut state.pageserver;
    let mut ports = vec![&mut state.broker, http, pages, pg];
    for place in &mut state.safekeepers {
        ports.extend([&mut place.wal, &mut place.pg, &mut place.http]);
    }
    let computes = state.computes.values_mut();
    let mut known: Vec<_> = computes.flat_map(|place| [&mut place.port, &mut place.http]).collect();
    known.extend(state.ports.values_mut());
    if of_computes {
        ports.append(&mut known);
    }
    // As many as are remembered may be among them.
    let mut fresh = free_ports(2 * ports.len() + known.len())?;
    fresh.retain(|fresh| ports.iter().chain(&known).all(|port| **port != *fresh));
    ports.into_iter().zip(fresh).for_each(|(port, fresh)| *port = fresh);
    Ok(())
}
