//! A cluster whose services are started one by one, with the options that a test wants: as people do on several machines.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{give_to_postgres, pg_bin, programs, signal, unprivileged, wait_gone};

/// Longest wait for a service to say that it is ready, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// What PostgreSQL's user runs.
const OF_POSTGRES: [&str; 3] = ["compute-shim", "libpgstrata_preload.so", "pgstrata"];

/// See the module. All of it ends with this.
pub struct Services {
    directory: TempDir,
    /// Where programs are taken from now.
    programs: PathBuf,
    /// For each such directory, where PostgreSQL's user finds his.
    of_postgres: BTreeMap<PathBuf, PathBuf>,
    running: BTreeMap<String, Child>,
    /// What commands begin with from now on: see [`crate::hosts::Hosts::on`].
    pub prefix: Vec<String>,
    /// Variables that all of them are given.
    pub environment: Vec<(String, String)>,
}

/// A command that begins with others.
pub fn behind(prefix: &[String], command: Command) -> Command {
    let Some((first, rest)) = prefix.split_first() else { return command };
    let mut whole = Command::new(first);
    whole.args(rest).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        whole.env(name, value.unwrap_or_default());
    }
    if let Some(directory) = command.get_current_dir() {
        whole.current_dir(directory);
    }
    whole
}

impl Default for Services {
    fn default() -> Services {
        Services::new()
    }
}

impl Services {
    /// None yet.
    pub fn new() -> Services {
        let directory = TempDir::with_prefix("pgstrata-test-").unwrap();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path(), open).unwrap();
        let mut services = Services {
            directory,
            programs: PathBuf::new(),
            of_postgres: BTreeMap::new(),
            running: BTreeMap::new(),
            prefix: Vec::new(),
            environment: Vec::new(),
        };
        services.take_programs(&programs());
        services
    }

    /// What is started from now on is started from this directory.
    pub fn take_programs(&mut self, from: &Path) {
        self.programs = from.to_owned();
        if self.of_postgres.contains_key(from) {
            return;
        }
        let bin = self.path(&format!("bin-{}", self.of_postgres.len()));
        let open = fs::Permissions::from_mode(0o755);
        fs::create_dir(&bin).unwrap();
        for name in OF_POSTGRES {
            fs::copy(from.join(name), bin.join(name)).unwrap();
            fs::set_permissions(bin.join(name), open.clone()).unwrap();
        }
        self.of_postgres.insert(from.to_owned(), bin);
    }

    /// A directory below that of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What a service wrote to its standard error.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// A command of one of our programs, by the user that it is for, which says what it says into the log `name`.
    pub fn command(&self, name: &str, program: &str, arguments: &[&str]) -> Command {
        let command = match OF_POSTGRES.contains(&program) {
            true => unprivileged(&self.of_postgres[&self.programs].join(program), arguments),
            false => {
                let mut command = Command::new(self.programs.join(program));
                command.args(arguments);
                command
            }
        };
        let mut command = behind(&self.prefix, command);
        let log = self.path(&format!("{name}.log"));
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        command.env("PGSTRATA_PG_BIN", pg_bin()).stdin(Stdio::null()).stderr(log);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts a service with a directory of its own, and waits for what it says when it is ready.
    pub fn start(&mut self, name: &str, program: &str, arguments: &[&str]) -> Value {
        let mut command = self.command(name, program, arguments);
        if program != "storage-broker" {
            let own = self.path(name);
            fs::create_dir_all(&own).unwrap();
            if program == "compute-shim" {
                give_to_postgres(&own);
            }
            command.arg("--dir").arg(own);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let former = self.running.insert(name.to_owned(), child);
        assert!(former.is_none(), "{name} runs already");
        let (sender, receiver) = channel();
        std::thread::spawn(move || sender.send(said.lines().next()));
        match receiver.recv_timeout(PATIENCE) {
            Ok(Some(Ok(line))) => serde_json::from_str(&line).unwrap(),
            other => panic!("{name} does not get ready ({other:?}): {}", self.log(name)),
        }
    }

    /// Runs a program to its end, with success. Returns what it says.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program, program, arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", self.log(program));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until the compute whose HTTP interface is at `address` serves.
    pub fn wait_serving(&mut self, name: &str, address: &str) {
        let deadline = Instant::now() + PATIENCE;
        let url = format!("http://{address}/readyz");
        let asks = ["-fsS", "--max-time", "5", &url];
        let ready = || Command::new("curl").args(asks).output().unwrap().status.success();
        while !ready() {
            let ended = self.running.get_mut(name).unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {}", self.log(name));
            assert!(Instant::now() < deadline, "{name} does not serve: {}", self.log(name));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// How a service ended, once it has.
    pub fn wait_ended(&mut self, name: &str) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        let mut child = self.running.remove(name).unwrap();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if Instant::now() > deadline {
                self.running.insert(name.to_owned(), child);
                panic!("{name} does not end: {}", self.log(name));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends a service, as its administrator does.
    pub fn stop(&mut self, name: &str) {
        signal(u64::from(self.running[name].id()), Signal::TERM);
        self.wait_ended(name);
    }

    /// Kills a service, as a crash does.
    pub fn kill(&mut self, name: &str) {
        let mut child = self.running.remove(name).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        wait_gone(u64::from(child.id()));
    }

    /// Of all that run.
    pub fn pids(&self) -> Vec<u64> {
        self.running.values().map(|child| u64::from(child.id())).collect()
    }

    /// The directory of the test.
    pub fn root(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        for child in self.running.values() {
            signal(u64::from(child.id()), Signal::TERM);
        }
        let deadline = Instant::now() + PATIENCE;
        for (name, child) in &mut self.running {
            while child.try_wait().is_ok_and(|ended| ended.is_none()) {
                if Instant::now() > deadline {
                    eprintln!("{name} does not end");
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if std::thread::panicking() {
            for name in self.running.keys() {
                let log = self.log(name);
                let last: Vec<&str> = log.lines().rev().take(15).collect();
                eprintln!("--- {name}");
                last.into_iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}
