//! The network that far zones are tried on is as slow and as lossy as it is told to be. In network namespaces: see `machines.rs`.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use pgstrata_tests::hosts::Hosts;
use pgstrata_tests::thorough;

/// Where the second host is.
const FAR: &str = "10.99.0.2";
/// Longest that anything here is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
/// Nothing more comes after this.
const SILENCE: Duration = Duration::from_millis(500);

/// Round trips over one connection, each of a byte.
fn round_trips(hosts: &Hosts, count: usize) -> Vec<Duration> {
    let listener = hosts.inside("far", || TcpListener::bind((FAR, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut near = hosts.inside("near", || TcpStream::connect_timeout(&address, PATIENCE).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    for end in [&near, &far] {
        end.set_nodelay(true).unwrap();
        end.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let mut byte = [1];
    let round_trip = |_| {
        let began = Instant::now();
        near.write_all(&byte).unwrap();
        far.read_exact(&mut byte).unwrap();
        far.write_all(&byte).unwrap();
        near.read_exact(&mut byte).unwrap();
        began.elapsed()
    };
    (0..count).map(round_trip).collect()
}

/// How many of so many packets get to the far host. They are sent so many at once, and all of these are waited for.
fn packets_that_arrive(hosts: &Hosts, count: usize, at_once: usize) -> usize {
    let far = hosts.inside("far", || UdpSocket::bind((FAR, 0)).unwrap());
    let near = hosts.inside("near", || UdpSocket::bind("0.0.0.0:0").unwrap());
    let address = far.local_addr().unwrap();
    let (mut arrived, mut buffer) = (0, [0; 16]);
    for sent in (at_once..=count).step_by(at_once) {
        (0..at_once).for_each(|_| assert_eq!(near.send_to(b"packet", address).unwrap(), 6));
        // Those that are lost are waited for too: not for long, but at the end.
        let wait = if sent == count { SILENCE } else { Duration::from_millis(30) };
        far.set_read_timeout(Some(wait)).unwrap();
        while arrived < sent && far.recv(&mut buffer).is_ok() {
            arrived += 1;
        }
    }
    arrived
}

#[test]
fn a_far_host_is_as_far_and_loses_as_much_as_was_asked_for() {
    if !thorough() {
        return;
    }
    let mut hosts = Hosts::new(&["near", "far"]);
    let near = round_trips(&hosts, 50);
    hosts.slow_down("far", 40, 0);
    let far = round_trips(&hosts, 50);
    let (near, far) = (near.iter().min().unwrap(), far.iter().min().unwrap());
    assert!(*near < Duration::from_millis(10), "{near:?}");
    assert!((40..50).contains(&far.as_millis()), "{far:?}");

    hosts.slow_down("far", 40, 1);
    let arrived = packets_that_arrive(&hosts, 5000, 100);
    assert!((4900..4990).contains(&arrived), "{arrived}");
    let frames = hosts.speed_up("far");
    eprintln!("near {near:?}, far {far:?}, {arrived} of 5000 arrived, {frames:?}");
    assert!(frames.lost >= 5000 - arrived as u64 && frames.dropped == 0, "{frames:?}");
    assert!(*round_trips(&hosts, 50).iter().min().unwrap() < Duration::from_millis(10));

    // A queue has an end.
    hosts.put_far_switch("far", &["--capacity", "10"]);
    hosts.slow_down("far", 400, 0);
    let arrived = packets_that_arrive(&hosts, 100, 100);
    let frames = hosts.speed_up("far");
    assert!((5..50).contains(&arrived), "{arrived}");
    assert!(frames.lost == 0 && frames.dropped >= 100 - arrived as u64, "{arrived}, {frames:?}");
}
