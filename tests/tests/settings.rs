//! `docs/settings.md` says of every setting of every version what becomes of it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use pgstrata_compute_shim::settings::{CHOSEN, FORCED};
use pgstrata_tests::installation::Installation;
use pgstrata_tests::{Cluster, pg_directory};

/// What the document says of a setting.
struct Row {
    versions: (u32, u32),
    here: String,
    why: String,
}

fn document() -> BTreeMap<String, Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, versions, here, why] = cells[..] else { panic!("{line}") };
        let (first, last) = versions.split_once('-').unwrap_or((versions, versions));
        let row = Row {
            versions: (first.parse().unwrap(), last.parse().unwrap()),
            here: here.to_owned(),
            why: why.to_owned(),
        };
        let before = rows.insert(name.trim_matches('`').to_owned(), row);
        assert!(before.is_none(), "{name} has two rows");
    }
    rows
}

#[test]
fn l1_every_setting_of_every_version_has_a_row() {
    let rows = document();
    for (name, row) in &rows {
        assert!(!row.why.is_empty(), "{name} has no reason");
    }
    for major in [15, 16, 17, 18] {
        let installation = Installation::of(major);
        let directory = pg_directory();
        let data = directory.path().join("data");
        installation.run("initdb", &["-D", data.to_str().unwrap(), "-U", "postgres", "-N"]);
        let server = installation.start(&data);
        let found = server.client().query("select name from pg_settings", &[]).unwrap();
        assert!(found.len() > 300, "PostgreSQL {major} has {} settings", found.len());
        let names: Vec<String> = found.iter().map(|row| row.get(0)).collect();
        // Distributions add settings of their own (extension_destdir of Debian's).
        let missing: Vec<_> = names
            .iter()
            .filter(|name| {
                !rows
                    .get(*name)
                    .is_some_and(|row| (row.versions.0..=row.versions.1).contains(&major))
            })
            .collect();
        assert!(
            missing.is_empty(),
            "PostgreSQL {major} has settings that docs/settings.md has not: {missing:?}"
        );
        for forced in
            FORCED.iter().filter(|forced| (forced.versions.0..=forced.versions.1).contains(&major))
        {
            assert!(names.iter().any(|name| name == forced.name), "{major} has no {}", forced.name);
        }
    }
}

#[test]
fn l22_the_document_says_what_the_code_does() {
    let rows = document();
    for forced in FORCED {
        let row = &rows[forced.name];
        let here = if forced.read_only { "forced, read-only" } else { "forced" };
        assert_eq!(row.here, here, "{}", forced.name);
        let value = if forced.value.is_empty() { "''" } else { forced.value };
        assert_eq!(row.why, format!("`{value}`: {}", forced.why), "{}", forced.name);
    }
    for (name, why) in CHOSEN {
        assert_eq!((rows[*name].here.as_str(), rows[*name].why.as_str()), ("chosen", *why));
    }
    let decided = rows.values().filter(|row| row.here != "as you set it").count();
    assert_eq!(decided, FORCED.len() + CHOSEN.len());
}

/// What `status` says of the compute of `main`.
fn warnings(cluster: &Cluster) -> String {
    cluster.json(&["compute", "list"])[0]["warnings"].to_string()
}

#[test]
fn a_server_that_listens_beyond_this_machine_asks_for_passwords() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut client = cluster.client();
    client.batch_execute("alter role postgres password 'secret'").unwrap();
    // Nobody can be reached by the second, but that is not known from its name.
    client
        .batch_execute("alter system set listen_addresses = '127.0.0.1, nobody.invalid'")
        .unwrap();
    let data = cluster.data_directories().remove(0);
    let hba = data.join("pg_hba.conf");
    assert!(std::fs::read_to_string(&hba).unwrap().contains("trust"));
    let restart = || {
        cluster.cli(&["compute", "stop", "main"]);
        cluster.cli(&["compute", "start", "main"]).trim().to_owned()
    };
    assert_eq!(restart(), uri);
    assert!(!std::fs::read_to_string(&hba).unwrap().contains("trust"));
    let refused = postgres::Client::connect(&uri, postgres::NoTls).err().unwrap();
    // The server asks for one, and this client has none to give.
    assert!(format!("{refused:?}").contains("password missing"), "{refused:?}");
    let with_password = uri.replace("postgres@", "postgres:secret@");
    let mut client = postgres::Client::connect(&with_password, postgres::NoTls).unwrap();
    assert_eq!(warnings(&cluster), "[]");

    // What the user says counts, and is not passed over in silence.
    let text = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(&hba, format!("{text}host all all 10.0.0.0/8 trust\n")).unwrap();
    restart();
    let said = warnings(&cluster);
    assert!(said.contains("lets anybody in from 10.0.0.0/8"), "{said}");
    drop(client);

    // On loopback only it is as it was, until somebody has changed it.
    std::fs::write(&hba, text).unwrap();
    client = postgres::Client::connect(&with_password, postgres::NoTls).unwrap();
    client.batch_execute("alter system reset listen_addresses").unwrap();
    restart();
    assert_eq!(warnings(&cluster), "[]");
    cluster.client();
}
