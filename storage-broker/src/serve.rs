//! HTTP.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use parking_lot::Mutex;
use pgstrata_wire::broker::{Listing, Publication};
use serde::Deserialize;

use crate::registry::{Full, MAX_ALL_TIMELINES, MAX_NODES, MAX_TEXT, MAX_TIMELINES, Registry};

/// Longest publication, in bytes.
const MAX_BODY: usize = 16 << 20;

type Shared = Arc<Mutex<Registry>>;

#[derive(Debug, Default, Deserialize)]
struct Which {
    tenant: Option<String>,
    timeline: Option<String>,
}

/// Everything that is served.
pub fn router() -> Router {
    Router::new()
        .route("/v1/publish", post(publish))
        .route("/v1/nodes", get(nodes))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ready\n" }))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared::default())
}

async fn publish(State(registry): State<Shared>, Json(said): Json<Publication>) -> Response {
    match registry.lock().publish(said, Instant::now()) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(full) => {
            let what = match full {
                Full::Nodes => format!("nodes than {MAX_NODES}"),
                Full::Timelines => format!("timelines of one node than {MAX_TIMELINES}"),
                Full::AllTimelines => format!("timelines of all nodes than {MAX_ALL_TIMELINES}"),
                Full::Text => {
                    let text = format!("a zone or an address is over {MAX_TEXT} bytes long\n");
                    return (StatusCode::BAD_REQUEST, text).into_response();
                }
            };
            let text = format!("the broker remembers no more {what}\n");
            (StatusCode::INSUFFICIENT_STORAGE, text).into_response()
        }
    }
}

async fn nodes(
    State(registry): State<Shared>,
    Query(which): Query<Which>,
) -> Result<Json<Listing>, (StatusCode, String)> {
    let bad = |error: pgstrata_ids::IdError| (StatusCode::BAD_REQUEST, format!("{error}\n"));
    let tenant = which.tenant.map(|text| text.parse()).transpose().map_err(bad)?;
    let timeline = which.timeline.map(|text| text.parse()).transpose().map_err(bad)?;
    Ok(Json(registry.lock().list(tenant, timeline, Instant::now())))
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
