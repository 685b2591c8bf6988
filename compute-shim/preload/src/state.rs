//! What a process knows: the shared memory, the environment it was started with, and its tracked
//! descriptors.

use std::ffi::CStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use pgstrata_compute_shared::{
    CONTROL_FILE, ENV_DATA, ENV_EVENT, ENV_MEMORY, ENV_READ_ONLY, ENV_SOCKET, SharedMap,
};

use crate::{interrupts, sys};

/// PostgreSQL overwrites its environment for process titles, so everything is copied out of it
/// before `main` runs.
struct Settings {
    map: SharedMap,
    event: i32,
    data: [u8; PATH_MAX],
    data_length: usize,
    socket: [u8; PATH_MAX],
    socket_length: usize,
    control_file: [u8; PATH_MAX],
    read_only: bool,
    postmaster: i32,
}

const PATH_MAX: usize = 4096;

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// A process that has the settings.
#[derive(Clone, Copy)]
pub struct State(&'static Settings);

/// `None` in a program that is not ours.
pub fn state() -> Option<State> {
    SETTINGS.get().map(State)
}

impl State {
    /// The shared memory.
    pub fn map(&self) -> &SharedMap {
        &self.0.map
    }

    /// The eventfd of the daemon.
    pub fn event(&self) -> i32 {
        self.0.event
    }

    /// The data directory.
    pub fn data(&self) -> &[u8] {
        &self.0.data[..self.0.data_length]
    }

    /// The daemon's socket.
    pub fn socket(&self) -> &[u8] {
        &self.0.socket[..self.0.socket_length]
    }

    /// The control file's real path.
    pub fn control_file(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0.control_file).unwrap_or(c"")
    }

    /// Whether the server only answers queries: nobody keeps what it would write.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// Whether the postmaster still lives: the kernel ends it when the daemon ends, and then its
    /// children get another parent. (The daemon's own process id would not tell: a process that
    /// has ended keeps its id until it is reaped.)
    pub fn has_parent(&self) -> bool {
        let parent = sys::numbers(libc::SYS_getppid, 0, 0, 0, 0) as i32;
        self.is_postmaster() || parent == self.0.postmaster
    }

    /// Whether this is the postmaster itself.
    pub fn is_postmaster(&self) -> bool {
        sys::getpid() == self.0.postmaster
    }
}

fn variable(name: &CStr) -> Option<&'static [u8]> {
    // SAFETY: the name is a C string; before main nobody changes the environment.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: getenv returns a C string.
    Some(unsafe { CStr::from_ptr(value) }.to_bytes())
}

fn number(text: &[u8]) -> Option<i32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn copy(text: &[u8]) -> Option<([u8; PATH_MAX], usize)> {
    let mut copy = [0; PATH_MAX];
    copy.get_mut(..text.len())?.copy_from_slice(text);
    Some((copy, text.len()))
}

/// The program is `postgres`, and not some command that it runs.
fn is_postgres() -> bool {
    let mut path = [0u8; PATH_MAX];
    // SAFETY: the path is a C string and the buffer is valid for its length.
    let length = unsafe {
        libc::syscall(libc::SYS_readlink, c"/proc/self/exe".as_ptr(), path.as_mut_ptr(), path.len())
    };
    let Some(path) = usize::try_from(length).ok().and_then(|length| path.get(..length)) else {
        return false;
    };
    path.ends_with(b"/postgres")
}

fn settings() -> Option<Settings> {
    let memory = variable(c_name(ENV_MEMORY, &mut [0; 64])?)?;
    let event = variable(c_name(ENV_EVENT, &mut [0; 64])?)?;
    let (data, data_length) = copy(variable(c_name(ENV_DATA, &mut [0; 64])?)?)?;
    let (socket, socket_length) = copy(variable(c_name(ENV_SOCKET, &mut [0; 64])?)?)?;
    let mut control_file = data;
    for (offset, byte) in b"/".iter().chain(CONTROL_FILE.as_bytes()).enumerate() {
        *control_file.get_mut(data_length + offset)? = *byte;
    }
    Some(Settings {
        control_file,
        map: SharedMap::map(number(memory)?).ok()?,
        event: number(event)?,
        data,
        data_length,
        socket,
        socket_length,
        read_only: variable(c_name(ENV_READ_ONLY, &mut [0; 64])?)? == b"1",
        postmaster: sys::getpid(),
    })
}

