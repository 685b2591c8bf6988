//! Damaged, lost and full directories: one clear line, nothing wrong served, nothing made worse.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, S3Server, connect, pg_bin, processes_of};
use serde_json::Value;

/// A cluster with something in it, down.
fn filled() -> Cluster {
    fill_and_stop(Cluster::new())
}

fn fill_and_stop(cluster: Cluster) -> Cluster {
    let mut client = cluster.client();
    client.batch_execute("create table t as select g a from generate_series(1, 1000) g").unwrap();
    drop(client);
    cluster.cli(&["compact"]);
    cluster.cli(&["down"]);
    cluster
}

fn sum(uri: &str) -> i64 {
    connect(uri).query_one("select sum(a) from t", &[]).unwrap().get(0)
}

fn refused_up(cluster: &Cluster) -> String {
    let pg_bin = pg_bin();
    cluster.refusal(&["up", "--pg-bin", pg_bin.to_str().unwrap()], 1)
}

/// `up` where a minority of the safekeepers can't serve: main is up, and the command fails with one line. Returns the URI
/// and the line.
fn troubled_up(cluster: &Cluster) -> (String, String) {
    let pg_bin = pg_bin();
    let output = cluster.try_cli(&["up", "--pg-bin", pg_bin.to_str().unwrap()]);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.contains("main is up, but") && line.lines().count() == 1, "{line}");
    (String::from_utf8(output.stdout).unwrap().trim().to_owned(), line)
}

/// Files below a directory, by the end of their paths.
fn files(root: &Path, wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if wanted(&path.file_name().unwrap().to_string_lossy()) {
                found.push(path);
            }
        }
    }
    found
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}

