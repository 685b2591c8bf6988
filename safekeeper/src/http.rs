//! Status, metrics and health over HTTP.

use std::sync::Arc;

use axum::extract::State;
use axum::{Json, Router};
use pgstrata_ids::{Member, NodeId};
use pgstrata_listen::{
    Api, Asked, Deed, HttpLimits, Metrics, Need, Ready, Refusal, Security, alive, serve_http,
};
use pgstrata_quorum::Configuration;
use pgstrata_wire::http::Code;
use pgstrata_wire::http::safekeeper as http;
use pgstrata_wire::safekeeper::RefusedReason;
use tokio::sync::Semaphore;

use crate::background::{Known, Lags};
use crate::disk_space::DiskState;
use crate::metrics;
use crate::registering::Registering;
use crate::steward::{Left, Steward, Trouble, Wish};
use crate::timeline::{Overview, is_away};
use crate::timelines::Timelines;

/// What handlers see.
#[derive(Clone, Debug)]
pub struct HttpState {
    timelines: Arc<Timelines>,
    known: Arc<Known>,
    lags: Arc<Lags>,
    zone: Arc<str>,
    steward: Steward,
    registering: Registering,
    /// Those who change members at once.
    changing: Arc<Semaphore>,
}

/// Changes that are taken a step further at once: each has threads of its own, and waits for others.
const CHANGES: usize = 8;

impl HttpState {
    /// The state for `timelines` in `zone`.
    pub fn new(
        timelines: Arc<Timelines>,
        known: Arc<Known>,
        lags: Arc<Lags>,
        zone: String,
        steward: Steward,
        registering: Registering,
    ) -> HttpState {
        let changing = Arc::new(Semaphore::new(CHANGES));
        HttpState { timelines, known, lags, zone: zone.into(), steward, registering, changing }
    }
}

/// Everything that is served.
fn router(state: HttpState) -> Router {
    Api::new("safekeeper", "How far a safekeeper is with each timeline. WAL is on other ports.")
        .get("/v1/status", "What it serves, how far, and what it can't serve", &[], status)
        .get("/metrics", "The same as numbers", &[Code::Failed], shown_metrics)
        .for_who(Need::Deed(Deed::ChangeMembers))
        .post(
            "/v1/members",
            "Takes a change of a timeline's members a step further; begins it if that is not done. Ask again until it is done",
            &[Code::NotFound, Code::Conflict, Code::Busy, Code::Failed],
            change_members,
        )
        .post(
            "/v1/recover",
            "Has who is left of a timeline's members go on alone where no majority of them is, and gives up what only the \
             others had",
            &[Code::NotFound, Code::Conflict, Code::Busy, Code::Failed],
            recover,
        )
        .post(
            "/v1/catch-up",
            "Has this safekeeper get what it lacks of a timeline: from other members, or from object storage where too few of \
             them answer. Says how far object storage has it",
            &[Code::NotFound, Code::Busy, Code::Failed],
            catch_up,
        )
        .for_who(Need::Deed(Deed::SeeHealth))
        .get("/healthz", "Whether the process answers", &[], alive)
        .get(
            "/readyz",
            "Whether it takes WAL: not after a failure that it can't get over",
            &[],
            ready,
        )
        .router()
        .with_state(state)
}

/// Serves until the process ends.
pub async fn serve(listeners: Vec<tokio::net::TcpListener>, state: HttpState, security: Security) {
    serve_http(listeners, HttpLimits::default(), security, router(state)).await;
}

fn named(group: &[Member]) -> Vec<http::Member> {
    let named = |member: &Member| http::Member {
        id: member.node.0,
        incarnation: member.incarnation.to_string(),
    };
    group.iter().map(named).collect()
}

/// A configuration, for people.
pub fn described(configuration: &Configuration) -> http::Quorum {
    http::Quorum {
        number: configuration.number(),
        members: named(configuration.members()),
        incoming: named(configuration.incoming()),
    }
}

fn describe(timeline: Overview, known: &Known) -> http::Timeline {
    let summary = &timeline.summary;
    let (parameters, configuration) = (&summary.parameters, &summary.configuration);
    let trouble = timeline.archiving_error;
    http::Timeline {
        tenant_id: parameters.tenant,
        timeline_id: parameters.timeline,
        ancestor_id: parameters.ancestor,
        system_id: parameters.system_id.0.to_string(),
        pg_version: parameters.pg_version,
        segment_size: parameters.segment_size,
        start_lsn: parameters.start_lsn,
        term: summary.term.0,
        flush_lsn: summary.flush_lsn,
        commit_lsn: summary.commit_lsn,
        available_lsn: summary.available_lsn,
        archived_lsn: summary.archived_lsn,
        remote_consistent_lsn: summary.remote_consistent_lsn,
        away: is_away(summary),
        committed_wal_damaged: trouble.as_ref().is_some_and(|trouble| trouble.is_damage),
        archiving_error: trouble.map(|trouble| trouble.text),
        majority_in_one_zone: known.majority_zone(configuration),
        quorum: configuration.is_known().then(|| described(configuration)),
        proposer_connected: timeline.has_proposer,
    }
}

