//! Winning a term and leading it on real sockets: the loops around the [cores](super::leading), which have the threads and the clock.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use pgstrata_ids::{Lsn, Term};
use pgstrata_wal_client::SafekeeperClient;
use rustix::event::{EventfdFlags, eventfd};

use super::config::{ProposerConfig, ProposerError, WalSource};
use super::driver::Driver;
use super::leading::{Campaign, Elected, Following, Question, Recording, SHORT_TURN};
use super::sockets::Sockets;

/// Longest wait for one answer of a safekeeper that WAL is read from.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The winner of a term, until its WAL source takes over.
#[derive(Debug)]
pub struct Leader {
    driver: Driver<Sockets>,
    config: ProposerConfig,
    elected: Elected,
}

/// Wins a term: a newer one than any that a quorum of members has promised, so that every older
/// compute on this branch is fenced.
///
/// Tries until `timeout`, also against other computes that campaign at the same time.
pub fn elect(config: ProposerConfig, timeout: Duration) -> Result<Leader, ProposerError> {
    win(config, timeout, None)
}

/// As [`elect`], for a compute that may have been elected before and did not hear yet that another one took over. It never
/// outranks a compute that came after it.
pub fn elect_again(config: ProposerConfig, timeout: Duration) -> Result<Leader, ProposerError> {
    let before = Term(config.asked_term.load(Ordering::Acquire));
    win(config, timeout, Some(before).filter(|term| term.0 > 0))
}

fn win(
    config: ProposerConfig,
    timeout: Duration,
    before: Option<Term>,
) -> Result<Leader, ProposerError> {
    let mut driver = Driver::of_sockets(config.clone(), before)?;
    let mut campaign = Campaign::new(config.id, before.is_some(), timeout, Instant::now());
    let mut elected = loop {
        driver.turn(None, campaign.wait(Instant::now()))?;
        if let Some(elected) = campaign.step(Instant::now(), &mut driver)? {
            break elected;
        }
    };
    if elected.has_record_before(&config.parameters) {
        let start_lsn = elected.start_lsn;
        let record = ask(&config, &mut driver, start_lsn, move |client| {
            let record = client.last_record(start_lsn)?;
            record.ok_or_else(|| io::Error::other("it knows of no record, but has WAL"))
        })?;
        elected.prev_record_lsn = Some(record);
    }
    Ok(Leader { driver, config, elected })
}

/// Asks a [`Question`], each on a thread of its own, while the links to all are served.
fn ask<T: Send + 'static>(
    config: &ProposerConfig,
    driver: &mut Driver<Sockets>,
    lsn: Lsn,
    query: impl Fn(&mut SafekeeperClient) -> io::Result<T> + Clone + Send + 'static,
) -> Result<T, ProposerError> {
    let (tenant, timeline) = (config.parameters.tenant, config.parameters.timeline);
    let (sender, answers) = channel();
    let mut question = Question::new(lsn, Instant::now());
    loop {
        for (node, address) in question.to_ask(driver) {
            let (sender, query) = (sender.clone(), query.clone());
            let identity = config.identity.clone();
            let thread = std::thread::Builder::new().name("ask".into());
            let spawned = thread.spawn(move || {
                let identity = identity.as_ref();
                let answer =
                    SafekeeperClient::connect(&address, Some(node), identity, READ_TIMEOUT);
                let answer = answer.and_then(|mut client| {
                    client.open(tenant, timeline)?;
                    query(&mut client)
                });
                // Nobody waits any more if another one was faster.
                let _ = sender.send((node, answer));
            });
            spawned.map_err(ProposerError::system("can't start a thread"))?;
        }
        driver.turn(None, SHORT_TURN)?;
        while let Ok((node, answer)) = answers.try_recv() {
            match answer {
                Ok(answer) => return driver.check().map(|()| answer),
                Err(error) => question.failed(Instant::now(), node, &error),
            }
        }
        question.check(Instant::now(), driver)?;
    }
}

impl Leader {
    /// What was won.
    pub fn elected(&self) -> &Elected {
        &self.elected
    }

    /// End of the log: where the next record goes.
    pub fn end_lsn(&self) -> Lsn {
        self.driver.end_lsn()
    }

    /// What is committed, as far as known.
    pub fn commit_lsn(&self) -> Lsn {
        self.driver.commit_lsn()
    }