/// Whether a name is a WAL segment's.
fn is_segment(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[test]
fn a_damaged_cluster_file_is_neither_used_nor_overwritten() {
    let cluster = filled();
    let path = cluster.dir().join("cluster.json");
    let good = std::fs::read(&path).unwrap();
    let newer = {
        let mut state: Value = serde_json::from_slice(&good).unwrap();
        state["version"] = Value::from(99);
        state["of_tomorrow"] = Value::from("keep me");
        serde_json::to_vec(&state).unwrap()
    };
    let garbage = [0xFF, 0xFE, 0x00, 0x80].repeat(100);
    for (bad, expected) in
        [(&good[..100], "damaged"), (b"", "damaged"), (&garbage, "damaged"), (&newer, "newer")]
    {
        std::fs::write(&path, bad).unwrap();
        let pg_bin = pg_bin();
        let up = ["up", "--pg-bin", pg_bin.to_str().unwrap()];
        for arguments in [&up[..], &["status"], &["down"], &["compute", "start", "main"]] {
            let text = cluster.refusal(arguments, 1);
            assert!(text.contains("cluster.json") && text.contains(expected), "{text}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), bad);
    }
    std::fs::write(&path, good).unwrap();
    assert_eq!(sum(&cluster.up()), 500_500);
}

#[test]
fn two_ups_at_once_make_one_cluster() {
    let cluster = Cluster::new();
    let uris: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| cluster.up())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(uris.iter().all(|uri| *uri == uris[0]), "{uris:?}");
    connect(&uris[0]).batch_execute("create table t (a int)").unwrap();

    // No command forgets what another one did meanwhile.
    let names = ["b1", "b2", "b3", "b4"];
    for name in names {
        cluster.cli(&["branch", "create", name]);
    }
    std::thread::scope(|scope| {
        let start = |name| cluster.cli(&["compute", "start", name]);
        let threads = names.map(|name| scope.spawn(move || start(name)));
        threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
    });
    let computes = cluster.json(&["compute", "list"]);
    assert_eq!(computes.as_array().unwrap().len(), 1 + names.len(), "{computes}");
    cluster.cli(&["down"]);
    let directory = cluster.dir();
    let directory = directory.to_str().unwrap();
    assert_eq!(processes_of(directory), [], "processes that nobody knows");
}

#[test]
fn a_port_that_somebody_takes_while_services_start() {
    let cluster = Cluster::new();
    let page_server_port = || -> Option<u16> {
        let state = std::fs::read(cluster.dir().join("cluster.json")).ok()?;
        let state: Value = serde_json::from_slice(&state).ok()?;
        state["pageserver"][0].as_u64().map(|port| port as u16)
    };
    // Known as soon as it is chosen, and used when the safekeepers are ready.
    let taken = std::thread::scope(|scope| {
        let taker = scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                if let Some(port) = page_server_port() {
                    break TcpListener::bind(("127.0.0.1", port)).unwrap();
                }
                assert!(Instant::now() < deadline, "no port was chosen");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        cluster.up();
        taker.join().unwrap()
    });
    assert_ne!(page_server_port(), Some(taken.local_addr().unwrap().port()));
    connect(&cluster.up()).batch_execute("create table t (a int)").unwrap();
}

#[test]
fn ports_that_somebody_took_meanwhile() {
    let cluster = filled();
    let state: Value =
        serde_json::from_slice(&std::fs::read(cluster.dir().join("cluster.json")).unwrap())
            .unwrap();
    let port = |value: &Value| value.as_u64().unwrap() as u16;
    // While everything is down, another port will do.
    let taken: Vec<_> = [
        port(&state["broker"]),
        port(&state["safekeepers"][1]["wal"]),
        port(&state["pageserver"][1]),
    ]
    .into_iter()
    .map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap())
    .collect();
    assert_eq!(sum(&cluster.up()), 500_500);
    drop(taken);

    // While something runs that knows the old one, it has to be freed.
    let before: Value =
        serde_json::from_slice(&std::fs::read(cluster.dir().join("cluster.json")).unwrap())
            .unwrap();
    cluster.kill("safekeeper-3");
    let port = port(&before["safekeepers"][2]["pg"]);
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let text = refused_up(&cluster);
    assert!(text.contains(&port.to_string()) && text.contains("safekeeper-3"), "{text}");
    drop(taken);
    assert_eq!(sum(&cluster.up()), 500_500);
}

#[test]
fn a_page_servers_directory_with_rubbish_in_it() {
    // On S3, where the page server keeps copies of layers.
    let server = S3Server::start();
    let cluster = fill_and_stop(server.cluster());
    let directory = cluster.dir().join("pageserver");
    let layers = files(&directory, &|name| name.starts_with("delta") || name.starts_with("image"));
    assert!(!layers.is_empty());
    for path in &layers {
        let length = std::fs::metadata(path).unwrap().len();
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length / 2).unwrap();
        std::fs::write(path.with_extension("tmp"), b"rubbish").unwrap();
    }
    std::fs::write(directory.join("rubbish"), [0xFF; 5000]).unwrap();
    assert_eq!(sum(&cluster.up()), 500_500);
    cluster.cli(&["down"]);

    // A file in its place.
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::write(&directory, b"rubbish").unwrap();
    let text = refused_up(&cluster);
    assert!(text.contains(directory.to_str().unwrap()), "{text}");
    std::fs::remove_file(&directory).unwrap();
    assert_eq!(sum(&cluster.up()), 500_500);
}

#[test]
fn a_computes_directory_with_rubbish_in_it() {
    let cluster = filled();
    let directory = cluster.dir().join("computes/main");
    let data = directory.join("data");
    std::fs::remove_file(data.join("global/pg_filenode.map")).unwrap();
    std::fs::remove_dir_all(data.join("base")).unwrap();
    std::fs::write(data.join("rubbish"), [0xFF; 5000]).unwrap();
    std::fs::write(data.join("PG_VERSION"), b"99\n").unwrap();
    let uri = cluster.up();
    assert_eq!(sum(&uri), 500_500);

    // Files that vanish below a running server are its end, not the end of the data.
    std::fs::remove_dir_all(data.join("base")).unwrap();
    cluster.kill("compute-main");
    assert_eq!(sum(&cluster.up()), 500_500);
    cluster.cli(&["down"]);

    // A setting that PostgreSQL refuses is the user's own, and kept for him to mend.
    let settings = data.join("postgresql.conf");
    let good = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(&settings, format!("{good}\nrubbish\n")).unwrap();
    let text = refused_up(&cluster);
    assert!(text.contains("postgresql.conf"), "{text}");
    std::fs::write(&settings, good).unwrap();
    assert_eq!(sum(&cluster.up()), 500_500);
}

