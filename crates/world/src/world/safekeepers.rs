//! Safekeepers, as they answer: the shipped conversation, and what is looked at around each of its steps.

use pgstrata_ids::Term;
use pgstrata_listen::Peer;
use pgstrata_quorum::ProposerId;
use pgstrata_safekeeper::wal::conversation::{Conversation, Step};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::split;
use pgstrata_wire::safekeeper::{decode, is_appending};

use crate::network::Listener;
use crate::visit::{BUFFER, bytes_of};

use super::*;

/// What a step of a conversation has come to.
enum Served {
    NeedsMore,
    /// After a pause.
    GoesOn(Time),
    /// The safekeeper's end is closed.
    Ended,
}

/// What a message is about to change.
#[derive(Default)]
struct About {
    elects: Option<TermHistory>,
    asks_for: Option<ProposerId>,
    appends: bool,
}

impl World {
    /// A safekeeper accepts a connection.
    pub(super) fn listener(&self, node: usize) -> Option<Listener> {
        let timelines = Arc::clone(self.nodes[node].timelines()?);
        let pace = Arc::clone(&self.paces[node]);
        let conversation = Conversation::new(Vec::new(), Peer::Local, timelines, pace);
        Some(Listener { conversation, input: FrameBuffer::new(BUFFER) })
    }

    pub(super) fn arrive(&mut self, index: usize, parcel: Parcel) -> Checked {
        let delay = if self.rng.one_in(4) { self.rng.below(2000) } else { 0 };
        let connection = &mut self.connections[index];
        let node = &self.nodes[connection.node];
        let loses_messages = self.lie == Some(Lie::LossWithinConnection);
        if (connection.is_dead && !loses_messages) || node.life != connection.node_life {
            let is_new = !std::mem::replace(&mut connection.is_dead, true);
            if is_new && node.is_up && !connection.is_left {
                self.close_later(index, true);
            }
            return Ok(());
        }
        connection.heard = self.now;
        match parcel {
            Parcel::Leave => connection.is_over = true,
            Parcel::Bytes(bytes) => {
                let bytes = self.meddle(index, bytes)?;
                self.connections[index].inbox.extend(bytes);
            }
        }
        let connection = &mut self.connections[index];
        if !std::mem::replace(&mut connection.is_served, true) {
            self.after(delay, Event::Serve(index));
        }
        Ok(())
    }

    /// Takes all that has arrived, as the connection's thread does.
    pub(super) fn serve(&mut self, index: usize) -> Checked {
        self.connections[index].is_served = false;
        loop {
            let connection = &mut self.connections[index];
            let node = connection.node;
            if self.nodes[node].life != connection.node_life {
                return Ok(());
            }
            let Some(listener) = &mut connection.listener else { return Ok(()) };
            let filled = match connection.inbox.is_empty() {
                true => 0,
                false => {
                    let before = connection.inbox.len();
                    let filled = listener.input.fill(&mut connection.inbox);
                    filled.map_err(|error| error.to_string())?;
                    before - connection.inbox.len()
                }
            };
            self.has_taken(index, filled);
            loop {
                match self.step(index, node)? {
                    Served::NeedsMore => break,
                    Served::GoesOn(0) => {}
                    Served::GoesOn(pause) => {
                        self.connections[index].is_served = true;
                        self.after(pause, Event::Serve(index));
                        return Ok(());
                    }
                    Served::Ended => {
                        self.hang_up(index);
                        return Ok(());
                    }
                }
            }
            let connection = &self.connections[index];
            if connection.inbox.is_empty() {
                if connection.is_over {
                    self.hang_up(index);
                }
                return Ok(());
            }
        }
    }

    /// What the safekeeper has taken from the socket is room again for its compute.
    fn has_taken(&mut self, index: usize, bytes: usize) {
        let compute = self.connections[index].compute;
        if bytes > 0
            && let Some(one) = self.computes.get(compute)
            && one.wires.arrived(index, bytes)
        {
            self.outcome.blocked += 1;
            self.wake_compute(compute);
        }
    }

    /// What the next message is about, if it is whole.
    fn about(&self, index: usize) -> About {
        let mut about = About::default();
        let Some(listener) = &self.connections[index].listener else { return about };
        let Ok(Some(frame)) = listener.input.next() else { return about };
        about.appends = is_appending(frame.kind);
        if !about.appends {
            match decode(frame.kind, frame.body) {
                Ok(Message::Elected(elected)) => about.elects = Some(elected.history),
                Ok(Message::VoteRequest(request)) => about.asks_for = Some(request.proposer),
                _ => {}
            }
        }
        about
    }

