//! The `postgres` process.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pgstrata_compute_shared::{ENV_DATA, ENV_EVENT, ENV_MEMORY, ENV_SOCKET};
use pgstrata_pg_wal::{ControlFile, PgVersion};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::memory::Memory;

/// Settings that correctness rests on; given last, so nothing overrides them.
const REQUIRED: &[(&str, &str)] = &[
    // A sync of WAL is a commit to the quorum.
    ("fsync", "on"),
    ("wal_sync_method", "fdatasync"),
    // Pages can't tear in storage that is only appended to.
    ("full_page_writes", "off"),
    // The directory is thrown away: nothing is ever recovered in place.
    ("restart_after_crash", "off"),
    ("data_sync_retry", "off"),
    ("archive_mode", "off"),
    // In files of a directory that goes with the compute (see `dynamic_memory`).
    ("dynamic_shared_memory_type", "mmap"),
    // New segments appear empty, without a write of 16 MiB each.
    ("wal_recycle", "off"),
    ("wal_init_zero", "off"),
];

/// Settings that correctness rests on and that only some versions know.
fn by_version(version: PgVersion) -> &'static [(&'static str, &'static str)] {
    match version {
        PgVersion::V15 | PgVersion::V16 | PgVersion::V17 => &[],
        // io_uring does not go through the C library's functions. I/O workers do: they read like
        // any backend, with vectored reads.
        PgVersion::V18 => &[("io_method", "worker")],
    }
}

/// Settings of a read-only compute, which is a hot standby.
const READ_ONLY: &[(&str, &str)] = &[
    // Tablespaces are directories here, not links: a compute's files are all below its data
    // directory. A standby takes that for damage unless it is allowed (CheckTablespaceDirectory
    // in access/transam/xlogrecovery.c). Nobody can create a tablespace in it.
    ("allow_in_place_tablespaces", "on"),
];

/// A hot standby refuses to start with less room than its primary had
/// (CheckRequiredParameterValues in access/transam/xlogrecovery.c).
fn standby_limits(control: &ControlFile) -> [(&'static str, i32); 5] {
    [
        ("max_connections", control.max_connections),
        ("max_worker_processes", control.max_worker_processes),
        ("max_wal_senders", control.max_wal_senders),
        ("max_prepared_transactions", control.max_prepared_xacts),
        ("max_locks_per_transaction", control.max_locks_per_xact),
    ]
}

/// What `postgres` is started with.
pub struct Settings {
    /// Directory of PostgreSQL's programs.
    pub bin: PathBuf,
    /// Data directory.
    pub data: PathBuf,
    /// The preload library.
    pub preload: PathBuf,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Where its log goes.
    pub log: PathBuf,
    /// Port on 127.0.0.1.
    pub port: u16,
    /// PostgreSQL's version.
    pub version: PgVersion,
    /// What the cluster ran with, if this is a hot standby.
    pub standby_of: Option<ControlFile>,
    /// More settings, `name=value`.
    pub extra: Vec<String>,
}

/// A running server.
pub struct Postgres {
    child: Child,
    data: PathBuf,
    log: PathBuf,
}

/// The longest path that a Unix socket can have.
const SOCKET_PATH_LIMIT: usize = 90;

impl Postgres {
    /// Starts the server. It is killed by the kernel if the calling thread ends.
    pub fn start(settings: &Settings, memory: &Memory) -> Result<Postgres> {
        let log = open_log(&settings.log)?;
        // setpriv asks the kernel to end the server with us: one that outlived its shim would go
        // on answering reads while another compute writes the branch.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(settings.bin.join("postgres"));
        command.arg("-D").arg(&settings.data);
        let directory = settings.data.parent().unwrap_or(&settings.data);
        let sockets = match directory.as_os_str().len() < SOCKET_PATH_LIMIT {
            true => directory.as_os_str().to_owned(),
            false => OsString::new(),
        };
        let mut option = |name: &str, value: &std::ffi::OsStr| {
            let mut setting = OsString::from(name);
            setting.push("=");
            setting.push(value);
            command.arg("-c").arg(setting);
        };
        option("unix_socket_directories", &sockets);
        option("listen_addresses", "127.0.0.1".as_ref());
        option("port", settings.port.to_string().as_ref());
        for setting in &settings.extra {
            let (name, value) = setting
                .split_once('=')
                .with_context(|| format!("'{setting}' is not name=value"))?;
            option(name, value.as_ref());
        }
        for (name, value) in REQUIRED {
            option(name, value.as_ref());
        }
        for (name, value) in by_version(settings.version) {
            option(name, value.as_ref());
        }
        if let Some(control) = &settings.standby_of {
            for (name, value) in READ_ONLY {
                option(name, value.as_ref());
            }
            for (name, value) in standby_limits(control) {
                option(name, value.to_string().as_ref());
            }
        }
        command
            .env("LD_PRELOAD", &settings.preload)
            .env(ENV_MEMORY, memory.file.as_raw_fd().to_string())
            .env(ENV_EVENT, memory.event.as_raw_fd().to_string())
            .env(ENV_SOCKET, &settings.socket)
            .env(ENV_DATA, &settings.data)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let program = settings.bin.join("postgres");
        let child = command
            .spawn()
            .with_context(|| format!("can't start {} (through setpriv)", program.display()))?;
        Ok(Postgres { child, data: settings.data.clone(), log: settings.log.clone() })
    }

    /// Process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the server accepts connections.
    pub fn wait_ready(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let pid_file = self.data.join("postmaster.pid");
        loop {
            // The eighth line of postmaster.pid is the server's state.
            if let Ok(text) = fs::read_to_string(&pid_file)
                && text
                    .lines()
                    .nth(7)
                    .is_some_and(|line| matches!(line.trim(), "ready" | "standby"))
            {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("postgres ended at its start ({status}): {}", self.last_log_line());
            }
            if Instant::now() > deadline {
                bail!("postgres did not get ready in {patience:?}: {}", self.last_log_line());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn last_log_line(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let worst = text
            .lines()
            .rev()
            .take(50)
            .find(|line| line.contains("FATAL") || line.contains("PANIC"))
            .or_else(|| text.lines().last());
        let line = worst.unwrap_or("its log is empty").trim().to_owned();
        format!("{line} (log: {})", self.log.display())
    }

    /// Whether it has ended, and how.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // The only failure is that it is gone already.
            let _ = kill_process(pid, signal);
        }
    }

    /// Asks it to end: transactions are rolled back, a checkpoint is written.
    pub fn stop_fast(&self) {
        self.signal(Signal::INT);
    }

    /// Ends it and all its processes at once, and waits for that.
    pub fn kill(&mut self) {
        self.signal(Signal::QUIT);
        let deadline = Instant::now() + Duration::from_millis(500);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill();
        }
    }
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("can't open the log {}", path.display()))
}
