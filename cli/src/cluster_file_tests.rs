use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

const TOKEN: &str = "eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6ImFkbWluIn0.c2lnbmF0dXJl";

fn refused(text: &str) -> String {
    match Written::parse(text.as_bytes()) {
        Ok(_) => panic!("it is taken: {text}"),
        Err(error) => {
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
            error
        }
    }
}

#[test]
fn a_cluster_file_is_a_broker_and_a_way_in() {
    for text in [
        "broker = 'http://127.0.0.1:50051'",
        "broker = 'http://localhost:50051/'",
        "broker = 'http://[::1]:50051'\npageserver_http = '[::1]:7001'",
        "broker = 'https://b.example.org'\ntls = 'admin-me'",
        "broker = 'https://b.example.org:1'\ntls = 'admin-me'\nca = 'ca.pem'\npageserver_http = 'ps1:7001'",
        "broker = 'https://10.0.0.1:1'\nca = 'ca.pem'\ntoken = 'a.b.c'",
        "broker = 'https://[fd00::1]:1'\nca = 'ca.pem'\ntoken_file = 'token'",
        "broker = 'http://127.0.0.1:1'\nobject_store = 's3://bucket/prefix'\ns3_endpoint = 'http://x:1'",
        "broker = 'http://127.0.0.1:1'\nobject_store = '/some/directory'",
    ] {
        if let Err(error) = Written::parse(text.as_bytes()) {
            panic!("{text}: {error}");
        }
    }
}

#[test]
fn a_mistake_in_a_cluster_file_is_told_by_its_field() {
    let token = format!("ca = 'ca.pem'\ntoken = '{TOKEN}'");
    for (text, words) in [
        (String::new(), "missing field `broker`"),
        ("broker = ".into(), "line 1"),
        ("broker = 'http://127.0.0.1:1'\nbrokre = 'x'".into(), "line 2: unknown field `brokre`"),
        ("broker = 5".into(), "line 1: invalid type"),
        ("broker = 'x y'".into(), "'broker': it is no URL"),
        ("broker = '/x'".into(), "'broker': it names no host"),
        ("broker = 'ftp://127.0.0.1'".into(), "'broker': it begins"),
        ("broker = 'http://me@127.0.0.1:1'".into(), "'broker': it has a user"),
        ("broker = 'https://b:1/v1'\ntls = 'x'".into(), "'broker': nothing follows the port"),
        ("broker = 'http://b.example.org:1'".into(), "'broker': plain text is for this machine"),
        (format!("broker = 'http://b.example.org:1'\n{token}"), "'broker': plain text"),
        // A name that only begins like an address of this machine.
        ("broker = 'http://127.0.0.1.example.org:1'".into(), "'broker': plain text"),
        ("broker = 'https://b:1'".into(), "how to be let in"),
        ("broker = 'https://b:1'\nca = 'ca.pem'".into(), "how to be let in"),
        ("broker = 'http://127.0.0.1:1'\nca = 'ca.pem'".into(), "'ca': "),
        ("broker = 'http://127.0.0.1:1'\ntls = 'x'".into(), "'tls': it is not shown without TLS"),
        (format!("broker = 'http://127.0.0.1:1'\n{token}"), "'token': it is not shown"),
        (format!("broker = 'https://b:1'\ntoken = '{TOKEN}'"), "'token': it is shown to services"),
        ("broker = 'https://b:1'\ntoken_file = 'x'".into(), "'token_file': it is shown"),
        (
            format!("broker = 'https://b:1'\ntls = 'x'\n{token}"),
            "'tls' and 'token' are one too many",
        ),
        (format!("broker = 'https://b:1'\ntoken_file = 'x'\n{token}"), "'token' and 'token_file'"),
        (format!("broker = 'https://b:1'\n{token}\ntoken = '{TOKEN}'"), "line 4: duplicate key"),
        (format!("broker = 'https://b:1'\nca = 'x'\ntoken = '{TOKEN}\n"), "line 3"),
        (
            "broker = 'http://127.0.0.1:1'\npageserver_http = 'x/y:1'".into(),
            "'pageserver_http': 'x/y:1' is no HOST:PORT",
        ),
        (
            "broker = 'http://127.0.0.1:1'\npageserver_http = 'ps1:1'".into(),
            "'pageserver_http': ps1:1 is not on",
        ),
        ("broker = 'http://127.0.0.1:1'\ns3_endpoint = 'http://x'".into(), "'s3_endpoint'"),
        ("broker = 'http://127.0.0.1:1'\nobject_store = 'ftp://x'".into(), "'object_store'"),
    ] {
        let error = refused(&text);
        assert!(error.contains(words), "{text}: {error}");
        assert!(!error.contains("eyJ"), "a token is shown: {error}");
    }
}

