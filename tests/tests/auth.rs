//! What `pgstrata auth` makes is what services take, and what it refuses it refuses with one line.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgstrata_identity::{Clients, Identity, Scope, Stream, TokenError, Tokens, Whom};
use pgstrata_ids::NodeId;
use pgstrata_tests::programs;
use serde_json::Value;
use tempfile::TempDir;

const TENANT: &str = "000102030405060708090a0b0c0d0eff";

/// A directory in which `auth` works, in one that is empty otherwise.
struct Auth {
    directory: TempDir,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

impl Auth {
    fn new() -> Auth {
        let auth = Auth { directory: tempfile::tempdir().unwrap() };
        auth.run(&["init"]);
        auth
    }

    fn dir(&self) -> PathBuf {
        self.directory.path().join("deep/pki")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn try_run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(programs().join("pgstrata"));
        // It means a cluster's directory, and nothing here.
        command.env("PGSTRATA_DIR", "/nonexistent").current_dir(self.directory.path());
        command.arg("auth").args(arguments).arg("--dir").arg(self.dir()).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
        text(&output.stdout)
    }

    fn refusal(&self, arguments: &[&str], status: i32) -> String {
        let output = self.try_run(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert_eq!(text(&output.stdout), "");
        assert!(status == 2 || said.lines().count() == 1, "{said}");
        said
    }

    fn issue(&self, role: &str, name: &str, more: &[&str]) -> Identity {
        self.run(&[&["issue", "--role", role, "--name", name], more].concat());
        Identity::open(&self.path(&format!("{role}-{name}"))).unwrap()
    }

    fn public_keys(&self) -> HashSet<String> {
        let files = fs::read_dir(self.path("token-keys")).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn a_ca_is_made_once_and_its_keys_are_its_owners() {
    let auth = Auth::new();
    for (name, expected) in
        [("", 0o700), ("ca.pem", 0o644), ("ca-key.pem", 0o600), ("token-key.pem", 0o600)]
    {
        assert_eq!(mode(&auth.path(name)), expected, "{name}");
    }
    assert_eq!(auth.public_keys().len(), 1);
    // Nothing of what it was made of is left.
    assert_eq!(fs::read_dir(auth.dir().parent().unwrap()).unwrap().count(), 1);
    let before = fs::read(auth.path("ca-key.pem")).unwrap();
    let said = auth.refusal(&["init"], 1);
    assert!(said.contains("not empty") && said.contains("--dir"), "{said}");
    assert_eq!(fs::read(auth.path("ca-key.pem")).unwrap(), before);
    // One that is empty is taken.
    let empty = auth.directory.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let mut command = Command::new(programs().join("pgstrata"));
    let output = command.args(["auth", "init", "--dir"]).arg(&empty).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("auth issue --dir"), "{}", text(&output.stdout));
    assert!(empty.join("ca.pem").exists());
}

#[test]
fn without_dir_it_is_not_in_the_clusters() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(programs().join("pgstrata"));
    command.env("PGSTRATA_DIR", directory.path().join("cluster")).current_dir(directory.path());
    let output = command.args(["auth", "init"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(directory.path().join("pgstrata-auth/ca.pem").exists());
    assert!(!directory.path().join("cluster").exists());
}

#[test]
fn certificates_are_what_services_take() {
    let auth = Auth::new();
    let safekeeper =
        auth.issue("safekeeper", "3", &["--host", "sk3.example.com", "--host", "127.0.0.1"]);
    assert_eq!(safekeeper.role().to_string(), "pgstrata://safekeeper/3");
    assert_eq!(safekeeper.certificate().names, ["sk3.example.com", "127.0.0.1"]);
    assert_eq!(safekeeper.certificate().subject, "CN=safekeeper-3");
    assert_eq!(safekeeper.certificate().days_left(Timestamp::now()), 364);
    let directory = auth.path("safekeeper-3");
    for (name, expected) in
        [("", 0o700), ("key.pem", 0o600), ("cert.pem", 0o644), ("ca.pem", 0o644)]
    {
        assert_eq!(mode(&directory.join(name)), expected, "{name}");
    }
    let compute = auth.issue("compute", TENANT, &["--days", "7"]);
    assert_eq!(compute.role().to_string(), format!("pgstrata://compute/{TENANT}"));
    assert_eq!(compute.certificate().names, [""; 0]);
    assert_eq!(compute.certificate().days_left(Timestamp::now()), 6);
    auth.issue("admin", "alice", &[]);
    auth.issue("broker", "b.1_2-3", &["--host", "::1"]);
    let pageserver = auth.issue("pageserver", "one", &[]);
    assert_eq!(pageserver.certificate().names, ["localhost", "127.0.0.1", "::1"]);

    // They know each other.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let server = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().unwrap();
        let config = safekeeper.server(Clients::MustHaveCertificate, &[]);
        Stream::accept(tcp, config, deadline).unwrap().peer_role().cloned()
    });
    let tcp = TcpStream::connect(address).unwrap();
    let config = compute.client(Whom::Safekeeper(Some(NodeId(3))), &[]);
    let _near = Stream::connect(tcp, config, "127.0.0.1", deadline).unwrap();
    assert_eq!(server.join().unwrap(), Some(compute.role()));

    // Others' tools read them too, where there are any.
    let verified = Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", "sslserver"])
        .args(["-verify_hostname", "sk3.example.com", "-CAfile"])
        .args([auth.path("ca.pem"), directory.join("cert.pem")])
        .output();
    match verified {
        Ok(verified) => assert!(verified.status.success(), "{}", text(&verified.stderr)),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
    }
}

#[test]
fn issuing_again_renews() {
    let auth = Auth::new();
    let hosts = ["--host", "a.example.com", "--host", "10.1.2.3"];
    let running = auth.issue("pageserver", "one", &hosts);
    let directory = auth.path("pageserver-one");
    let key = fs::read(directory.join("key.pem")).unwrap();
    let until = running.certificate().not_after;
    let said = auth.run(&["issue", "--role", "pageserver", "--name", "one", "--days", "700"]);
    assert!(said.contains("renewed") && said.contains("a.example.com"), "{said}");
    assert_ne!(fs::read(directory.join("key.pem")).unwrap(), key);
    // A service that runs has taken it up, a second later.
    std::thread::sleep(Duration::from_millis(1100));
    assert!(running.certificate().not_after > until);
    assert_eq!(running.certificate().names, ["a.example.com", "10.1.2.3"]);
    assert_eq!(running.trouble(), None);
    let other = auth.issue("pageserver", "one", &["--host", "b.example.com"]);
    assert_eq!(other.certificate().names, ["b.example.com"]);
    // What a renewal was cut off in heals by another.
    fs::write(directory.join("key.pem"), key).unwrap();
    assert!(Identity::open(&directory).is_err());
    auth.issue("pageserver", "one", &[]);
    // Nothing is left of what it was made of.
    let names = fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name());
    let names: HashSet<_> = names.map(|name| name.into_string().unwrap()).collect();
    assert_eq!(names, ["ca.pem", "cert.pem", "key.pem"].map(String::from).into());
    let hidden = fs::read_dir(auth.dir()).unwrap().map(|file| file.unwrap().file_name());
    assert!(!hidden.into_iter().any(|name| name.to_string_lossy().starts_with('.')));
    // Never longer than the CA.
    let long = auth.issue("pageserver", "one", &["--days", "3650"]);
    assert!(long.certificate().days_left(Timestamp::now()) <= 3650);
    // Hosts of a certificate that can't be read.
    fs::write(directory.join("cert.pem"), "nonsense").unwrap();
    let said = auth.refusal(&["issue", "--role", "pageserver", "--name", "one"], 1);
    assert!(said.contains("--host"), "{said}");
}

#[test]
fn tokens_are_what_services_take() {
    let auth = Auth::new();
    let tokens = Tokens::open(&auth.path("token-keys")).unwrap();
    let now = Timestamp::now;
    for (scope, expected) in [
        ("admin", Scope::Admin),
        ("read", Scope::Read),
        (&format!("tenant:{TENANT}"), Scope::Tenant(TENANT.parse().unwrap())),
    ] {
        let token = auth.run(&["token", "--scope", scope, "--ttl", "1h"]);
        assert!(token.lines().count() == 1 && !token.contains(' '), "{token}");
        assert_eq!(tokens.check(&token, now()), Ok(expected));
    }
    let old = auth.run(&["token", "--scope", "admin", "--ttl", "30d"]);
    let brief = auth.run(&["token", "--scope", "admin", "--ttl", "1s"]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(matches!(tokens.check(&brief, now()), Err(TokenError::Expired(_))));

    let before = auth.public_keys();
    let said = auth.run(&["rotate"]);
    let after = auth.public_keys();
    let first: Vec<_> = before.iter().collect();
    let added: Vec<_> = after.difference(&before).collect();
    assert!(added.len() == 1 && first.len() == 1 && after.len() == 2, "{after:?}");
    assert!(said.contains(first[0].as_str()) && said.contains(added[0].as_str()), "{said}");
    let new = auth.run(&["token", "--scope", "read", "--ttl", "1h"]);
    // A service that runs takes the new key up, and believes both.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(tokens.check(&new, now()), Ok(Scope::Read));
    assert_eq!(tokens.check(&old, now()), Ok(Scope::Admin));
    fs::remove_file(auth.path("token-keys").join(first[0])).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert!(matches!(tokens.check(&old, now()), Err(TokenError::UnknownKey(_))));
    assert_eq!(tokens.check(&new, now()), Ok(Scope::Read));
    // Nobody would believe it.
    fs::remove_file(auth.path("token-keys").join(added[0])).unwrap();
    let said = auth.refusal(&["token", "--scope", "read", "--ttl", "1h"], 1);
    assert!(said.contains("rotate"), "{said}");
}

#[test]
fn what_there_is_is_shown() {
    let auth = Auth::new();
    auth.issue("safekeeper", "1", &["--host", "sk1"]);
    auth.issue("admin", "alice", &[]);
    auth.run(&["rotate"]);
    fs::write(auth.path("admin-alice/key.pem"), "").unwrap();
    let shown: Value = serde_json::from_str(&auth.run(&["show", "--json"])).unwrap();
    let [ca] = shown["authorities"].as_array().unwrap().as_slice() else { panic!("{shown}") };
    assert_eq!(ca["days_left"], 3649, "{ca}");
    let [alice, safekeeper] = shown["certificates"].as_array().unwrap().as_slice() else {
        panic!("{shown}")
    };
    assert_eq!(safekeeper["role"], "pgstrata://safekeeper/1");
    assert_eq!(safekeeper["names"], serde_json::json!(["sk1"]));
    assert_eq!(safekeeper["days_left"], 364);
    assert!(safekeeper["not_after"].as_str().unwrap().ends_with('Z'), "{safekeeper}");
    assert_eq!(safekeeper["trouble"], Value::Null);
    assert!(alice["trouble"].as_str().unwrap().contains("key.pem"), "{alice}");
    let signs: Vec<_> =
        shown["token_keys"].as_array().unwrap().iter().map(|key| &key["signs"]).collect();
    assert_eq!(signs.iter().filter(|signs| **signs == true).count(), 1);
    assert_eq!(signs.len(), 2);

    let one = auth.path("safekeeper-1");
    let shown: Value =
        serde_json::from_str(&auth.run(&["show", one.to_str().unwrap(), "--json"])).unwrap();
    assert_eq!(shown["certificates"].as_array().unwrap().len(), 1);
    let table = auth.run(&["show"]);
    for words in ["pgstrata://safekeeper/1", "CN=pgstrata CA", "sk1", "token key, signs"] {
        assert!(table.contains(words), "{table}");
    }
    assert!(!table.contains("PRIVATE"));
}

#[test]
fn what_is_refused() {
    let auth = Auth::new();
    for (arguments, words) in [
        (&["issue", "--role", "safekeeper", "--name", "x"][..], "node id"),
        (&["issue", "--role", "compute", "--name", "x"], "32 hexadecimal digits"),
        (&["issue", "--role", "admin", "--name", "../x"], "letters"),
        (&["show", "/nonexistent"], "/nonexistent/ca.pem"),
    ] {
        let said = auth.refusal(arguments, 1);
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    for arguments in [
        &["issue", "--role", "postgres", "--name", "x"][..],
        &["issue", "--role", "admin"],
        &["issue", "--role", "admin", "--name", "x", "--host", "a b"],
        &["issue", "--role", "admin", "--name", "x", "--days", "0"],
        &["token", "--scope", "everything", "--ttl", "1h"],
        &["token", "--scope", "admin", "--ttl", "soon"],
        &["token", "--scope", "admin"],
        &[],
    ] {
        auth.refusal(arguments, 2);
    }
    // Nothing came of it.
    assert_eq!(fs::read_dir(auth.dir()).unwrap().count(), 4);

    // A key that is not the CA's.
    let other = Auth::new();
    fs::copy(other.path("ca-key.pem"), auth.path("ca-key.pem")).unwrap();
    let said = auth.refusal(&["issue", "--role", "admin", "--name", "x"], 1);
    assert!(said.contains("ca.pem") && said.contains("ca-key.pem"), "{said}");
    for name in ["ca-key.pem", "ca.pem", "token-key.pem"] {
        let arguments = match name {
            "token-key.pem" => &["token", "--scope", "read", "--ttl", "1h"][..],
            _ => &["issue", "--role", "admin", "--name", "x"],
        };
        fs::write(auth.path(name), "-----BEGIN PRIVATE KEY-----\nAAAA\n").unwrap();
        let said = auth.refusal(arguments, 1);
        assert!(said.contains(name) && !said.contains("AAAA"), "{said}");
        fs::remove_file(auth.path(name)).unwrap();
        let said = auth.refusal(arguments, 1);
        assert!(said.contains(name) && said.contains("not there"), "{said}");
    }
}

#[test]
fn help_teaches() {
    let mut command = Command::new(programs().join("pgstrata"));
    let output = command.args(["auth", "--help"]).output().unwrap();
    let said = text(&output.stdout);
    for words in ["pgstrata auth init --dir pki", "--role safekeeper", "pgstrata-auth", "token"] {
        assert!(said.contains(words), "{said}");
    }
}
