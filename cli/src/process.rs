//! Background processes of a cluster: started, found again, ended.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::{files, locks, owner};

/// Bytes of the file with its process id, and of what it says when it is ready, at most.
const NOTE_LIMIT: u64 = 1024;
const READY_LIMIT: u64 = 1 << 20;

/// Bytes of a log's end in which the last line is looked for.
const LAST_WORDS: u64 = 64 << 10;
/// How long a process may take to be gone once it was killed: what it held in memory is freed meanwhile.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

/// How long a process that is to end is waited for before anything is said.
const QUIET: Duration = Duration::from_secs(2);

/// How long a process that dies by itself is waited for, in all.
pub const DYING_PATIENCE: Duration = KILL_PATIENCE;

/// A process of a cluster, by name.
pub struct Process {
    name: String,
    run: PathBuf,
    logs: PathBuf,
}

/// Whether a process whose first thread has ended has others that have not: until they have, its
/// ports and locks are still taken.
fn has_other_threads(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// When a process started, in clock ticks since boot; `None` if there is no such process, or it
/// has ended and only waits to be reaped.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, in parentheses, may hold anything; what follows is regular.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    if matches!(fields.first(), Some(&("Z" | "X"))) && !has_other_threads(pid) {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Whether a process is stopped by a signal, so that it hears none but that which lets it go on, and that which kills it.
fn is_frozen(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('T' | 't'))
}

/// Whether a process was killed, or is ending, and is still there: while it waits for a disk, or gives memory back.
fn is_dying(pid: u32) -> bool {
    const EXITING: u32 = 4; // PF_EXITING in linux/sched.h
    const KILLED: u64 = 1 << (Signal::SIGKILL as u32 - 1);
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let fields: Vec<_> = fields.collect();
    let flags = fields.get(6).and_then(|flags| flags.parse::<u32>().ok()).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().any(|line| {
        let signals = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
        let signals = signals.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        signals.is_some_and(|mask| mask & KILLED != 0)
    });
    pending || flags & EXITING != 0 || matches!(fields.first(), Some(&("Z" | "X")))
}

/// What a process is noted with.
struct Note {
    pid: u32,
    /// When it started: another one that was given its id did so later.
    since: u64,
    /// Device and inode of the directory of the note, which a copy of it does not have. Earlier versions wrote none.
    place: Option<(u64, u64)>,
}

/// Device and inode.
fn identity(about: &fs::Metadata) -> (u64, u64) {
    (about.dev(), about.ino())
}

/// Writes this process's id and start time, and the place of the note, as [`Process::noted`] reads them. For a process that was just forked: it
/// allocates nothing.
fn note_self(mut to: &File, (device, inode): (u64, u64)) -> std::io::Result<()> {
    use nix::fcntl::{OFlag, open};
    let mut stat = [0; 1024];
    let stat_file = open(c"/proc/self/stat", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let length = nix::unistd::read(&stat_file, &mut stat)?;
    let stat = &stat[..length];
    // As in `start_time`.
    let after = stat.iter().rposition(|&byte| byte == b')').map_or(length, |at| at + 1);
    let mut fields = stat[after..].split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
    let since = fields.nth(19).unwrap_or(b"0");
    let mut line = [0; 128];
    let mut rest = &mut line[..];
    write!(rest, "{} ", std::process::id())?;
    rest.write_all(since)?;
    writeln!(rest, " {device} {inode}")?;
    let unused = rest.len();
    let length = line.len() - unused;
    to.write_all(&line[..length])
}

/// Whether a process gets a variable of our environment: credentials of the object store are for those who use it, and
/// what root has in its own is not for another user.
fn inherits(name: &str, uses_store: bool, is_roots: bool) -> bool {
    let begins =
        |beginnings: &[&str]| beginnings.iter().any(|beginning| name.starts_with(beginning));
    if begins(&["AWS_"]) {
        return uses_store;
    }
    let of_store = begins(&["SSL_CERT_"]) || name.to_ascii_lowercase().ends_with("_proxy");
    let harmless = begins(&["LC_", "PGSTRATA_", "RUST_"])
        || ["HOME", "LANG", "LANGUAGE", "PATH", "TMPDIR", "TZ"].contains(&name);
    !is_roots || harmless || (uses_store && of_store)
}

/// Takes out of what a process inherits what is none of its business: SQL can read a compute's environment.
fn hide_environment(command: &mut Command, uses_store: bool) {
    // Where root stays root, PostgreSQL is another user's all the same.
    let is_roots = owner::became().is_some() || nix::unistd::Uid::effective().is_root();
    let given: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
    for (name, _) in std::env::vars_os().filter(|(name, _)| !given.contains(name)) {
        if !inherits(&name.to_string_lossy(), uses_store, is_roots) {
            command.env_remove(name);
        }
    }
}

/// Runs a program that is not ours, which may be anybody's, to its end: as far from our terminal and from our secrets as
/// one that stays.
pub fn output(command: &mut Command) -> std::io::Result<Output> {
    output_of(command, Stdio::null())
}

/// The same with something to read.
pub fn output_of(command: &mut Command, input: Stdio) -> std::io::Result<Output> {
    hide_environment(command, false);
    let us = Pid::this();
    // SAFETY: the closure makes system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // In a session of its own it hears nothing of what ends us.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // Nor of an end before that.
            match nix::unistd::getppid() == us {
                true => Ok(()),
                false => Err(nix::errno::Errno::ESRCH.into()),
            }
        })
    };
    command.stdin(input).output()
}