/// Whether `wal verify --all` finds nothing wrong, and what it says of each copy of main.
fn copies(cluster: &Cluster) -> (bool, Vec<String>) {
    let output = cluster.try_cli(&["wal", "verify", "--all", "--branch", "main", "--json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let copies: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"));
    let states = copies.iter().map(|copy| copy["state"].as_str().unwrap().to_owned());
    (output.status.success(), states.collect())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn h18_damaged_safekeepers_are_named_and_never_guess() {
    let cluster = filled();
    let one = cluster.dir().join("safekeeper-1");
    let control = files(&one, &|name| name == "control").remove(0);
    let segment = files(&one, &is_segment).into_iter().min().unwrap();
    let failure = || {
        let status = cluster.status();
        let processes = status["processes"].as_array().unwrap().clone();
        let row = processes.iter().find(|row| row["name"] == "safekeeper-1").unwrap().clone();
        row["failure"].as_str().unwrap_or_default().to_owned()
    };
    flip(&control, 40);
    let (uri, line) = troubled_up(&cluster);
    assert_eq!(sum(&uri), 500_500, "a majority is enough");
    assert!(line.contains("safekeeper-1"), "h18: {line}");
    let text = failure();
    assert!(text.contains(one.to_str().unwrap()), "{text}");
    let (right, states) = copies(&cluster);
    assert!(!right, "{states:?}");
    assert_eq!(states[..3], ["damaged", "ok", "ok"], "{states:?}");
    cluster.cli(&["down"]);
    flip(&control, 40);
    assert_eq!(sum(&cluster.up()), 500_500);
    assert_eq!(failure(), "");
    cluster.cli(&["down"]);

    // What is in segments the others have, and give. The WAL begins at the first one's start plus some; the first records are in
    // its first pages.
    let is_mended = |what: &str| {
        let pg_bin = pg_bin();
        // It may be so already when the command looks, or not yet.
        let began = cluster.try_cli(&["up", "--pg-bin", pg_bin.to_str().unwrap()]);
        let uri = String::from_utf8(began.stdout).unwrap().trim().to_owned();
        assert_eq!(sum(&uri), 500_500, "a majority is enough");
        wait_until(what, || failure().is_empty() && copies(&cluster).0);
        cluster.cli(&["down"]);
    };
    flip(&segment, 5000);
    is_mended("a flipped bit");
    std::fs::remove_file(&segment).unwrap();
    is_mended("a segment that is gone");
    assert!(segment.exists());

    // Two of three: nothing is served.
    let two = cluster.dir().join("safekeeper-2");
    let other = files(&two, &|name| name == "control").remove(0);
    flip(&other, 40);
    flip(&control, 40);
    let began = std::time::Instant::now();
    let text = refused_up(&cluster);
    assert!(text.contains("quorum") && text.contains(two.to_str().unwrap()), "{text}");
    // At once: the third one's answer would change nothing.
    assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?}", began.elapsed());
    cluster.cli(&["down"]);
    flip(&other, 40);
    flip(&control, 40);
    assert_eq!(sum(&cluster.up()), 500_500);
}

/// Of a branch that the page server can't serve little is known there; its WAL is with the safekeepers, and is checked.
#[test]
fn the_wal_of_a_branch_that_is_not_served_is_verified() {
    let cluster = Cluster::new();
    cluster.up();
    cluster.cli(&["branch", "create", "side"]);
    let mut client = cluster.branch_client("side");
    client.batch_execute("create table s as select generate_series(1, 1000) a").unwrap();
    drop(client);
    cluster.cli(&["compute", "stop", "side"]);
    let rows = cluster.json(&["branch", "list"]);
    let side = rows.as_array().unwrap().iter().find(|row| row["name"] == "side").unwrap().clone();
    let timeline = side["timeline_id"].as_str().unwrap().to_owned();
    cluster.cli(&["down"]);
    let objects = cluster.dir().join("objects");
    let indexes = files(&objects, &|name| name == "index");
    let index = indexes.iter().find(|path| path.to_string_lossy().contains(&timeline)).unwrap();
    flip(index, 40);
    cluster.up();
    let verify = |arguments: &[&str]| -> Vec<(String, String, String)> {
        let all = cluster.json(&[&["wal", "verify", "--all"], arguments].concat());
        let own = all
            .as_array()
            .unwrap()
            .iter()
            .filter(|copy| copy["branch"].as_str().unwrap().contains(&timeline));
        let text = |copy: &Value, field: &str| copy[field].as_str().unwrap_or_default().to_owned();
        own.map(|copy| (text(copy, "copy"), text(copy, "state"), text(copy, "reason"))).collect()
    };
    let named = format!("({timeline})");
    for arguments in [&[][..], &["--branch", &named]] {
        let copies = verify(arguments);
        let (place, state, why) = &copies[0];
        assert_eq!((place.as_str(), state.as_str()), ("page server", "unreachable"), "{copies:?}");
        assert!(why.contains("the branch is not served") && why.contains("index"), "{why}");
        let kept: Vec<_> = copies.iter().filter(|copy| copy.0.starts_with("safekeeper")).collect();
        assert!(kept.len() == 3 && kept.iter().all(|copy| copy.1 == "ok"), "{copies:?}");
    }
    // Nobody is left to say what it is.
    for id in 1..=3 {
        cluster.kill(&format!("safekeeper-{id}"));
    }
    let copies = verify(&[]);
    assert!(
        copies.len() == 1 && copies[0].2.contains("none of its copies was checked"),
        "{copies:?}"
    );
}

