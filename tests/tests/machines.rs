//! Services on machines of their own, with certificates: what happens when one of these is cut off. In network namespaces, so
//! it needs root; a part of `make test-all`, where it fails if there can be none.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::hosts::Hosts;
use pgstrata_tests::services::{Services, behind};
use pgstrata_tests::{give_to_postgres, pg_bin, pg_command, programs, thorough};
use serde_json::Value;

const TENANT: &str = "11111111111111111111111111111111";
/// Longest that a client may wait while one zone of three is cut off, or slow.
const LONGEST_STALL: Duration = Duration::from_secs(2);

struct Machines {
    services: Services,
    hosts: Hosts,
    pki: PathBuf,
    started: BTreeSet<String>,
}

impl Machines {
    /// Three zones with a safekeeper each, a hub with the broker and the page server, and two machines for computes, of which
    /// one is in the first zone.
    fn start() -> Machines {
        let hosts = Hosts::new(&["hub", "zone-a", "zone-b", "zone-c", "app"]);
        let services = Services::new();
        let pki = services.path("pki");
        let mut machines = Machines { services, hosts, pki, started: BTreeSet::new() };
        machines.auth(&["init"]);
        machines.service("hub", "storage-broker", "broker", "b", &["--listen", "0.0.0.0:7000"]);
        for (id, zone) in [("1", "zone-a"), ("2", "zone-b"), ("3", "zone-c")] {
            let own = [
                "--id",
                id,
                "--zone",
                zone,
                "--listen-wal",
                "0.0.0.0:7101",
                "--listen-pg",
                "0.0.0.0:7102",
                "--listen-http",
                "0.0.0.0:7103",
            ];
            let advertised = ["wal", "pg", "http"]
                .map(|port| [format!("--advertise-{port}"), format!("{zone}:0")]);
            let advertised: Vec<&str> = advertised.iter().flatten().map(String::as_str).collect();
            let store = machines.services.path("objects").display().to_string();
            let store = ["--object-store", &store, "--broker", "https://hub:7000"];
            machines.service(
                zone,
                "safekeeper",
                "safekeeper",
                id,
                &[&own[..], &advertised, &store].concat(),
            );
        }
        let store = machines.services.path("objects").display().to_string();
        let own = [
            "--listen-http",
            "0.0.0.0:7001",
            "--listen-pg",
            "0.0.0.0:7002",
            "--listen-pages",
            "0.0.0.0:7003",
            "--advertise-http",
            "hub:0",
            "--advertise-pg",
            "hub:0",
            "--advertise-pages",
            "hub:0",
            "--object-store",
            &store,
            "--broker",
            "https://hub:7000",
        ];
        machines.service("hub", "pageserver", "pageserver", "p", &own);
        let admin = machines.certificate("admin", "me", "app", true);
        machines.services.prefix = machines.hosts.on("app");
        let found = ["found", "--pageserver-http", "hub:7001", "--tls", &admin, "--tenant", TENANT];
        machines.services.run("pgstrata", &found);
        machines
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
        let own = [
            "--branch",
            "main",
            "--port",
            "5432",
            "--safekeepers",
            "1,2,3",
            "--broker",
            "https://hub:7000",
        ];
        self.service(host, "compute-shim", "compute", TENANT, &own);
        let since = Instant::now();
        while self.sql(host, "select 1").is_err() {
            let log = self.services.log(&format!("compute-shim-{host}"));
            assert!(since.elapsed() < Duration::from_secs(60), "{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn on(&self, host: &str, command: Command) -> Command {
        behind(&self.hosts.on(host), command)
    }

    fn sql(&self, host: &str, text: &str) -> Result<String, String> {
        let command =
            pg_command("psql", &["-XAtq", "-h", "127.0.0.1", "-U", "postgres", "-c", text]);
        let output = self.on(host, command).output().unwrap();
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
        let since = Instant::now();
        loop {
            let flushed = self.flushed();
            if flushed.iter().all(|one| *one == flushed[0] && one.contains('/')) {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(60), "{flushed:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let segments = |zone: &str| -> BTreeSet<String> {
            let mut command = Command::new("sh");
            let find = "find . -name '0000*' -type f | sort | xargs sha256sum";
            let directory = self.services.path(&format!("safekeeper-{zone}"));
            let output = command.args(["-c", find]).current_dir(directory).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().map(str::to_owned).collect()
        };
        let all = ["zone-a", "zone-b", "zone-c"].map(segments);
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
