//! A real PostgreSQL cluster in a temporary directory, for tests.
#![allow(dead_code, clippy::expect_used)]

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::installation::Installation;

/// Where the clients are, and the server of 15.
pub fn bin_directory() -> PathBuf {
    std::env::var_os("PGSTRATA_PG_BIN")
        .map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from)
}

/// The user to run the server as: `postgres` if this is root, which the server refuses to run as.
fn server_user() -> Option<(u32, u32)> {
    // SAFETY: getuid has no preconditions.
    if unsafe { libc::getuid() } != 0 {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("users can be listed");
    let line = users.lines().find(|line| line.starts_with("postgres:")).expect("a postgres user");
    let mut fields = line.split(':').skip(2).map(|id| id.parse().expect("a number"));
    Some((fields.next().expect("uid"), fields.next().expect("gid")))
}

/// A cluster; its server is ended and its files removed when dropped.
pub struct Cluster {
    installation: Installation,
    directory: tempfile::TempDir,
    server: Option<Child>,
}

impl Cluster {
    /// Makes a cluster with these settings, keeps a copy of it as made, and starts it.
    pub fn start(installation: Installation, settings: &str) -> Cluster {
        let directory = tempfile::tempdir().expect("a temporary directory");
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755))
            .expect("permissions");
        if let Some((uid, gid)) = server_user() {
            chown(directory.path(), Some(uid), Some(gid)).expect("ownership");
        }
        let mut cluster = Cluster { installation, directory, server: None };
        let data = cluster.data();
        let data_text = data.to_str().expect("utf-8").to_owned();
        cluster.run("initdb", &["-D", &data_text, "-U", "postgres", "-A", "trust", "--no-sync"]);
        let path = data.join("postgresql.conf");
        let mut text = std::fs::read_to_string(&path).expect("the configuration");
        let socket = cluster.directory.path().display();
        text.push_str(&format!(
            "\nlisten_addresses=''\nunix_socket_directories='{socket}'\nfsync=off\nautovacuum=off\n\
             max_wal_size='20GB'\nwal_keep_size='20GB'\n{settings}\n"
        ));
        std::fs::write(&path, text).expect("the configuration");
        copy_tree(&data, &cluster.base());
        cluster.start_server();
        cluster
    }

    /// The cluster's data directory.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A copy of the data directory as `initdb` made it.
    pub fn base(&self) -> PathBuf {
        self.directory.path().join("base")
    }

    /// Its segments.
    pub fn wal(&self) -> PathBuf {
        self.data().join("pg_wal")
    }

    fn command(&self, program: &str) -> Command {
        // The clients that are installed can talk to every version.
        let own = self.installation.bin().join(program);
        let path = if own.is_file() { own } else { bin_directory().join(program) };
        let mut command = Command::new(path);
        command.current_dir(self.directory.path()).env("PGHOST", self.directory.path());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres").stdin(Stdio::null());
        if let Some((uid, gid)) = server_user() {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Runs a program of the server's, or a client, which must succeed.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let output = self.command(program).args(arguments).output().expect("the program runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {message}");
        output
    }

    /// Runs SQL, each statement by itself.
    pub fn sql(&self, statements: &str) {
        let path = self.directory.path().join("script.sql");
        std::fs::write(&path, statements).expect("the script");
        let path = path.to_str().expect("utf-8");
        self.run("psql", &["-q", "-X", "-v", "ON_ERROR_STOP=1", "-f", path]);
    }

    fn start_server(&mut self) {
        let log = std::fs::File::create(self.directory.path().join("log")).expect("a log");
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data()).stdout(Stdio::null()).stderr(log);
        self.server = Some(command.spawn().expect("the server starts"));
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.command("pg_isready").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
        {
            assert!(Instant::now() < deadline, "the server does not become ready");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops the server cleanly.
    pub fn stop(&mut self) {
        self.signal_server(libc::SIGINT);
    }

    fn signal_server(&mut self, signal: i32) {
        if let Some(mut server) = self.server.take() {
            // SAFETY: the process is our child and has not been waited for, so the id is its own.
            unsafe { libc::kill(server.id() as i32, signal) };
            let _ = server.wait();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.signal_server(libc::SIGQUIT);
    }
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a copy");
        }
    }
}
