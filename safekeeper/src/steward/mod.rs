//! Changing who the members of a timeline are, a step at a time.
//!
//! Everything that is known of a change stands in the timeline's object and with its members, and nothing of it here: whoever
//! is asked next, on whichever safekeeper, goes on where the last one was. The steps, and why no two quorums live at once:
//! `docs/consensus.md`.

mod campaign;
pub mod reach;
mod recovering;
mod silence;
pub mod turn;

use std::sync::Arc;

use pgstrata_format::registration::Registration;
use pgstrata_ids::{Member, NodeId};
use pgstrata_quorum::{Chain, ChainError, Configuration};
use pgstrata_wire::http::safekeeper::{Change, Step};

use self::reach::{Patience, Reach};
use self::turn::{Heard, Turn, Verdict, is_newcomer};
use crate::archive::Archive;
use crate::decisions::{Decisions, Swapped};
use crate::timelines::TimelineKey;
pub use recovering::Left;

/// Others that took a step at the same time, before it is left to the next request.
const ATTEMPTS: usize = 5;

/// Why there is no step.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The timeline was never founded, or a node never started.
    #[error("{0}")]
    NotFound(String),
    /// What was asked for can't be, or not without being forced.
    #[error("{0}")]
    Conflict(String),
    /// It may go on later.
    #[error("{0}")]
    Later(String),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Steward {
    /// Where it is decided.
    pub decisions: Decisions,
    /// Where WAL is archived.
    pub archive: Arc<Archive>,
    /// How members are reached.
    pub reach: Arc<dyn Reach>,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Who the members are to be.
    pub nodes: Vec<NodeId>,
    /// Even if a majority of them is in one zone.
    pub force: bool,
    /// The configuration from which it was thought out: what others began after it stays. 0 if that is of no interest.
    pub after: u64,
}

/// What is to be done while both groups decide.
enum Prepared {
    /// Wait.
    Waits(Change),
    /// The new group may decide alone.
    IsReady,
    /// A member will never be what it was to be: the group before it goes on.
    IsLost(NodeId),
}

fn later(error: impl std::fmt::Display) -> Trouble {
    Trouble::Later(error.to_string())
}

impl Steward {
    /// Takes the next step of what is asked for, which may be the last. May wait for members for some seconds.
    pub fn advance(&self, key: TimelineKey, wish: &Wish) -> Result<Change, Trouble> {
        let nodes = &wish.nodes;
        for _ in 0..ATTEMPTS {
            let read = self.decisions.read_versioned(key).map_err(later)?;
            let Some((quorum, version)) = read else {
                let text =
                    format!("timeline {} was never founded: no compute has written to it", key.1);
                return Err(Trouble::NotFound(text));
            };
            let newest = quorum.chain.newest();
            if quorum.is_deleted {
                // Its members hear of that in their turn.
                let quorum = Some(crate::http::described(newest));
                let waits_for = String::new();
                return Ok(Change { step: Step::Done, quorum, behind_bytes: 0, waits_for });
            }
            self.refuse_others(key, &quorum.chain, wish)?;
            let next = match turn::of(newest, nodes) {
                Turn::Begin => match quorum.chain.change_to(self.wanted(newest, nodes)?) {
                    Err(ChainError::NoChange) => return self.finish(key, &quorum.chain),
                    Err(error) => return Err(Trouble::Conflict(error.to_string())),
                    Ok(next) => {
                        if !wish.force {
                            self.refuse_one_zone(next.newest())?;
                        }
                        self.refuse_silent(key, next.newest())?;
                        next
                    }
                },
                // It may never end, and begins again with what is asked for now.
                Turn::Undo => undone(key, &quorum.chain, "others are asked for")?,
                Turn::Prepare => match self.prepare(key, newest)? {
                    Prepared::Waits(change) => return Ok(change),
                    Prepared::IsReady => quorum.chain.change_ended().map_err(later)?,
                    Prepared::IsLost(node) => {
                        let why = format!("safekeeper {node} has another directory by now");
                        undone(key, &quorum.chain, &why)?
                    }
                },
            };
            let decided = pgstrata_format::quorum::Quorum { chain: next, ..quorum };
            // Where somebody else was faster, it is looked at anew.
            if let Swapped::Yes = self.decisions.swap(key, &version, &decided).map_err(later)? {
                let number = decided.chain.newest().number();
                tracing::info!(timeline = %key.1, number, ?nodes, "members decided");
            }
        }
        Err(later("others change the members at the same time"))
    }

    /// These nodes, each in the life in which it is a member, unless its directory is another one by now.
    fn wanted(&self, newest: &Configuration, nodes: &[NodeId]) -> Result<Vec<Member>, Trouble> {
        let registered = self.decisions.registrations(nodes).map_err(|reason| {
            later(format!("who safekeepers are can't be read in object storage ({reason})"))
        })?;
        let member = |(&node, registered): (&NodeId, Option<Registration>)| {
            let is_now = newest.members().iter().find(|member| member.node == node).copied();
            let found = registered.map(|registered| registered.member).or(is_now);
            found.ok_or_else(|| {
                Trouble::NotFound(format!(
                    "safekeeper {node} has never been started on this cluster's object store, or could not register there: its \
                     log says so then, and its status (registration_error)"
                ))
            })
        };
        nodes.iter().zip(registered).map(member).collect()
    }

