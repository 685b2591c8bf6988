//! What a name server costs that says nothing, where the second one answers: the first request, and no other. In a network
//! namespace with name servers of its own, so it needs root, and fails without, unless `PGSTRATA_SKIP_CONTAINERS` is set.

#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgstrata_http_client::{Access, Broker};
use pgstrata_tests::hosts::Hosts;
use pgstrata_tests::services::behind;
use pgstrata_tests::{programs, running_as_root};
use tempfile::TempDir;

/// The system waits that long for a name server: `resolv.conf` says it.
const SILENCE: Duration = Duration::from_secs(3);

/// Answers that every name is at 127.0.0.1, and has no IPv6 address, until told to stop.
fn serve_names(socket: &UdpSocket, is_over: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut question = [0; 512];
    while !is_over.load(Ordering::Relaxed) {
        let Ok((size, from)) = socket.recv_from(&mut question) else { continue };
        // A header is 12 bytes; the name after it ends with an empty label, and type and class follow.
        let name = question[12..size].iter().position(|&byte| byte == 0).unwrap();
        let end = 12 + name + 5;
        let is_v4 = question[end - 4..end] == [0, 1, 0, 1];
        let mut answer = question[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x85, 0x80, 0, 1, 0, u8::from(is_v4), 0, 0, 0, 0]);
        if is_v4 {
            // The name is the question's; not to be kept; four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

/// Ended, however the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_name_server_that_says_nothing_costs_the_first_request_only() {
    if std::env::var_os("PGSTRATA_SKIP_CONTAINERS").is_some() {
        return;
    }
    assert!(running_as_root(), "as root only: PGSTRATA_SKIP_CONTAINERS=1 leaves this out");
    let hosts = Hosts::new(&["names"]);
    let directory = TempDir::new().unwrap();
    let resolver = directory.path().join("resolv.conf");
    let options = format!("options timeout:{} attempts:2", SILENCE.as_secs());
    let servers = format!("nameserver 127.0.0.2\nnameserver 127.0.0.3\n{options}\n");
    std::fs::write(&resolver, servers).unwrap();
    let open = |address| hosts.inside("names", || UdpSocket::bind((address, 53)).unwrap());
    let (silent, answers) = (open("127.0.0.2"), open("127.0.0.3"));
    let mount = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolver.display());
    let mut prefix = hosts.on("names");
    prefix.extend(["sh", "-c", &mount, "sh"].map(str::to_owned));
    let mut broker = Command::new(programs().join("storage-broker"));
    broker.args(["--listen", "127.0.0.1:7000"]);
    let mut broker = behind(&prefix, broker);
    let broker = Running(broker.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let mut itself = Command::new(std::env::current_exe().unwrap());
    itself.args(["--exact", "--ignored", "--nocapture", "asks_a_broker_by_its_name"]);
    let is_over = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        scope.spawn(|| serve_names(&answers, &is_over));
        let asked = behind(&prefix, itself).output();
        is_over.store(true, Ordering::Relaxed);
        asked
    });
    drop((broker, silent));
    let asked = asked.unwrap();
    let said = String::from_utf8_lossy(&asked.stdout);
    let complained = String::from_utf8_lossy(&asked.stderr);
    assert!(asked.status.success() && said.contains("1 passed"), "{said}{complained}");
}

/// Run by the other test, where name servers are as it wants them.
#[test]
#[ignore = "a part of the other test"]
fn asks_a_broker_by_its_name() {
    let broker = Broker::new("http://broker:7000", &Access::Local);
    let begun = Instant::now();
    broker.everything().unwrap();
    assert!(begun.elapsed() >= SILENCE, "name servers are not as they should be");
    for pause in [0, 0, 1_500, 0] {
        std::thread::sleep(Duration::from_millis(pause));
        let begun = Instant::now();
        broker.everything().unwrap();
        assert!(begun.elapsed() < SILENCE / 2, "{:?}", begun.elapsed());
    }
    // A connection that is made, and not one that was kept.
    std::thread::sleep(Duration::from_millis(1_500));
    let begun = Instant::now();
    pgstrata_dial::dial("broker:7000", SILENCE).unwrap();
    assert!(begun.elapsed() < SILENCE / 2, "{:?}", begun.elapsed());
}
