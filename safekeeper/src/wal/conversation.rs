//! What is said on one connection of the WAL port: messages in, answers out. It has no socket and no clock, and never pauses: who
//! feeds it has those.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Incarnation, Lsn, NodeId, Term};
use pgstrata_listen::{Deed, Peer};
use pgstrata_quorum::{Configuration, Refusal};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{
    Greeting, GreetingReply, Message, RefusedReason, SERVED, decode, encode, greets, is_appending,
    version2,
};
use pgstrata_wire::version::Version;

use crate::pace::{Others, Pace};
use crate::storage_error::StorageError;
use crate::timeline::{Answer, ComputeConnected, ProposerConnected, ReadOn, Timeline};
use crate::timelines::former::decided;
use crate::timelines::{Greeted, Timelines};

/// WAL bytes per chunk when WAL is read, in bytes.
const READ_CHUNK: usize = 256 << 10;

/// Why a conversation is over: this was answered.
#[derive(Debug, thiserror::Error)]
#[error("refused: {0}")]
struct Refused(RefusedReason);

/// Whether a conversation is over for want of space, which is said of the disk, once.
pub fn is_said_of_the_disk(error: &anyhow::Error) -> bool {
    let is_refusal = |refused: &Refused| match &refused.0 {
        RefusedReason::Storage(text) => StorageError::is_text_of_want_of_space(text),
        _ => false,
    };
    error.downcast_ref().is_some_and(StorageError::is_for_want_of_space)
        || error.downcast_ref().is_some_and(is_refusal)
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// What is there is no whole message.
    NeedsMore,
    /// The next step may follow after this pause, in which nothing is held that others wait for. Mostly there is none.
    GoesOn(Duration),
}

/// See the module. What it says goes to `out`, which may fail, and ends it then.
#[derive(Debug)]
pub struct Conversation<W> {
    out: W,
    peer: Peer,
    pace: Arc<Pace>,
    timelines: Arc<Timelines>,
    /// What is spoken, once the client has said what it speaks. Whichever it is, what is voted and acknowledged means the same.
    version: Option<Version>,
    timeline: Option<Arc<Timeline>>,
    /// Whether it greeted, as a compute, and so was let in to vote and append.
    is_compute: bool,
    /// Number of the configuration that it was told last.
    told: u64,
    /// What it greeted with, until the timeline is founded.
    greeting: Option<Greeting>,
    proposer: Option<ProposerConnected>,
    /// The newest term that it asked for or won, as it said.
    asked: Term,
    compute: Option<ComputeConnected>,
    /// What its appends say of those who commit without this one.
    others: Others,
    /// Whom the release before has met of the members that a compute of that release named.
    met: Vec<(NodeId, Incarnation)>,
    /// Where it has read to.
    read: Option<ReadOn>,
    /// The pause was made that comes before the appends that are there.
    has_paused: bool,
    output: Vec<u8>,
}

impl<W: Write> Conversation<W> {
    /// One in which nothing was said yet.
    pub fn new(out: W, peer: Peer, timelines: Arc<Timelines>, pace: Arc<Pace>) -> Conversation<W> {
        Conversation {
            out,
            peer,
            pace,
            timelines,
            version: None,
            timeline: None,
            is_compute: false,
            told: 0,
            greeting: None,
            proposer: None,
            asked: Term(0),
            compute: None,
            others: Others::default(),
            met: Vec::new(),
            read: None,
            has_paused: false,
            output: Vec::new(),
        }
    }

    /// Where its answers go.
    pub fn out(&mut self) -> &mut W {
        &mut self.out
    }

    /// Whether it is known which timeline it is about.
    pub fn is_about_one(&self) -> bool {
        self.timeline.is_some() || self.greeting.is_some()
    }

    /// Serves the next message, or all appends that are there. An error ends the conversation: what can be told of it was told.
    pub fn step(&mut self, input: &mut FrameBuffer, now: Instant) -> anyhow::Result<Step> {
        let Some(kind) = input.kind() else { return Ok(Step::NeedsMore) };
        let Some(version) = self.agree(input, kind)? else { return Ok(Step::NeedsMore) };
        let step = match is_appending(kind) {
            true => self.serve_appends(input, now)?,
            false => self.serve_one(input)?,
        };
        if step != Step::NeedsMore {
            // Only the first message may be of another: the lowest that the client speaks.
            input.agree(version);
        }
        Ok(step)
    }