    fn refuse_one_zone(&self, next: &Configuration) -> Result<(), Trouble> {
        let crowded = |group: &[Member]| -> Result<Option<String>, Trouble> {
            let nodes: Vec<NodeId> = group.iter().map(|member| member.node).collect();
            let registered = self.decisions.registrations(&nodes).map_err(later)?;
            let zones = registered.into_iter().flatten().map(|one| one.zone);
            let zones: Vec<String> = zones.filter(|zone| !zone.is_empty()).collect();
            let has_majority = |zone: &&String| {
                zones.iter().filter(|other| other == zone).count() > group.len() / 2
            };
            Ok(zones.iter().find(has_majority).filter(|_| group.len() > 1).cloned())
        };
        match (crowded(next.incoming())?, crowded(next.members())?) {
            (Some(zone), None) => Err(Trouble::Conflict(format!(
                "a majority of the members would be in zone {zone}, whose loss would then stop all commits: \
                 choose others, or force it"
            ))),
            // Where it is so already, it gets no worse.
            _ => Ok(()),
        }
    }

    /// Refuses to change what others began after this was thought out: two commands would undo each other's work for ever.
    fn refuse_others(&self, key: TimelineKey, chain: &Chain, wish: &Wish) -> Result<(), Trouble> {
        let goes_elsewhere = |one: &&Configuration| {
            let mut incoming = one.incoming().iter().map(|member| member.node);
            let same = one.incoming().len() == wish.nodes.len()
                && incoming.all(|node| wish.nodes.contains(&node));
            one.number() > wish.after && !one.incoming().is_empty() && !same
        };
        let first = &chain.configurations()[0];
        // Or the chain has begun anew, without some of those who were counted on.
        let begins_later = Some(first).filter(|first| first.number() > wish.after);
        let of_others = chain.configurations().iter().find(goes_elsewhere).or(begins_later);
        let Some(of_others) = of_others.filter(|_| wish.after > 0) else { return Ok(()) };
        self.tell_one(key, chain.newest());
        let group = match of_others.incoming() {
            [] => of_others.members(),
            incoming => incoming,
        };
        let members: Vec<String> = group.iter().map(|member| member.node.to_string()).collect();
        Err(Trouble::Conflict(format!(
            "another command changes the members to {} (configuration {}): give this one again if it is still wanted",
            members.join(", "),
            of_others.number()
        )))
    }

    /// Has somebody know the newest configuration, so that whoever looks again hears of it. Only one: a compute takes it when
    /// a quorum tells of it, which is to be when the newcomers are close.
    fn tell_one(&self, key: TimelineKey, newest: &Configuration) {
        let (heard, _) = self.ask(key, newest, &|_| true, None);
        let knows = |one: &Heard| one.status.configuration.number() >= newest.number();
        if heard.iter().any(knows) {
            return;
        }
        if let Some(one) = heard.first() {
            self.ask(key, newest, &|member| *member == one.member, Some(newest.number()));
        }
    }

    /// Refuses to begin what could not go on: that is left again only by those who don't answer now.
    fn refuse_silent(&self, key: TimelineKey, joint: &Configuration) -> Result<(), Trouble> {
        let before = Configuration::new(joint.number(), joint.members().to_vec()).map_err(later)?;
        let (heard, silent) = self.ask(key, &before, &|_| true, None);
        if !before.is_quorum(|member| heard.iter().any(|one| one.member == member)) {
            let text = format!(
                "no majority of the members before the change answers ({}): bring them back, or, if they are gone for good, \
                 'pgstrata quorum recover --branch BRANCH' goes on without them",
                silent.join("; ")
            );
            return Err(Trouble::Later(text));
        }
        let after = Configuration::new(joint.number(), joint.incoming().to_vec()).map_err(later)?;
        let answers = |member: Member| {
            is_newcomer(joint, member) || heard.iter().any(|one| one.member == member)
        };
        if !after.is_quorum(answers) {
            let text = format!(
                "no majority of the members after the change answers: {}",
                silent.join("; ")
            );
            return Err(Trouble::Later(text));
        }
        for member in joint.all().filter(|&member| is_newcomer(joint, member)) {
            let node = member.node;
            self.reach.answers(node).map_err(|why| {
                Trouble::Later(format!("the newcomer does not answer: safekeeper {node}: {why}"))
            })?;
        }
        Ok(())
    }

    /// A node because of which the change never ends, as it has registered with another directory.
    fn never_ends(&self, joint: &Configuration) -> Result<Option<NodeId>, Trouble> {
        let nodes: Vec<NodeId> = joint.incoming().iter().map(|member| member.node).collect();
        let registered = self.decisions.registrations(&nodes).map_err(later)?;
        let now: Vec<Member> = registered.into_iter().flatten().map(|one| one.member).collect();
        Ok(turn::never_ends(joint, |member| {
            now.iter().any(|one| one.node == member.node && *one != member)
        }))
    }

