//! The WAL port: proposers append, peers and proposers read.
//!
//! One blocking thread per connection. Whatever the socket has is read and written, then synced
//! once, then acknowledged once: nothing is handed from thread to thread on the way.

mod connection;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::timelines::Timelines;

/// Most connections at once; more are closed when they arrive.
const MAX_CONNECTIONS: usize = 1024;

/// A connection that says nothing for this long is closed. Proposers ping every second.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Accepts connections on a thread of its own, for ever.
pub fn serve(listener: TcpListener, timelines: Arc<Timelines>) -> io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new()
        .name("wal-accept".into())
        .spawn(move || accept(&listener, &timelines, &open))
        .map(|_| ())
}

fn accept(listener: &TcpListener, timelines: &Arc<Timelines>, open: &Arc<AtomicUsize>) {
    for stream in listener.incoming() {
        let started = stream.and_then(|stream| start(stream, timelines, open));
        if let Err(error) = started {
            tracing::warn!(%error, "a WAL connection could not be taken");
            // Out of descriptors or threads: don't spin until there are some again.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn start(stream: TcpStream, timelines: &Arc<Timelines>, open: &Arc<AtomicUsize>) -> io::Result<()> {
    let counted = Counted::new(open);
    if open.load(Ordering::Relaxed) > MAX_CONNECTIONS {
        return Err(io::Error::other(format!("more than {MAX_CONNECTIONS} connections")));
    }
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
    stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
    let timelines = Arc::clone(timelines);
    let run = move || {
        let _counted = counted;
        let peer = stream.peer_addr();
        if let Err(error) = connection::Connection::new(stream, timelines).run() {
            tracing::info!(?peer, %error, "WAL connection ended");
        }
    };
    std::thread::Builder::new().name("wal-connection".into()).spawn(run).map(|_| ())
}

/// One open connection.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Counted {
        open.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
