//! Clients that say nothing, or never end, take nothing from the others.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use pgstrata_ids::TimelineId;
use pgstrata_pageserver::layer::raise_limit;
use pgstrata_pg_wal::PgVersion;
use pgstrata_wire::pages::{Hello, PAGES, PagesReply, REPLY_SIZE, Status};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::model::State;
use support::process::{Process, command};
use support::{TENANT, archive};

const ID: TimelineId = TimelineId([7; 16]);

fn served(directory: &std::path::Path) -> Process {
    let store = directory.join("objects");
    let process = Process::start(command(&directory.join("local"), store.to_str().unwrap()));
    let state = State::first(&mut SmallRng::seed_from_u64(1));
    let imported = process.import(ID, "main", &archive(PgVersion::V15, &state));
    assert_eq!(imported.status, 200, "{}", imported.text());
    process
}

fn resident_mib(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn s3_slow_requests_hold_up_nobody() {
    assert!(raise_limit().unwrap() > 2000);
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    let before = resident_mib(&process);
    let mut slow = Vec::new();
    for number in 0..600 {
        let mut stream = TcpStream::connect(&process.http).unwrap();
        let request = match number % 2 {
            0 => format!(
                "POST /v1/import?tenant={TENANT}&timeline={:032x}&name=n{number} HTTP/1.1\r\n\
                 Host: x\r\nContent-Length: 100000000\r\n\r\nsome",
                number + 100
            ),
            _ => "GET /v1/branch/wait?name=main&lsn=FF/0&seconds=60 HTTP/1.1\r\nHost: x\r\n\r\n"
                .to_owned(),
        };
        stream.write_all(request.as_bytes()).unwrap();
        slow.push(stream);
    }
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..10 {
        for path in ["/healthz", "/v1/branches", "/metrics", "/v1/branch/layers?name=main"] {
            let answer = process.get(path);
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            assert!(answer.took < Duration::from_secs(1), "{path} took {:?}", answer.took);
        }
    }
    let body = serde_json::json!({ "name": "other", "from": "main" }).to_string();
    let created = process.post("/v1/branches", body.as_bytes());
    assert_eq!(created.status, 200, "{}", created.text());
    assert!(created.took < Duration::from_secs(2), "{:?}", created.took);
    let (after, threads) = (resident_mib(&process), process.threads());
    assert!(after < before + 150, "{before} MiB became {after}");
    assert!(threads < 200, "{threads} threads");
}

#[test]
fn s3_silent_connections_take_no_threads() {
    assert!(raise_limit().unwrap() > 5000);
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    let before = process.threads();
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(TcpStream::connect(&process.pages).unwrap());
        let mut partly = TcpStream::connect(&process.pg).unwrap();
        partly.write_all(&[0, 0, 0]).unwrap();
        silent.push(partly);
    }
    std::thread::sleep(Duration::from_secs(1));
    let threads = process.threads();
    assert!(threads < before + 100, "{before} threads became {threads}");
    let mut stream = TcpStream::connect(&process.pages).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let hello = Hello { versions: PAGES.speaks, tenant: TENANT, timeline: ID };
    stream.write_all(&hello.encode()).unwrap();
    let mut reply = [0; REPLY_SIZE];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(PagesReply::decode(&reply).unwrap().status, Status::Done);
    // They are let go after a while.
    let started = Instant::now();
    silent[0].set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0);
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn h15_an_import_takes_bounded_memory() {
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    // Pages that don't get smaller, of a relation that is larger than what an import may take.
    let mut random = SmallRng::seed_from_u64(8);
    let mut content = vec![0; 600 << 20];
    rand::Rng::fill_bytes(&mut random, &mut content[..]);
    let mut archive = tar::Builder::new(Vec::with_capacity(content.len() + (1 << 20)));
    let control = support::control(PgVersion::V15).encode();
    for (path, content) in [("base/5/17000", &content[..]), ("global/pg_control", &control[..])] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, content).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let imported = process.import(TimelineId([9; 16]), "large", &archive);
    assert_eq!(imported.status, 200, "{}", imported.text());
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let peak: u64 = line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(peak < 500 << 10, "{} MiB at its peak", peak >> 10);
    let block = 40_000;
    let page = process.get(&format!("/v1/branch/page?name=large&rel=1663/5/17000&block={block}"));
    assert!(page.body == content[block * 8192..][..8192]);
}
