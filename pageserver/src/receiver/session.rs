//! One connection to a safekeeper, without the connection: what is to be written, what the bytes mean that come, and how long
//! they are waited for.
//!
//! Owns the protocol's state and the bytes that were not looked at yet. Knows no socket and no clock: it is told both.

use std::io;
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, TenantId, TimelineId};

use super::believing::Doubt;
use super::inbox::{BadLength, Inbox, Message};
use super::messages;
use super::sink::Sink;
use crate::ingest::IngestError;

/// How often a safekeeper is told how far we are.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// How often a quiet connection is looked after.
pub const TICK: Duration = Duration::from_millis(100);
/// While somebody waits for more WAL, a safekeeper that sends none is left after so long.
const WANTED_PATIENCE: Duration = Duration::from_millis(150);
/// The same where it stopped inside a message: on a network that loses packets a part of one may take longer than that, and would
/// have to come again.
const WITHIN_PATIENCE: Duration = Duration::from_secs(1);
/// A safekeeper that does not answer at all is left after so long, or sooner while somebody waits for more WAL.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// A safekeeper that says nothing at all for so long, stops inside a message, or takes nothing, is given up.
pub const SILENCE: Duration = Duration::from_secs(30);
/// While WAL comes it is asked so often whether its source is still believed.
const JUDGED_EVERY: Duration = Duration::from_secs(2);
/// SQLSTATE of a safekeeper that does not know what it is asked to show.
const NO_SUCH_SETTING: &str = "42704";
/// SQLSTATE of a safekeeper that has no such timeline.
const NO_SUCH_TIMELINE: &str = "3D000";
/// What is before the WAL in a message of it: its kind, where it begins, how far there is more, and the time.
const WAL_HEADER: usize = 25;
/// A keepalive: its kind, how far there is WAL, the time, and whether it is to be answered.
const KEEPALIVE: usize = 18;