#[test]
fn h18_rot_under_a_running_safekeeper_is_mended() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let mut client = connect(&uri);
    let mut position = || -> (String, usize) {
        let sql = "select pg_walfile_name(lsn), file_offset \
                   from pg_current_wal_insert_lsn() lsn, pg_walfile_name_offset(lsn)";
        let row = client.query_one(sql, &[]).unwrap();
        (row.get(0), row.get::<_, i32>(1) as usize)
    };
    let (name, from) = position();
    let mut writer = connect(&uri);
    writer
        .batch_execute(
            "create table rot as select repeat(md5(g::text), 30) a from generate_series(1, 1000) g",
        )
        .unwrap();
    let (same, to) = position();
    assert_eq!(name, same, "the segment was full already");
    let segment = |id: u32| {
        let directory = cluster.dir().join(format!("safekeeper-{id}"));
        files(&directory, &|file| file.ends_with(&name[8..])).remove(0)
    };
    flip(&segment(1), (from + to) / 2);
    let bytes = |id: u32| std::fs::read(segment(id)).unwrap();
    // A full segment is read before it is archived.
    writer.batch_execute("select pg_switch_wal(); create table next ()").unwrap();
    let failure = || {
        let status = cluster.status();
        let processes = status["processes"].as_array().unwrap().clone();
        let row = processes.iter().find(|row| row["name"] == "safekeeper-1").unwrap().clone();
        row["failure"].as_str().unwrap_or_default().to_owned()
    };
    wait_until("the mend", || bytes(1) == bytes(2) && failure().is_empty());
    assert_eq!(cluster.up(), uri);
    assert!(copies(&cluster).0);
}

/// Put back as they were before, which no incarnation shows: the page server knows of WAL that they had.
#[test]
fn a_majority_that_was_put_back_is_not_taken_for_all_that_was_committed() {
    let cluster = filled();
    cluster.cli(&["down"]);
    let place = |id: u32| cluster.dir().join(format!("safekeeper-{id}"));
    for id in 1..=2 {
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(place(id)).arg(place(id).with_extension("old"));
        assert!(copy.status().unwrap().success());
    }
    let mut client = cluster.client();
    client.batch_execute("create table later as select generate_series(1, 1000)").unwrap();
    drop(client);
    cluster.cli(&["down"]);
    for id in 1..=3 {
        std::fs::rename(place(id), place(id).with_extension("aside")).unwrap();
    }
    for id in 1..=2 {
        std::fs::rename(place(id).with_extension("old"), place(id)).unwrap();
    }
    let text = refused_up(&cluster);
    assert!(text.contains("was committed"), "{text}");
    cluster.cli(&["down"]);
    for id in 1..=3 {
        let _ = std::fs::remove_dir_all(place(id));
        std::fs::rename(place(id).with_extension("aside"), place(id)).unwrap();
    }
    let mut client = cluster.client();
    let count: i64 = client.query_one("select count(*) from later", &[]).unwrap().get(0);
    assert_eq!(count, 1000);
}

