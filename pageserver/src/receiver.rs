//! Follows a safekeeper: PostgreSQL's replication protocol in, ingest out, in one thread.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pgstrata_identity::{Identity, Stream, Whom};
use pgstrata_ids::Lsn;

use crate::ingest::{Ingest, IngestError};
use crate::timeline::Timeline;

/// Longest message that a safekeeper sends us.
const MESSAGE_LIMIT: usize = 16 << 20;
const STATUS_EVERY: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a quiet connection is looked after.
const TICK: Duration = Duration::from_millis(100);
/// While somebody waits for more WAL, a safekeeper that sends none is left after so long.
const WANTED_PATIENCE: Duration = Duration::from_millis(150);
/// A safekeeper that does not answer at all is left after so long, or sooner while somebody waits for more WAL.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// One that did not do is asked after the others for so long.
const AVOIDED: Duration = Duration::from_secs(10);
/// A safekeeper that says nothing at all for so long, or stops inside a message, is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// So long a record that has begun, and of which nobody has more, is waited for before it is asked for again.
const BEGUN_PAUSE: Duration = Duration::from_millis(200);
/// How often a branch whose ancestor is behind looks whether it is to stop.
const ANCESTOR_PATIENCE: Duration = Duration::from_millis(200);
/// How soon ingest is tried again after it could not read or keep something.
const STORAGE_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_STORAGE_PAUSE: Duration = Duration::from_secs(1);
/// How often safekeepers are asked for a timeline that none of them has, while nobody wants its WAL and nobody is heard
/// to have it.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);
/// How soon it is noticed that one has it.
const UNKNOWN_TICK: Duration = Duration::from_millis(500);
/// SQLSTATE of a safekeeper that has no such timeline.
const NO_SUCH_TIMELINE: &str = "3D000";
const PROTOCOL_3: u32 = 196_608;
/// A start-up packet that asks for TLS.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

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
    let mut pause = STORAGE_PAUSE;
    let mut refused = Refused::default();
    let mut failed = HashMap::new();
    while !timeline.is_stopping() {
        if let Err(error) = timeline.wait(timeline.info.start_lsn, ANCESTOR_PATIENCE) {
            tracing::debug!(timeline = %timeline.info.id, "ingest waits: {error}");
            continue;
        }
        let before = timeline.progress.lsn();
        let followed =
            Ingest::new(Arc::clone(timeline)).map_err(IngestError::Storage).and_then(|ingest| {
                follow_with(timeline, safekeepers, ingest, &mut refused, &mut failed)
            });
        match followed {
            Ok(()) => {}
            Err(IngestError::Wal(error)) => return timeline.fail(format!("{error:#}")),
            // The source is known to be bad by now, and others are asked.
            Err(IngestError::Bytes(_)) => {}
            Err(IngestError::Storage(error)) => {
                timeline.stall(format!("{error:#}"));
                let moved = timeline.progress.lsn() > before;
                pause = if moved { STORAGE_PAUSE } else { (pause * 2).min(LONGEST_STORAGE_PAUSE) };
                std::thread::sleep(pause);
            }
        }
    }
}

/// Sources whose bytes were no WAL, at the position at which ingest is now.
#[derive(Default)]
struct Refused {
    at: Lsn,
    sources: BTreeMap<String, String>,
}

impl Refused {
    /// Whether this one may be asked. Forgets what was of an earlier position.
    fn allows(&mut self, position: Lsn, address: &str) -> bool {
        if self.at != position {
            self.sources.clear();
            self.at = position;
        }
        !self.sources.contains_key(address)
    }

    fn note(&mut self, position: Lsn, address: &str, reason: String) {
        self.allows(position, address);
        self.sources.insert(address.to_owned(), reason);
    }

    fn text(&self) -> String {
        let each = self.sources.iter().map(|(address, reason)| format!("{address}: {reason}"));
        each.collect::<Vec<_>>().join("; ")
    }
}

