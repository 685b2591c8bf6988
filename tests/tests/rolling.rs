//! Services are replaced one by one while clients write: by the same programs, and by those of another release.
//!
//! `PGSTRATA_TEST_OLDER_PROGRAMS` names a directory with the programs of an earlier release (`safekeeper`, `pageserver`,
//! `storage-broker`, `compute-shim`, `libpgstrata_preload.so`, `pgstrata`), which are upgraded to these, by
//!
//! ```text
//! PGSTRATA_TEST_OLDER_PROGRAMS=DIRECTORY cargo test -p pgstrata-tests --test rolling -- --ignored
//! ```
//! What older programs say is also played from recordings, which need no program (`safekeeper/tests/recorded.rs`,
//! `pageserver/tests/recorded.rs`).

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgstrata_tests::load::{Load, SCHEMA};
use pgstrata_tests::services::Services;
use pgstrata_tests::{connect, free_port, programs};

const PATIENCE: Duration = Duration::from_secs(60);
const ROWS: i64 = 5000;

/// Safekeepers first, then who speaks to them, as docs/protocols.md has it: computes are the last that are older.
const AS_DOCUMENTED: [&str; 6] =
    ["broker", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "compute"];
/// Computes before all but one of the safekeepers: what is newer speaks first, to what is older.
const AHEAD: [&str; 6] =
    ["broker", "safekeeper-1", "compute", "pageserver", "safekeeper-2", "safekeeper-3"];

/// Whether safekeepers of the release in `tests/older-release` follow the rule of now, so that computes may be ahead of them: not if
/// they are of before version 3 of the WAL protocol.
const OLDER_FOLLOWS_THE_RULE: bool = false;

struct Upgrade {
    services: Services,
    /// Which programs each service was started from.
    started_from: BTreeMap<String, PathBuf>,
    ports: BTreeMap<String, u16>,
    store: String,
}

impl Upgrade {
    fn start(from: &Path) -> Upgrade {
        let services = Services::new();
        let store = services.path("objects").display().to_string();
        let (started_from, ports) = (BTreeMap::new(), BTreeMap::new());
        let mut upgrade = Upgrade { services, started_from, ports, store };
        for name in &AS_DOCUMENTED[..5] {
            upgrade.run(name, from);
        }
        let http = upgrade.address("pageserver", "http");
        let arguments = ["found", "--branch", "main", "--pageserver-http", &http];
        upgrade.services.run("pgstrata", &arguments);
        upgrade.run("compute", from);
        upgrade
    }

    /// Where a port of a service is, of whatever programs it is.
    fn address(&mut self, name: &str, port: &str) -> String {
        let number = self.ports.entry(format!("{name} {port}")).or_insert_with(free_port);
        format!("127.0.0.1:{number}")
    }

    fn run(&mut self, name: &str, from: &Path) {
        self.services.take_programs(from);
        self.started_from.insert(name.to_owned(), from.to_owned());
        let (program, arguments) = self.started_with(name);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.services.start(name, program, &arguments);
        if name == "compute" {
            let http = self.address(name, "http");
            self.services.wait_serving(name, &http);
        }
    }

    /// A service's program, and its options.
    fn started_with<'a>(&mut self, name: &'a str) -> (&'a str, Vec<String>) {
        let broker = self.address("broker", "http");
        let (url, store) = (format!("http://{broker}"), self.store.clone());
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
        if name != "broker" {
            add(&["--broker", &url]);
        }
        let (program, listening): (_, &[&str]) = match name.split_once('-') {
            Some((program, id)) => {
                add(&["--id", id, "--object-store", &store]);
                (program, &["wal", "pg", "http"])
            }
            None if name == "pageserver" => {
                add(&["--object-store", &store]);
                (name, &["http", "pages", "pg"])
            }
            None if name == "broker" => {
                add(&["--listen", &broker]);
                ("storage-broker", &[])
            }
            None => {
                let port = self.address(name, "sql");
                let port = port.rsplit_once(':').unwrap().1;
                add(&["--branch", "main", "--port", port, "--safekeepers", "1,2,3"]);
                ("compute-shim", &["http"])
            }
        };
        for port in listening {
            arguments.push(format!("--listen-{port}"));
            arguments.push(self.address(name, port));
        }
        (program, arguments)
    }

    fn uri(&mut self) -> String {
        format!("postgresql://postgres@{}/postgres", self.address("compute", "sql"))
    }

    /// Commits go on without one safekeeper: those that are left are a majority only together, whatever each of them is of.
    fn without_each_safekeeper(&mut self, load: &Load) {
        for name in ["safekeeper-1", "safekeeper-2", "safekeeper-3"] {
            self.services.stop(name);
            load.wait_for_progress(PATIENCE);
            let from = self.started_from[name].clone();
            self.run(name, &from);
            load.wait_for_progress(PATIENCE);
        }
    }
}