    /// The version that is spoken, by what the client's first message offers. `None` if that can't be told yet.
    fn agree(&mut self, input: &FrameBuffer, kind: u8) -> anyhow::Result<Option<Version>> {
        if self.version.is_some() {
            return Ok(self.version);
        }
        let Some(offered) = input.offer()? else { return Ok(None) };
        let client = if greets(kind) { "compute" } else { "reader" };
        let agreed = SERVED.agree(client, offered);
        // What is refused is said so that the client can read it.
        self.version = Some(agreed.clone().unwrap_or_else(|_| offered.lowest()));
        if let Err(error) = agreed {
            self.refuse(RefusedReason::Version(error.to_string()))?;
        }
        Ok(self.version)
    }

    fn send(&mut self, message: &Message<'_>) -> anyhow::Result<()> {
        self.output.clear();
        let version = self.version.ok_or_else(|| anyhow::anyhow!("nothing was asked"))?;
        match version == version2::VERSION {
            true => version2::encode(message, &self.met, &mut self.output),
            false => encode(message, Stamp::In(version), &mut self.output),
        }
        self.out.write_all(&self.output)?;
        Ok(())
    }

    /// Sends the answer; a refusal also ends the connection.
    fn answer(&mut self, answer: Result<Answer, StorageError>) -> anyhow::Result<()> {
        let message = match answer {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => message,
            Err(error) => {
                self.send(&Message::Refused(RefusedReason::Storage(error.to_string())))?;
                return Err(anyhow::Error::from(error).context("refused"));
            }
        };
        match message {
            Message::Refused(reason) => self.refuse(reason),
            message => self.send(&message),
        }
    }

    /// Sends why it is over. Always an error.
    fn refuse<T>(&mut self, reason: RefusedReason) -> anyhow::Result<T> {
        let refused = Refused(reason.clone());
        self.send(&Message::Refused(reason))?;
        Err(anyhow::Error::new(refused))
    }

    fn timeline(&self) -> anyhow::Result<Arc<Timeline>> {
        let timeline = self.timeline.as_ref();
        Ok(Arc::clone(timeline.ok_or_else(|| anyhow::anyhow!("no greeting came first"))?))
    }

    /// The timeline that a compute greeted about. Who only reads never gets as far as voting or appending.
    fn led(&self) -> anyhow::Result<Arc<Timeline>> {
        anyhow::ensure!(self.is_compute, "no greeting came first");
        self.timeline()
    }

    /// Refuses what this client may not do.
    fn allow(&mut self, deed: Deed) -> anyhow::Result<()> {
        match self.peer.check(deed) {
            Ok(()) => Ok(()),
            Err(forbidden) => self.refuse(RefusedReason::Forbidden(forbidden.to_string())),
        }
    }

    /// Takes all whole appends (and pings) that were received, syncs once, acknowledges once.
    fn serve_appends(&mut self, input: &mut FrameBuffer, now: Instant) -> anyhow::Result<Step> {
        let timeline = self.led()?;
        let space = &self.timelines.context().shared.space;
        // Before anything is held, so that others go on with the timeline meanwhile. Once for what is answered together,
        // and not for each piece of a long append that comes.
        if !self.has_paused && space.has_pauses() && input.next()?.is_some() {
            self.has_paused = true;
            return Ok(Step::GoesOn(space.take_pause(input.pending() as u64)));
        }
        let mut batch = timeline.batch();
        let (mut taken, mut appends) = (0, 0);
        // Of what others have without this one.
        let mut old_bytes = 0;
        let mut refusal = Ok(None);
        while input.kind().is_some_and(is_appending) {
            let Some(frame) = input.next()? else { break };
            if let Message::Append(append, payload) = decode(frame.kind, frame.body)? {
                refusal = batch.append(&append, payload);
                appends += 1;
                if append.commit_lsn > append.start && self.others.commit_without(&append, now) {
                    old_bytes += append.length;
                }
            }
            let size = frame.size;
            input.consume(size);
            taken += 1;
            if !matches!(refusal, Ok(None)) {
                drop(batch);
                self.timelines.context().shared.meters.refused(&refusal);
                return self.answer(refusal).map(|()| Step::GoesOn(Duration::ZERO));
            }
        }
        if taken == 0 {
            return Ok(Step::NeedsMore);
        }
        self.has_paused = false;
        let answer = batch.finish();
        let promised = timeline.term();
        if appends == 0 && self.proposer.is_some() && promised > self.asked {
            // Who has nothing to write now would not be told before it has, and may wait for what no member gives it any more.
            return self.refuse(RefusedReason::Quorum(Refusal::Fenced { promised }));
        }
        if self.is_former() && (timeline.is_decided() || timeline.configuration().is_known()) {
            return self.refuse(decided());
        }
        if timeline.configuration_number() > self.told {
            self.tell_configuration(&timeline)?;
        }
        self.answer(answer)?;
        timeline.wake_readers();
        Ok(Step::GoesOn(match old_bytes {
            0 => Duration::ZERO,
            bytes => self.pace.pause_after(bytes, now),
        }))
    }

