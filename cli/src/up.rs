//! `up` and `down`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pgstrata_blob::Location;
use pgstrata_wire::http::pageserver::Branch;

use crate::claim::Tokens;
use crate::cluster::{
    Cluster, FIRST_BRANCH, Lock, PG_USER, STATE_VERSION, SafekeeperPlace, State, ensure_user,
    find_postgres, free_ports, is_free, major_version,
};
use crate::http::Service;
use crate::members::left_behind;
use crate::process::Process;
use crate::{branch, claim, compute, files, found, http, locks, out, owner, place, status, zones};

const START_PATIENCE: Duration = Duration::from_secs(60);
/// Safekeepers of a new cluster.
const SAFEKEEPERS: u64 = 3;
/// Safekeepers of a cluster, at most.
const MOST_SAFEKEEPERS: usize = 15;
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// Arguments of `up`.
#[derive(clap::Args)]
pub struct UpArguments {
    /// Directory of PostgreSQL's programs [default: the newest of 15 to 18 that is installed]
    #[arg(long, env = "PGSTRATA_PG_BIN")]
    pg_bin: Option<PathBuf>,
    /// Number of safekeepers, each in a zone of its own unless --zones says otherwise [default: 3, or as many as the cluster
    /// or --zones has]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=MOST_SAFEKEEPERS as u64))]
    safekeepers: Option<u64>,
    /// Failure zones of the safekeepers, in their order, such as a,b,c: what may fail together [default: zone-a, zone-b, ...]
    #[arg(long, value_delimiter = ',', value_parser = zones::parse)]
    zones: Vec<String>,
    /// Object storage: a directory [default: DIR/objects], or s3://bucket/prefix
    #[arg(long)]
    object_store: Option<String>,
    /// Endpoint of an S3 server other than AWS, such as http://127.0.0.1:9000
    #[arg(long)]
    s3_endpoint: Option<String>,
    /// User that PostgreSQL runs as when this is run by root [default: postgres]
    #[arg(long)]
    pg_user: Option<String>,
    /// User that the whole cluster belongs to and runs as when root makes it [default: that of --pg-user]. With 'root',
    /// all but PostgreSQL runs as root
    #[arg(long)]
    run_as: Option<String>,
    /// Port of the compute of branch main [default: the one that it had, or a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Make the cluster with page checksums, also before PostgreSQL 18, where they are the default
    #[arg(long)]
    data_checksums: bool,
    /// Make the object store this directory's, though it is another's: after the directory was moved to another machine
    /// or file system, or where the other one is lost. What the other one committed since they were the same stays there.
    /// It must not run any more
    #[arg(long)]
    take_over: bool,
    /// Create the bucket of an s3:// object store if it is missing
    #[arg(long)]
    create_bucket: bool,
}

impl UpArguments {
    fn pg_user(&self) -> &str {
        self.pg_user.as_deref().unwrap_or(PG_USER)
    }
}

/// Whose a cluster is was decided when its directory was made.
fn check_users(dir: &Path, arguments: &UpArguments) -> Result<()> {
    let asked = arguments.run_as.as_ref().or(arguments.pg_user.as_ref());
    if let (Some(asked), Some(owner)) = (asked, owner::became()) {
        ensure!(
            asked == owner,
            "{} belongs to {owner}, who runs all of its cluster: '{asked}' can't",
            dir.display()
        );
    }
    Ok(())
}

/// A program of ours, beside this one.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(path) = owner::copied_program(name)? {
        return Ok(path);
    }
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.is_file(), "{} does not exist: build the whole workspace", path.display());
    Ok(path)
}

/// Refuses what can't work before anything is made.
fn check_arguments(arguments: &UpArguments) -> Result<Option<Location>> {
    arguments.port.map_or(Ok(()), compute::check_port_number)?;
    ensure!(
        arguments.zones.len() <= MOST_SAFEKEEPERS,
        "there are {MOST_SAFEKEEPERS} safekeepers at most"
    );
    let Some(text) = &arguments.object_store else { return Ok(None) };
    let location = text.parse::<Location>()?;
    let shared = location != Location::Memory;
    ensure!(shared, "{text} is one process's own: name a directory or s3://bucket/prefix");
    Ok(Some(location))
}

