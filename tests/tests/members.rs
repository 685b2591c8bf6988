//! Safekeepers that are lost and replaced, under load, by the command: what a client was told is committed is there
//! afterwards.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use pgstrata_ids::Lsn;
use pgstrata_tests::health::Stopped;
use pgstrata_tests::{Cluster, connect, signal};
use rustix::process::Signal;
use serde_json::Value;

/// A client that commits numbers, one after the other, and remembers the last that it was told of.
struct Load {
    ends: Arc<AtomicBool>,
    last: Arc<AtomicI64>,
    thread: std::thread::JoinHandle<Duration>,
}

impl Load {
    fn start(uri: &str) -> Load {
        let (ends, last) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let mut client = connect(uri);
        client.batch_execute("create table told (a bigint primary key)").unwrap();
        let (until, told) = (Arc::clone(&ends), Arc::clone(&last));
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            for number in 1i64.. {
                let since = Instant::now();
                client.execute("insert into told values ($1)", &[&number]).unwrap();
                longest = longest.max(since.elapsed());
                told.store(number, Ordering::Release);
                if until.load(Ordering::Acquire) {
                    break;
                }
            }
            longest
        });
        Load { ends, last, thread }
    }

    /// Waits until it has committed some more.
    fn goes_on(&self) {
        let before = self.last.load(Ordering::Acquire);
        let since = Instant::now();
        while self.last.load(Ordering::Acquire) < before + 20 {
            assert!(since.elapsed() < Duration::from_secs(60), "no commits");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The last number that it was told of, and the longest commit.
    fn end(self) -> (i64, Duration) {
        self.ends.store(true, Ordering::Release);
        let longest = self.thread.join().unwrap();
        (self.last.load(Ordering::Acquire), longest)
    }
}

fn safekeepers(cluster: &Cluster) -> Vec<Value> {
    cluster.json(&["safekeeper", "list"]).as_array().unwrap().clone()
}

fn ids(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["id"].as_u64().unwrap()).collect()
}

fn quorum(cluster: &Cluster, branch: &str) -> Value {
    cluster.json(&["quorum", "show", "--branch", branch])
}

fn members(quorum: &Value) -> Vec<u64> {
    ids(quorum["members"].as_array().unwrap())
}

#[test]
fn a_safekeeper_is_lost_and_replaced_while_a_client_commits() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    cluster.cli(&["branch", "create", "idle"]);
    cluster.cli(&["compute", "start", "idle"]);
    cluster.cli(&["compute", "stop", "idle"]);
    let load = Load::start(&uri);
    load.goes_on();
    assert_eq!(members(&quorum(&cluster, "main")), [1, 2, 3]);
    assert_eq!(quorum(&cluster, "main")["safe_after_losing"].as_u64().unwrap().min(1), 1);
    // Its machine and its disk are gone.
    cluster.kill("safekeeper-2");
    std::fs::remove_dir_all(cluster.dir().join("safekeeper-2")).unwrap();
    load.goes_on();
    let rows = safekeepers(&cluster);
    let second = rows.iter().find(|row| row["id"] == 2).unwrap();
    assert_eq!(second["state"], "gone");
    let said = cluster.cli(&["safekeeper", "replace", "2"]);
    assert!(said.contains("safekeeper 4 is in the place of 2; 2 branches changed"), "{said}");
    for branch in ["main", "idle"] {
        let shown = quorum(&cluster, branch);
        assert_eq!((members(&shown), shown["joint"].as_bool()), (vec![1, 3, 4], Some(false)));
    }
    load.goes_on();
    // The one that came last is one of the two that are left.
    cluster.kill("safekeeper-1");
    load.goes_on();
    cluster.up();
    assert_eq!(cluster.json(&["safekeeper", "add"])["id"], 5);
    cluster.cli(&["safekeeper", "remove", "1"]);
    assert_eq!(members(&quorum(&cluster, "main")), [3, 4, 5]);
    load.goes_on();
    assert_eq!(ids(&safekeepers(&cluster)), [3, 4, 5]);
    let (told, longest) = load.end();
    println!("{told} commits, longest {longest:?}");
    // Everything ends and starts again: what the client was told is there.
    for process in ["safekeeper-3", "safekeeper-4", "safekeeper-5", "compute-main"] {
        cluster.kill(process);
    }
    let mut client = cluster.client();
    let found: i64 = client.query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
    let error = cluster.refusal(&["safekeeper", "replace", "1"], 1);
    assert!(error.contains("there is no safekeeper 1"), "{error}");
    cluster.cli(&["compute", "start", "idle"]);
}

