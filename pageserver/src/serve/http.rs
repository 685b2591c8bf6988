//! The HTTP interface: branches, skeletons, single pages, maintenance, state.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use futures::StreamExt;
use pgstrata_format::index::LayerEntry;
use pgstrata_format::layer::LayerKind;
use pgstrata_ids::{Fork, Lsn, RelTag, TimelineId};
use pgstrata_listen::{
    Api, Asked, Deed, Forbidden, HttpLimits, Metrics, Need, Octets, Peer, Placed, Posted, Ready,
    Refusal, Security, Tar, Who, alive, serve_http,
};
use pgstrata_wire::http::Code;
use pgstrata_wire::http::pageserver::{
    self as http, AsOf, Branch, Compacted, CreateBranch, Deleted, Import, Layer, Listed, LsnAnswer,
    LsnAt, Named, OfTimeline, PageAt, Reached, Rename, To, Wait,
};
use tokio::net::TcpListener;

use crate::directory::{self, Contents, Entry};
use crate::repository::{Broken, Busy, COMPACT, FLUSH, Moment, Refused};
use crate::serve::service::{Service, Work};
use crate::serve::sizes::logical_size;
use crate::timeline::{ReadError, Timeline};

/// Microseconds between 1970-01-01 and 2000-01-01.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// How far a client's clock may be ahead of ours, in microseconds.
const CLOCK_SKEW: i64 = 5_000_000;

/// An error as HTTP has it.
pub struct Failure(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let code = match self.0.downcast_ref::<Refused>() {
            Some(Refused::NotFound(_)) => Code::NotFound,
            Some(Refused::Conflict(_)) => Code::Conflict,
            Some(Refused::Invalid(_)) => Code::Invalid,
            None if self.0.downcast_ref::<Busy>().is_some() => Code::Busy,
            None if self.0.downcast_ref::<Forbidden>().is_some() => Code::Forbidden,
            None if self.0.downcast_ref::<ReadError>().is_some() => Code::NotFound,
            None => Code::Failed,
        };
        Refusal::new(code, &format!("{:#}", self.0)).into_response()
    }
}

type Answer<T> = Result<T, Failure>;

/// A timeline that is not served, with what is known of it.
fn broken_row(id: TimelineId, broken: Broken) -> Branch {
    Branch {
        name: broken.name.unwrap_or_else(|| format!("({id})")),
        timeline_id: id,
        tenant_id: broken.tenant,
        ancestor: None,
        ancestor_timeline_id: None,
        ancestor_lsn: None,
        start_lsn: Lsn::INVALID,
        start_prev: Lsn::INVALID,
        last_record_lsn: Lsn::INVALID,
        remote_lsn: Lsn::INVALID,
        logical_size: None,
        system_id: 0,
        pg_version: 0,
        segment_size: 0,
        created: String::new(),
        failure: Some(broken.error),
        upload_failure: None,
        compaction_failure: None,
        unreadable_pages: 0,
        unreadable_page: None,
        bad_safekeepers: BTreeMap::new(),
    }
}

fn row(timeline: &Timeline) -> Branch {
    let lsn = timeline.progress.lsn();
    let info = &timeline.info;
    let ancestor = timeline.ancestor.as_ref();
    let (unreadable_pages, unreadable_page) = timeline.unmakeable();
    Branch {
        name: timeline.name(),
        timeline_id: info.id,
        tenant_id: info.tenant,
        ancestor: ancestor.map(|(parent, _)| parent.name()),
        ancestor_timeline_id: ancestor.map(|(parent, _)| parent.info.id),
        ancestor_lsn: ancestor.map(|(_, lsn)| *lsn),
        start_lsn: info.start_lsn,
        start_prev: info.start_record,
        last_record_lsn: lsn,
        remote_lsn: timeline.remote_consistent_lsn(),
        logical_size: None,
        system_id: info.system_id.0,
        pg_version: info.version.major(),
        segment_size: info.segment_size,
        created: info.created.clone(),
        failure: timeline.failure(),
        upload_failure: timeline.trouble(FLUSH),
        compaction_failure: timeline.trouble(COMPACT),
        unreadable_pages,
        unreadable_page,
        bad_safekeepers: timeline.bad_sources(),
    }
}