fn follow_with(
    timeline: &Arc<Timeline>,
    safekeepers: &dyn Safekeepers,
    mut ingest: Ingest,
    refused: &mut Refused,
    failed: &mut HashMap<String, Instant>,
) -> Result<(), IngestError> {
    let identity = safekeepers.identity();
    let mut pause = Duration::from_millis(20);
    // Who gave the beginning of the record that ingest is within.
    let mut begun_by: Option<String> = None;
    while !timeline.is_stopping() {
        let before = ingest.position();
        let mut candidates = safekeepers.candidates(timeline);
        let known = candidates.len();
        candidates.retain(|address| refused.allows(timeline.progress.lsn(), address));
        if candidates.is_empty() && known > 0 {
            // None of them has it as it must be. One may be repaired, or another may come.
            timeline.stall(format!("no safekeeper has the WAL that follows: {}", refused.text()));
            std::thread::sleep(LONGEST_STORAGE_PAUSE);
            refused.sources.clear();
            continue;
        }
        // Those that failed last come last: one that hangs would be the best by what is known of it.
        let mut unknown = 0;
        failed.retain(|_, at| at.elapsed() < AVOIDED);
        candidates.sort_by_key(|address| failed.get(address).copied());
        for address in candidates {
            let whole = timeline.progress.lsn();
            let is_within = ingest.position() > whole;
            let is_begun_by_another = is_within && begun_by.as_ref() != Some(&address);
            let fed = ingest.position();
            let streamed = stream(timeline, &mut ingest, &address, identity.as_ref());
            let is_same_record = is_begun_by_another && timeline.progress.lsn() == whole;
            if ingest.position() > fed && !is_same_record {
                begun_by = Some(address.clone());
            }
            match streamed {
                Ok(()) => {}
                // The one may have begun a record that was never committed, and was given up with it.
                Err(Ended::Ingest(IngestError::Bytes(_))) if is_same_record => {
                    failed.extend(begun_by.map(|begun_by| (begun_by, Instant::now())));
                    return Ok(());
                }
                Err(Ended::Stream(error)) => {
                    tracing::debug!(timeline = %timeline.info.id, address, "{error:#}");
                    unknown += usize::from(error.is::<Unknown>());
                    failed.insert(address, Instant::now());
                }
                Err(Ended::Ingest(error)) => {
                    if let IngestError::Bytes(reason) = &error {
                        let at = timeline.progress.lsn();
                        let text = format!("after {at} it sent what is no WAL: {reason:#}");
                        tracing::error!(timeline = %timeline.info.id, "safekeeper {address}: {text}");
                        timeline.note_bad_source(&address, text.clone());
                        refused.note(at, &address, text);
                    }
                    return Err(error);
                }
            }
            if timeline.is_stopping() || ingest.position() > before {
                break;
            }
        }
        ingest.freeze_if_due(false);
        if ingest.position() > before {
            pause = Duration::from_millis(20);
        } else if ingest.position() > timeline.progress.lsn() && !timeline.is_stopping() {
            // Nobody has more of a record that has begun: it may not be of the log that goes on. It is asked for again.
            timeline.progress.wait_until_wanted(BEGUN_PAUSE);
            return Ok(());
        } else if known > 0 && unknown == known {
            wait_until_known(timeline, safekeepers);
        } else {
            timeline.progress.wait_until_wanted(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
    ingest.freeze_if_due(true);
    Ok(())
}

/// Waits until the timeline may be somewhere: nobody has it before its first compute.
fn wait_until_known(timeline: &Timeline, safekeepers: &dyn Safekeepers) {
    let since = Instant::now();
    loop {
        timeline.progress.wait_until_wanted(UNKNOWN_TICK);
        let is_over = timeline.is_stopping()
            || timeline.progress.is_wanted()
            || safekeepers.is_known(timeline)
            || since.elapsed() > UNKNOWN_PAUSE;
        if is_over {
            return;
        }
    }
}

/// A safekeeper has no such timeline.
#[derive(Debug)]
struct Unknown(String);

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why following one safekeeper ended.
enum Ended {
    /// The connection: another one, or the same later, may do.
    Stream(anyhow::Error),
    /// Ingest. Unless it was the bytes, the WAL would be the same everywhere.
    Ingest(IngestError),
}

fn stream(
    timeline: &Arc<Timeline>,
    ingest: &mut Ingest,
    address: &str,
    identity: Option<&Identity>,
) -> Result<(), Ended> {
    let mut connection = Connection::start(timeline, ingest.position(), address, identity)
        .with_context(|| format!("safekeeper {address}"))
        .map_err(Ended::Stream)?;
    let mut sent = Instant::now();
    let (mut heard, mut alive) = (Instant::now(), Instant::now());
    let mut reported = Lsn::INVALID;
    let mut message = Vec::new();
    while !timeline.is_stopping() {
        let remote = timeline.remote_consistent_lsn();
        if sent.elapsed() >= STATUS_EVERY || remote != reported {
            connection.send_status(timeline.progress.lsn(), remote).map_err(Ended::Stream)?;
            (sent, reported) = (Instant::now(), remote);
        }
        match connection.read_message(&mut message) {
            Ok(true) => alive = Instant::now(),
            Ok(false) => {
                // Nothing is left to do, so nothing is in the way.
                timeline.go_on();
                ingest.freeze_if_due(false);
                if timeline.progress.is_wanted() && heard.elapsed() > WANTED_PATIENCE {
                    return Err(Ended::Stream(anyhow::anyhow!("it lags: others may have more")));
                }
                if alive.elapsed() > SILENCE {
                    return Err(Ended::Stream(anyhow::anyhow!("no word for {SILENCE:?}")));
                }
                continue;
            }
            Err(error) => return Err(Ended::Stream(error.into())),
        }
        match message.split_first() {
            Some((b'w', body)) if body.len() >= 24 => {
                let mut start = [0; 8];
                start.copy_from_slice(&body[..8]);
                let start = Lsn(u64::from_be_bytes(start));
                if start != ingest.position() {
                    let expected = ingest.position();
                    let text = format!("WAL from {start} came instead of {expected}");
                    return Err(Ended::Stream(anyhow::anyhow!(text)));
                }
                ingest.feed(&body[24..]).map_err(Ended::Ingest)?;
                timeline.go_on();
                heard = Instant::now();
            }
            Some((b'k', body)) if body.len() >= 17 => {
                if body[16] != 0 {
                    sent = Instant::now() - STATUS_EVERY;
                }
            }
            other => {
                let kind = other.map(|(kind, _)| *kind as char);
                return Err(Ended::Stream(anyhow::anyhow!("unknown replication message {kind:?}")));
            }
        }
    }
    Ok(())
}

/// Connects to a safekeeper's PostgreSQL port, with TLS where we have an identity to show.
fn connect(address: &str, identity: Option<&Identity>) -> Result<Stream> {
    let mut tcp = pgstrata_dial::dial(address, CONNECT_TIMEOUT)?;
    tcp.set_nodelay(true)?;
    let Some(identity) = identity else { return Ok(Stream::from(tcp)) };
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    tcp.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    tcp.write_all(&SSL_REQUEST)?;
    let mut answer = [0];
    tcp.read_exact(&mut answer)?;
    ensure!(
        answer == *b"S",
        "it does not speak TLS, and this page server has a certificate to show"
    );
    let config = identity.client(Whom::Safekeeper(None), &[b"postgresql"]);
    let host = pgstrata_dial::host(address);
    Ok(Stream::connect(tcp, config, host, deadline)?)
}

/// A replication connection in copy mode.
struct Connection {
    reader: BufReader<Stream>,
    writer: Stream,
}

impl Connection {
    fn start(
        timeline: &Timeline,
        from: Lsn,
        address: &str,
        identity: Option<&Identity>,
    ) -> Result<Connection> {
        let writer = connect(address, identity)?;
        writer.set_read_timeout(Some(TICK))?;
        // One that takes nothing has long been silent.
        writer.set_write_timeout(Some(SILENCE))?;
        let reader = BufReader::with_capacity(256 * 1024, writer.clone());
        let mut connection = Connection { reader, writer };

        let info = &timeline.info;
        let options = format!(
            "-c pgstrata.role=pageserver -c pgstrata.tenant={} -c pgstrata.timeline={}",
            info.tenant, info.id
        );
        let mut body = PROTOCOL_3.to_be_bytes().to_vec();
        for text in [
            "user",
            "pageserver",
            "replication",
            "true",
            "application_name",
            "pageserver",
            "options",
            &options,
        ] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        let length = (body.len() as u32 + 4).to_be_bytes();
        connection.writer.write_all(&[&length[..], &body].concat())?;
        connection.expect(b'Z', timeline)?;
        connection
            .send(b'Q', format!("START_REPLICATION PHYSICAL {from} TIMELINE 1\0").as_bytes())?;
        connection.expect(b'W', timeline)?;
        Ok(connection)
    }

    fn send(&mut self, kind: u8, body: &[u8]) -> io::Result<()> {
        let length = (body.len() as u32 + 4).to_be_bytes();
        self.writer.write_all(&[&[kind][..], &length, body].concat())
    }

    fn send_status(&mut self, received: Lsn, flushed: Lsn) -> Result<()> {
        let mut body = vec![b'r'];
        for lsn in [received, flushed, flushed] {
            body.extend_from_slice(&lsn.0.to_be_bytes());
        }
        body.extend_from_slice(&[0; 9]);
        Ok(self.send(b'd', &body)?)
    }

    /// Skips messages until one of this kind; an error response is an error.
    fn expect(&mut self, wanted: u8, timeline: &Timeline) -> Result<()> {
        let since = Instant::now();
        let mut body = Vec::new();
        let is_over = |elapsed: Duration| {
            elapsed > ANSWER_PATIENCE
                || (elapsed > WANTED_PATIENCE && timeline.progress.is_wanted())
        };
        while !is_over(since.elapsed()) {
            match self.read_any(&mut body)? {
                Some(kind) if kind == wanted => return Ok(()),
                Some(b'E') if error_field(&body, b'C').as_deref() == Some(NO_SUCH_TIMELINE) => {
                    return Err(anyhow::Error::msg(Unknown(error_text(&body))));
                }
                Some(b'E') => bail!("{}", error_text(&body)),
                _ => {}
            }
        }
        bail!("no answer")
    }

    /// Reads the next message. `None` if nothing came in time.
    fn read_any(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u8>> {
        let mut kind = [0];
        match self.reader.read(&mut kind) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let mut length = [0; 4];
        self.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length) as usize;
        if !(4..=MESSAGE_LIMIT).contains(&length) {
            return Err(io::Error::other(format!("a message of {length} bytes")));
        }
        body.resize(length - 4, 0);
        let mut filled = std::mem::take(body);
        let result = self.read_exact(&mut filled);
        *body = filled;
        result.map(|()| Some(kind[0]))
    }

    /// As `Read::read_exact`, but a pause inside a message is no error until it gets too long.
    fn read_exact(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        let deadline = Instant::now() + SILENCE;
        while !bytes.is_empty() {
            match self.reader.read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => bytes = &mut bytes[count..],
                Err(error)
                    if Instant::now() < deadline
                        && matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock
                                | io::ErrorKind::TimedOut
                                | io::ErrorKind::Interrupted
                        ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads the next piece of the copy stream. False if nothing came in time.
    fn read_message(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        match self.read_any(body)? {
            Some(b'd') => Ok(true),
            Some(b'E') => Err(io::Error::other(error_text(body))),
            Some(b'c' | b'C' | b'Z') => Err(io::Error::other("the safekeeper ended the stream")),
            _ => Ok(false),
        }
    }
}

/// The message field of an error response.
fn error_text(body: &[u8]) -> String {
    error_field(body, b'M').unwrap_or_else(|| "an error without a text".into())
}

/// A field of an error response.
fn error_field(body: &[u8], kind: u8) -> Option<String> {
    let text = body.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(&[kind]))?;
    Some(String::from_utf8_lossy(text).into())
}