#[test]
fn addresses_are_a_host_and_a_port() {
    for good in ["a:1", "ps1.example.org:65535", "10.0.0.1:7001", "[::1]:7001", "a_b-c:1"] {
        check_address(good).unwrap();
    }
    for bad in [
        "", "a", "a:", ":1", "a:65536", "a:+1", "a:01", "a/b:1", "me@a:1", "::1:1", "[a]:1",
        "a b:1", "a#:1",
    ] {
        assert!(check_address(bad).is_err(), "{bad}");
    }
    for (address, is_here) in [
        ("localhost:1", true),
        ("127.9.9.9:1", true),
        ("[::1]:1", true),
        ("localhost.x:1", false),
        ("10.0.0.1:1", false),
    ] {
        assert_eq!(check_plain(address).is_ok(), is_here, "{address}");
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_token_that_others_can_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cluster.toml");
    let read = || format!("{:#}", ClusterFile::read(&path).err().unwrap());
    fs::write(&path, format!("broker = 'https://b:1'\nca = 'none.pem'\ntoken = '{TOKEN}'"))
        .unwrap();
    mode(&path, 0o644);
    assert!(read().contains("cluster.toml: others can read it (mode 0644)"), "{}", read());
    mode(&path, 0o600);
    assert!(read().contains("'ca'") && read().contains("none.pem: it is not there"), "{}", read());

    fs::write(&path, "broker = 'https://b:1'\nca = 'none.pem'\ntoken_file = 'token'").unwrap();
    mode(&path, 0o644);
    let token = directory.path().join("token");
    assert!(read().contains("token: it is not there"), "{}", read());
    fs::write(&token, format!("{TOKEN}\n")).unwrap();
    mode(&token, 0o644);
    assert!(read().contains("token: others can read it"), "{}", read());
    mode(&token, 0o600);
    assert!(read().contains("none.pem"), "{}", read());
    fs::write(&token, "nonsense").unwrap();
    assert!(read().contains("it is no token"), "{}", read());
    fs::write(&path, "broker = 'https://b:1'\ntls = 'admin-me'").unwrap();
    assert!(read().contains("'tls'") && read().contains("admin-me"), "{}", read());
    fs::write(&path, "#".repeat(70_000)).unwrap();
    assert!(read().contains("longer than"), "{}", read());
}

proptest! {
    #[test]
    fn a_cluster_file_of_any_bytes_is_read_or_refused(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "(broker|ca|tls|token|pageserver_http|object_store|\\[x\\])? ?=? ?['\"]?.{0,30}['\"]?\n?.{0,20}"
                .prop_map(String::into_bytes),
            ".{0,40}".prop_map(|value| format!("broker = {}", quoted(&value)).into_bytes()),
            ".{0,40}".prop_map(|value| format!("broker = 'https://b:1'\ntls = 'x'\npageserver_http = {}", quoted(&value)).into_bytes()),
        ]
    ) {
        if let Err(error) = Written::parse(&bytes) {
            prop_assert!(!error.contains('\n'), "{}", error);
        }
    }

    #[test]
    fn what_is_exported_is_read_again(path in ".{0,40}", name in "[a-z]{1,10}(\\.[a-z]{1,10})?") {
        let written = Written {
            broker: format!("https://{name}:50051"),
            ca: Some(path.clone()),
            token_file: Some(path),
            ..Written::default()
        };
        let read = Written::parse(written.to_text().as_bytes());
        prop_assert!(read.as_ref().is_ok_and(|read| *read == written), "{:?}", read.err());
    }
}