fn create(dir: &Path, arguments: &UpArguments) -> Result<Cluster> {
    let pg_bin = find_postgres(arguments.pg_bin.as_deref())?;
    let pg_user = ensure_user(arguments.pg_user())?;
    let dir = dir.canonicalize()?;
    let object_store = match &arguments.object_store {
        None => "objects".to_owned(),
        Some(text) => match text.parse::<Location>()? {
            Location::Directory(path) => {
                fs::create_dir_all(&path)
                    .with_context(|| format!("can't create {}", path.display()))?;
                place::remembered_store(&dir, &path.canonicalize()?.display().to_string())
            }
            other => other.to_string(),
        },
    };
    let named = arguments.zones.len() as u64;
    let safekeepers = if named > 0 { named } else { SAFEKEEPERS };
    let safekeepers = arguments.safekeepers.unwrap_or(safekeepers) as usize;
    let mut zones = zones::of_new(safekeepers, &arguments.zones)?;
    // One more than is needed: the one that the first compute is to have is no service's.
    let mut ports = free_ports(4 + 3 * safekeepers + 1)?;
    ports.retain(|port| arguments.port != Some(*port));
    let safekeepers = (0..safekeepers)
        .map(|at| SafekeeperPlace {
            id: at as u64 + 1,
            zone: std::mem::take(&mut zones[at]),
            wal: ports[4 + 3 * at],
            pg: ports[5 + 3 * at],
            http: ports[6 + 3 * at],
            started: false,
            joins_for: None,
        })
        .collect();
    let tenant = rand::random::<[u8; 16]>();
    let state = State {
        version: STATE_VERSION,
        founded: false,
        tenant: pgstrata_ids::TenantId(tenant).to_string(),
        pg_major: Some(major_version(&pg_bin)?),
        pg_bin,
        pg_user,
        object_store,
        s3_endpoint: arguments.s3_endpoint.clone(),
        broker: ports[0],
        pageserver: (ports[1], ports[2], ports[3]),
        safekeepers,
        computes: Default::default(),
        ports: Default::default(),
        primary: FIRST_BRANCH.to_owned(),
        data_checksums: Some(arguments.data_checksums),
        home: None,
        copy: None,
    };
    // An earlier start may have been killed right after it had taken the store.
    let claim = Tokens::read(&dir)?;
    Ok(Cluster { dir, state, claim })
}

/// Checks the object store before anything is started, where the message is about it alone.
fn check_store(cluster: &Cluster, create_bucket: bool) -> Result<()> {
    let location: Location = cluster.object_store().parse()?;
    if let Location::Directory(path) = &location {
        owner::check_store(path)?;
        // Opening would make one, in the way of whoever puts it back.
        ensure!(
            path.is_dir() || !cluster.state.founded,
            "object store {} is away: put it back, or mount it (an empty one in its place would be somebody else's)",
            path.display()
        );
    }
    let endpoint = cluster.state.s3_endpoint.as_deref();
    http::block_on(async {
        if let (Location::S3 { bucket, .. }, true) = (&location, create_bucket) {
            pgstrata_blob::create_bucket(bucket, endpoint).await?;
        }
        let store = pgstrata_blob::Store::open(&location, endpoint)?;
        ensure!(
            store.check().await?,
            "object store {} ignores 'If-None-Match' or 'If-Match', with which two page servers are \
             kept from overwriting each other: use one that honours both",
            store.name()
        );
        Ok(())
    })
}

