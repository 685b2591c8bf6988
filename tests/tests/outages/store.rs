//! The object store is away: requests that do not need it do not wait for it, and all is well after.

use std::time::Duration;

use pgstrata_tests::health::{
    flushed, lsn, wait_until_all_have, wait_until_healthy, wait_until_right,
};
use pgstrata_tests::installation::Installation;
use pgstrata_tests::load::{Load, SCHEMA};
use pgstrata_tests::probes::{Probe, Probes, request};
use pgstrata_tests::proxy::{Mode, Proxy};
use pgstrata_tests::workload::permanent;
use pgstrata_tests::{Cluster, S3Server, connect, thorough};
use postgres::Client;
use serde_json::Value;

use crate::{LONGEST_STALL, RECOVERY, cluster_command, cold_table, longest_p99, versions};

/// The addresses of everybody's HTTP interface.
fn addresses(cluster: &Cluster) -> Vec<(String, String)> {
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap().iter();
    let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
    processes.map(|row| (text(row, "name"), text(row, "http"))).collect()
}

fn address(cluster: &Cluster, name: &str) -> String {
    let all = addresses(cluster);
    all.into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
}

/// Everything that does not need the object store.
fn watch(cluster: &Cluster, client: &mut Client, reader: &str, pages: u32) -> Probes {
    let mut probes = Probes::new();
    let (mut of_pageserver, mut of_others) = (Vec::new(), Vec::new());
    for (name, address) in addresses(cluster) {
        let list = if name == "pageserver" { &mut of_pageserver } else { &mut of_others };
        list.extend(
            ["/healthz", "/metrics", "/readyz"].map(|path| Probe::get(&name, &address, path)),
        );
        let own: &[&str] = match name.as_str() {
            // The first is what 'branch list' asks.
            "pageserver" => &["/v1/branches?sizes=true", "/v1/branch?name=main"],
            "storage-broker" => &["/v1/nodes"],
            _ => &["/v1/status"],
        };
        list.extend(own.iter().map(|path| Probe::get(&name, &address, path)));
    }
    // Not so often that they are what the processors are busy with.
    probes.add(of_pageserver, Duration::from_millis(20));
    probes.add(of_others, Duration::from_millis(5));
    let path: String = client.query_one("select pg_relation_filepath('cold')", &[]).unwrap().get(0);
    let relation = path.replace("base/", "1663/");
    let pageserver = address(cluster, "pageserver");
    // Far from one another, so that none comes along with one that was asked for.
    let mut block = 0;
    let mut next = move || {
        block = (block + 7919) % pages;
        block
    };
    let page = Probe::new("pageserver /v1/branch/page", move || {
        let path = format!("/v1/branch/page?name=main&rel={relation}&block={}", next());
        match request("GET", &pageserver, &path, Duration::from_secs(15)) {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let mut reads = connect(reader);
    let mut number = 0;
    let read = Probe::new("SQL read of a cold page", move || {
        number = (number + 7919) % pages;
        let query = format!("select number from cold where ctid = '({number},1)'");
        let row = reads.query_one(&query, &[]).map_err(|error| format!("{error:?}"))?;
        (row.get::<_, i32>(0) as u32 == number).then_some(()).ok_or("another row".to_owned())
    });
    probes.add(vec![page, read], Duration::from_millis(20));
    let mut command = cluster_command(cluster, &["branch", "list"]);
    let list = Probe::new("pgstrata branch list", move || {
        let output = command.output().map_err(|error| error.to_string())?;
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(complaints)
    });
    probes.add(vec![list], Duration::from_millis(100));
    probes
}

/// Makes the page server write out what it has, and safekeepers archive a segment, again and again.
fn keep_uploading(cluster: &Cluster, uri: &str) -> Probes {
    let pageserver = address(cluster, "pageserver");
    let flush = Probe::new("flush", move || {
        // It waits for the object store, as it should.
        let path = "/v1/branch/compact?name=main";
        drop(request("POST", &pageserver, path, Duration::from_secs(1)));
        Ok(())
    });
    let mut client = connect(uri);
    let switch = Probe::new("switch", move || {
        client.batch_execute("select pg_switch_wal()").map_err(|error| error.to_string())
    });
    let mut uploads = Probes::new();
    uploads.add(vec![flush], Duration::from_secs(2));
    uploads.add(vec![switch], Duration::from_secs(if thorough() { 15 } else { 5 }));
    uploads
}

/// What was seen in some seconds, printed, and what of it is not as it should be.
fn watched(what: &str, seconds: u64, probes: &Probes, load: &Load) -> Vec<String> {
    probes.take();
    load.take();
    std::thread::sleep(Duration::from_secs(seconds));
    let seen = probes.take();
    let (stall, mut wrong) = load.take();
    println!("{what}: longest commit {stall:?}");
    if stall >= LONGEST_STALL {
        wrong.push(format!("a commit took {stall:?}"));
    }
    for (name, seen) in seen {
        let (p99, longest, count) = (seen.p99(), seen.longest(), seen.count());
        println!("{what}: {name}: p99 {p99:?}, longest {longest:?}, of {count}");
        if p99 >= longest_p99() {
            wrong.push(format!("{name}: p99 {p99:?}"));
        }
        wrong.extend(seen.failure.map(|failure| format!("{name}: {failure}")));
    }
    wrong
}

/// What is not as it should be. What waits for the object store does so in every round; what waited for a processor that
/// something else on this machine had, does not.
fn judged(what: &str, seconds: u64, probes: &Probes, load: &Load) -> Vec<String> {
    const ROUNDS: usize = 3;
    let mut wrong = Vec::new();
    for _ in 0..ROUNDS {
        wrong = watched(what, seconds, probes, load);
        if wrong.is_empty() {
            break;
        }
        println!("{what}: {wrong:?}");
    }
    wrong.into_iter().map(|wrong| format!("{what}: {wrong}")).collect()
}

fn store_goes_bad(installation: &Installation) {
    let server = S3Server::start();
    let proxy = Proxy::start(&server.endpoint);
    let cluster = Cluster::in_s3(&proxy.endpoint).with_server_of(installation);
    let mut client = cluster.client();
    client.batch_execute(SCHEMA).unwrap();
    let pages = if thorough() { 12_000 } else { 2000 };
    cold_table(&mut client, pages);
    cluster.cli(&["compact"]);
    cluster.cli(&["branch", "create", "reader"]);
    let reader = cluster.json(&["compute", "start", "reader"]);
    let probes = watch(&cluster, &mut client, reader["uri"].as_str().unwrap(), pages as u32);
    let uri = cluster.up();
    let mut load = Load::start(&uri, 3);
    let uploads = keep_uploading(&cluster, &uri);
    load.wait_for_progress(RECOVERY);

    let (seconds, delay) = if thorough() { (60, 10) } else { (6, 5) };
    let modes =
        [Mode::Pass, Mode::SlowIndexes(Duration::from_secs(delay)), Mode::Refuse, Mode::Cut];
    let version = installation.major();
    let mut wrong = Vec::new();
    for mode in modes {
        proxy.switch(mode);
        let what = format!("PostgreSQL {version}, {mode:?}");
        wrong.extend(judged(&what, seconds, &probes, &load));
        let disturbed = proxy.switch(Mode::Pass);
        assert!(mode == Mode::Pass || disturbed > 0, "{mode:?}: nothing was uploaded meanwhile");
        let mark = flushed(&mut client);
        let caught_up = wait_until_right(RECOVERY, || {
            let branches = cluster.json(&["branch", "list"]);
            let main = branches.as_array().unwrap().iter().find(|row| row["name"] == "main");
            let reached = main.and_then(|row| row["remote_lsn"].as_str()).unwrap_or("0/0");
            (lsn(reached) < lsn(&mark))
                .then(|| format!("uploaded to {reached}, not to {mark}: {main:?}"))
        });
        println!("{mode:?}: {disturbed} requests; uploads catch up in {caught_up:?}");
    }
    drop(uploads);
    drop(probes);
    let mark = flushed(&mut client);
    client.batch_execute("select pg_switch_wal(); insert into load values (-1, 1, '')").unwrap();
    let archived = wait_until_all_have(&cluster, "archived_lsn", &mark, RECOVERY);
    println!("archived by all after {archived:?}");
    load.wait_for_progress(RECOVERY);
    load.stop(RECOVERY);
    wait_until_healthy(&cluster, RECOVERY);
    let digests = permanent(&mut client);

    // The page server's copies are gone; what it uploaded is not.
    drop(client);
    cluster.kill("pageserver");
    std::fs::remove_dir_all(cluster.dir().join("pageserver")).unwrap();
    cluster.up();
    let mut client = cluster.restart();
    assert_eq!(permanent(&mut client), digests);
    load.check(&mut client);
    wait_until_healthy(&cluster, RECOVERY);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_that_can_do_without_the_object_store_waits_for_it() {
    versions(store_goes_bad);
}
