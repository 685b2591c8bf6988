//! The compute's HTTP interface: what it is and how far.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use axum::extract::State;
use axum::{Json, Router};
use pgstrata_ids::Lsn;
use pgstrata_listen::{
    Api, Deed, HttpLimits, Listening, Metrics, Need, Ready, Security, alive, serve_http,
};
use pgstrata_wire::http::compute::{Report, State as Stage};

use crate::compute::Shared;
use crate::proposer::SENT_BYTES;

async fn status(State(shared): State<Arc<Shared>>) -> Json<Report> {
    let mut report = shared.report.lock().clone();
    report.commit_lsn = Lsn(shared.commit_lsn.load(Ordering::Acquire));
    Json(report)
}

async fn ready(State(shared): State<Arc<Shared>>) -> Ready {
    let (state, failure) = {
        let report = shared.report.lock();
        (report.state, report.failure.clone())
    };
    Ready(match (state, failure) {
        (Stage::Running, None) => Ok(()),
        (state, None) => Err(state.to_string()),
        (state, Some(why)) => Err(format!("{state}: {why}")),
    })
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Metrics {
    let report = shared.report.lock().clone();
    let commit = shared.commit_lsn.load(Ordering::Acquire);
    Metrics(format!(
        "# HELP pgstrata_compute_commit_lsn Everything up to here is on a quorum\n\
         # TYPE pgstrata_compute_commit_lsn gauge\n\
         pgstrata_compute_commit_lsn {commit}\n\
         # HELP pgstrata_compute_start_milliseconds Time from start to accepting connections\n\
         # TYPE pgstrata_compute_start_milliseconds gauge\n\
         pgstrata_compute_start_milliseconds {}\n\
         # HELP pgstrata_compute_term Term of the proposer\n\
         # TYPE pgstrata_compute_term gauge\n\
         pgstrata_compute_term {}\n\
         # HELP pgstrata_compute_sent_bytes_total Bytes sent to all safekeepers\n\
         # TYPE pgstrata_compute_sent_bytes_total counter\n\
         pgstrata_compute_sent_bytes_total {}\n",
        report.start_ms,
        report.term,
        SENT_BYTES.load(Ordering::Relaxed)
    ))
}

/// Everything that is served.
fn router(shared: Arc<Shared>) -> Router {
    Api::new("compute", "What a compute is and how far. SQL is on PostgreSQL's own port.")
        .get("/v1/status", "What it is, where, and how far", &[], status)
        .get("/metrics", "How far it is, and what it sent", &[], metrics)
        .for_who(Need::Deed(Deed::SeeHealth))
        .get("/healthz", "Whether the process answers", &[], alive)
        .get("/readyz", "Whether PostgreSQL runs and commits", &[], ready)
        .router()
        .with_state(shared)
}

/// Serves on a thread of its own until the process ends.
pub fn serve(listening: Listening, security: Security, shared: Arc<Shared>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let router = router(shared);
    std::thread::Builder::new().name("http".into()).spawn(move || {
        runtime.block_on(async move {
            let served = match listening.asynchronous() {
                Ok(listeners) => {
                    serve_http(listeners, HttpLimits::default(), security, router).await;
                    Ok(())
                }
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                tracing::error!("the HTTP interface ended: {error}");
            }
        });
    })?;
    Ok(())
}