/// Starts what does not run.
pub fn up(dir: &Path, arguments: &UpArguments) -> Result<()> {
    owner::become_owner(dir)?;
    if Cluster::find(dir)?.is_none() {
        let programs = find_postgres(arguments.pg_bin.as_deref())?;
        let object_store = check_arguments(arguments)?;
        let user = arguments.run_as.as_deref().unwrap_or(arguments.pg_user());
        owner::prepare(dir, user, object_store.as_ref(), &programs)?;
    }
    check_users(dir, arguments)?;
    let _lock = Lock::take(dir)?;
    let (mut cluster, fresh) = match Cluster::find(dir)? {
        Some(mut cluster) => {
            place::wait_for_dying(&cluster);
            place::settle(&mut cluster, arguments.take_over)?;
            locks::refuse_running_elsewhere(&cluster)?;
            check_unchanged(&cluster, arguments)?;
            if let Some(path) = &arguments.pg_bin {
                let pg_bin = find_postgres(Some(path))?;
                let (major, own) = (major_version(&pg_bin)?, cluster.state.pg_major);
                ensure!(
                    own.is_none_or(|own| own == major),
                    "the cluster in {} is of PostgreSQL {}, and {} has {major}: name programs of \
                     the same major version",
                    cluster.dir.display(),
                    own.unwrap_or_default(),
                    pg_bin.display()
                );
                cluster.state.pg_bin = pg_bin;
            }
            find_postgres(Some(&cluster.state.pg_bin))?;
            (cluster, false)
        }
        None => {
            let mut cluster = create(dir, arguments)?;
            place::settle(&mut cluster, arguments.take_over)?;
            (cluster, true)
        }
    };
    // Before anything is started that could not be used.
    cluster.postgres_user()?;
    check_port(&cluster, arguments.port)?;
    if let Some(asked) = &arguments.object_store
        && !fresh
    {
        let same = match asked.parse::<Location>()? {
            Location::Directory(path) => path
                .canonicalize()
                .is_ok_and(|path| path.display().to_string() == cluster.object_store()),
            other => other.to_string() == cluster.object_store(),
        };
        ensure!(
            same,
            "the cluster in {} keeps its objects in {}, not in {asked}",
            cluster.dir.display(),
            cluster.object_store()
        );
    }
    let pageserver_runs = Process::new(&cluster.dir, "pageserver").pid().is_some();
    if fresh || !pageserver_runs {
        check_store(&cluster, arguments.create_bucket)?;
    }
    claim::take(&mut cluster, arguments.take_over)?;
    let running = with_running_computes(&cluster);
    let mut troubles = start_services(&mut cluster)?;
    claim::settle(&mut cluster, troubles.is_empty())?;
    ensure_primary(&mut cluster, arguments.data_checksums)?;
    let primary = cluster.state.primary.clone();
    let failure = start_compute(&mut cluster, &primary, arguments.port).err();
    let others: Vec<_> =
        cluster.state.computes.keys().filter(|&name| *name != primary).cloned().collect();
    for branch in others {
        if let Err(error) = start_compute(&mut cluster, &branch, None) {
            troubles.push(format!("{error:#}"));
        }
    }
    // One that runs may still be unable to serve a branch. (One that is slow to answer got ready a moment ago; an archive
    // that does not answer holds up nothing yet, and `status` says it.)
    let answers = status::Answers::ask(&cluster);
    for place in &cluster.state.safekeepers {
        let name = format!("safekeeper-{}", place.id);
        troubles.extend(status::damage(&answers, &name).map(|damage| format!("{name}: {damage}")));
    }
    troubles.extend(not_served(&cluster, &running));
    if let Some(failure) = failure {
        troubles.insert(0, format!("{failure:#}"));
        bail!("{}", troubles.join("; "));
    }
    let place =
        cluster.state.computes.get(&primary).context("the branch's compute is not there")?;
    let report = answers.compute(&primary);
    out::line(&report.map_or_else(|| compute::uri(place.port), |report| report.uri.clone()))?;
    // What runs serves; what doesn't is still a failure, and said.
    ensure!(troubles.is_empty(), "{primary} is up, but {}", troubles.join("; "));
    Ok(())
}

/// Branches whose computes run already. Others are not started where the page server does not serve them, which is said then.
fn with_running_computes(cluster: &Cluster) -> Vec<String> {
    let names = cluster.state.computes.keys();
    names.filter(|name| compute::process(cluster, name).pid().is_some()).cloned().collect()
}