    /// Says that others keep the timeline's WAL from now on, or are about to: a compute that commits goes on with them.
    fn tell_configuration(&mut self, timeline: &Timeline) -> anyhow::Result<()> {
        let configuration = Configuration::clone(&timeline.configuration());
        self.told = configuration.number();
        self.send(&Message::Configuration(configuration, timeline.marks().addresses))
    }

    /// Serves one message of any other kind.
    fn serve_one(&mut self, input: &mut FrameBuffer) -> anyhow::Result<Step> {
        let Some(frame) = input.next()? else { return Ok(Step::NeedsMore) };
        let size = frame.size;
        let message = match self.is_former() {
            false => decode(frame.kind, frame.body)?,
            true => match version2::decode(frame.kind, frame.body)? {
                version2::Said::AsNow(message) => message,
                other => {
                    self.serve_former(other)?;
                    input.consume(size);
                    return Ok(Step::GoesOn(Duration::ZERO));
                }
            },
        };
        match message {
            Message::Greeting(greeting) => {
                self.allow(Deed::AppendWal(greeting.parameters.tenant))?;
                let greeted = self.timelines.greet(&greeting);
                self.reply(greeting, greeted)?;
            }
            Message::VoteRequest(request) => {
                let timeline = self.led()?;
                self.asked = self.asked.max(request.term);
                if request.configuration.number() > timeline.configuration().number()
                    && let Err(reason) = self.timelines.learn(&timeline)
                {
                    return self.refuse(reason);
                }
                self.answer(timeline.vote(&request))?;
            }
            Message::Elected(elected) => {
                let timeline = self.led()?;
                let answer = timeline.elected(&elected);
                self.proposer = Some(timeline.proposer_connected());
                self.asked = self.asked.max(elected.term);
                if timeline.lacks_beginning() {
                    let parameters = timeline.parameters();
                    self.timelines.wanted().push((parameters.tenant, parameters.timeline));
                }
                self.answer(answer)?;
            }
            Message::Found(nodes) => {
                let greeting = self.greeting.take();
                let greeting = greeting.ok_or_else(|| anyhow::anyhow!("no greeting came first"))?;
                let greeted = self.timelines.found(&greeting, &nodes);
                self.reply(greeting, greeted)?;
            }
            Message::Open(tenant, timeline) => {
                self.allow(Deed::ReadWal(tenant))?;
                let opened = self.timelines.get((tenant, timeline));
                self.open(opened)?;
            }
            Message::Learn(tenant, timeline, number) => {
                self.allow(Deed::ReadWal(tenant))?;
                let heard = self.timelines.heard_of((tenant, timeline), number);
                self.open(heard)?;
            }
            Message::ReadWal(from, to, term) => self.read_wal(from, to, term)?,
            Message::LastRecord(end) => self.last_record(end)?,
            other => anyhow::bail!("message kind {} is not for a safekeeper", other.kind()),
        }
        input.consume(size);
        Ok(Step::GoesOn(Duration::ZERO))
    }

    /// Whether it is of the release before, and follows the rule of then.
    fn is_former(&self) -> bool {
        self.version == Some(version2::VERSION)
    }

    /// Serves what only those say.
    fn serve_former(&mut self, said: version2::Said<'_>) -> anyhow::Result<()> {
        match said {
            version2::Said::Greeting(greeting) => {
                self.allow(Deed::AppendWal(greeting.parameters.tenant))?;
                self.met = self.timelines.met(&greeting.nodes);
                let greeted = self.timelines.greet_by_nodes(&greeting).map(Greeted::Member);
                let greeting = Greeting {
                    parameters: greeting.parameters,
                    known: 0,
                    addresses: greeting.addresses,
                    proposer: greeting.proposer,
                };
                self.reply(greeting, greeted)
            }
            version2::Said::VoteRequest(request) => {
                let timeline = self.led()?;
                self.asked = self.asked.max(request.term);
                if timeline.is_decided() {
                    return self.refuse(decided());
                }
                let asked = (request.term, request.proposer);
                self.answer(timeline.vote_by_nodes(asked, &request.nodes))
            }
            version2::Said::Members(members) => {
                self.led()?;
                match self.timelines.check_met(&members) {
                    Ok(()) => Ok(()),
                    Err(reason) => self.refuse(reason),
                }
            }
            version2::Said::AsNow(_) => unreachable!("it is served as now"),
        }
    }

