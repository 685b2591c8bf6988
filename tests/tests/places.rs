//! A cluster's directory that goes elsewhere, its primary branch, and its ports.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, connect, pg_bin, programs, running_as_root};
use serde_json::Value;

fn run_in(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(programs().join("pgstrata"));
    command.arg("--dir").arg(dir).args(arguments).output().unwrap()
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

/// Runs the command for the cluster in another directory than the harness's.
fn cli(dir: &Path, arguments: &[&str]) -> String {
    let output = run_in(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text_of(&output.stderr));
    text_of(&output.stdout)
}

fn refusal(dir: &Path, arguments: &[&str]) -> String {
    let output = run_in(dir, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text_of(&output.stdout));
    text_of(&output.stderr)
}

/// A directory whose cluster is stopped in the end.
struct Elsewhere(PathBuf);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        run_in(&self.0, &["down"]);
    }
}

fn beside(cluster: &Cluster, name: &str) -> Elsewhere {
    Elsewhere(cluster.dir().with_file_name(name))
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

fn count(uri: &str) -> i64 {
    connect(uri).query_one("select count(*) from t", &[]).unwrap().get(0)
}

fn edit_state(dir: &Path, edit: impl FnOnce(&mut Value)) {
    edit_file(&dir.join("cluster.json"), edit);
}

fn edit_file(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut state = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut state);
    std::fs::write(path, serde_json::to_vec(&state).unwrap()).unwrap();
}

/// As version 1 of the file had it.
fn make_old(dir: &Path) {
    edit_state(dir, |state| {
        let state = state.as_object_mut().unwrap();
        state.insert("version".into(), 1.into());
        state.insert("object_store".into(), dir.join("objects").display().to_string().into());
        for field in ["primary", "data_checksums", "home", "copy"] {
            state.remove(field);
        }
    });
    for claim in ["claim.json", "objects/claim"] {
        let _ = std::fs::remove_file(dir.join(claim));
    }
}

fn filled(options: &[&str]) -> Cluster {
    let cluster = Cluster::with(options, &[]);
    cluster.client().batch_execute("create table t as select 1 a").unwrap();
    cluster
}

#[test]
fn a_copy_is_a_cluster_of_its_own_and_a_move_is_the_same_one() {
    let cluster = filled(&[]);
    cluster.cli(&["down"]);
    let copied = beside(&cluster, "copied");
    copy(&cluster.dir(), &copied.0);
    let uri = cluster.up();
    // Nothing of the original is touched before the copy has places of its own.
    for arguments in [&["down"][..], &["status"], &["branch", "create", "x"]] {
        let text = refusal(&copied.0, arguments);
        assert!(text.contains("copy") && text.contains("pgstrata up"), "{text}");
    }
    let own = cli(&copied.0, &["up"]);
    assert_ne!(own, uri);
    connect(&own).batch_execute("insert into t select generate_series(1, 9)").unwrap();
    cli(&copied.0, &["down"]);
    assert_eq!(cli(&copied.0, &["up"]), own);
    assert_eq!((count(&uri), count(&own)), (1, 10));
    assert!(copied.0.join("objects").is_dir());

    // A moved one is refused while it runs, and goes on where it is afterwards.
    let moved = beside(&cluster, "moved");
    std::fs::rename(&copied.0, &moved.0).unwrap();
    assert!(refusal(&moved.0, &["up"]).contains("down"));
    cli(&moved.0, &["down"]);
    assert_eq!(cli(&moved.0, &["up"]), own);
    assert_eq!(count(&own), 10);
}

/// A copy has notes of its original's processes, and where the original was nothing is any more.
#[test]
fn a_copy_ends_nothing_of_an_original_that_was_moved_while_it_ran() {
    let cluster = filled(&[]);
    let mut client = cluster.client();
    let (copied, moved) = (beside(&cluster, "copied"), beside(&cluster, "moved"));
    copy(&cluster.dir(), &copied.0);
    std::fs::rename(cluster.dir(), &moved.0).unwrap();
    for arguments in [&["up"][..], &["down"], &["compute", "stop", "main"]] {
        let text = refusal(&copied.0, arguments);
        assert!(text.contains("is not the directory"), "{arguments:?}: {text}");
    }
    assert_eq!(client.query("select 1", &[]).unwrap().len(), 1);
    cli(&moved.0, &["down"]);
    assert_eq!(count(&cli(&moved.0, &["up"])), 1);
}

