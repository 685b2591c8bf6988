//! The harness of the end-to-end tests: real clusters in temporary directories, driven through
//! the command line as any script would.
//!
//! A cluster that goes out of scope is stopped, process by process, and leaves nothing behind.

#![allow(clippy::unwrap_used)] // A harness panics: that is how a test fails.

pub mod backup;
pub mod cuts;
pub mod far_switch;
pub mod health;
pub mod hosts;
pub mod installation;
pub mod load;
pub mod other_s3;
pub mod probes;
pub mod proxy;
pub mod raw;
pub mod services;
pub mod workload;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Directory of the programs built beside this test, or of those that `PGSTRATA_TEST_PROGRAMS` names: to see what a
/// test says of another build.
pub fn programs() -> PathBuf {
    if let Some(path) = std::env::var_os("PGSTRATA_TEST_PROGRAMS") {
        return path.into();
    }
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().to_owned()
}

/// Directory of PostgreSQL's programs.
pub fn pg_bin() -> PathBuf {
    match std::env::var_os("PGSTRATA_PG_BIN") {
        Some(path) => path.into(),
        None => "/usr/lib/postgresql/15/bin".into(),
    }
}

/// How thorough to be: `make test-all` sets this.
pub fn thorough() -> bool {
    std::env::var_os("PGSTRATA_TEST_ALL").is_some()
}

/// A cluster.
pub struct Cluster {
    directory: TempDir,
    programs: PathBuf,
    postgres: PathBuf,
    environment: Vec<(String, String)>,
    options: Vec<String>,
    descriptors: Option<u32>,
}

/// Connects, waiting for the server if it is about to come.
pub fn connect(uri: &str) -> Client {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Client::connect(uri, NoTls) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "{uri}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal, unless the process is gone already.
pub fn signal(pid: u64, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    let _ = kill_process(pid, signal);
}

/// Processes with this text in their command line.
pub fn processes_of(text: &str) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(text) {
            found.push((pid, command));
        }
    }
    found
}

fn alive(pid: u64) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The first thread of a process may end before the others, which still hold its ports.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let ended = |rest: &str| rest.trim_start().starts_with(['Z', 'X']);
    threads > 1 || !stat.rsplit_once(')').is_some_and(|(_, rest)| ended(rest))
}

