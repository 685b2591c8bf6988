//! The page server's client: blocking connections, one request at a time on each.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgstrata_dial::dial_to;
use pgstrata_identity::{Identity, Stream, Whom};
use pgstrata_ids::{Fork, Lsn, RelTag, TenantId, TimelineId};
use pgstrata_wire::pages::{Hello, PAGES, PagesReply, PagesRequest, Query, REPLY_SIZE, Status};

use crate::places::{Pageserver, Places};

/// Idle connections kept.
const IDLE_LIMIT: usize = 16;
/// A page server that restarts is waited for this long before PostgreSQL gets an I/O error.
const PATIENCE: Duration = Duration::from_secs(60);
/// All addresses of a page server must have taken a connection by then, or another one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REPLY_TIMEOUT: Duration = Duration::from_secs(90);

/// Pages of one timeline as of one LSN.
pub struct PageClient {
    places: Arc<Places>,
    identity: Option<Identity>,
    hello: Hello,
    /// As of when pages are asked for: nothing that this compute changes is ever fetched again,
    /// so one LSN is right for all its life.
    lsn: Lsn,
    idle: Mutex<Vec<Stream>>,
}

enum Answer {
    Body(Vec<u8>),
    NoRelation,
    Refused(String),
}

impl PageClient {
    /// A client of the page server, wherever that is.
    pub fn new(
        places: Arc<Places>,
        identity: Option<Identity>,
        tenant: TenantId,
        timeline: TimelineId,
        lsn: Lsn,
    ) -> PageClient {
        let hello = Hello { versions: PAGES.speaks, tenant, timeline };
        PageClient { places, identity, hello, lsn, idle: Mutex::default() }
    }

    /// Connects to the first that takes us.
    fn connect(&self) -> io::Result<Stream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, self.places.describe());
        for Pageserver { pages, .. } in self.places.pageservers() {
            match self.connect_to(&pages) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = io::Error::new(error.kind(), format!("{pages}: {error}")),
            }
        }
        Err(last)
    }

    fn connect_to(&self, address: &str) -> io::Result<Stream> {
        let identity = self.identity.as_ref();
        let mut stream = dial_to(address, Whom::Pageserver, identity, CONNECT_TIMEOUT)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        stream.write_all(&self.hello.encode())?;
        let reply = read_head(&mut stream)?;
        match read_body(&mut stream, reply)? {
            Answer::Refused(text) => Err(io::Error::other(text)),
            _ => PAGES.answered(reply.chosen()).map_err(io::Error::other).map(|_| stream),
        }
    }

    fn ask_once(&self, query: Query) -> io::Result<Answer> {
        let idle = self.idle.lock().pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => self.connect()?,
        };
        stream.write_all(&PagesRequest { number: 1, lsn: self.lsn, query }.encode())?;
        let reply = read_head(&mut stream)?;
        let answer = read_body(&mut stream, reply)?;
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_LIMIT {
            idle.push(stream);
        }
        Ok(answer)
    }

    /// Asks until there is an answer or patience ends: a page server may be restarting.
    fn ask(&self, query: Query) -> io::Result<Answer> {
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(10);
        loop {
            match self.ask_once(query) {
                Ok(Answer::Refused(text)) => return Err(io::Error::other(text)),
                Ok(answer) => return Ok(answer),
                Err(error) if std::time::Instant::now() + pause > deadline => return Err(error),
                Err(error) => {
                    tracing::warn!("page server {error}; trying again");
                    // Connections opened before a restart are all dead.
                    self.idle.lock().clear();
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
            }
        }
    }

    /// `count` pages from `block` on, fewer at the relation's end.
    pub fn pages(&self, rel: RelTag, block: u32, count: u32) -> io::Result<Vec<u8>> {
        match self.ask(Query::Pages { rel, block, count })? {
            Answer::Body(pages) if pages.len() % 8192 == 0 => Ok(pages),
            Answer::Body(_) => Err(io::Error::other("the page server sent a part of a page")),
            _ => Err(io::Error::other(format!("the page server has no relation {rel}"))),
        }
    }

    /// The relation fork's size in blocks; `None` if there is none.
    pub fn size(&self, rel: RelTag) -> io::Result<Option<u32>> {
        match self.ask(Query::Size { rel })? {
            Answer::Body(body) => match body.try_into() {
                Ok(bytes) => Ok(Some(u32::from_le_bytes(bytes))),
                Err(_) => Err(io::Error::other("the page server sent no size")),
            },
            _ => Ok(None),
        }
    }

    /// All relation forks of a database directory, with their sizes in blocks.
    pub fn relations(&self, spc: u32, db: u32) -> io::Result<Vec<(RelTag, u32)>> {
        let Answer::Body(body) = self.ask(Query::Relations { spc, db })? else {
            return Ok(Vec::new());
        };
        let word = |chunk: &[u8], at: usize| {
            u32::from_le_bytes([chunk[at], chunk[at + 1], chunk[at + 2], chunk[at + 3]])
        };
        let mut relations = Vec::new();
        for chunk in body.chunks_exact(12) {
            let fork = u8::try_from(word(chunk, 4)).ok().and_then(Fork::from_number);
            let fork = fork.ok_or_else(|| io::Error::other("the page server sent a wrong fork"))?;
            relations.push((RelTag { spc, db, rel: word(chunk, 0), fork }, word(chunk, 8)));
        }
        Ok(relations)
    }
}

fn read_head(stream: &mut Stream) -> io::Result<PagesReply> {
    let mut head = [0; REPLY_SIZE];
    stream.read_exact(&mut head)?;
    PagesReply::decode(&head).map_err(io::Error::other)
}

fn read_body(stream: &mut Stream, reply: PagesReply) -> io::Result<Answer> {
    let mut body = vec![0; reply.length as usize];
    stream.read_exact(&mut body)?;
    Ok(match reply.status {
        Status::Done => Answer::Body(body),
        Status::NoRelation => Answer::NoRelation,
        Status::Error => Answer::Refused(String::from_utf8_lossy(&body).into_owned()),
    })
}