async fn status(State(state): State<HttpState>) -> Json<http::Status> {
    let timelines = state.timelines.overviews().into_iter();
    let damaged = state.timelines.damaged().into_iter();
    let mending = state.timelines.mending();
    let space = &state.timelines.context().shared.space;
    let look = space.last();
    Json(http::Status {
        id: state.timelines.context().shared.own.node.0,
        incarnation: state.timelines.context().shared.own.incarnation.to_string(),
        zone: state.zone.to_string(),
        free_bytes: look.at.map(|_| look.space.free),
        disk_state: Some(match look.state() {
            DiskState::Fine => http::DiskState::Fine,
            DiskState::Warns => http::DiskState::Warns,
            DiskState::Slows => http::DiskState::Slows,
            DiskState::Refuses => http::DiskState::Refuses,
        }),
        disk_warning: space.warning(),
        registration_error: state.registering.error(),
        timelines: timelines.map(|timeline| describe(timeline, &state.known)).collect(),
        damaged: damaged
            .map(|((tenant_id, timeline_id), error)| http::Damaged {
                tenant_id,
                timeline_id,
                mending: mending.contains(&(tenant_id, timeline_id)),
                kept: state.timelines.is_left_behind((tenant_id, timeline_id), &error),
                error,
            })
            .collect(),
    })
}

async fn change_members(
    State(state): State<HttpState>,
    Asked(asked): Asked<http::ChangeMembers>,
) -> Result<Json<http::Change>, Refusal> {
    let nodes = node_ids(&asked.nodes)?;
    let key = (asked.tenant_id, asked.timeline_id);
    let wish = Wish { nodes, force: asked.force, after: asked.after };
    steer(state, move |steward| steward.advance(key, &wish)).await
}

async fn recover(
    State(state): State<HttpState>,
    Asked(asked): Asked<http::Recover>,
) -> Result<Json<http::Change>, Refusal> {
    let some = |text: &str| match text.is_empty() {
        true => Ok(Vec::new()),
        false => node_ids(text),
    };
    let (survivors, newcomers) = (some(&asked.survivors)?, some(&asked.newcomers)?);
    let left = Left { survivors, after: asked.after, newcomers };
    let key = (asked.tenant_id, asked.timeline_id);
    steer(state, move |steward| steward.recover(key, &left)).await
}

async fn catch_up(
    State(state): State<HttpState>,
    Asked(asked): Asked<http::OfTimeline>,
) -> Result<Json<http::Archived>, Refusal> {
    let key = (asked.tenant_id, asked.timeline_id);
    let timelines = Arc::clone(&state.timelines);
    steer(state, move |steward| {
        let commit_lsn = match timelines.get(key) {
            Ok(timeline) => {
                timelines.wanted().push(key);
                Some(timeline.commit_lsn())
            }
            Err(RefusedReason::UnknownTimeline) => None,
            Err(reason) => return Err(Trouble::Later(reason.to_string())),
        };
        let (archived_lsn, decided) = steward.archived(key)?;
        Ok(http::Archived { archived_lsn, commit_lsn, quorum: Some(described(&decided)) })
    })
    .await
}

fn node_ids(text: &str) -> Result<Vec<NodeId>, Refusal> {
    let node = |text: &str| {
        let node = text.trim().parse().ok().filter(|&node: &u64| node > 0).map(NodeId);
        node.ok_or_else(|| Refusal::new(Code::Invalid, &format!("'{text}' is no node id")))
    };
    text.split(',').map(node).collect()
}

/// Has the steward do something that waits for others, with a bound on how many do.
async fn steer<T: Send + 'static>(
    state: HttpState,
    deed: impl FnOnce(&Steward) -> Result<T, Trouble> + Send + 'static,
) -> Result<Json<T>, Refusal> {
    let Ok(_place) = Arc::clone(&state.changing).try_acquire_owned() else {
        return Err(Refusal::new(Code::Busy, "other changes of members are under way: ask again"));
    };
    let done = tokio::task::spawn_blocking(move || deed(&state.steward)).await;
    let done = done.map_err(|error| Refusal::new(Code::Failed, &error.to_string()))?;
    done.map(Json).map_err(|trouble| {
        let code = match &trouble {
            Trouble::NotFound(_) => Code::NotFound,
            Trouble::Conflict(_) => Code::Conflict,
            Trouble::Later(_) => Code::Busy,
        };
        Refusal::new(code, &trouble.to_string())
    })
}

async fn ready(State(state): State<HttpState>) -> Ready {
    Ready(
        state
            .timelines
            .context()
            .shared
            .latch
            .reason()
            .map_or(Ok(()), |reason| Err(reason.to_string())),
    )
}

async fn shown_metrics(State(state): State<HttpState>) -> Result<Metrics, Refusal> {
    let text = metrics::text(&state.timelines, &state.lags);
    text.map(Metrics).map_err(|error| Refusal::new(Code::Failed, &error.to_string()))
}
