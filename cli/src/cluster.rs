//! A local cluster's directory and what is remembered in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Uid, User};
use pgstrata_blob::Location;
use pgstrata_pg_wal::PgVersion;
use serde::{Deserialize, Serialize};

use crate::claim::Tokens;
use crate::place::{self, Home};
use crate::{files, locks, owner, process, way};

/// What is remembered of a cluster, in its directory.
pub const STATE_FILE: &str = "cluster.json";
const LOCK_FILE: &str = "lock";
const MEMBERS_LOCK_FILE: &str = "members.lock";
/// Bytes of a state file, at most: room for tens of thousands of branches.
pub const STATE_LIMIT: u64 = 64 << 20;
/// Version of the state file that this program writes, and the newest that it reads.
pub const STATE_VERSION: u32 = 2;
/// The branch that a new cluster begins with.
pub const FIRST_BRANCH: &str = "main";
/// Ports below are where well-known services are.
const FIRST_PORT: u16 = 15_000;
/// Ports tried before the kernel is asked for any.
const PORT_ATTEMPTS: usize = 1000;
/// Longest wait for another command that changes the cluster: longer than any of them takes but those that change members.
const LOCK_PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of a process id, at most.
const HOLDER_LIMIT: u64 = 32;
/// A wait that is longer is told of.
const QUIET_PATIENCE: Duration = Duration::from_secs(1);

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
    /// Whether it ever got ready: its directory holds votes then, and must not start empty.
    #[serde(default)]
    pub started: bool,
    /// While it is made a member: the one in whose place it comes, or 0 if it is one more.
    #[serde(default)]
    pub joins_for: Option<u64>,
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
    /// Version of this file's form.
    #[serde(default = "first_version")]
    pub version: u32,
    /// Whether branch main was created: from then on it must be in the object store.
    #[serde(default)]
    pub founded: bool,
    /// Tenant id.
    pub tenant: String,
    /// Directory of PostgreSQL's programs.
    pub pg_bin: PathBuf,
    /// PostgreSQL's major version. Not remembered by clusters made before it was.
    #[serde(default)]
    pub pg_major: Option<u32>,
    /// User that PostgreSQL runs as, if we are root.
    pub pg_user: Option<String>,
    /// Object store. A directory inside the cluster's is relative to that, since version 2.
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
    /// PostgreSQL's port of computes that were stopped, for the next start.
    #[serde(default)]
    pub ports: BTreeMap<String, u16>,
    /// The branch whose compute `up` starts, and whose URI it prints.
    #[serde(default = "first_branch")]
    pub primary: String,
    /// Whether the cluster was made with `--data-checksums`. Not remembered by clusters made before it was.
    #[serde(default)]
    pub data_checksums: Option<bool>,
    /// Where the cluster was when it was last started.
    #[serde(default)]
    pub home: Option<Home>,
    /// Tells a copy from its original, where both have the tenant's name outside their directories.
    #[serde(default)]
    pub copy: Option<String>,
}

fn first_version() -> u32 {
    1
}

fn first_branch() -> String {
    FIRST_BRANCH.to_owned()
}

/// The version of a state file, whatever else is in it.
#[derive(Deserialize)]
struct VersionOnly {
    #[serde(default = "first_version")]
    version: u32,
}

/// A cluster: its directory, and its state.
pub struct Cluster {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// The state.
    pub state: State,
    /// Its claims on the object store.
    pub claim: Tokens,
}

/// The right to change a cluster, or who keeps its WAL: one command at a time has either.
pub struct Lock {
    _file: Flock<fs::File>,
}

impl Lock {
    /// Waits for its turn in the cluster of `dir`, which must exist.
    pub fn take(dir: &Path) -> Result<Lock> {
        Lock::take_file(dir, LOCK_FILE)
    }

    /// The right to change who keeps the WAL, which takes as long as copying does. It is taken before the other one, which whoever
    /// has it takes for a moment at a time only: a safekeeper that a change waits for can be started, and a compute.
    pub fn take_for_members(dir: &Path) -> Result<Lock> {
        Lock::take_file(dir, MEMBERS_LOCK_FILE)
    }