/// The end of a regular file, at most `limit` bytes of it.
fn tail(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let nonblock = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    let about = file.metadata()?;
    let mut bytes = Vec::new();
    if about.is_file() {
        file.seek(SeekFrom::Start(about.len().saturating_sub(limit)))?;
        file.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

impl Process {
    /// The process `name` of the cluster in `dir`.
    pub fn new(dir: &Path, name: &str) -> Process {
        let name = name.replace('/', "%");
        Process { name, run: dir.join("run"), logs: dir.join("logs") }
    }

    fn pid_file(&self) -> PathBuf {
        self.run.join(format!("{}.pid", self.name))
    }

    fn ready_file(&self) -> PathBuf {
        self.run.join(format!("{}.ready", self.name))
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    /// Its process id, if it runs. A number that was given to another process since is not it, nor is one that is noted
    /// in the directory that this one is a copy of.
    pub fn pid(&self) -> Option<u32> {
        let note = self.living()?;
        self.is_of_this_directory(&note).then_some(note.pid)
    }

    /// Whether a process is noted here and runs that is another directory's.
    pub fn is_anothers(&self) -> bool {
        self.living().is_some_and(|note| !self.is_of_this_directory(&note))
    }

    /// Waits until it is gone, if it was killed or ends by itself.
    pub fn wait_while_dying(&self, deadline: Instant) {
        while self.pid().is_some_and(is_dying) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What is noted, if it runs.
    fn living(&self) -> Option<Note> {
        self.noted().filter(|note| start_time(note.pid) == Some(note.since))
    }

    fn noted(&self) -> Option<Note> {
        let bytes = files::read(&self.pid_file(), NOTE_LIMIT).ok()??;
        let text = String::from_utf8(bytes).ok()?;
        let mut numbers = text.split_ascii_whitespace().map(|number| number.parse::<u64>().ok());
        let (pid, since) = (numbers.next()??, numbers.next()??);
        let place = numbers.next().flatten().zip(numbers.next().flatten());
        Some(Note { pid: pid.try_into().ok()?, since, place })
    }

    /// Whether the process that is noted was started in this directory, whatever that was called then. A directory keeps
    /// its inode where it is renamed; some file systems forget even that, and earlier versions noted none: then the
    /// process is known by what it has open here, its log or its lock. (The log of one that has credentials is hidden.)
    fn is_of_this_directory(&self, note: &Note) -> bool {
        let here = |path: &Path| fs::metadata(path).ok().map(|about| identity(&about));
        let is_noted_here = note.place.is_some() && note.place == here(&self.run);
        let logs_here = || {
            let log = here(Path::new(&format!("/proc/{}/fd/2", note.pid)));
            log.is_some() && log == here(&self.log())
        };
        let locks_here = || {
            let dir = self.run.parent()?;
            Some(locks::is_held(&locks::file_of(dir, &self.name)?))
        };
        is_noted_here || logs_here() || locks_here().unwrap_or(false)
    }

    /// Starts it in the background: its own session, output to its log, its ready line to a file.
    pub fn start(&self, command: &mut Command) -> Result<u32> {
        fs::create_dir_all(&self.run).context("can't create the run directory")?;
        fs::create_dir_all(&self.logs).context("can't create the log directory")?;
        let log = files::open_for_writing(&self.log(), true)?;
        let ready = files::open_for_writing(&self.ready_file(), false)?;
        command.stdin(Stdio::null()).stdout(ready).stderr(log);
        let uses_store =
            ["safekeeper", "pageserver"].iter().any(|role| self.name.starts_with(role));
        hide_environment(command, uses_store);
        let program = command.get_program().to_string_lossy().into_owned();
        let noted = files::open_for_writing(&self.pid_file(), false)?;
        let place = identity(&fs::metadata(&self.run)?);
        // The process notes itself before it becomes the program: whatever happens to us meanwhile, none runs that is
        // not noted.
        // SAFETY: the closure makes system calls and uses the stack only.
        unsafe {
            command.pre_exec(move || {
                // Its own session: whoever gets hold of it has no way to our terminal.
                nix::unistd::setsid()?;
                note_self(&noted, place)
            })
        };
        let child = command.spawn().with_context(|| format!("can't start {program}"))?;
        let pid = child.id();
        // Reap it if it ends while we are here; afterwards init does.
        std::thread::spawn(move || {
            let mut child = child;
            let _ = child.wait();
        });
        Ok(pid)
    }

    /// The line of JSON with which it says that it is ready.
    pub fn wait_ready(&self, patience: Duration) -> Result<serde_json::Value> {
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(Some(bytes)) = files::read(&self.ready_file(), READY_LIMIT)
                && let Ok(text) = String::from_utf8(bytes)
                && let Some(line) = text.lines().find(|line| line.contains("\"ready\""))
            {
                return Ok(serde_json::from_str(line)?);
            }
            if self.pid().is_none() {
                bail!("{}", self.last_words());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not get ready in {patience:?}; see {}",
                    self.name,
                    self.log().display()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The last line of its log, for messages.
    pub fn last_words(&self) -> String {
        let bytes = tail(&self.log(), LAST_WORDS).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        match text.lines().rfind(|line| !line.trim().is_empty()) {
            Some(line) => format!("{} ended: {} (log: {})", self.name, line, self.log().display()),
            None => format!("{} ended without a word", self.name),
        }
    }

    /// Sends a signal, if it runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // The only failure is that it is gone already.
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
    }

    /// Ends it: with `signal`, then, when patience ends, at once. Returns whether it ran. One that can't even be killed
    /// is an error, and stays known.
    pub fn end(&self, signal: Signal, patience: Duration) -> Result<bool> {
        let tell = |text: String| eprintln!("pgstrata: {text}");
        self.end_by((&|signal| self.signal(signal), &tell), signal, patience, KILL_PATIENCE)
    }

    fn end_by(
        &self,
        (send, tell): (&dyn Fn(Signal), &dyn Fn(String)),
        signal: Signal,
        patience: Duration,
        kill_patience: Duration,
    ) -> Result<bool> {
        let Some(pid) = self.pid() else { return Ok(false) };
        send(signal);
        let quiet = patience.min(QUIET);
        let is_gone = self.is_gone_within(quiet)
            || patience > quiet
                && {
                    let why = match is_frozen(pid) {
                        true => {
                            ", which is stopped by a signal (kill -CONT lets it go on, and end)"
                        }
                        false => "",
                    };
                    tell(format!(
                        "waits until {} (process {pid}) has ended{why}: for {} s more at most, and kills it then",
                        self.name,
                        (patience - quiet).as_secs()
                    ));
                    self.is_gone_within(patience - quiet)
                };
        if !is_gone {
            send(Signal::SIGKILL);
            ensure!(
                self.is_gone_within(kill_patience),
                "{} (process {pid}) was killed, and has not ended in {kill_patience:?}: it may wait for a disk or a \
                 network file system that does not answer",
                self.name
            );
        }
        let _ = fs::remove_file(self.pid_file());
        let _ = fs::remove_file(self.ready_file());
        Ok(true)
    }

    fn is_gone_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.pid().is_some() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s1_each_process_inherits_what_it_needs() {
        for (name, uses_store, is_roots, expected) in [
            ("AWS_SECRET_ACCESS_KEY", false, false, false),
            ("AWS_SECRET_ACCESS_KEY", true, true, true),
            ("MY_TOKEN", true, true, false),
            ("MY_TOKEN", false, false, true),
            ("https_proxy", true, true, true),
            ("HTTPS_PROXY", false, true, false),
            ("LC_ALL", false, true, true),
            ("PATH", false, true, true),
        ] {
            assert_eq!(inherits(name, uses_store, is_roots), expected, "{name}");
        }
    }

    #[test]
    fn what_was_killed_and_is_not_gone_is_dying() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_dying(child.id()) && !is_dying(std::process::id()));
        child.kill().unwrap();
        // Nobody has waited for it, so it is still there, however far its end has come.
        assert!(is_dying(child.id()));
        child.wait().unwrap();
        assert!(!is_dying(child.id()));
    }

    #[test]
    fn h16_a_process_is_noted_before_it_does_anything() {
        let directory = tempfile::tempdir().unwrap();
        for attempt in 0..20 {
            let process = Process::new(directory.path(), &format!("p{attempt}"));
            let mut command = Command::new("sh");
            let script =
                "read -r pid since < \"$0\"; echo \"{\\\"ready\\\": $pid}\"; exec sleep 60";
            command.args(["-c", script]).arg(process.pid_file());
            let pid = process.start(&mut command).unwrap();
            let line = process.wait_ready(Duration::from_secs(20)).unwrap();
            assert_eq!(line["ready"], pid);
            assert_eq!(process.pid(), Some(pid));
            process.end(Signal::SIGKILL, Duration::from_secs(20)).unwrap();
            assert_eq!(process.pid(), None);
        }
    }

    #[test]
    fn who_does_not_end_soon_is_told_of_once_and_how_long_it_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::new(directory.path(), "frozen");
        let pid = process.start(Command::new("sleep").arg("60")).unwrap();
        process.signal(Signal::SIGSTOP);
        while !is_frozen(pid) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let told = std::cell::RefCell::new(Vec::new());
        let tell = |text: String| told.borrow_mut().push(text);
        let (patience, send) = (QUIET + Duration::from_secs(1), |signal| process.signal(signal));
        let ended = process.end_by((&send, &tell), Signal::SIGTERM, patience, KILL_PATIENCE);
        assert!(ended.unwrap());
        let told = told.into_inner();
        let [line] = told.as_slice() else { panic!("{told:?}") };
        let expected =
            format!("waits until frozen (process {pid}) has ended, which is stopped by a signal");
        assert!(line.starts_with(&expected) && line.contains("for 1 s more at most"), "{line}");
        // One that ends at once is nothing to tell of.
        process.start(Command::new("sleep").arg("60")).unwrap();
        let tell = |text: String| panic!("{text}");
        process.end_by((&send, &tell), Signal::SIGTERM, patience, KILL_PATIENCE).unwrap();
    }

    #[test]
    fn one_that_can_not_be_killed_is_named_and_stays_known() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::new(directory.path(), "stuck");
        let pid = process.start(Command::new("sleep").arg("60")).unwrap();
        // As in an uninterruptible wait.
        let ignored = |_| {};
        let short = Duration::from_millis(20);
        let tell = |text: String| panic!("{text}");
        let error = process.end_by((&ignored, &tell), Signal::SIGTERM, short, short).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("stuck") && error.contains(&pid.to_string()), "{error}");
        assert_eq!(process.pid(), Some(pid));
        assert!(process.end(Signal::SIGKILL, Duration::from_secs(20)).unwrap());
        assert!(!process.end(Signal::SIGKILL, Duration::ZERO).unwrap());
    }

    /// What `work` gives, which must not wait for ever.
    fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(work()));
        answer.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn s4_what_is_no_regular_file_starts_nothing_and_holds_up_nobody() {
        for is_link in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let process = Process::new(directory.path(), "p");
            let victim = directory.path().join("victim");
            fs::write(&victim, "precious").unwrap();
            for place in [process.log(), process.ready_file(), process.pid_file()] {
                fs::create_dir_all(place.parent().unwrap()).unwrap();
                let _ = fs::remove_file(&place);
                match is_link {
                    true => std::os::unix::fs::symlink(&victim, &place).unwrap(),
                    false => nix::unistd::mkfifo(&place, Mode::S_IRWXU).unwrap(),
                }
                let copy = Process::new(directory.path(), "p");
                let error = in_time(move || copy.start(&mut Command::new("true"))).unwrap_err();
                let error = error.to_string();
                assert!(error.contains(place.to_str().unwrap()), "{error}");
                assert!(error.contains("no regular file"), "{error}");
                let copy = Process::new(directory.path(), "p");
                in_time(move || copy.last_words());
                fs::remove_file(&place).unwrap();
            }
            assert_eq!(fs::read(&victim).unwrap(), b"precious");
        }
    }

    #[test]
    fn s4_of_a_long_log_the_end_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::new(directory.path(), "p");
        fs::create_dir_all(directory.path().join("logs")).unwrap();
        let mut log = File::create(process.log()).unwrap();
        // No disk has it, and nobody should have it in memory.
        log.set_len(1 << 30).unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        log.write_all(b"\xff\nit is over\n").unwrap();
        assert!(process.last_words().contains("it is over"), "{}", process.last_words());
    }
}
