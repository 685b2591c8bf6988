//! HTTP.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json};
use axum::routing::{get, post};
use parking_lot::Mutex;
use pgstrata_ids::{TenantId, TimelineId};
use pgstrata_listen::{Asked, Posted, Refusal, complete};
use pgstrata_wire::broker::{Listing, Publication};
use pgstrata_wire::http::Code;
use pgstrata_wire::text;
use serde::Deserialize;

use crate::registry::{Full, MAX_ALL_TIMELINES, MAX_NODES, MAX_TEXT, MAX_TIMELINES, Registry};

/// Longest publication, in bytes.
const MAX_BODY: usize = 16 << 20;

type Shared = Arc<Mutex<Registry>>;

#[derive(Debug, Default, Deserialize)]
struct Which {
    #[serde(default, with = "text::optional")]
    tenant: Option<TenantId>,
    #[serde(default, with = "text::optional")]
    timeline: Option<TimelineId>,
}

/// Everything that is served.
pub fn router() -> Router {
    let router = Router::new()
        .route("/v1/publish", post(publish))
        .route("/v1/nodes", get(nodes))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ready\n" }));
    complete(router).layer(DefaultBodyLimit::max(MAX_BODY)).with_state(Shared::default())
}

async fn publish(
    State(registry): State<Shared>,
    Posted(said): Posted<Publication>,
) -> Result<StatusCode, Refusal> {
    let refused = registry.lock().publish(said, Instant::now());
    let Err(full) = refused else { return Ok(StatusCode::NO_CONTENT) };
    let what = match full {
        Full::Nodes => format!("nodes than {MAX_NODES}"),
        Full::Timelines => format!("timelines of one node than {MAX_TIMELINES}"),
        Full::AllTimelines => format!("timelines of all nodes than {MAX_ALL_TIMELINES}"),
        Full::Text => {
            let text = format!("a zone or an address is over {MAX_TEXT} bytes long");
            return Err(Refusal::new(Code::Invalid, &text));
        }
    };
    Err(Refusal::new(Code::Full, &format!("the broker remembers no more {what}")))
}

async fn nodes(State(registry): State<Shared>, Asked(which): Asked<Which>) -> Json<Listing> {
    Json(registry.lock().list(which.tenant, which.timeline, Instant::now()))
}

async fn metrics(State(registry): State<Shared>) -> impl IntoResponse {
    let [safekeepers, pageservers] = registry.lock().counts(Instant::now());
    let text = format!(
        "# HELP pgstrata_broker_nodes Nodes heard of lately\n\
         # TYPE pgstrata_broker_nodes gauge\n\
         pgstrata_broker_nodes{{role=\"safekeeper\"}} {safekeepers}\n\
         pgstrata_broker_nodes{{role=\"pageserver\"}} {pageservers}\n"
    );
    ([("content-type", "text/plain; version=0.0.4")], text)
}