/// Connections at once.
const CONNECTIONS: usize = 1024;
/// Of one peer.
const OF_ONE_PEER: usize = 512;
/// How long a request may take from its head to the beginning of its answer.
const REQUEST: Duration = Duration::from_secs(150);
/// Bytes that are still read of an import that was refused.
const DRAINED: u64 = 1 << 30;
/// How long the body of an import may be silent.
const BODY_SILENCE: Duration = Duration::from_secs(30);

/// Serves until the process ends.
pub async fn serve(listeners: Vec<TcpListener>, service: Service, security: Security) {
    let limits = HttpLimits {
        connections: CONNECTIONS,
        of_one_peer: OF_ONE_PEER,
        patience: None,
        ..HttpLimits::default()
    };
    serve_http(listeners, limits, security, router(service)).await;
}

/// Ends requests that take too long, other than imports, which take as long as they move.
async fn in_time(request: Request, next: Next) -> Response {
    if request.uri().path() == IMPORT {
        return next.run(request).await;
    }
    match tokio::time::timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Failure(Busy("the request took too long".into()).into()).into_response(),
    }
}

const IMPORT: &str = "/v1/import";

/// What any request about a branch may be refused with, besides what it asks in vain.
const ABOUT_A_BRANCH: &[Code] = &[Code::NotFound, Code::Conflict, Code::Busy, Code::Failed];

/// The routes.
pub fn router(service: Service) -> Router {
    let about = "Branches, pages at any moment, and what computes start from. SQL and the pages of \
                 running computes are on other ports.";
    Api::new("page server", about)
        .for_who(Need::Deed(Deed::SeeHealth))
        .get("/healthz", "Whether the process answers", &[], alive)
        .get("/readyz", "Whether all of its threads are well", &[], ready)
        .for_who(Need::Deed(Deed::SeeService))
        .get("/metrics", "How far each branch is, and what was done", &[Code::Failed], metrics)
        .for_who(Need::Asked)
        .get("/v1/branches", "All branches that one may see", &[Code::Busy, Code::Failed], list)
        .post(
            "/v1/branches",
            "Makes a branch, or puts it in another's place",
            ABOUT_A_BRANCH,
            create,
        )
        .get("/v1/branch", "A branch", ABOUT_A_BRANCH, show)
        .delete("/v1/branch", "Deletes a branch that has no children", ABOUT_A_BRANCH, remove)
        .post("/v1/branch/rename", "Gives a branch another name", ABOUT_A_BRANCH, rename)
        .get("/v1/branch/lsn", "The end of a branch, or of its past", ABOUT_A_BRANCH, lsn_at)
        .get("/v1/branch/page", "The 8192 bytes of a page", ABOUT_A_BRANCH, page)
        .get("/v1/branch/layers", "The layers of a branch, oldest first", ABOUT_A_BRANCH, layers)
        .post("/v1/branch/compact", "Uploads and merges a branch's layers", ABOUT_A_BRANCH, compact)
        .get("/v1/branch/wait", "Waits until a branch is ingested so far", ABOUT_A_BRANCH, wait)
        .post(IMPORT, "Makes a branch of a tar of a data directory", ABOUT_A_BRANCH, import)
        .get(SKELETON, "A data directory without relations, as a tar", ABOUT_A_BRANCH, skeleton)
        .get("/v1/timelines/{id}", "A branch, by its timeline", ABOUT_A_BRANCH, show_timeline)
        .delete("/v1/timelines/{id}", "Deletes that branch", ABOUT_A_BRANCH, remove_timeline)
        .post(RENAME, "Gives that branch another name", ABOUT_A_BRANCH, rename_timeline)
        .router()
        .layer(axum::middleware::from_fn(in_time))
        .with_state(service)
}

