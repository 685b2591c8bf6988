//! Taking the object store for this cluster's directory: see [`pgstrata_blob::claim`].

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pgstrata_blob::claim::{Claim, ClaimError, Found, Refusal};
use pgstrata_blob::{Location, Store};
use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::{files, http, place};

/// A file of its own: a copy of `cluster.json` that is put back makes no other cluster.
const FILE: &str = "claim.json";
/// Bytes of it, at most.
const LIMIT: u64 = 64 << 10;
/// Claims of which it is not known whether they were written, at most: each is of a start that was killed.
const MOST_PENDING: usize = 256;
/// How often the claim is read again because an earlier start of this directory, which was killed, wrote it meanwhile.
const ATTEMPTS: usize = 5;

/// What a directory remembers of its claims.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tokens {
    /// That of the claim in the store, for the services that are started now.
    pub token: Option<String>,
    /// Those of claims that may be in the store, or get there yet: remembered before they are written, so that a start
    /// that was killed in between is not taken for another's.
    #[serde(default)]
    pending: Vec<String>,
    /// Safekeepers that are started must not believe what they remember of where the others are: nothing ran, and in
    /// their places may be those of a copy of this directory, or of its original.
    #[serde(default)]
    pub forgets_peers: bool,
    /// Another directory wrote the store after this one did, and this one took it over: what is in the store and what
    /// the safekeepers have need not be one history.
    #[serde(default)]
    pub has_parted: bool,
}

impl Tokens {
    /// What the directory remembers; nothing if it never took a store.
    pub fn read(dir: &Path) -> Result<Tokens> {
        let path = dir.join(FILE);
        match files::read(&path, LIMIT)? {
            None => Ok(Tokens::default()),
            Some(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!(
                    "{} is damaged: where this is the only cluster that writes its object store, \
                     remove that file, and run 'pgstrata up --take-over'",
                    path.display()
                )
            }),
        }
    }

    fn save(&self, dir: &Path) -> Result<()> {
        files::replace(dir, FILE, &serde_json::to_vec_pretty(self)?)
    }

    fn known(&self) -> Vec<&str> {
        self.token.iter().chain(&self.pending).map(String::as_str).collect()
    }
}

/// What to do about a store that is another's.
fn explain(found: &Found, refusal: Refusal, cluster: &Cluster) -> anyhow::Error {
    let error = found.refuse(refusal);
    let ClaimError::Held { claim, .. } = &error else { return error.into() };
    let dir = cluster.dir.display();
    let take_over = format!("'pgstrata --dir {dir} up --take-over'");
    let is_here = Path::new(&claim.place.path) == cluster.dir;
    let advice = match refusal {
        _ if !cluster.state.founded => {
            "name another prefix or directory for a new cluster (--object-store)".to_owned()
        }
        Refusal::Elsewhere if is_here => format!(
            "what is there now is on another machine, or another directory: if that one will never \
             be started again, go on with {take_over}"
        ),
        Refusal::Elsewhere => format!(
            "{dir} is a copy of it, or was moved: if that one will never be started again, go on \
             here with {take_over}"
        ),
        Refusal::Another if is_here => format!(
            "what is there now is an earlier state of it, or a copy: go on with the later one. If \
             that is lost for good, {take_over} makes what is in the store readable again"
        ),
        Refusal::Another => format!(
            "it was started after {dir}, which is a copy of it, or an earlier state; go on there. \
             If it is lost for good, {take_over} makes what is in the store readable here"
        ),
    };
    anyhow::anyhow!("{error}: {advice}")
}

/// Refuses a store that is another's, unless it is taken over. Returns whether what is in it and what this directory has
/// may be two histories then.
fn stand(
    cluster: &Cluster,
    store: &Store,
    found: &Found,
    store_inode: Option<u64>,
    take_over: bool,
) -> Result<bool> {
    let known = cluster.claim.known();
    let Some(claim) = found.claim() else {
        if cluster.state.founded {
            refuse_empty_store(cluster, store)?;
        }
        // Clusters of earlier versions have none, nor one whose first start was killed before it was written; and what is
        // none's any more is no other's either if we say so.
        let had_one = cluster.claim.token.is_some();
        ensure!(!had_one || take_over, explain(found, Refusal::Another, cluster));
        return Ok(false);
    };
    // A copy of a store has a copy of the claim, and is whoever's it was copied with.
    if !claim.is_of(store_inode) {
        return Ok(false);
    }
    match claim.check(&known, &place::here(&cluster.dir)?) {
        Ok(()) => Ok(false),
        Err(refusal) if take_over => {
            // A new cluster has nothing that could be part of another history.
            Ok(refusal == Refusal::Another && cluster.state.founded)
        }
        Err(refusal) => Err(explain(found, refusal, cluster)),
    }
}

