//! The PostgreSQL port: committed WAL for page servers, `pg_receivewal` and standbys.

mod session;
mod stream;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pgstrata_wire::postgres::POSTGRES_EPOCH_UNIX_S;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::archive::Archive;
use crate::timelines::Timelines;

/// Most clients at once; more wait in the system's queue.
const MAX_CLIENTS: usize = 1000;

/// What every session needs.
#[derive(Clone, Debug)]
pub struct PgState {
    /// The timelines.
    pub timelines: Arc<Timelines>,
    /// Where old WAL is, if anywhere.
    pub archive: Option<Arc<Archive>>,
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, state: PgState) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a PostgreSQL client could not be taken");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        let state = state.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let peer = stream.peer_addr();
            if let Err(error) = session::run(stream, state).await {
                tracing::info!(?peer, %error, "PostgreSQL client left");
            }
        });
    }
}

/// Now, as PostgreSQL counts.
fn postgres_time_us() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_micros() as i64 - POSTGRES_EPOCH_UNIX_S as i64 * 1_000_000
}
