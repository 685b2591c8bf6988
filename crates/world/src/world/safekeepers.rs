//! Safekeepers, as they answer.

use pgstrata_ids::{Incarnation, NodeId};

use super::*;

impl World {
    pub(super) fn arrive(&mut self, index: usize, parcel: Parcel) -> Checked {
        let delay = if self.rng.one_in(4) { self.rng.below(2000) } else { 0 };
        let connection = &mut self.connections[index];
        let (compute, node) = (connection.compute, &self.nodes[connection.node]);
        let loses_messages = self.lie == Some(Lie::LossWithinConnection);
        if (connection.is_dead && !loses_messages) || node.life != connection.node_life {
            let is_new = !std::mem::replace(&mut connection.is_dead, true);
            if is_new && node.is_up && !connection.is_left {
                self.close_later(index, true);
            }
            return Ok(());
        }
        connection.heard = self.now;
        let requests = match parcel {
            Parcel::Whole(request) => vec![request],
            Parcel::Bytes(bytes) => {
                let requests = self.requests(index, &bytes)?;
                if self.computes[compute].wires.arrived(index, bytes.len()) {
                    self.outcome.blocked += 1;
                    self.wake_compute(compute);
                }
                requests
            }
        };
        for request in requests {
            if loses_messages
                && (self.is_cut(compute, self.connections[index].node) || self.rng.one_in(50))
            {
                continue;
            }
            self.connections[index].inbox.push_back(request);
        }
        let connection = &mut self.connections[index];
        if !connection.inbox.is_empty() && !std::mem::replace(&mut connection.is_served, true) {
            self.after(delay, Event::Serve(index));
        }
        Ok(())
    }

    /// Looks at all that has arrived, as the connection's thread does.
    pub(super) fn serve(&mut self, index: usize) -> Checked {
        self.connections[index].is_served = false;
        while let Some(request) = self.connections[index].inbox.pop_front() {
            let node = self.connections[index].node;
            if self.nodes[node].life != self.connections[index].node_life {
                return Ok(());
            }
            let goes_on = match request {
                Request::Append(..) | Request::Ping => self.serve_appends(index, node, request)?,
                other => self.serve_one(index, node, other)?,
            };
            self.settle(node)?;
            if !goes_on {
                self.hang_up(index);
                return Ok(());
            }
        }
        Ok(())
    }

    pub(super) fn hang_up(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.inbox.clear();
        connection.proposer = None;
        connection.greeted = None;
        // What was sent last still arrives, and then that it is over.
        connection.node_life = u64::MAX;
        if !connection.is_dead && !connection.is_left {
            self.close_later(index, false);
        }
    }

    pub(super) fn serve_appends(
        &mut self,
        index: usize,
        node: usize,
        first: Request,
    ) -> Checked<bool> {
        let Some(timeline) = self.nodes[node].timeline.clone() else { return Ok(false) };
        if self.connections[index].greeted.is_none() {
            return Ok(false);
        }
        let lie = self.lie;
        let mut batch = timeline.batch();
        let mut appends = 0;
        let mut refusal: Result<Answer, StorageError> = Ok(None);
        let mut next = Some(first);
        while let Some(request) = next.take() {
            if let Request::Append(mut append, bytes) = request {
                if lie == Some(Lie::StaleAppendTaken) {
                    append.term = timeline.term();
                }
                refusal = batch.append(&append, &bytes);
                appends += 1;
                if !matches!(refusal, Ok(None)) {
                    break;
                }
            }
            let inbox = &mut self.connections[index].inbox;
            if matches!(inbox.front(), Some(Request::Append(..) | Request::Ping)) {
                next = inbox.pop_front();
            }
        }
        if !matches!(refusal, Ok(None)) {
            drop(batch);
            return self.give(index, node, refusal);
        }
        let answer = batch.finish();
        self.prepare(node);
        if answer.is_ok() {
            self.nodes[node].promise(&timeline, None);
        }
        let (promised, connection) = (timeline.term(), &self.connections[index]);
        if appends == 0 && connection.proposer.is_some() && promised > connection.asked {
            let fenced = RefusedReason::Quorum(Refusal::Fenced { promised });
            return self.give(index, node, Ok(Some(Message::Refused(fenced))));
        }
        let configuration = timeline.configuration();
        if configuration.number() > self.connections[index].told {
            self.connections[index].told = configuration.number();
            self.reply(index, Reply::Configuration(Configuration::clone(&configuration)));
        }
        let goes_on = self.give(index, node, answer);
        timeline.wake_readers();
        goes_on
    }

