//! Stock PostgreSQL of a given major version, wherever it is, and servers of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use postgres::Client;
use tempfile::TempDir;

use crate::{connect, free_port, give_to_postgres, unprivileged};

/// The server programs of one major version, where PostgreSQL's user can read them.
pub struct Installation {
    major: u32,
    bin: PathBuf,
    /// Deleted with the installation.
    _copy: Option<TempDir>,
}

/// The candidates, best first: what the environment names, what the distribution installed, and
/// what `scripts/fetch-postgres` fetched.
fn candidates(major: u32) -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(format!("PGSTRATA_PG_BIN_{major}")) {
        // Somebody who names one means that one.
        return vec![path.into()];
    }
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    vec![
        PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")),
        checkout.join(format!(".cache/postgres/{major}/bin")),
        // Of a checkout that others may not enter.
        format!("/var/cache/pgstrata/{major}/bin").into(),
    ]
}

/// `postgres --version`, as the user that it will run as.
fn version(bin: &Path) -> Option<String> {
    let output = unprivileged(&bin.join("postgres"), &["--version"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Installation {
    /// Finds a version. A test that needs it fails where it is missing.
    pub fn of(major: u32) -> Installation {
        let candidates = candidates(major);
        let found = candidates.iter().find(|bin| bin.join("postgres").is_file());
        let Some(found) = found else {
            panic!(
                "PostgreSQL {major} is in none of {candidates:?}: run 'scripts/fetch-postgres \
                 {major}', or set PGSTRATA_PG_BIN_{major} to the directory of its programs"
            );
        };
        let mut bin = found.canonicalize().unwrap();
        let mut copy = None;
        if version(&bin).is_none() {
            // A checkout below a closed directory, such as root's home.
            let directory = TempDir::with_prefix("pgstrata-test-").unwrap();
            let prefix = bin.parent().unwrap();
            let copied = Command::new("cp").arg("-a").arg(prefix).arg(directory.path()).status();
            assert!(copied.unwrap().success(), "can't copy {}", prefix.display());
            give_to_postgres(directory.path());
            bin = directory.path().join(prefix.file_name().unwrap()).join("bin");
            copy = Some(directory);
        }
        let version = version(&bin).unwrap_or_else(|| panic!("{} does not run", bin.display()));
        let expected = format!("postgres (PostgreSQL) {major}.");
        assert!(version.starts_with(&expected), "{} is {version}", bin.display());
        Installation { major, bin, _copy: copy }
    }

    /// Directory of the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Directory of this version's client programs, which a fetched server comes without: they are where
    /// `PGSTRATA_PG_CLIENTS_18` says, beside the server, or where `scripts/fetch-clients` puts them.
    pub fn clients(&self) -> PathBuf {
        let major = self.major;
        let named = std::env::var_os(format!("PGSTRATA_PG_CLIENTS_{major}"));
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let candidates = [
            named.map(PathBuf::from).unwrap_or_default(),
            self.bin.clone(),
            checkout.join(format!(".cache/postgres/clients-{major}/bin")),
            format!("/var/cache/pgstrata/clients-{major}/bin").into(),
        ];
        let found = candidates.iter().find(|bin| bin.join("pg_dump").is_file());
        found.cloned().unwrap_or_else(|| {
            panic!(
                "there are no clients of PostgreSQL {major}: run 'scripts/fetch-clients {major}'"
            )
        })
    }

    /// The major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// A command of one of its programs, as an unprivileged user.
    pub fn command(&self, name: &str, arguments: &[&str]) -> Command {
        unprivileged(&self.bin.join(name), arguments)
    }

    /// Runs one of its programs. Panics if it fails.
    pub fn run(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.command(name, arguments).output().unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name} {arguments:?}: {complaints}{text}");
        text
    }

    /// Starts a stock server on a data directory.
    pub fn start<'a>(&'a self, data: &Path) -> Server<'a> {
        let port = free_port();
        let log = data.join("log");
        let options = format!(
            "-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={}",
            data.display()
        );
        let place = data.to_str().unwrap();
        let arguments = ["-D", place, "-w", "-l", log.to_str().unwrap(), "-o", &options, "start"];
        let output = self.command("pg_ctl", &arguments).output().unwrap();
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(output.status.success(), "PostgreSQL {} does not start: {text}", self.major);
        Server { installation: self, data: data.to_owned(), port }
    }
}

/// A running stock server. It is stopped when it goes out of scope.
pub struct Server<'a> {
    installation: &'a Installation,
    data: PathBuf,
    port: u16,
}

impl Server<'_> {
    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where to connect.
    pub fn uri(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// A connection.
    pub fn client(&self) -> Client {
        connect(&self.uri())
    }

    /// Its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.data.join("log")).unwrap()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let data = self.data.to_str().unwrap();
        let _ =
            self.installation.command("pg_ctl", &["-D", data, "-m", "fast", "-w", "stop"]).output();
    }
}
