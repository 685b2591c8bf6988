//! How a steward reaches safekeepers: what it asks of them, apart from how that is asked.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Member, NodeId};
use pgstrata_listen::Security;
use pgstrata_quorum::Configuration;
use pgstrata_wal_client::{SafekeeperClient, refusal_of};
use pgstrata_wire::safekeeper::{RefusedReason, Status};

use super::campaign;
use super::silence::{PATIENCE, Silence};
use super::turn::Heard;
use crate::background::Known;
use crate::decisions::Decisions;
use crate::timelines::TimelineKey;

/// So long none of the members has a compute, before one of them takes a term itself.
const COMPUTE_PATIENCE: Duration = Duration::from_millis(1500);

/// How long members are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Who was silent lately is not waited for as long again.
    AsUsual,
    /// What is concluded from silence is given up: nobody's is taken for granted.
    ForAll,
}

/// See the module.
pub trait Reach: Debug + Send + Sync {
    /// What these members say of a timeline, all asked at the same time, or why they say nothing, in their order. With a number
    /// they look first where it is decided, for a configuration of that number.
    fn ask(
        &self,
        key: TimelineKey,
        members: &[Member],
        number: Option<u64>,
        patience: Patience,
    ) -> Vec<Result<Heard, String>>;

    /// Whether a safekeeper answers at all.
    fn answers(&self, node: NodeId) -> Result<(), String>;

    /// Whether a safekeeper answers, and knows nothing of the timeline. One that has it, also if that is damaged, was a member
    /// once, and has promised something.
    fn has_nothing(&self, node: NodeId, key: TimelineKey) -> bool;

    /// Waits for as long as a compute takes that has lost its connections, or is about to start.
    fn wait_for_compute(&self);

    /// Has those elect that were heard: see [`campaign`].
    fn elect(&self, joint: &Configuration, heard: &[Heard]) -> io::Result<()>;
}

/// By connections to their WAL ports.
#[derive(Debug)]
pub struct Connections {
    decisions: Decisions,
    known: Arc<Known>,
    security: Security,
    silence: Silence,
}

impl Connections {
    /// To where members are by what is `known`, or registered; as whom, `security` says.
    pub fn new(decisions: Decisions, known: Arc<Known>, security: Security) -> Connections {
        Connections { decisions, known, security, silence: Silence::default() }
    }

    fn address(&self, node: NodeId) -> Option<String> {
        let registered = || Some(self.decisions.registration(node).ok()??.wal);
        self.known.wal_address(node).or_else(registered)
    }

    fn connect(&self, node: NodeId, patience: Duration) -> Result<SafekeeperClient, String> {
        let address = self.address(node).ok_or("nobody knows where it is")?;
        let identity = self.security.identity();
        SafekeeperClient::connect(&address, Some(node), identity, patience)
            .map_err(|error| error.to_string())
    }

    fn ask_one(
        &self,
        key: TimelineKey,
        member: Member,
        number: Option<u64>,
        patience: Patience,
    ) -> Result<Heard, String> {
        let node = member.node;
        let patience = match patience {
            Patience::AsUsual => self.silence.patience(node),
            Patience::ForAll => PATIENCE,
        };
        let since = Instant::now();
        let said = self.connect(node, patience).and_then(|mut client| {
            let status = match number {
                Some(number) => client.learn(key.0, key.1, number),
                None => client.open(key.0, key.1),
            };
            status.map_err(|error| error.to_string())
        });
        self.silence.note(node, said.is_ok(), since.elapsed());
        heard(member, said)
    }
}

/// What a member says, if it was the member who said it.
pub fn heard(member: Member, said: Result<Status, String>) -> Result<Heard, String> {
    let failed = |why: &str| format!("safekeeper {}: {why}", member.node);
    let status = said.map_err(|why| failed(&why))?;
    match status.member == member {
        true => Ok(Heard { member, status }),
        false => Err(failed("it has another directory than the member")),
    }
}

impl Reach for Connections {
    fn ask(
        &self,
        key: TimelineKey,
        members: &[Member],
        number: Option<u64>,
        patience: Patience,
    ) -> Vec<Result<Heard, String>> {
        std::thread::scope(|scope| {
            let ask = |member| move || self.ask_one(key, member, number, patience);
            let threads: Vec<_> = members.iter().map(|&member| scope.spawn(ask(member))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err("a thread ended early".to_owned()))
            };
            threads.into_iter().map(join).collect()
        })
    }

    fn answers(&self, node: NodeId) -> Result<(), String> {
        self.connect(node, PATIENCE).map(drop)
    }

    fn has_nothing(&self, node: NodeId, key: TimelineKey) -> bool {
        let Ok(mut client) = self.connect(node, PATIENCE) else { return false };
        match client.open(key.0, key.1) {
            Ok(_) => false,
            Err(error) => refusal_of(&error) == Some(&RefusedReason::UnknownTimeline),
        }
    }

    fn wait_for_compute(&self) {
        std::thread::sleep(COMPUTE_PATIENCE);
    }

    fn elect(&self, joint: &Configuration, heard: &[Heard]) -> io::Result<()> {
        let Some(first) = heard.first() else { return Ok(()) };
        let place = |one: &Heard| Some((one.member, self.address(one.member.node)?));
        let places: Vec<(Member, String)> = heard.iter().filter_map(place).collect();
        campaign::run(joint, &first.status.parameters, &places, &self.security)
    }
}
