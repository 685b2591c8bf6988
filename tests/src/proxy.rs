//! A proxy in front of an S3 server, that delays, refuses and cuts on command.
//!
//! It knows as much of HTTP as it needs to: a request has a head and a body of a given length, and the server ends its
//! connection after one answer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What becomes of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They pass.
    Pass,
    /// Writes of timelines' indexes take so much longer; everything else passes.
    SlowIndexes(Duration),
    /// They are answered with 503, and nobody else hears of them.
    Refuse,
    /// Connections end in the middle of a request, so that it is not performed, or of the answer, so that it was; one
    /// request of four passes, for what is written after a lost answer is what goes wrong.
    Cut,
}

/// How long either side may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of a request's head, at most.
const HEAD_LIMIT: usize = 64 * 1024;

struct Shared {
    server: SocketAddr,
    mode: Mutex<Mode>,
    ended: AtomicBool,
    serial: AtomicU64,
    disturbed: AtomicU64,
}

/// The proxy; it ends when this is dropped.
pub struct Proxy {
    /// Its URL.
    pub endpoint: String,
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts one in front of the server at this URL (`http://address:port`), that lets everything pass.
    pub fn start(server: &str) -> Proxy {
        let server = server.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            server,
            mode: Mutex::new(Mode::Pass),
            ended: AtomicBool::new(false),
            serial: AtomicU64::new(0),
            disturbed: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(client) = client else { continue };
                let shared = Arc::clone(&accepting);
                // Whatever goes wrong with a connection, its client sees it end.
                std::thread::spawn(move || drop(shared.serve(client)));
            }
        });
        Proxy { endpoint: format!("http://{address}"), address, shared }
    }

    /// What becomes of requests that begin from now on. Returns how many were delayed, refused or cut before.
    pub fn switch(&self, mode: Mode) -> u64 {
        *self.shared.mode.lock().unwrap() = mode;
        self.shared.disturbed.swap(0, Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // It waits for a connection, and gets one.
        let _ = TcpStream::connect(self.address);
    }
}

/// A request's head without the blank line, and what came after that.
fn read_head(client: &mut TcpStream) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let body = bytes.split_off(end + 4);
            bytes.truncate(end);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), body));
        }
        let length = client.read(&mut chunk)?;
        if length == 0 || bytes.len() > HEAD_LIMIT {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&chunk[..length]);
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
}

/// The same head for a server that is to end the connection after its answer.
fn for_one_request(head: &str) -> String {
    let hop = |line: &&str| {
        let name = line.split(':').next().unwrap_or_default();
        !name.eq_ignore_ascii_case("connection") && !name.eq_ignore_ascii_case("expect")
    };
    let lines: Vec<_> = head.lines().filter(hop).collect();
    lines.join("\r\n") + "\r\nconnection: close\r\n\r\n"
}

/// An answer that says, if it does not yet, that its connection ends with it.
fn with_end(answer: &[u8]) -> Vec<u8> {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return answer.to_vec();
    };
    let mut head = for_one_request(&String::from_utf8_lossy(&answer[..end])).into_bytes();
    head.extend_from_slice(&answer[end + 4..]);
    head
}

impl Shared {
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(SILENCE))?;
        client.set_write_timeout(Some(SILENCE))?;
        client.set_nodelay(true)?;
        let (head, mut body) = read_head(&mut client)?;
        let length = header(&head, "content-length").and_then(|text| text.parse().ok());
        let length: usize = length.unwrap_or_default();
        assert!(header(&head, "transfer-encoding").is_none(), "not known here: {head}");
        let mode = *self.mode.lock().unwrap();
        let turn = match mode {
            Mode::Cut => self.serial.fetch_add(1, Ordering::SeqCst) % 4,
            _ => 0,
        };
        if mode == Mode::Cut && turn == 0 {
            // In the middle of the body, or instead of the answer to a request without one.
            self.disturbed.fetch_add(1, Ordering::SeqCst);
            let rest = (length / 2).saturating_sub(body.len());
            io::copy(&mut (&client).take(rest as u64), &mut io::sink())?;
            return client.shutdown(Shutdown::Both);
        }
        let rest = length.saturating_sub(body.len()) as u64;
        (&client).take(rest).read_to_end(&mut body)?;
        if body.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if mode == Mode::Refuse {
            self.disturbed.fetch_add(1, Ordering::SeqCst);
            return client.write_all(
                b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            );
        }
        let mut line = head.split(' ');
        let (method, path) = (line.next().unwrap_or_default(), line.next().unwrap_or_default());
        if let (Mode::SlowIndexes(delay), "PUT") = (mode, method)
            && path.ends_with("/index")
        {
            self.disturbed.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(delay);
        }
        let mut server = TcpStream::connect(self.server)?;
        server.set_read_timeout(Some(SILENCE))?;
        server.set_nodelay(true)?;
        server.write_all(for_one_request(&head).as_bytes())?;
        server.write_all(&body)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        let answer = with_end(&answer);
        if mode == Mode::Cut && turn < 3 {
            self.disturbed.fetch_add(1, Ordering::SeqCst);
            client.write_all(&answer[..answer.len() / 2])?;
            return client.shutdown(Shutdown::Both);
        }
        client.write_all(&answer)
    }
}
