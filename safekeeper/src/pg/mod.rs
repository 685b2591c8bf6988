//! The PostgreSQL port: committed WAL for page servers, `pg_receivewal` and standbys.

pub mod feeding;
#[cfg(test)]
mod feeding_tests;
mod session;
mod stream;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pgstrata_listen::{Port, Security, Sparing};
use pgstrata_wire::postgres::POSTGRES_EPOCH_UNIX_S;
use tokio::net::TcpListener;

use crate::archive::Archive;
use crate::timelines::Timelines;

/// Most clients at once; more are closed when they arrive.
const MAX_CLIENTS: usize = 1000;

/// Most of one peer.
const MAX_CLIENTS_OF_PEER: usize = 750;

static NOT_LET_IN: Sparing = Sparing::new();

/// What every session needs.
#[derive(Clone, Debug)]
pub struct PgState {
    /// The timelines.
    pub timelines: Arc<Timelines>,
    /// Where old WAL is, if anywhere.
    pub archive: Option<Arc<Archive>>,
    /// How clients show who they are.
    pub security: Security,
}

/// Serves until the process ends.
pub async fn serve(listeners: Vec<TcpListener>, state: PgState) {
    let mut port = Port::new(listeners, "PostgreSQL", MAX_CLIENTS_OF_PEER, MAX_CLIENTS);
    loop {
        let (stream, peer, place) = port.next().await;
        let state = state.clone();
        tokio::spawn(async move {
            let _place = place;
            let opened = match pgstrata_listen::open(stream, &state.security).await {
                Ok(Some(opened)) => opened,
                Ok(None) => return,
                Err(error) => return NOT_LET_IN.not_let_in("PostgreSQL", peer, &error),
            };
            if let Err(error) = session::run(opened, state).await {
                tracing::info!(%peer, %error, "PostgreSQL client left");
            }
        });
    }
}

/// Now, as PostgreSQL counts.
fn postgres_time_us() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_micros() as i64 - POSTGRES_EPOCH_UNIX_S as i64 * 1_000_000
}
