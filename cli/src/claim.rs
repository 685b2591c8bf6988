//! Taking the object store for this cluster's directory: see [`pgstrata_blob::claim`].

use std::path::Path;

use anyhow::{Context, Result};
use pgstrata_blob::claim::{Claim, ClaimError, Found, Refusal};
use pgstrata_blob::{Location, Store};
use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::{http, place};

/// What a directory remembers of its claim.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tokens {
    /// That of the claim in the store, for the services that are started now.
    pub token: Option<String>,
    /// That of the claim that may be in the store: remembered before it is written there, so that a start that was
    /// killed in between is not taken for another's.
    next: Option<String>,
}

impl Tokens {
    fn known(&self) -> Vec<&str> {
        [&self.token, &self.next].into_iter().flatten().map(String::as_str).collect()
    }
}

/// What to do about a store that is another's.
fn explain(error: ClaimError, dir: &Path, fresh: bool) -> anyhow::Error {
    let ClaimError::Held { refusal, .. } = &error else { return error.into() };
    let dir = dir.display();
    let advice = match refusal {
        _ if fresh => "name another prefix or directory for a new cluster (--object-store)".into(),
        Refusal::Elsewhere => format!(
            "{dir} is a copy of it, or was moved: if that one will never be started again, go on \
             here with 'pgstrata --dir {dir} up --take-over'"
        ),
        Refusal::Another => format!(
            "it was started after {dir}, which is a copy of it, or an earlier state; go on there. \
             If it is lost for good, 'pgstrata --dir {dir} up --take-over' goes on here"
        ),
    };
    anyhow::anyhow!("{error}: {advice}")
}

/// Makes the store this directory's, unless it is another's. While something of the cluster runs, it was done before.
pub fn take(cluster: &mut Cluster, take_over: bool, fresh: bool) -> Result<()> {
    if place::anything_runs(cluster) {
        return Ok(());
    }
    let location: Location = cluster.object_store().parse()?;
    let store = Store::open(&location, cluster.state.s3_endpoint.as_deref())?;
    let found = http::block_on(async { Ok(Found::read(&store).await?) })?;
    let place = place::here(&cluster.dir)?;
    // A copy of a directory that has its objects in it has objects of its own.
    if !take_over && !place::store_is_inside(cluster)? {
        found
            .check(&store, &cluster.state.claim.known(), &place)
            .map_err(|error| explain(error, &cluster.dir, fresh))?;
    }
    let tokens = &mut cluster.state.claim;
    if tokens.next.is_some() && tokens.next.as_deref() == found.token() {
        tokens.token = tokens.next.take();
    }
    let token = format!("{:032x}", rand::random::<u128>());
    tokens.next = Some(token.clone());
    cluster.save()?;
    let since = jiff::Timestamp::now().round(jiff::Unit::Second).context("the time is no time")?;
    let claim = Claim { token: token.clone(), place, since: since.to_string() };
    http::block_on(async { Ok(found.replace(&store, &claim).await?) })?;
    cluster.state.claim = Tokens { token: Some(token), next: None };
    cluster.save()
}