/// Waits until a process is gone.
pub fn wait_gone(pid: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Default for Cluster {
    fn default() -> Cluster {
        Cluster::new()
    }
}

impl Cluster {
    /// A cluster that is not up yet, with its objects in its directory.
    pub fn new() -> Cluster {
        Cluster::with(&[], &[])
    }

    /// With options of `up` and environment variables.
    pub fn with(options: &[&str], environment: &[(&str, &str)]) -> Cluster {
        Cluster {
            directory: TempDir::with_prefix("pgstrata-test-").unwrap(),
            programs: programs(),
            postgres: pg_bin(),
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            descriptors: None,
        }
    }

    /// With the server of another version, and options of `up`.
    pub fn of(installation: &installation::Installation, options: &[&str]) -> Cluster {
        Cluster::with(options, &[]).with_server_of(installation)
    }

    /// Run with the programs in this directory.
    pub fn with_programs(mut self, directory: &Path) -> Cluster {
        self.programs = directory.to_owned();
        self
    }

    /// With its objects in the S3 server at this URL.
    pub fn in_s3(endpoint: &str) -> Cluster {
        let store = "s3://pgstrata-e2e/some/prefix";
        let options = ["--object-store", store, "--s3-endpoint", endpoint, "--create-bucket"];
        Cluster::with(&options, &S3_ENVIRONMENT)
    }

    /// The same with the server of another version.
    pub fn with_server_of(mut self, installation: &installation::Installation) -> Cluster {
        self.postgres = installation.bin().to_owned();
        self
    }

    /// The cluster's directory.
    pub fn dir(&self) -> PathBuf {
        self.directory.path().join("cluster")
    }

    /// Processes that are started from now on may have so many descriptors.
    pub fn limit_descriptors(&mut self, count: u32) {
        self.descriptors = Some(count);
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let program = self.programs.join("pgstrata");
        let mut command = match self.descriptors {
            None => Command::new(program),
            Some(count) => {
                let mut command = Command::new("prlimit");
                command.arg(format!("--nofile={count}:{count}")).arg(program);
                command
            }
        };
        command.arg("--dir").arg(self.dir()).args(arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs the command; whatever comes of it.
    pub fn try_cli(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the command, which must succeed. Returns what it printed.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = self.try_cli(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pgstrata {arguments:?}: {complaints}");
        text.trim_end().to_owned()
    }

    /// Runs the command with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.cli(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"))
    }

    /// Runs the command, which must fail with `status` and one line. Returns the line.
    pub fn refusal(&self, arguments: &[&str], status: i32) -> String {
        let output = self.try_cli(arguments);
        let text = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        assert_eq!(output.status.code(), Some(status), "pgstrata {arguments:?}: {text}");
        if status == 1 {
            assert_eq!(text.lines().count(), 1, "one line, not: {text}");
        }
        text
    }

    /// Starts what is not running. Returns the URI of main.
    pub fn up(&self) -> String {
        let mut arguments = vec!["up", "--pg-bin", self.postgres.to_str().unwrap()];
        arguments.extend(self.options.iter().map(String::as_str));
        self.cli(&arguments)
    }

    /// A connection to main's compute.
    pub fn client(&self) -> Client {
        connect(&self.up())
    }

    /// Stops main's compute and starts it again.
    pub fn restart(&self) -> Client {
        self.cli(&["compute", "stop", "main"]);
        self.client()
    }

    /// Starts a compute on a branch and connects.
    pub fn branch_client(&self, branch: &str) -> Client {
        let row = self.json(&["compute", "start", branch]);
        connect(row["uri"].as_str().unwrap())
    }

    /// Everything that runs.
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// The port at which the first process of this role speaks PostgreSQL's replication protocol.
    pub fn replication_port(&self, role: &str) -> u16 {
        let status = self.status();
        let processes = status["processes"].as_array().unwrap();
        let found = processes.iter().find(|process| process["role"] == role).unwrap();
        found["pg"].as_str().unwrap().rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// Process id of a process by name.
    pub fn pid(&self, name: &str) -> u64 {
        let status = self.status();
        let processes = status["processes"].as_array().unwrap();
        let found = processes.iter().find(|process| process["name"] == name);
        found
            .and_then(|process| process["pid"].as_u64())
            .unwrap_or_else(|| panic!("{name} is dead"))
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&self, name: &str) {
        let pid = self.pid(name);
        signal(pid, Signal::KILL);
        wait_gone(pid);
    }

    /// Keeps what a look at a test that failed needs, before all of it ends: whole logs, and what everybody says.
    fn keep(&self, directory: &Path) {
        let _ = std::fs::create_dir_all(directory);
        let _ = Command::new("cp").arg("-r").arg(self.dir().join("logs")).arg(directory).status();
        let state = std::fs::read(self.dir().join("cluster.json")).unwrap_or_default();
        let _ = std::fs::write(directory.join("cluster.json"), &state);
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        for place in state["safekeepers"].as_array().into_iter().flatten() {
            let url = format!("http://127.0.0.1:{}/v1/status", place["http"]);
            let said = Command::new("curl").args(["-sS", "--max-time", "5", &url]).output();
            let said = said.map(|output| output.stdout).unwrap_or_default();
            let _ =
                std::fs::write(directory.join(format!("safekeeper-{}.json", place["id"])), said);
        }
        for (name, asked) in [("status", &["status"][..]), ("quorum", &["quorum", "show"])] {
            let said = self.try_cli(&[asked, &["--json"]].concat());
            let _ = std::fs::write(directory.join(name), [said.stdout, said.stderr].concat());
        }
    }

    fn pids(&self) -> Vec<u64> {
        let mut pids = Vec::new();
        let output = self.try_cli(&["status", "--json"]);
        if let Ok(status) = serde_json::from_slice::<Value>(&output.stdout) {
            let all = |field: &str| status[field].as_array().cloned().unwrap_or_default();
            pids.extend(all("processes").iter().filter_map(|process| process["pid"].as_u64()));
            pids.extend(all("computes").iter().filter_map(|row| row["postgres_pid"].as_u64()));
        }
        pids
    }

    /// `kill -9` of every process at once.
    pub fn kill_everything(&self) {
        let pids = self.pids();
        pids.iter().for_each(|pid| signal(*pid, Signal::KILL));
        pids.into_iter().for_each(wait_gone);
    }

    /// Deletes what may be lost at any time: the computes' data and the page server's copies.
    pub fn delete_local_directories(&self, data_directories: &[PathBuf]) {
        for directory in data_directories {
            std::fs::remove_dir_all(directory).unwrap();
        }
        let _ = std::fs::remove_dir_all(self.dir().join("pageserver"));
    }

    /// Data directories of the computes.
    pub fn data_directories(&self) -> Vec<PathBuf> {
        let computes = self.json(&["compute", "list"]);
        let rows = computes.as_array().unwrap();
        rows.iter().filter_map(|row| row["data_dir"].as_str().map(PathBuf::from)).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.dir().join("logs");
            for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let tail: Vec<_> = text.lines().rev().take(8).collect();
                eprintln!("--- {}", entry.path().display());
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
            if let Some(directory) = std::env::var_os("PGSTRATA_TEST_KEEP") {
                self.keep(Path::new(&directory));
            }
        }
        let pids = self.pids();
        let _ = self.command(&["down"]).stderr(Stdio::null()).status();
        for pid in pids {
            if alive(pid) {
                signal(pid, Signal::KILL);
            }
        }
    }
}

/// Runs one of PostgreSQL's programs as an unprivileged user. Panics if it fails.
pub fn pg_program(name: &str, arguments: &[&str]) -> String {
    let output = pg_command(name, arguments).output().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {complaints}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A command of one of PostgreSQL's programs, as user `postgres` if we are root.
pub fn pg_command(name: &str, arguments: &[&str]) -> Command {
    unprivileged(&pg_bin().join(name), arguments)
}

/// A command that runs as user `postgres` if we are root.
pub fn unprivileged(program: &Path, arguments: &[&str]) -> Command {
    let mut command = if running_as_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    command.args(arguments).current_dir("/").env("HOME", "/");
    command
}

/// A port that was free a moment ago, and that the kernel gives to no outgoing connection
/// meanwhile: those of other tests are many. Any free one where outgoing connections take all.
pub fn free_port() -> u16 {
    const ATTEMPTS: usize = 1000;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let first_outgoing = range.ok().and_then(|range| range.split_whitespace().next()?.parse().ok());
    let lasting = 10_000..first_outgoing.unwrap_or(32_768);
    let attempts = if lasting.is_empty() { 0 } else { ATTEMPTS };
    (0..attempts)
        .map(|_| rand::random_range(lasting.clone()))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap_or_else(|| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port())
}

/// Whether tests have to switch users for PostgreSQL.
pub fn running_as_root() -> bool {
    let output = Command::new("id").arg("-u").output().unwrap();
    output.stdout.trim_ascii() == b"0"
}

/// A directory that PostgreSQL's user may fill.
pub fn pg_directory() -> TempDir {
    let directory = TempDir::with_prefix("pgstrata-test-").unwrap();
    give_to_postgres(directory.path());
    directory
}

/// Makes PostgreSQL's user the owner of everything below a directory.
pub fn give_to_postgres(path: &Path) {
    if running_as_root() {
        let chowned = Command::new("chown").args(["-R", "postgres:"]).arg(path).status();
        assert!(chowned.unwrap().success());
    }
}

/// What an S3 client wants to know besides the endpoint.
pub const S3_ENVIRONMENT: [(&str, &str); 3] =
    [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")];

/// A running S3 server: moto, a separate process.
pub struct S3Server {
    child: Child,
    /// Its URL.
    pub endpoint: String,
}

impl Default for S3Server {
    fn default() -> S3Server {
        S3Server::start()
    }
}

impl S3Server {
    /// Starts one on a free port.
    pub fn start() -> S3Server {
        let port = free_port();
        let program =
            std::env::var("PGSTRATA_MOTO_SERVER").unwrap_or_else(|_| "moto_server".into());
        let child = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error} (pip install 'moto[server]')"));
        let server = S3Server { child, endpoint: format!("http://127.0.0.1:{port}") };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "{program} did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }
}

impl S3Server {
    /// A cluster that is not up yet, with its objects in this server.
    pub fn cluster(&self) -> Cluster {
        Cluster::in_s3(&self.endpoint)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether two files have the same bytes.
pub fn same_file(a: &Path, b: &Path) -> bool {
    std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}