const SKELETON: &str = "/v1/timelines/{id}/skeleton";
const RENAME: &str = "/v1/timelines/{id}/rename";

/// Not ready if a thread panicked: a supervisor may restart this process. What is wrong with a
/// branch is no reason to.
async fn ready(State(service): State<Service>) -> Ready {
    let panics = service.panics();
    Ready(if panics.is_empty() { Ok(()) } else { Err(panics.join("\n")) })
}

async fn metrics(State(service): State<Service>) -> Answer<Metrics> {
    Ok(Metrics(service.metrics()?))
}

async fn list(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Listed>,
) -> Answer<Json<Vec<Branch>>> {
    let (branches, broken, mut namesakes) = service
        .run(Work::Read, |repository| {
            Ok((repository.branches(), repository.broken(), repository.namesakes()))
        })
        .await?;
    let may_see = |tenant| peer.may(Deed::SeeBranch(tenant));
    let mut branches = branches;
    branches.retain(|timeline| may_see(timeline.info.tenant));
    let sizes = if query.sizes { service.sizes(&branches).await } else { HashMap::new() };
    let served = branches.iter().map(|timeline| {
        let logical_size = sizes.get(&timeline.info.id).copied();
        let row = row(timeline);
        let failures = row.failure.into_iter().chain(namesakes.remove(&timeline.info.id));
        let failure = failures.reduce(|one, other| format!("{one}; {other}"));
        Branch { logical_size, failure, ..row }
    });
    let broken = broken.into_iter().filter(|(_, broken)| may_see(broken.tenant));
    let broken = broken.map(|(id, broken)| broken_row(id, broken));
    Ok(Json(served.chain(broken).collect()))
}

/// Microseconds since 2000-01-01 of an RFC 3339 time.
fn parse_time(text: &str) -> anyhow::Result<i64> {
    let time: jiff::Timestamp = text.parse().map_err(|error| {
        let form = "expected a form like 2026-01-31T12:00:00Z";
        Refused::Invalid(format!("'{text}' is not a time ({form}): {error}"))
    })?;
    Ok(time.as_microsecond() - POSTGRES_EPOCH)
}

/// A past time: of another one nobody knows yet what will have been committed by then.
fn parse_past_time(text: &str) -> anyhow::Result<i64> {
    let time = parse_time(text)?;
    let latest = jiff::Timestamp::now().as_microsecond() - POSTGRES_EPOCH + CLOCK_SKEW;
    if time > latest {
        anyhow::bail!(Refused::Invalid(format!("{text} is in the future")));
    }
    Ok(time)
}

fn format_time(time: i64) -> anyhow::Result<String> {
    Ok(jiff::Timestamp::from_microsecond(time + POSTGRES_EPOCH)?.to_string())
}

/// Waits until a branch is ingested up to `lsn`.
async fn wait_for(
    service: &Service,
    peer: &Peer,
    branch: &str,
    lsn: Lsn,
    patience: Duration,
) -> Answer<()> {
    let (peer, name) = (peer.clone(), branch.to_owned());
    service.wait(move |repository| seen(repository.branch(&name)?, &peer), lsn, patience).await
}

/// A branch that one may see.
fn seen(timeline: Arc<Timeline>, peer: &Peer) -> anyhow::Result<Arc<Timeline>> {
    peer.check(Deed::SeeBranch(timeline.info.tenant))?;
    Ok(timeline)
}

/// A branch that one may change.
fn own(timeline: Arc<Timeline>, peer: &Peer) -> anyhow::Result<Arc<Timeline>> {
    peer.check(Deed::ChangeBranch(timeline.info.tenant))?;
    Ok(timeline)
}