/// Why a safekeeper is followed no longer: another one, or the same later, may do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It has no such timeline.
    #[error("{0}")]
    Unknown(String),
    /// It says why not.
    #[error("{0}")]
    Refused(String),
    /// What it has may have been given up.
    #[error("it is not followed: {0}")]
    Doubted(String),
    /// It answered something that is no answer.
    #[error("it shows {0:?} as the configuration that it knows")]
    Configuration(String),
    /// It did not answer in time.
    #[error("no answer")]
    NoAnswer,
    /// Somebody waits for more WAL, and it sends none.
    #[error("it lags: others may have more")]
    Lags,
    /// It was silent for too long.
    #[error("no word for {SILENCE:?}")]
    Silent,
    /// It stopped inside a message.
    #[error("a message did not come whole within {SILENCE:?}")]
    Unfinished,
    /// It took nothing of what it was told.
    #[error("it took nothing for {SILENCE:?}")]
    Stuck,
    /// It sent a message of an impossible length.
    #[error(transparent)]
    Length(#[from] BadLength),
    /// It sent other WAL than was asked for.
    #[error("WAL from {start} came instead of {expected}")]
    Position {
        /// Where the WAL begins that came.
        start: Lsn,
        /// Where it was to begin.
        expected: Lsn,
    },
    /// It sent, inside the stream, what is not known.
    #[error("unknown replication message {0:?}")]
    Message(Option<char>),
    /// It ended the stream.
    #[error("the safekeeper ended the stream")]
    EndOfStream,
    /// The connection broke.
    #[error(transparent)]
    Wire(#[from] io::Error),
    /// There was none.
    #[error("{0:#}")]
    Connect(anyhow::Error),
}

/// Why following one safekeeper ended.
#[derive(Debug)]
pub enum Ended {
    /// The sink is stopping.
    Stopped,
    /// The safekeeper, or the connection.
    Source(SourceError),
    /// The sink. Unless it was the bytes, the WAL would be the same everywhere.
    Sink(IngestError),
}

impl From<SourceError> for Ended {
    fn from(error: SourceError) -> Ended {
        Ended::Source(error)
    }
}

impl From<Doubt> for Ended {
    fn from(doubt: Doubt) -> Ended {
        match doubt {
            Doubt::Source(why) => SourceError::Doubted(why).into(),
            Doubt::Taken(lsn) => Ended::Sink(IngestError::GivenUp(lsn)),
        }
    }
}

impl From<BadLength> for Ended {
    fn from(error: BadLength) -> Ended {
        Ended::Source(error.into())
    }
}

/// What is to be done next.
#[derive(Debug)]
pub enum Next {
    /// To ask again at once: something was done, which may have taken time.
    Go,
    /// To write [`Session::output`], or as much of it as is taken, and to say how much that was: [`Session::written`]. Where
    /// nothing is taken, to ask again when something is, or after a [`TICK`].
    Write,
    /// To wait for bytes, at most until then, put them into [`Session::room`], and say how many came: [`Session::received`].
    Wait(Instant),
    /// Nothing any more.
    Ended(Ended),
}

/// What was asked last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// To be let in.
    Welcome,
    /// Which configuration of the members it knows.
    Show,
    /// Nothing: it is to be judged by its answer.
    Judge,
    /// To start the stream.
    Start,
    /// Nothing: WAL comes.
    Stream,
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    phase: Phase,
    inbox: Inbox,
    output: Vec<u8>,
    /// When the first of it was to be written, or some of it was taken.
    output_since: Instant,
    /// When the question was asked that is not answered yet.
    asked: Instant,
    /// When WAL came last, or the stream began.
    heard: Instant,
    /// When anything came last, in the stream.
    alive: Instant,
    /// When the message began to come that is not whole.
    begun: Instant,
    /// When bytes came last.
    came: Instant,
    /// When it was last considered whether more is worth waiting for.
    judged: Instant,
    /// Whether something has come, or was waited for in vain, since it was last waited for.
    has_looked: bool,
    /// Whether nothing came.
    is_quiet: bool,
    /// WAL was fed in the call before, which may have taken long.
    has_fed: bool,
    status_at: Instant,
    /// It wants to be told how far we are.
    is_asked: bool,
    /// What it was told last to be durable.
    reported: Lsn,
    /// Which configuration it knows, or 0.
    configuration: u64,
    /// When it was judged by that last, and whether WAL came since.
    judged_source: Instant,
    is_unjudged: bool,
    /// It was judged in the call before, which was made then.
    judges_since: Option<Instant>,
}

impl Session {
    /// Over a connection that was made by now, and on which nothing was said.
    pub fn new(tenant: TenantId, timeline: TimelineId, now: Instant) -> Session {
        Session {
            phase: Phase::Welcome,
            inbox: Inbox::default(),
            output: messages::startup(tenant, timeline),
            output_since: now,
            asked: now,
            heard: now,
            alive: now,
            begun: now,
            came: now,
            judged: now,
            has_looked: false,
            is_quiet: false,
            has_fed: false,
            status_at: now,
            is_asked: false,
            reported: Lsn::INVALID,
            configuration: 0,
            judged_source: now,
            is_unjudged: false,
            judges_since: None,
        }
    }

    /// What is to be written.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// So many bytes of it were taken.
    pub fn written(&mut self, count: usize, now: Instant) {
        self.output.drain(..count);
        if count > 0 {
            self.output_since = now;
        }
    }

    /// Where bytes are to be put that come; not empty when they are to be [waited](Next::Wait) for.
    pub fn room(&mut self) -> &mut [u8] {
        self.inbox.room()
    }

    /// So many bytes came, or none in the time that they were waited for.
    pub fn received(&mut self, count: usize, now: Instant) {
        if self.inbox.is_empty() {
            self.begun = now;
        }
        if count > 0 {
            self.came = now;
        }
        self.inbox.filled(count);
        (self.has_looked, self.is_quiet) = (true, count == 0);
    }