/// The command is killed anywhere, and given again.
#[test]
fn a_replacement_that_is_killed_goes_on() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    for number in 0..4 {
        let name = format!("b{number}");
        cluster.cli(&["branch", "create", &name]);
        cluster.cli(&["compute", "start", &name]);
        cluster.cli(&["compute", "stop", &name]);
    }
    let load = Load::start(&uri);
    let mut interrupted = 0;
    for round in 0..5u64 {
        let before = members(&quorum(&cluster, "main"));
        let goes = before[0].to_string();
        for after in [5, 60, 150, 400, 900] {
            let mut command = cluster.command(&["safekeeper", "replace", &goes]);
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_millis(after + 37 * round));
            let _ = child.kill();
            interrupted += u32::from(!child.wait().unwrap().success());
        }
        // It may have come to its end: then there is none of that id any more.
        let output = cluster.try_cli(&["safekeeper", "replace", &goes]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || said.contains("there is no safekeeper"), "{said}");
        load.goes_on();
        let after = ids(&safekeepers(&cluster));
        assert_eq!(after.len(), 3, "{after:?}");
        assert!(!after.contains(&before[0]), "{after:?}");
        for branch in ["main", "b0", "b1", "b2", "b3"] {
            let shown = quorum(&cluster, branch);
            let mut has = members(&shown);
            has.sort_unstable();
            assert_eq!((has, shown["joint"].as_bool()), (after.clone(), Some(false)), "{branch}");
        }
    }
    assert!(interrupted >= 10, "{interrupted} were killed before they ended");
    // One that goes on running keeps nothing.
    cluster.cli(&["safekeeper", "add"]);
    let all = ids(&safekeepers(&cluster));
    cluster.cli(&["safekeeper", "remove", &all[0].to_string()]);
    let line = cluster.refusal(&["safekeeper", "drain", &all[1].to_string()], 1);
    assert!(line.contains("no other safekeeper that could take"), "{line}");
    let (told, longest) = load.end();
    println!("{told} commits, longest {longest:?}, {interrupted} commands killed");
    let mut client = connect(&uri);
    let found: i64 = client.query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
}

/// What a replacement waits for is started by the command that starts everything, which waits for nobody.
#[test]
fn a_safekeeper_that_a_replacement_waits_for_is_started_meanwhile() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    cluster.kill("safekeeper-3");
    cluster.kill("safekeeper-2");
    std::fs::remove_dir_all(cluster.dir().join("safekeeper-2")).unwrap();
    let mut replace = begin_replacing(&cluster, "2");
    let since = Instant::now();
    while !ids(&safekeepers(&cluster)).contains(&4) {
        assert!(since.elapsed() < Duration::from_secs(60), "none was started");
        std::thread::sleep(Duration::from_millis(20));
    }
    // It may say that the second has lost its directory.
    cluster.try_cli(&["up"]);
    load.goes_on();
    assert!(replace.try_wait().unwrap().is_none_or(|status| status.success()));
    assert!(replace.wait().unwrap().success());
    let shown = quorum(&cluster, "main");
    assert_eq!((members(&shown), shown["joint"].as_bool()), (vec![1, 3, 4], Some(false)));
    load.end();
}

/// The command, under way.
fn begin_replacing(cluster: &Cluster, id: &str) -> std::process::Child {
    let mut replace = cluster.command(&["safekeeper", "replace", id]);
    replace.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    replace.spawn().unwrap()
}