#[test]
fn a_safekeeper_that_lost_its_directory_does_not_vote_as_if_nothing_had_been() {
    let cluster = filled();
    let aside = |id: u32| {
        let directory = cluster.dir().join(format!("safekeeper-{id}"));
        std::fs::rename(&directory, directory.with_extension("aside")).unwrap();
    };
    let back = |id: u32| {
        let directory = cluster.dir().join(format!("safekeeper-{id}"));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::rename(directory.with_extension("aside"), directory).unwrap();
    };
    // One of three: the others serve, and it is said.
    aside(1);
    let text = refused_up(&cluster);
    assert!(text.contains("safekeeper-1 has lost its directory"), "{text}");
    let uri = cluster.json(&["compute", "list"])[0]["uri"].as_str().unwrap().to_owned();
    assert_eq!(sum(&uri), 500_500);
    connect(&uri).batch_execute("create table later (a int)").unwrap();
    cluster.cli(&["down"]);

    // A majority: nothing starts that could take the place of what is lost.
    aside(2);
    let text = refused_up(&cluster);
    let recover = text.find("'pgstrata quorum recover --branch BRANCH'").expect(&text);
    let replace = text.find("'pgstrata safekeeper replace ").expect(&text);
    assert!(text.contains("no majority") && recover < replace, "{text}");
    cluster.cli(&["down"]);

    // Somebody insists, and makes them start empty: they are none of the members.
    let path = cluster.dir().join("cluster.json");
    let state = std::fs::read_to_string(&path).unwrap();
    aside(3);
    std::fs::write(&path, state.replace("\"started\": true", "\"started\": false")).unwrap();
    let text = refused_up(&cluster);
    assert!(text.contains("another directory than the one that joined"), "{text}");
    cluster.cli(&["down"]);
    (1..=3).for_each(back);
    let uri = cluster.up();
    assert_eq!(sum(&uri), 500_500);
    connect(&uri).batch_execute("table later").unwrap();
}

#[test]
fn wal_that_safekeepers_dropped_is_verified_from_the_archive() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select g a from generate_series(1, 400000) g").unwrap();
    let kept = || {
        let first = "000000010000000000000002";
        (1..=3).any(|id| {
            let safekeeper = cluster.dir().join(format!("safekeeper-{id}"));
            !files(&safekeeper, &|name| name == first).is_empty()
        })
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while kept() {
        cluster.cli(&["compact"]);
        assert!(std::time::Instant::now() < deadline, "nothing is dropped");
    }
    let verified = cluster.json(&["wal", "verify"]);
    assert_eq!((&verified["ok"], &verified["from"]), (&true.into(), &"0/2000000".into()));
    cluster.cli(&["wal", "dump", "--from", "0/2000028", "--to", "0/2001000"]);

    let segment = files(&cluster.dir().join("objects"), &|name| name.ends_with(".zst"))
        .into_iter()
        .min()
        .unwrap();
    flip(&segment, std::fs::metadata(&segment).unwrap().len() as usize / 2);
    let text = cluster.refusal(&["wal", "verify"], 1);
    assert!(!text.contains("panicked"), "{text}");
    let (right, states) = copies(&cluster);
    assert!(!right && states == ["ok", "ok", "ok", "damaged"], "{states:?}");
    std::fs::remove_file(&segment).unwrap();
    let text = cluster.refusal(&["wal", "verify"], 1);
    assert!(text.contains("neither a safekeeper nor"), "{text}");
    assert!(!copies(&cluster).0);
    cluster.kill("safekeeper-3");
    let (_, states) = copies(&cluster);
    assert_eq!(states, ["ok", "ok", "unreachable", "damaged"]);
}

#[test]
fn lost_objects_are_not_replaced_by_an_empty_database() {
    let cluster = filled();
    let objects = cluster.dir().join("objects");
    let aside = cluster.dir().join("aside");
    std::fs::rename(&objects, &aside).unwrap();
    let text = refused_up(&cluster);
    assert!(text.contains(objects.to_str().unwrap()), "{text}");
    cluster.cli(&["down"]);
    // Nothing is in the way of whoever puts them back.
    assert!(!objects.exists(), "an empty store is in their place");
    std::fs::rename(&aside, &objects).unwrap();
    assert_eq!(sum(&cluster.up()), 500_500);
}