fn notes(dir: &Path) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(dir.join("run")).unwrap().map(|entry| entry.unwrap().path());
    let notes = entries.filter(|path| path.extension().is_some_and(|end| end == "pid"));
    notes.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// An earlier version did not remember where a cluster is, nor where its processes were noted.
#[test]
fn a_copy_of_a_running_cluster_of_an_earlier_version_touches_nothing_of_it() {
    let (cluster, store) = with_store_outside();
    let uri = cluster.up();
    edit_state(&cluster.dir(), |state| {
        state["version"] = 1.into();
        for field in ["home", "copy", "claim"] {
            state.as_object_mut().unwrap().remove(field);
        }
    });
    std::fs::remove_file(store.path().join("s/claim")).unwrap();
    for name in ["copied", "of-old-notes"] {
        if name == "of-old-notes" {
            for (path, note) in notes(&cluster.dir()) {
                let old: Vec<_> = note.split_ascii_whitespace().take(2).collect();
                std::fs::write(path, old.join(" ") + "\n").unwrap();
            }
        }
        let copied = beside(&cluster, name);
        copy(&cluster.dir(), &copied.0);
        for arguments in [&["up"][..], &["status"], &["down"], &["compute", "stop", "main"]] {
            let text = refusal(&copied.0, arguments);
            assert!(text.contains("is not the directory"), "{name}: {arguments:?}: {text}");
        }
        assert!(!store.path().join("s/claim").exists());
        assert_eq!(count(&uri), 1);
    }
    // The original knows its own, by old notes too.
    let own = notes(&cluster.dir());
    assert_eq!(cluster.up(), uri);
    assert_eq!(notes(&cluster.dir()), own);
    cluster.cli(&["down"]);
    for (_, note) in own {
        pgstrata_tests::wait_gone(note.split_once(' ').unwrap().0.parse().unwrap());
    }
}

#[test]
fn a_cluster_that_runs_where_it_is_not_seen_is_left_alone() {
    if !running_as_root() {
        return;
    }
    let cluster = filled(&[]);
    let uri = cluster.up();
    let state =
        || (notes(&cluster.dir()), std::fs::read(cluster.dir().join("cluster.json")).unwrap());
    let before = state();
    for arguments in [&["up"][..], &["compute", "start", "main"], &["branch", "list"]] {
        let output = Command::new("unshare")
            .args(["--pid", "--fork", "--mount-proc"])
            .arg(programs().join("pgstrata"))
            .arg("--dir")
            .arg(cluster.dir())
            .args(arguments)
            .output()
            .unwrap();
        let text = text_of(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("another container"), "{arguments:?}: {text}");
        assert_eq!(state(), before);
    }
    assert_eq!(count(&uri), 1);
    assert_eq!(cluster.up(), uri);
    cluster.cli(&["down"]);
    assert_eq!(count(&cluster.up()), 1);
}

#[test]
fn what_an_earlier_version_remembered_is_understood() {
    let cluster = filled(&[]);
    cluster.cli(&["branch", "create", "child"]);
    cluster.cli(&["down"]);
    make_old(&cluster.dir());
    cluster.up();
    cluster.cli(&["down"]);
    make_old(&cluster.dir());
    let copied = beside(&cluster, "copied");
    copy(&cluster.dir(), &copied.0);
    let own = cli(&copied.0, &["up"]);
    connect(&own).batch_execute("insert into t values (2)").unwrap();
    assert_eq!(count(&cluster.up()), 1);
    cli(&copied.0, &["down"]);
    make_old(&copied.0);
    let moved = beside(&cluster, "moved");
    std::fs::rename(&copied.0, &moved.0).unwrap();
    assert_eq!(count(&cli(&moved.0, &["up"])), 2);
    // It did not remember which branch is the primary one either.
    cluster.cli(&["compute", "stop", "main"]);
    cluster.cli(&["branch", "rename", "main", "prod"]);
    cluster.cli(&["down"]);
    make_old(&cluster.dir());
    assert_eq!(count(&cluster.up()), 1);
}

#[test]
fn a_copy_that_became_roots_says_how_to_give_it_back() {
    if !running_as_root() {
        return;
    }
    let cluster = filled(&[]);
    cluster.cli(&["down"]);
    let copied = beside(&cluster, "copied");
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        assert!(command.args(arguments).arg(&copied.0).status().unwrap().success());
    };
    run("cp", &["-r", cluster.dir().to_str().unwrap()]);
    let text = refusal(&copied.0, &["up"]);
    assert!(text.contains("chown -R USER"), "{text}");
    assert!(!copied.0.join("run").exists());
    run("chown", &["-R", "postgres"]);
    assert_eq!(count(&cli(&copied.0, &["up"])), 1);
}