async fn create(
    State(service): State<Service>,
    Who(peer): Who,
    Posted(request): Posted<CreateBranch>,
) -> Answer<Json<Branch>> {
    if let Some(lsn) = request.at_least {
        wait_for(&service, &peer, &request.from, lsn, PATIENCE).await?;
    }
    service
        .run(Work::Change, move |repository| {
            let moment = match (request.lsn, &request.time) {
                (Some(_), Some(_)) => {
                    anyhow::bail!(Refused::Invalid("give an LSN or a time, not both".into()))
                }
                (Some(lsn), None) => Moment::Lsn(lsn),
                (None, Some(time)) => Moment::Time(parse_past_time(time)?),
                (None, None) => Moment::Now,
            };
            own(repository.branch(&request.from)?, &peer)?;
            if request.replace {
                own(repository.branch(&request.name)?, &peer)?;
            }
            let branch = match request.replace {
                true => repository.replace_branch(&request.name, &request.from, moment)?,
                false => repository.create_branch(&request.name, &request.from, moment)?,
            };
            Ok(Json(row(&branch)))
        })
        .await
}

async fn show(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Named>,
) -> Answer<Json<Branch>> {
    service
        .run(Work::Read, move |repository| {
            Ok(Json(row(&*seen(repository.branch(&query.name)?, &peer)?)))
        })
        .await
}

async fn show_timeline(
    State(service): State<Service>,
    Who(peer): Who,
    Placed(of): Placed<OfTimeline>,
) -> Answer<Json<Branch>> {
    service
        .run(Work::Read, move |repository| {
            Ok(Json(row(&*seen(repository.timeline(of.id)?, &peer)?)))
        })
        .await
}

async fn remove(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Named>,
) -> Answer<Json<Deleted>> {
    service
        .run(Work::Change, move |repository| {
            repository.delete_branch(&*own(repository.branch(&query.name)?, &peer)?)?;
            Ok(Json(Deleted { deleted: query.name }))
        })
        .await
}

async fn remove_timeline(
    State(service): State<Service>,
    Who(peer): Who,
    Placed(of): Placed<OfTimeline>,
) -> Answer<Json<Deleted>> {
    service
        .run(Work::Change, move |repository| {
            let timeline = own(repository.branch_of(of.id)?, &peer)?;
            repository.delete_branch(&timeline)?;
            Ok(Json(Deleted { deleted: timeline.name() }))
        })
        .await
}

async fn rename_timeline(
    State(service): State<Service>,
    Who(peer): Who,
    Placed(of): Placed<OfTimeline>,
    Asked(query): Asked<To>,
) -> Answer<Json<Branch>> {
    service
        .run(Work::Change, move |repository| {
            let timeline = own(repository.branch_of(of.id)?, &peer)?;
            repository.rename_branch(&timeline, &query.to)?;
            Ok(Json(row(&timeline)))
        })
        .await
}

async fn rename(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Rename>,
) -> Answer<Json<Branch>> {
    service
        .run(Work::Change, move |repository| {
            let timeline = own(repository.branch(&query.name)?, &peer)?;
            repository.rename_branch(&timeline, &query.to)?;
            Ok(Json(row(&timeline)))
        })
        .await
}

async fn lsn_at(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<LsnAt>,
) -> Answer<Json<LsnAnswer>> {
    service
        .run(Work::Read, move |repository| {
            let timeline = seen(repository.branch(&query.name)?, &peer)?;
            let end = timeline.progress.lsn();
            timeline.wait(end, PATIENCE).map_err(Busy)?;
            let limit = match &query.time {
                Some(time) => parse_past_time(time)?,
                None => i64::MAX,
            };
            let found = timeline.lsn_at_time(limit, end)?;
            let time = found.map(|(_, boundary)| format_time(boundary.time)).transpose()?;
            let lsn = match (&query.time, found) {
                (None, _) => end,
                (Some(_), Some((lsn, _))) => lsn,
                (Some(time), None) => {
                    let name = &query.name;
                    anyhow::bail!(Refused::NotFound(format!(
                        "branch '{name}' has no commit at or before {time}"
                    )))
                }
            };
            Ok(Json(LsnAnswer { lsn, time }))
        })
        .await
}

