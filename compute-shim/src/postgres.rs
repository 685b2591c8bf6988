//! The `postgres` process.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pgstrata_compute_shared::{ENV_DATA, ENV_EVENT, ENV_MEMORY, ENV_READ_ONLY, ENV_SOCKET};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::memory::Memory;
use crate::plain_file::plain_file;
use crate::settings::Decided;

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
    /// Port, on whatever it listens on.
    pub port: u16,
    /// It only answers queries.
    pub read_only: bool,
    /// What whoever started the compute asked for, by name and value.
    pub given: Vec<(String, String)>,
    /// What overrides that.
    pub decided: Decided,
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
        let mut log = open_log(&settings.log)?;
        for warning in &settings.decided.warnings {
            tracing::warn!("{warning}");
            writeln!(log, "pgstrata: WARNING: {warning}")?;
        }
        let program = settings.bin.join("postgres");
        let mut command = Command::new(&program);
        end_with(rustix::process::getpid(), &mut command);
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
        for (name, value) in &settings.given {
            option(name, value.as_ref());
        }
        for (name, value) in &settings.decided.options {
            option(name, value.as_ref());
        }
        option("data_directory", settings.data.as_os_str());
        option("unix_socket_directories", &sockets);
        option("port", settings.port.to_string().as_ref());
        command
            .env("LD_PRELOAD", &settings.preload)
            .env(ENV_MEMORY, memory.file.as_raw_fd().to_string())
            .env(ENV_EVENT, memory.event.as_raw_fd().to_string())
            .env(ENV_SOCKET, &settings.socket)
            .env(ENV_DATA, &settings.data)
            .env(ENV_READ_ONLY, if settings.read_only { "1" } else { "0" })
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child =
            command.spawn().with_context(|| format!("can't start {}", program.display()))?;
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

/// Has the kernel end the program with the thread that starts it, which is of the process `us`: a server that outlived its shim would go on answering
/// reads while another compute writes the branch.
fn end_with(us: Pid, command: &mut Command) {
    // SAFETY: the closure makes system calls and allocates nothing.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(command, move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // Of a death before that it is never told.
            match rustix::process::getppid() == Some(us) {
                true => Ok(()),
                false => Err(rustix::io::Errno::SRCH.into()),
            }
        })
    };
}

fn open_log(path: &Path) -> Result<File> {
    plain_file(path, OpenOptions::new().create(true).append(true)).context("the log")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_program_whose_starter_is_gone_does_not_start() {
        let place = tempfile::tempdir().unwrap();
        for (starter, starts) in [(rustix::process::getpid(), true), (Pid::INIT, false)] {
            let made = place.path().join(starts.to_string());
            let mut command = Command::new("touch");
            command.arg(&made);
            end_with(starter, &mut command);
            assert_eq!(command.status().is_ok_and(|status| status.success()), starts);
            assert_eq!(made.exists(), starts);
        }
    }
}
