//! Requests that are made again and again, each timed: what becomes of them meanwhile.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A request over HTTP, with a deadline. Returns the status and the body.
pub fn request(
    method: &str,
    address: &str,
    path: &str,
    patience: Duration,
) -> io::Result<(u16, String)> {
    let deadline = Instant::now() + patience;
    let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), patience)?;
    stream.set_nodelay(true)?;
    let text = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    );
    stream.write_all(text.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut chunk)? {
            0 => break,
            length => answer.extend_from_slice(&chunk[..length]),
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    Ok((status, text.split_once("\r\n\r\n").unwrap_or_default().1.to_owned()))
}

/// One kind of request.
pub struct Probe {
    name: String,
    ask: Box<dyn FnMut() -> Result<(), String> + Send>,
}

impl Probe {
    /// Anything that can be asked; an error says what was wrong with the answer.
    pub fn new(
        name: impl Into<String>,
        ask: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> Probe {
        Probe { name: name.into(), ask: Box::new(ask) }
    }

    /// A GET that is to succeed.
    pub fn get(service: &str, address: &str, path: &str) -> Probe {
        let (address, asked) = (address.to_owned(), path.to_owned());
        Probe::new(format!("{service} {path}"), move || {
            match request("GET", &address, &asked, Duration::from_secs(15)) {
                Ok((200, _)) => Ok(()),
                Ok((status, text)) => Err(format!("{status}: {text}")),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}

/// What was seen of requests of one kind.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    took: Vec<Duration>,
    /// What the first one that failed was.
    pub failure: Option<String>,
}

impl Seen {
    /// How many were answered.
    pub fn count(&self) -> usize {
        self.took.len()
    }

    /// The least time within which 99 of 100 were answered.
    pub fn p99(&self) -> Duration {
        let mut took = self.took.clone();
        took.sort_unstable();
        let at = (took.len() * 99).div_ceil(100).saturating_sub(1);
        took.get(at).copied().unwrap_or(Duration::MAX)
    }

    /// The longest time.
    pub fn longest(&self) -> Duration {
        self.took.iter().max().copied().unwrap_or_default()
    }
}

#[derive(Default)]
struct Shared {
    ended: AtomicBool,
    seen: Mutex<BTreeMap<String, Seen>>,
    /// What each thread waits for, and since when.
    waiting: Mutex<BTreeMap<usize, (String, Instant)>>,
}

impl Shared {
    fn note(&self, name: &str, took: Duration, answer: Result<(), String>) {
        let mut seen = self.seen.lock().unwrap();
        let seen = seen.entry(name.to_owned()).or_default();
        seen.took.push(took);
        seen.failure = seen.failure.take().or(answer.err());
    }
}

/// Threads that ask until this is dropped.
#[derive(Default)]
pub struct Probes {
    shared: Arc<Shared>,
    threads: usize,
}

impl Probes {
    /// None yet.
    pub fn new() -> Probes {
        Probes::default()
    }

    /// Asks these, one after the other with a pause after each, on a thread of their own.
    pub fn add(&mut self, mut probes: Vec<Probe>, pause: Duration) {
        let (shared, thread) = (Arc::clone(&self.shared), self.threads);
        self.threads += 1;
        std::thread::spawn(move || {
            while !shared.ended.load(Ordering::SeqCst) {
                for probe in &mut probes {
                    let since = Instant::now();
                    shared.waiting.lock().unwrap().insert(thread, (probe.name.clone(), since));
                    let answer = (probe.ask)();
                    let took = since.elapsed();
                    shared.waiting.lock().unwrap().remove(&thread);
                    shared.note(&probe.name, took, answer);
                    if shared.ended.load(Ordering::SeqCst) {
                        return;
                    }
                    std::thread::sleep(pause);
                }
            }
        });
    }

    /// What was seen since this was called last, by name. What is not answered yet counts with how long it waits.
    pub fn take(&self) -> BTreeMap<String, Seen> {
        let mut seen = std::mem::take(&mut *self.shared.seen.lock().unwrap());
        for (name, since) in self.shared.waiting.lock().unwrap().values() {
            seen.entry(name.clone()).or_default().took.push(since.elapsed());
        }
        seen
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
    }
}
