//! Winning a term, and what the winner does.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use pgstrata_ids::{Lsn, NodeId, Term};
use pgstrata_wal_client::SafekeeperClient;
use rustix::event::{EventfdFlags, eventfd};

use super::config::{ProposerConfig, ProposerError, WalChunk, WalSource};
use super::driver::Driver;
use super::sockets::Sockets;

/// Longest wait of one turn while something is waited for.
const TURN: Duration = Duration::from_millis(50);

/// Longest wait for one answer of a safekeeper that WAL is read from.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// After a quorum could not answer, others are waited for so long.
const ASK_GRACE: Duration = Duration::from_millis(20);

/// Longest wait until any safekeeper has answered, which may have to catch up first.
const ASK_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest wait for members that are slow to take the commit LSN.
const ANNOUNCE_PATIENCE: Duration = Duration::from_millis(20);

/// How often it is looked at whether commits are possible.
const LOOK_AFTER: Duration = Duration::from_millis(100);

/// Pieces taken from the source before sockets are looked at again.
const MAX_PIECES_PER_TURN: usize = 8;

/// A term that was won.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elected {
    /// The term.
    pub term: Term,
    /// Where this term's first record goes: a record boundary, the end of the donor's log.
    pub start_lsn: Lsn,
    /// Start of the last record before `start_lsn`, for its `xl_prev`; `None` if this timeline
    /// has no record yet.
    pub prev_record_lsn: Option<Lsn>,
    /// What was known to be committed by the voters. Everything up to `start_lsn` is once the
    /// first record of this term is.
    pub commit_lsn: Lsn,
    /// The safekeeper whose log is continued.
    pub donor: NodeId,
}

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
    let deadline = Instant::now() + timeout;
    let mut driver = Driver::of_sockets(config.clone(), before)?;
    let election = loop {
        driver.turn(None, TURN)?;
        if let Some(term) = driver.fenced() {
            if before.is_some() {
                return Err(ProposerError::Fenced(term));
            }
            pause_before_retry(&config, term);
            driver.campaign_above(term);
        } else if let Some(election) = driver.election() {
            break election.clone();
        }
        if driver.is_refused() {
            return Err(ProposerError::Refused { details: driver.describe() });
        }
        if Instant::now() >= deadline {
            let details = driver.describe();
            return Err(ProposerError::NoQuorum { seconds: timeout.as_secs(), details });
        }
    };
    let mut elected = Elected {
        term: election.term,
        start_lsn: election.start_lsn,
        prev_record_lsn: None,
        commit_lsn: election.commit_lsn,
        donor: election.donor.node,
    };
    if elected.start_lsn > config.parameters.start_lsn {
        let start_lsn = elected.start_lsn;
        elected.prev_record_lsn =
            ask(&config, &mut driver, start_lsn, move |client| client.last_record(start_lsn))?;
    }
    Ok(Leader { driver, config, elected })
}

/// Two computes that outrank each other in turn must not keep step.
fn pause_before_retry(config: &ProposerConfig, term: Term) {
    let spread = u64::from(config.id.0[term.0 as usize % 16]) % 64;
    std::thread::sleep(Duration::from_millis(5 + spread));
}

