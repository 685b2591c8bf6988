//! The page server's stream: what it follows, and what safekeepers send it.

use std::io;

use pgstrata_pageserver::ingest::IngestError;
use pgstrata_pageserver::receiver::believing::Decided;
use pgstrata_pageserver::receiver::choice;
use pgstrata_pageserver::receiver::session::{Ended, Next, Session, SourceError};
use pgstrata_safekeeper::chain_reader::ChainReader;
use pgstrata_safekeeper::checked_reader::CheckedReader;
use pgstrata_safekeeper::pg::feeding::{self, Feeding, Standing};
use pgstrata_wire::postgres::{
    BackendWriter, CONFIGURATION, Command, Frontend, Startup, parse, split, text_column,
};

use crate::follower::{Feeder, Follower, Known, Stream};

use super::*;

/// How soon a safekeeper looks whether more is committed.
const LOOK: Time = 4_000;

/// A session, or a choice, goes on for so many steps at most before others have a turn.
const STEPS: usize = 200;

impl World {
    pub(super) fn begin_following(&mut self) {
        self.follower = Some(Follower::new(self.parameters.clone()));
        self.after(1000, Event::Follow(0, 0));
    }

    /// Its process ends now and then, and what it has becomes durable.
    pub(super) fn follow_in_background(&mut self) -> Checked {
        self.look_at_members();
        let Some(follower) = &mut self.follower else { return Ok(()) };
        let rng = &mut self.following;
        follower.sink.is_wanted = rng.one_in(8);
        // Where members are given up, what it only has in memory is what matters.
        let loses = |trouble: &(Time, Trouble)| matches!(trouble.1, Trouble::LoseMost { .. });
        let seldom = if self.plan.troubles.iter().any(loses) { 16 } else { 4 };
        if rng.one_in(seldom) {
            for (at, wal) in follower.sink.flush() {
                self.truth.check_served("the page server makes durable", at, &wal)?;
            }
        }
        if self.quiet.is_none() && rng.one_in(40) {
            follower.restart();
            let (life, turn) = (follower.life, follower.turn);
            self.log(|| "the page server ends".into());
            self.after(3_000, Event::Follow(life, turn));
        }
        Ok(())
    }

    /// What it would read now of who the members are.
    fn look_at_members(&mut self) {
        let is_away = self.no_objects_until > self.now;
        let quorum = self.is_founded.then_some(&self.quorum);
        let Some(follower) = &mut self.follower else { return };
        follower.sink.decided = match is_away {
            true => Err("object storage is away".to_owned()),
            false => Ok(Decided::new(quorum)),
        };
        follower.sink.believes_all = self.lie == Some(Lie::FollowsAnybody);
        follower.sink.flushes_all = self.lie == Some(Lie::FlushedUnlooked);
    }

    /// What it has made durable is given up: it begins anew, as another branch would. An operator is told of that, and what it only
    /// has in memory it is to find out by itself.
    pub(super) fn follow_anew(&mut self, lsn: Lsn, decided: &Quorum) -> Checked {
        self.look_at_members();
        let Some(follower) = &mut self.follower else { return Ok(()) };
        if follower.sink.durable > lsn {
            let (life, turn) = (follower.life + 1, follower.turn + 1);
            *follower = Follower::new(self.parameters.clone());
            (follower.life, follower.turn) = (life, turn);
            self.after(1000, Event::Follow(life, turn));
        } else if self.following.one_in(2) {
            // It is about to make durable what it has.
            if follower.sink.decided.is_ok() {
                follower.sink.decided = Ok(Decided::new(Some(decided)));
            }
            for (at, wal) in follower.sink.flush() {
                self.truth.check_served("the page server makes durable", at, &wal)?;
            }
        }
        Ok(())
    }

    /// Whether it has all that is committed.
    pub(super) fn has_followed(&self) -> bool {
        self.follower.as_ref().is_none_or(|follower| follower.sink.end() >= self.truth.end())
    }

    fn sources(&self) -> Known {
        let newest = self.quorum.chain.newest();
        let mut known: Vec<(Lsn, String)> = Vec::new();
        for node in &self.nodes {
            // The broker has told of those that are up, and of some that are not any more.
            let open = node.timeline();
            if newest.contains(node.member) || open.is_some() {
                let commit_lsn = open.map_or(Lsn::INVALID, |one| one.commit_lsn());
                known.push((commit_lsn, format!("safekeeper-{}:5455", node.member.node)));
            }
        }
        known.sort_by_key(|one| std::cmp::Reverse(one.0));
        Known(known.into_iter().map(|(_, address)| address).collect())
    }

