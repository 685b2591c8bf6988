//! Taking damaged timelines out of use, and mending them: see `crate::mend`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::quorum::AllGivenUp;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Lsn, Member, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{Chain, Configuration};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::Status;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::{Background, INTERVAL};
use crate::archive::ArchiveReader;
use crate::mend::check::confirm;
use crate::mend::{DamagedLog, Fate, Lack, Mended, Said, Source, Sources, fate};
use crate::storage_error::StorageError;
use crate::timeline::{AWAY, Suspicion, Timeline, note_kept, read_control};
use crate::timelines::away::note_back;
use crate::timelines::believing::{Believed, restored_by};
use crate::timelines::{TimelineKey, Timelines};

/// Longest wait for a peer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Timelines that are mended at once.
const AT_ONCE: usize = 2;

/// First and longest pause after an attempt that failed.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

struct State {
    retry_at: Instant,
    pause: Duration,
    is_under_way: bool,
}

pub async fn run(background: Background) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // As many as are damaged.
    let mut states: HashMap<TimelineKey, State> = HashMap::new();
    let mut attempts: JoinSet<(TimelineKey, Result<(), String>)> = JoinSet::new();
    loop {
        interval.tick().await;
        let open = background.timelines.open_keys();
        for timeline in open.into_iter().filter_map(|key| background.timelines.get_open(key)) {
            if let Some(suspicion) = timeline.take_suspicion() {
                let background = background.clone();
                let looked =
                    tokio::task::spawn_blocking(move || look(&background, &timeline, &suspicion));
                // A panic there is reported by the runtime, and ends the process.
                let _ = looked.await;
            }
        }
        while let Some(ended) = attempts.try_join_next() {
            let Ok((key, result)) = ended else { continue };
            note(&background, &mut states, key, result);
        }
        let mending = background.timelines.mending();
        states.retain(|key, state| state.is_under_way || mending.contains(key));
        for key in mending {
            let (retry_at, pause) = (Instant::now(), PAUSE.0);
            let new = || State { retry_at, pause, is_under_way: false };
            let state = states.entry(key).or_insert_with(new);
            if attempts.len() >= AT_ONCE || state.is_under_way || Instant::now() < state.retry_at {
                continue;
            }
            state.is_under_way = true;
            let (background, handle) = (background.clone(), Handle::current());
            attempts.spawn_blocking(move || {
                let timelines = &background.timelines;
                let sources = |damaged: &Damaged<'_>| ask(&background, damaged, &handle);
                (key, attempt(timelines, key, sources).map(|_| ()))
            });
        }
    }
}

/// Whether what somebody met is so; then the timeline is used no more.
fn look(background: &Background, timeline: &Arc<Timeline>, suspicion: &Suspicion) {
    match confirm(timeline, suspicion) {
        Some(found) => {
            let why =
                format!("WAL is damaged on this safekeeper after {}: {}", found.at, found.why);
            background.timelines.take_out(timeline, &why);
        }
        None => tracing::info!(
            timeline = %timeline.parameters().timeline, at = %suspicion.at, why = suspicion.why,
            "somebody met what is no WAL, and it is right here"
        ),
    }
}

fn note(
    background: &Background,
    states: &mut HashMap<TimelineKey, State>,
    key: TimelineKey,
    result: Result<(), String>,
) {
    match result {
        Ok(()) => {
            states.remove(&key);
        }
        Err(why) => {
            if let Some(state) = states.get_mut(&key) {
                state.is_under_way = false;
                state.retry_at = Instant::now() + state.pause;
                state.pause = (state.pause * 2).min(PAUSE.1);
            }
            tracing::warn!(timeline = %key.1, error = %why, "timeline can't be mended yet");
            background.timelines.note_mending(key, why);
        }
    }
}

/// A timeline that is to be mended.
#[derive(Debug)]
pub struct Damaged<'a> {
    /// What it has promised.
    pub control: &'a TimelineControl,
    /// Its members, as last decided, for all that can be read now.
    pub newest: &'a Configuration,
    /// Who was given up, if that could be read: else nothing of the archive is known to be right.
    pub given_up: Option<AllGivenUp>,
    /// Number of the configuration by which others began anew with what is archived, if they did; else 0.
    pub restored: u64,
}

impl Damaged<'_> {
    /// Whose word counts.
    pub fn believed(&self) -> Believed {
        let own = self.control.state.configuration.number().max(self.newest.number());
        Believed::new(own, self.given_up.clone(), self.restored)
    }
}