/// Replaces all services in this order. No row that was acknowledged is lost, before or after, and all pages are read.
fn replace(older: &Path, newer: &Path, order: [&str; 6]) {
    let mut upgrade = Upgrade::start(older);
    let uri = upgrade.uri();
    let mut client = connect(&uri);
    client.batch_execute(SCHEMA).unwrap();
    let text = format!(
        "create table cold as select g, repeat(md5(g::text), 9) from generate_series(1, {ROWS}) g"
    );
    client.batch_execute(&text).unwrap();
    drop(client);
    let mut load = Load::start(&uri, 2);
    for name in order {
        load.wait_for_progress(PATIENCE);
        // What clients see of it: a compute's end, and nothing of any other's.
        load.take();
        upgrade.services.stop(name);
        upgrade.run(name, newer);
        load.wait_for_progress(PATIENCE);
        let (_, errors) = load.take();
        assert!(name == "compute" || errors.is_empty(), "{name}: {errors:?}");
        if name != "broker" {
            upgrade.without_each_safekeeper(&load);
        }
        // Pages that this compute has not read yet come from the page server.
        let count = connect(&uri).query_one("select count(*) from cold", &[]).unwrap();
        assert_eq!(count.get::<_, i64>(0), ROWS, "{name}");
    }
    load.stop(PATIENCE);
    // A compute with nothing of its own reads what all of them wrote.
    upgrade.services.stop("compute");
    std::fs::remove_dir_all(upgrade.services.path("compute")).unwrap();
    upgrade.run("compute", newer);
    let rows = load.check(&mut connect(&uri));
    println!("{rows} rows");
}

#[test]
fn services_are_restarted_one_by_one_under_writes() {
    replace(&programs(), &programs(), AS_DOCUMENTED);
}

#[test]
#[ignore = "needs the programs of an older release: PGSTRATA_TEST_OLDER_PROGRAMS"]
fn a_release_is_installed_one_service_at_a_time() {
    let older = std::env::var_os("PGSTRATA_TEST_OLDER_PROGRAMS").map(PathBuf::from);
    let older = older.expect("PGSTRATA_TEST_OLDER_PROGRAMS=DIRECTORY");
    let read = |directory: &Path| std::fs::read(directory.join("safekeeper")).unwrap();
    assert!(read(&older) != read(&programs()), "{} has these programs", older.display());
    replace(&older, &programs(), AS_DOCUMENTED);
    match OLDER_FOLLOWS_THE_RULE {
        true => replace(&older, &programs(), AHEAD),
        false => a_compute_that_is_ahead_of_the_safekeepers_says_so(&older),
    }
}

/// Who asks for what older safekeepers don't know says whom to upgrade, and the older compute goes on.
fn a_compute_that_is_ahead_of_the_safekeepers_says_so(older: &Path) {
    let mut upgrade = Upgrade::start(older);
    let uri = upgrade.uri();
    connect(&uri).batch_execute("create table kept as select 7 as n").unwrap();
    upgrade.services.stop("compute");
    upgrade.services.take_programs(&programs());
    let (program, arguments) = upgrade.started_with("compute");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut newer = upgrade.services.command("newer", program, &arguments);
    let ended = newer.arg("--dir").arg(upgrade.services.path("compute")).output().unwrap();
    let said = upgrade.services.log("newer");
    assert!(!ended.status.success() && said.contains("upgrade the safekeeper first"), "{said}");
    upgrade.run("compute", older);
    let kept = connect(&uri).query_one("select n from kept", &[]).unwrap();
    assert_eq!(kept.get::<_, i32>(0), 7);
}