/// A disk that is not mounted looks like a store in which nothing is: it is not this cluster's, and gets no claim.
fn refuse_empty_store(cluster: &Cluster, store: &Store) -> Result<()> {
    let prefix = format!("tenants/{}/timelines", cluster.state.tenant);
    let objects = http::block_on(async { Ok(store.list(&prefix).await?) })?;
    ensure!(
        !objects.is_empty(),
        "nothing of this cluster is in {} any more: is it mounted? Put the objects back (an empty \
         database in their place would be somebody else's)",
        cluster.object_store()
    );
    Ok(())
}

fn inode_of(location: &Location) -> Option<u64> {
    match location {
        Location::Directory(path) => fs::metadata(path).ok().map(|about| about.ino()),
        _ => None,
    }
}

/// Opens the store where [`take`] would not refuse it now, and changes nothing.
pub fn look(cluster: &Cluster) -> Result<Store> {
    let location: Location = cluster.object_store().parse()?;
    if let Location::Directory(path) = &location {
        // Opening would make one.
        ensure!(path.is_dir(), "{} is not there: is it mounted?", path.display());
    }
    let store = Store::open(&location, cluster.state.s3_endpoint.as_deref())?;
    let found = http::block_on(async { Ok(Found::read(&store).await?) })?;
    stand(cluster, &store, &found, inode_of(&location), false)?;
    Ok(store)
}

/// Makes the store this directory's, unless it is another's. While something of the cluster runs, it was done before.
pub fn take(cluster: &mut Cluster, take_over: bool) -> Result<()> {
    let rests = !place::anything_runs(cluster);
    if !rests {
        ensure!(
            !take_over,
            "--take-over is for a cluster of which nothing runs: 'pgstrata --dir {} down' first",
            cluster.dir.display()
        );
        // A cluster that an earlier version started has none.
        if cluster.claim.token.is_some() {
            return Ok(());
        }
    }
    let location: Location = cluster.object_store().parse()?;
    let store = Store::open(&location, cluster.state.s3_endpoint.as_deref())?;
    let store_inode = inode_of(&location);
    for _ in 0..ATTEMPTS {
        let found = http::block_on(async { Ok(Found::read(&store).await?) })?;
        let has_parted = stand(cluster, &store, &found, store_inode, take_over)?;
        let token = format!("{:032x}", rand::random::<u128>());
        let tokens = &mut cluster.claim;
        tokens.forgets_peers |= rests;
        tokens.has_parted |= has_parted;
        tokens.pending.push(token.clone());
        let surplus = tokens.pending.len().saturating_sub(MOST_PENDING);
        tokens.pending.drain(..surplus);
        tokens.save(&cluster.dir)?;
        let since = jiff::Timestamp::now().round(jiff::Unit::Second)?.to_string();
        let place = place::here(&cluster.dir)?;
        let claim = Claim { token: token.clone(), place, since, store_inode };
        if http::block_on(async { Ok(found.replace(&claim).await?) })? {
            let tokens = &mut cluster.claim;
            tokens.token = Some(token);
            tokens.pending.clear();
            return tokens.save(&cluster.dir);
        }
    }
    bail!("the claim on object store {} is being written by others all the time", store.name())
}

/// Remembers that the services were started with what [`take`] found.
pub fn settle(cluster: &mut Cluster, all_safekeepers: bool) -> Result<()> {
    let tokens = &mut cluster.claim;
    let forgets_peers = tokens.forgets_peers && !all_safekeepers;
    if (tokens.forgets_peers, tokens.has_parted) == (forgets_peers, false) {
        return Ok(());
    }
    tokens.forgets_peers = forgets_peers;
    tokens.has_parted = false;
    tokens.save(&cluster.dir)
}