    fn wake_follower(&mut self) {
        if let Some(follower) = &mut self.follower
            && follower.waits_until.is_some()
        {
            let (life, turn) = (follower.life, follower.turn);
            self.after(10, Event::Follow(life, turn));
        }
    }

    /// What is left of the time until then, in that of the world.
    fn until(&self, instant: Instant) -> Time {
        let left = instant.saturating_duration_since(self.instant());
        (left.as_micros() as u64 / computes::CLOCK).max(50)
    }

    /// The page server's loop goes on.
    pub(super) fn follow(&mut self, life: u64, turn: u64) -> Checked {
        let is_it = |one: &Follower| one.life == life && one.turn == turn;
        if !self.follower.as_ref().is_some_and(is_it) {
            return Ok(());
        }
        self.look_at_members();
        for _ in 0..STEPS {
            let Some(mut follower) = self.follower.take() else { return Ok(()) };
            let pause = self.follow_once(&mut follower);
            let is_given_up = self.truth.has_given_up(follower.sink.configuration);
            for (at, wal) in std::mem::take(&mut follower.sink.fed) {
                self.outcome.followed_bytes += wal.len() as u64;
                let checked = self.truth.check_served("the page server is sent", at, &wal);
                // It was judged before that was decided, and this is not durable.
                let checked = checked.or_else(|error| is_given_up.then_some(()).ok_or(error));
                if let Err(error) = checked {
                    // It would have been cut off there by its own check.
                    self.follower = Some(follower);
                    return Err(error);
                }
            }
            let turn = follower.turn + 1;
            follower.turn = turn;
            self.follower = Some(follower);
            if let Some(pause) = pause? {
                self.after(pause, Event::Follow(life, turn));
                return Ok(());
            }
        }
        let turn = self.follower.as_ref().map_or(0, |follower| follower.turn);
        self.after(50, Event::Follow(life, turn));
        Ok(())
    }

    /// One step, and how long it waits then.
    fn follow_once(&mut self, follower: &mut Follower) -> Checked<Option<Time>> {
        let now = self.instant();
        let waited = follower.waits_until.take();
        let Some((mut session, stream)) = follower.session.take() else {
            return self.choose(follower, now);
        };
        if let Some(until) = waited {
            let inbox = &mut self.streams[stream].inbox;
            let room = session.room();
            let count = inbox.len().min(room.len());
            for byte in &mut room[..count] {
                *byte = inbox.pop_front().unwrap_or_default();
            }
            if count == 0 && self.streams[stream].is_over {
                self.close_stream(stream);
                let ended = SourceError::Wire(io::ErrorKind::UnexpectedEof.into());
                self.log(|| "the page server's stream is over".into());
                follower.choice.ended(now, &mut follower.sink, ended.into());
                return Ok(None);
            }
            if count == 0 && now < until {
                follower.session = Some((session, stream));
                follower.waits_until = Some(until);
                return Ok(Some(self.until(until)));
            }
            session.received(count, now);
        }
        match session.step(now, &mut follower.sink) {
            Next::Go => {}
            Next::Write => {
                let bytes = session.output().to_vec();
                session.written(bytes.len(), now);
                let delay = self.delay(self.streams[stream].node);
                let one = &mut self.streams[stream];
                one.to_node = (self.now + delay).max(one.to_node + 1);
                let at = one.to_node;
                self.at(at, Event::Ask(stream, bytes));
            }
            Next::Wait(until) => {
                let is_there =
                    !self.streams[stream].inbox.is_empty() || self.streams[stream].is_over;
                follower.waits_until = Some(until);
                follower.session = Some((session, stream));
                return Ok(match is_there {
                    true => None,
                    false => Some(self.until(until)),
                });
            }
            Next::Ended(ended) => {
                self.log(|| format!("the page server leaves its safekeeper: {ended:?}"));
                // Of before, or of a source that was judged before.
                let is_given_up = match &ended {
                    Ended::Sink(IngestError::GivenUp(_)) => self.outcome.recoveries > 0,
                    _ => self.truth.has_given_up(follower.sink.configuration),
                };
                if let Ended::Sink(error) = &ended
                    && !is_given_up
                    && !self.nodes.iter().any(|node| node.is_rotten)
                {
                    return Err(format!("what the page server is sent is no WAL: {error}"));
                }
                self.close_stream(stream);
                follower.choice.ended(now, &mut follower.sink, ended);
                return Ok(None);
            }
        }
        follower.session = Some((session, stream));
        Ok(None)
    }