#[test]
fn a_dead_compute_follows_its_branch() {
    let cluster = Cluster::new();
    cluster.up();
    cluster.cli(&["branch", "create", "old"]);
    cluster.cli(&["compute", "start", "old"]);
    cluster.kill("compute-old");
    cluster.cli(&["branch", "rename", "old", "new"]);
    cluster.up();
    let computes = cluster.json(&["compute", "list"]);
    let rows = computes.as_array().unwrap();
    assert!(rows.iter().any(|row| row["branch"] == "new" && row["state"] == "running"));
    cluster.cli(&["compute", "stop", "new"]);
    cluster.cli(&["branch", "delete", "new"]);
    assert!(!cluster.dir().join("computes/new").exists(), "a deleted branch's copies are left");
    // The programs that computes run are no branch's.
    cluster.cli(&["branch", "create", "bin"]);
    drop(cluster.branch_client("bin"));
    cluster.cli(&["compute", "stop", "bin"]);
    cluster.cli(&["branch", "delete", "bin"]);
}

/// A file system of a few megabytes, unmounted when it goes out of scope.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where mounting is not allowed.
    fn mount(path: &Path, megabytes: u32) -> Option<SmallDisk> {
        std::fs::create_dir_all(path).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=755"), "pgstrata-test"])
            .arg(path)
            .stderr(Stdio::null())
            .status();
        let mounted = status.is_ok_and(|status| status.success());
        let disk = mounted.then(|| SmallDisk(path.to_owned()));
        if mounted {
            // Of whoever owns what it is in.
            let about = std::fs::metadata(path.parent().unwrap()).unwrap();
            std::os::unix::fs::chown(path, Some(about.uid()), Some(about.gid())).unwrap();
        }
        disk
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Fills what is left of a file system.
fn fill(disk: &SmallDisk) -> PathBuf {
    let path = disk.0.join("ballast");
    let mut file = std::fs::File::create(&path).unwrap();
    for size in [1 << 20, 1 << 12] {
        while std::io::Write::write_all(&mut file, &vec![0; size]).is_ok() {}
    }
    path
}

/// Runs `test` if file systems can be mounted here.
fn with_small_disk(path: &Path, megabytes: u32, test: impl FnOnce(&SmallDisk)) {
    match SmallDisk::mount(path, megabytes) {
        Some(disk) => test(&disk),
        None => eprintln!("NOT TESTED: mounting a file system needs root and its capabilities"),
    }
}

#[test]
fn a_safekeepers_full_disk_costs_that_safekeeper_alone() {
    let cluster = Cluster::new();
    let directory = cluster.dir().join("safekeeper-1");
    with_small_disk(&directory, 100, |disk| {
        let mut client = cluster.client();
        client.batch_execute("create table t as select 1 a").unwrap();
        let ballast = fill(disk);
        // More than a segment: this safekeeper can't follow, the others commit.
        client
            .batch_execute(
                "insert into t select g from generate_series(1, 600000) g; delete from t where a = 2",
            )
            .unwrap();
        let count = "select count(*) from t";
        assert_eq!(client.query_one(count, &[]).unwrap().get::<_, i64>(0), 600_000);
        // It is tried again, but not without end in its log.
        std::thread::sleep(std::time::Duration::from_secs(1));
        let log = std::fs::read_to_string(cluster.dir().join("logs/compute-main.log")).unwrap();
        assert!(log.contains("no space left"), "{log}");
        assert!(log.lines().count() < 20, "{log}");
        // Room again: it catches up, without having acknowledged what it did not have.
        std::fs::remove_file(ballast).unwrap();
        cluster.kill("safekeeper-2");
        client.batch_execute("insert into t values (0)").unwrap();
        cluster.kill("compute-main");
        let mut client = cluster.client();
        assert_eq!(client.query_one(count, &[]).unwrap().get::<_, i64>(0), 600_001);
        drop(client);
        cluster.cli(&["down"]);
    });
}

/// A disk that has no byte left is told of when that begins, and when it is over; not with each attempt.
#[test]
fn a_safekeeper_without_space_does_not_fill_its_log() {
    let cluster = Cluster::new();
    let directory = cluster.dir().join("safekeeper-1");
    let log = || -> Vec<String> {
        let text = std::fs::read_to_string(cluster.dir().join("logs/safekeeper-1.log")).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    with_small_disk(&directory, 100, |disk| {
        let mut client = cluster.client();
        client.batch_execute("create table t as select 1 a").unwrap();
        let before = log().len();
        let ballast = fill(disk);
        // A compute that starts wants its vote, and asks for it again and again.
        drop(client);
        cluster.kill("compute-main");
        let mut client = cluster.client();
        let since = std::time::Instant::now();
        while since.elapsed() < std::time::Duration::from_secs(10) {
            let insert = "insert into t select g from generate_series(1, 20000) g";
            client.batch_execute(insert).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let said = log().split_off(before);
        let is_of_space = |line: &&String| line.contains("space") || line.contains("written down");
        let said: Vec<&String> = said.iter().filter(is_of_space).collect();
        assert!((1..=2).contains(&said.len()), "{} lines: {said:#?}", said.len());
        assert!(said[0].contains("WAL is refused"), "{said:#?}");
        std::fs::remove_file(ballast).unwrap();
        let over = |line: &String| line.contains("no write is refused for want of space any more");
        wait_until("it says that there is space again", || log().iter().any(over));
        assert_eq!(log().iter().filter(|line| over(line)).count(), 1);
        drop(client);
        cluster.cli(&["down"]);
    });
}

/// What has no space left is named, where a safekeeper is replaced.
#[test]
fn a_full_object_store_is_named_where_a_safekeeper_is_replaced() {
    let cluster = Cluster::new();
    let objects = cluster.dir().join("objects");
    with_small_disk(&objects, 64, |disk| {
        cluster.client().batch_execute("create table t as select 1 a").unwrap();
        let ballast = fill(disk);
        let said = cluster.refusal(&["safekeeper", "replace", "2"], 1);
        assert!(said.contains("safekeeper 4 can't register in object storage"), "{said}");
        assert!(said.contains("No space left"), "{said}");
        std::fs::remove_file(ballast).unwrap();
        cluster.cli(&["safekeeper", "replace", "2"]);
        cluster.client().batch_execute("insert into t values (2)").unwrap();
        cluster.cli(&["down"]);
    });
}

#[test]
fn a_page_servers_full_disk_loses_nothing() {
    let server = S3Server::start();
    let cluster = server.cluster();
    let directory = cluster.dir().join("pageserver");
    with_small_disk(&directory, 24, |disk| {
        let mut client = cluster.client();
        client.batch_execute("create table t as select 1 a").unwrap();
        let ballast = fill(disk);
        client.batch_execute("insert into t select g from generate_series(1, 100000) g").unwrap();
        // Local copies can't be kept: layers are read from the object store.
        cluster.cli(&["compact"]);
        cluster.cli(&["branch", "create", "b"]);
        let count = "select count(*) from t";
        let mut branch = cluster.branch_client("b");
        assert_eq!(branch.query_one(count, &[]).unwrap().get::<_, i64>(0), 100_001);
        drop(branch);
        client.batch_execute("update t set a = 0").unwrap();
        let branches = cluster.json(&["branch", "list"]);
        assert!(branches[0]["failure"].is_null(), "{branches}");
        std::fs::remove_file(ballast).unwrap();
        cluster.kill("pageserver");
        cluster.kill("compute-main");
        let mut client = cluster.client();
        assert_eq!(client.query_one(count, &[]).unwrap().get::<_, i64>(0), 100_001);
        drop(client);
        cluster.cli(&["down"]);
    });
}

#[test]
fn a_computes_full_disk_is_an_error_of_that_statement() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    connect(&uri).batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["branch", "create", "b"]);
    let directory = cluster.data_directories().remove(0).with_file_name("");
    let directory = directory.parent().unwrap().join("b");
    with_small_disk(&directory, 60, |disk| {
        // Its directory is given to PostgreSQL's user when the compute starts.
        let mut client = cluster.branch_client("b");
        client.batch_execute("insert into t values (2)").unwrap();
        let ballast = fill(disk);
        let failed =
            client.batch_execute("insert into t select g from generate_series(1, 3000000) g");
        assert!(failed.is_err(), "a full disk held everything");
        drop(client);
        std::fs::remove_file(ballast).unwrap();
        cluster.up();
        let computes = cluster.json(&["compute", "list"]);
        let rows = computes.as_array().unwrap();
        let row = rows.iter().find(|row| row["branch"] == "b").unwrap();
        let mut client = connect(row["uri"].as_str().unwrap());
        let row = client.query_one("select count(*) from t", &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), 2, "what was acknowledged, and nothing else");
        drop(client);
        cluster.cli(&["down"]);
    });
}