    fn take_file(dir: &Path, name: &str) -> Result<Lock> {
        let path = dir.join(name);
        let open =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.with_context(|| format!("can't open {}", path.display()))?;
        let since = Instant::now();
        let mut is_told = false;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut held) => {
                    // For the message below, in another process; nothing depends on it.
                    let _ = held.set_len(0);
                    let _ = write!(held, "{}", std::process::id());
                    return Ok(Lock { _file: held });
                }
                Err((unlocked, Errno::EWOULDBLOCK)) => file = unlocked,
                Err((_, error)) => {
                    return Err(error).with_context(|| format!("can't lock {}", path.display()));
                }
            }
            let waited = since.elapsed();
            if waited > QUIET_PATIENCE && !is_told {
                is_told = true;
                eprintln!(
                    "pgstrata: waits for another pgstrata command (process {}) that is changing the cluster",
                    holder_of(&path)
                );
            }
            if waited > LOCK_PATIENCE {
                let holder = holder_of(&path);
                bail!(
                    "another pgstrata command (process {holder}) has been changing the cluster in \
                     {} for {LOCK_PATIENCE:?}: wait for it, or end it",
                    dir.display()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The process that took a lock last, for messages.
fn holder_of(path: &Path) -> String {
    let written = files::read(path, HOLDER_LIMIT).ok().flatten().unwrap_or_default();
    String::from_utf8_lossy(&written).into_owned()
}

/// Whether nobody listens on a port of 127.0.0.1.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// The first port that the kernel gives to outgoing connections.
fn first_ephemeral_port() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let first = range.split_ascii_whitespace().next().and_then(|first| first.parse().ok());
    first.unwrap_or(32_768)
}

/// A port that nobody listens on, and that no outgoing connection will take while its service is
/// down: whoever tries again and again to reach a service on such a port ends up connected to
/// himself.
fn lasting_port() -> std::io::Result<TcpListener> {
    let range = FIRST_PORT..first_ephemeral_port();
    for _ in 0..PORT_ATTEMPTS {
        if range.is_empty() {
            break;
        }
        let port = rand::random_range(range.clone());
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return Ok(listener);
        }
    }
    TcpListener::bind("127.0.0.1:0")
}

/// Several different ports that were free a moment ago.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners: Vec<_> = (0..count)
        .map(|_| lasting_port().context("no free port on 127.0.0.1"))
        .collect::<Result<_>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

impl Cluster {
    /// The cluster in `dir`, if there is one.
    pub fn find(dir: &Path) -> Result<Option<Cluster>> {
        let path = dir.join(STATE_FILE);
        let Some(bytes) = files::read(&path, STATE_LIMIT)? else { return Ok(None) };
        // The version comes first: what a newer one added would be lost when this one writes.
        if let Ok(VersionOnly { version }) = serde_json::from_slice(&bytes)
            && version > STATE_VERSION
        {
            bail!(
                "{} was written by a newer pgstrata (version {version} of the file; this one knows \
                 {STATE_VERSION}): use that one",
                path.display()
            );
        }
        let state = serde_json::from_slice(&bytes).map_err(|error| {
            anyhow::anyhow!(
                "{} is damaged ({error}): put a copy of it back; it only says where the cluster's \
                 parts are, and they are not touched",
                path.display()
            )
        })?;
        let claim = Tokens::read(dir)?;
        let mut cluster = Cluster { dir: dir.canonicalize()?, state, claim };
        if cluster.state.version < STATE_VERSION {
            place::migrate_store(&mut cluster);
            cluster.state.version = STATE_VERSION;
        }
        Ok(Some(cluster))
    }

    /// The cluster in `dir`. If we are root, we become its owner.
    pub fn open(dir: &Path) -> Result<Cluster> {
        owner::become_owner(dir)?;
        match Cluster::find(dir)? {
            Some(cluster) => {
                place::check(&cluster)?;
                Ok(cluster)
            }
            None => bail!("there is no cluster in {}: run 'pgstrata up' first", dir.display()),
        }
    }

    /// The cluster in `dir`, to be changed: nobody else changes it while the lock is held.
    pub fn change(dir: &Path) -> Result<(Cluster, Lock)> {
        Cluster::open(dir)?;
        let lock = Lock::take(dir)?;
        Ok((Cluster::open(dir)?, lock))
    }

    /// Writes the state so that a crash leaves the old or the new one.
    pub fn save(&self) -> Result<()> {
        files::replace(&self.dir, STATE_FILE, &serde_json::to_vec_pretty(&self.state)?)
    }

    /// The object store, as services are told of it.
    pub fn object_store(&self) -> String {
        let text = &self.state.object_store;
        match text.parse() {
            Ok(Location::Directory(path)) => self.dir.join(path).display().to_string(),
            _ => text.clone(),
        }
    }