/// Asks every safekeeper that has the log up to `lsn`, all at once, and takes the first answer: one that hangs keeps
/// nobody waiting, and the links to all are served meanwhile.
fn ask<T: Send + 'static>(
    config: &ProposerConfig,
    driver: &mut Driver<Sockets>,
    lsn: Lsn,
    question: impl Fn(&mut SafekeeperClient) -> io::Result<T> + Clone + Send + 'static,
) -> Result<T, ProposerError> {
    let (tenant, timeline) = (config.parameters.tenant, config.parameters.timeline);
    let deadline = Instant::now() + ASK_TIMEOUT;
    let (sender, answers) = channel();
    let mut asked: Vec<NodeId> = Vec::new();
    let mut failed = 0;
    let mut failed_at = Instant::now();
    let mut details = String::new();
    loop {
        for (node, address) in driver.holders(lsn) {
            if asked.contains(&node) {
                continue;
            }
            asked.push(node);
            let (sender, question) = (sender.clone(), question.clone());
            let identity = config.identity.clone();
            let thread = std::thread::Builder::new().name("ask".into());
            let spawned = thread.spawn(move || {
                let identity = identity.as_ref();
                let answer =
                    SafekeeperClient::connect(&address, Some(node), identity, READ_TIMEOUT);
                let answer = answer.and_then(|mut client| {
                    client.open(tenant, timeline)?;
                    question(&mut client)
                });
                // Nobody waits any more if another one was faster.
                let _ = sender.send((node, answer));
            });
            spawned.map_err(ProposerError::system("can't start a thread"))?;
        }
        driver.turn(None, Duration::from_millis(1))?;
        driver.check()?;
        while let Ok((node, answer)) = answers.try_recv() {
            match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    failed += 1;
                    failed_at = Instant::now();
                    let _ = write!(details, "safekeeper {node}: {error}; ");
                }
            }
        }
        // What so many say, the others will say too; those that are about to have the log get a moment.
        let members = driver.configuration();
        let is_quorum = members.is_quorum(|member| asked.contains(&member.node));
        let all_failed = is_quorum && failed == asked.len() && failed_at.elapsed() > ASK_GRACE;
        if all_failed || Instant::now() >= deadline {
            let _ = write!(details, "{}", driver.describe());
            return Err(ProposerError::Unreadable { at: lsn, details });
        }
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
        let start = self.driver.end_lsn();
        let end = start + bytes.len() as u64;
        self.driver.append(Instant::now(), WalChunk { start, bytes, record_end: end })?;
        let deadline = Instant::now() + timeout;
        while self.driver.commit_lsn() < end {
            self.driver.turn(None, TURN)?;
            self.driver.check()?;
            if Instant::now() >= deadline {
                return Err(ProposerError::NotCommitted {
                    what: format!("the record at {start}"),
                    seconds: timeout.as_secs(),
                    details: self.driver.describe(),
                });
            }
        }
        self.announce()?;
        Ok(end)
    }

    /// Keeps members connected and catching up until `done`, while nothing is appended.
    pub fn drive_until(&mut self, mut done: impl FnMut() -> bool) -> Result<(), ProposerError> {
        while !done() {
            self.driver.turn(None, Duration::from_millis(1))?;
            self.driver.check()?;
        }
        Ok(())
    }

    /// Tells members what is committed: nothing else is about to be sent that could carry it, and
    /// readers of the safekeepers wait for it.
    fn announce(&mut self) -> Result<(), ProposerError> {
        let deadline = Instant::now() + ANNOUNCE_PATIENCE;
        while !self.driver.everyone_told() && Instant::now() < deadline {
            self.driver.turn(None, Duration::from_millis(1))?;
        }
        self.driver.turn(None, Duration::ZERO)
    }

    /// Reads WAL `[from, to)` of this timeline from any safekeeper that has it. For small ranges:
    /// it is all in memory.
    pub fn read_wal(&mut self, from: Lsn, to: Lsn) -> Result<Vec<u8>, ProposerError> {
        let term = self.elected.term;
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
        commit_lsn.store(self.driver.commit_lsn().0, Ordering::Release);
        let (stop, problem) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { stop, commit_lsn, stop_fd, problem });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("proposer".into())
                .spawn(move || {
                    // Watched as long as it is open.
                    let _wake = wake;
                    follow(&mut self.driver, &mut source, &shared)
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
    driver: &mut Driver<Sockets>,
    source: &mut impl WalSource,
    shared: &Shared,
) -> Result<(), ProposerError> {
    let mut reported = driver.commit_lsn();
    let mut looked_at = Instant::now();
    let most = driver.most_in_a_chunk();
    while !shared.stop.load(Ordering::Acquire) {
        let mut more = false;
        for piece in 0..MAX_PIECES_PER_TURN {
            if !driver.has_room() {
                break;
            }
            let Some(chunk) = source.poll_wal(most).map_err(ProposerError::Source)? else {
                break;
            };
            driver.append(Instant::now(), chunk)?;
            more = piece + 1 == MAX_PIECES_PER_TURN;
        }
        more |= driver.has_room() && source.has_more();
        // Timers bound the wait.
        let wait = if more { Duration::ZERO } else { Duration::from_secs(1) };
        driver.turn(Some(source), wait)?;
        if let Some(term) = driver.fenced() {
            source.on_fenced(term);
            return Err(ProposerError::Fenced(term));
        }
        driver.check()?;
        if looked_at.elapsed() > LOOK_AFTER {
            looked_at = Instant::now();
            *shared.problem.lock() = driver.problem();
        }
        let commit_lsn = driver.commit_lsn();
        if commit_lsn > reported {
            reported = commit_lsn;
            shared.commit_lsn.store(commit_lsn.0, Ordering::Release);
            source.on_commit(commit_lsn);
        }
    }
    Ok(())
}
