//! docker-compose.yml says the truth: every service of ours is started with the command, environment,
//! user and order that it states, as a plain process, and its health check is run. Only ports and
//! directories are others, and moto stands in for MinIO.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::{
    S3Server, connect, free_port, give_to_postgres, pg_bin, programs, signal, unprivileged,
    wait_gone,
};
use rustix::process::Signal;
use serde_yaml_ng::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const LOOPBACK: &str = "127.0.0.1:";
/// MinIO's port, which moto has here.
const S3_PORT: u16 = 9000;

fn file() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docker-compose.yml");
    let mut file: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    file.apply_merge().unwrap();
    file
}

fn strings(value: &Value) -> Vec<String> {
    value.as_sequence().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// The ports that a text names on loopback.
fn ports_in(text: &str) -> Vec<u16> {
    let after = text.match_indices(LOOPBACK).map(|(at, _)| &text[at + LOOPBACK.len()..]);
    after
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .collect()
}

/// What the file says, as processes on this machine.
struct Compose {
    services: BTreeMap<String, Value>,
    directory: TempDir,
    ports: BTreeMap<u16, u16>,
    running: BTreeMap<String, Child>,
    done: BTreeSet<String>,
    s3: S3Server,
}

impl Compose {
    fn new() -> Compose {
        let file = file();
        let services: BTreeMap<String, Value> = file["services"]
            .as_mapping()
            .unwrap()
            .iter()
            .map(|(name, service)| (name.as_str().unwrap().to_owned(), service.clone()))
            .collect();
        let directory = TempDir::with_prefix("pgstrata-compose-").unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open.clone()).unwrap();
        // Where the image has them, everybody may read them.
        let bin = directory.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        for name in ["compute-shim", "libpgstrata_preload.so", "pgstrata"] {
            std::fs::copy(programs().join(name), bin.join(name)).unwrap();
            std::fs::set_permissions(bin.join(name), open.clone()).unwrap();
        }
        let s3 = S3Server::start();
        let s3_port = *ports_in(&s3.endpoint).first().unwrap();
        Compose {
            services,
            directory,
            ports: BTreeMap::from([(S3_PORT, s3_port)]),
            running: BTreeMap::new(),
            done: BTreeSet::new(),
            s3,
        }
    }

    fn port(&mut self, of: u16) -> u16 {
        *self.ports.entry(of).or_insert_with(free_port)
    }

    /// With this machine's ports and directories.
    fn here(&mut self, service: &str, text: &str) -> String {
        let mut text = text.to_owned();
        let mut places: Vec<u16> = ports_in(&text);
        places.sort_unstable();
        places.dedup();
        let chosen: Vec<(u16, u16)> = places.into_iter().map(|of| (of, self.port(of))).collect();
        // In two steps: a port chosen here may be one that the file names too.
        for (of, _) in &chosen {
            text = text.replace(&format!("{LOOPBACK}{of}"), &format!("{LOOPBACK}<{of}>"));
        }
        for (of, port) in chosen {
            text = text.replace(&format!("<{of}>"), &port.to_string());
        }
        let own = self.directory.path().join(service);
        match text.as_str() {
            "/data" | "/var/lib/postgresql/compute" => own.display().to_string(),
            _ => text,
        }
    }

    fn command(&mut self, name: &str) -> Command {
        let service = self.services[name].clone();
        let words = strings(&service["command"]);
        let mut arguments = Vec::new();
        for (at, word) in words.iter().enumerate().skip(1) {
            arguments.push(match words[at - 1].as_str() {
                "--port" => self.port(word.parse().unwrap()).to_string(),
                _ => self.here(name, word),
            });
        }
        let own = self.directory.path().join(name);
        std::fs::create_dir_all(&own).unwrap();
        let user = service.get("user").and_then(Value::as_str);
        let mut command = match user {
            Some(user) => {
                assert_eq!(user, "postgres");
                give_to_postgres(&own);
                let program = self.directory.path().join("bin").join(&words[0]);
                unprivileged(&program, &[])
            }
            None => Command::new(programs().join(&words[0])),
        };
        command.args(arguments).env("PGSTRATA_PG_BIN", pg_bin());
        for (name, value) in
            service.get("environment").and_then(Value::as_mapping).into_iter().flatten()
        {
            command.env(name.as_str().unwrap(), value.as_str().unwrap());
        }
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("{name}.log")))
            .unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    fn is_healthy(&mut self, name: &str) -> bool {
        let test = strings(&self.services[name]["healthcheck"]["test"]);
        assert_eq!(test[0], "CMD");
        let words: Vec<_> = test[1..].iter().map(|word| self.here(name, word)).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap().success()
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("{name}.log")))
            .unwrap_or_default()
    }

    /// Starts the service and before it what it depends on, as `docker compose up` does.
    fn up(&mut self, name: &str) {
        let dependencies: Vec<(String, String)> = self.services[name]
            .get("depends_on")
            .and_then(Value::as_mapping)
            .into_iter()
            .flatten()
            .map(|(on, how)| {
                let how = how["condition"].as_str().unwrap().to_owned();
                (on.as_str().unwrap().to_owned(), how)
            })
            .collect();
        for (on, how) in dependencies {
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
            // Moto runs already.
            "minio" => {}
            "bucket" => {
                self.make_bucket();
                self.done.insert(name.into());
            }
            "found" => self.found(),
            _ => {
                let child = self.command(name).spawn().unwrap();
                self.running.insert(name.to_owned(), child);
            }
        }
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

    fn make_bucket(&self) {
        // What its entry point makes.
        let entry = strings(&self.services["bucket"]["entrypoint"]).join(" ");
        assert!(entry.contains("mc mb -p m/pgstrata"), "{entry}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime
            .block_on(pgstrata_blob::create_bucket("pgstrata", Some(&self.s3.endpoint)))
            .unwrap();
    }

    /// The one that ends: its success is what others wait for.
    fn found(&mut self) {
        let status = self.command("found").status().unwrap();
        assert!(status.success(), "{}", self.log("found"));
        self.done.insert("found".into());
    }

    fn kill(&mut self, name: &str) {
        let mut child = self.running.remove(name).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        wait_gone(u64::from(child.id()));
    }
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
    for (name, value) in pgstrata_tests::S3_ENVIRONMENT {
        // SAFETY: this process has no other test, and so no other thread yet.
        unsafe { std::env::set_var(name, value) };
    }
    let mut compose = Compose::new();
    compose.up("compute");
    compose.wait_healthy("compute");
    let uri = format!("postgresql://postgres@127.0.0.1:{}/postgres", compose.port(5432));
    let mut client = connect(&uri);
    client.batch_execute("create table t as select generate_series(1, 1000) a").unwrap();
    let sum = |client: &mut postgres::Client| -> i64 {
        client.query_one("select sum(a) from t", &[]).unwrap().get(0)
    };
    assert_eq!(sum(&mut client), 500_500);

    // Every service of ours is needed for that, and none is left out here.
    let ours = |service: &Value| service.get("image").and_then(Value::as_str) == Some("pgstrata");
    let all: BTreeSet<String> = compose
        .services
        .iter()
        .filter(|(_, service)| ours(service))
        .map(|(name, _)| name.clone())
        .collect();
    let started: BTreeSet<String> = compose
        .running
        .keys()
        .chain(&compose.done)
        .filter(|name| *name != "bucket")
        .cloned()
        .collect();
    assert_eq!(all, started);

    // What is published is passed on to somebody who listens.
    let forwarder = strings(&compose.services["ports"]["entrypoint"]).join(" ");
    assert!(forwarder.contains("TCP-LISTEN:1$$port,fork,reuseaddr TCP:127.0.0.1:$$port"));
    for published in strings(&compose.services["net"]["ports"]) {
        let parts: Vec<&str> = published.split(':').collect();
        let [host, outside, inside] = parts[..] else { panic!("{published}") };
        assert_eq!((host, inside), ("127.0.0.1", format!("1{outside}").as_str()));
        assert!(forwarder.contains(outside), "{outside} is not passed on");
        let ours = !["9090", "9001"].contains(&outside);
        if ours {
            let port = compose.port(outside.parse().unwrap());
            TcpStream::connect(("127.0.0.1", port)).unwrap();
        }
    }

    // Again, as after 'docker compose up' on what is there: nothing is made anew; and a compute that
    // was killed, with its cache, is restarted on what was committed.
    compose.found();
    drop(client);
    compose.kill("compute");
    let cache: PathBuf = compose.directory.path().join("compute");
    std::fs::remove_dir_all(&cache).unwrap();
    compose.up("compute");
    compose.wait_healthy("compute");
    assert_eq!(sum(&mut connect(&uri)), 500_500);
    assert!(compose.log("found").is_empty(), "{}", compose.log("found"));
}
