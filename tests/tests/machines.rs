//! Services on machines of their own, with certificates: what happens when one of these is cut off. In network namespaces, so
//! it needs root; a part of `make test-all`, where it fails if there can be none.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgstrata_tests::hosts::Hosts;
use pgstrata_tests::services::{Services, behind};
use pgstrata_tests::{give_to_postgres, pg_bin, pg_command, programs, signal, thorough};
use rustix::process::Signal;
use serde_json::Value;

const TENANT: &str = "11111111111111111111111111111111";
/// Longest that a client may wait while one zone of three is cut off, or slow.
const LONGEST_STALL: Duration = Duration::from_secs(2);

/// Password of the superuser, where one is asked for.
const PASSWORD: &str = "secret";
const OF_S3: [(&str, &str); 3] =
    [("AWS_ACCESS_KEY_ID", "me"), ("AWS_SECRET_ACCESS_KEY", "mine"), ("AWS_REGION", "us-east-1")];
/// Where objects are: on a machine that only has these.
const STORE: [&str; 4] =
    ["--object-store", "s3://bucket/cluster", "--s3-endpoint", "http://s3:9000"];
const BROKER: [&str; 2] = ["--broker", "https://hub:7000"];
const ZONES: [(&str, &str); 3] = [("1", "zone-a"), ("2", "zone-b"), ("3", "zone-c")];

struct Machines {
    services: Services,
    hosts: Hosts,
    pki: PathBuf,
    started: BTreeSet<String>,
    s3: Child,
}

impl Drop for Machines {
    fn drop(&mut self) {
        let _ = self.s3.kill();
        let _ = self.s3.wait();
    }
}

/// Stock clients on a machine that has a CA's certificate and a password.
struct Laptop {
    prefix: Vec<String>,
    ca: PathBuf,
}

impl Laptop {
    /// Runs one, to a compute's host.
    fn client(&self, host: &str, program: &str, arguments: &[&str]) -> Output {
        let connection = format!(
            "host={host} user=postgres dbname=postgres sslmode=verify-full sslrootcert={}",
            self.ca.display()
        );
        // pgbench takes its connection as the database's name, and last.
        let by_name = if program == "pgbench" { &[][..] } else { &["-d"] };
        let arguments = [arguments, by_name, &[&connection]].concat();
        let mut command = behind(&self.prefix, pg_command(program, &arguments));
        command.env("PGPASSWORD", PASSWORD).output().unwrap()
    }

