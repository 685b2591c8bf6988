//! The loop: the socket, the thread and its sleeps, around what decides.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_identity::Identity;
use pgstrata_ids::Lsn;

use super::believing::Doubt;
use super::choice::{self, Choice, Pause, Sources};
use super::connect::connect;
use super::session::{Ended, Next, Session, SourceError};
use super::sink::Sink;
use crate::ingest::{Ingest, IngestError};
use crate::timeline::Timeline;

/// How often a branch whose ancestor is behind looks whether it is to stop.
const ANCESTOR_PATIENCE: Duration = Duration::from_millis(200);

/// Who may have a timeline's WAL. Asked again for every attempt.
pub trait Safekeepers: Send + Sync {
    /// Addresses (`host:port`) of replication listeners, best first.
    fn candidates(&self, timeline: &Timeline) -> Vec<String>;

    /// Who we are to them, where they are to ask.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Whether any of them is known to have it.
    fn is_known(&self, _timeline: &Timeline) -> bool {
        false
    }
}

/// Keeps a timeline ingesting until it is stopped or fails for good. What fails for lack of
/// storage is tried again: a disk is emptied, an object store comes back.
pub fn follow(timeline: &Arc<Timeline>, safekeepers: &dyn Safekeepers) {
    let mut sink = Ingesting { timeline, ingest: None };
    let sources = Of { timeline, safekeepers };
    let mut choice = Choice::default();
    loop {
        match choice.next(Instant::now(), &mut sink, &sources) {
            choice::Next::Begin => {
                let until = Instant::now() + ANCESTOR_PATIENCE;
                if let Err(error) = timeline.wait(timeline.info.start_lsn, ANCESTOR_PATIENCE) {
                    tracing::debug!(timeline = %timeline.info.id, "ingest waits: {error}");
                    // That is known at once of an ancestor whose ingest has stopped for good.
                    std::thread::sleep(until.saturating_duration_since(Instant::now()));
                    continue;
                }
                let begun = sink.begin();
                choice.begun(Instant::now(), &mut sink, begun);
            }
            choice::Next::Follow(address) => {
                let identity = safekeepers.identity();
                let ended = stream(&mut sink, &address, identity.as_ref());
                if let Ended::Source(error) = &ended {
                    tracing::debug!(timeline = %timeline.info.id, address, "{error}");
                }
                choice.ended(Instant::now(), &mut sink, ended);
            }
            choice::Next::Pause(pause) => wait(timeline, pause),
            choice::Next::Stopped => return sink.finish(),
            choice::Next::Failed(reason) => return timeline.fail(reason),
        }
    }
}

fn wait(timeline: &Timeline, pause: Pause) {
    let left = pause.until.saturating_duration_since(Instant::now());
    match pause.ends_when_wanted {
        true => timeline.progress.wait_until_wanted(left),
        false => std::thread::sleep(left),
    }
}

/// Follows one safekeeper for as long as that goes.
fn stream(sink: &mut Ingesting<'_>, address: &str, identity: Option<&Identity>) -> Ended {
    let connected = connect(address, identity);
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) => {
            let error = error.context(format!("safekeeper {address}"));
            return SourceError::Connect(error).into();
        }
    };
    let info = &sink.timeline.info;
    let mut session = Session::new(info.tenant, info.id, Instant::now());
    loop {
        let done = match session.step(Instant::now(), sink) {
            Next::Go => Ok(()),
            Next::Write => stream.write_all(session.output()).map(|()| {
                session.written(session.output().len(), Instant::now());
            }),
            // The socket waits for a tick, which is no longer.
            Next::Wait(_) => read(&mut stream, session.room()).map(|count| {
                session.received(count, Instant::now());
            }),
            Next::Ended(ended) => return ended,
        };
        if let Err(error) = done {
            return SourceError::Wire(error).into();
        }
    }
}

/// Reads what comes; 0 bytes if nothing came in time.
fn read(stream: &mut impl Read, room: &mut [u8]) -> io::Result<usize> {
    use io::ErrorKind::{Interrupted, TimedOut, UnexpectedEof, WouldBlock};
    match stream.read(room) {
        Ok(0) => Err(UnexpectedEof.into()),
        Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => Ok(0),
        read => read,
    }
}

/// The safekeepers of one timeline.
struct Of<'a> {
    timeline: &'a Timeline,
    safekeepers: &'a dyn Safekeepers,
}

impl Sources for Of<'_> {
    fn candidates(&self) -> Vec<String> {
        self.safekeepers.candidates(self.timeline)
    }

    fn is_known(&self) -> bool {
        self.safekeepers.is_known(self.timeline)
    }
}

/// A timeline, and its ingest once that has begun.
struct Ingesting<'a> {
    timeline: &'a Arc<Timeline>,
    ingest: Option<Ingest>,
}

impl Ingesting<'_> {
    /// What is in memory is on its way when this ends.
    fn finish(&mut self) {
        if let Some(ingest) = &mut self.ingest {
            ingest.freeze_if_due(true);
        }
    }
}

impl Sink for Ingesting<'_> {
    fn begin(&mut self) -> Result<(), IngestError> {
        self.ingest = None;
        self.timeline.rewind_if_in_doubt()?;
        let ingest = Ingest::new(Arc::clone(self.timeline)).map_err(IngestError::Storage)?;
        self.ingest = Some(ingest);
        Ok(())
    }

    fn position(&self) -> Lsn {
        self.ingest.as_ref().map_or_else(|| self.whole(), Ingest::position)
    }

    fn whole(&self) -> Lsn {
        self.timeline.progress.lsn()
    }

    fn feed(&mut self, wal: &[u8]) -> Result<(), IngestError> {
        let Some(ingest) = &mut self.ingest else {
            return Err(IngestError::Storage(anyhow::anyhow!("ingest has not begun")));
        };
        // Before any of it can be seen, flushed, or branched from.
        self.timeline.took(ingest.position() + wal.len() as u64);
        let fed = ingest.feed(wal);
        if fed.is_err() {
            self.ingest = None;
        }
        match fed {
            // What was given up says nothing of the branch.
            Err(IngestError::Wal(error)) => match self.timeline.check_taken() {
                Err(doubt) if doubt.is::<IngestError>() => {
                    doubt.downcast().map_or(Err(IngestError::Wal(error)), Err)
                }
                _ => Err(IngestError::Wal(error)),
            },
            fed => fed,
        }
    }

    fn believes(&mut self, configuration: u64) -> Result<(), Doubt> {
        self.timeline.judge(configuration)
    }

    fn is_in_doubt(&self) -> bool {
        self.timeline.is_in_doubt()
    }

    fn durable(&self) -> Lsn {
        self.timeline.remote_consistent_lsn()
    }

    fn is_wanted(&self) -> bool {
        self.timeline.progress.is_wanted()
    }

    fn is_stopping(&self) -> bool {
        self.timeline.is_stopping()
    }

    fn tidy(&mut self) {
        if let Some(ingest) = &mut self.ingest {
            ingest.freeze_if_due(false);
        }
    }

    fn stall(&mut self, reason: String) {
        self.timeline.stall(reason);
    }

    fn go_on(&mut self) {
        self.timeline.go_on();
    }

    fn note_bad_source(&mut self, address: &str, reason: &str) {
        tracing::error!(timeline = %self.timeline.info.id, "safekeeper {address}: {reason}");
        self.timeline.note_bad_source(address, reason.to_owned());
    }
}