/// What a member says of itself, if it is one, and was not given up.
pub fn said(status: Status, believed: &Believed) -> Result<Option<Said>, String> {
    let configuration = &status.configuration;
    // Where it is not decided yet who the members are they are these nodes.
    let is_one = match configuration.is_known() {
        true => configuration.contains(status.member),
        false => configuration.nodes().contains(&status.member.node),
    };
    if !is_one {
        return Err("is no member by now".to_owned());
    }
    if !believed.includes(configuration) {
        return Err("may have been given up, and not know it".to_owned());
    }
    Ok(Some(Said {
        member: status.member,
        configuration: status.configuration,
        term: status.term,
        available_lsn: status.available_lsn,
        flush_lsn: status.flush_lsn,
        commit_lsn: status.commit_lsn,
        history: status.history,
    }))
}

/// One attempt to mend a timeline, and to open it; where it is no longer kept here it goes. `ask` says who may have what is damaged.
/// Where the log was cut, if it was. For a thread that may wait.
pub fn attempt(
    timelines: &Timelines,
    key: TimelineKey,
    ask: impl FnOnce(&Damaged<'_>) -> Sources,
) -> Result<Option<Lsn>, String> {
    let shared = &timelines.context().shared;
    if let Some(reason) = shared.latch.reason() {
        return Err(reason);
    }
    if timelines.is_unopened(key) {
        // What its branch's deletion frees may be what it waits for.
        let read = timelines.context().decisions.read(key).ok().flatten();
        if let Some(deleted) = read.filter(|decided| decided.is_deleted) {
            let removed = timelines.delete_damaged(&deleted);
            return removed.map(|()| None).map_err(|error| error.to_string());
        }
        return timelines.reopen(key).map(|()| None);
    }
    let directory = timelines.directory_of(key);
    let control = read_control(shared, &directory.join("control"));
    let control = control.map_err(|error| error.to_string())?;
    let names = shared.disk.list(&directory).map_err(|error| error.to_string())?;
    let read = timelines.context().decisions.read(key);
    // Who was given up is not known then, and so not what of the archive is right.
    let is_unread = read.is_err();
    let decided = read.ok().flatten();
    if let Some(deleted) = decided.as_ref().filter(|decided| decided.is_deleted) {
        // Nobody needs it any more.
        let removed = timelines.delete_damaged(deleted);
        return removed.map(|()| None).map_err(|error| error.to_string());
    }
    let own = &control.state.configuration;
    match fate(&names, own, decided.as_ref(), shared.own) {
        Fate::Mended => {}
        Fate::LetGo => return timelines.let_go_damaged(key).map(|()| None),
        Fate::Kept => {
            // Whatever is said of it later, or can't be read. It is no damaged one any more, then, but one for people only.
            note_kept(shared.disk.as_ref(), &directory, &shared.latch)
                .map_err(|error| error.to_string())?;
            return timelines.reopen(key).map(|()| None);
        }
    }
    let restored = restored_by(decided.as_ref());
    let (decided, given_up) = match decided {
        Some(decided) => (Some(decided.chain), decided.given_up),
        None => (None, AllGivenUp::default()),
    };
    // Those that were decided on since then are asked too: they may be the only ones that are left.
    let newest = decided.as_ref().map_or(own, Chain::newest);
    let given_up = (!is_unread).then_some(given_up);
    let mut sources = ask(&Damaged { control: &control, newest, given_up, restored });
    if let Some(said) = sources.newest_configuration()
        && said.number() > own.number().max(newest.number())
        && !said.contains(shared.own)
    {
        return Err("other safekeepers keep this timeline by now, they say, and its WAL is damaged here: what becomes of it \
                    stands in object storage, which can't be read now"
            .to_owned());
    }
    let (disk, space) = (Arc::clone(&shared.disk), shared.space.clone());
    let log = DamagedLog::open(disk, &directory, control, space);
    let is_away = names.iter().any(|name| name == AWAY);
    let mended = log.map_err(Lack::from).and_then(|log| match is_away {
        true => log.sent_away().mend(&mut sources),
        false => log.mend(&mut sources),
    });
    let Mended { fetched_bytes, segments, cut } = mended.map_err(|lack| {
        if let Lack::Storage(error @ StorageError::Failed { .. }) = &lack
            && !error.is_of_reading()
        {
            // What the files hold is unknown, and nothing is tried again.
            shared.latch.throw(&lack.to_string());
        }
        lack.to_string()
    })?;
    let cut_after = cut.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string());
    tracing::warn!(timeline = %key.1, fetched_bytes, segments, cut_after, "damaged WAL was mended");
    if is_away {
        note_back(shared, &directory).map_err(|error| {
            shared.latch.throw(&error.to_string());
            error.to_string()
        })?;
    }
    timelines.reopen(key)?;
    shared.meters.mended();
    Ok(cut)
}