    fn sql(&self, host: &str, text: &str) -> Result<String, String> {
        let output = self.client(host, "psql", &["-XAtq", "-c", text]);
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

impl Machines {
    /// Three zones with a safekeeper each, a hub with the broker and the page server, one with objects, one for computes,
    /// though they may be anywhere, and one that has nothing to do with any of it.
    fn start() -> Machines {
        let hosts = Hosts::new(&["hub", "zone-a", "zone-b", "zone-c", "app", "s3", "laptop"]);
        let mut services = Services::new();
        services.environment = OF_S3.map(|(name, value)| (name.into(), value.into())).to_vec();
        services.environment.push(("POSTGRES_PASSWORD".into(), PASSWORD.into()));
        let pki = services.path("pki");
        let objects = services.path("objects");
        std::fs::create_dir_all(objects.join("bucket")).unwrap();
        let mut s3 = Command::new(env!("CARGO_BIN_EXE_s3-server"));
        s3.arg("0.0.0.0:9000").arg(objects).envs(OF_S3);
        let s3 = behind(&hosts.on("s3"), s3).spawn().unwrap();
        let mut machines = Machines { services, hosts, pki, started: BTreeSet::new(), s3 };
        machines.auth(&["init"]);
        machines.start_services();
        let admin = machines.certificate("admin", "me", "app", true);
        machines.services.prefix = machines.hosts.on("app");
        let found = ["found", "--pageserver-http", "hub:7001", "--tls", &admin, "--tenant", TENANT];
        machines.services.run("pgstrata", &found);
        machines
    }

    /// All but computes.
    fn start_services(&mut self) {
        self.service("hub", "storage-broker", "broker", "b", &["--listen", "0.0.0.0:7000"]);
        for (id, zone) in ZONES {
            let own = format!(
                "--id {id} --zone {zone} --listen-wal 0.0.0.0:7101 --listen-pg 0.0.0.0:7102 --listen-http 0.0.0.0:7103 \
                 --advertise-wal {zone}:0 --advertise-pg {zone}:0 --advertise-http {zone}:0"
            );
            let own = [&words(&own)[..], &STORE, &BROKER].concat();
            self.service(zone, "safekeeper", "safekeeper", id, &own);
        }
        let own = "--listen-http 0.0.0.0:7001 --listen-pg 0.0.0.0:7002 --listen-pages 0.0.0.0:7003 \
                   --advertise-http hub:0 --advertise-pg hub:0 --advertise-pages hub:0";
        let own = [&words(own)[..], &STORE, &BROKER].concat();
        self.service("hub", "pageserver", "pageserver", "p", &own);
    }

    fn auth(&self, arguments: &[&str]) {
        let mut command = Command::new(programs().join("pgstrata"));
        let output =
            command.arg("auth").args(arguments).arg("--dir").arg(&self.pki).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The directory of a certificate, which PostgreSQL's user gets a copy of if he is to show it.
    fn certificate(&mut self, role: &str, name: &str, host: &str, is_postgres: bool) -> String {
        self.auth(&["issue", "--role", role, "--name", name, "--host", host]);
        let made = self.pki.join(format!("{role}-{name}"));
        if !is_postgres {
            return made.display().to_string();
        }
        let own = self.services.path(&format!("own-{role}-{name}-{host}"));
        if self.started.insert(own.display().to_string()) {
            assert!(Command::new("cp").arg("-r").args([&made, &own]).status().unwrap().success());
            give_to_postgres(&own);
        }
        own.display().to_string()
    }

    fn service(
        &mut self,
        host: &str,
        program: &str,
        role: &str,
        name: &str,
        arguments: &[&str],
    ) -> Value {
        let tls = self.certificate(role, name, host, program == "compute-shim");
        self.services.prefix = self.hosts.on(host);
        let arguments = [arguments, &["--tls", &tls]].concat();
        self.services.start(&format!("{program}-{host}"), program, &arguments)
    }

    /// Starts a compute of `main` there, and waits until it answers.
    fn compute(&mut self, host: &str) {
        self.compute_of(host, "main", &[]);
    }

    fn compute_of(&mut self, host: &str, branch: &str, options: &[&str]) {
        let own = ["--branch", branch, "--port", "5432", "--safekeepers", "1,2,3"];
        self.service(
            host,
            "compute-shim",
            "compute",
            TENANT,
            &[&own[..], &BROKER, options].concat(),
        );
        let since = Instant::now();
        while self.sql(host, "select 1").is_err() {
            let log = self.services.log(&format!("compute-shim-{host}"));
            assert!(since.elapsed() < Duration::from_secs(60), "{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One that other machines reach.
    fn open_compute(&mut self, host: &str, branch: &str) {
        let tls = self.certificate("compute", TENANT, host, true);
        let certificate = format!("ssl_cert_file={tls}/cert.pem");
        let key = format!("ssl_key_file={tls}/key.pem");
        let settings = ["listen_addresses=*", "ssl=on", &certificate, &key];
        let options: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        self.compute_of(host, branch, &options);
    }

    /// What the command prints on the machine that has nothing to do with any of it.
    fn pgstrata(&mut self, arguments: &[&str]) -> String {
        let file = self.services.path("cluster.toml").display().to_string();
        self.services.prefix = self.hosts.on("laptop");
        self.services.run("pgstrata", &[&["--cluster", &file], arguments].concat())
    }

    fn laptop(&self) -> Laptop {
        Laptop { prefix: self.hosts.on("laptop"), ca: self.services.path("ca.pem") }
    }

    fn on(&self, host: &str, command: Command) -> Command {
        behind(&self.hosts.on(host), command)
    }

    fn sql(&self, host: &str, text: &str) -> Result<String, String> {
        let command =
            pg_command("psql", &["-XAtq", "-h", "127.0.0.1", "-U", "postgres", "-c", text]);
        let output = self.on(host, command).env("PGPASSWORD", PASSWORD).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// pgbench on a host, for so many seconds, with a line for each transaction in a file below `log`.
    fn pgbench(&self, host: &str, seconds: u32, log: &Path) -> Child {
        std::fs::create_dir(log).unwrap();
        give_to_postgres(log);
        let (seconds, prefix) = (seconds.to_string(), log.join("t").display().to_string());
        let arguments = [
            "-n",
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
            "-c",
            "4",
            "-T",
            &seconds,
            "-l",
            "--log-prefix",
            &prefix,
            "postgres",
        ];
        let mut command = self.on(host, pg_command("pgbench", &arguments));
        command.env("PGBIN", pg_bin()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The safekeepers' answers to a question, asked on their own machines.
    fn flushed(&self) -> Vec<String> {
        let pki = &self.pki;
        let zones = ["zone-a", "zone-b", "zone-c"];
        let asked = zones.map(|zone| {
            let mut command = Command::new("curl");
            let path = |name: &str| pki.join("admin-me").join(name);
            command.args(["-fsS", "--max-time", "5", "--cacert"]).arg(path("ca.pem"));
            command.arg("--cert").arg(path("cert.pem")).arg("--key").arg(path("key.pem"));
            command.arg(format!("https://{zone}:7103/v1/status"));
            let output = self.on(zone, command).output().unwrap();
            let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let timeline = &status["timelines"][0];
            format!("{} {}", timeline["flush_lsn"], timeline["commit_lsn"])
        });
        asked.to_vec()
    }

    /// Waits until all safekeepers have the same, and compares their files: those of all three, as each drops by itself what
    /// is archived.
    fn wait_same(&self) {
        let segments = |zone: &str| -> BTreeSet<String> {
            let mut command = Command::new("sh");
            let find = "find . -name '0000*' -type f | sort | xargs sha256sum";
            let directory = self.services.path(&format!("safekeeper-{zone}"));
            let output = command.args(["-c", find]).current_dir(directory).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().map(str::to_owned).collect()
        };
        let since = Instant::now();
        let all = loop {
            // A server writes a little also when nobody asks it to.
            let flushed = self.flushed();
            let all = ["zone-a", "zone-b", "zone-c"].map(segments);
            let is_same = flushed.iter().all(|one| *one == flushed[0] && one.contains('/'));
            if is_same && self.flushed() == flushed {
                break all;
            }
            assert!(since.elapsed() < Duration::from_secs(60), "{flushed:?}");
            std::thread::sleep(Duration::from_millis(100));
        };
        // A line is a digest and a path.
        let path = |line: &String| line.split("  ").nth(1).unwrap().to_owned();
        let paths = |lines: &BTreeSet<String>| lines.iter().map(path).collect::<BTreeSet<_>>();
        let common = all.iter().map(paths).reduce(|one, other| &one & &other).unwrap();
        assert!(all.iter().all(|lines| paths(lines).last() == common.last()), "{all:#?}");
        let kept = |lines: &BTreeSet<String>| -> BTreeSet<String> {
            lines.iter().filter(|line| common.contains(&path(line))).cloned().collect()
        };
        assert!(!common.is_empty() && kept(&all[0]) == kept(&all[1]), "{all:#?}");
        assert!(kept(&all[0]) == kept(&all[2]), "{all:#?}");
    }
}

/// The longest transaction in pgbench's logs.
fn longest(log: &Path) -> Duration {
    let mut longest = 0;
    for file in std::fs::read_dir(log).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let each = text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
        longest = each.chain([longest]).max().unwrap();
    }
    assert!(longest > 0, "there is no transaction");
    Duration::from_micros(longest)
}

#[test]
fn a_zone_that_is_cut_off_stops_nobody_and_a_compute_that_is_gets_fenced() {
    if !thorough() {
        return;
    }
    let mut machines = Machines::start();
    machines.compute("app");
    let mut load = pg_command(
        "pgbench",
        &["-i", "-q", "-s", "1", "-h", "127.0.0.1", "-U", "postgres", "postgres"],
    );
    load = machines.on("app", load);
    assert!(load.output().unwrap().status.success());

    // A zone is cut off under load, and comes back.
    let log = machines.services.path("cut");
    let bench = machines.pgbench("app", 12, &log);
    std::thread::sleep(Duration::from_secs(3));
    machines.hosts.cut("zone-c");
    std::thread::sleep(Duration::from_secs(5));
    machines.hosts.heal("zone-c");
    let output = bench.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("number of failed transactions: 0"), "{said}");
    let stall = longest(&log);
    eprintln!("a zone cut off: longest transaction {stall:?}\n{said}");
    assert!(stall < LONGEST_STALL, "{stall:?}: {said}");
    machines.wait_same();

    // A zone that is far away, over a line that loses packets, stops nobody either. Nor does one that is so far away that
    // it would be seen if anybody waited for it.
    for round_trip_ms in [40, 3000] {
        machines.hosts.slow_down("zone-b", round_trip_ms, 1);
        let log = machines.services.path(&format!("far-{round_trip_ms}"));
        let output = machines.pgbench("app", 8, &log).wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        let stall = longest(&log);
        eprintln!(
            "a zone {round_trip_ms} ms away, 1 % lost: longest transaction {stall:?}\n{said}"
        );
        let failed_none = said.contains("number of failed transactions: 0");
        assert!(output.status.success() && failed_none, "{said}");
        assert!(stall < LONGEST_STALL, "{stall:?}: {said}");
    }
    let frames = machines.hosts.speed_up("zone-b");
    eprintln!("{frames:?}");
    assert!(frames.forwarded > 0 && frames.lost > 0, "{frames:?}");
    machines.wait_same();

    // A compute that sits in one zone, with that zone's safekeeper, is cut off. A new one takes its place.
    machines.sql("app", "create table kept (a int)").unwrap();
    machines.services.kill("compute-shim-app");
    machines.compute("zone-a");
    machines.sql("zone-a", "insert into kept values (1)").unwrap();
    machines.hosts.cut("zone-a");
    let mut lonely = pg_command(
        "psql",
        &["-XAtq", "-h", "127.0.0.1", "-U", "postgres", "-c", "insert into kept values (2)"],
    );
    lonely = machines.on("zone-a", lonely);
    let mut lonely = lonely.stderr(Stdio::null()).spawn().unwrap();
    machines.compute("app");
    machines.sql("app", "insert into kept values (3)").unwrap();
    assert!(lonely.try_wait().unwrap().is_none(), "a minority acknowledged a commit");
    machines.hosts.heal("zone-a");
    assert_eq!(machines.services.wait_ended("compute-shim-zone-a"), Some(3));
    assert!(!lonely.wait().unwrap().success());
    assert_eq!(
        machines.sql("app", "select string_agg(a::text, ' ' order by a) from kept").unwrap(),
        "1 3"
    );
    machines.wait_same();
}

#[test]
fn the_demo_runs_from_a_machine_that_is_none_of_the_clusters() {
    if !thorough() {
        return;
    }
    let mut machines = Machines::start();
    machines.open_compute("app", "main");
    let ca = machines.services.path("ca.pem");
    std::fs::copy(machines.pki.join("ca.pem"), ca).unwrap();
    let laptop = machines.laptop();
    let admin = machines.certificate("admin", "me", "app", true);
    let file = machines.services.path("cluster.toml").display().to_string();
    machines.services.prefix = machines.hosts.on("laptop");
    // The command becomes PostgreSQL's user here, whose file it is then.
    give_to_postgres(machines.services.root());
    let export = [&["cluster", "export", &file, "--tls", &admin][..], &BROKER, &STORE].concat();
    machines.services.run("pgstrata", &export);
    let status = machines.pgstrata(&["status"]);
    assert!(["zone-a", "zone-b", "zone-c"].iter().all(|zone| status.contains(zone)), "{status}");

    for arguments in [&["-i", "-q", "-s", "2"][..], &["-n", "-c", "8", "-T", "3"]] {
        let output = laptop.client("app", "pgbench", arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let sums = "select count(*), sum(abalance) from pgbench_accounts";
    let sql = |text: &str| laptop.sql("app", text).unwrap();
    let lsn = machines.pgstrata(&["lsn"]).trim().to_owned();
    let before = sql(sums);
    std::thread::sleep(Duration::from_millis(200));
    sql("update pgbench_accounts set abalance = 0 where aid <= 100000");
    let clock =
        "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let time = sql(clock);
    let between = sql(sums);
    std::thread::sleep(Duration::from_millis(200));
    sql("delete from pgbench_accounts");
    machines.pgstrata(&["branch", "create", "at-lsn", "--at", &lsn]);
    machines.pgstrata(&["branch", "create", "at-time", "--at", &time]);
    for (host, branch, expected) in [("zone-b", "at-lsn", &before), ("zone-c", "at-time", &between)]
    {
        machines.open_compute(host, branch);
        assert_eq!(laptop.sql(host, sums).as_ref(), Ok(expected), "{branch}");
        machines.services.kill(&format!("compute-shim-{host}"));
    }
    assert_eq!(sql(sums), "0|");
    machines.pgstrata(&["wal", "verify", "--branch", "main"]);

    // kill -9 of everything during commits, and no directory of the compute and the page server any more.
    sql("create table promises (n bigint primary key)");
    let ended = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let one = |n: &u32| {
                let text = format!("insert into promises values ({n})");
                laptop.sql("app", &text).is_ok()
            };
            let mut acknowledged = Vec::new();
            for n in 1..10_000 {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                acknowledged.extend(Some(n).filter(one));
            }
            acknowledged
        });
        std::thread::sleep(Duration::from_secs(3));
        // All at once.
        for process in machines.services.pids() {
            signal(process, Signal::KILL);
        }
        ended.store(true, Ordering::Release);
        writer.join().unwrap()
    });
    let names = ["compute-shim-app", "pageserver-hub", "storage-broker-hub"];
    let zones = ZONES.map(|(_, zone)| format!("safekeeper-{zone}"));
    for name in names.into_iter().chain(zones.iter().map(String::as_str)) {
        machines.services.wait_ended(name);
    }
    for name in &names[..2] {
        std::fs::remove_dir_all(machines.services.path(name)).unwrap();
    }
    machines.start_services();
    machines.open_compute("app", "main");
    let kept = sql("select n from promises");
    let kept: BTreeSet<u32> = kept.lines().map(|line| line.parse().unwrap()).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|n| !kept.contains(n)).collect();
    eprintln!("acknowledged {}, kept {}, lost {}", acknowledged.len(), kept.len(), lost.len());
    assert!(!acknowledged.is_empty() && lost.is_empty(), "lost: {lost:?}");
    assert_eq!(sql(sums), "0|");
}