    /// One step of the conversation, and what it says.
    fn step(&mut self, index: usize, node: usize) -> Checked<Served> {
        let about = self.about(index);
        if let Some(history) = &about.elects {
            self.nodes[node].begin(history, Lsn::MAX);
        }
        let now = self.instant();
        let Some(listener) = &mut self.connections[index].listener else {
            return Ok(Served::Ended);
        };
        let stepped = listener.conversation.step(&mut listener.input, now);
        let output = std::mem::take(listener.conversation.out());
        if matches!(stepped, Ok(Step::NeedsMore)) && output.is_empty() {
            return Ok(Served::NeedsMore);
        }
        if about.appends || about.elects.is_some() {
            self.prepare(node);
        }
        if self.nodes[node].disk.has_stopped() {
            self.settle(node)?;
            return Ok(Served::Ended);
        }
        self.nodes[node].look(&mut self.truth)?;
        let replies = self.replies(node, &output)?;
        let is_of_storage = stepped.as_ref().is_err_and(|error| error.is::<StorageError>());
        if !is_of_storage {
            let granted =
                |(reply, _): &(Reply, &[u8])| matches!(reply, Reply::Vote(vote) if vote.granted);
            let voted_for = about.asks_for.filter(|_| replies.iter().any(granted));
            self.nodes[node].promise(voted_for);
        }
        let wanted = self.nodes[node].timelines().and_then(|all| all.wanted().take());
        for (reply, bytes) in replies {
            self.connections[index].is_answered = true;
            self.deliver(index, reply, bytes.to_vec());
        }
        if wanted.is_some() {
            self.ask_peers(node)?;
        }
        self.settle(node)?;
        match stepped {
            Ok(Step::NeedsMore) => Ok(Served::NeedsMore),
            Ok(Step::GoesOn(pause)) => Ok(Served::GoesOn(pause.as_micros() as Time)),
            Err(error) => {
                self.log(|| format!("safekeeper {} hangs up: {error:#}", node + 1));
                Ok(Served::Ended)
            }
        }
    }

    /// What a safekeeper says, each with its bytes.
    fn replies<'a>(&mut self, node: usize, output: &'a [u8]) -> Checked<Vec<(Reply, &'a [u8])>> {
        let mut replies = Vec::new();
        let mut at = 0;
        while at < output.len() {
            let frame = split(&output[at..]).map_err(|error| format!("no frame: {error}"))?;
            let frame = frame.ok_or("a safekeeper says half of something")?;
            let message = decode(frame.kind, frame.body);
            let reply = Reply::of(message.map_err(|error| format!("no message: {error}"))?)?;
            match &reply {
                Reply::Refused(reason) => self.check_refusal(node, reason)?,
                Reply::Vote(vote) => {
                    let (granted, flush_lsn, term) = (vote.granted, vote.flush_lsn, vote.term);
                    let name = node + 1;
                    self.log(|| {
                        format!("safekeeper {name} votes in term {term}: {granted}, {flush_lsn}")
                    });
                }
                _ => {}
            }
            replies.push((reply, &output[at..at + frame.size]));
            at += frame.size;
        }
        Ok(replies)
    }

    /// The safekeeper's end is closed.
    pub(super) fn hang_up(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.inbox.clear();
        connection.listener = None;
        // What was sent last still arrives, and then that it is over.
        connection.node_life = u64::MAX;
        if !connection.is_dead && !connection.is_left {
            self.close_later(index, false);
        }
    }

    /// Some refusals say that what must never be was.
    pub(super) fn check_refusal(&mut self, node: usize, reason: &RefusedReason) -> Checked {
        self.log(|| format!("safekeeper {} refuses: {reason}", node + 1));
        match reason {
            RefusedReason::Quorum(
                Refusal::Fenced { .. }
                | Refusal::StaleConfiguration { .. }
                | Refusal::Undecided { .. }
                | Refusal::NotMember,
            )
            | RefusedReason::Storage(_)
            | RefusedReason::Unavailable(_) => Ok(()),
            other => Err(format!("safekeeper {} refuses: {other}", node + 1)),
        }
    }

    /// What a compute says, as it comes after mistakes on its way.
    fn meddle(&mut self, index: usize, bytes: Vec<u8>) -> Checked<Vec<u8>> {
        let is_meddled = matches!(
            self.lie,
            Some(
                Lie::LossWithinConnection
                    | Lie::StaleAppendTaken
                    | Lie::CommitAhead
                    | Lie::AckAhead
            )
        );
        if !is_meddled {
            return Ok(bytes);
        }
        let (compute, node) = (self.connections[index].compute, self.connections[index].node);
        let term = self.nodes[node].timeline().map_or(Term(0), |timeline| timeline.term());
        let mut whole = std::mem::take(&mut self.connections[index].bytes);
        whole.extend_from_slice(&bytes);
        let (mut taken, mut out) = (0, Vec::new());
        while let Some(frame) =
            split(&whole[taken..]).map_err(|error| format!("no frame: {error}"))?
        {
            let own = &whole[taken..taken + frame.size];
            let message = decode(frame.kind, frame.body);
            let message = message.map_err(|error| format!("no message: {error}"))?;
            taken += frame.size;
            if self.lie == Some(Lie::LossWithinConnection)
                && (self.is_cut(compute, node) || self.rng.one_in(50))
            {
                self.has_taken(index, own.len());
                continue;
            }
            match message {
                Message::Append(mut append, wal) => {
                    let connection = &mut self.connections[index];
                    connection.sent = connection.sent.max(append.start + append.length);
                    match self.lie {
                        Some(Lie::CommitAhead) => append.commit_lsn = append.start + append.length,
                        Some(Lie::StaleAppendTaken) => append.term = term,
                        _ => {}
                    }
                    out.extend(bytes_of(&Message::Append(append, wal)));
                }
                _ => out.extend_from_slice(own),
            }
        }
        self.connections[index].bytes = whole.split_off(taken);
        Ok(out)
    }
}