    /// What is to be waited for until both groups have committed something together.
    fn prepare(&self, key: TimelineKey, joint: &Configuration) -> Result<Prepared, Trouble> {
        let number = joint.number();
        let is_new = |member: &Member| is_newcomer(joint, *member);
        // Newcomers first: who has the timeline tells its compute, which then counts on them.
        let (newcomers, missing) = self.ask(key, joint, &is_new, Some(number));
        let (others, silent) = self.ask(key, joint, &|member| !is_new(member), None);
        let behind = turn::behind(&newcomers, &others);
        let change = |step, waits_for: String| {
            let quorum = Some(crate::http::described(joint));
            Ok(Prepared::Waits(Change { step, quorum, behind_bytes: behind, waits_for }))
        };
        if !missing.is_empty() {
            if let Some(node) = self.never_ends(joint)? {
                return Ok(Prepared::IsLost(node));
            }
            return change(Step::CatchingUp, missing.join("; "));
        }
        if behind > turn::CLOSE {
            return change(Step::CatchingUp, format!("newcomers, which lack {behind} bytes"));
        }
        let (old, _) = self.ask(key, joint, &|member| !is_new(member), Some(number));
        let all: Vec<Heard> = newcomers.into_iter().chain(old).collect();
        match turn::verdict(joint, &all) {
            Verdict::IsReady => return Ok(Prepared::IsReady),
            Verdict::WaitsForOld => {
                if let Some(node) = self.never_ends(joint)? {
                    return Ok(Prepared::IsLost(node));
                }
                let why = silent.join("; ");
                let who = format!("a majority of the members before the change: {why}");
                return change(Step::Joint, who);
            }
            Verdict::WaitsForCompute(member) => {
                let text = format!("the compute to reach safekeeper {}", member.node);
                return change(Step::CatchingUp, text);
            }
            Verdict::IsUnused => {}
        }
        // A compute that lost its connections, or is about to start, would be fenced: it gets a moment.
        let is_led = turn::is_led(&all) || {
            self.reach.wait_for_compute();
            let (all, _) = self.ask(key, joint, &|_| true, None);
            turn::is_led(&all)
        };
        if is_led {
            return change(Step::Joint, "the compute to go on with the new members".into());
        }
        self.reach.elect(joint, &all).map_err(later)?;
        change(Step::Joint, "the end of an election among the members".into())
    }

    /// Everybody hears of the end of the change: first who stays, then who leaves.
    fn finish(&self, key: TimelineKey, chain: &Chain) -> Result<Change, Trouble> {
        let newest = chain.newest();
        let number = newest.number();
        let (stay, silent) = self.ask(key, newest, &|_| true, Some(number));
        let knows = |member| stay.iter().any(|one| one.member == member);
        let before = chain.configurations().iter().rev().find(|one| !one.incoming().is_empty());
        if let Some(before) = before.filter(|_| newest.is_quorum(knows)) {
            let left = |member: &Member| !newest.contains(*member);
            // Who can't be reached hears of it when it is asked for anything.
            let _ = self.ask(key, before, &left, Some(number));
        }
        let committed = stay.iter().map(|one| one.status.commit_lsn).max().unwrap_or_default();
        let flushed = stay.iter().map(|one| one.status.flush_lsn).min().unwrap_or_default();
        let behind_bytes = committed.saturating_sub(flushed);
        let quorum = Some(crate::http::described(newest));
        Ok(Change { step: Step::Done, quorum, behind_bytes, waits_for: silent.join("; ") })
    }

    /// What those members say who are asked for, all asked at once, and why others say nothing. With a number they look where
    /// it is decided first.
    fn ask(
        &self,
        key: TimelineKey,
        configuration: &Configuration,
        wanted: &dyn Fn(&Member) -> bool,
        number: Option<u64>,
    ) -> (Vec<Heard>, Vec<String>) {
        self.ask_with(key, configuration, wanted, number, Patience::AsUsual)
    }

    /// The same, with so much patience for each.
    fn ask_with(
        &self,
        key: TimelineKey,
        configuration: &Configuration,
        wanted: &dyn Fn(&Member) -> bool,
        number: Option<u64>,
        patience: Patience,
    ) -> (Vec<Heard>, Vec<String>) {
        let members: Vec<Member> = configuration.all().filter(|member| wanted(member)).collect();
        let mut heard = Vec::new();
        let mut silent = Vec::new();
        for answer in self.reach.ask(key, &members, number, patience) {
            match answer {
                Ok(one) => heard.push(one),
                Err(why) => silent.push(why),
            }
        }
        (heard, silent)
    }
}

/// The chain in which the members before the change go on.
fn undone(key: TimelineKey, chain: &Chain, why: &str) -> Result<Chain, Trouble> {
    tracing::info!(timeline = %key.1, why, "a change of members is undone");
    chain.change_undone().map_err(later)
}