    /// The page server's HTTP address. Where ours does not run, another's may have its port: that of a copy of this
    /// directory, say, which would do what it is told.
    pub fn pageserver_http(&self) -> Result<String> {
        if process::Process::new(&self.dir, "pageserver").pid().is_none() {
            locks::refuse_service_elsewhere(self, "pageserver")?;
            bail!("the page server does not run: 'pgstrata up' starts it");
        }
        Ok(format!("127.0.0.1:{}", self.state.pageserver.0))
    }

    /// The user that PostgreSQL runs as: `None` if it is us.
    pub fn postgres_user(&self) -> Result<Option<User>> {
        match &self.state.pg_user {
            Some(name) if Uid::effective().is_root() => {
                let user = User::from_name(name)?;
                let user = user.with_context(|| format!("there is no user '{name}' any more"))?;
                ensure!(!user.uid.is_root(), "PostgreSQL does not run as '{name}', who is root");
                Ok(Some(user))
            }
            None if Uid::effective().is_root() => bail!(
                "the cluster in {dir} was another user's, and root does not run PostgreSQL: a copy \
                 keeps its owner with 'cp -a'; 'chown -R USER {dir}' gives this one back",
                dir = self.dir.display()
            ),
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
        let reachable = way::is_reachable(&self.dir, &user);
        let directory = match reachable {
            true => {
                let mode = fs::metadata(&self.dir)?.mode() & 0o7777;
                fs::set_permissions(&self.dir, fs::Permissions::from_mode(mode | 0o011))?;
                inside
            }
            false => {
                let copy = self.state.copy.as_ref().map(|copy| format!("-{copy}"));
                let name =
                    format!("pgstrata-computes-{}{}", self.state.tenant, copy.unwrap_or_default());
                std::env::temp_dir().join(name)
            }
        };
        // Ours alone: whoever could put names into it could have us follow them. An earlier version gave it away.
        files::own_directory(&directory, 0o755, None, Some(&user))?;
        Ok(directory)
    }

    /// What a name leads to is removed with all that is in it: it must not lead anywhere else.
    pub fn compute_path(&self, branch: &str) -> Result<PathBuf> {
        pgstrata_ids::check_branch_name(branch)?;
        Ok(self.computes_directory()?.join(branch.replace('/', "%")))
    }

    /// Removes what a branch's compute left; it was a copy.
    pub fn remove_compute_directory(&self, branch: &str) -> Result<()> {
        let path = self.compute_path(branch)?;
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("can't remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Lets a branch's settings, which are in its compute's directory, follow its new name.
    pub fn move_compute_directory(&self, old: &str, new: &str) -> Result<()> {
        self.remove_compute_directory(new)?;
        let (from, to) = (self.compute_path(old)?, self.compute_path(new)?);
        match fs::rename(&from, &to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)
                .with_context(|| format!("can't move {} to {}", from.display(), to.display())),
            _ => Ok(()),
        }
    }

    /// The directory of a branch's compute, made if missing.
    pub fn compute_directory(&self, branch: &str) -> Result<PathBuf> {
        let path = self.compute_path(branch)?;
        let user = self.postgres_user()?;
        files::own_directory(&path, 0o700, user.as_ref(), None)?;
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
        let programs = ["postgres", "initdb"].map(|name| fs::metadata(path.join(name)));
        if programs.iter().all(|about| about.as_ref().is_ok_and(fs::Metadata::is_file)) {
            return Ok(path.canonicalize()?);
        }
        let closed = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
        if let Some(error) = programs.into_iter().filter_map(Result::err).find(closed) {
            let who = owner::became().map(|name| format!(" by {name}")).unwrap_or_default();
            return Err(error)
                .with_context(|| format!("{} can't be looked into{who}", path.display()));
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
    let output = process::output(std::process::Command::new(&program).arg("--version"))
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

/// The user that PostgreSQL runs as unless another one is named.
pub const PG_USER: &str = "postgres";

/// Makes sure that there is a user for PostgreSQL, which refuses to run as root. Only the usual one is made.
pub fn ensure_user(name: &str) -> Result<Option<String>> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    match User::from_name(name)? {
        Some(user) if user.uid.is_root() => {
            bail!("PostgreSQL does not run as '{name}', who is root: name another with --pg-user")
        }
        Some(_) => {}
        None if name != PG_USER => bail!("there is no user '{name}' on this machine"),
        None => {
            let status = std::process::Command::new("useradd")
                .args(["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name])
                .status()
                .context("can't run useradd")?;
            if !status.success() {
                bail!(
                    "can't create the user '{name}' (useradd: {status}); name one with --pg-user"
                );
            }
        }
    }
    Ok(Some(name.to_owned()))
}
