//! The page server's pages at an LSN equal those of a stock standby recovered to that LSN.
//!
//! The standby is PostgreSQL's own: a base backup of the running compute, recovered from the WAL
//! that a safekeeper streams, stopped at the LSN. The other side is a base backup from the page
//! server at the same LSN. Every relation file, SLRU, relation map and two-phase file is compared.
//!
//! Masked, because redo leaves them open or PostgreSQL itself treats them as hints:
//!
//! * free space maps: the page server does not keep them;
//! * `pd_checksum`, which redo does not maintain;
//! * the hole of a page that has line pointers (`pd_lower..pd_upper`), where a standby may hold stale
//!   bytes; in visibility maps that is where the content is;
//! * SLRU pages past the end of the standby's file, which are zeros.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pgstrata_tests::installation::Installation;
use pgstrata_tests::{
    Cluster, S3Server, backup, connect, give_to_postgres, pg_directory, pg_program, thorough,
};
use postgres::Client;

const PAGE: usize = 8192;

fn in_database(uri: &str, database: &str) -> String {
    format!("{}/{database}", uri.rsplit_once('/').unwrap().0)
}

fn run(client: &mut Client, statements: &str) {
    for statement in statements.split(";\n").filter(|statement| !statement.trim().is_empty()) {
        client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

/// Every kind of change that acceptance asks for.
fn workload(uri: &str, tablespace: &str) {
    let mut client = connect(uri);
    pg_program("pgbench", &["-i", "-q", "-s", "1", uri]);
    pg_program("pgbench", &["-n", "-c", "4", "-t", "300", uri]);
    run(
        &mut client,
        "create table a (id serial primary key, t text, u text unique);
insert into a (t, u) select md5(g::text), g::text from generate_series(1, 5000) g;
update a set t = t || 'x' where id % 3 = 0;
delete from a where id % 5 = 0;
vacuum a;
create index a_t on a (t);
vacuum full a;
create table cut as select g from generate_series(1, 20000) g;
truncate cut;
insert into cut values (1);
create table shrinks as select g, repeat('x', 200) r from generate_series(1, 5000) g;
delete from shrinks where g > 100;
vacuum shrinks;
insert into shrinks select g, 'again' from generate_series(1, 3000) g;
create unlogged table un (a int primary key);
insert into un values (1);
create materialized view m as select * from a;
create database walcopy strategy wal_log;
create database filecopy strategy file_copy;
create table gone (a int);
drop table gone;
cluster a using a_pkey;
create table toasty (b text);
insert into toasty select string_agg(md5(g::text), '') from generate_series(1, 2000) g;
create sequence s;
select nextval('s') from generate_series(1, 100)",
    );
    client.batch_execute(&format!("create tablespace ts location '{tablespace}'")).unwrap();
    run(
        &mut client,
        "create table in_ts (a int primary key) tablespace ts;
insert into in_ts select g from generate_series(1, 1000) g;
alter table cut set tablespace ts",
    );
    let mut other = connect(&in_database(uri, "filecopy"));
    run(
        &mut other,
        "create table in_copy as select g from generate_series(1, 1000) g;\ncreate table two (a int)",
    );
    drop(other);
    // Subtransactions, multixacts, two-phase transactions.
    run(&mut client, "create table sub (a int)");
    for round in 0..10 {
        let mut statement = String::from("begin;");
        for save in 0..80 {
            statement += &format!("savepoint s{save}; insert into sub values ({save});");
        }
        statement += if round % 2 == 0 { "commit" } else { "rollback" };
        client.batch_execute(&statement).unwrap();
    }
    let mut lockers: Vec<Client> = (0..3).map(|_| connect(uri)).collect();
    for locker in &mut lockers {
        locker.batch_execute("begin; select * from a where id < 50 for share").unwrap();
    }
    lockers[0].batch_execute("commit").unwrap();
    run(&mut client, "create table tp (a int)");
    for number in 0..4 {
        client
            .batch_execute(&format!(
                "begin; insert into tp values ({number}); create table tp{number} (a int);
                 prepare transaction 'p{number}'"
            ))
            .unwrap();
    }
    run(&mut client, "commit prepared 'p0';\nrollback prepared 'p1'");
    // Progress that an older transaction does not take back, and one that is taken back.
    run(
        &mut client,
        "select pg_replication_origin_create('one');
select pg_replication_origin_create('two');
select pg_replication_origin_session_setup('one');
begin; select pg_replication_origin_xact_setup('0/2000', now()); insert into tp values (5); commit;
begin; select pg_replication_origin_xact_setup('0/1000', now()); insert into tp values (6); commit;
select pg_replication_origin_session_reset();
select pg_replication_origin_advance('two', '0/4000');
select pg_replication_origin_advance('two', '0/3000')",
    );
    drop(lockers);
    pg_program("pgbench", &["-n", "-c", "4", "-t", "100", uri]);
}

/// Paths of regular files below `root`, relative.
fn files(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found
}

/// Whether the comparison is about this file.
fn compared(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap();
    let relation = ["base/", "global/", "pg_tblspc/"].iter().any(|top| path.starts_with(top))
        && name.starts_with(|c: char| c.is_ascii_digit())
        && !name.contains("_fsm");
    let slru =
        ["pg_xact/", "pg_multixact/", "pg_commit_ts/"].iter().any(|top| path.starts_with(top));
    let whole = ["pg_filenode.map", ORIGINS].contains(&name) || path.starts_with("pg_twophase/");
    relation || slru || whole
}

/// Progress of replication origins.
const ORIGINS: &str = "replorigin_checkpoint";

fn is_page_file(path: &str) -> bool {
    !["pg_filenode.map", ORIGINS].iter().any(|name| path.ends_with(name))
        && !path.starts_with("pg_twophase/")
}

fn mask(page: &mut [u8], has_hole: bool) {
    page[8..10].fill(0);
    let field = |at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    let (lower, upper) = (field(12), field(14));
    if has_hole && lower > 24 && lower < upper && upper <= PAGE && field(18) == 0x2004 {
        page[lower..upper].fill(0);
    }
}

fn is_slru(path: &str) -> bool {
    path.starts_with("pg_xact") || path.starts_with("pg_multi") || path.starts_with("pg_commit_ts")
}

/// Compares two directories. Returns what differs, and how many pages were equal.
fn compare(ours: &Path, theirs: &Path, unlogged: &BTreeSet<String>) -> (Vec<String>, usize) {
    let mut differences = Vec::new();
    let mut equal = 0;
    let all: BTreeSet<String> = files(ours).union(&files(theirs)).cloned().collect();
    for path in all.iter().filter(|path| compared(path)) {
        let read = |root: &Path| std::fs::read(root.join(path)).unwrap_or_default();
        let (mut a, mut b) = (read(ours), read(theirs));
        if !is_page_file(path) {
            if a != b {
                differences.push(format!("{path}: contents differ"));
            }
            continue;
        }
        // Main forks of unlogged relations are not WAL's business.
        if unlogged.contains(path.as_str()) {
            continue;
        }
        let length = a.len().max(b.len());
        // SLRU files end where somebody wrote last; a relation's length is part of its state.
        if a.len() != b.len() && !is_slru(path) {
            differences.push(format!("{path}: {} and {} bytes", a.len(), b.len()));
        }
        a.resize(length, 0);
        b.resize(length, 0);
        for (block, (a, b)) in a.chunks_mut(PAGE).zip(b.chunks_mut(PAGE)).enumerate() {
            if !is_slru(path) {
                let has_hole = !path.contains("_vm");
                mask(a, has_hole);
                mask(b, has_hole);
            }
            match (0..PAGE).find(|&at| a[at] != b[at]) {
                None => equal += 1,
                Some(at) => differences.push(format!(
                    "{path} block {block} byte {at}: {:02x} and {:02x}",
                    a[at], b[at]
                )),
            }
        }
    }
    (differences, equal)
}

#[test]
fn pages_equal_those_of_a_stock_standby() {
    let installation = Installation::of(15);
    with_pg_basebackup(Cluster::of(&installation, &[]));
}

#[test]
fn pages_equal_those_of_a_stock_standby_on_s3() {
    let server = S3Server::start();
    with_pg_basebackup(server.cluster());
}

/// `pg_basebackup` is the client, from the compute and from the page server.
fn with_pg_basebackup(cluster: Cluster) {
    check_pages(15, &cluster, &|port, options, target, tablespaces| {
        let connection = format!("host=127.0.0.1 port={port} user=postgres options='{options}'");
        let mut arguments =
            vec!["-D", target.to_str().unwrap(), "-d", &connection, "-c", "fast", "--no-sync"];
        // Of the running compute, the WAL is streamed meanwhile.
        arguments.extend(["-X", if options.is_empty() { "stream" } else { "fetch" }]);
        let mapping: Vec<_> =
            tablespaces.iter().flat_map(|mapping| ["-T", mapping.as_str()]).collect();
        pg_program("pg_basebackup", &[arguments, mapping].concat());
    });
}

#[test]
fn pages_equal_those_of_a_newer_stock_standby() {
    let majors: &[u32] = if thorough() { &[16, 17, 18] } else { &[18] };
    for major in majors {
        let installation = Installation::of(*major);
        let cluster = Cluster::of(&installation, &[]);
        check_pages(*major, &cluster, &|port, options, target, _| {
            let arguments = "LABEL 'test', CHECKPOINT 'fast', WAL true, MANIFEST 'no'";
            let taken = backup::take(port, options, arguments).unwrap();
            // Tablespaces stay there.
            let root = target.with_extension("backup");
            std::fs::rename(taken.unpack(&root), target).unwrap();
        });
    }
}

/// Takes a base backup from a port, with options of the connection, into a directory. Tablespaces
/// go where the mappings `from=to` say.
type TakeBackup<'a> = &'a dyn Fn(u16, &str, &Path, &[String]);

fn check_pages(major: u32, cluster: &Cluster, take: TakeBackup<'_>) {
    let installation = Installation::of(major);
    // With commit timestamps, so that there is an SLRU more to compare.
    connect(&cluster.up()).batch_execute("alter system set track_commit_timestamp = on").unwrap();
    cluster.cli(&["compute", "stop", "main"]);
    let uri = cluster.up();
    let mut client = connect(&uri);
    let directory = pg_directory();
    let place = |name: &str| directory.path().join(name);

    // The standby starts from a stock base backup of the running compute.
    let standby = place("standby");
    let port = uri.rsplit_once(':').unwrap().1.split('/').next().unwrap().parse().unwrap();
    take(port, "", &standby, &[]);
    let tablespace = place("ts");
    std::fs::create_dir(&tablespace).unwrap();
    give_to_postgres(&tablespace);
    let tablespace = tablespace.display().to_string();
    workload(&uri, &tablespace);
    client.batch_execute("checkpoint").unwrap();
    let lsn: String =
        client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0);
    let unlogged = unlogged_paths(&uri);
    // Recovery stops when it sees a record beyond its target.
    client
        .batch_execute("create table beyond as select g from generate_series(1, 1000) g")
        .unwrap();

    // From the page server, at that LSN.
    let ours = place("ours");
    let mapping = format!("{tablespace}={}", place("ours_ts").display());
    let options = format!("-c pgstrata.branch=main -c pgstrata.lsn={lsn}");
    take(cluster.replication_port("pageserver"), &options, &ours, &[mapping]);

    recover(&installation, cluster, &standby, &tablespace, &lsn);
    let (differences, equal) = compare(&ours, &standby, &unlogged);
    let shown: Vec<_> = differences.iter().take(40).collect();
    assert!(
        differences.is_empty(),
        "{} differences, {equal} pages equal: {shown:#?}",
        differences.len()
    );
    assert!(equal > 5000, "only {equal} pages were compared");
    println!("PostgreSQL {major}: {equal} pages equal");
}

/// The standby recovers to the LSN, fed by a safekeeper, and stops there. What the primary did to
/// its tablespace directory must not be in the way.
fn recover(
    installation: &Installation,
    cluster: &Cluster,
    standby: &Path,
    tablespace: &str,
    lsn: &str,
) {
    let main = cluster.json(&["branch", "list"])[0].clone();
    let safekeeper_port = cluster.replication_port("safekeeper");
    cluster.cli(&["compute", "stop", "main", "--immediate"]);
    for entry in std::fs::read_dir(tablespace).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let conninfo = format!(
        "host=127.0.0.1 port={safekeeper_port} user=postgres options=''-c pgstrata.tenant={} -c pgstrata.timeline={}''",
        main["tenant_id"].as_str().unwrap(),
        main["timeline_id"].as_str().unwrap()
    );
    let settings = format!(
        "primary_conninfo = '{conninfo}'\nrecovery_target_lsn = '{lsn}'\nrecovery_target_inclusive = off\n\
         recovery_target_action = shutdown\nhot_standby = off\nmax_prepared_transactions = 64\ntrack_commit_timestamp = on\n\
         listen_addresses = ''\nunix_socket_directories = '{}'\n",
        standby.parent().unwrap().display()
    );
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(standby.join("postgresql.auto.conf"))
        .unwrap();
    file.write_all(settings.as_bytes()).unwrap();
    std::fs::write(standby.join("standby.signal"), "").unwrap();
    let output =
        installation.command("postgres", &["-D", standby.to_str().unwrap()]).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("recovery stopping"), "{log}");
}

/// Files of unlogged relations' main forks, in every database.
fn unlogged_paths(uri: &str) -> BTreeSet<String> {
    let mut client = connect(uri);
    let databases =
        client.query("select datname from pg_database where datallowconn", &[]).unwrap();
    let mut paths = BTreeMap::new();
    for database in databases {
        let name: String = database.get(0);
        let mut client = connect(&in_database(uri, &name));
        let query = "select pg_relation_filepath(oid) from pg_class where relpersistence = 'u' and relkind in ('r','i','t','S')";
        for row in client.query(query, &[]).unwrap() {
            paths.insert(row.get::<_, String>(0), ());
        }
    }
    paths.into_keys().collect()
}
