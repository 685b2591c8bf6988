//! Pulling what one timeline lacks from whoever has it: other members, and the archive.
//!
//! Only what is committed is copied, or what the term that is followed began with: `timeline/peers.rs` says which that is.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::bail;
use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term, TimelineParameters};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::{Message, Status};
use tokio::runtime::Handle;

use super::Background;
use crate::archive::ArchiveReader;
use crate::checked_segment::checker;
use crate::pace::WITH_THEM;
use crate::timeline::{Answer, Beginning, Missing, Timeline};

/// Longest wait for a peer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// So long others may take who have not answered, once one has what is missing.
const GRACE: Duration = Duration::from_millis(20);

/// WAL copied at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// Longest record whose end is looked for before a log begins after it, in bytes: it is in memory, for each of the timelines
/// that are caught up with at once. After a longer one all of the log is copied.
const MAX_BEGINNING: usize = 16 << 20;

/// So long it is copied at a pace before it is looked again whether a commit waits for it.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Times that a timeline is caught up with before others have their turn.
const TURNS: usize = 8;

struct Peer {
    status: Status,
    /// `None` for the archive.
    client: Option<SafekeeperClient>,
    /// What is not believed of the archive.
    given_up: AllGivenUp,
}

impl Peer {
    fn name(&self) -> String {
        match &self.client {
            Some(_) => format!("safekeeper {}", self.status.member.node),
            None => "the archive".to_owned(),
        }
    }

    fn read(&mut self, at: Lsn, to: Lsn, term: Term, bytes: &mut Vec<u8>) -> anyhow::Result<()> {
        let Some(client) = &mut self.client else { bail!("the archive has no WAL at {at}") };
        client.read_wal(at, to, term, bytes)?;
        Ok(())
    }
}

/// Goes on as long as there is much: what is written meanwhile is to be less each time. The rest a proposer sends, but for
/// what its term began with.
pub fn catch_up(
    background: &Background,
    timeline: &Arc<Timeline>,
    handle: &Handle,
) -> anyhow::Result<()> {
    for _ in 0..TURNS {
        let missing = once(background, timeline, handle)?;
        if missing < CHUNK && (missing == 0 || !timeline.lacks_beginning()) {
            break;
        }
    }
    Ok(())
}

/// Returns how many bytes were missing.
fn once(background: &Background, timeline: &Arc<Timeline>, handle: &Handle) -> anyhow::Result<u64> {
    let mut peers = ask_peers(background, timeline, handle);
    let newest = peers.iter().map(|peer| peer.status.configuration.number()).max();
    if newest > Some(timeline.configuration().number()) {
        let learned = background.timelines.learn(timeline);
        learned.map_err(|reason| anyhow::anyhow!("{reason}"))?;
        if timeline.is_left() {
            // What is here may be kept because the others lack it.
            return Ok(0);
        }
    }
    let told = peers.iter().map(|peer| &peer.status.configuration);
    let number = timeline.configuration_number();
    let believed = background.timelines.believed(timeline.parameters(), number, told);
    peers.retain(|peer| believed.includes(&peer.status.configuration));
    let own = background.timelines.context().shared.own;
    let answers = |member| member == own || peers.iter().any(|peer| peer.status.member == member);
    if !timeline.configuration().is_quorum(answers) {
        // What is archived was committed, and those who had it may be gone.
        match ask_archive(background, timeline, handle) {
            Ok(archive) => peers.extend(archive),
            // Those who answer have something all the same.
            Err(error) => {
                let id = timeline.parameters().timeline;
                tracing::info!(timeline = %id, %error, "what is archived is not known");
            }
        }
        if timeline.is_left() {
            return Ok(0);
        }
    }
    let statuses: Vec<Status> = peers.iter().map(|peer| peer.status.clone()).collect();
    let Some(missing) = timeline.conclude(&statuses)? else { return Ok(0) };
    let length = missing.target.saturating_sub(timeline.flush_lsn());
    timeline.note_catch_up(missing.target);
    let is_paced = others_commit(timeline, &statuses);
    let peer = &mut peers[missing.peer];
    if missing.term == Term(0) && begin_at_horizon(background, timeline, peer, &missing, handle)? {
        return Ok(length);
    }
    copy(background, timeline, peer, &missing, (number, is_paced), handle)?;
    Ok(length)
}

/// Whether a proposer commits with the other members, so that none of its commits waits for this one, and each of them may wait for
/// the disks and networks that this one takes.
pub fn others_commit(timeline: &Timeline, peers: &[Status]) -> bool {
    // They were not asked in one moment.
    let newest = peers.iter().map(|peer| peer.commit_lsn).max().unwrap_or_default();
    let is_with_them = |member: Member| {
        let said = peers.iter().find(|peer| peer.member == member);
        said.is_some_and(|peer| newest.saturating_sub(peer.flush_lsn) <= WITH_THEM)
    };
    peers.iter().any(|peer| peer.has_proposer) && timeline.configuration().is_quorum(is_with_them)
}

