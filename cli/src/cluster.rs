//! A local cluster's directory and what is remembered in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::unistd::{Uid, User, chown};
use pgstrata_pg_wal::PgVersion;
use serde::{Deserialize, Serialize};

const STATE_FILE: &str = "cluster.json";

/// One safekeeper's place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SafekeeperPlace {
    /// Node id.
    pub id: u64,
    /// Zone.
    pub zone: String,
    /// Port for proposers.
    pub wal: u16,
    /// Port for replication.
    pub pg: u16,
    /// Port for HTTP.
    pub http: u16,
}

/// A compute's place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ComputePlace {
    /// PostgreSQL's port.
    pub port: u16,
    /// HTTP port of the shim.
    pub http: u16,
    /// LSN of a read-only compute.
    pub read_only_at: Option<String>,
}

/// What is remembered of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Tenant id.
    pub tenant: String,
    /// Directory of PostgreSQL's programs.
    pub pg_bin: PathBuf,
    /// PostgreSQL's major version. Not remembered by clusters made before it was.
    #[serde(default)]
    pub pg_major: Option<u32>,
    /// User that PostgreSQL runs as, if we are root.
    pub pg_user: Option<String>,
    /// Object store.
    pub object_store: String,
    /// Endpoint of an S3 server other than AWS.
    pub s3_endpoint: Option<String>,
    /// Broker's port.
    pub broker: u16,
    /// Page server's ports: HTTP, pages, PostgreSQL's protocol.
    pub pageserver: (u16, u16, u16),
    /// Safekeepers.
    pub safekeepers: Vec<SafekeeperPlace>,
    /// Computes that were started and not stopped, by branch.
    pub computes: BTreeMap<String, ComputePlace>,
}

/// A cluster: its directory, and its state.
pub struct Cluster {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// The state.
    pub state: State,
}

/// Several different ports that were free a moment ago.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners: Vec<_> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1"))
        .collect::<Result<_>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

impl Cluster {
    /// The cluster in `dir`, if there is one.
    pub fn find(dir: &Path) -> Result<Option<Cluster>> {
        let path = dir.join(STATE_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("can't read {}", path.display()));
            }
        };
        let state = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        Ok(Some(Cluster { dir: dir.canonicalize()?, state }))
    }

    /// The cluster in `dir`.
    pub fn open(dir: &Path) -> Result<Cluster> {
        match Cluster::find(dir)? {
            Some(cluster) => Ok(cluster),
            None => bail!("there is no cluster in {}: run 'pgstrata up' first", dir.display()),
        }
    }

    /// Writes the state so that a crash leaves the old or the new one.
    pub fn save(&self) -> Result<()> {
        let path = self.dir.join(STATE_FILE);
        let temporary = self.dir.join(format!("{STATE_FILE}.tmp"));
        let write = || -> std::io::Result<()> {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(serde_json::to_string_pretty(&self.state)?.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().with_context(|| format!("can't write {}", path.display()))
    }

    /// The page server's HTTP address.
    pub fn pageserver_http(&self) -> String {
        format!("127.0.0.1:{}", self.state.pageserver.0)
    }

    /// The user that PostgreSQL runs as: `None` if it is us.
    pub fn postgres_user(&self) -> Result<Option<User>> {
        match &self.state.pg_user {
            Some(name) if Uid::effective().is_root() => {
                let user = User::from_name(name)?;
                user.map(Some).with_context(|| format!("there is no user '{name}' any more"))
            }
            _ => Ok(None),
        }
    }

    /// Where computes live: below the cluster's directory, unless PostgreSQL's user can't get
    /// there.
    pub fn computes_directory(&self) -> Result<PathBuf> {
        let inside = self.dir.join("computes");
        let Some(user) = self.postgres_user()? else {
            fs::create_dir_all(&inside)?;
            return Ok(inside);
        };
        let reachable = self.dir.ancestors().skip(1).all(|parent| {
            fs::metadata(parent).is_ok_and(|metadata| {
                let mode = metadata.mode();
                mode & 0o001 != 0
                    || (metadata.uid() == user.uid.as_raw() && mode & 0o100 != 0)
                    || (metadata.gid() == user.gid.as_raw() && mode & 0o010 != 0)
            })
        });
        let directory = match reachable {
            true => {
                let mode = fs::metadata(&self.dir)?.mode() & 0o7777;
                fs::set_permissions(&self.dir, fs::Permissions::from_mode(mode | 0o011))?;
                inside
            }
            false => std::env::temp_dir().join(format!("pgstrata-computes-{}", self.state.tenant)),
        };
        fs::create_dir_all(&directory)
            .with_context(|| format!("can't create {}", directory.display()))?;
        chown(&directory, Some(user.uid), Some(user.gid))
            .with_context(|| format!("can't give {} to '{}'", directory.display(), user.name))?;
        Ok(directory)
    }

    /// The directory of a branch's compute, made if missing.
    pub fn compute_directory(&self, branch: &str) -> Result<PathBuf> {
        let path = self.computes_directory()?.join(branch.replace('/', "%"));
        fs::create_dir_all(&path).with_context(|| format!("can't create {}", path.display()))?;
        if let Some(user) = self.postgres_user()? {
            chown(&path, Some(user.uid), Some(user.gid))?;
        }
        Ok(path)
    }
}

/// The programs of PostgreSQL: those asked for, or the newest supported ones installed.
pub fn find_postgres(asked: Option<&Path>) -> Result<PathBuf> {
    let candidates = match asked {
        Some(path) => vec![path.to_owned()],
        None => (15..=18)
            .rev()
            .map(|major| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")))
            .collect(),
    };
    for path in &candidates {
        if path.join("postgres").is_file() && path.join("initdb").is_file() {
            return Ok(path.canonicalize()?);
        }
    }
    match asked {
        Some(path) => bail!("there is no PostgreSQL in {} (postgres and initdb)", path.display()),
        None => bail!(
            "no PostgreSQL 15 to 18 was found in /usr/lib/postgresql: install one, or name its \
             programs' directory with --pg-bin"
        ),
    }
}

/// The major version of the programs in a directory.
pub fn major_version(bin: &Path) -> Result<u32> {
    let program = bin.join("postgres");
    let output = std::process::Command::new(&program)
        .arg("--version")
        .output()
        .with_context(|| format!("can't run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", or "17beta1" for the number.
    let number = text.split_whitespace().nth(2).unwrap_or_default();
    let digits = number.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    let major = digits
        .parse()
        .with_context(|| format!("{} does not tell its version", program.display()))?;
    match PgVersion::from_major(major) {
        Some(_) => Ok(major),
        None => bail!("{} is of PostgreSQL {major}: only 15 to 18 work", program.display()),
    }
}

/// Makes sure that there is a user for PostgreSQL, which refuses to run as root.
pub fn ensure_user(name: &str) -> Result<Option<String>> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    if User::from_name(name)?.is_none() {
        let status = std::process::Command::new("useradd")
            .args(["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name])
            .status()
            .context("can't run useradd")?;
        if !status.success() {
            bail!("can't create the user '{name}' (useradd: {status}); name one with --pg-user");
        }
    }
    Ok(Some(name.to_owned()))
}
