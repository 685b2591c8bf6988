//! `pgstrata doctor`: what it finds of clusters that are well, and of what endangers them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pgstrata_ids::TenantId;
use pgstrata_tests::services::Services;
use pgstrata_tests::{
    Cluster, free_port, give_to_postgres, pg_bin, programs, raw, running_as_root, signal,
};
use rustix::process::Signal;
use serde_json::Value;

const TENANT: TenantId = TenantId([0x11; 16]);
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than it takes where everything hangs.
const LONGEST: Duration = Duration::from_secs(40);

/// What it said, which it decided its exit status by.
struct Said(Value);

impl Said {
    fn of(output: &Output) -> Said {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8_lossy(&output.stdout);
        let said: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error}: {text}; {complaint}"));
        let said = Said(said);
        let counted = |severity: &str| said.all().filter(|one| one["severity"] == severity).count();
        assert_eq!(said.0["danger"], counted("danger"), "{text}");
        assert_eq!(said.0["warnings"], counted("warning"), "{text}");
        let expected = i32::from(counted("danger") > 0);
        assert_eq!(output.status.code(), Some(expected), "{text}; {complaint}");
        let ranks = said.all().map(|one| match one["severity"].as_str().unwrap() {
            "danger" => 0,
            "warning" => 1,
            "unknown" => 2,
            "ok" => 3,
            other => panic!("{other}"),
        });
        assert!(ranks.is_sorted(), "{text}");
        said
    }

    fn all(&self) -> impl Iterator<Item = &Value> {
        self.0["findings"].as_array().unwrap().iter()
    }

    /// What a check says of an object, each with its severity.
    fn of_object(&self, check: &str, object: &str) -> Vec<(&str, &str)> {
        let chosen = self.all().filter(|one| one["check"] == check && one["object"] == object);
        chosen
            .map(|one| (one["severity"].as_str().unwrap(), one["text"].as_str().unwrap()))
            .collect()
    }

    /// The one thing that a check says of an object.
    fn one(&self, check: &str, object: &str) -> (&str, &str) {
        match self.of_object(check, object).as_slice() {
            [one] => *one,
            other => panic!("{check} of {object}: {other:?} in {}", self.0),
        }
    }

    /// What it says with this severity, each with its check and its object.
    fn with(&self, severity: &str) -> Vec<(&str, &str)> {
        let chosen = self.all().filter(|one| one["severity"] == severity);
        chosen
            .map(|one| (one["check"].as_str().unwrap(), one["object"].as_str().unwrap()))
            .collect()
    }
}

fn doctor(cluster: &Cluster) -> Said {
    let began = Instant::now();
    let said = Said::of(&cluster.try_cli(&["doctor", "--json"]));
    assert!(began.elapsed() < LONGEST, "{:?}", began.elapsed());
    said
}