/// The archive in the place of a member.
fn ask_archive(
    background: &Background,
    timeline: &Timeline,
    handle: &Handle,
) -> anyhow::Result<Option<Peer>> {
    let Some(archive) = &background.archive else { return Ok(None) };
    let parameters = timeline.parameters();
    let key = (parameters.tenant, parameters.timeline);
    let decided = background.timelines.context().decisions.read(key);
    let decided = decided.map_err(|reason| anyhow::anyhow!("{reason}"))?;
    if let Some(decided) = &decided
        && decided.chain.newest().number() > timeline.configuration_number()
    {
        // This one may have been given up: then what it has is kept.
        background.timelines.learn(timeline).map_err(|reason| anyhow::anyhow!("{reason}"))?;
        return Ok(None);
    }
    let given_up = decided.map(|quorum| quorum.given_up).unwrap_or_default();
    let newest = handle.block_on(archive.newest(parameters, &given_up))?;
    let status = newest.map(|extent| status_of_archive(timeline, extent));
    Ok(status.map(|status| Peer { status, client: None, given_up }))
}

/// What is archived of a log, as if a member said it that has all of it there.
pub fn status_of_archive(timeline: &Timeline, newest: Extent) -> Status {
    Status {
        // Nobody's: it counts for nothing.
        member: Member { node: NodeId(0), incarnation: Incarnation([0; 16]) },
        parameters: timeline.parameters().clone(),
        configuration: (*timeline.configuration()).clone(),
        configured_in: Term(0),
        has_proposer: false,
        term: Term(0),
        available_lsn: newest.boundary,
        flush_lsn: newest.boundary,
        commit_lsn: newest.boundary,
        history: newest.history,
    }
}

/// Asks all other members at once: one that is gone keeps nobody waiting for what another one has.
fn ask_peers(background: &Background, timeline: &Arc<Timeline>, handle: &Handle) -> Vec<Peer> {
    let own = background.timelines.context().shared.own.node;
    let configuration = timeline.configuration();
    let others: Vec<NodeId> =
        configuration.nodes().into_iter().filter(|&node| node != own).collect();
    let (sender, answers) = sync_channel(others.len());
    for &node in &others {
        let (background, timeline) = (background.clone(), Arc::clone(timeline));
        let sender = sender.clone();
        handle.spawn_blocking(move || {
            // Nobody waits any more where another one was faster.
            let _ = sender.send(ask(&background, &timeline, node));
        });
    }
    drop(sender);
    let mut peers = Vec::new();
    // To connect, and to be answered.
    let mut until = Instant::now() + 2 * TIMEOUT;
    loop {
        match answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Some(peer)) => {
                if timeline.lacks_what_has(&peer.status) {
                    until = until.min(Instant::now() + GRACE);
                }
                peers.push(peer);
            }
            Ok(None) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return peers,
        }
    }
}

fn ask(background: &Background, timeline: &Timeline, node: NodeId) -> Option<Peer> {
    let parameters = timeline.parameters();
    let address = background.wal_address(node, &timeline.marks().addresses)?;
    let identity = background.security.identity();
    let client = SafekeeperClient::connect(&address, Some(node), identity, TIMEOUT);
    let mut client = client.ok()?;
    let status = client.open(parameters.tenant, parameters.timeline).ok()?;
    let is_it = status.member.node == node && status.parameters == *parameters;
    is_it.then_some(Peer { status, client: Some(client), given_up: AllGivenUp::default() })
}

/// Has an empty log begin where the peer's does: what that has removed is in the archive, and would be removed here as well.
/// False if there is nothing to leave out, or if it can't be: then all of it is copied.
fn begin_at_horizon(
    background: &Background,
    timeline: &Arc<Timeline>,
    peer: &mut Peer,
    missing: &Missing,
    handle: &Handle,
) -> anyhow::Result<bool> {
    let parameters = timeline.parameters();
    let from = peer.status.available_lsn;
    let Some(archive) = &background.archive else { return Ok(false) };
    let Some(removed) = removed_before(timeline, &peer.status, missing) else { return Ok(false) };
    let all = archive.has_all(parameters, removed.start, removed.end);
    if !handle.block_on(all).map_err(anyhow::Error::msg)? {
        tracing::warn!(
            timeline = %parameters.timeline, %from, peer = %peer.status.member.node,
            "WAL that a member has removed is not all in object storage; what there is will be copied"
        );
        return Ok(false);
    }
    let status = peer.status.clone();
    let read = |at, to, bytes: &mut Vec<u8>| peer.read(at, to, Term(0), bytes);
    let Some(beginning) = beginning_of(parameters, &status, missing, read)? else {
        return Ok(false);
    };
    if let Some(Message::Refused(reason)) = timeline.begin_at(&beginning)? {
        bail!("WAL of {} doesn't fit: {reason}", peer.name());
    }
    tracing::info!(
        timeline = %parameters.timeline, available_lsn = %from, lsn = %beginning.lsn,
        peer = %peer.status.member.node, "begun at what is not archived"
    );
    Ok(true)
}

