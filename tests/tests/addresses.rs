//! Services that listen on several addresses, are known by names, and move.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use pgstrata_tests::services::Services;
use pgstrata_tests::{connect, free_port};
use serde_json::Value;

/// Members, for a compute that finds them by the broker.
const MEMBERS: &str = "1,2,3";

/// A cluster that knows its services by the name `localhost` only.
struct Named {
    services: Services,
    broker: String,
    store: String,
}

fn text<'a>(said: &'a Value, name: &str) -> &'a str {
    said[name].as_str().unwrap()
}

impl Named {
    fn start() -> Named {
        let mut services = Services::new();
        let said = services.start("broker", "storage-broker", &["--listen", "127.0.0.1:0"]);
        let broker = format!("http://{}", text(&said, "http").replace("127.0.0.1", "localhost"));
        let store = services.path("objects").display().to_string();
        let mut named = Named { services, broker, store };
        for id in 1..=3 {
            named.safekeeper(id);
        }
        named
    }

    fn listening(&mut self, name: &str, program: &str, ports: &[&str], more: &[&str]) -> Value {
        let mut arguments: Vec<String> = more.iter().map(|&text| text.to_owned()).collect();
        for port in ports {
            // Port 0 is another one for each address.
            let number = free_port();
            arguments.push(format!("--listen-{port}"));
            arguments.push(format!("127.0.0.2:{number},127.0.0.1:{number}"));
            arguments.push(format!("--advertise-{port}"));
            arguments.push("localhost:0".to_owned());
        }
        let broker = self.broker.clone();
        let store = self.store.clone();
        arguments.extend(["--broker".into(), broker, "--object-store".into(), store]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.services.start(name, program, &arguments)
    }

    fn safekeeper(&mut self, id: u64) -> Value {
        let (name, id) = (format!("safekeeper-{id}"), id.to_string());
        self.listening(&name, "safekeeper", &["wal", "pg", "http"], &["--id", &id])
    }

    fn pageserver(&mut self) -> Value {
        self.listening("pageserver", "pageserver", &["http", "pages", "pg"], &[])
    }

    /// Starts the compute of `main`. Returns its URI.
    fn compute(&mut self) -> String {
        let port = free_port().to_string();
        let broker = self.broker.clone();
        let arguments =
            ["--branch", "main", "--port", &port, "--safekeepers", MEMBERS, "--broker", &broker];
        let said = self.services.start("compute", "compute-shim", &arguments);
        self.services.wait_serving("compute", text(&said, "http"));
        format!("postgresql://postgres@127.0.0.1:{port}/postgres")
    }

    /// What the broker says, as text.
    fn listing(&self) -> String {
        let url = format!("{}/v1/nodes", self.broker);
        let output = std::process::Command::new("curl").args(["-fsS", &url]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn services_are_found_by_name_and_where_they_moved_to() {
    let mut named = Named::start();
    let said = named.pageserver();
    let http = text(&said, "http").to_owned();
    named.services.run("pgstrata", &["found", "--branch", "main", "--pageserver-http", &http]);
    let uri = named.compute();
    let mut client = connect(&uri);
    client
        .batch_execute(
            "create table t as select a, repeat('x', 500) b from generate_series(1, 20000) a",
        )
        .unwrap();
    // All that the broker knows of them are names.
    let listing = named.listing();
    assert!(listing.contains("localhost:") && !listing.contains("127.0.0"), "{listing}");

    // Each safekeeper moves, one after the other; two at once are a majority, which commits wait for.
    for id in 1..=3 {
        named.services.kill(&format!("safekeeper-{id}"));
        client.execute("insert into t values ($1, 'one is away')", &[&(id as i32)]).unwrap();
        named.safekeeper(id);
    }
    for id in 1..=2 {
        named.services.kill(&format!("safekeeper-{id}"));
        named.safekeeper(id);
    }
    client.batch_execute("insert into t values (0, 'two have moved')").unwrap();

    // So does the page server: a new compute reads all pages from where it is now, one that runs those that it lacks.
    drop(client);
    named.services.kill("compute");
    let uri = named.compute();
    let mut client = connect(&uri);
    named.services.kill("pageserver");
    named.pageserver();
    let since = Instant::now();
    let count: i64 = client.query_one("select count(*) from t", &[]).unwrap().get(0);
    assert_eq!(count, 20_004);
    assert!(since.elapsed() < Duration::from_secs(60));
    drop(client);
    named.services.kill("compute");
    let uri = named.compute();
    let count: i64 = connect(&uri).query_one("select count(*) from t", &[]).unwrap().get(0);
    assert_eq!(count, 20_004);
}

#[test]
fn a_compute_that_finds_nobody_says_whom_it_asked() {
    let mut services = Services::new();
    let said = services.start("broker", "storage-broker", &["--listen", "127.0.0.1:0"]);
    let broker = format!("http://{}", text(&said, "http"));
    let dir = services.path("compute").display().to_string();
    let refused = |arguments: &[&str]| {
        let common = ["--branch", "main", "--port", "1", "--dir", &dir];
        let arguments: Vec<&str> = common.iter().chain(arguments).copied().collect();
        std::fs::create_dir_all(&dir).unwrap();
        pgstrata_tests::give_to_postgres(dir.as_ref());
        let mut command = services.command("refused", "compute-shim", &arguments);
        let output = command.stderr(std::process::Stdio::piped()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, error) = refused(&["--safekeepers", MEMBERS]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("--pageserver"), "{error}");
    let places = ["--pageserver", "127.0.0.1:1", "--pageserver-http", "127.0.0.1:1"];
    let (code, error) = refused(&[&places[..], &["--safekeepers", "1,2=127.0.0.1:1"]].concat());
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("--safekeepers 1=HOST:PORT, or --broker"), "{error}");
    let (code, error) = refused(&["--safekeepers", MEMBERS, "--broker", &broker]);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("no page server is known") && error.contains(&broker), "{error}");
}
