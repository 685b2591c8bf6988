//! Catching up from other members and the archive: while no proposer runs, and where one does not send what is missing, since
//! it is not its own.
//!
//! Only committed WAL is copied. What is committed is what another member knows to be, or what
//! the members' logs together prove: `timeline/peers.rs`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use pgstrata_ids::{Lsn, NodeId, Term};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::{Message, Status};
use tokio::runtime::Handle;

use super::{Background, INTERVAL};
use crate::archive::ArchiveReader;
use crate::storage_error::StorageError;
use crate::timeline::{Answer, Missing, Timeline};
use crate::timelines::TimelineKey;

/// Longest wait for a peer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// WAL copied at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// Times that a timeline is caught up with before others have their turn.
const TURNS: usize = 8;

/// Rounds between looks at timelines of a compute that seem to be complete.
const FULL_LOOK: u64 = 10;

pub async fn run(background: Background) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Where each timeline's log ended in the last round: as many as there are open timelines.
    let mut ended: HashMap<TimelineKey, Lsn> = HashMap::new();
    for round in 0u64.. {
        interval.tick().await;
        let open = background.timelines.open_keys();
        ended.retain(|key, _| open.binary_search(key).is_ok());
        for key in open {
            let Some(timeline) = background.timelines.get_open(key) else { continue };
            let flush_lsn = timeline.flush_lsn();
            let is_fed = ended.insert(key, flush_lsn) != Some(flush_lsn);
            if timeline.is_left() || !may_lag(&background, &timeline, round, is_fed) {
                continue;
            }
            let background = background.clone();
            let handle = Handle::current();
            let caught_up = tokio::task::spawn_blocking(move || {
                catch_up(&background, &timeline, &handle);
            });
            // A panic there is reported by the runtime; the next round tries again.
            let _ = caught_up.await;
        }
    }
}

/// Asks all members, and gets what is missing here. For a thread that may wait.
pub fn catch_up(background: &Background, timeline: &Arc<Timeline>, handle: &Handle) {
    let id = timeline.parameters().timeline;
    if let Err(error) = try_to(background, timeline, handle) {
        match error.downcast_ref().is_some_and(StorageError::is_for_kept_space) {
            true => tracing::debug!(timeline = %id, %error, "catching up waits"),
            false => tracing::info!(timeline = %id, %error, "catching up will be tried again"),
        }
    }
}

/// True if others may have more, or know more to be committed. `is_fed`: its log has grown since the last look.
fn may_lag(background: &Background, timeline: &Timeline, round: u64, is_fed: bool) -> bool {
    let key = (timeline.parameters().tenant, timeline.parameters().timeline);
    let committed = background.known.highest(key, |progress| progress.commit_lsn);
    if timeline.has_proposer() {
        let is_behind = committed > timeline.flush_lsn() || round.is_multiple_of(FULL_LOOK);
        return is_behind && !is_fed;
    }
    let unproven = timeline.flush_lsn() > timeline.commit_lsn();
    // While it is made a member, or another one is, no compute may have reached it yet.
    let changes = !timeline.configuration().incoming().is_empty();
    // Where nothing of that is so it is looked at in its turn, as those at rest are: `waking.rs`.
    unproven || changes || committed > timeline.commit_lsn()
}

struct Peer {
    status: Status,
    client: SafekeeperClient,
}

/// Goes on as long as there is much: what is written meanwhile is to be less each time. The rest a proposer sends.
fn try_to(
    background: &Background,
    timeline: &Arc<Timeline>,
    handle: &Handle,
) -> anyhow::Result<()> {
    for _ in 0..TURNS {
        if once(background, timeline, handle)? < CHUNK {
            break;
        }
    }
    Ok(())
}