/// The segments of which a log that is empty may leave out what it would copy, if they are archived: those that the peer has
/// removed.
pub fn removed_before(
    timeline: &Timeline,
    peer: &Status,
    missing: &Missing,
) -> Option<std::ops::Range<u64>> {
    let parameters = timeline.parameters();
    let size = u64::from(parameters.segment_size);
    let from = peer.available_lsn;
    let removed = parameters.start_lsn.segment_number(size)..from.segment_number(size);
    let may = !removed.is_empty() && from < missing.target && timeline.is_empty();
    may.then_some(removed)
}

/// The log that begins where a peer's does, to the end of the first record that begins there: the next one's back link can be
/// checked then. `read` appends bytes of `[from, to)` that the peer has committed. `None` if that record is too long to begin
/// with.
pub fn beginning_of(
    parameters: &TimelineParameters,
    peer: &Status,
    missing: &Missing,
    mut read: impl FnMut(Lsn, Lsn, &mut Vec<u8>) -> anyhow::Result<()>,
) -> anyhow::Result<Option<Beginning>> {
    let from = peer.available_lsn;
    let mut checker = checker(parameters, from);
    let mut bytes = Vec::new();
    let mut last_record = None;
    while last_record.is_none() {
        let at = from + bytes.len() as u64;
        let to = missing.target.min(at + CHUNK);
        if at == to || bytes.len() >= MAX_BEGINNING {
            return Ok(None);
        }
        read(at, to, &mut bytes)?;
        let new = &bytes[(at - from) as usize..];
        if new.is_empty() {
            bail!("safekeeper {} gave no WAL at {at}", peer.member.node);
        }
        checker.check(new).map_err(|error| {
            let node = peer.member.node;
            anyhow::anyhow!("what safekeeper {node} gave as committed is no valid WAL: {error}")
        })?;
        last_record = checker.last_record();
    }
    Ok(Some(Beginning {
        available_lsn: from,
        lsn: checker.position(),
        last_record,
        bytes,
        history: peer.history.clone(),
        commit_lsn: missing.target,
    }))
}

/// Copies what is missing from the peer, or from the archive what the peer no longer has.
fn copy(
    background: &Background,
    timeline: &Arc<Timeline>,
    peer: &mut Peer,
    missing: &Missing,
    (number, is_paced): (u64, bool),
    handle: &Handle,
) -> anyhow::Result<()> {
    let parameters = timeline.parameters();
    let target = missing.target;
    // Beyond where they part it may be cut.
    let begun = timeline.flush_lsn();
    let archive = background.archive.clone().map(ArchiveReader::new);
    let mut archive = archive.map(|archive| archive.without(peer.given_up.clone()));
    let mut at = missing.from;
    let since = Instant::now();
    while at < target {
        if timeline.flush_lsn() > at.max(begun) {
            // A proposer sends what is missing.
            return Ok(());
        }
        if timeline.configuration_number() != number {
            // Whether the peer is believed is looked at anew.
            return Ok(());
        }
        // Before it is read, for nothing, and on this thread, which holds nothing.
        let space = &background.timelines.context().shared.space;
        space.check(timeline.files().directory())?;
        space.pause(CHUNK);
        let to = target.min(at + CHUNK);
        if is_paced && since.elapsed() >= LOOK_EVERY {
            return Ok(());
        }
        if is_paced {
            background.pace.wait(to - at);
        }
        let mut bytes = Vec::new();
        if at < peer.status.available_lsn && missing.term == Term(0) {
            let Some(archive) = &mut archive else {
                bail!("WAL at {at} is on no safekeeper, and no object store is configured");
            };
            bytes.resize((to - at) as usize, 0);
            let count = handle.block_on(archive.read(parameters, at, &mut bytes));
            bytes.truncate(count.map_err(anyhow::Error::msg)?);
        } else {
            peer.read(at, to, missing.term, &mut bytes)?;
        }
        if bytes.is_empty() {
            bail!("{} gave no WAL at {at}", peer.name());
        }
        let answer: Answer = timeline.take_missing(missing, &peer.status, at, &bytes)?;
        if let Some(Message::Refused(reason)) = answer {
            bail!("WAL of {} doesn't fit: {reason}", peer.name());
        }
        at = at + bytes.len() as u64;
    }
    tracing::info!(
        timeline = %parameters.timeline, from = %missing.from, to = %target, term = %missing.term,
        peer = peer.name(), "caught up"
    );
    Ok(())
}
