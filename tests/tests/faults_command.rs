//! What was found wrong with the command once: the names of the tests are those of the faults.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, programs, running_as_root, signal, unprivileged};
use rustix::process::Signal;

#[test]
fn s1_nothing_that_postgresqls_user_makes_is_followed() {
    if !running_as_root() {
        // There is nobody less privileged then.
        return;
    }
    let cluster = Cluster::with(&["--run-as", "root"], &[]);
    cluster.up();
    let computes = cluster.dir().join("computes");
    let victim = tempfile::tempdir().unwrap();
    for name in ["evil", ".bin/evil"] {
        let link = computes.join(name);
        let arguments = ["-s", victim.path().to_str().unwrap(), link.to_str().unwrap()];
        let made = unprivileged("/usr/bin/ln".as_ref(), &arguments).output().unwrap();
        assert!(!made.status.success(), "{name} could be made");
    }
    // A link that is there all the same, from before the directory was ours.
    cluster.cli(&["branch", "create", "evil"]);
    std::os::unix::fs::symlink(victim.path(), computes.join("evil")).unwrap();
    let line = cluster.refusal(&["compute", "start", "evil"], 1);
    assert!(line.contains("link") && line.contains("remove it"), "{line}");
    assert_eq!(std::fs::metadata(victim.path()).unwrap().uid(), 0);
}

/// A name that is refused was once joined to a path, and what was there removed: with '..' the whole cluster.
#[test]
fn a_name_that_is_none_removes_nothing() {
    let cluster = Cluster::new();
    cluster.up();
    cluster.client().batch_execute("create table t as select 1 a").unwrap();
    for name in ["..", ".", "", "a/../..", ".bin"] {
        for command in [
            &["branch", "create", name][..],
            &["branch", "delete", name],
            &["branch", "rename", "main", name],
            &["compute", "start", name],
        ] {
            let line = cluster.refusal(command, 1);
            assert!(line.contains("branch"), "{command:?}: {line}");
        }
    }
    assert!(cluster.dir().join("computes/main/data/PG_VERSION").exists());
    cluster.client().batch_execute("table t; create table u as table t; checkpoint").unwrap();
    cluster.kill_everything();
    cluster.up();
    assert_eq!(cluster.client().query("table u", &[]).unwrap().len(), 1);
}

/// What no process of another user is to have, though root has it.
#[test]
fn s1_a_database_superuser_reaches_neither_roots_terminal_nor_its_secrets() {
    if !running_as_root() {
        return;
    }
    let secrets = [
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "of the store"),
        ("MY_TOKEN", "of root"),
    ];
    for options in [&[][..], &["--run-as", "root"]] {
        let cluster = Cluster::with(options, &secrets);
        cluster.up();
        let rows = cluster.status();
        for row in rows["processes"].as_array().unwrap() {
            let (name, pid) = (row["name"].as_str().unwrap(), &row["pid"]);
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            // Its session is its own, and has no terminal.
            assert_eq!(fields[3], pid.to_string(), "{name}: {stat}");
            assert_eq!(fields[4], "0", "{name}: {stat}");
            let groups = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let gid = groups.lines().find(|line| line.starts_with("Gid:")).unwrap();
            let gid = gid.split_whitespace().nth(1).unwrap();
            assert!(gid != "0" || !options.is_empty(), "{name}");
        }
        // What a superuser of the database can see of all processes, its own among them.
        let all = "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -a 'of root\\|of the store'";
        let seen =
            format!("create table seen (a text); copy seen from program $$ {all} || true $$");
        let mut client = cluster.client();
        client.batch_execute(&seen).unwrap();
        let rows = client.query("select a from seen", &[]).unwrap();
        let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(rows, [""; 0], "{options:?}");
    }
}

/// Asked for its version, what is named as PostgreSQL is run before anything is known of it.
#[test]
fn s1_what_is_asked_for_its_version_has_neither_the_terminal_nor_the_secrets() {
    let place = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(place.path(), 0o755);
    let said = place.path().join("said");
    std::fs::write(&said, "").unwrap();
    open(&said, 0o666);
    for name in ["postgres", "initdb"] {
        let program = place.path().join(name);
        let script = "#!/bin/sh\n{ cut -d' ' -f6 /proc/$$/stat; env; } >\"${0%/*}/said\"\n\
                      echo 'postgres (PostgreSQL) 99.1'\n";
        std::fs::write(&program, script).unwrap();
        open(&program, 0o755);
    }
    let mut command = Command::new(programs().join("pgstrata"));
    command.arg("--dir").arg(place.path().join("cluster")).args(["up", "--pg-bin"]);
    command.arg(place.path()).envs([("AWS_SECRET_ACCESS_KEY", "of the store")]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("PostgreSQL 99: only 15 to 18 work"), "{text}");
    let said = std::fs::read_to_string(said).unwrap();
    let own = std::fs::read_to_string("/proc/self/stat").unwrap();
    let own = own.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
    assert_ne!(said.lines().next().unwrap(), own, "it is in our session");
    assert!(!said.contains("of the store") && said.contains("PATH="), "{said}");
}