/// Returns how many bytes were missing.
fn once(background: &Background, timeline: &Arc<Timeline>, handle: &Handle) -> anyhow::Result<u64> {
    let mut peers = ask_peers(background, timeline);
    let newest = peers.iter().map(|peer| peer.status.configuration.number()).max();
    if newest > Some(timeline.configuration().number()) {
        let learned = background.timelines.learn(timeline);
        learned.map_err(|reason| anyhow::anyhow!("{reason}"))?;
        if timeline.is_left() {
            // What is here may be kept because the others lack it.
            return Ok(0);
        }
    }
    let statuses: Vec<Status> = peers.iter().map(|peer| peer.status.clone()).collect();
    let Some(missing) = timeline.conclude(&statuses)? else { return Ok(0) };
    let length = missing.target.saturating_sub(timeline.flush_lsn());
    timeline.note_catch_up(missing.target);
    copy(background, timeline, &mut peers[missing.peer], &missing, handle)?;
    Ok(length)
}

fn ask_peers(background: &Background, timeline: &Timeline) -> Vec<Peer> {
    let parameters = timeline.parameters();
    let own = background.timelines.context().shared.own.node;
    let hints = timeline.marks().addresses;
    let address = |node: NodeId| {
        let hint = || hints.iter().find(|(other, _)| *other == node).map(|(_, text)| text.clone());
        let decisions = &background.timelines.context().decisions;
        // Where there is a broker it knows better: in a copy of a cluster they may still be those of the original.
        let has_broker = background.broker.is_some();
        let registered = || Some(decisions.registration(node).ok().filter(|_| !has_broker)??.wal);
        background.known.wal_address(node).or_else(hint).or_else(registered)
    };
    let configuration = timeline.configuration();
    let others = configuration.nodes().into_iter().filter(|&node| node != own);
    let ask = |node: NodeId| {
        let identity = background.security.identity();
        let client = SafekeeperClient::connect(&address(node)?, Some(node), identity, TIMEOUT);
        let mut client = client.ok()?;
        let status = client.open(parameters.tenant, parameters.timeline).ok()?;
        (status.member.node == node && status.parameters == *parameters)
            .then_some(Peer { status, client })
    };
    others.filter_map(ask).collect()
}

/// Copies `[own end, target)` from the peer, or from the archive what the peer no longer has.
fn copy(
    background: &Background,
    timeline: &Arc<Timeline>,
    peer: &mut Peer,
    missing: &Missing,
    handle: &Handle,
) -> anyhow::Result<()> {
    let parameters = timeline.parameters();
    let (divergence, target) = (missing.from, missing.target);
    // Beyond where they part it may be cut.
    let begun = timeline.flush_lsn();
    let mut archive = background.archive.clone().map(ArchiveReader::new);
    let mut at = divergence;
    while at < target {
        if timeline.flush_lsn() > at.max(begun) {
            // A proposer sends what is missing.
            return Ok(());
        }
        // Before it is read, for nothing, and on this thread, which holds nothing.
        let space = &background.timelines.context().shared.space;
        space.check(timeline.files().directory())?;
        space.pause(CHUNK);
        let to = target.min(at + CHUNK);
        let mut bytes = Vec::new();
        if at < peer.status.available_lsn {
            let Some(archive) = &mut archive else {
                bail!("WAL at {at} is on no safekeeper, and no object store is configured");
            };
            bytes.resize((to - at) as usize, 0);
            let count = handle.block_on(archive.read(parameters, at, &mut bytes));
            bytes.truncate(count.map_err(anyhow::Error::msg)?);
        } else {
            peer.client.read_wal(at, to, Term(0), &mut bytes)?;
        }
        if bytes.is_empty() {
            bail!("safekeeper {} gave no WAL at {at}", peer.status.member.node);
        }
        let range = missing.range(&peer.status, at, bytes.len());
        at = at + bytes.len() as u64;
        let answer: Answer = timeline.peer_range(&range, &bytes)?;
        if let Some(Message::Refused(reason)) = answer {
            bail!("WAL of safekeeper {} doesn't fit: {reason}", peer.status.member.node);
        }
    }
    tracing::info!(
        timeline = %parameters.timeline, from = %divergence, to = %target, peer = %peer.status.member.node,
        "caught up"
    );
    Ok(())
}