    /// Sends an answer, if the node is still there to do so. False if it ends the connection.
    pub(super) fn give(
        &mut self,
        index: usize,
        node: usize,
        answer: Result<Answer, StorageError>,
    ) -> Checked<bool> {
        let message = match answer {
            Ok(None) => return Ok(true),
            Ok(Some(message)) => message,
            Err(error) => {
                let text = error.to_string();
                self.log(|| format!("safekeeper {}: {text}", node + 1));
                Message::Refused(RefusedReason::Storage(text))
            }
        };
        if self.nodes[node].disk.has_stopped() {
            return Ok(false);
        }
        let reply = match message {
            Message::Vote(vote) => Reply::Vote(vote),
            Message::Ack(ack) => Reply::Ack(ack),
            Message::Refused(reason) => {
                self.check_refusal(node, &reason)?;
                Reply::Refused(reason)
            }
            other => return Err(format!("safekeeper {} answers {other:?}", node + 1)),
        };
        let goes_on = !matches!(reply, Reply::Refused(_));
        self.reply(index, reply);
        Ok(goes_on)
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

    /// As `Timelines::greet`.
    fn greet(&mut self, index: usize, node: usize, known: u64) -> Checked<bool> {
        let connection = &mut self.connections[index];
        connection.proposer = None;
        let before = connection.greeted.take();
        if self.nodes[node].is_resting && !self.wake(node)? {
            let why = RefusedReason::Unavailable("its WAL is away".into());
            return self.give(index, node, Ok(Some(Message::Refused(why))));
        }
        let own = self.nodes[node].timeline.as_ref().map(|one| one.configuration_number());
        if own.is_none_or(|own| known > own) {
            let learned = self.learn(node)?;
            if self.nodes[node].is_finished() || !self.nodes[node].is_up {
                return Ok(false);
            }
            match learned {
                // It is no member, and has nothing: it says who is.
                Err(RefusedReason::UnknownTimeline) => {
                    let configuration = self.is_founded.then(|| self.quorum.chain.newest().clone());
                    let (member, promised) = (self.nodes[node].member, Term(0));
                    self.reply(index, Reply::Greeting { member, configuration, promised });
                    return Ok(true);
                }
                Err(reason) => {
                    return self.give(index, node, Ok(Some(Message::Refused(reason))));
                }
                Ok(()) => {}
            }
        }
        let Some(timeline) = &self.nodes[node].timeline else { return Ok(false) };
        let configuration = Configuration::clone(&timeline.configuration());
        let (member, promised) = (self.nodes[node].member, timeline.term());
        let connection = &mut self.connections[index];
        if configuration.contains(member) {
            connection.greeted = Some(timeline.compute_connected());
        }
        drop(before);
        connection.told = configuration.number();
        let configuration = Some(configuration);
        self.reply(index, Reply::Greeting { member, configuration, promised });
        Ok(true)
    }

    /// As `Timelines::found`.
    fn found(
        &mut self,
        index: usize,
        node: usize,
        nodes: &[(NodeId, Option<Incarnation>)],
    ) -> Checked<bool> {
        let refuse = |why: &str| RefusedReason::Unavailable(why.to_owned());
        if self.no_objects_until > self.now {
            let why = refuse("object storage does not answer");
            return self.give(index, node, Ok(Some(Message::Refused(why))));
        }
        if !self.is_founded || self.lie == Some(Lie::FoundedAgain) {
            let mut members = Vec::new();
            for &(node, heard) in nodes {
                let registered = self.registered[self.node_of(node.0)];
                let is_it = |member: &Member| heard.is_none_or(|heard| heard == member.incarnation);
                members.extend(registered.filter(is_it));
            }
            if members.len() != nodes.len() {
                let why = refuse("another directory is registered");
                return self.give(index, node, Ok(Some(Message::Refused(why))));
            }
            self.log(|| format!("the timeline is founded with {members:?}"));
            self.outcome.founded += 1;
            let chain = Chain::found(members).map_err(|error| error.to_string())?;
            self.quorum = Quorum::founded(self.parameters.clone(), chain);
            self.is_founded = true;
            self.version += 1;
        }
        self.greet(index, node, 0)
    }

    pub(super) fn serve_one(
        &mut self,
        index: usize,
        node: usize,
        request: Request,
    ) -> Checked<bool> {
        if let Request::Greet(known) = request {
            return self.greet(index, node, known);
        }
        match &request {
            Request::Leave => return Ok(false),
            Request::Found(nodes) => return self.found(index, node, nodes),
            _ => {}
        }
        let Some(timeline) = self.nodes[node].timeline.clone() else { return Ok(false) };
        if self.connections[index].greeted.is_none() {
            return Ok(false);
        }
        match request {
            Request::Vote(request) => {
                let asked = &mut self.connections[index].asked;
                *asked = request.term.max(*asked);
                let newer = request.configuration.number() > timeline.configuration_number();
                if newer && let Err(reason) = self.learn(node)? {
                    return self.give(index, node, Ok(Some(Message::Refused(reason))));
                }
                let mut answer = timeline.vote(&request);
                let mut voted_for = None;
                if let Ok(Some(Message::Vote(vote))) = &mut answer {
                    if self.lie == Some(Lie::VoteTwice) && vote.term == request.term {
                        vote.granted = true;
                    }
                    let (granted, flush_lsn) = (vote.granted, vote.flush_lsn);
                    self.log(|| {
                        format!(
                            "safekeeper {} votes in term {}: {granted}, {flush_lsn}",
                            node + 1,
                            request.term
                        )
                    });
                    voted_for = granted.then_some(request.proposer);
                }
                if answer.is_ok() {
                    self.nodes[node].promise(&timeline, voted_for);
                }
                self.give(index, node, answer)
            }
            Request::Elected(elected) => {
                self.nodes[node].begin(&elected.history, Lsn::MAX);
                let answer = timeline.elected(&elected);
                self.prepare(node);
                if answer.is_ok() {
                    self.nodes[node].promise(&timeline, None);
                }
                self.connections[index].proposer = Some(timeline.proposer_connected());
                let asked = &mut self.connections[index].asked;
                *asked = elected.term.max(*asked);
                if timeline.lacks_beginning() {
                    self.ask_peers(node)?;
                }
                self.give(index, node, answer)
            }
            Request::Greet(_)
            | Request::Found(_)
            | Request::Append(..)
            | Request::Ping
            | Request::Leave => Ok(true),
        }
    }
}