/// What is wrong with those of them that a page server which runs does not serve. (One that does not answer was just waited for,
/// and `status` says it.)
fn not_served(cluster: &Cluster, running: &[String]) -> Vec<String> {
    let rows = branch::rows(cluster).unwrap_or_default();
    let its = rows.into_iter().filter(|row| !row.is_read() && running.contains(&row.name));
    let text = |row: Branch| {
        let why = row.failure.unwrap_or_default();
        format!("branch '{}' is not served by the page server: {why}", row.name)
    };
    its.map(text).collect()
}

/// What an existing cluster can't become is refused.
fn check_unchanged(cluster: &Cluster, arguments: &UpArguments) -> Result<()> {
    let (state, dir) = (&cluster.state, cluster.dir.display());
    let members = state.safekeepers.len();
    if let Some(asked) = arguments.safekeepers {
        ensure!(
            asked as usize == members,
            "the cluster in {dir} has {members} safekeepers, which 'pgstrata safekeeper add' and 'remove' change: leave \
             out --safekeepers"
        );
    }
    let zones: Vec<_> = state.safekeepers.iter().map(|place| place.zone.as_str()).collect();
    ensure!(
        arguments.zones.is_empty() || arguments.zones == zones,
        "the safekeepers of the cluster in {dir} are in zones {}, and this can't be changed yet: leave out \
         --zones",
        zones.join(",")
    );
    // PostgreSQL 18 makes every cluster with them.
    let has = state.data_checksums == Some(true) || state.pg_major.is_some_and(|major| major >= 18);
    ensure!(
        !arguments.data_checksums || has || !state.founded,
        "page checksums are chosen when a cluster is made, and the one in {dir} was made without \
         --data-checksums: leave it out"
    );
    Ok(())
}

/// A port that the branch's compute can't have is refused before anything of it is remembered.
fn check_port(cluster: &Cluster, asked: Option<u16>) -> Result<()> {
    let Some(asked) = asked else { return Ok(()) };
    let primary = &cluster.state.primary;
    if compute::process(cluster, primary).pid().is_none() {
        return compute::check_port(cluster, primary, asked);
    }
    compute::check_port_number(asked)?;
    let now = cluster.state.computes.get(primary).map(|place| place.port);
    ensure!(
        now == Some(asked),
        "the compute of branch '{primary}' runs on port {}: stop it first ('pgstrata compute stop \
         {primary}'), and it takes port {asked}",
        now.unwrap_or_default()
    );
    Ok(())
}

/// Makes sure that the branch is there whose compute is started.
fn ensure_primary(cluster: &mut Cluster, data_checksums: bool) -> Result<()> {
    if branch::find(cluster, &cluster.state.primary)?.is_none() {
        if cluster.state.founded {
            let next = branch::next_primary(cluster)?;
            eprintln!(
                "pgstrata: there is no branch '{}' any more: '{next}' is started",
                cluster.state.primary
            );
            cluster.state.primary = next;
        } else {
            create_main(cluster, data_checksums)?;
            cluster.state.data_checksums = Some(data_checksums);
        }
    }
    cluster.state.founded = true;
    cluster.save()
}

/// Starts a branch's compute as it was, on `port` if that is asked for.
fn start_compute(cluster: &mut Cluster, branch: &str, port: Option<u16>) -> Result<()> {
    let remembered = cluster.state.computes.get(branch).cloned();
    if port.is_none() {
        let remedy = match remembered.as_ref().and_then(|place| place.read_only_at.as_deref()) {
            _ if cluster.state.primary == branch => "pgstrata up --port N".to_owned(),
            None => format!("pgstrata compute start {branch} --port N"),
            Some(at) => format!("pgstrata compute start {branch} --port N --read-only --at {at}"),
        };
        compute::check_remembered_port(cluster, branch, &remedy)?;
    }
    let port = port.or(remembered.as_ref().map(|place| place.port));
    let read_only = remembered.and_then(|place| place.read_only_at);
    compute::ensure(cluster, branch, port, read_only).map(drop)
}