    fn open(&mut self, found: Result<Arc<Timeline>, RefusedReason>) -> anyhow::Result<()> {
        match found {
            Ok(timeline) => {
                let status = match timeline.status() {
                    Ok(status) => status,
                    Err(error) => {
                        return self.refuse(RefusedReason::Storage(error.to_string()));
                    }
                };
                self.is_compute = false;
                self.read = None;
                self.timeline = Some(timeline);
                self.send(&Message::Status(status))
            }
            Err(reason) => self.refuse(reason),
        }
    }

    /// Answers a greeting, or the founding after it.
    fn reply(
        &mut self,
        greeting: Greeting,
        greeted: Result<Greeted, RefusedReason>,
    ) -> anyhow::Result<()> {
        self.proposer = None;
        self.timeline = None;
        self.read = None;
        self.others = Others::default();
        self.is_compute = false;
        // Given back after the new one was counted: it is not gone in between.
        let before = self.compute.take();
        let own = self.timelines.context().shared.own;
        let mut reply = GreetingReply {
            node: own.node,
            incarnation: own.incarnation,
            configuration: None,
            addresses: Vec::new(),
            term: Term(0),
            flush_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
        };
        match greeted {
            Ok(Greeted::Member(timeline)) => {
                let configuration = Configuration::clone(&timeline.configuration());
                self.told = configuration.number();
                reply.configuration = Some(configuration);
                reply.addresses = timeline.marks().addresses;
                reply.term = timeline.term();
                reply.flush_lsn = timeline.flush_lsn();
                reply.commit_lsn = timeline.commit_lsn();
                self.compute = Some(timeline.compute_connected());
                self.timeline = Some(timeline);
                self.is_compute = true;
            }
            Ok(Greeted::Elsewhere(configuration, places)) => {
                reply.addresses = places;
                reply.configuration = Some(Configuration::clone(&configuration));
            }
            Ok(Greeted::NotFounded(nodes)) => {
                reply.configuration = nodes.map(|nodes| Configuration::clone(&nodes));
            }
            Err(reason) => return self.refuse(reason),
        }
        drop(before);
        self.greeting = Some(greeting);
        self.send(&Message::GreetingReply(reply))
    }

    fn last_record(&mut self, end: Lsn) -> anyhow::Result<()> {
        let timeline = self.timeline()?;
        let flush_lsn = timeline.flush_lsn();
        if end > flush_lsn {
            // The last record here is another one.
            let text = format!("WAL ends at {flush_lsn} on this safekeeper, before {end}");
            return self.refuse(RefusedReason::Unavailable(text));
        }
        let answer = match timeline.last_record_before(end) {
            Ok(Some(lsn)) => Message::LastRecordReply(lsn),
            Ok(None) if end <= timeline.parameters().start_lsn => {
                Message::LastRecordReply(Lsn::INVALID)
            }
            Ok(None) => Message::Refused(RefusedReason::Unavailable(format!(
                "the record before {end} is no longer on this safekeeper"
            ))),
            Err(error) => Message::Refused(RefusedReason::Storage(error.to_string())),
        };
        self.answer(Ok(Some(answer)))
    }

    /// Sends `[from, to)` as far as it is here, then an empty chunk.
    fn read_wal(&mut self, from: Lsn, to: Lsn, term: Term) -> anyhow::Result<()> {
        let timeline = self.timeline()?;
        let before = self.read.take();
        let mut reading = match timeline.read_on(from, to, term, before) {
            Ok(reading) => reading,
            Err(reason) => return self.refuse(reason),
        };
        let mut buffer = vec![0; READ_CHUNK];
        loop {
            let at = reading.at();
            match reading.next(&mut buffer) {
                Ok(count) => self.send(&Message::WalChunk(at, &buffer[..count]))?,
                Err(reason) => return self.refuse(reason),
            }
            if reading.at() == at {
                self.read = Some(reading.ended());
                return Ok(());
            }
        }
    }
}
