//! Serves the preload library: one thread a connection, which is one a backend.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pgstrata_compute_shared::{Found, NO_ENTRY, REQUEST_SIZE, Reply, Request, RequestKind};

use crate::segments::Segments;

/// The error that PostgreSQL is told; the text goes to our log.
const EIO: i32 = 5;

/// Serves the backends of one run. Dropping it ends that, with the connections' own ends.
pub struct Backends {
    ended: Arc<AtomicBool>,
    path: PathBuf,
}

impl Backends {
    /// Listens at `path`, on a thread of its own.
    pub fn start(path: PathBuf, segments: Arc<Segments>) -> io::Result<Backends> {
        let listener = UnixListener::bind(&path)?;
        let ended = Arc::new(AtomicBool::new(false));
        let backends = Backends { ended: Arc::clone(&ended), path };
        let thread = std::thread::Builder::new().name("backends".into());
        thread.spawn(move || serve(&listener, &segments, &ended))?;
        Ok(backends)
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // It waits for a connection. If there can't be one, the thread is left waiting, and nothing else.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve(listener: &UnixListener, segments: &Arc<Segments>, ended: &AtomicBool) {
    for stream in listener.incoming() {
        if ended.load(Ordering::Acquire) {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!("can't accept a connection of a backend: {error}");
                std::thread::sleep(std::time::Duration::from_millis(10));
                continue;
            }
        };
        let segments = Arc::clone(segments);
        let thread = std::thread::Builder::new().name("backend".into());
        if let Err(error) = thread.spawn(move || connection(stream, &segments)) {
            tracing::error!("can't serve a backend: {error}");
        }
    }
}

fn connection(mut stream: UnixStream, segments: &Segments) {
    let mut message = [0; REQUEST_SIZE];
    // The end of the stream is a backend's end.
    while stream.read_exact(&mut message).is_ok() {
        let Some(request) = Request::decode(&message) else {
            tracing::error!("a backend sent {message:?}, which is no request");
            return;
        };
        let result = answer(segments, &request);
        if let Err(error) = &result {
            tracing::error!("{:?} of {:?}: {error}", request.kind, request.id);
        }
        if request.kind == RequestKind::Prefetch {
            continue;
        }
        let reply = match result {
            Ok(entry) => Reply { errno: 0, entry },
            Err(error) => Reply { errno: error.raw_os_error().unwrap_or(EIO), entry: 0 },
        };
        if stream.write_all(&reply.encode()).is_err() {
            return;
        }
    }
}

fn answer(segments: &Segments, request: &Request) -> io::Result<u32> {
    let id = &request.id;
    match request.kind {
        RequestKind::Resolve => match segments.resolve(id)? {
            Found::Mapped(entry) => Ok(entry),
            Found::Local => Ok(NO_ENTRY),
        },
        RequestKind::Fill | RequestKind::Prefetch => {
            segments.fill(id, request.block, request.count).map(|()| 0)
        }
        RequestKind::ListDatabase => segments.list_database(id.spc, id.db).map(|()| 0),
        RequestKind::DropDatabase => {
            segments.drop_database(id.spc, id.db);
            Ok(0)
        }
    }
}