    /// What to do next. One message is looked at in each call, so that the time is known after what took long.
    pub fn step(&mut self, now: Instant, sink: &mut impl Sink) -> Next {
        if sink.is_stopping() {
            return Next::Ended(Ended::Stopped);
        }
        if std::mem::take(&mut self.has_fed) {
            (self.heard, self.alive) = (now, now);
        }
        if let Some(before) = self.judges_since.take() {
            // That may have taken long, for which it is not to blame.
            let spent = since(before, now);
            for moment in
                [&mut self.heard, &mut self.alive, &mut self.asked, &mut self.output_since]
            {
                *moment += spent;
            }
            self.judged_source = now;
        }
        self.try_step(now, sink).unwrap_or_else(Next::Ended)
    }

    fn try_step(&mut self, now: Instant, sink: &mut impl Sink) -> Result<Next, Ended> {
        self.report(now, sink);
        if !self.output.is_empty() {
            return match since(self.output_since, now) > SILENCE {
                true => Err(SourceError::Stuck.into()),
                false => Ok(Next::Write),
            };
        }
        if self.phase == Phase::Judge {
            self.judges_since = Some(now);
            (self.asked, self.output_since) = (now, now);
            sink.believes(self.configuration)?;
            self.phase = Phase::Start;
            self.output = messages::start_replication(sink.position());
            return Ok(Next::Go);
        }
        if self.judge_again(now, sink)? {
            return Ok(Next::Go);
        }
        if let Some(message) = self.inbox.message()? {
            let size = message.size();
            let answered = match self.phase {
                Phase::Welcome => is_answer(message, b'Z')?,
                Phase::Show => {
                    if let Some(configuration) = shown(message)? {
                        self.configuration = configuration;
                    }
                    message.kind == b'Z'
                }
                // It waits for nothing.
                Phase::Judge => false,
                Phase::Start => is_answer(message, b'W')?,
                Phase::Stream => false,
            };
            if self.phase == Phase::Stream {
                let said = take(message, sink)?;
                if said != Said::Nothing {
                    self.alive = now;
                }
                self.has_fed = said == Said::Wal;
                self.is_unjudged |= said == Said::Wal;
                self.is_asked |= said == Said::Question;
            }
            self.inbox.consume(size);
            self.begun = now;
            if answered {
                self.go_on(now);
            }
            return Ok(Next::Go);
        }
        if std::mem::take(&mut self.has_looked) {
            self.look(now, sink)?;
        }
        Ok(Next::Wait(now + TICK))
    }

    /// The question was answered: asks the next one.
    fn go_on(&mut self, now: Instant) {
        match self.phase {
            Phase::Welcome => {
                self.phase = Phase::Show;
                self.output = messages::show_configuration();
                (self.output_since, self.asked) = (now, now);
            }
            Phase::Show => self.phase = Phase::Judge,
            Phase::Judge | Phase::Start | Phase::Stream => {
                self.phase = Phase::Stream;
                (self.heard, self.alive, self.status_at) = (now, now, now);
                self.judged_source = now;
            }
        }
    }

    /// Whether the source is still believed, where WAL came of it or somebody found reason to ask. False if there was none.
    fn judge_again(&mut self, now: Instant, sink: &mut impl Sink) -> Result<bool, Doubt> {
        let is_due = self.is_unjudged && since(self.judged_source, now) >= JUDGED_EVERY;
        let judges = self.phase == Phase::Stream && (is_due || sink.is_in_doubt());
        if judges {
            (self.judges_since, self.is_unjudged) = (Some(now), false);
            sink.believes(self.configuration)?;
        }
        Ok(judges)
    }

    /// Says how far we are, when that is due.
    fn report(&mut self, now: Instant, sink: &impl Sink) {
        if self.phase != Phase::Stream || !self.output.is_empty() {
            return;
        }
        let durable = sink.durable();
        let is_due = self.is_asked || since(self.status_at, now) >= STATUS_EVERY;
        if is_due || durable != self.reported {
            self.output = messages::status(sink.whole(), durable);
            self.output_since = now;
            (self.status_at, self.is_asked, self.reported) = (now, false, durable);
        }
    }

