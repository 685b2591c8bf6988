//! docker-compose.yml says the truth: every service is started with the command, environment, user and order that it states,
//! as a plain process on a host of its own name, and its health check is run there. Directories are others, and an S3 server of
//! ours stands in for MinIO. The hosts are network namespaces, so this needs root, and fails without, unless
//! `PGSTRATA_SKIP_CONTAINERS` is set. In containers, and with what happens when these are cut off or killed, it is run by
//! `make test-compose`.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::hosts::Hosts;
use pgstrata_tests::services::behind;
use pgstrata_tests::{
    give_to_postgres, pg_bin, pg_command, programs, running_as_root, signal, unprivileged,
    wait_gone,
};
use rustix::process::Signal;
use serde_yaml_ng::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const COMPUTE: &str = "/var/lib/postgresql/compute";
/// A machine that is none of the services'.
const LAPTOP: &str = "laptop";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn read(name: &str) -> Value {
    let mut file: Value =
        serde_yaml_ng::from_str(&std::fs::read_to_string(root().join(name)).unwrap()).unwrap();
    file.apply_merge().unwrap();
    file
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let texts = value.and_then(Value::as_sequence).into_iter().flatten();
    texts.map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// With the defaults of `${NAME:-DEFAULT}`.
fn expand(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(at) = text.find("${") {
        let end = at + text[at..].find('}').unwrap();
        let default = text[at + 2..end].split_once(":-").unwrap().1.to_owned();
        text.replace_range(at..=end, &default);
    }
    text
}

/// What the file says, as processes on hosts.
struct Compose {
    services: BTreeMap<String, Value>,
    directory: TempDir,
    hosts: Hosts,
    running: BTreeMap<String, Child>,
    done: BTreeSet<String>,
}

impl Compose {
    fn new() -> Compose {
        let file = read("docker-compose.yml");
        let services: BTreeMap<String, Value> = file["services"]
            .as_mapping()
            .unwrap()
            .iter()
            .map(|(name, service)| (name.as_str().unwrap().to_owned(), service.clone()))
            .collect();
        let directory = TempDir::with_prefix("pgstrata-compose-").unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open.clone()).unwrap();
        let bin = directory.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        for name in [
            "compute-shim",
            "libpgstrata_preload.so",
            "pageserver",
            "pgstrata",
            "safekeeper",
            "storage-broker",
        ] {
            std::fs::copy(programs().join(name), bin.join(name)).unwrap();
            std::fs::set_permissions(bin.join(name), open.clone()).unwrap();
        }
        std::fs::copy(root().join("compose/certificates"), bin.join("certificates")).unwrap();
        let networked = services.iter().filter(|(_, service)| service.get("networks").is_some());
        let names: Vec<&str> = networked.map(|(name, _)| name.as_str()).chain([LAPTOP]).collect();
        let hosts = Hosts::new(&names);
        Compose { services, directory, hosts, running: BTreeMap::new(), done: BTreeSet::new() }
    }

    /// The directory in place of one of a service's container. A volume is one, whoever mounts it.
    fn place(&self, service: &str, inside: &str) -> PathBuf {
        let volumes = strings(self.services[service].get("volumes"));
        let volume = volumes.iter().find_map(|volume| {
            let (name, rest) = volume.split_once(':')?;
            (rest.split(':').next()? == inside).then(|| name.to_owned())
        });
        let place = self.directory.path().join(volume.unwrap_or_else(|| format!("of-{service}")));
        if !place.exists() {
            std::fs::create_dir_all(&place).unwrap();
            give_to_postgres(&place);
        }
        place
    }

    /// With the directories of this test.
    fn here(&self, service: &str, text: &str) -> String {
        let text = expand(text);
        for inside in ["/data", "/tls", COMPUTE] {
            let (before, path) = text.split_at(text.find('/').unwrap_or(text.len()));
            let rest = path.strip_prefix(inside);
            if let Some(rest) = rest
                && (before.is_empty() || before.ends_with('='))
                && (rest.is_empty() || rest.starts_with('/'))
            {
                return format!("{before}{}{rest}", self.place(service, inside).display());
            }
        }
        text
    }

    /// What the Dockerfile has for all of them.
    fn curl_home(&self, service: &str) -> PathBuf {
        let home = self.directory.path().join(format!("curl-{service}"));
        if !home.exists() {
            std::fs::create_dir(&home).unwrap();
            let text = std::fs::read_to_string(root().join("compose/curlrc")).unwrap();
            let lines = text.lines().map(|line| match line.split_once(" = ") {
                Some((name, path)) => format!("{name} = {}\n", self.here(service, path)),
                None => format!("{line}\n"),
            });
            std::fs::write(home.join(".curlrc"), lines.collect::<String>()).unwrap();
        }
        home
    }

    /// One of our programs, on a host, as the user of the image.
    fn on(&self, host: &str, words: &[String]) -> Command {
        let program = match words[0].as_str() {
            "curl" => PathBuf::from("/usr/bin/curl"),
            name => self.directory.path().join("bin").join(name),
        };
        let arguments: Vec<&str> = words[1..].iter().map(String::as_str).collect();
        let mut command = behind(&self.hosts.on(host), unprivileged(&program, &arguments));
        command.env("PGSTRATA_PG_BIN", pg_bin()).stdin(Stdio::null());
        command
    }

    fn command(&self, name: &str) -> Command {
        let service = &self.services[name];
        let words: Vec<String> =
            strings(service.get("command")).iter().map(|word| self.here(name, word)).collect();
        let mut command = match service.get("user").and_then(Value::as_str) {
            Some(user) => {
                assert_eq!((name, user), ("certificates", "root"));
                let bin = self.directory.path().join("bin");
                let mut command = Command::new(bin.join(&words[0]));
                let path = std::env::var("PATH").unwrap();
                command.args(&words[1..]).env("PATH", format!("{}:{path}", bin.display()));
                for volume in strings(service.get("volumes")) {
                    let (volume, inside) = volume.split_once(':').unwrap();
                    let made = inside.strip_prefix("/tls/").map(|name| format!("tls-{name}"));
                    assert_eq!(made.unwrap_or("pki".into()), volume);
                    let place = self.place(name, inside);
                    if let Some(service) = inside.strip_prefix("/tls/") {
                        let all = self.directory.path().join("all");
                        std::fs::create_dir_all(&all).unwrap();
                        let _ = std::os::unix::fs::symlink(&place, all.join(service));
                    }
                }
                command.env("PKI", self.place(name, "/pki"));
                command.env("TLS", self.directory.path().join("all"));
                command
            }
            None => self.on(name, &words),
        };
        let environment = service.get("environment").and_then(Value::as_mapping);
        for (variable, value) in environment.into_iter().flatten() {
            let value = self.here(name, value.as_str().unwrap());
            command.env(variable.as_str().unwrap(), value);
        }
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("{name}.log")))
            .unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    fn is_healthy(&self, name: &str) -> bool {
        let test = strings(self.services[name]["healthcheck"].get("test"));
        assert_eq!(test[0], "CMD");
        let mut command = self.on(name, &test[1..]);
        command.env("CURL_HOME", self.curl_home(name));
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("{name}.log")))
            .unwrap_or_default()
    }

    /// Starts the service and before it what it depends on, as `docker compose up` does.
    fn up(&mut self, name: &str) {
        for (on, how) in dependencies(&self.services[name]) {
            self.up(&on);
            match how.as_str() {
                "service_healthy" => self.wait_healthy(&on),
                "service_completed_successfully" => assert!(self.done.contains(&on), "{on}"),
                other => panic!("an unknown condition: {other}"),
            }
        }
        if self.running.contains_key(name) || self.done.contains(name) {
            return;
        }
        match name {
            "minio" => self.s3(),
            "bucket" => {
                // What its entry point makes.
                let entry = strings(self.services["bucket"].get("entrypoint")).join(" ");
                assert!(entry.contains("mc mb -p minio/pgstrata"), "{entry}");
                std::fs::create_dir(self.place("minio", "/data").join("pgstrata")).unwrap();
                self.done.insert(name.into());
            }
            "certificates" | "found" => self.run(name),
            _ => {
                let child = self.command(name).spawn().unwrap();
                self.running.insert(name.to_owned(), child);
            }
        }
    }

    /// What stands in for MinIO.
    fn s3(&mut self) {
        let program = Path::new(env!("CARGO_BIN_EXE_s3-server"));
        let mut command = Command::new(program);
        command.arg("0.0.0.0:9000").arg(self.place("minio", "/data"));
        let mut command = behind(&self.hosts.on("minio"), command);
        let of_minio = &self.services["minio"]["environment"];
        let value = |name: &str| expand(of_minio[name].as_str().unwrap());
        command.env("AWS_ACCESS_KEY_ID", value("MINIO_ROOT_USER"));
        command.env("AWS_SECRET_ACCESS_KEY", value("MINIO_ROOT_PASSWORD"));
        self.running.insert("minio".into(), command.stdin(Stdio::null()).spawn().unwrap());
    }

    fn wait_healthy(&mut self, name: &str) {
        if name == "minio" {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.is_healthy(name) {
            let ended = self.running.get_mut(name).unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {}", self.log(name));
            assert!(Instant::now() < deadline, "{name} does not get healthy: {}", self.log(name));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One that ends: its success is what others wait for.
    fn run(&mut self, name: &str) {
        let status = self.command(name).status().unwrap();
        assert!(status.success(), "{name}: {}", self.log(name));
        self.done.insert(name.into());
    }

    fn kill(&mut self, name: &str) {
        let mut child = self.running.remove(name).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        wait_gone(u64::from(child.id()));
    }

    /// A stock client on a machine that has nothing but the CA.
    fn client(&self, program: &str, password: &str, arguments: &[&str]) -> Output {
        let ca = self.place("compute", "/tls").join("ca.pem");
        let connection = format!(
            "host=compute user=postgres dbname=postgres sslmode=verify-full sslrootcert={}",
            ca.display()
        );
        // pgbench takes its connection as the database's name, and last.
        let by_name = if program == "pgbench" { &[][..] } else { &["-d"] };
        let arguments = [arguments, by_name, &[&connection]].concat();
        let mut command = behind(&self.hosts.on(LAPTOP), pg_command(program, &arguments));
        command.env("PGPASSWORD", password).output().unwrap()
    }

    fn psql(&self, password: &str, text: &str) -> Output {
        self.client("psql", password, &["-XAtq", "-c", text])
    }

    fn sql(&self, text: &str) -> String {
        let output = self.psql("postgres", text);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What `docker compose run --rm pgstrata ...` prints.
    fn pgstrata(&self, arguments: &[&str]) -> String {
        let entry = strings(self.services["pgstrata"].get("entrypoint"));
        assert_eq!(entry, ["pgstrata", "--cluster", "/etc/pgstrata/cluster.toml"]);
        let file = self.directory.path().join("cluster.toml");
        let text = std::fs::read_to_string(root().join("compose/cluster.toml")).unwrap();
        let tls = format!("\"{}\"", self.place("pgstrata", "/tls").display());
        std::fs::write(&file, text.replace("\"/tls\"", &tls)).unwrap();
        let file = file.display().to_string();
        let words = ["pgstrata", "--cluster", &file].into_iter().chain(arguments.iter().copied());
        let words: Vec<String> = words.map(str::to_owned).collect();
        let output = self.on("pgstrata", &words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

fn dependencies(service: &Value) -> Vec<(String, String)> {
    let mapping = service.get("depends_on").and_then(Value::as_mapping).into_iter().flatten();
    let row = |(on, how): (&Value, &Value)| {
        (on.as_str().unwrap().to_owned(), how["condition"].as_str().unwrap().to_owned())
    };
    mapping.map(row).collect()
}

impl Drop for Compose {
    fn drop(&mut self) {
        for (name, child) in &mut self.running {
            signal(u64::from(child.id()), Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(20);
            while child.try_wait().is_ok_and(|ended| ended.is_none()) {
                if Instant::now() > deadline {
                    eprintln!("{name} does not end");
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn the_compose_file_makes_a_cluster() {
    if !running_as_root() && std::env::var_os("PGSTRATA_SKIP_CONTAINERS").is_some() {
        eprintln!("not run, as PGSTRATA_SKIP_CONTAINERS asks: it needs root");
        return;
    }
    assert!(running_as_root(), "this needs root; PGSTRATA_SKIP_CONTAINERS=1 does without it");
    let mut compose = Compose::new();
    compose.up("compute");
    compose.wait_healthy("compute");
    compose.sql("create table t as select generate_series(1, 1000) a");
    assert_eq!(compose.sql("select sum(a) from t"), "500500");
    let refused = compose.psql("wrong", "select 1");
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(complaint.contains("password authentication failed"), "{complaint}");
    for arguments in [&["-i", "-q"][..], &["-n", "-c", "4", "-t", "20"]] {
        let output = compose.client("pgbench", "postgres", arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let status = compose.pgstrata(&["status"]);
    assert!(status.contains("zone-a") && status.contains("zone-c"), "{status}");

    // Every service of ours is needed for that, and none is left out here, but those that are started by name.
    let ours = |service: &Value| {
        service.get("image").and_then(Value::as_str) == Some("pgstrata")
            && service.get("profiles").is_none()
    };
    let services = compose.services.iter().filter(|(_, service)| ours(service));
    let all: BTreeSet<String> = services.map(|(name, _)| name.clone()).collect();
    let started = compose.running.keys().chain(&compose.done);
    let started: BTreeSet<String> =
        started.filter(|name| !["minio", "bucket"].contains(&name.as_str())).cloned().collect();
    assert_eq!(all, started);

    // Again, as after 'docker compose up' on what is there: nothing is made anew, running services are given new certificates;
    // and a compute that was killed, with its cache, is restarted on what was committed.
    compose.run("certificates");
    compose.run("found");
    compose.kill("compute");
    std::fs::remove_dir_all(compose.place("compute", COMPUTE)).unwrap();
    compose.up("compute");
    compose.wait_healthy("compute");
    assert_eq!(compose.sql("select sum(a) from t"), "500500");
    assert!(compose.log("found").is_empty(), "{}", compose.log("found"));
}

#[test]
fn the_compose_file_is_what_docker_wants() {
    let file = read("docker-compose.yml");
    let services = file["services"].as_mapping().unwrap();
    let is_optional = |service: &Value| service.get("profiles").is_some();
    for (name, service) in services {
        let name = name.as_str().unwrap();
        // 'up --wait' takes one that ends for a failure, unless one that runs waits for it.
        let ends = service.get("restart").and_then(Value::as_str) == Some("no");
        let waits = |other: &Value| {
            dependencies(other)
                .contains(&(name.to_owned(), "service_completed_successfully".to_owned()))
        };
        let adopted = services.values().any(|other| {
            !is_optional(other)
                && other.get("restart").and_then(Value::as_str) != Some("no")
                && waits(other)
        });
        assert!(!ends || is_optional(service) || adopted, "{name} would fail 'up --wait'");
        // Nothing is published beyond this machine, and everything can be moved.
        for port in strings(service.get("ports")) {
            assert!(port.starts_with("127.0.0.1:${"), "{name}: {port}");
        }
        // Volumes are declared.
        for volume in strings(service.get("volumes")) {
            let (volume, _) = volume.split_once(':').unwrap();
            let is_known = volume.starts_with("./") || file["volumes"].get(volume).is_some();
            assert!(is_known, "{name}: {volume}");
        }
        for network in strings(service.get("networks")) {
            assert!(file["networks"].get(&network).is_some(), "{name}: {network}");
        }
    }
    // One service builds the image (several that do it at once, under one name, are in each other's way), and what is
    // started by itself waits for that one.
    let builds = services.iter().filter(|(_, service)| service.get("build").is_some());
    let builds: Vec<&str> = builds.map(|(name, _)| name.as_str().unwrap()).collect();
    assert_eq!(builds, ["certificates"]);
    let local = read("compose.dev.yml");
    assert_eq!(local["services"]["certificates"]["build"]["target"], "local");
    // Prometheus scrapes every HTTP interface of ours.
    let prometheus = read("compose/prometheus.yml");
    let targets = strings(prometheus["scrape_configs"][0]["static_configs"][0].get("targets"));
    let mut expected: Vec<String> = Vec::new();
    for (name, service) in services.iter().filter(|(_, service)| !is_optional(service)) {
        let words = strings(service.get("command"));
        let listens =
            words.iter().position(|word| ["--listen-http", "--listen"].contains(&&**word));
        if let Some(at) = listens {
            let port = words[at + 1].rsplit(':').next().unwrap();
            expected.push(format!("{}:{port}", name.as_str().unwrap()));
        }
    }
    assert_eq!(BTreeSet::from_iter(targets), BTreeSet::from_iter(expected));
}
