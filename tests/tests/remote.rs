//! `pgstrata --cluster FILE`: a cluster whose services show certificates to each other, seen from a directory that has nothing
//! but a file.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, TenantId};
use pgstrata_tests::services::Services;
use pgstrata_tests::{connect, free_port, give_to_postgres, pg_bin, programs, raw};
use postgres::Client;
use serde_json::Value;

const TENANT: TenantId = TenantId([0x11; 16]);
const PATIENCE: Duration = Duration::from_secs(60);

/// Services that ask for certificates, and a directory elsewhere.
struct Elsewhere {
    services: Services,
    pki: PathBuf,
    laptop: PathBuf,
    broker: String,
    pageserver_http: String,
    compute_http: String,
    uri: String,
    /// What nothing may print.
    tokens: Vec<String>,
}

fn text<'a>(said: &'a Value, name: &str) -> &'a str {
    said[name].as_str().unwrap_or_else(|| panic!("no {name} in {said}"))
}

fn named(address: &str) -> String {
    address.replace("127.0.0.1", "localhost")
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn auth(pki: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(programs().join("pgstrata"));
    let output = command.arg("auth").args(arguments).arg("--dir").arg(pki).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {complaint}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn issue(pki: &Path, role: &str, name: &str) -> PathBuf {
    auth(pki, &["issue", "--role", role, "--name", name, "--host", "localhost"]);
    pki.join(format!("{role}-{name}"))
}

/// A safekeeper in a zone of its own.
fn start_safekeeper(services: &mut Services, broker: &str, id: u64) {
    let (pki, store) = (services.path("pki"), services.path("objects"));
    let tls = issue(&pki, "safekeeper", &id.to_string());
    let own = words(&format!(
        "--broker {broker} --object-store {} --advertise-pg localhost:0 --advertise-http localhost:0 --advertise-wal \
         localhost:0 --id {id} --zone z{id} --tls {} --token-keys {}",
        store.display(),
        tls.display(),
        pki.join("token-keys").display()
    ));
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    services.start(&format!("safekeeper-{id}"), "safekeeper", &own);
}

impl Elsewhere {
    fn start() -> Elsewhere {
        let mut services = Services::new();
        let (pki, laptop) = (services.path("pki"), services.path("laptop"));
        fs::create_dir(&laptop).unwrap();
        auth(&pki, &["init"]);
        let security = |role: &str, name: &str| {
            let (tls, keys) = (issue(&pki, role, name), pki.join("token-keys"));
            words(&format!("--tls {} --token-keys {}", tls.display(), keys.display()))
        };
        let start = |services: &mut Services, name: &str, program: &str, arguments: Vec<String>| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            services.start(name, program, &arguments)
        };
        let own = [words("--listen 127.0.0.1:0"), security("broker", "b")].concat();
        let said = start(&mut services, "broker", "storage-broker", own);
        let broker = format!("https://{}", named(text(&said, "http")));
        let store = services.path("objects").display().to_string();
        let common = |service: &str| {
            words(&format!(
                "--broker {broker} --object-store {store} --advertise-pg localhost:0 --advertise-http localhost:0 {service}"
            ))
        };
        for id in 1..=3 {
            start_safekeeper(&mut services, &broker, id);
        }
        let own = [common("--advertise-pages localhost:0"), security("pageserver", "p")].concat();
        let said = start(&mut services, "pageserver", "pageserver", own);
        let pageserver_http = named(text(&said, "http"));
        Elsewhere {
            services,
            pki,
            laptop,
            broker,
            pageserver_http,
            compute_http: String::new(),
            uri: String::new(),
            tokens: Vec::new(),
        }
    }

    fn start_safekeeper(&mut self, id: u64) {
        start_safekeeper(&mut self.services, &self.broker, id);
    }

    /// Makes the first branch by the file, and starts its compute.
    fn found(&mut self, file: &str) {
        let deadline = Instant::now() + PATIENCE;
        let arguments = ["found", "--tenant", &TENANT.to_string()];
        loop {
            let output = self.run(file, &arguments);
            // The page server may not have told the broker of itself yet.
            if output.status.success() {
                break;
            }
            assert!(Instant::now() < deadline, "{output:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let tenant = TENANT.to_string();
        let own = self.services.path("of-postgres");
        let issued = issue(&self.pki, "compute", &tenant);
        assert!(Command::new("cp").arg("-r").args([&issued, &own]).status().unwrap().success());
        give_to_postgres(&own);
        let port = free_port();
        let arguments = words(&format!(
            "--branch main --port {port} --safekeepers 1,2,3 --broker {} --tls {}",
            self.broker,
            own.display()
        ));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = self.services.start("compute", "compute-shim", &arguments);
        self.compute_http = named(text(&said, "http"));
        self.uri = format!("postgresql://postgres@127.0.0.1:{port}/postgres");
        let admin = raw::tls(&self.pki.join("ca.pem"), Some(&self.pki.join("admin-me")), &[]);
        loop {
            let asked = raw::http(&self.compute_http, &admin, None, "GET /readyz", "");
            if asked.as_ref().is_ok_and(|(status, _)| *status == 200) {
                return;
            }
            assert!(Instant::now() < deadline, "{asked:?}: {}", self.services.log("compute"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn pgstrata(&self) -> Command {
        let mut command = Command::new(programs().join("pgstrata"));
        command.current_dir(&self.laptop).env("PGSTRATA_PG_BIN", pg_bin());
        command.env_remove("PGSTRATA_DIR").env_remove("PGSTRATA_CLUSTER");
        command
    }

    /// The command with a file, and whatever comes of it; nothing that is secret does.
    fn run(&self, file: &str, arguments: &[&str]) -> Output {
        let output = self.pgstrata().args(["--cluster", file]).args(arguments).output().unwrap();
        let said = [&output.stdout[..], &output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        for token in &self.tokens {
            assert!(!said.contains(token.as_str()), "a token is printed: {arguments:?}: {said}");
        }
        output
    }

    fn cli(&self, file: &str, arguments: &[&str]) -> String {
        let output = self.run(file, arguments);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}: {arguments:?}: {complaint}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    fn json(&self, file: &str, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.cli(file, &[arguments, &["--json"]].concat())).unwrap()
    }

    /// The one line that a refused command says.
    fn refused(&self, file: &str, arguments: &[&str]) -> String {
        let output = self.run(file, arguments);
        assert_eq!(output.status.code(), Some(1), "{file}: {arguments:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        let is_line = line.starts_with("pgstrata: ") && line.trim_end().lines().count() == 1;
        assert!(is_line && line.len() < 800, "{arguments:?}: {line}");
        line
    }

    fn export(&self, file: &str, arguments: &[&str]) -> Output {
        let broker = ["--broker", self.broker.as_str()];
        let export = ["cluster", "export", file];
        let mut command = self.pgstrata();
        command.args(export).args(broker).args(arguments).output().unwrap()
    }

    /// A file with a token of this scope.
    fn export_token(&mut self, file: &str, scope: &str, more: &[&str]) {
        let token = auth(&self.pki, &["token", "--scope", scope, "--ttl", "1h"]);
        let path = self.services.path("token");
        fs::write(&path, &token).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self.tokens.push(token);
        let ca = self.pki.join("ca.pem").display().to_string();
        let arguments = ["--ca", &ca, "--token-file", path.to_str().unwrap()];
        let output = self.export(file, &[&arguments, more].concat());
        assert!(output.status.success(), "{output:?}");
        // It is in the file.
        fs::remove_file(&path).unwrap();
    }
}

fn lsn(text: &str) -> Lsn {
    text.parse().unwrap()
}

/// Commits something, and returns the position that a client was told is durable.
fn commit(client: &mut Client) -> Lsn {
    client.batch_execute("insert into t select generate_series(1, 1000)").unwrap();
    let row = client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap();
    lsn(row.get(0))
}

/// What everybody may do who may do everything.
fn work_from(elsewhere: &Elsewhere, file: &str, client: &mut Client) {
    let branches = elsewhere.json(file, &["branch", "list"]);
    assert_eq!(text(&branches[0], "name"), "main");

    // What was committed before is in it, each time.
    for number in 0..5 {
        let committed = commit(client);
        let now = format!("now-{number}");
        let row = elsewhere.json(file, &["branch", "create", &now]);
        assert!(lsn(text(&row, "ancestor_lsn")) >= committed, "{row} and not {committed}");
        elsewhere.cli(file, &["branch", "delete", &now]);
    }
    let end = elsewhere.json(file, &["lsn"]);
    let committed = commit(client);
    assert!(lsn(text(&elsewhere.json(file, &["lsn"]), "lsn")) >= committed);
    let row = elsewhere.json(file, &["branch", "create", "before", "--at", text(&end, "lsn")]);
    assert!(lsn(text(&row, "ancestor_lsn")) <= lsn(text(&end, "lsn")));
    elsewhere.cli(file, &["branch", "reset", "before"]);
    elsewhere.cli(file, &["branch", "rename", "before", "after"]);
    elsewhere.cli(file, &["branch", "delete", "after"]);

    let path: String = client.query_one("select pg_relation_filepath('t')", &[]).unwrap().get(0);
    let relation = path.replace("base/", "1663/");
    let page = elsewhere.run(file, &["page", "get", "--rel", &relation, "--block", "0"]);
    assert_eq!(page.stdout.len(), 8192, "{page:?}");
    elsewhere.cli(file, &["compact"]);
    elsewhere.json(file, &["layers"]);

    let status = elsewhere.json(file, &["status"]);
    let rows = status["processes"].as_array().unwrap();
    let roles: Vec<_> = rows.iter().map(|row| text(row, "role")).collect();
    let expected = ["storage-broker", "safekeeper", "safekeeper", "safekeeper", "pageserver"];
    assert_eq!(roles, expected, "{status}");
    assert!(
        rows.iter().all(|row| row["state"] == "running" && row["failure"].is_null()),
        "{status}"
    );
    assert_eq!(text(&rows[2], "zone"), "z2");
    assert_eq!(text(&status["branches"][0], "name"), "main");

    let line = elsewhere.refused(file, &["branch", "delete", "main"]);
    assert!(line.contains("'main' has a compute"), "{line}");
    for local in
        [&["up"][..], &["down"], &["compute", "start", "main"], &["compute", "stop", "main"]]
    {
        let line = elsewhere.refused(file, local);
        assert!(line.contains("leave out --cluster"), "{line}");
    }
}

#[test]
fn a_cluster_is_worked_with_from_another_machine() {
    let mut elsewhere = Elsewhere::start();
    let admin = issue(&elsewhere.pki, "admin", "me").display().to_string();
    let output = elsewhere.export("admin.toml", &["--tls", &admin]);
    assert!(output.status.success(), "{output:?}");
    let about = fs::metadata(elsewhere.laptop.join("admin.toml")).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o600);
    elsewhere.found("admin.toml");
    elsewhere.export_token("token.toml", "admin", &[]);
    elsewhere.export_token("read.toml", "read", &[]);
    let pageserver = elsewhere.pageserver_http.clone();
    let scope = format!("tenant:{TENANT}");
    elsewhere.export_token("tenant.toml", &scope, &["--pageserver-http", &pageserver]);

    let mut client = connect(&elsewhere.uri);
    client.batch_execute("create table t (a int)").unwrap();
    for file in ["admin.toml", "token.toml"] {
        work_from(&elsewhere, file, &mut client);
    }
    // The WAL port knows no tokens.
    let verified = elsewhere.json("admin.toml", &["wal", "verify"]);
    assert_eq!(verified["ok"], true);
    let dumped = elsewhere.cli("admin.toml", &["wal", "dump"]);
    assert!(dumped.contains("Heap"), "{dumped}");
    let line = elsewhere.refused("token.toml", &["wal", "verify"]);
    assert!(line.contains("certificates only") && line.contains("token.toml"), "{line}");

    let branches = elsewhere.json("read.toml", &["branch", "list"]);
    assert_eq!(text(&branches[0], "name"), "main");
    for change in [
        &["branch", "create", "x"][..],
        &["branch", "create", "x", "--at", "0/2000028"],
        &["compact"],
    ] {
        let line = elsewhere.refused("read.toml", change);
        assert!(line.contains("token of scope read"), "{line}");
    }

    // A tenant's token is told by nobody where services are, and how far they are.
    let committed = commit(&mut client);
    let line = elsewhere.refused("tenant.toml", &["branch", "create", "x"]);
    assert!(line.contains("name a moment with --at"), "{line}");
    elsewhere.json("admin.toml", &["lsn"]);
    elsewhere.cli("tenant.toml", &["branch", "create", "x", "--at", &committed.to_string()]);

    members_change(&mut elsewhere, &mut client);
    what_fails_is_told(&mut elsewhere, &mut client);
    drop(client);
    elsewhere.services.kill("compute");
}

/// By a certificate and by a token, and by nobody who may only look.
fn members_change(elsewhere: &mut Elsewhere, client: &mut Client) {
    elsewhere.start_safekeeper(4);
    let members = |file: &str| -> Vec<u64> {
        let shown = elsewhere.json(file, &["quorum", "show"]);
        let members = shown["members"].as_array().unwrap().iter();
        members.map(|member| member["id"].as_u64().unwrap()).collect()
    };
    let deadline = Instant::now() + PATIENCE;
    let listed = |file: &str| elsewhere.json(file, &["safekeeper", "list"]);
    while listed("admin.toml").as_array().unwrap().len() < 4 {
        assert!(Instant::now() < deadline, "{}", listed("admin.toml"));
        std::thread::sleep(Duration::from_millis(100));
    }
    for file in ["admin.toml", "token.toml", "read.toml"] {
        assert_eq!(members(file), [1, 2, 3], "{file}");
        assert_eq!(listed(file)[3]["state"], "ok", "{file}");
    }
    for change in
        [&["safekeeper", "replace", "3", "--with", "4"][..], &["safekeeper", "remove", "3"]]
    {
        let line = elsewhere.refused("read.toml", change);
        assert!(line.contains("token of scope read"), "{line}");
    }
    elsewhere.cli("token.toml", &["safekeeper", "replace", "3", "--with", "4"]);
    assert_eq!(members("admin.toml"), [1, 2, 4]);
    commit(client);
    elsewhere.cli("admin.toml", &["safekeeper", "drain", "4"]);
    assert_eq!(members("token.toml"), [1, 2, 3]);
    commit(client);
    elsewhere.cli("admin.toml", &["safekeeper", "add", "--id", "4"]);
    elsewhere.cli("admin.toml", &["safekeeper", "remove", "4"]);
    assert_eq!(members("read.toml"), [1, 2, 3]);
    elsewhere.services.kill("safekeeper-4");
}

/// Who is away, and who is not let in.
fn what_fails_is_told(elsewhere: &mut Elsewhere, client: &mut Client) {
    let foreign = elsewhere.services.path("foreign");
    auth(&foreign, &["init"]);
    let stranger = issue(&foreign, "admin", "me").display().to_string();
    let output = elsewhere.export("stranger.toml", &["--tls", &stranger]);
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && warning.contains("does not work now"), "{warning}");
    let line = elsewhere.refused("stranger.toml", &["branch", "list"]);
    assert!(line.contains(&elsewhere.broker) && line.contains("stranger.toml"), "{line}");
    // A file that is something else is left alone.
    fs::write(elsewhere.laptop.join("notes.txt"), "notes").unwrap();
    let output = elsewhere.export("notes.txt", &["--tls", &stranger]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(fs::read(elsewhere.laptop.join("notes.txt")).unwrap(), b"notes");
    let token = elsewhere.laptop.join("token.toml");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let line = elsewhere.refused("token.toml", &["branch", "list"]);
    assert!(line.contains("token.toml: others can read it"), "{line}");

    // One of three may be away; without two nobody knows what was committed last.
    elsewhere.services.kill("safekeeper-1");
    let committed = commit(client);
    let row = elsewhere.json("admin.toml", &["branch", "create", "two-left"]);
    assert!(lsn(text(&row, "ancestor_lsn")) >= committed, "{row}");
    let status = elsewhere.json("admin.toml", &["status"]);
    let of_first = status["processes"].as_array().unwrap().iter().find(|row| row["node"] == 1);
    assert!(of_first.is_none_or(|row| row["state"] == "silent"), "{status}");
    elsewhere.services.kill("safekeeper-2");
    let line = elsewhere.refused("admin.toml", &["branch", "create", "one-left"]);
    assert!(line.contains("too few safekeepers answer") && line.contains("--at"), "{line}");
    let at = text(&row, "ancestor_lsn");
    elsewhere.cli("admin.toml", &["branch", "create", "one-left", "--at", at]);
}
