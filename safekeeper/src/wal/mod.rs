//! The WAL port: proposers append, peers and proposers read.
//!
//! One blocking thread per connection. Whatever the socket has is read and written, then synced
//! once, then acknowledged once: nothing is handed from thread to thread on the way.

mod connection;
pub mod conversation;

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use pgstrata_listen::{Place, Security, Shares, Sparing};

use self::connection::Connection;
use crate::pace::Pace;
use crate::timelines::Timelines;

/// What connections may take of the port.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most at once; more are closed when they arrive.
    pub connections: usize,
    /// Most of one peer.
    pub of_one_peer: usize,
    /// Most that have not said yet which timeline they are about. When there is another one, the
    /// oldest of them is closed.
    pub pending: usize,
    /// The first message must have come whole by then.
    pub greeting: Duration,
    /// Silence after which a connection is closed. Proposers ping every second.
    pub idle: Duration,
    /// A message that has begun must have come whole by then.
    pub message: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 1024,
            of_one_peer: 768,
            pending: 128,
            greeting: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            message: Duration::from_secs(30),
        }
    }
}

/// A connection's place, and what ends it while it has not said what it is about.
#[derive(Debug)]
pub struct Waiting {
    /// A copy of its socket, until it has.
    socket: Mutex<Option<TcpStream>>,
    /// Given back when the connection ends, or is told to.
    place: Mutex<Option<Place>>,
}

impl Waiting {
    /// It has said it.
    fn is_over(&self) {
        drop(self.socket.lock().take());
    }

    fn is_on(&self) -> bool {
        self.socket.lock().is_some()
    }

    /// Ends the connection, unless it has said it.
    fn end(&self) {
        if let Some(socket) = self.socket.lock().take() {
            // Its thread then ends by itself.
            let _ = socket.shutdown(std::net::Shutdown::Both);
            drop(self.place.lock().take());
        }
    }
}

/// What is served, to whom.
#[derive(Clone)]
pub struct Served {
    /// The timelines.
    pub timelines: Arc<Timelines>,
    /// Who is let in.
    pub security: Security,
    /// What connections may take.
    pub limits: Limits,
    /// How fast WAL is taken that is missing here.
    pub pace: Arc<Pace>,
}

/// Accepts connections on threads of its own, one for each address that is listened on, for ever.
pub fn serve(listeners: Vec<TcpListener>, served: Served) -> io::Result<()> {
    let shares = Shares::new(served.limits.of_one_peer, served.limits.connections);
    let accept = Accept { served, shares, pending: Arc::default() };
    for listener in listeners {
        let accept = accept.clone();
        std::thread::Builder::new()
            .name("wal-accept".into())
            .spawn(move || accept.run(&listener))?;
    }
    Ok(())
}

static NOT_LET_IN: Sparing = Sparing::new();

#[derive(Clone)]
struct Accept {
    served: Served,
    shares: Shares,
    /// Oldest first; those that have greeted or are gone stay until they are met.
    pending: Arc<Mutex<VecDeque<Weak<Waiting>>>>,
}

impl Accept {
    fn run(self, listener: &TcpListener) {
        for stream in listener.incoming() {
            let started = stream.and_then(|stream| self.start(stream));
            if let Err(error) = started {
                NOT_LET_IN.refused("WAL", None, &error);
                // Out of descriptors or threads: don't spin until there are some again.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn start(&self, stream: TcpStream) -> io::Result<()> {
        let peer = stream.peer_addr()?;
        let mut pending = self.pending.lock();
        self.make_room(&mut pending);
        let place = self.shares.take(peer.ip()).map_err(io::Error::other)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.served.limits.greeting))?;
        stream.set_write_timeout(Some(self.served.limits.idle))?;
        let waiting = Arc::new(Waiting {
            socket: Mutex::new(Some(stream.try_clone()?)),
            place: Mutex::new(Some(place)),
        });
        pending.push_back(Arc::downgrade(&waiting));
        drop(pending);
        let served = self.served.clone();
        let run = move || {
            let accepted = served.security.accept(stream, served.limits.greeting);
            let (stream, shown) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => return NOT_LET_IN.not_let_in("WAL", peer, &error),
            };
            let connection = Connection::new(stream, shown, waiting, &served);
            if let Err(error) = connection.run() {
                let is_said = conversation::is_said_of_the_disk(&error);
                let error = format!("{error:#}");
                match is_said {
                    true => tracing::debug!(%peer, error, "WAL connection ended"),
                    false => tracing::info!(%peer, error, "WAL connection ended"),
                }
            }
        };
        std::thread::Builder::new().name("wal-connection".into()).spawn(run).map(|_| ())
    }

    /// Closes those that have waited longest without a word, so that they keep nobody out.
    fn make_room(&self, pending: &mut VecDeque<Weak<Waiting>>) {
        pending.retain(|waiting| waiting.upgrade().is_some_and(|waiting| waiting.is_on()));
        while pending.len() >= self.served.limits.pending {
            if let Some(waiting) = pending.pop_front().and_then(|oldest| oldest.upgrade()) {
                waiting.end();
            }
        }
    }
}