async fn wait(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Wait>,
) -> Answer<Json<Reached>> {
    let patience = query.seconds.map_or(PATIENCE, Duration::from_secs).min(PATIENCE);
    wait_for(&service, &peer, &query.name, query.lsn, patience).await?;
    let reached = service
        .run(Work::Read, move |repository| Ok(repository.branch(&query.name)?.progress.lsn()));
    Ok(Json(Reached { last_record_lsn: reached.await? }))
}

fn parse_rel(text: &str) -> anyhow::Result<RelTag> {
    let parse = || -> Option<RelTag> {
        let mut parts = text.splitn(3, '/');
        let (spc, db, rel) = (parts.next()?, parts.next()?, parts.next()?);
        let (rel, fork) = match rel.split_once(['.', '_']) {
            None => (rel, Fork::Main),
            Some((rel, "main")) => (rel, Fork::Main),
            Some((rel, "fsm")) => (rel, Fork::FreeSpace),
            Some((rel, "vm")) => (rel, Fork::Visibility),
            Some((rel, "init")) => (rel, Fork::Init),
            Some(_) => return None,
        };
        Some(RelTag { spc: spc.parse().ok()?, db: db.parse().ok()?, rel: rel.parse().ok()?, fork })
    };
    parse().ok_or_else(|| {
        let form = "expected TABLESPACE/DATABASE/RELATION[.fork], such as 1663/5/16384.vm";
        Refused::Invalid(format!("'{text}' is not a relation ({form})")).into()
    })
}

async fn page(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<PageAt>,
) -> Answer<Octets> {
    if let Some(lsn) = query.at_least {
        wait_for(&service, &peer, &query.name, lsn, PATIENCE).await?;
    }
    service
        .run(Work::Read, move |repository| {
            let timeline = seen(repository.branch(&query.name)?, &peer)?;
            let rel = parse_rel(&query.rel)?;
            let lsn = checked_lsn(&timeline, query.lsn.unwrap_or(timeline.progress.lsn()))?;
            let mut page = [0; 8192];
            timeline.block(rel, query.block, lsn, &mut page)?;
            if timeline.control_state(lsn)?.control.data_checksum_version != 0 {
                pgstrata_pg_redo::set_checksum(&mut page, query.block);
            }
            Ok(Octets(page.to_vec()))
        })
        .await
}

/// An LSN to read at: in the branch's history and ingested, or soon to be.
pub fn checked_lsn(timeline: &Timeline, lsn: Lsn) -> anyhow::Result<Lsn> {
    let oldest = timeline.oldest_lsn();
    if lsn < oldest {
        anyhow::bail!(Refused::Invalid(format!(
            "{lsn} is before the history of branch '{}', which starts at {oldest}",
            timeline.name()
        )));
    }
    timeline.wait(lsn, Duration::from_secs(3)).map_err(|error| {
        Refused::Invalid(format!("{lsn} is in the future of branch '{}': {error}", timeline.name()))
    })?;
    Ok(lsn)
}

fn layer(entry: LayerEntry) -> Layer {
    Layer {
        name: entry.name,
        kind: match entry.kind {
            LayerKind::Delta => http::LayerKind::Delta,
            LayerKind::Image => http::LayerKind::Image,
        },
        level: entry.level,
        start_lsn: entry.start_lsn,
        end_lsn: entry.end_lsn,
        min_key: entry.min_key,
        max_key: entry.max_key,
        size: entry.size,
    }
}

async fn layers(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Named>,
) -> Answer<Json<Vec<Layer>>> {
    service
        .run(Work::Read, move |repository| {
            let timeline = seen(repository.branch(&query.name)?, &peer)?;
            Ok(Json(timeline.layer_files().iter().map(|file| layer(file.entry.clone())).collect()))
        })
        .await
}

