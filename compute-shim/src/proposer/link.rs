//! One member: the connection to it, when to try again, and how far it was sent the log.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Incarnation, Lsn, Member, NodeId};
use pgstrata_quorum::Configuration;
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::safekeeper::{Greeting, Message};

use super::config::Members;
use super::connection::Connection;
use super::network::{Network, Wire};

/// First and longest pause before connecting again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Silence after which we ask whether the other side is there.
pub const PING_AFTER: Duration = Duration::from_secs(1);

/// Silence after which a connection is given up: longer than a safekeeper waits for object storage.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// Size of the receive buffer in bytes: only answers come.
const RECEIVE_BUFFER: usize = 16 << 10;

/// See the module.
#[derive(Debug)]
pub struct Link<W> {
    pub node: NodeId,
    /// Who answered the greeting last: the node in one life of its directory.
    pub member: Option<Member>,
    /// In which life of its directory it answered last, member or not.
    pub heard: Option<Incarnation>,
    /// The newest configuration that it told of, in whichever life of its directory.
    pub tells_of: Option<Configuration>,
    /// False once the members were changed, and it is none any more.
    pub is_wanted: bool,
    /// It is asked who the members are, though it is none by what is known here.
    pub is_consulted: bool,
    members: Arc<dyn Members>,
    /// Where other members say that it is.
    pub told: Option<String>,
    /// Where it was last looked for, as `host:port`.
    pub address: Option<String>,
    /// Attempts that failed: each is made at the next of its addresses.
    attempts: usize,
    pub connection: Option<Connection<W>>,
    pub input: FrameBuffer,
    /// Where the next byte to send is; `None` until the member follows this term.
    pub next_lsn: Option<Lsn>,
    /// The commit LSN it was last told.
    pub told_commit_lsn: Lsn,
    /// True while it lacks what is not the source's, or not any more: it pulls that from other members and the archive.
    pub pulls: bool,
    pub last_error: Option<String>,
    /// It answered the greeting with a refusal that asking again does not change.
    pub refuses: bool,
    retry_at: Instant,
    backoff: Duration,
    /// Whether it was greeted on this connection.
    is_begun: bool,
    /// Greetings, and a founding after one, that are not answered yet.
    unanswered: u32,
    /// When the last of them was sent.
    asked_at: Instant,
    /// What was asked last was answered by a member.
    greeted: bool,
    /// It was asked to found the timeline, and has not answered.
    is_founding: bool,
    /// It was answered that nobody has founded the timeline.
    pub knows_nothing: bool,
    /// It has a copy all the same, of before timelines were founded.
    pub has_copy: bool,
    connected_at: Instant,
}

impl<W: Wire> Link<W> {
    pub fn new(node: NodeId, members: Arc<dyn Members>, now: Instant) -> Link<W> {
        Link {
            node,
            member: None,
            heard: None,
            tells_of: None,
            is_wanted: true,
            is_consulted: false,
            members,
            told: None,
            address: None,
            attempts: 0,
            connection: None,
            input: FrameBuffer::new(RECEIVE_BUFFER),
            next_lsn: None,
            told_commit_lsn: Lsn::INVALID,
            pulls: false,
            last_error: None,
            refuses: false,
            retry_at: now,
            backoff: BACKOFF.0,
            is_begun: false,
            unanswered: 0,
            asked_at: now,
            greeted: false,
            is_founding: false,
            knows_nothing: false,
            has_copy: false,
            connected_at: now,
        }
    }

    /// Connects if it is time to.
    pub fn connect_if_due(
        &mut self,
        now: Instant,
        token: u64,
        network: &mut impl Network<Wire = W>,
    ) {
        if self.connection.is_some() || now < self.retry_at || !self.is_asked_at_all() {
            return;
        }
        let mut names = self.addresses();
        if names.is_empty() {
            let text = self.members.describe();
            return self.fail(now, &text);
        }
        let name = names.swap_remove(self.attempts % names.len());
        // One that is still being made is asked for again in the next turn.
        let Some(made) = network.dial(token, self.node, &name) else { return };
        self.address = Some(name);
        match made {
            Ok(wire) => {
                self.connection = Some(Connection::new(wire, now));
                self.connected_at = now;
            }
            Err(error) => self.fail(now, &error),
        }
    }

    /// The time of the next attempt, if there is to be one.
    pub fn retry_at(&self) -> Option<Instant> {
        let waits = self.is_asked_at_all() && self.connection.is_none();
        waits.then_some(self.retry_at)
    }

    /// Gives the connection up; tries again later.
    pub fn fail(&mut self, now: Instant, error: &dyn std::fmt::Display) {
        let text = error.to_string();
        if self.last_error.as_ref() != Some(&text) {
            tracing::warn!(node = %self.node, address = self.address, error = %text, "safekeeper lost");
        }
        self.last_error = Some(text);
        self.connection = None;
        self.attempts = self.attempts.wrapping_add(1);
        self.input = FrameBuffer::new(RECEIVE_BUFFER);
        self.next_lsn = None;
        self.pulls = false;
        self.told_commit_lsn = Lsn::INVALID;
        self.greeted = false;
        self.knows_nothing = false;
        self.is_founding = false;
        self.is_begun = false;
        self.unanswered = 0;
        self.retry_at = now + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
    }