    fn choose(&mut self, follower: &mut Follower, now: Instant) -> Checked<Option<Time>> {
        let sources = self.sources();
        match follower.choice.next(now, &mut follower.sink, &sources) {
            choice::Next::Begin => {
                let begun = pgstrata_pageserver::receiver::Sink::begin(&mut follower.sink);
                follower.choice.begun(now, &mut follower.sink, begun);
                Ok(None)
            }
            choice::Next::Follow(address) => {
                let node = (1..=self.nodes.len())
                    .find(|node| address.starts_with(&format!("safekeeper-{node}:")));
                let node = self.node_of(node.unwrap_or(1) as u64);
                if !self.nodes[node].is_up || self.following.one_in(20) {
                    let refused = SourceError::Connect(anyhow::anyhow!("nobody listens there"));
                    follower.choice.ended(now, &mut follower.sink, refused.into());
                    return Ok(Some(500));
                }
                self.log(|| format!("the page server follows safekeeper {}", node + 1));
                self.outcome.streams += 1;
                let stream = self.streams.len();
                self.streams.push(Stream {
                    node,
                    node_life: self.nodes[node].life,
                    life: follower.life,
                    is_dead: false,
                    to_node: self.now,
                    to_follower: self.now,
                    asked: Vec::new(),
                    is_greeted: false,
                    feeder: None,
                    inbox: Default::default(),
                    is_over: false,
                    is_due: false,
                });
                let (tenant, timeline) = self.key();
                follower.session = Some((Session::new(tenant, timeline, now), stream));
                Ok(None)
            }
            choice::Next::Pause(pause) => Ok(Some(self.until(pause.until))),
            choice::Next::Stopped => Err("the page server stops".into()),
            choice::Next::Failed(reason) => Err(format!("the page server is at an end: {reason}")),
        }
    }

    fn close_stream(&mut self, stream: usize) {
        let one = &mut self.streams[stream];
        (one.feeder, one.is_dead) = (None, true);
        one.inbox.clear();
    }

    /// Those of a safekeeper that has ended.
    pub(super) fn end_streams(&mut self, node: usize) {
        for stream in 0..self.streams.len() {
            if self.streams[stream].node == node && !self.streams[stream].is_dead {
                self.streams[stream].feeder = None;
                let delay = self.delay(node);
                self.after(delay, Event::Stream(stream, Vec::new()));
            }
        }
    }

    /// Bytes come to the page server; none if nothing more comes.
    pub(super) fn stream(&mut self, stream: usize, bytes: Vec<u8>) {
        let one = &mut self.streams[stream];
        let is_its = self.follower.as_ref().is_some_and(|follower| follower.life == one.life);
        if one.is_dead || !is_its {
            return;
        }
        one.is_over |= bytes.is_empty();
        one.inbox.extend(bytes);
        self.wake_follower();
    }

    fn tell_follower(&mut self, stream: usize, mut bytes: Vec<u8>) {
        let node = self.streams[stream].node;
        let mut pieces = Vec::new();
        if bytes.len() > 1 && self.following.one_in(6) {
            let rest = self.following.between(1, bytes.len() as u64 - 1) as usize;
            pieces.push(bytes.split_off(rest));
        }
        pieces.insert(0, bytes);
        for piece in pieces {
            let delay = self.delay(node);
            let one = &mut self.streams[stream];
            one.to_follower = (self.now + delay).max(one.to_follower + 1);
            let at = one.to_follower;
            self.at(at, Event::Stream(stream, piece));
        }
    }

    fn end_stream(&mut self, stream: usize) {
        self.streams[stream].feeder = None;
        self.tell_follower(stream, Vec::new());
    }