async fn compact(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Named>,
) -> Answer<Json<Compacted>> {
    service
        .run(Work::Change, move |repository| {
            let timeline = own(repository.branch(&query.name)?, &peer)?;
            let end = timeline.progress.lsn();
            timeline.request_freeze();
            let deadline = std::time::Instant::now() + PATIENCE;
            while timeline.remote_consistent_lsn() < end && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            if timeline.remote_consistent_lsn() < end {
                let why = timeline.trouble(FLUSH).unwrap_or_else(|| "they are slow".to_owned());
                anyhow::bail!("what is ingested could not be uploaded in {PATIENCE:?}: {why}");
            }
            let compacted = timeline.compact()?;
            Ok(Json(Compacted { compacted }))
        })
        .await
}

async fn import(
    State(service): State<Service>,
    Who(peer): Who,
    Asked(query): Asked<Import>,
    body: Body,
) -> Answer<Json<Branch>> {
    let (tenant, timeline) = (query.tenant, query.timeline);
    peer.check(Deed::ChangeBranch(tenant))?;
    // Ends when the client is silent for too long: a thread waits for it.
    let stream = futures::stream::unfold(Some(body.into_data_stream()), |stream| async {
        let mut stream = stream?;
        match tokio::time::timeout(BODY_SILENCE, stream.next()).await {
            Ok(next) => next.map(|next| (next.map_err(std::io::Error::other), Some(stream))),
            Err(_) => Some((Err(std::io::ErrorKind::TimedOut.into()), None)),
        }
    });
    let stream = Box::pin(stream);
    let reader = tokio_util::io::StreamReader::new(stream);
    let reader = tokio_util::io::SyncIoBridge::new(reader);
    service
        .run(Work::Import, move |repository| {
            let mut reader = std::io::BufReader::with_capacity(1 << 20, reader);
            let imported = repository.import(tenant, timeline, &query.name, &mut reader);
            if imported.is_err() {
                // Clients read no answer before they have sent everything.
                let _ = std::io::copy(&mut reader.take(DRAINED), &mut std::io::sink());
            }
            let timeline = imported?;
            let logical_size = Some(logical_size(&timeline, timeline.progress.lsn())?);
            Ok(Json(Branch { logical_size, ..row(&timeline) }))
        })
        .await
}

async fn skeleton(
    State(service): State<Service>,
    Who(peer): Who,
    Placed(of): Placed<OfTimeline>,
    Asked(query): Asked<AsOf>,
) -> Answer<Tar> {
    let (id, lsn) = (of.id, query.lsn);
    service.wait(move |repository| seen(repository.timeline(id)?, &peer), lsn, PATIENCE).await?;
    let bytes = service
        .run(Work::Change, move |repository| {
            let timeline = repository.timeline(id)?;
            checked_lsn(&timeline, lsn)?;
            let mut archive = tar::Builder::new(Vec::new());
            directory::walk(&timeline, lsn, &Contents::Skeleton, &mut |entry| {
                append(&mut archive, entry)
            })?;
            Ok(archive.into_inner()?)
        })
        .await?;
    Ok(Tar(bytes))
}

fn append(archive: &mut tar::Builder<Vec<u8>>, entry: Entry<'_>) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    match entry {
        Entry::Directory(path) => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o700);
            header.set_size(0);
            archive.append_data(&mut header, path, std::io::empty())?;
        }
        Entry::File(path, content) => {
            header.set_mode(0o600);
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content.as_slice())?;
        }
        Entry::Relation { path, rel, first, blocks, timeline, lsn } => {
            header.set_mode(0o600);
            header.set_size(u64::from(blocks) * 8192);
            let checksums = timeline.control_state(lsn)?.control.data_checksum_version != 0;
            let reader =
                directory::RelationReader::new(timeline, rel, first, blocks, lsn, checksums);
            archive.append_data(&mut header, path, reader.take(u64::MAX))?;
        }
    }
    Ok(())
}