    /// Appends whole records, whose bytes start at the log's end, and waits until everything up
    /// to their end is committed.
    pub fn append_record(&mut self, bytes: Bytes, timeout: Duration) -> Result<Lsn, ProposerError> {
        let mut recording = Recording::begin(&mut self.driver, bytes, timeout, Instant::now())?;
        loop {
            self.driver.turn(None, recording.wait())?;
            if let Some(end) = recording.step(Instant::now(), &self.driver)? {
                return Ok(end);
            }
        }
    }

    /// Keeps members connected and catching up until `done`, while nothing is appended.
    pub fn drive_until(&mut self, mut done: impl FnMut() -> bool) -> Result<(), ProposerError> {
        while !done() {
            self.driver.turn(None, SHORT_TURN)?;
            self.driver.check()?;
        }
        Ok(())
    }

    /// Reads WAL `[from, to)` of this timeline from any safekeeper that has it. For small ranges:
    /// it is all in memory.
    pub fn read_wal(&mut self, from: Lsn, to: Lsn) -> Result<Vec<u8>, ProposerError> {
        // A later one than was won at first, if members were changed since.
        let term = self.driver.core().term();
        ask(&self.config, &mut self.driver, to, move |client| {
            let mut bytes = Vec::new();
            let end = client.read_wal(from, to, term, &mut bytes)?;
            match end == to {
                true => Ok(bytes),
                false => Err(io::Error::other(format!("it has WAL only up to {end}"))),
            }
        })
    }

    /// Follows `source` on a thread of its own. `wake` is an eventfd that is signalled whenever
    /// the source has new WAL. `commit_lsn` is raised before the source is told, so that whoever
    /// the source lets go on already finds it there.
    pub fn run(
        mut self,
        mut source: impl WalSource + 'static,
        wake: OwnedFd,
        commit_lsn: Arc<AtomicU64>,
    ) -> Result<Proposing, ProposerError> {
        let stop_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop_fd = Arc::new(stop_fd.map_err(|error| ProposerError::System {
            what: "can't create an eventfd",
            source: error.into(),
        })?);
        for fd in [wake.as_fd(), stop_fd.as_fd()] {
            self.driver.network.watch_signals(fd)?;
        }
        let mut following = Following::new(&self.driver, Arc::clone(&commit_lsn), Instant::now());
        let (stop, problem) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { stop, commit_lsn, stop_fd, problem });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("proposer".into())
                .spawn(move || {
                    // Watched as long as it is open.
                    let _wake = wake;
                    follow(&mut following, &mut self.driver, &mut source, &shared)
                })
                .map_err(ProposerError::system("can't start a thread"))?
        };
        Ok(Proposing { shared, thread: Some(thread) })
    }
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    commit_lsn: Arc<AtomicU64>,
    stop_fd: Arc<OwnedFd>,
    problem: Mutex<Option<String>>,
}

/// The running proposer. Dropping it stops the thread.
#[derive(Debug)]
pub struct Proposing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), ProposerError>>>,
}

impl Proposing {
    /// What is committed.
    pub fn commit_lsn(&self) -> Lsn {
        Lsn(self.shared.commit_lsn.load(Ordering::Acquire))
    }

    /// True if the thread has ended by itself; [`Proposing::stop`] then says why.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Why nothing can be committed now, if so.
    pub fn problem(&self) -> Option<String> {
        self.shared.problem.lock().clone()
    }

    /// Stops the thread: what isn't committed by now may or may not become so. An error says why
    /// it had already ended.
    pub fn stop(mut self) -> Result<(), ProposerError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), ProposerError> {
        self.shared.stop.store(true, Ordering::Release);
        // Full counters can't be: nobody else adds.
        let _ = rustix::io::write(&*self.shared.stop_fd, &1u64.to_ne_bytes());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            None => Ok(()),
            Some(Err(_)) => Err(ProposerError::Source(io::Error::other("it panicked"))),
        }
    }
}

impl Drop for Proposing {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn follow(
    following: &mut Following,
    driver: &mut Driver<Sockets>,
    source: &mut impl WalSource,
    shared: &Shared,
) -> Result<(), ProposerError> {
    while !shared.stop.load(Ordering::Acquire) {
        let wait = following.take(Instant::now(), driver, source)?;
        driver.turn(Some(source), wait)?;
        following.report(driver, source)?;
        if let Some(problem) = following.look(Instant::now(), driver) {
            *shared.problem.lock() = problem;
        }
    }
    Ok(())
}