    /// An answer to a greeting came. False if a later one is to come yet, which knows better.
    pub fn answered(&mut self) -> bool {
        self.unanswered = self.unanswered.saturating_sub(1);
        self.is_founding &= self.unanswered > 0;
        self.unanswered == 0
    }

    /// Asks it to found the timeline with these members.
    pub fn found(&mut self, nodes: Vec<(NodeId, Option<Incarnation>)>, now: Instant) {
        self.knows_nothing = false;
        self.is_founding = true;
        self.ask(&Message::Found(nodes), now);
    }

    /// Whether it was asked to, and has not answered.
    pub fn is_founding(&self) -> bool {
        self.is_founding
    }

    /// It was a member's.
    pub fn succeeded(&mut self, member: Member) {
        self.member = Some(member);
        self.greeted = true;
        self.knows_nothing = false;
        self.refuses = false;
    }

    /// Asks anew, of one that was asked before: who the members are is known now, or others than before.
    pub fn greet_again(&mut self, greeting: &Greeting, now: Instant) {
        self.greeted = false;
        self.knows_nothing = false;
        if self.is_begun {
            self.ask(&Message::Greeting(greeting.clone()), now);
        }
    }

    /// Sends what is answered as a greeting is.
    fn ask(&mut self, question: &Message<'_>, now: Instant) {
        if let Some(connection) = &mut self.connection {
            connection.push(question);
            self.unanswered += 1;
            self.asked_at = now;
        }
    }

    /// Whether it can be asked to found the timeline: a member to be, as far as it knows.
    pub fn can_found(&self) -> bool {
        self.is_wanted && self.knows_nothing
    }

    /// Whether it has said, or failed to say, what it knows.
    pub fn is_settled(&self) -> bool {
        self.knows_nothing
            || self.refuses
            || (self.connection.is_none() && self.last_error.is_some())
    }

    /// Whether it is asked anything: as a member, or as one that may know who they are.
    pub fn is_asked_at_all(&self) -> bool {
        self.is_wanted || self.is_consulted
    }

    /// Whether it has said what there is to say, for good: it is there as a member, or refuses.
    pub fn is_heard(&self) -> bool {
        self.refuses || self.greeted
    }

    /// Others are the members now, as far as is known here, and it is one or not. Why it refused before does not count any more.
    pub fn members_changed(&mut self, is_member: bool, now: Instant) {
        if is_member && !self.is_wanted {
            self.retry_at = now;
        }
        self.is_wanted = is_member;
        self.refuses = false;
    }

    /// Whether an answer to a greeting is to come.
    pub fn is_asked(&self) -> bool {
        self.unanswered > 0
    }

    /// Whether the member answered the greeting on this connection.
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Only a member that goes on answering counts as back: one with a full disk greets and
    /// votes, and refuses what it is sent then, as often as it is asked.
    fn note_lasting(&mut self, now: Instant) {
        let lasting = now.saturating_duration_since(self.connected_at) >= BACKOFF.1;
        if !self.greeted || !lasting {
            return;
        }
        self.backoff = BACKOFF.0;
        if self.last_error.take().is_some() {
            tracing::info!(node = %self.node, address = self.address, "safekeeper is back");
        }
    }

    /// Where it was last looked for, or else will be.
    pub fn best_address(&self) -> Option<String> {
        self.address.clone().or_else(|| self.addresses().into_iter().next())
    }

    /// Where it may be, best first.
    fn addresses(&self) -> Vec<String> {
        let mut names = self.members.addresses(self.node);
        names.extend(self.told.clone().filter(|told| !names.contains(told)));
        names
    }

    /// Whether it was connected to, and not greeted yet.
    pub fn is_to_be_greeted(&self) -> bool {
        self.connection.is_some() && !self.is_begun
    }

    /// Greets if the connection has just been made, and sends what is queued.
    pub fn writable(&mut self, greeting: &Greeting, now: Instant) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if !std::mem::replace(&mut self.is_begun, true) {
            connection.push(&Message::Greeting(greeting.clone()));
            self.unanswered += 1;
            self.asked_at = now;
        }
        connection.flush(now)
    }

    /// Sends what is queued, and has it told when there is room exactly while there is too little.
    pub fn flush(
        &mut self,
        now: Instant,
        token: u64,
        network: &mut impl Network<Wire = W>,
    ) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let before = connection.blocked;
        connection.flush(now)?;
        if connection.blocked != before {
            network.tell_of_room(token, &connection.wire, connection.blocked)?;
        }
        Ok(())
    }

    /// Pings a member that was sent nothing for `ping_after`; fails one that stays silent.
    pub fn keep_alive(
        &mut self,
        now: Instant,
        ping_after: Duration,
        greeting: &Greeting,
    ) -> io::Result<()> {
        self.note_lasting(now);
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let heard_at = connection.last_received.max(self.asked_at);
        let silent = now.saturating_duration_since(heard_at);
        if silent > DEAD_AFTER {
            let text = format!("no answer for {} s", silent.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let idle = now.saturating_duration_since(connection.last_sent);
        if idle > ping_after && connection.queued() == 0 {
            if self.greeted {
                connection.push(&Message::Ping);
            } else if self.knows_nothing {
                // Somebody else may have founded it.
                self.greet_again(greeting, now);
            }
        }
        Ok(())
    }
}
