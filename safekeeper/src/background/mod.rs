//! What goes on without being asked: telling the broker, catching up, archiving, trimming, looking for damage, mending it.

pub mod archiving;
mod broker;
mod catch_up;
mod idle;
mod known;
mod lag;
pub mod mending;
pub mod pulling;
mod scrub;
mod waking;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pgstrata_ids::NodeId;
use pgstrata_listen::Security;
use pgstrata_wire::broker::{Addresses, PUBLISH_INTERVAL_S};

pub use known::Known;
pub use lag::{Lag, Lags};
pub use scrub::ScrubArguments;

use crate::archive::Archive;
use crate::pace::Pace;
use crate::timelines::Timelines;

/// How often everything is looked at.
const INTERVAL: Duration = Duration::from_secs(PUBLISH_INTERVAL_S);

/// What background work needs.
#[derive(Clone, Debug)]
pub struct Background {
    /// The timelines.
    pub timelines: Arc<Timelines>,
    /// Where full segments go, if anywhere.
    pub archive: Option<Arc<Archive>>,
    /// Base URL of the broker, if there is one.
    pub broker: Option<String>,
    /// What the broker last said.
    pub known: Arc<Known>,
    /// How far members are behind.
    pub lags: Arc<Lags>,
    /// Our failure zone.
    pub zone: String,
    /// So long after the last that happened with a timeline it comes to rest.
    pub rest_after: Duration,
    /// So long after the last that was written to a timeline its tail is archived.
    pub tail_after: Duration,
    /// So long after it came to rest a timeline's WAL is kept in object storage only, if ever.
    pub away_after: Option<Duration>,
    /// Where we listen.
    pub addresses: Addresses,
    /// Who we are to others.
    pub security: Security,
    /// How fast and how often all WAL here is read and checked.
    pub scrub: ScrubArguments,
    /// How fast WAL is copied that is missing here.
    pub pace: Arc<Pace>,
}

impl Background {
    /// Where another member's WAL port is, as far as anybody knows: the broker, else those places that a timeline has, else
    /// where it registered itself.
    fn wal_address(&self, node: NodeId, places: &[(NodeId, String)]) -> Option<String> {
        let hint = || places.iter().find(|(other, _)| *other == node).map(|(_, text)| text.clone());
        let decisions = &self.timelines.context().decisions;
        // Where there is a broker it knows better: in a copy of a cluster they may still be those of the original.
        let has_broker = self.broker.is_some();
        let registered = || Some(decisions.registration(node).ok().filter(|_| !has_broker)??.wal);
        self.known.wal_address(node).or_else(hint).or_else(registered)
    }

    /// Starts it all on the current runtime.
    pub fn start(self) -> io::Result<()> {
        let (told, due) = waking::due();
        if let Some(url) = self.broker.clone() {
            let background = self.clone();
            let talk = move || broker::run(&background, &url, &told);
            std::thread::Builder::new().name("broker".into()).spawn(talk)?;
        }
        self.timelines.context().shared.space.keep_looking()?;
        let background = self.clone();
        let look = move || {
            loop {
                background.lags.look(&background.timelines, &background.known);
                std::thread::sleep(INTERVAL);
            }
        };
        std::thread::Builder::new().name("lag".into()).spawn(look)?;
        tokio::spawn(archiving::run(self.clone()));
        tokio::spawn(write_down(Arc::clone(&self.timelines)));
        tokio::spawn(mending::run(self.clone()));
        scrub::start(Arc::clone(&self.timelines), self.scrub)?;
        let background = self.clone();
        let let_rest = move || idle::run(&background);
        std::thread::Builder::new().name("idle".into()).spawn(let_rest)?;
        let busy = catch_up::Busy::default();
        tokio::spawn(waking::run(self.clone(), due, busy.clone()));
        tokio::spawn(catch_up::run(self, busy));
        Ok(())
    }
}

/// Writes down how far timelines are that nothing is appended to or that have gone far: it costs two syncs, which
/// a busy proposer would have to wait for.
async fn write_down(timelines: Arc<Timelines>) {
    let mut interval = tokio::time::interval(INTERVAL);
    loop {
        interval.tick().await;
        let timelines = Arc::clone(&timelines);
        let written = tokio::task::spawn_blocking(move || {
            let open = timelines.open_keys().into_iter();
            for timeline in open.filter_map(|key| timelines.get_open(key)) {
                let behind = timeline.commit_lsn().saturating_sub(timeline.stored_commit_lsn());
                let far = behind >= timeline.files().segment_size();
                let appended = timeline.has_appended_lately();
                if appended && let Err(error) = timeline.note_flushed() {
                    tracing::warn!(%error, "the end of a log could not be noted");
                }
                let written = match far || !appended {
                    true => timeline.checkpoint(),
                    false => Ok(()),
                };
                match written {
                    // It is said of the disk.
                    Err(error) if error.is_for_want_of_space() => {}
                    Err(error) => tracing::warn!(%error, "positions could not be written down"),
                    Ok(()) => {}
                }
            }
        });
        // A panic there is reported by the runtime; the next round tries again.
        let _ = written.await;
    }
}