    /// What the page server says comes to a safekeeper.
    pub(super) fn asked(&mut self, stream: usize, bytes: &[u8]) -> Checked {
        let one = &mut self.streams[stream];
        let node = one.node;
        if one.is_dead || self.nodes[node].life != one.node_life {
            return Ok(());
        }
        one.asked.extend_from_slice(bytes);
        let mut out = BackendWriter::default();
        if !one.is_greeted {
            let Some(length) =
                one.asked.first_chunk().map(|word| u32::from_be_bytes(*word) as usize)
            else {
                return Ok(());
            };
            let Some(packet) = one.asked.get(4..length) else { return Ok(()) };
            let startup = Startup::decode(packet).map_err(|error| error.to_string())?;
            let Startup::Session(_) = startup else {
                return Err(format!("the page server begins with {startup:?}"));
            };
            one.asked.drain(..length);
            one.is_greeted = true;
            out.ready_for_query();
        }
        let now = self.instant();
        loop {
            let one = &mut self.streams[stream];
            let said = split(&one.asked).map_err(|error| error.to_string())?;
            let Some((message, size)) = said else { break };
            one.asked.drain(..size);
            match (&message, &mut one.feeder) {
                (Frontend::Query(text), _) => {
                    let command = parse(text).map_err(|error| error.to_string())?;
                    if let Command::Show(name) = &command {
                        self.wake(node)?;
                        let timeline = self.nodes[node].timeline().filter(|one| !one.is_left());
                        let Some(timeline) = timeline.filter(|_| name == CONFIGURATION) else {
                            self.end_stream(stream);
                            return Ok(());
                        };
                        let number = timeline.configuration_number().to_string();
                        out.result(&[text_column("setting")], Some(&[Some(&number)]), "SHOW");
                        out.ready_for_query();
                        continue;
                    }
                    let Command::StartReplication { start, .. } = command else {
                        return Err(format!("the page server asks {text}"));
                    };
                    self.wake(node)?;
                    let Some(timeline) = self.nodes[node].timeline() else {
                        // As a session is refused whose timeline can't be had now.
                        self.end_stream(stream);
                        return Ok(());
                    };
                    let archive = Some(Arc::clone(&self.objects.archive));
                    let ancestors = self.here[node].before();
                    let reader = ChainReader::new(ancestors, Arc::clone(&timeline), archive);
                    let reader = CheckedReader::new(reader);
                    let feeding = Feeding::new(start, now);
                    self.streams[stream].feeder = Some(Feeder { feeding, reader, timeline });
                    out.copy_both();
                }
                (message, Some(feeder)) => {
                    if let Some(status) = feeder.feeding.take(message, now) {
                        feeder.timeline.note_consistent(status.flush_lsn);
                    }
                }
                // It has ended on this side.
                (_, None) => {}
            }
        }
        if !out.bytes.is_empty() {
            self.tell_follower(stream, out.bytes);
        }
        self.feed_later(stream, 20);
        Ok(())
    }

    fn feed_later(&mut self, stream: usize, delay: Time) {
        let one = &mut self.streams[stream];
        if one.feeder.is_some() && !std::mem::replace(&mut one.is_due, true) {
            self.after(delay, Event::Feed(stream));
        }
    }

    /// A safekeeper sends what is committed.
    pub(super) fn feed(&mut self, stream: usize) -> Checked {
        self.streams[stream].is_due = false;
        let node = self.streams[stream].node;
        let now = self.instant();
        let is_alive = self.nodes[node].life == self.streams[stream].node_life;
        let Some(mut feeder) = self.streams[stream].feeder.take().filter(|_| is_alive) else {
            return Ok(());
        };
        let timeline = &feeder.timeline;
        let standing = match (timeline.is_left(), timeline.is_retired()) {
            (true, _) => Standing::Left,
            (false, true) => Standing::Retired,
            (false, false) => Standing::Kept,
        };
        let commit_lsn = match self.lie {
            Some(Lie::StreamBeyondCommit) => timeline.flush_lsn(),
            _ => timeline.commit_lsn(),
        };
        let mut out = BackendWriter::default();
        let delay = match feeder.feeding.next(now, commit_lsn, standing) {
            feeding::Next::Wal { at, end, most } => {
                let mut buffer = vec![0; most.min(16 << 10)];
                match self.objects.wait(feeder.reader.read(at, end, &mut buffer)) {
                    Ok(count) => feeder.feeding.wal(&buffer[..count], end, 0, &mut out),
                    Err(error) => {
                        self.log(|| format!("safekeeper {} ends a stream: {error}", node + 1));
                        self.end_stream(stream);
                        return self.settle(node);
                    }
                }
                feeder.feeding.sent(now);
                30
            }
            feeding::Next::Keepalive(is_question) => {
                feeder.feeding.keepalive(is_question, 0, &mut out);
                feeder.feeding.sent(now);
                30
            }
            feeding::Next::Wait(until) => self.until(until).min(LOOK),
            feeding::Next::Done | feeding::Next::Ended(_) => {
                self.end_stream(stream);
                return Ok(());
            }
        };
        self.streams[stream].feeder = Some(feeder);
        if !out.bytes.is_empty() {
            self.tell_follower(stream, out.bytes);
        }
        self.feed_later(stream, delay);
        Ok(())
    }
}