/// Whether the cluster's file has such a safekeeper.
fn is_written_down(cluster: &Cluster, is_it: impl Fn(&Value) -> bool) -> bool {
    let state = std::fs::read(cluster.dir().join("cluster.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    state["safekeepers"].as_array().unwrap().iter().any(is_it)
}

/// Waits until a newcomer is ready, and whoever has begun with it has written that down.
fn wait_until_begun(cluster: &Cluster, id: u64) {
    let since = Instant::now();
    while !is_written_down(cluster, |place| place["id"] == id && place["started"] == true) {
        assert!(since.elapsed() < Duration::from_secs(60), "none was started");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A branch that is made while a safekeeper is being replaced is founded with that one as well: it is replaced there, too, before it is
/// stopped.
#[test]
fn a_branch_that_is_made_meanwhile_is_changed_too() {
    let cluster = Cluster::new();
    connect(&cluster.up()).batch_execute("create table t as select 1 a").unwrap();
    let mut replace = begin_replacing(&cluster, "2");
    wait_until_begun(&cluster, 4);
    // It waits for this one from now on.
    let newcomer = Stopped::stop(cluster.pid("safekeeper-4"));
    std::thread::sleep(Duration::from_secs(2));
    cluster.cli(&["branch", "create", "other", "--from", "main"]);
    let mut other = cluster.branch_client("other");
    other.batch_execute("create table u as select 2 a").unwrap();
    assert!(members(&quorum(&cluster, "other")).contains(&2));
    assert!(replace.try_wait().unwrap().is_none(), "it did not wait");
    drop(newcomer);
    assert!(replace.wait().unwrap().success());
    for branch in ["main", "other"] {
        let shown = quorum(&cluster, branch);
        assert_eq!((members(&shown), shown["joint"].as_bool()), (vec![1, 3, 4], Some(false)));
    }
    other.batch_execute("insert into u values (3)").unwrap();
}

/// The only copy of a branch is with one that does not answer: nobody else could be made to have it.
#[test]
fn the_only_copy_of_a_branch_is_not_given_up() {
    let cluster = Cluster::with(&["--safekeepers", "1"], &[]);
    connect(&cluster.up()).batch_execute("create table t as select 1 a").unwrap();
    cluster.kill("safekeeper-1");
    for command in [&["safekeeper", "replace", "1"][..], &["safekeeper", "remove", "1"]] {
        let output = cluster.try_cli(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{command:?}: {said}");
        let refused = said.contains("could leave it without its only copy")
            || said.contains("no safekeeper answers");
        assert!(refused, "{command:?}: {said}");
    }
    assert!(cluster.dir().join("safekeeper-1").exists());
    // What was begun is there, and its place is taken once the other one is back.
    let state = std::fs::read_to_string(cluster.dir().join("cluster.json")).unwrap();
    assert!(state.contains("\"id\": 1,"), "{state}");
}

/// Two of three are gone for good, at a moment when nobody writes: who is left goes on when told to.
#[test]
fn who_is_left_goes_on_when_told_to() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    let (told, _) = load.end();
    let refused = |arguments: &[&str], what: &str| {
        let said = cluster.refusal(arguments, 1);
        assert!(said.contains(what), "{said}");
        said
    };
    refused(&["quorum", "recover"], "nothing needs to be given up");
    refused(&["quorum", "recover", "--accept-loss"], "nothing needs to be given up");
    let since = Instant::now();
    while safekeepers(&cluster).iter().any(|row| row["behind_bytes"] != 0) {
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", safekeepers(&cluster));
        std::thread::sleep(Duration::from_millis(100));
    }
    for lost in [2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
    }
    std::fs::remove_dir_all(cluster.dir().join("safekeeper-2")).unwrap();
    let away = cluster.dir().join("safekeeper-3");
    let said = refused(&["quorum", "recover"], "only safekeepers 2, 3 had");
    assert!(said.contains("all before it are with 1") && said.contains("--accept-loss"), "{said}");
    assert_eq!(quorum(&cluster, "main")["number"], 1);
    let said = cluster.cli(&["quorum", "recover", "--accept-loss"]);
    assert!(said.contains("commits after") && said.contains("goes on with 1 alone"), "{said}");
    assert_eq!(members(&quorum(&cluster, "main")), [1]);
    // The compute goes on, and what it was told is there.
    let mut client = connect(&uri);
    let count = |client: &mut postgres::Client| -> i64 {
        client.query_one("select count(*) from told", &[]).unwrap().get(0)
    };
    assert_eq!(count(&mut client), told);
    client.execute("insert into told values (0)", &[]).unwrap();
    // One that comes back after all is not listened to, and keeps what it has.
    let names = |dir: &std::path::Path| -> Vec<String> {
        let found = std::fs::read_dir(dir).unwrap();
        found.map(|one| one.unwrap().file_name().into_string().unwrap()).collect()
    };
    let before = names(&away);
    cluster.cli(&["safekeeper", "remove", "2"]);
    cluster.up();
    let since = Instant::now();
    let of_third = || safekeepers(&cluster).into_iter().find(|row| row["id"] == 3).unwrap();
    while of_third()["state"] == "gone" {
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", of_third());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(members(&quorum(&cluster, "main")), [1]);
    cluster.cli(&["safekeeper", "add"]);
    cluster.cli(&["safekeeper", "add"]);
    cluster.cli(&["safekeeper", "remove", "3"]);
    assert_eq!(members(&quorum(&cluster, "main")), [1, 4, 5]);
    assert!(before.iter().all(|name| names(&away).contains(name)));
    cluster.kill("safekeeper-1");
    client.execute("insert into told values (-1)", &[]).unwrap();
    assert_eq!(count(&mut client), told + 2);
}

/// It has one copy then, and gets others by the command that puts others in the place of those who are lost.
#[test]
fn a_branch_that_went_on_alone_gets_others_by_replacing_the_lost_ones() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    for lost in [2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{lost}"))).unwrap();
    }
    cluster.cli(&["quorum", "recover", "--accept-loss"]);
    load.goes_on();
    assert_eq!(members(&quorum(&cluster, "main")), [1]);
    cluster.cli(&["safekeeper", "replace", "2"]);
    assert_eq!(members(&quorum(&cluster, "main")), [1, 4]);
    cluster.cli(&["safekeeper", "replace", "3"]);
    assert_eq!(members(&quorum(&cluster, "main")), [1, 4, 5]);
    load.goes_on();
    cluster.kill("safekeeper-1");
    load.goes_on();
    let (told, _) = load.end();
    let found: i64 = connect(&uri).query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
}

/// A safekeeper that was down when others went on without it has not heard of that: its directory may have the only copy of what
/// was given up, and is said to be kept. One whose timelines went on with all that it has is of no use.
#[test]
fn the_directory_of_who_was_given_up_and_has_not_heard_of_it_is_to_be_kept() {
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    let replace = |id: &str| {
        let output = cluster.try_cli(&["safekeeper", "replace", id]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    cluster.kill("safekeeper-3");
    let said = replace("3");
    assert!(said.contains("safekeeper-3 is of no further use"), "{said}");
    load.goes_on();
    for lost in [2, 4] {
        cluster.kill(&format!("safekeeper-{lost}"));
    }
    cluster.cli(&["quorum", "recover", "--accept-loss"]);
    load.goes_on();
    let said = replace("2");
    assert!(said.contains("safekeeper-2 may have commits that were given up"), "{said}");
    assert_eq!(members(&quorum(&cluster, "main")), [1, 5]);
    let said = replace("4");
    assert!(said.contains("safekeeper-4 may have commits that were given up"), "{said}");
    load.goes_on();
    load.end();
}

/// Nothing can be changed where most members are lost: that is said at once, of each branch by its name, with what to do; and what is
/// said after that is little, however long it waits.
#[test]
fn replacing_where_a_majority_is_lost_says_at_once_what_to_do() {
    let cluster = Cluster::new();
    connect(&cluster.up()).batch_execute("create table t as select 1 a").unwrap();
    for lost in [2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{lost}"))).unwrap();
    }
    let mut command = cluster.command(&["safekeeper", "replace", "2"]);
    let mut replace = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(25));
    assert!(replace.try_wait().unwrap().is_none(), "it waits for them");
    replace.kill().unwrap();
    let said = replace.wait_with_output().unwrap().stderr;
    let said = String::from_utf8(said).unwrap();
    let of_main: Vec<&str> = said.lines().filter(|line| line.contains("no majority")).collect();
    let first = of_main.first().expect(&said);
    assert!(
        first.contains("branch 'main': no majority of the members (1, 2, 3) answers"),
        "{said}"
    );
    assert!(first.contains("'pgstrata quorum recover --branch main --accept-loss'"), "{said}");
    assert!(first.contains("Bring them back"), "{said}");
    assert!(!said.contains("timeline "), "{said}");
    // Who is silent, what to do, and how far it is after five and fifteen seconds.
    assert!(said.lines().count() <= 4, "{said}");
    cluster.cli(&["quorum", "recover", "--branch", "main", "--accept-loss"]);
    cluster.cli(&["safekeeper", "replace", "2"]);
    assert_eq!(members(&quorum(&cluster, "main")), [1, 4]);
}

/// A branch that goes on alone is well, and a new one is begun by a majority of all: where too few answer it is said what to do, by
/// the compute that does not start, and before that.
#[test]
fn a_new_branch_that_too_few_can_begin_says_what_to_do() {
    let cluster = Cluster::new();
    let mut client = connect(&cluster.up());
    client.batch_execute("create table t as select 1 a").unwrap();
    cluster.cli(&["branch", "create", "new"]);
    for lost in [2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
    }
    cluster.cli(&["quorum", "recover", "--accept-loss"]);
    client.batch_execute("insert into t values (2)").unwrap();
    let replace = "'pgstrata safekeeper replace 2', 'pgstrata safekeeper replace 3'";
    let status = cluster.status();
    let warnings = status["warnings"].as_array().unwrap();
    let of_new =
        warnings.iter().filter_map(Value::as_str).find(|one| one.starts_with("branch new: "));
    let of_new = of_new.unwrap_or_else(|| panic!("{status}"));
    assert!(
        of_new.contains("safekeeper 2 does not answer") && of_new.contains(replace),
        "{of_new}"
    );
    // The branch that goes on is in no danger by those who are none of its members.
    let report = cluster.try_cli(&["doctor", "--json"]).stdout;
    let report: Value = serde_json::from_slice(&report).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let counted: Vec<_> = findings
        .iter()
        .filter(|one| one["text"].as_str().unwrap().contains("safekeepers are well"))
        .map(|one| (one["object"].as_str().unwrap(), one["severity"].as_str().unwrap()))
        .collect();
    assert_eq!(counted, [("branch main", "ok")], "{report}");
    let said = cluster.refusal(&["compute", "start", "new"], 1);
    assert!(said.contains("no quorum of safekeepers") && said.contains(replace), "{said}");
    assert!(said.contains("start those that do not answer (2, 3)"), "{said}");
    cluster.cli(&["safekeeper", "replace", "2"]);
    let mut client = cluster.branch_client("new");
    let found: i64 = client.query_one("select count(*) from t", &[]).unwrap().get(0);
    assert_eq!(found, 1);
    assert!(!cluster.status()["warnings"].to_string().contains("branch new: no compute"));
}

/// All have gone silent when the old one is to be stopped: whether it keeps anything is not known.
#[test]
fn a_safekeeper_is_not_forgotten_where_nobody_says_that_it_keeps_nothing() {
    let cluster = Cluster::new();
    connect(&cluster.up()).batch_execute("create table t as select 1 a").unwrap();
    let mut replace = begin_replacing(&cluster, "1");
    let since = Instant::now();
    wait_until_begun(&cluster, 4);
    let newcomer = Stopped::stop(cluster.pid("safekeeper-4"));
    let lock = std::fs::File::options().write(true).open(cluster.dir().join("lock")).unwrap();
    lock.lock().unwrap();
    drop(newcomer);
    let is_changed = || {
        let shown = quorum(&cluster, "main");
        members(&shown) == [2, 3, 4] && shown["joint"] == false
    };
    while !is_changed() {
        assert!(since.elapsed() < Duration::from_secs(60), "it is not changed");
        std::thread::sleep(Duration::from_millis(50));
    }
    for id in [2, 3, 4] {
        cluster.kill(&format!("safekeeper-{id}"));
    }
    drop(lock);
    assert!(!replace.wait().unwrap().success());
    let state = std::fs::read_to_string(cluster.dir().join("cluster.json")).unwrap();
    assert!(state.contains("\"id\": 1,"), "{state}");
    cluster.up();
    cluster.cli(&["safekeeper", "replace", "1"]);
    assert_eq!(members(&quorum(&cluster, "main")), [2, 3, 4]);
}

/// Every safekeeper's disk is gone, and the page server has more than object storage: a branch of what it has goes on.
#[test]
fn what_the_page_server_has_goes_on_though_every_safekeeper_is_lost() {
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    let (told, _) = load.end();
    let text: String =
        cluster.client().query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0);
    let end: Lsn = text.parse().unwrap();
    let since = Instant::now();
    let has = || cluster.json(&["branch", "list"])[0]["last_record_lsn"].as_str().unwrap().parse();
    while has().is_ok_and(|lsn: Lsn| lsn < end) {
        assert!(since.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.kill("compute-main");
    for lost in [1, 2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{lost}"))).unwrap();
    }
    for _ in 0..2 {
        let said = cluster.refusal(&["quorum", "recover", "--accept-loss"], 1);
        assert!(said.contains("branch create") && said.contains("4, 5, 6 were started"), "{said}");
    }
    cluster.cli(&["branch", "create", "saved"]);
    let mut saved = cluster.branch_client("saved");
    let found: i64 = saved.query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
    saved.batch_execute("insert into told values (0)").unwrap();
    assert_eq!(members(&quorum(&cluster, "saved")), [4, 5, 6]);
    for lost in ["1", "2", "3"] {
        cluster.cli(&["safekeeper", "remove", lost]);
    }
    assert_eq!(ids(&safekeepers(&cluster)), [4, 5, 6]);
}

/// Every safekeeper's disk is gone, when nobody had written for a while.
#[test]
fn a_branch_goes_on_though_every_safekeeper_is_lost() {
    // A minute passes until what nobody writes to is archived.
    if !pgstrata_tests::thorough() {
        return;
    }
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    let (told, _) = load.end();
    cluster.cli(&["compute", "stop", "main"]);
    let end = || cluster.json(&["branch", "list"])[0]["commit_lsn"].as_str().unwrap().to_owned();
    let verified = || cluster.json(&["wal", "verify", "--all", "--branch", "main"]);
    let since = Instant::now();
    let is_archived = |row: &Value| row["copy"] == "archive" && row["ok_to"] == end();
    while !verified().as_array().unwrap().iter().any(is_archived) {
        assert!(since.elapsed() < Duration::from_secs(120), "{}", verified());
        std::thread::sleep(Duration::from_secs(1));
    }
    for lost in [1, 2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{lost}"))).unwrap();
    }
    let said = cluster.refusal(&["quorum", "recover"], 1);
    assert!(said.contains("--accept-loss starts others"), "{said}");
    let said = cluster.cli(&["quorum", "recover", "--accept-loss"]);
    assert!(said.contains("commits after") && said.contains("goes on with others"), "{said}");
    assert_eq!(members(&quorum(&cluster, "main")), [4, 5, 6]);
    for lost in ["1", "2", "3"] {
        cluster.cli(&["safekeeper", "remove", lost]);
    }
    let mut client = connect(&cluster.up());
    let count = |client: &mut postgres::Client| -> i64 {
        client.query_one("select count(*) from told", &[]).unwrap().get(0)
    };
    assert_eq!(count(&mut client), told);
    client.execute("insert into told values (0)", &[]).unwrap();
    assert_eq!(count(&mut client), told + 1);
}

/// The page server has more than who is left: to go on there would lose what it has.
#[test]
fn who_is_left_does_not_go_on_before_the_pages() {
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    let first = cluster.pid("safekeeper-1");
    signal(first, Signal::STOP);
    for _ in 0..5 {
        load.goes_on();
    }
    let (told, _) = load.end();
    let mut client = cluster.client();
    let text: String =
        client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0);
    let end: Lsn = text.parse().unwrap();
    let since = Instant::now();
    loop {
        let row = cluster.json(&["branch", "list"])[0].clone();
        if row["last_record_lsn"].as_str().unwrap().parse::<Lsn>().unwrap() >= end {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{row}");
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.kill("compute-main");
    for lost in [2, 3] {
        cluster.kill(&format!("safekeeper-{lost}"));
    }
    signal(first, Signal::CONT);
    let said = cluster.refusal(&["quorum", "recover", "--accept-loss"], 1);
    assert!(said.contains("the page server has branch 'main' up to"), "{said}");
    // They were not gone for good.
    let found: i64 =
        connect(&cluster.up()).query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
}

/// What each of the commands that look at a cluster says of branches that are short of members.
fn told_of_main(cluster: &Cluster) -> Option<String> {
    let shown = quorum(cluster, "main")["warning"].as_str().map(str::to_owned);
    let status = cluster.status();
    let mut warnings =
        status["warnings"].as_array().unwrap().iter().map(|one| one.as_str().unwrap());
    let warned = warnings.find(|warning| warning.starts_with("branch main: ")).map(str::to_owned);
    assert_eq!(warned, shown, "{status}");
    let output = cluster.try_cli(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.success(), report["danger"] == 0);
    let findings = report["findings"].as_array().unwrap().iter();
    let mut found = findings.filter(|one| one["check"] == "members");
    let one = found.next().unwrap();
    let severity = if shown.is_some() { "warning" } else { "ok" };
    assert_eq!(one["severity"], severity, "{report}");
    let text = format!("branch main: {}", one["text"].as_str().unwrap());
    assert!(shown.is_none() || Some(&text) == shown.as_ref(), "{report}");
    shown
}

/// Commands that a line says are to be run.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let quoted = line.split('\'').filter_map(|part| part.strip_prefix("pgstrata "));
    quoted.map(|command| command.split(' ').collect()).collect()
}

/// It is said of which branch, who its members are, and what to run; and once that was run nothing is said.
#[test]
fn a_branch_that_is_short_of_members_is_told_of() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    assert_eq!(told_of_main(&cluster), None);
    let lose = |id: u64| {
        cluster.kill(&format!("safekeeper-{id}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{id}"))).unwrap();
    };
    lose(2);
    let told = told_of_main(&cluster).unwrap();
    let expected = "branch main: of its members (1, 2, 3), safekeeper 2 has lost its directory: run 'pgstrata safekeeper \
                    replace 2'";
    assert_eq!(told, expected);
    lose(3);
    cluster.cli(&["quorum", "recover", "--accept-loss"]);
    let told = told_of_main(&cluster).unwrap();
    assert!(
        told.starts_with("branch main: safekeeper 1 alone keeps it, of 3 that there are: "),
        "{told}"
    );
    for command in commands(&told) {
        cluster.cli(&command);
    }
    assert_eq!(members(&quorum(&cluster, "main")), [1, 4, 5]);
    assert_eq!(told_of_main(&cluster), None);
    // The command is killed while both groups decide, of whom a compute has to hear.
    let compute = Stopped::stop(cluster.pid("compute-main"));
    let mut replace = begin_replacing(&cluster, "4");
    let since = Instant::now();
    while quorum(&cluster, "main")["joint"] == false {
        assert!(since.elapsed() < Duration::from_secs(60), "it does not begin");
        std::thread::sleep(Duration::from_millis(50));
    }
    replace.kill().unwrap();
    replace.wait().unwrap();
    let told = told_of_main(&cluster).unwrap();
    assert!(told.contains("being changed from safekeepers 1, 4, 5 to 1, 5, 6"), "{told}");
    drop(compute);
    for command in commands(&told) {
        cluster.cli(&command);
    }
    assert_eq!(members(&quorum(&cluster, "main")), [1, 5, 6]);
    assert_eq!(told_of_main(&cluster), None);
    load.goes_on();
    let (told, _) = load.end();
    let found: i64 = connect(&uri).query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
}

fn state_of(cluster: &Cluster, id: u64) -> String {
    let rows = safekeepers(cluster);
    let row = rows.iter().find(|row| row["id"] == id).unwrap();
    row["state"].as_str().unwrap().to_owned()
}

/// The list tells who is about to keep nothing, and who keeps nothing any more.
#[test]
fn who_is_drained_is_draining_and_then_retired() {
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    // One that was started, and is a member of nothing.
    let mut add = cluster.command(&["safekeeper", "add"]);
    add.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut add = add.spawn().unwrap();
    let since = Instant::now();
    while !is_written_down(&cluster, |place| place["id"] == 4) {
        assert!(since.elapsed() < Duration::from_secs(60), "none was begun");
        std::thread::sleep(Duration::from_millis(2));
    }
    add.kill().unwrap();
    add.wait().unwrap();
    cluster.up();
    assert_eq!(members(&quorum(&cluster, "main")), [1, 2, 3]);
    assert_eq!((state_of(&cluster, 2), state_of(&cluster, 4)), ("ok".into(), "ok".into()));
    // While the compute has not heard of it.
    let compute = Stopped::stop(cluster.pid("compute-main"));
    let mut drain = cluster.command(&["safekeeper", "drain", "2"]);
    drain.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut drain = drain.spawn().unwrap();
    let since = Instant::now();
    while state_of(&cluster, 2) != "draining" {
        assert!(since.elapsed() < Duration::from_secs(60), "{:?}", safekeepers(&cluster));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(state_of(&cluster, 1), "ok");
    drop(compute);
    assert!(drain.wait().unwrap().success());
    load.goes_on();
    assert_eq!(members(&quorum(&cluster, "main")), [1, 3, 4]);
    let states = [1, 2, 3, 4].map(|id| state_of(&cluster, id));
    assert_eq!(states, ["ok", "retired", "ok", "ok"]);
    load.end();
}

/// Object storage that can't be written is what is said, and not that nobody knows the newcomer.
#[test]
fn a_newcomer_that_can_not_register_says_why() {
    let cluster = Cluster::new();
    let load = Load::start(&cluster.up());
    load.goes_on();
    let registrations = cluster.dir().join("objects/safekeepers");
    let moved = cluster.dir().join("objects/kept");
    // A file in the place of the directory is refused to everybody, to root as well.
    std::fs::rename(&registrations, &moved).unwrap();
    std::fs::write(&registrations, b"").unwrap();
    let said = cluster.refusal(&["safekeeper", "replace", "2"], 1);
    assert!(said.contains("safekeeper 4 can't register in object storage"), "{said}");
    assert!(said.contains("space") && said.contains("the same command goes on"), "{said}");
    assert!(!said.contains("never been started"), "{said}");
    load.goes_on();
    std::fs::remove_file(&registrations).unwrap();
    std::fs::rename(&moved, &registrations).unwrap();
    cluster.cli(&["safekeeper", "replace", "2"]);
    assert_eq!(members(&quorum(&cluster, "main")), [1, 3, 4]);
    load.goes_on();
    load.end();
}

/// Five safekeepers are lost, and the branch had two of them: no more are started.
#[test]
fn no_more_are_started_than_a_lost_branch_had() {
    let cluster = Cluster::with(&["--safekeepers", "5"], &[]);
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    let lose = |id: u64| {
        cluster.kill(&format!("safekeeper-{id}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{id}"))).unwrap();
    };
    [3, 4, 5].into_iter().for_each(lose);
    cluster.cli(&["quorum", "recover", "--accept-loss"]);
    load.goes_on();
    load.end();
    assert_eq!(members(&quorum(&cluster, "main")), [1, 2]);
    cluster.kill("compute-main");
    [1, 2].into_iter().for_each(lose);
    // What the page server has is more than what is archived.
    for _ in 0..2 {
        let said = cluster.refusal(&["quorum", "recover", "--accept-loss"], 1);
        assert!(said.contains("safekeepers 6, 7 were started"), "{said}");
    }
    assert_eq!(ids(&safekeepers(&cluster)), [1, 2, 3, 4, 5, 6, 7]);
}

/// Runs a command that is killed after so long. True if it did not come to its end before.
fn is_killed_after(cluster: &Cluster, arguments: &[&str], after: Duration) -> bool {
    let mut command = cluster.command(arguments);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(after);
    // It may have ended.
    let _ = child.kill();
    !child.wait().unwrap().success()
}

/// Moments at which commands are killed.
fn moments() -> u32 {
    if pgstrata_tests::thorough() { 36 } else { 6 }
}

/// The command is killed at moments that are spread over all of its time, and the same one ends what it began.
#[test]
fn a_replacement_that_is_killed_at_any_moment_is_ended_by_the_next() {
    let cluster = Cluster::new();
    let uri = cluster.up();
    let load = Load::start(&uri);
    load.goes_on();
    let since = Instant::now();
    cluster.cli(&["safekeeper", "replace", "1"]);
    let whole = since.elapsed();
    // Each takes less time than a recovery.
    let (mut killed, moments) = (0, 2 * moments());
    for moment in 0..moments {
        let goes = members(&quorum(&cluster, "main"))[0];
        let command = ["safekeeper", "replace", &goes.to_string()];
        killed += u32::from(is_killed_after(&cluster, &command, whole * moment / moments));
        let output = cluster.try_cli(&command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // It may have come to its end before it was killed.
        assert!(output.status.success() || said.contains("there is no safekeeper"), "{said}");
        let shown = quorum(&cluster, "main");
        let (has, all) = (members(&shown), ids(&safekeepers(&cluster)));
        assert!(has == all && has.len() == 3 && !has.contains(&goes), "{shown} of {all:?}");
        assert_eq!((&shown["joint"], &shown["warning"]), (&Value::Bool(false), &Value::Null));
        load.goes_on();
    }
    assert!(2 * killed >= moments, "{killed} were killed before they ended");
    let (told, longest) = load.end();
    println!("{killed} of {moments} killed within {whole:?}; {told} commits, longest {longest:?}");
    let found: i64 = connect(&uri).query_one("select count(*) from told", &[]).unwrap().get(0);
    assert_eq!(found, told);
}

/// The same where most are lost, and two go on: the one that has most decides with both, before both do.
#[test]
fn a_recovery_that_is_killed_at_any_moment_is_ended_by_the_next() {
    let cluster = Cluster::with(&["--safekeepers", "5"], &[]);
    cluster.up();
    let names: Vec<String> = (0..=moments()).map(|moment| format!("b{moment}")).collect();
    for name in &names {
        cluster.cli(&["branch", "create", name]);
        let mut client = cluster.branch_client(name);
        client.batch_execute("create table told as select generate_series(1, 100) a").unwrap();
        drop(client);
        cluster.cli(&["compute", "stop", name]);
    }
    // What was committed is with all of them.
    let since = Instant::now();
    let lacks = |row: &Value| row["behind_bytes"] != 0;
    while safekeepers(&cluster).iter().any(lacks) {
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", safekeepers(&cluster));
        std::thread::sleep(Duration::from_millis(100));
    }
    for lost in [3, 4, 5] {
        cluster.kill(&format!("safekeeper-{lost}"));
        std::fs::remove_dir_all(cluster.dir().join(format!("safekeeper-{lost}"))).unwrap();
    }
    let command = |name| ["quorum", "recover", "--accept-loss", "--branch", name];
    let since = Instant::now();
    cluster.cli(&command(&names[0]));
    let whole = since.elapsed();
    let (mut killed, mut again) = (0, 0);
    for (moment, name) in (0..).zip(&names[1..]) {
        killed += u32::from(is_killed_after(&cluster, &command(name), whole * moment / moments()));
        let output = cluster.try_cli(&command(name));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        again += u32::from(output.status.success());
        // What was decided before it was killed is in use, and needs nobody.
        let is_done = said.contains("nothing needs to be given up");
        assert!(output.status.success() || is_done, "{name}: {said}");
    }
    println!("{killed} of {} killed within {whole:?}, {again} ended by the next", moments());
    assert!(2 * killed >= moments(), "{killed} were killed before they ended");
    for name in &names {
        let shown = quorum(&cluster, name);
        assert_eq!((members(&shown), &shown["joint"]), (vec![1, 2], &Value::Bool(false)), "{name}");
        let mut client = cluster.branch_client(name);
        let found: i64 = client.query_one("select count(*) from told", &[]).unwrap().get(0);
        assert_eq!(found, 100, "{name}");
        client.batch_execute("insert into told values (0)").unwrap();
        drop(client);
        cluster.cli(&["compute", "stop", name]);
    }
}