/// The type of the file system that tests' clusters are in.
fn file_system() -> String {
    let output = Command::new("stat")
        .args(["--file-system", "--format", "%T"])
        .arg(std::env::temp_dir())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Everything below a directory that lasts, with its length.
fn listing(directory: &Path) -> Vec<String> {
    let output = Command::new("find").arg(directory).args(["-printf", "%p %s\n"]).output().unwrap();
    let mut lines: Vec<_> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn a_cluster_that_is_well_is_in_no_danger_and_one_without_a_majority_is() {
    if file_system() == "tmpfs" {
        return eprintln!("NOT TESTED: {} is in memory", std::env::temp_dir().display());
    }
    let cluster = Cluster::new();
    cluster.up();
    let said = doctor(&cluster);
    assert_eq!(said.with("danger"), [], "{}", said.0);
    let names = [
        "storage-broker",
        "safekeeper-1",
        "safekeeper-2",
        "safekeeper-3",
        "pageserver",
        "compute-main",
    ];
    for name in names {
        let well = "it answers, and says of nothing that it failed";
        assert_eq!(said.one("services", name), ("ok", well));
        let clock =
            "its clock is not more than a second from this machine's, as far as can be seen";
        assert_eq!(said.one("clocks", name), ("ok", clock));
        assert_eq!(said.one("limits", name).0, "ok", "{}", said.0);
    }
    assert_eq!(
        said.one("services", "safekeepers"),
        ("ok", "3 of 3 safekeepers are well: 1 more may fail")
    );
    assert_eq!(said.one("zones", "safekeepers"), ("ok", "no zone has a majority of them"));
    let store = cluster.dir().join("objects");
    let written = format!("{} is read and written", store.display());
    assert_eq!(said.one("store", "objects"), ("ok", written.as_str()));
    let probes = fs::read_dir(store.join("probe")).map_or(0, Iterator::count);
    assert_eq!(probes, 0, "what was written to probe the store is left");
    let branches = "the one that there is is served, and its WAL taken in and archived";
    assert_eq!(said.one("branches", "branches"), ("ok", branches));
    let (severity, text) = said.one("disks", "safekeepers");
    assert_eq!(severity, "warning");
    assert!(text.starts_with("3 of 3 safekeepers, and all objects, are on disk "), "{text}");
    let lasting = "safekeeper-1, safekeeper-2, safekeeper-3, objects";
    for check in ["mounts", "space", "write caches", "syncs"] {
        assert_eq!(said.of_object(check, lasting).len(), 1, "{check}: {}", said.0);
    }
    assert!(said.one("syncs", lasting).1.starts_with("a write is on the disk in "), "{}", said.0);
    assert_eq!(said.one("programs", "pgstrata").0, "ok");
    let (severity, text) = said.one("programs", "postgres");
    let place = format!(" is in {}", pg_bin().canonicalize().unwrap().display());
    assert_eq!(severity, "ok");
    assert!(text.starts_with("PostgreSQL 1") && text.ends_with(&place), "{text}");

    // For people: no escape sequences where no terminal is.
    let text = cluster.cli(&["doctor"]);
    let first = text.lines().next().unwrap();
    assert_eq!(
        first.split_whitespace().collect::<Vec<_>>(),
        ["SEVERITY", "CHECK", "OBJECT", "TEXT"]
    );
    assert!(
        !text.contains('\x1b') && text.lines().last().unwrap().starts_with("0 dangers, "),
        "{text}"
    );

    what_is_away_is_said(&cluster);

    cluster.cli(&["down"]);
    let before = listing(&cluster.dir());
    let said = doctor(&cluster);
    assert_eq!(said.with("danger"), [], "{}", said.0);
    let rests = "nothing of it runs: 'pgstrata up' starts it";
    assert_eq!(said.one("services", "cluster"), ("warning", rests));
    assert_eq!(listing(&cluster.dir()), before, "it leaves everything as it was");

    // What it promised is gone.
    let own = cluster.dir().join("safekeeper-3");
    fs::rename(&own, cluster.dir().join("kept")).unwrap();
    let said = doctor(&cluster);
    assert_eq!(said.with("danger"), [("services", "safekeeper-3")], "{}", said.0);
    let (_, text) = said.one("services", "safekeeper-3");
    assert!(text.starts_with("it has lost its directory "), "{text}");
    fs::rename(cluster.dir().join("kept"), &own).unwrap();
    // The directory has forgotten that the store is its own: what it is told of is another's.
    let claim = cluster.dir().join("claim.json");
    fs::rename(&claim, cluster.dir().join("claim.kept")).unwrap();
    let said = doctor(&cluster);
    assert_eq!(said.with("danger"), [("store", "objects")], "{}", said.0);
    assert!(said.one("store", "objects").1.contains("belongs to the cluster in"), "{}", said.0);
    fs::rename(cluster.dir().join("claim.kept"), &claim).unwrap();
    // And where it is gone, none is made in its place.
    fs::rename(&store, cluster.dir().join("elsewhere")).unwrap();
    let said = doctor(&cluster);
    let missing = format!("{} is not there: is it mounted?", store.display());
    assert_eq!(said.one("store", "objects"), ("danger", missing.as_str()));
    assert!(!store.exists());
    fs::rename(cluster.dir().join("elsewhere"), &store).unwrap();
}

/// Processes that ended, and one that hangs.
fn what_is_away_is_said(cluster: &Cluster) {
    let pageserver = cluster.pid("pageserver");
    signal(pageserver, Signal::STOP);
    let said = doctor(cluster);
    assert_eq!(said.with("danger"), [("services", "pageserver")], "{}", said.0);
    let (_, text) = said.one("services", "pageserver");
    assert!(text.starts_with("it does not answer (it does not answer within 2 s)"), "{text}");
    assert_eq!(said.one("branches", "branches").0, "unknown");
    assert_eq!(said.one("clocks", "pageserver").0, "unknown");
    signal(pageserver, Signal::CONT);

    cluster.kill("safekeeper-1");
    let said = doctor(cluster);
    assert_eq!(said.with("danger"), [], "{}", said.0);
    let down = "it does not run: 'pgstrata up' starts it";
    assert_eq!(said.one("services", "safekeeper-1"), ("warning", down));
    let spare = "2 of 3 safekeepers are well: 0 more may fail";
    assert_eq!(said.one("services", "safekeepers"), ("warning", spare));
    cluster.kill("safekeeper-2");
    let said = doctor(cluster);
    assert_eq!(said.with("danger"), [("services", "safekeepers")], "{}", said.0);
    let (_, text) = said.one("services", "safekeepers");
    assert!(text.starts_with("1 of 3 safekeepers are well, which is no majority:"), "{text}");
}

#[test]
fn zones_and_descriptors_are_warned_of() {
    let mut cluster = Cluster::with(&["--zones", "a,b,b"], &[]);
    cluster.limit_descriptors(512);
    cluster.up();
    let said = doctor(&cluster);
    let (severity, text) = said.one("zones", "safekeepers");
    assert_eq!(severity, "warning");
    assert!(text.starts_with("2 of 3 safekeepers are in zone 'b'"), "{text}");
    let few = "it may open 512 files and connections: let it have 1024 at least (LimitNOFILE=, ulimit -n)";
    for name in ["safekeeper-1", "pageserver", "storage-broker", "compute-main"] {
        assert_eq!(said.one("limits", name), ("warning", few));
    }
}

/// Runs a script with mounts of its own, which are gone with it.
fn in_mounts(script: &str) -> Output {
    Command::new("unshare").args(["--mount", "sh", "-ec", script]).output().unwrap()
}

#[test]
fn what_is_kept_in_memory_is_in_danger() {
    if !running_as_root() || !in_mounts("mount -t tmpfs tmpfs /mnt").status.success() {
        return eprintln!("NOT TESTED: mounting a file system needs root and its capabilities");
    }
    let place = tempfile::TempDir::with_prefix("pgstrata-test-").unwrap();
    let mounted = place.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let program = programs().join("pgstrata");
    let look = |before: &str| {
        let script = format!(
            "mount -t tmpfs -o size=192m,mode=755 tmpfs {mounted}; {before}; exec {program} --dir {mounted}/new doctor --json",
            mounted = mounted.display(),
            program = program.display()
        );
        let said = Said::of(&in_mounts(&script));
        assert!(!mounted.join("new").exists(), "no cluster is made");
        said
    };
    let said = look("true");
    assert_eq!(said.with("danger"), [("mounts", "directory")], "{}", said.0);
    let text = format!(
        "it is on tmpfs ({}), which a restart of the machine empties: keep it on a disk",
        mounted.display()
    );
    assert_eq!(said.one("mounts", "directory"), ("danger", text.as_str()));
    let room = format!("192.0 MiB of 192.0 MiB are free in {}", mounted.display());
    let (severity, text) = said.one("space", "directory");
    assert_eq!((severity, text.split(':').next().unwrap()), ("warning", room.as_str()));

    let said = look(&format!("fallocate -l 188m {}/full", mounted.display()));
    assert_eq!(
        said.with("danger"),
        [("mounts", "directory"), ("space", "directory")],
        "{}",
        said.0
    );
    let room = format!("4.0 MiB of 192.0 MiB are free in {}", mounted.display());
    assert_eq!(said.one("space", "directory").1.split(':').next().unwrap(), room);

    let said = look(&format!("mount -o remount,ro {}", mounted.display()));
    let texts: Vec<_> = said.of_object("mounts", "directory");
    assert!(
        texts.iter().any(|(severity, text)| *severity == "danger" && text.contains("is read-only")),
        "{texts:?}"
    );
    // The machine is looked at all the same.
    assert_eq!(said.one("limits", "kernel").0, "ok");
    assert_eq!(said.one("programs", "postgres").0, "ok");
    assert_eq!(said.of_object("services", "cluster"), []);
}

#[test]
fn a_safekeeper_on_a_file_system_in_memory_is_found_in_a_cluster() {
    if !running_as_root() || !in_mounts("mount -t tmpfs tmpfs /mnt").status.success() {
        return eprintln!("NOT TESTED: mounting a file system needs root and its capabilities");
    }
    if file_system() == "tmpfs" {
        return eprintln!("NOT TESTED: {} is in memory", std::env::temp_dir().display());
    }
    let cluster = Cluster::new();
    cluster.up();
    let own = cluster.dir().join("safekeeper-2");
    // As the command sees it: the services go on where they are.
    let script = format!(
        "mount -t tmpfs -o size=4g,mode=777 tmpfs /mnt; cp -a {own}/. /mnt; mount --bind /mnt {own}; \
         exec {program} --dir {dir} doctor --json",
        own = own.display(),
        program = programs().join("pgstrata").display(),
        dir = cluster.dir().display()
    );
    let said = Said::of(&in_mounts(&script));
    assert_eq!(said.with("danger"), [("mounts", "safekeeper-2")], "{}", said.0);
    let (severity, text) = said.one("disks", "safekeepers");
    assert_eq!(severity, "warning");
    assert!(text.starts_with("2 of 3 safekeepers, and all objects, are on disk "), "{text}");
}

#[test]
fn a_disk_that_hangs_is_told_and_does_not_hang_who_asks() {
    let place = tempfile::TempDir::with_prefix("pgstrata-test-").unwrap();
    // A file system that stands still, as one on a disk that does not answer does.
    let before = format!(
        "cd {place}; mkdir m; truncate -s 64m img; mkfs.ext4 -q img; mount -o loop img m; fsfreeze -f m; \
         trap 'fsfreeze -u m' EXIT",
        place = place.path().display()
    );
    if !running_as_root() || !in_mounts(&before).status.success() {
        return eprintln!(
            "NOT TESTED: freezing a file system needs root, its capabilities, and ext4"
        );
    }
    fs::remove_dir(place.path().join("m")).unwrap();
    let began = Instant::now();
    let program = programs().join("pgstrata");
    // The shell ends as its last command does.
    let said =
        Said::of(&in_mounts(&format!("{before}; {} --dir m/new doctor --json", program.display())));
    assert!(began.elapsed() < LONGEST, "{:?}", began.elapsed());
    let (severity, text) = said.one("syncs", "directory");
    assert_eq!(severity, "danger");
    assert!(text.contains("has not reached the disk in time"), "{text}");
    assert_eq!(said.one("programs", "postgres").0, "ok", "{}", said.0);
}

/// Services that ask for certificates.
struct Elsewhere {
    services: Services,
    pki: PathBuf,
    broker: String,
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn text<'a>(said: &'a Value, name: &str) -> &'a str {
    said[name].as_str().unwrap_or_else(|| panic!("no {name} in {said}"))
}

fn named(address: &str) -> String {
    address.replace("127.0.0.1", "localhost")
}

fn pgstrata(arguments: &[&str]) -> Output {
    let mut command = Command::new(programs().join("pgstrata"));
    command.env_remove("PGSTRATA_DIR").env_remove("PGSTRATA_CLUSTER");
    command.args(arguments).output().unwrap()
}

fn run(arguments: &[&str]) -> String {
    let output = pgstrata(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Elsewhere {
    fn issue(&self, role: &str, name: &str, days: &str) -> PathBuf {
        let pki = self.pki.to_str().unwrap();
        let who = ["auth", "issue", "--dir", pki, "--role", role, "--name", name];
        run(&[&who[..], &["--host", "localhost", "--days", days]].concat());
        self.pki.join(format!("{role}-{name}"))
    }

    fn start(&mut self, name: &str, program: &str, arguments: &[String]) -> Value {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.services.start(name, program, &arguments)
    }

    /// Three safekeepers, of which the second is in no zone and has a certificate for five days.
    fn new() -> Elsewhere {
        let services = Services::new();
        let pki = services.path("pki");
        let mut elsewhere = Elsewhere { services, pki, broker: String::new() };
        run(&["auth", "init", "--dir", elsewhere.pki.to_str().unwrap()]);
        let tls = |directory: PathBuf| words(&format!("--tls {}", directory.display()));
        let own = tls(elsewhere.issue("broker", "b", "365"));
        let said = elsewhere.start(
            "broker",
            "storage-broker",
            &[words("--listen 127.0.0.1:0"), own].concat(),
        );
        elsewhere.broker = format!("https://{}", named(text(&said, "http")));
        let store = elsewhere.services.path("objects").display().to_string();
        let common = words(&format!(
            "--broker {} --object-store {store} --advertise-pg localhost:0 --advertise-http localhost:0",
            elsewhere.broker
        ));
        for (id, zone, days) in
            [("1", "--zone a", "365"), ("2", "--zone=", "5"), ("3", "--zone c", "365")]
        {
            let own = words(&format!("--id {id} {zone} --advertise-wal localhost:0"));
            let tls = tls(elsewhere.issue("safekeeper", id, days));
            let own = [common.clone(), own, tls].concat();
            elsewhere.start(&format!("safekeeper-{id}"), "safekeeper", &own);
        }
        let tls = tls(elsewhere.issue("pageserver", "p", "20"));
        let own = [common, words("--advertise-pages localhost:0"), tls].concat();
        elsewhere.start("pageserver", "pageserver", &own);
        elsewhere
    }

    /// The file of a cluster, with what is shown.
    fn file(&self, name: &str, shown: &str) -> String {
        let file = self.services.path(name);
        fs::write(&file, format!("broker = \"{}\"\n{shown}\n", self.broker)).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&file, mode).unwrap();
        file.display().to_string()
    }

    fn doctor(&self, file: &str) -> Said {
        Said::of(&pgstrata(&["--cluster", file, "doctor", "--json"]))
    }

    /// Waits until something is as it is about to be.
    fn wait(&self, file: &str, what: &str, is_so: impl Fn(&Said) -> bool) -> Said {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.doctor(file);
            if is_so(&said) {
                return said;
            }
            assert!(Instant::now() < deadline, "{what}: {}", said.0);
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Makes the first branch, and starts its compute: from then on it has members.
    fn found(&mut self, file: &str) {
        let tenant = TENANT.to_string();
        let mut command = Command::new(programs().join("pgstrata"));
        command.env("PGSTRATA_PG_BIN", pg_bin());
        let output =
            command.args(["--cluster", file, "found", "--tenant", &tenant]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let own = self.services.path("of-postgres");
        let issued = self.issue("compute", &tenant, "365");
        assert!(Command::new("cp").arg("-r").args([&issued, &own]).status().unwrap().success());
        give_to_postgres(&own);
        let arguments = words(&format!(
            "--branch main --port {} --safekeepers 1,2,3 --broker {} --tls {}",
            free_port(),
            self.broker,
            own.display()
        ));
        let said = self.start("compute", "compute-shim", &arguments);
        let http = named(text(&said, "http"));
        let admin = raw::tls(&self.pki.join("ca.pem"), Some(&self.pki.join("admin-me")), &[]);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let asked = raw::http(&http, &admin, None, "GET /readyz", "");
            if asked.as_ref().is_ok_and(|(status, _)| *status == 200) {
                return;
            }
            assert!(Instant::now() < deadline, "{asked:?}: {}", self.services.log("compute"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_cluster_elsewhere_is_looked_at_by_what_its_services_show() {
    let mut elsewhere = Elsewhere::new();
    let admin = elsewhere.issue("admin", "me", "365");
    let file = elsewhere.file("admin.toml", &format!("tls = \"{}\"", admin.display()));
    let is_listed = |said: &Said| {
        let names = ["safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver"];
        names.into_iter().all(|name| {
            said.of_object("services", name)
                == [("ok", "it answers, and says of nothing that it failed")]
        })
    };
    let said = elsewhere.wait(&file, "all are listed", is_listed);

    // By its handshake, and by its directory: it runs on this machine.
    let dangers = said.with("danger");
    let certificates =
        dangers.iter().filter(|one| **one == ("certificates", "safekeeper-2")).count();
    assert_eq!(certificates, 2, "{}", said.0);
    let (severity, shown) = said.of_object("certificates", "safekeeper-2")[0];
    assert_eq!(severity, "danger");
    assert!(
        shown.contains("is valid for 4 days yet") || shown.contains("is valid for 5 days yet"),
        "{shown}"
    );
    let of_pageserver = said.of_object("certificates", "pageserver");
    let shown = of_pageserver.iter().filter(|(severity, _)| *severity == "warning").count();
    assert_eq!(shown, 2, "{of_pageserver:?}");
    let (severity, _) = said.of_object("certificates", "safekeeper-1")[0];
    assert_eq!(severity, "ok", "{}", said.0);
    assert_eq!(said.one("zones", "safekeeper-2").0, "warning");
    for name in ["storage-broker", "safekeeper-1", "pageserver"] {
        assert_eq!(said.one("clocks", name).0, "ok", "{}", said.0);
    }
    // What can't be seen is not said to be well.
    assert_eq!(said.one("services", "computes").0, "unknown");
    assert_eq!(said.one("machines", "machines").0, "unknown");
    assert_eq!(said.one("store", "objects").0, "unknown");
    assert_eq!(said.one("limits", "safekeeper-3").0, "ok");
    let (severity, disks) = said.one("disks", "safekeepers");
    assert!(
        severity == "warning" && disks.starts_with("3 of 3 safekeepers, and all objects,"),
        "{disks}"
    );

    // Renewed, it is well without a restart.
    elsewhere.issue("safekeeper", "2", "365");
    let is_renewed = |said: &Said| {
        said.of_object("certificates", "safekeeper-2").iter().all(|one| one.0 == "ok")
    };
    elsewhere.wait(&file, "a certificate is renewed", is_renewed);

    elsewhere.found(&file);
    let said = elsewhere.doctor(&file);
    assert_eq!(
        said.one("services", "branch main"),
        ("ok", "3 of 3 safekeepers are well: 1 more may fail")
    );
    what_is_shown_expires(&mut elsewhere);
    elsewhere.services.kill("safekeeper-1");
    elsewhere.services.kill("safekeeper-2");
    let said = elsewhere.doctor(&file);
    let (severity, text) = said.one("services", "branch main");
    assert_eq!(severity, "danger");
    assert!(text.starts_with("1 of 3 safekeepers are well, which is no majority:"), "{text}");

    elsewhere.services.kill("compute");
    elsewhere.services.kill("broker");
    let said = elsewhere.doctor(&file);
    assert_eq!(said.one("services", "cluster").0, "danger", "{}", said.0);
}

/// A token, and a certificate that the command itself shows.
fn what_is_shown_expires(elsewhere: &mut Elsewhere) {
    let pki = elsewhere.pki.display().to_string();
    let token = run(&["auth", "token", "--dir", &pki, "--scope", "read", "--ttl", "1s"]);
    let file = elsewhere.file("token.toml", &format!("ca = \"{pki}/ca.pem\"\ntoken = \"{token}\""));
    std::thread::sleep(Duration::from_millis(2100));
    let output = pgstrata(&["--cluster", &file, "doctor", "--json"]);
    assert!(!String::from_utf8_lossy(&output.stdout).contains(&token), "a token is printed");
    let said = Said::of(&output);
    let (severity, text) = said.one("certificates", "cluster file");
    assert_eq!(severity, "danger");
    assert!(text.starts_with("its token expired at "), "{text}");

    let key = elsewhere.issue("admin", "open", "365");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(key.join("key.pem"), mode).unwrap();
    let file = elsewhere.file("open.toml", &format!("tls = \"{}\"", key.display()));
    let said = elsewhere.doctor(&file);
    let found = said.of_object("certificates", "cluster file");
    assert!(
        found
            .iter()
            .any(|(severity, text)| *severity == "danger" && text.contains("others can read it")),
        "{found:?}"
    );
}

#[test]
fn a_local_clusters_file_is_looked_at_as_one_elsewhere() {
    let cluster = Cluster::new();
    cluster.up();
    let file = cluster.dir().join("here.toml");
    let file = file.to_str().unwrap();
    cluster.cli(&["cluster", "export", file]);
    let said = Said::of(&pgstrata(&["--cluster", file, "doctor", "--json"]));
    assert_eq!(said.with("danger").iter().filter(|one| one.0 != "mounts").count(), 0, "{}", said.0);
    let certificates = said.all().filter(|one| one["check"] == "certificates").count();
    assert_eq!(certificates, 0, "there are none: {}", said.0);
    for name in ["storage-broker", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver"] {
        assert_eq!(said.one("services", name).0, "ok", "{}", said.0);
    }
    assert_eq!(said.one("limits", "safekeeper-1").0, "ok");
    let output = pgstrata(&["--cluster", file, "--dir", "x", "doctor"]);
    assert_eq!(output.status.code(), Some(2));
    let help = String::from_utf8(pgstrata(&["doctor", "--help"]).stdout).unwrap();
    assert!(help.contains("exits with 1 where there is a danger"), "{help}");
}