/// Starts what does not run. Returns what is wrong with safekeepers that did not start, if the
/// others are a majority.
fn start_services(cluster: &mut Cluster) -> Result<Vec<String>> {
    const ATTEMPTS: u32 = 5;
    let mut attempt = 1;
    loop {
        let all_may_move = settle_ports(cluster)?;
        // Remembered before anything is started, so that whatever happens now can be taken up again.
        cluster.save()?;
        let outcome = start_services_once(cluster);
        // Somebody took a port between the look at it and its use. Nobody but the services that are
        // starting was told of it: with other ports they start again.
        let taken = match &outcome {
            Ok(troubles) => troubles.iter().any(|trouble| trouble.contains(PORT_TAKEN)),
            Err(error) => format!("{error:#}").contains(PORT_TAKEN),
        };
        if !taken || !all_may_move || attempt == ATTEMPTS {
            return outcome;
        }
        end_services(cluster)?;
        attempt += 1;
    }
}

/// As the operating system says it, and so the services.
const PORT_TAKEN: &str = "Address already in use";

fn start_services_once(cluster: &mut Cluster) -> Result<Vec<String>> {
    start_broker(cluster)?;
    let troubles = start_safekeepers(cluster)?;
    start_pageserver(cluster)?;
    Ok(troubles)
}

/// Makes sure that the services can have their ports, which somebody else may have taken while
/// they were down. Others are chosen only while nothing runs that was told of the old ones: returns
/// whether that is so.
fn settle_ports(cluster: &mut Cluster) -> Result<bool> {
    let dir = cluster.dir.clone();
    let runs = |name: &str| Process::new(&dir, name).pid().is_some();
    let state = &mut cluster.state;
    let anything_runs = state.computes.keys().any(|name| runs(&format!("compute-{name}")));
    let (http, pages, pg) = &mut state.pageserver;
    let mut places = vec![
        ("storage-broker".to_owned(), vec![&mut state.broker]),
        ("pageserver".to_owned(), vec![http, pages, pg]),
    ];
    for place in &mut state.safekeepers {
        let name = format!("safekeeper-{}", place.id);
        places.push((name, vec![&mut place.wal, &mut place.pg, &mut place.http]));
    }
    let anything_runs = anything_runs || places.iter().any(|(name, _)| runs(name));
    for (name, ports) in places {
        if runs(&name) {
            continue;
        }
        for port in ports.into_iter().filter(|port| !is_free(**port)) {
            ensure!(
                !anything_runs,
                "port {port} of {name} is in use by another program: end that, or run 'pgstrata \
                 down' first, and 'up' takes another port"
            );
            *port = free_ports(1)?[0];
        }
    }
    Ok(!anything_runs)
}

fn start_broker(cluster: &Cluster) -> Result<()> {
    let process = Process::new(&cluster.dir, "storage-broker");
    if process.pid().is_some() {
        return Ok(());
    }
    let mut command = Command::new(program("storage-broker")?);
    command.arg("--listen").arg(format!("127.0.0.1:{}", cluster.state.broker));
    process.start(&mut command)?;
    process.wait_ready(START_PATIENCE)?;
    Ok(())
}

/// What a service is told of the object store.
fn store_options(cluster: &Cluster, command: &mut Command) {
    command.args(["--object-store", &cluster.object_store()]);
    let options =
        [("--s3-endpoint", &cluster.state.s3_endpoint), ("--claim", &cluster.claim.token)];
    for (name, value) in options {
        command.args(value.iter().flat_map(|value| [name, value]));
    }
}