fn ask(background: &Background, damaged: &Damaged<'_>, handle: &Handle) -> Sources {
    let Damaged { control, newest, given_up, .. } = damaged;
    let mut sources: Vec<Box<dyn Source>> = Vec::new();
    let mut silent = Vec::new();
    let own = background.timelines.context().shared.own.node;
    let mut nodes = control.state.configuration.nodes();
    let known = nodes.clone();
    nodes.extend(newest.nodes().into_iter().filter(|node| !known.contains(node)));
    for node in nodes.into_iter().filter(|&node| node != own) {
        match background.wal_address(node, &control.addresses) {
            Some(address) => {
                let (background, parameters) = (background.clone(), control.parameters.clone());
                sources.push(Box::new(Peer {
                    background,
                    parameters,
                    node,
                    address,
                    believed: damaged.believed(),
                    client: None,
                }));
            }
            None => silent.push(format!("it is not known where safekeeper {node} is")),
        }
    }
    if let Some(archive) = background.archive.clone().map(ArchiveReader::new)
        && let Some(given_up) = given_up
    {
        let archive = archive.without(given_up.clone());
        let parameters = control.parameters.clone();
        sources.push(Box::new(Archived::new(archive, parameters, handle.clone())));
    }
    let state = &control.state;
    let history = state.history.clone();
    Sources::ask(history, control.parameters.start_lsn, state.commit_lsn, sources, silent)
}

/// Another member.
struct Peer {
    background: Background,
    parameters: TimelineParameters,
    node: NodeId,
    address: String,
    believed: Believed,
    client: Option<SafekeeperClient>,
}

impl Peer {
    fn with<T>(
        &mut self,
        act: impl FnOnce(&mut SafekeeperClient) -> std::io::Result<T>,
    ) -> Result<T, String> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => {
                let identity = self.background.security.identity();
                let client =
                    SafekeeperClient::connect(&self.address, Some(self.node), identity, TIMEOUT);
                client.map_err(|error| error.to_string())?
            }
        };
        let done = act(&mut client).map_err(|error| error.to_string())?;
        self.client = Some(client);
        Ok(done)
    }
}

impl Source for Peer {
    fn name(&self) -> String {
        format!("safekeeper {}", self.node)
    }

    fn said(&mut self) -> Result<Option<Said>, String> {
        let (tenant, timeline) = (self.parameters.tenant, self.parameters.timeline);
        let status = self.with(|client| client.open(tenant, timeline))?;
        let Member { node, .. } = status.member;
        if node != self.node || status.parameters != self.parameters {
            return Err(format!("at {} is another one, or another timeline", self.address));
        }
        said(status, &self.believed)
    }

    fn read(&mut self, from: Lsn, to: Lsn, term: Term) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        self.with(|client| {
            client.read_wal(from, to, term, &mut bytes)?;
            Ok(())
        })?;
        Ok(bytes)
    }
}

/// What is in object storage.
#[derive(Debug)]
pub struct Archived {
    archive: ArchiveReader,
    parameters: TimelineParameters,
    handle: Handle,
}

impl Archived {
    /// Of a timeline. `handle` waits for it.
    pub fn new(archive: ArchiveReader, parameters: TimelineParameters, handle: Handle) -> Archived {
        Archived { archive, parameters, handle }
    }
}

impl Source for Archived {
    fn name(&self) -> String {
        "the archive".to_owned()
    }

    fn said(&mut self) -> Result<Option<Said>, String> {
        Ok(None)
    }

    fn read(&mut self, from: Lsn, to: Lsn, _term: Term) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; to.saturating_sub(from) as usize];
        let read = self.handle.block_on(self.archive.read(&self.parameters, from, &mut bytes));
        bytes.truncate(read?);
        Ok(bytes)
    }
}