/// The directory is root's, but not what leads to it, or not all that is in it.
#[test]
fn s1_root_believes_nothing_where_others_write() {
    if !running_as_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let [theirs, sticky] = ["theirs", "sticky"].map(|name| place.path().join(name));
    for (directory, mode) in [(&theirs, 0o755), (&sticky, 0o1777)] {
        std::fs::create_dir(directory).unwrap();
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
    std::os::unix::fs::symlink(&sticky, theirs.join("link")).unwrap();
    std::fs::write(sticky.join("cluster.json"), "{}").unwrap();
    for directory in [theirs.join("link"), sticky, theirs.join("new")] {
        for arguments in [&["up"][..], &["status"], &["up", "--run-as", "root"]] {
            let mut command = Command::new(programs().join("pgstrata"));
            let output = command.arg("--dir").arg(&directory).args(arguments).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{directory:?}: {arguments:?}");
            let known = ["not safe for root", "others can write it", "no cluster"];
            assert!(known.iter().any(|known| text.contains(known)), "{text}");
        }
    }
    assert!(!theirs.join("new").exists());
}

/// A cluster of an earlier version may be there, and run.
#[test]
fn s1_a_cluster_of_roots_in_a_users_directory_can_be_given_away() {
    if !running_as_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let directory = place.path().join("cluster");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(programs().join("pgstrata"));
        let output = command.arg("--dir").arg(&directory).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let pg_bin = pgstrata_tests::pg_bin();
    let up = ["up", "--run-as", "root", "--pg-bin", pg_bin.to_str().unwrap()];
    assert!(command(&up).0);
    std::os::unix::fs::chown(place.path(), Some(65534), None).unwrap();
    let (refused, text) = command(&["down"]);
    let advised = text.contains("chown -R") && text.contains("run/*.pid");
    let notes = std::fs::read_dir(directory.join("run")).unwrap().flatten();
    for note in notes.filter(|note| note.path().extension().is_some_and(|end| end == "pid")) {
        let note = std::fs::read_to_string(note.path()).unwrap();
        let pid = note.split_whitespace().next().unwrap().parse().unwrap();
        signal(pid, Signal::TERM);
        pgstrata_tests::wait_gone(pid);
    }
    assert!(!refused && advised, "{text}");
    let given = Command::new("chown").args(["-R", "postgres"]).arg(&directory).status().unwrap();
    assert!(given.success());
    let (started, text) = command(&["up"]);
    let (ended, _) = command(&["down"]);
    assert!(started && ended, "{text}");
}

/// Where the objects are is looked at again at each start.
#[test]
fn s1_root_writes_no_objects_where_others_write() {
    if !running_as_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let store = place.path().join("objects");
    let cluster =
        Cluster::with(&["--run-as", "root", "--object-store", store.to_str().unwrap()], &[]);
    cluster.up();
    cluster.cli(&["down"]);
    std::fs::set_permissions(&store, std::fs::Permissions::from_mode(0o777)).unwrap();
    let line = cluster.refusal(&["up"], 1);
    assert!(line.contains("written by others") && line.contains("objects"), "{line}");
    std::fs::set_permissions(&store, std::fs::Permissions::from_mode(0o755)).unwrap();
    cluster.up();
}

/// The users of all processes of a cluster.
fn users(cluster: &Cluster) -> Vec<u32> {
    let status = cluster.status();
    let rows = status["processes"].as_array().unwrap();
    assert!(rows.len() >= 6, "{status}");
    let pids = rows.iter().map(|row| row["pid"].as_u64().unwrap());
    let mut users: Vec<_> =
        pids.map(|pid| std::fs::metadata(format!("/proc/{pid}")).unwrap().uid()).collect();
    users.sort_unstable();
    users.dedup();
    users
}

#[test]
fn s1_a_cluster_that_root_makes_runs_as_one_other_user() {
    if !running_as_root() {
        return;
    }
    let cluster = Cluster::new();
    cluster.up();
    let owner = std::fs::metadata(cluster.dir()).unwrap().uid();
    assert_ne!(owner, 0);
    assert_eq!(users(&cluster), [owner]);
    // Nor has what the command writes become root's.
    cluster.cli(&["branch", "create", "b"]);
    cluster.cli(&["compute", "start", "b"]);
    cluster.kill_everything();
    cluster.up();
    assert_eq!(users(&cluster), [owner]);
    let find = Command::new("find").arg(cluster.dir()).args(["-uid", "0"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&find.stdout), "");
    // What a superuser of the database puts in root's way is met by its own rights.
    let victim = tempfile::tempdir().unwrap();
    let (name, computes) = (victim.path().display(), cluster.dir().join("computes"));
    cluster.cli(&["branch", "create", "evil"]);
    let link = format!("ln -s {name} {}/evil", computes.display());
    cluster.client().batch_execute(&format!("copy (select 1) to program '{link}'")).unwrap();
    cluster.refusal(&["compute", "start", "evil"], 1);
    assert_eq!(std::fs::metadata(victim.path()).unwrap().uid(), 0);
}

/// As in a data directory of PostgreSQL: layers, WAL and logs are what is in tables.
#[test]
fn s1_what_a_cluster_holds_is_its_users_alone() {
    let pg_bin = pgstrata_tests::pg_bin();
    let all = [&[][..], &["--run-as", "root"]];
    for options in &all[..if running_as_root() { 2 } else { 1 }] {
        let cluster = Cluster::with(options, &[]);
        let (dir, store) = (cluster.dir(), cluster.dir().with_file_name("store"));
        let first = ["up", "--pg-bin", pg_bin.to_str().unwrap()];
        let with_store = ["--object-store", store.to_str().unwrap()];
        cluster.cli(&[&first[..], options, &with_store].concat());
        cluster.client().batch_execute("create table t as select 1 a").unwrap();
        cluster.cli(&["branch", "create", "b"]);
        // A compute is another user's where root stays root.
        assert_eq!(cluster.branch_client("b").query("table t", &[]).unwrap().len(), 1);
        cluster.cli(&["down"]);
        assert_eq!(cluster.restart().query("table t", &[]).unwrap().len(), 1);
        let is_roots = !options.is_empty();
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&dir), if is_roots { 0o711 } else { 0o700 }, "{options:?}");
        assert_eq!(mode(&store), 0o700, "{options:?}");
        let computes = dir.join("computes");
        let others = Command::new("find")
            .args([&dir, &store])
            .args(["-mindepth", "1", "-path"])
            .arg(&computes)
            .args(["-prune", "-o", "!", "-type", "l", "-perm", "/077", "-print"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&others.stdout), "", "{options:?}");
        assert!(std::fs::read_dir(&store).unwrap().count() > 0);
    }
}