/// Whether what a safekeeper promised and stored is gone. What is closed to us may be there.
pub fn has_lost_directory(dir: &Path, place: &SafekeeperPlace) -> bool {
    let identity = dir.join(format!("safekeeper-{}", place.id)).join("identity").metadata();
    place.started && identity.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Starts the safekeepers. Returns what is wrong with those that did not start.
fn start_safekeepers(cluster: &mut Cluster) -> Result<Vec<String>> {
    let mut started = Vec::new();
    let (mut lost, mut troubles) = (Vec::new(), Vec::new());
    for (at, place) in cluster.state.safekeepers.iter().enumerate() {
        let name = format!("safekeeper-{}", place.id);
        let process = Process::new(&cluster.dir, &name);
        if process.pid().is_some() {
            // Whoever started it may have ended before it wrote that down.
            started.push((at, process));
            continue;
        }
        let directory = cluster.dir.join(&name);
        // It may have promised or acknowledged what is lost now. An empty one in its place could
        // outvote those that remember: committed transactions would be gone.
        if has_lost_directory(&cluster.dir, place) {
            lost.push((place.id, format!("{name} has lost its directory {}", directory.display())));
            continue;
        }
        let mut command = safekeeper_command(cluster, place)?;
        process.start(&mut command)?;
        started.push((at, process));
    }
    for (at, process) in started {
        match process.wait_ready(START_PATIENCE) {
            Ok(_) => cluster.state.safekeepers[at].started = true,
            Err(error) => troubles.push(format!("{error:#}")),
        }
    }
    cluster.save()?;
    let members = cluster.state.safekeepers.len();
    if members - lost.len() - troubles.len() > members / 2 {
        let others = lost.into_iter().map(|(id, what)| {
            format!(
                "{what}: put it back, as it can't start without what it promised; or have another one in its place, by 'pgstrata \
                 safekeeper replace {id}'"
            )
        });
        return Ok(others.chain(troubles).collect());
    }
    let all: Vec<String> = lost.into_iter().map(|(_, what)| what).chain(troubles).collect();
    // A branch may have members among the others only, or be recovered: for that the page server has to run.
    ensure!(cluster.state.founded, "no majority of the safekeepers can run: {}", all.join("; "));
    // None can be replaced before that, where it is a member with them.
    let first = "no majority of the safekeepers runs: bring the others back, with their directories. If they are lost for good, \
                 'pgstrata quorum recover --branch BRANCH' goes on without them, for each branch that they kept, and 'pgstrata safekeeper \
                 replace ID' puts others in their places after that";
    Ok(std::iter::once(first.to_owned()).chain(all).collect())
}

fn safekeeper_command(cluster: &Cluster, place: &SafekeeperPlace) -> Result<Command> {
    let mut command = Command::new(program("safekeeper")?);
    command
        .arg("--dir")
        .arg(cluster.dir.join(format!("safekeeper-{}", place.id)))
        .args(["--id", &place.id.to_string()])
        .args(["--zone", &place.zone])
        .args(["--listen-wal", &format!("127.0.0.1:{}", place.wal)])
        .args(["--listen-pg", &format!("127.0.0.1:{}", place.pg)])
        .args(["--listen-http", &format!("127.0.0.1:{}", place.http)])
        .args(["--broker", &format!("http://127.0.0.1:{}", cluster.state.broker)]);
    store_options(cluster, &mut command);
    command.args(cluster.claim.forgets_peers.then_some("--forget-peers"));
    Ok(command)
}

/// Starts a safekeeper that is about to be made a member, in the place of another or as one more; or finds the one that an
/// earlier command began with. Returns its node id.
pub fn begin_safekeeper(
    cluster: &mut Cluster,
    zone: Option<String>,
    replaces: Option<u64>,
) -> Result<u64> {
    let old = replaces.map(|id| cluster.state.safekeepers.iter().find(|place| place.id == id));
    let joins_for = Some(replaces.unwrap_or(0));
    let begun = cluster.state.safekeepers.iter().find(|place| place.joins_for == joins_for);
    let id = match begun {
        Some(place) => place.id,
        None => {
            let old = match (replaces, old) {
                (Some(id), Some(None)) => bail!(
                    "there is no safekeeper {id} in {}: 'pgstrata safekeeper list' has those that are there",
                    cluster.dir.display()
                ),
                (_, old) => old.flatten(),
            };
            let count = cluster.state.safekeepers.len();
            ensure!(count < MOST_SAFEKEEPERS, "there are {MOST_SAFEKEEPERS} safekeepers at most");
            let highest = cluster.state.safekeepers.iter().map(|place| place.id).max();
            // Never one that was there before: what is left of its directory is another's.
            let free = |id: &u64| !cluster.dir.join(format!("safekeeper-{id}")).exists();
            let id = (highest.unwrap_or(0) + 1..).find(free).unwrap_or(1);
            let zone = zone.or(old.map(|place| place.zone.clone()));
            let zone = zone.unwrap_or_else(|| format!("zone-{id}"));
            let ports = free_ports(3)?;
            let (wal, pg, http) = (ports[0], ports[1], ports[2]);
            let place = SafekeeperPlace { id, zone, wal, pg, http, started: false, joins_for };
            cluster.state.safekeepers.push(place);
            cluster.save()?;
            id
        }
    };
    let Some(at) = cluster.state.safekeepers.iter().position(|place| place.id == id) else {
        bail!("safekeeper {id} is not there any more");
    };
    let process = Process::new(&cluster.dir, &format!("safekeeper-{id}"));
    let place = &cluster.state.safekeepers[at];
    if process.pid().is_none() {
        ensure!(
            !has_lost_directory(&cluster.dir, place),
            "safekeeper {id}, which was started to take part, has lost its directory: 'pgstrata safekeeper remove {id}' forgets it"
        );
        process.start(&mut safekeeper_command(cluster, place)?)?;
    }
    // Also one that an earlier command has just started: before that it can be a member of nothing.
    process.wait_ready(START_PATIENCE)?;
    cluster.state.safekeepers[at].started = true;
    cluster.save()?;
    Ok(id)
}

/// What a safekeeper was started for that has not come to its end: the one whose place it takes, 0 if nobody's.
pub fn joins_for(cluster: &Cluster, id: u64) -> Option<u64> {
    cluster.state.safekeepers.iter().find(|place| place.id == id)?.joins_for
}

/// It is a member of everything that it was to be; or goes on with what the one before it was started for.
pub fn safekeeper_has_joined(cluster: &mut Cluster, id: u64, for_whom: Option<u64>) -> Result<()> {
    for place in cluster.state.safekeepers.iter_mut().filter(|place| place.id == id) {
        place.joins_for = for_whom;
    }
    cluster.save()
}

/// Stops one that is a member of nothing any more, and forgets it. Its directory stays.
pub fn end_safekeeper(cluster: &mut Cluster, id: u64) -> Result<()> {
    let name = format!("safekeeper-{id}");
    end(&Process::new(&cluster.dir, &name))?;
    cluster.state.safekeepers.retain(|place| place.id != id);
    cluster.save()?;
    let directory = cluster.dir.join(name);
    if directory.exists() {
        eprintln!("pgstrata: {}", left_behind::said_of(cluster, id, &directory));
    }
    Ok(())
}

fn start_pageserver(cluster: &Cluster) -> Result<()> {
    let process = Process::new(&cluster.dir, "pageserver");
    if process.pid().is_some() {
        return Ok(());
    }
    let (http, pages, pg) = cluster.state.pageserver;
    let safekeepers: Vec<_> =
        cluster.state.safekeepers.iter().map(|place| format!("127.0.0.1:{}", place.pg)).collect();
    let mut command = Command::new(program("pageserver")?);
    command
        .arg("--dir")
        .arg(cluster.dir.join("pageserver"))
        .args(["--listen-http", &format!("127.0.0.1:{http}")])
        .args(["--listen-pages", &format!("127.0.0.1:{pages}")])
        .args(["--listen-pg", &format!("127.0.0.1:{pg}")])
        .args(["--safekeepers", &safekeepers.join(",")])
        .args(["--broker", &format!("http://127.0.0.1:{}", cluster.state.broker)]);
    store_options(cluster, &mut command);
    command.args(cluster.claim.has_parted.then_some("--parted"));
    process.start(&mut command)?;
    process.wait_ready(START_PATIENCE)?;
    Ok(())
}

/// Makes the first branch: `initdb`, as stock PostgreSQL does it, imported into the page server.
fn create_main(cluster: &Cluster, data_checksums: bool) -> Result<()> {
    // A name of its own for each attempt: what an earlier one started may still be at work.
    let directory = tempfile::Builder::new()
        .prefix(INITDB_PREFIX)
        .tempdir_in(cluster.computes_directory()?)
        .context("can't create a directory for initdb")?;
    let user = cluster.postgres_user()?;
    let make = found::Make { data_checksums, password: None };
    let archive = found::initdb(&cluster.state.pg_bin, directory.path(), user.as_ref(), &make)?;
    let address = cluster.pageserver_http()?;
    let pageserver = Service::pageserver(&address);
    found::import(pageserver, &cluster.state.tenant, FIRST_BRANCH, &archive)?;
    remove_old_attempts(cluster)
}

const INITDB_PREFIX: &str = ".initdb-";

/// Removes what attempts left that were killed.
fn remove_old_attempts(cluster: &Cluster) -> Result<()> {
    for entry in fs::read_dir(cluster.computes_directory()?)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(INITDB_PREFIX) {
            // Where one is still at work it fails, and the next time removes the rest.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Makes a command run as PostgreSQL's user, if we are root.
pub fn as_postgres(cluster: &Cluster, command: &mut Command) -> Result<()> {
    if let Some(user) = cluster.postgres_user()? {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).env("HOME", "/");
    }
    Ok(())
}

/// A file that PostgreSQL's user can read: where our own directory may be closed to it, a copy.
pub fn readable_copy(cluster: &Cluster, path: &Path) -> Result<PathBuf> {
    if cluster.postgres_user()?.is_none() {
        return Ok(path.to_owned());
    }
    let directory = cluster.computes_directory()?.join(".bin");
    let name = path.file_name().context("a program without a name")?;
    files::place_program(&directory, &name.to_string_lossy(), &fs::read(path)?)?;
    Ok(directory.join(name))
}

/// Ends everything: computes first, so that their last WAL is taken in.
pub fn down(dir: &Path) -> Result<()> {
    let (cluster, _lock) = Cluster::change(dir)?;
    let computes = cluster.state.computes.keys();
    let computes = end_each(computes.map(|branch| compute::process(&cluster, branch)), end);
    // All are tried, whatever one of them waits for.
    let errors = [computes, end_services(&cluster)].into_iter().filter_map(Result::err);
    let errors: Vec<_> = errors.map(|error| format!("{error:#}")).collect();
    ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(())
}

/// Ends all but the computes.
fn end_services(cluster: &Cluster) -> Result<()> {
    let safekeepers =
        cluster.state.safekeepers.iter().map(|place| format!("safekeeper-{}", place.id));
    let names = ["pageserver".to_owned()].into_iter().chain(safekeepers);
    let names = names.chain(["storage-broker".to_owned()]);
    end_each(names.map(|name| Process::new(&cluster.dir, &name)), end)
}

fn end(process: &Process) -> Result<bool> {
    process.end(Signal::SIGTERM, STOP_PATIENCE)
}

/// Ends each in turn, those too that come after one that can't be ended. What could not is an error.
fn end_each(
    processes: impl Iterator<Item = Process>,
    end: impl Fn(&Process) -> Result<bool>,
) -> Result<()> {
    let errors: Vec<_> = processes
        .filter_map(|process| end(&process).err())
        .map(|error| format!("{error:#}"))
        .collect();
    ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_does_not_end_keeps_no_other_from_ending() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["a", "b", "c"];
        let processes = || names.map(|name| Process::new(directory.path(), name)).into_iter();
        for process in processes() {
            process.start(Command::new("sleep").arg("60")).unwrap();
        }
        let stuck = processes().next().unwrap().pid();
        let error = end_each(processes(), |process| {
            ensure!(process.pid() != stuck, "it waits");
            end(process)
        });
        assert_eq!(error.unwrap_err().to_string(), "it waits");
        let left: Vec<_> = processes().filter_map(|process| process.pid()).collect();
        assert_eq!(left, Vec::from_iter(stuck));
        end_each(processes(), end).unwrap();
    }
}
