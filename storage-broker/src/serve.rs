//! HTTP.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{DefaultBodyLimit, State};
use axum::{Json, Router};
use parking_lot::Mutex;
use pgstrata_ids::TimelineId;
use pgstrata_listen::{Api, Asked, Deed, Done, Metrics, Need, Posted, Ready, Refusal, Who, alive};
use pgstrata_wire::broker::{Listing, Publication, Role, Which};
use pgstrata_wire::http::Code;

use crate::registry::{Full, MAX_ALL_TIMELINES, MAX_NODES, MAX_TEXT, MAX_TIMELINES, Registry};

/// Longest publication, in bytes.
const MAX_BODY: usize = 16 << 20;

type Shared = Arc<Mutex<Registry>>;

/// Everything that is served.
pub fn router() -> Router {
    Api::new("storage broker", "Who has which timeline, how far: soft state of the last seconds.")
        .for_who(Need::Publishing)
        .post("/v1/publish", "Takes the place of what a node said before", &[Code::Full], publish)
        .for_who(Need::Deed(Deed::SeeNodes))
        .get("/v1/nodes", "Nodes that were heard of lately, and their timelines", &[], nodes)
        .for_who(Need::Deed(Deed::SeeService))
        .get("/metrics", "How many nodes were heard of lately", &[], metrics)
        .for_who(Need::Deed(Deed::SeeHealth))
        .get("/healthz", "Whether the process answers", &[], alive)
        .get("/readyz", "The same: it needs nobody else", &[], || async { Ready(Ok(())) })
        .router()
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared::default())
}

async fn publish(
    State(registry): State<Shared>,
    Who(peer): Who,
    Posted(said): Posted<Publication>,
) -> Result<Done, Refusal> {
    peer.check(match said.role {
        Role::Safekeeper => Deed::PublishSafekeeper(said.node()),
        Role::Pageserver => Deed::PublishPageserver,
        Role::Unknown => {
            let text = "this broker does not know the node's role: upgrade the broker first";
            return Err(Refusal::new(Code::Invalid, text));
        }
    })?;
    let refused = registry.lock().publish(said, Instant::now());
    let Err(full) = refused else { return Ok(Done) };
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

async fn nodes(
    State(registry): State<Shared>,
    Who(peer): Who,
    Asked(which): Asked<Which>,
) -> Json<Listing> {
    let now = Instant::now();
    let mut registry = registry.lock();
    Json(match (peer.only_tenant(), which.tenant) {
        // Services are everybody's; timelines are their tenant's.
        (Some(own), Some(asked)) if own != asked => registry.list(Some(own), Some(NOBODYS), now),
        (Some(own), _) => registry.list(Some(own), which.timeline, now),
        (None, tenant) => registry.list(tenant, which.timeline, now),
    })
}

/// No timeline has this id.
const NOBODYS: TimelineId = TimelineId([0; 16]);

async fn metrics(State(registry): State<Shared>) -> Metrics {
    let [safekeepers, pageservers] = registry.lock().counts(Instant::now());
    Metrics(format!(
        "# HELP pgstrata_broker_nodes Nodes heard of lately\n\
         # TYPE pgstrata_broker_nodes gauge\n\
         pgstrata_broker_nodes{{role=\"safekeeper\"}} {safekeepers}\n\
         pgstrata_broker_nodes{{role=\"pageserver\"}} {pageservers}\n"
    ))
}