fn c_name<'a>(name: &str, buffer: &'a mut [u8; 64]) -> Option<&'a CStr> {
    buffer.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    CStr::from_bytes_until_nul(buffer).ok()
}

extern "C" fn start() {
    if !is_postgres() {
        return;
    }
    match settings() {
        Some(settings) => {
            interrupts::find_variables();
            if SETTINGS.set(settings).is_ok() {
                // SAFETY: both handlers are functions of this library, which is never unloaded.
                unsafe { libc::pthread_atfork(Some(before_fork), None, Some(after_fork)) };
            }
        }
        None => {
            // The skeleton can't be opened without us, so PostgreSQL stops by itself; say why.
            sys::complain("its environment is missing or wrong: this server can't start");
        }
    }
}

static FORKING: AtomicI32 = AtomicI32::new(0);

extern "C" fn before_fork() {
    FORKING.store(sys::getpid(), Ordering::Relaxed);
}

/// Every process ends when its parent does. PostgreSQL's own notice of a dead postmaster does not
/// reach a backend that waits for a lock, and one whose holder is gone is never released.
extern "C" fn after_fork() {
    sys::numbers(libc::SYS_prctl, libc::PR_SET_PDEATHSIG.into(), libc::SIGKILL.into(), 0, 0);
    let parent = sys::numbers(libc::SYS_getppid, 0, 0, 0, 0) as i32;
    if parent != FORKING.load(Ordering::Relaxed) {
        sys::numbers(libc::SYS_exit_group, 2, 0, 0, 0);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = start;

/// What is behind a descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tracked {
    /// Nothing of ours.
    Nothing,
    /// A mapped relation segment: its entry.
    Relation(u32),
    /// A WAL segment: its number.
    Wal(u64),
}

const DESCRIPTORS: usize = 65_536;
const KIND_RELATION: u64 = 1 << 62;
const KIND_WAL: u64 = 2 << 62;
const VALUE: u64 = (1 << 62) - 1;

static TRACKED: [AtomicU64; DESCRIPTORS] = [const { AtomicU64::new(0) }; DESCRIPTORS];
static UNTRACKABLE: AtomicUsize = AtomicUsize::new(0);

/// Remembers what a descriptor is. False if the descriptor's number is too high to remember.
pub fn track(fd: i32, what: Tracked) -> bool {
    let value = match what {
        Tracked::Nothing => 0,
        Tracked::Relation(entry) => KIND_RELATION | u64::from(entry),
        Tracked::Wal(segment) => KIND_WAL | (segment & VALUE),
    };
    match usize::try_from(fd).ok().and_then(|fd| TRACKED.get(fd)) {
        Some(tracked) => {
            tracked.store(value, Ordering::Relaxed);
            true
        }
        None => {
            UNTRACKABLE.fetch_add(1, Ordering::Relaxed);
            value == 0
        }
    }
}

/// What a descriptor is.
pub fn tracked(fd: i32) -> Tracked {
    let Some(tracked) = usize::try_from(fd).ok().and_then(|fd| TRACKED.get(fd)) else {
        return Tracked::Nothing;
    };
    let value = tracked.load(Ordering::Relaxed);
    match value & !VALUE {
        KIND_RELATION => Tracked::Relation((value & VALUE) as u32),
        KIND_WAL => Tracked::Wal(value & VALUE),
        _ => Tracked::Nothing,
    }
}

/// This process's connection to the daemon, and the process that made it: a forked child must
/// not talk on its parent's.
pub static SOCKET: AtomicI32 = AtomicI32::new(-1);
/// See [`SOCKET`].
pub static SOCKET_OWNER: AtomicI32 = AtomicI32::new(0);
