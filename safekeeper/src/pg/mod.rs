//! The PostgreSQL port: committed WAL for page servers, `pg_receivewal` and standbys.

mod session;
mod stream;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pgstrata_listen::Shares;
use pgstrata_wire::postgres::POSTGRES_EPOCH_UNIX_S;
use tokio::net::TcpListener;

use crate::archive::Archive;
use crate::timelines::Timelines;

/// Most clients at once; more are closed when they arrive.
const MAX_CLIENTS: usize = 1000;

/// Most of one peer.
const MAX_CLIENTS_OF_PEER: usize = 750;

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
    let shares = Shares::new(MAX_CLIENTS_OF_PEER, MAX_CLIENTS);
    loop {
        let taken = listener.accept().await.and_then(|(stream, peer)| {
            let place = shares.take(peer.ip()).map_err(std::io::Error::other)?;
            Ok((stream, place))
        });
        let (stream, place) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "a PostgreSQL client could not be taken");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        let state = state.clone();
        tokio::spawn(async move {
            let _place = place;
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
