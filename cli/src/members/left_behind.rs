//! What is in the directory of a safekeeper that is forgotten, which stays: whether it may be the only copy of something.
//!
//! A safekeeper that hears that others went on without it says so itself, by a file. One that was down since then has not heard,
//! so what was decided is read here by the same rule (`mend::fate` of the safekeeper).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgstrata_blob::{Location, Store};
use pgstrata_format::quorum::{LIMIT, Quorum};
use pgstrata_format::safekeeper::{TimelineControl, decode_identity};
use pgstrata_ids::{Member, NodeId, TenantId, TimelineId};
use pgstrata_quorum::Configuration;

use super::Key;
use crate::cluster::Cluster;
use crate::{files, http};

/// By this a safekeeper keeps what others went on without: `KEEP` of its `timeline` module.
const KEEP: &str = "keep";
/// Bytes of the small files that are read, at most.
const SMALL: u64 = 16 << 20;
/// Longest wait for object storage, for all timelines together.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is to be said of a directory of a safekeeper that is a member of nothing any more.
pub fn said_of(cluster: &Cluster, id: u64, directory: &Path) -> String {
    let directory_name = directory.display();
    match has_what_was_given_up(cluster, id, directory) {
        Ok(false) => format!("{directory_name} is of no further use"),
        Ok(true) => format!(
            "{directory_name} may have commits that were given up: keep it for as long as any are missed"
        ),
        Err(error) => format!(
            "{directory_name} may have commits that were given up, which can't be told now ({error:#}): keep it for as long as \
             any are missed"
        ),
    }
}

/// Whether the members of a timeline went on without what is there.
fn has_what_was_given_up(cluster: &Cluster, id: u64, directory: &Path) -> Result<bool> {
    let timelines = timelines(directory)?;
    if timelines.iter().any(|(_, path)| path.join(KEEP).exists()) {
        return Ok(true);
    }
    let life =
        files::read(&directory.join("identity"), SMALL)?.context("its identity is missing")?;
    let incarnation = decode_identity(&life)?.incarnation.context("it is of an old release")?;
    let member = Member { node: NodeId(id), incarnation };
    let store = open_store(cluster)?;
    http::block_on(async {
        let look = async {
            for (key, path) in &timelines {
                let Some(decided) = decided(&store, *key).await? else { continue };
                if !decided.is_deleted && others_went_on(&decided, &own(path, member.node)?, member)
                {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let ended = tokio::time::timeout(PATIENCE, look).await;
        ended.with_context(|| {
            format!("object storage is slow: {} s were not enough", PATIENCE.as_secs())
        })?
    })
}

/// By what is decided: whether who knows of no later configuration than `own` may have what others lack.
fn others_went_on(decided: &Quorum, own: &Configuration, member: Member) -> bool {
    decided.chain.newest().number() > own.number()
        && (decided.went_on_without(own, member) || decided.chain.began_without(own, member))
}

/// The timelines of a safekeeper, and where each is.
fn timelines(directory: &Path) -> Result<Vec<(Key, PathBuf)>> {
    let inside = |directory: &Path| -> Result<Vec<(String, PathBuf)>> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>(),
            Err(error) => Err(error),
        };
        let entries = entries.with_context(|| format!("can't read {}", directory.display()))?;
        let named =
            |one: fs::DirEntry| (one.file_name().to_string_lossy().into_owned(), one.path());
        Ok(entries.into_iter().map(named).collect())
    };
    let mut found = Vec::new();
    for (tenant, path) in inside(directory)? {
        let Ok(tenant) = tenant.parse::<TenantId>() else { continue };
        for (timeline, path) in inside(&path)? {
            let Ok(timeline) = timeline.parse::<TimelineId>() else { continue };
            found.push(((tenant, timeline), path));
        }
    }
    Ok(found)
}

/// The configuration that a timeline's control file has.
fn own(timeline: &Path, node: NodeId) -> Result<Configuration> {
    let path = timeline.join("control");
    let bytes =
        files::read(&path, SMALL)?.with_context(|| format!("{} is missing", path.display()))?;
    let control = TimelineControl::decode(&bytes, node);
    Ok(control.with_context(|| path.display().to_string())?.state.configuration)
}

fn open_store(cluster: &Cluster) -> Result<Store> {
    let location: Location = cluster.object_store().parse()?;
    if let Location::Directory(path) = &location {
        // Opening would make one.
        ensure!(path.is_dir(), "object store {} is away", path.display());
    }
    let (endpoint, claim) = (cluster.state.s3_endpoint.as_deref(), cluster.claim.token.as_deref());
    Ok(Store::open_under(&location, endpoint, claim)?)
}

/// What is decided of a timeline; `None` if nobody ever changed its members.
async fn decided(store: &Store, (tenant, timeline): Key) -> Result<Option<Quorum>> {
    let name = Quorum::object_name(tenant, timeline);
    match store.get(&name, LIMIT).await {
        Ok(bytes) => Ok(Some(Quorum::decode(&bytes).with_context(|| format!("object '{name}'"))?)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