#[test]
fn s1_where_that_user_can_not_get_root_says_that_it_stays_root() {
    if !running_as_root() {
        return;
    }
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let directory = closed.path().join("cluster");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(programs().join("pgstrata"));
        command.arg("--dir").arg(&directory).args(arguments).output().unwrap()
    };
    let pg_bin = pgstrata_tests::pg_bin();
    let output = command(&["up", "--pg-bin", pg_bin.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let ended = command(&["down"]);
    assert!(output.status.success(), "{text}");
    assert!(ended.status.success());
    assert!(text.contains("runs as root") && text.contains("can't get"), "{text}");
}

#[test]
fn programs_that_the_owner_can_not_read_are_copied() {
    if !running_as_root() {
        return;
    }
    let from = programs();
    let closed = tempfile::TempDir::with_prefix_in("closed-", &from).unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    for entry in std::fs::read_dir(&from).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            std::fs::hard_link(entry.path(), closed.path().join(entry.file_name())).unwrap();
        }
    }
    let open = tempfile::tempdir().unwrap();
    std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let directory = open.path().join("cluster");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(closed.path().join("pgstrata"));
        command.arg("--dir").arg(&directory).args(arguments).output().unwrap()
    };
    let pg_bin = pgstrata_tests::pg_bin();
    let output = command(&["up", "--pg-bin", pg_bin.to_str().unwrap()]);
    let owner = std::fs::metadata(&directory).map(|about| about.uid());
    let ended = command(&["down"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(ended.status.success());
    assert_ne!(owner.unwrap(), 0);
}

#[test]
fn s4_a_state_file_that_is_no_file_is_refused_at_once() {
    let cluster = Cluster::new();
    cluster.up();
    let path = cluster.dir().join("cluster.json");
    let kept = cluster.dir().join("cluster.json.kept");
    std::fs::rename(&path, &kept).unwrap();
    let fifo = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(fifo.success());
    let since = Instant::now();
    for arguments in [&["up"][..], &["status"], &["down"]] {
        let line = cluster.refusal(arguments, 1);
        assert!(line.contains("cluster.json") && line.contains("no regular file"), "{line}");
    }
    assert!(since.elapsed() < Duration::from_secs(10));
    std::fs::rename(&kept, &path).unwrap();
    cluster.up();
}

#[test]
fn h17_status_tells_what_hangs_and_does_not_hang_itself() {
    let cluster = Cluster::new();
    cluster.up();
    for number in 0..4 {
        cluster.cli(&["branch", "create", &format!("b{number}")]);
    }
    cluster.cli(&["compute", "start", "b0"]);
    for name in ["safekeeper-2", "compute-b0", "pageserver"] {
        let pid = cluster.pid(name);
        signal(pid, Signal::STOP);
        let since = Instant::now();
        let status = cluster.status();
        let text = cluster.cli(&["status"]);
        let took = since.elapsed();
        signal(pid, Signal::CONT);
        assert!(
            took < Duration::from_secs(8),
            "two calls of status took {took:?} while {name} hung"
        );
        assert!(text.contains("not answer") || text.contains("can't be asked"), "{name}: {text}");
        if name == "pageserver" {
            assert!(status["branches_failure"].is_string(), "{status}");
            continue;
        }
        let row = status["processes"].as_array().unwrap().iter().find(|row| row["name"] == name);
        let failure = row.unwrap()["failure"].to_string();
        assert!(failure.contains("does not answer"), "{name}: {failure}");
        assert_eq!(status["branches"].as_array().unwrap().len(), 5);
    }
}

#[test]
fn h16_one_process_has_a_directory() {
    let cluster = Cluster::new();
    cluster.up();
    let dir = cluster.dir();
    let objects = dir.join("objects");
    let start = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(programs().join(program));
        command.arg("--object-store").arg(&objects).args(arguments);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let any = "127.0.0.1:0";
    let pageserver = dir.join("pageserver");
    let listen = ["--listen-http", any, "--listen-pages", any, "--listen-pg", any];
    let text =
        start("pageserver", &[&["--dir", pageserver.to_str().unwrap()], &listen[..]].concat());
    assert!(text.contains("another page server is running in"), "{text}");
    let safekeeper = dir.join("safekeeper-1");
    let listen = ["--listen-http", any, "--listen-wal", any, "--listen-pg", any, "--id", "1"];
    let text =
        start("safekeeper", &[&["--dir", safekeeper.to_str().unwrap()], &listen[..]].concat());
    assert!(text.contains("another safekeeper is running in"), "{text}");
    // And the ones that were there serve.
    cluster.client().batch_execute("create table t as select 1").unwrap();
}

#[test]
fn l21_a_reset_that_is_killed_leaves_one_branch_of_the_name() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select 1 a").unwrap();
    drop(client);
    cluster.cli(&["branch", "create", "b"]);
    let branches = || {
        let rows = cluster.json(&["branch", "list"]);
        let rows = rows.as_array().unwrap().clone();
        let names: Vec<_> =
            rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect();
        let id = rows.iter().find(|row| row["name"] == "b").map(|row| row["timeline_id"].clone());
        (names, id)
    };
    let mut changed = 0;
    for round in 0..10u64 {
        let (_, before) = branches();
        let server = cluster.pid("pageserver");
        std::thread::scope(|scope| {
            scope.spawn(|| cluster.try_cli(&["branch", "reset", "b"]));
            std::thread::sleep(Duration::from_millis(5 + round * 8));
            signal(server, Signal::KILL);
        });
        pgstrata_tests::wait_gone(server);
        cluster.up();
        let (names, after) = branches();
        assert_eq!(names.iter().filter(|name| *name == "b").count(), 1, "round {round}: {names:?}");
        assert_eq!(names.len(), 2, "round {round}: {names:?}");
        changed += usize::from(before != after);
    }
    assert!(changed > 0, "no reset came through");
    let (_, before) = branches();
    cluster.cli(&["branch", "reset", "b"]);
    assert_ne!(branches().1, before);
    let mut client = cluster.branch_client("b");
    client.batch_execute("insert into t values (2)").unwrap();
}
