//! Requests to the daemon, over one stream socket a process.

use std::sync::atomic::Ordering;

use pgstrata_compute_shared::path::SegmentId;
use pgstrata_compute_shared::{Found, NO_ENTRY, REPLY_SIZE, Reply, Request, RequestKind};

use crate::interrupts::Wait;
use crate::state::{SOCKET, SOCKET_OWNER, State};
use crate::{interrupts, sys};

fn connect(state: State) -> Option<i32> {
    let fd = sys::numbers(
        libc::SYS_socket,
        libc::AF_UNIX.into(),
        (libc::SOCK_STREAM | libc::SOCK_CLOEXEC).into(),
        0,
        0,
    ) as i32;
    if fd < 0 {
        return None;
    }
    // SAFETY: zeros are a valid address structure.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = state.socket();
    if path.len() >= address.sun_path.len() {
        sys::close(fd);
        return None;
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the address is valid for the length given.
    let connected = unsafe {
        libc::syscall(libc::SYS_connect, fd, &raw const address, size_of::<libc::sockaddr_un>())
    };
    if connected != 0 {
        sys::close(fd);
        return None;
    }
    SOCKET.store(fd, Ordering::Relaxed);
    SOCKET_OWNER.store(sys::getpid(), Ordering::Relaxed);
    Some(fd)
}

fn socket(state: State) -> Option<i32> {
    let fd = SOCKET.load(Ordering::Relaxed);
    if fd >= 0 {
        if SOCKET_OWNER.load(Ordering::Relaxed) == sys::getpid() {
            return Some(fd);
        }
        // The parent's connection, inherited through fork.
        sys::close(fd);
        SOCKET.store(-1, Ordering::Relaxed);
    }
    connect(state)
}

fn disconnect() {
    sys::close(SOCKET.swap(-1, Ordering::Relaxed));
}

fn send(fd: i32, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        // SAFETY: the slice is valid for its length.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_sendto,
                fd,
                bytes.as_ptr(),
                bytes.len(),
                libc::MSG_NOSIGNAL,
                0,
                0,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(_) if sys::errno() == libc::EINTR => {}
            Err(_) => return false,
        }
    }
    true
}

/// How the wait for an answer ended.
enum Received {
    Whole,
    Lost,
    /// The statement or the session is to end.
    Interrupted,
}

/// How long a waiter sleeps before it looks whether it is to give up: a signal ends the sleep earlier, unless it came
/// just before it began.
const LOOK_AFTER_MS: libc::c_int = 200;

fn receive(fd: i32, bytes: &mut [u8; REPLY_SIZE], wait: Wait) -> Received {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..)
        && !rest.is_empty()
    {
        let mut waited = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure. A call that is interrupted is not begun again, as a read would be.
        let ready = unsafe { libc::syscall(libc::SYS_poll, &raw mut waited, 1, LOOK_AFTER_MS) };
        if ready <= 0 {
            if ready < 0 && sys::errno() != libc::EINTR {
                return Received::Lost;
            }
            if interrupts::is_pending(wait) {
                return Received::Interrupted;
            }
            continue;
        }
        // SAFETY: the slice is valid for its length.
        let got = unsafe { sys::read(fd, rest.as_mut_ptr(), rest.len()) };
        match usize::try_from(got) {
            Ok(0) => return Received::Lost,
            Ok(got) => done += got,
            Err(_) if sys::errno() == libc::EINTR => {}
            Err(_) => return Received::Lost,
        }
    }
    Received::Whole
}

/// Asks, and waits for the answer. A daemon that can't be asked is an I/O error.
fn ask(state: State, request: Request, wait: Wait) -> Reply {
    let lost = Reply { errno: libc::EIO, entry: 0 };
    let Some(fd) = socket(state) else { return lost };
    let mut reply = [0; REPLY_SIZE];
    let received = match send(fd, &request.encode()) {
        true => receive(fd, &mut reply, wait),
        false => Received::Lost,
    };
    match received {
        Received::Whole => return Reply::decode(&reply),
        Received::Lost => disconnect(),
        Received::Interrupted => {
            // The answer may still come, and must not be taken for that of the next request.
            disconnect();
            interrupts::process();
            // PostgreSQL would try again after EINTR.
            return Reply { errno: libc::ECANCELED, entry: 0 };
        }
    }
    lost
}

/// Puts a segment into the table. What it is, or an error number.
pub fn resolve(state: State, id: SegmentId) -> Result<Found, i32> {
    let request = Request { kind: RequestKind::Resolve, id, block: 0, count: 0 };
    match ask(state, request, Wait::Name) {
        Reply { errno: 0, entry: NO_ENTRY } => Ok(Found::Local),
        Reply { errno: 0, entry } => Ok(Found::Mapped(entry)),
        Reply { errno, .. } => Err(errno),
    }
}

/// Brings blocks into the local file. 0, or an error number.
pub fn fill(state: State, id: SegmentId, block: u32, count: u32) -> i32 {
    ask(state, Request { kind: RequestKind::Fill, id, block, count }, Wait::Read).errno
}

/// Announces blocks that will be wanted. Nothing is lost if it can't be.
pub fn prefetch(state: State, id: SegmentId, block: u32, count: u32) {
    if let Some(fd) = socket(state) {
        let request = Request { kind: RequestKind::Prefetch, id, block, count };
        if !send(fd, &request.encode()) {
            disconnect();
        }
    }
}

/// A request about a database directory. 0, or an error number.
pub fn database(state: State, kind: RequestKind, spc: u32, db: u32) -> i32 {
    let id = SegmentId { spc, db, rel: 0, fork: 0, segment: 0 };
    ask(state, Request { kind, id, block: 0, count: 0 }, Wait::Name).errno
}