    /// Nothing is left to be looked at: whether more is worth waiting for.
    fn look(&mut self, now: Instant, sink: &mut impl Sink) -> Result<(), SourceError> {
        if self.phase != Phase::Stream {
            let waited = since(self.asked, now);
            let is_over =
                waited > ANSWER_PATIENCE || (waited > WANTED_PATIENCE && sink.is_wanted());
            return if is_over { Err(SourceError::NoAnswer) } else { Ok(()) };
        }
        let is_within = !self.inbox.is_empty();
        if is_within && since(self.begun, now) > SILENCE {
            return Err(SourceError::Unfinished);
        }
        // One that says something more often than that may still send no WAL.
        if !self.is_quiet && since(self.judged, now) < TICK {
            return Ok(());
        }
        self.judged = now;
        if !is_within {
            // Nothing is left to do, so nothing is in the way.
            sink.go_on();
            sink.tidy();
        }
        // A message that comes slowly is worth waiting for, one that does not go on is not.
        let (heard, patience) = match is_within {
            true => (self.heard.max(self.came), WITHIN_PATIENCE),
            false => (self.heard, WANTED_PATIENCE),
        };
        if sink.is_wanted() && since(heard, now) > patience {
            return Err(SourceError::Lags);
        }
        if !is_within && since(self.alive, now) > SILENCE {
            return Err(SourceError::Silent);
        }
        Ok(())
    }

    /// Bytes of memory that are held for what comes.
    #[cfg(test)]
    pub fn inbox_size(&self) -> usize {
        self.inbox.size()
    }
}

fn since(then: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(then)
}

/// Whether this is the answer that is waited for; an error response is an error.
fn is_answer(message: Message<'_>, wanted: u8) -> Result<bool, SourceError> {
    if message.kind != b'E' {
        return Ok(message.kind == wanted);
    }
    let text = messages::error_text(message.body);
    match messages::error_field(message.body, b'C').as_deref() {
        Some(NO_SUCH_TIMELINE) => Err(SourceError::Unknown(text)),
        _ => Err(SourceError::Refused(text)),
    }
}

/// The configuration that this says, if it does; 0 where the safekeeper is of a release that knows no such question.
fn shown(message: Message<'_>) -> Result<Option<u64>, SourceError> {
    match message.kind {
        b'D' => {
            let text = messages::single_value(message.body);
            let number = text.and_then(|text| text.parse().ok());
            let said = || SourceError::Configuration(text.unwrap_or("no value").to_owned());
            number.ok_or_else(said).map(Some)
        }
        b'E' => match messages::error_field(message.body, b'C').as_deref() {
            Some(NO_SUCH_SETTING) => Ok(Some(0)),
            _ => Err(SourceError::Refused(messages::error_text(message.body))),
        },
        _ => Ok(None),
    }
}

/// What a message in the stream was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// WAL, which was fed.
    Wal,
    /// That it is there.
    Word,
    /// That it is there, and wants to be told how far we are.
    Question,
    /// Nothing of the stream.
    Nothing,
}

/// Looks at a message of the stream. WAL is fed from where it lies.
fn take(message: Message<'_>, sink: &mut impl Sink) -> Result<Said, Ended> {
    let body = message.body;
    match message.kind {
        b'd' => {}
        b'E' => return Err(SourceError::Refused(messages::error_text(body)).into()),
        b'c' | b'C' | b'Z' => return Err(SourceError::EndOfStream.into()),
        _ => return Ok(Said::Nothing),
    }
    match body.first() {
        Some(b'w') if body.len() >= WAL_HEADER => {
            let mut start = [0; 8];
            start.copy_from_slice(&body[1..9]);
            let (start, expected) = (Lsn(u64::from_be_bytes(start)), sink.position());
            if start != expected {
                return Err(SourceError::Position { start, expected }.into());
            }
            sink.feed(&body[WAL_HEADER..]).map_err(Ended::Sink)?;
            sink.go_on();
            Ok(Said::Wal)
        }
        Some(b'k') if body.len() >= KEEPALIVE => match body[KEEPALIVE - 1] {
            0 => Ok(Said::Word),
            _ => Ok(Said::Question),
        },
        other => Err(SourceError::Message(other.map(|kind| *kind as char)).into()),
    }
}