/// A cluster whose objects are outside of its directory.
fn with_store_outside() -> (Cluster, tempfile::TempDir) {
    let store = tempfile::tempdir().unwrap();
    let place = store.path().join("s");
    let cluster = filled(&["--object-store", place.to_str().unwrap()]);
    (cluster, store)
}

fn rename(from: &Path, to: &Path) {
    std::fs::rename(from, to).unwrap();
}

#[test]
fn a_copy_that_shares_its_objects_is_refused() {
    let (cluster, store) = with_store_outside();
    let place = store.path().join("s");
    cluster.cli(&["down"]);
    let copied = beside(&cluster, "copied");
    copy(&cluster.dir(), &copied.0);
    for arguments in [&["up"][..], &["status"]] {
        let text = refusal(&copied.0, arguments);
        assert!(text.contains("copy") && text.contains(place.to_str().unwrap()), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    // Its original is gone: it was moved to another disk, or only put elsewhere on this one.
    let gone = beside(&cluster, "gone");
    rename(&cluster.dir(), &gone.0);
    let text = refusal(&copied.0, &["up"]);
    let (original, here) = (cluster.dir(), copied.0.display().to_string());
    assert!(text.contains(original.to_str().unwrap()) && text.contains(&here), "{text}");
    assert!(text.contains("--take-over") && text.contains("copy"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    // Nothing of it was started.
    assert!(!copied.0.join("run").read_dir().is_ok_and(|mut notes| notes.next().is_some()));
    assert_eq!(count(&cli(&copied.0, &["up", "--take-over"])), 1);
    cli(&copied.0, &["down"]);
    assert_eq!(count(&cli(&copied.0, &["up"])), 1);
    cli(&copied.0, &["down"]);

    let text = refusal(&gone.0, &["up"]);
    assert!(text.contains(&here) && text.contains("started after"), "{text}");
    // Nor is the store there for a cluster that is made anew.
    let fresh = beside(&cluster, "fresh");
    let text = refusal(&fresh.0, &["up", "--object-store", place.to_str().unwrap()]);
    assert!(text.contains(&here) && text.contains("another prefix"), "{text}");
    assert!(!fresh.0.join("cluster.json").exists());
}

#[test]
fn a_directory_keeps_its_object_store_where_it_is_renamed() {
    let (cluster, _store) = with_store_outside();
    cluster.cli(&["down"]);
    let moved = beside(&cluster, "moved");
    rename(&cluster.dir(), &moved.0);
    assert_eq!(count(&cli(&moved.0, &["up"])), 1);
    // What runs has the store already; a part of it that is started again gets it too.
    cli(&moved.0, &["up"]);
    let pid = std::fs::read_to_string(moved.0.join("run/pageserver.pid")).unwrap();
    let pid = pid.split_ascii_whitespace().next().unwrap().parse().unwrap();
    pgstrata_tests::signal(pid, rustix::process::Signal::KILL);
    pgstrata_tests::wait_gone(pid);
    assert_eq!(count(&cli(&moved.0, &["up"])), 1);
    // A start was killed after it had written its claim, before it remembered that; and one since, whose claim did not
    // get there.
    cli(&moved.0, &["down"]);
    edit_file(&moved.0.join("claim.json"), |tokens| {
        let token = std::mem::replace(&mut tokens["token"], "before".into());
        tokens["pending"] = vec![token, "after".into()].into();
    });
    let state = moved.0.join("cluster.json");
    let kept = std::fs::read(&state).unwrap();
    assert_eq!(count(&cli(&moved.0, &["up"])), 1);
    let text = refusal(&moved.0, &["up", "--take-over"]);
    assert!(text.contains("nothing runs") && text.contains("down"), "{text}");
    // An older copy of what says where the parts are is put back.
    cli(&moved.0, &["down"]);
    std::fs::write(state, kept).unwrap();
    assert_eq!(count(&cli(&moved.0, &["up"])), 1);
}

/// The disk of the objects is not mounted, and then it is.
#[test]
fn a_store_in_which_nothing_is_gets_no_claim() {
    let (cluster, store) = with_store_outside();
    cluster.cli(&["down"]);
    let (place, unmounted) = (store.path().join("s"), store.path().join("t"));
    rename(&place, &unmounted);
    std::fs::create_dir(&place).unwrap();
    let owner = std::fs::metadata(&unmounted).unwrap().uid();
    std::os::unix::fs::chown(&place, Some(owner), None).unwrap();
    let text = cluster.refusal(&["up"], 1);
    assert!(text.contains("is it mounted") && text.contains(place.to_str().unwrap()), "{text}");
    assert!(!place.join("claim").exists());
    std::fs::remove_dir_all(&place).unwrap();
    rename(&unmounted, &place);
    assert_eq!(count(&cluster.up()), 1);
    // The claim alone is lost: that may be another's, too.
    cluster.cli(&["down"]);
    std::fs::remove_file(place.join("claim")).unwrap();
    assert!(cluster.refusal(&["up"], 1).contains("--take-over"));
    cluster.cli(&["up", "--take-over"]);
    assert_eq!(count(&cluster.up()), 1);
}

/// A first start was killed before the cluster was written down, around the moment when its claim was.
#[test]
fn a_first_start_that_was_killed_is_taken_up_again() {
    for is_written in [true, false] {
        let cluster = Cluster::new();
        cluster.up();
        cluster.cli(&["down"]);
        let dir = cluster.dir();
        for entry in std::fs::read_dir(&dir).unwrap().flatten() {
            match entry.path() {
                path if path.ends_with("claim.json") || path.ends_with("objects") => {}
                path if path.is_dir() => std::fs::remove_dir_all(path).unwrap(),
                path => std::fs::remove_file(path).unwrap(),
            }
        }
        std::fs::remove_dir_all(dir.join("objects/tenants")).unwrap();
        edit_file(&dir.join("claim.json"), |tokens| {
            let token = tokens["token"].take();
            tokens["pending"] = vec![token].into();
        });
        if !is_written {
            std::fs::remove_file(dir.join("objects/claim")).unwrap();
        }
        cluster.client().batch_execute("create table t as select 1 a").unwrap();
    }
}

/// The names and numbers of its safekeepers are those of the original's, and where these were is written down.
#[test]
fn a_copy_takes_nothing_from_its_original() {
    let cluster = filled(&[]);
    cluster.cli(&["down"]);
    let copied = beside(&cluster, "copied");
    copy(&cluster.dir(), &copied.0);
    let own = cli(&copied.0, &["up"]);
    // What both write has the same length.
    let write = |uri: &str, letter: &str| {
        let statement = format!("create table u as select repeat('{letter}', 100) b; checkpoint");
        connect(uri).batch_execute(&statement).unwrap();
    };
    write(&own, "c");
    for name in ["safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "compute-main"] {
        kill(&copied.0, name);
    }
    let uri = cluster.up();
    write(&uri, "o");
    connect(&uri).batch_execute("insert into t select generate_series(1, 20000)").unwrap();
    // Time for safekeepers of which no compute knows yet to ask others.
    cli(&copied.0, &["compute", "stop", "main"]);
    let own = cli(&copied.0, &["up"]);
    std::thread::sleep(Duration::from_secs(3));
    for (uri, letter, rows) in [(&own, "c", 1), (&uri, "o", 20001)] {
        let found = connect(uri).query_one("select left(b, 1) from u", &[]).unwrap();
        assert_eq!(found.get::<_, &str>(0), letter);
        assert_eq!(count(uri), rows);
    }
}

fn kill(dir: &Path, name: &str) {
    let note = std::fs::read_to_string(dir.join(format!("run/{name}.pid"))).unwrap();
    let pid = note.split_whitespace().next().unwrap().parse().unwrap();
    pgstrata_tests::signal(pid, rustix::process::Signal::KILL);
    pgstrata_tests::wait_gone(pid);
}

fn up_on_a_port(dir: &Path) -> String {
    cli(dir, &["up", "--port", &pgstrata_tests::free_port().to_string()])
}

/// The copy is where the original was, and runs when the original starts where it is now.
#[test]
fn an_original_takes_nothing_from_a_copy_in_its_place() {
    let cluster = filled(&[]);
    cluster.cli(&["down"]);
    let moved = beside(&cluster, "moved");
    std::fs::rename(cluster.dir(), &moved.0).unwrap();
    copy(&moved.0, &cluster.dir());
    let own = cluster.up();
    connect(&own).batch_execute("insert into t select generate_series(1, 12000)").unwrap();
    let uri = up_on_a_port(&moved.0);
    // Time for services of which no compute knows yet to ask others.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((count(&uri), count(&own)), (1, 12001));
    connect(&uri).batch_execute("insert into t values (2)").unwrap();
    connect(&own).batch_execute("insert into t values (2)").unwrap();
    assert_eq!((count(&uri), count(&own)), (2, 12002));
}

/// Nothing says that it is a copy: its original was moved. Where a service of that is down, its port is free.
#[test]
fn a_copy_takes_no_place_of_a_service_that_is_down() {
    let cluster = filled(&[]);
    cluster.cli(&["down"]);
    let (copied, moved) = (beside(&cluster, "copied"), beside(&cluster, "moved"));
    copy(&cluster.dir(), &copied.0);
    std::fs::rename(cluster.dir(), &moved.0).unwrap();
    let uri = cli(&moved.0, &["up"]);
    let mut client = connect(&uri);
    client.batch_execute("insert into t select generate_series(1, 99)").unwrap();
    // Where the copy remembers its page server is the original's.
    cli(&moved.0, &["branch", "create", "b"]);
    for arguments in [&["branch", "delete", "b"][..], &["branch", "list"], &["compact"]] {
        let text = refusal(&copied.0, arguments);
        assert!(text.contains("the page server does not run: 'pgstrata up'"), "{text}");
    }
    assert!(cli(&moved.0, &["branch", "list"]).contains("\nb "));
    for name in ["safekeeper-2", "storage-broker"] {
        kill(&moved.0, name);
    }
    let own = up_on_a_port(&copied.0);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(count(&own), 1);
    // On the same connection: its compute goes on.
    client.batch_execute("insert into t values (2)").unwrap();
    assert_eq!(cli(&moved.0, &["up"]), uri);
    assert_eq!((count(&uri), count(&own)), (101, 1));
}

/// A snapshot of a disk is put back in its place, which looks as it did; what was committed since is in the store.
#[test]
fn an_earlier_state_of_a_directory_does_not_write_what_a_later_one_wrote() {
    let (cluster, _store) = with_store_outside();
    cluster.cli(&["down"]);
    let (earlier, later) = (beside(&cluster, "earlier"), beside(&cluster, "later"));
    copy(&cluster.dir(), &earlier.0);
    cluster.up();
    cluster.client().batch_execute("insert into t select generate_series(1, 9)").unwrap();
    cluster.cli(&["down"]);
    // With the other's inode and path it is that one in all but what is in it.
    let claim = |dir: &Path| std::fs::read(dir.join("claim.json")).unwrap();
    let (old, new) = (claim(&earlier.0), claim(&cluster.dir()));
    std::fs::write(cluster.dir().join("claim.json"), &old).unwrap();
    let text = cluster.refusal(&["up"], 1);
    assert!(text.contains("earlier state of it"), "{text}");
    std::fs::write(cluster.dir().join("claim.json"), &new).unwrap();

    rename(&cluster.dir(), &later.0);
    rename(&earlier.0, &cluster.dir());
    assert!(cluster.refusal(&["up"], 1).contains("earlier state of it"));
    // Its safekeepers lack what is in the store, whatever it is told: nothing is acknowledged on top of a gap.
    let text = cluster.refusal(&["up", "--take-over"], 1);
    assert!(text.contains("lost") || text.contains("another history"), "{text}");
    cluster.cli(&["down"]);
    rename(&cluster.dir(), &earlier.0);
    assert!(refusal(&later.0, &["up"]).contains("started after"));
    // Nor is what the two wrote put together, though what the later one had not uploaded is in its safekeepers.
    let text = refusal(&later.0, &["up", "--take-over"]);
    assert!(text.contains("another history"), "{text}");
    let at = text.split("--at ").nth(1).unwrap().split('\'').next().unwrap().to_owned();
    cli(&later.0, &["branch", "create", "saved", "--at", &at]);
    assert_eq!(count(&cli(&later.0, &["compute", "start", "saved"])), 10);
    cli(&later.0, &["down"]);
    let text = refusal(&later.0, &["up"]);
    assert!(text.contains("another history") && text.contains(&at), "{text}");
    connect(&uri_of(&later.0, "saved")).batch_execute("insert into t values (7)").unwrap();
}

/// Where a branch's compute is reached.
fn uri_of(dir: &Path, branch: &str) -> String {
    let rows: Value = serde_json::from_str(&cli(dir, &["compute", "list", "--json"])).unwrap();
    let row = rows.as_array().unwrap().iter().find(|row| row["branch"] == branch);
    row.unwrap()["uri"].as_str().unwrap().to_owned()
}

/// Two that run at once, because somebody said so: the one that lost the store leaves it alone, and says why.
#[test]
fn who_lost_the_object_store_while_running_writes_nothing_to_it() {
    let (cluster, store) = with_store_outside();
    let copied = beside(&cluster, "copied");
    copy(&cluster.dir(), &copied.0);
    let uri = cluster.up();
    let own = cli(&copied.0, &["up", "--take-over"]);
    let fill = |uri: &str, rows: &str| {
        let statement = format!("insert into t select generate_series(1, {rows})");
        connect(uri).batch_execute(&statement).unwrap();
        connect(uri).query_one("select pg_switch_wal()", &[]).unwrap();
        connect(uri).batch_execute("insert into t values (0)").unwrap();
    };
    fill(&uri, "10");
    fill(&own, "1000");
    // It goes on with its own safekeepers, and loses nothing that it acknowledged.
    let deadline = Instant::now() + Duration::from_secs(60);
    let text = loop {
        let output = run_in(&cluster.dir(), &["status"]);
        let text = text_of(&output.stdout) + &text_of(&output.stderr);
        if text.contains("belongs to the cluster in") {
            break text;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(text.contains(copied.0.to_str().unwrap()), "{text}");
    assert_eq!((count(&uri), count(&own)), (12, 1002));
    // All that is archived is the other's.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let output = run_in(&copied.0, &["wal", "verify"]);
        if output.status.success() && archived(store.path()) > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{}", text_of(&output.stderr));
        std::thread::sleep(Duration::from_millis(100));
    }
    cli(&copied.0, &["down"]);
    assert_eq!(count(&cli(&copied.0, &["up"])), 1002);
}

/// Segments in a store.
fn archived(store: &Path) -> usize {
    let mut found = 0;
    for entry in std::fs::read_dir(store).unwrap().flatten() {
        found += match entry.path() {
            path if path.is_dir() => archived(&path),
            path => usize::from(path.extension().is_some_and(|end| end == "zst")),
        };
    }
    found
}

#[test]
fn up_starts_the_primary_branch_under_any_name() {
    let cluster = filled(&[]);
    cluster.cli(&["compute", "stop", "main"]);
    let text = cluster.refusal(&["branch", "delete", "main"], 1);
    assert!(text.contains("last"), "{text}");
    cluster.cli(&["branch", "create", "restored"]);
    cluster.cli(&["branch", "rename", "main", "prod"]);
    let uri = cluster.up();
    let rows = cluster.json(&["compute", "list"]);
    assert_eq!((&rows[0]["branch"], &rows[0]["uri"]), (&"prod".into(), &uri.clone().into()));
    connect(&uri).batch_execute("insert into t values (2)").unwrap();
    // The branch that gets the usual name is the one.
    cluster.cli(&["branch", "rename", "restored", "main"]);
    assert_eq!(count(&cluster.up()), 1);
    cluster.cli(&["compute", "stop", "main"]);
    cluster.cli(&["branch", "delete", "main"]);
    assert_eq!(count(&cluster.up()), 2);
}

#[test]
fn up_says_what_an_existing_cluster_can_not_become() {
    let cluster = Cluster::new();
    let pg_bin = pg_bin();
    let up = ["up", "--pg-bin", pg_bin.to_str().unwrap()];
    let with = |more: &[&'static str]| [&up[..], more].concat();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    let text = cluster.refusal(&[&up[..], &["--port", &taken_port]].concat(), 1);
    assert!(text.contains(&taken_port), "{text}");
    let uri = cluster.up();
    assert!(!uri.contains(&taken_port), "{uri}");
    let text = cluster.refusal(&with(&["--safekeepers", "5"]), 1);
    assert!(text.contains("has 3 safekeepers"), "{text}");
    cluster.cli(&with(&["--safekeepers", "3"]));
    let text = cluster.refusal(&with(&["--data-checksums"]), 1);
    assert!(text.contains("made without"), "{text}");
    let port = pgstrata_tests::free_port().to_string();
    let text = cluster.refusal(&[&up[..], &["--port", &port]].concat(), 1);
    assert!(text.contains("compute stop main"), "{text}");
    cluster.cli(&["compute", "stop", "main"]);
    let uri = cluster.cli(&[&up[..], &["--port", &port]].concat());
    assert!(uri.contains(&port), "{uri}");
    assert_eq!(cluster.up(), uri);
    cluster.cli(&["down"]);
    assert_eq!(cluster.up(), uri);
}

#[test]
fn a_compute_keeps_its_port_whatever_became_of_it() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let start = || cluster.json(&["compute", "start", "main"])["uri"].as_str().unwrap().to_owned();
    for _ in 0..3 {
        cluster.kill("compute-main");
        assert_eq!(start(), uri);
    }
    // A start that fails forgets nothing.
    cluster.cli(&["compute", "stop", "main"]);
    cluster.kill("pageserver");
    cluster.refusal(&["compute", "start", "main"], 1);
    assert_eq!(cluster.up(), uri);
}

fn port_of(uri: &str) -> String {
    uri.rsplit_once(':').unwrap().1.split_once('/').unwrap().0.to_owned()
}

#[test]
fn no_compute_is_given_a_port_that_it_can_not_have() {
    let cluster = Cluster::new();
    let pg_bin = pg_bin();
    let up = |port: &str| {
        let arguments = ["up", "--pg-bin", pg_bin.to_str().unwrap(), "--port", port];
        cluster.refusal(&arguments, 1)
    };
    assert!(up("0").contains("leave out --port"));
    assert!(!cluster.dir().exists());
    let uri = cluster.up();
    assert!(up("0").contains("leave out --port"));
    cluster.cli(&["branch", "create", "other"]);
    let other = cluster.json(&["compute", "start", "other"])["uri"].as_str().unwrap().to_owned();
    cluster.cli(&["down"]);
    let state = std::fs::read(cluster.dir().join("cluster.json")).unwrap();
    let said: Value = serde_json::from_slice(&state).unwrap();
    let [broker, pages, wal] =
        [&said["broker"], &said["pageserver"][1], &said["safekeepers"][1]["wal"]];
    // Nothing listens on any of them now.
    for (port, holder) in [
        (&broker.to_string(), "storage-broker"),
        (&pages.to_string(), "pageserver"),
        (&wal.to_string(), "safekeeper-2"),
        (&port_of(&other), "branch 'other'"),
    ] {
        let text = up(port);
        assert!(text.contains(holder) && text.contains(port), "{text}");
    }
    let now = std::fs::read(cluster.dir().join("cluster.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&now).unwrap(), said);
    assert_eq!(cluster.up(), uri);
    cluster.cli(&["compute", "stop", "other"]);
    for port in ["0", &broker.to_string(), &port_of(&uri)] {
        cluster.refusal(&["compute", "start", "other", "--port", port], 1);
    }
    assert_eq!(cluster.json(&["compute", "start", "other"])["uri"], other.as_str());
}

#[test]
fn a_port_that_was_taken_meanwhile_stops_no_other_compute() {
    let cluster = filled(&[]);
    let uris = ["other", "third"].map(|branch| {
        cluster.cli(&["branch", "create", branch]);
        cluster.json(&["compute", "start", branch])["uri"].as_str().unwrap().to_owned()
    });
    let [other, third] = &uris;
    let main = cluster.up();
    let pg_bin = pg_bin();
    let up = ["up", "--pg-bin", pg_bin.to_str().unwrap()];
    let take = |uri: &str| TcpListener::bind(format!("127.0.0.1:{}", port_of(uri))).unwrap();
    cluster.cli(&["down"]);

    let taken = [take(&main), take(other)];
    let text = cluster.refusal(&up, 1);
    let other_port = pgstrata_tests::free_port().to_string();
    for part in [
        &port_of(&main),
        "'main'",
        "'pgstrata up --port N'",
        &port_of(other),
        "'other'",
        "'pgstrata compute start other --port N'",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(count(third), 1);
    // As often as it is tried, and each way out is one.
    cluster.refusal(&up, 1);
    let row = cluster.json(&["compute", "start", "other", "--port", &other_port]);
    assert_eq!(port_of(row["uri"].as_str().unwrap()), other_port);
    let port = pgstrata_tests::free_port().to_string();
    let moved = cluster.cli(&[&up[..], &["--port", &port]].concat());
    assert_eq!((port_of(&moved), count(&moved)), (port, 1));
    drop(taken);
    assert_eq!(cluster.up(), moved);
}
