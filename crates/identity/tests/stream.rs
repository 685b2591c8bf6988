//! Connections that two threads use, and others that don't do as they should.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::{COMPUTE, Ca, SAFEKEEPER, connected, pair, sockets, soon};
use pgstrata_identity::{Clients, Stream, Whom};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes that tell their place.
fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn send(stream: &Stream, bytes: usize, chunk: usize) {
    let mut at = 0;
    while at < bytes {
        // Of many lengths, from a byte to several records.
        let length = (1 + (at * 31) % chunk).min(bytes - at);
        let part: Vec<u8> = (at..at + length).map(pattern).collect();
        let mut writer = stream;
        writer.write_all(&part).unwrap();
        at += length;
    }
}

fn receive(mut stream: &Stream, bytes: usize) -> usize {
    let mut buffer = vec![0; 50_000];
    let (mut at, mut timeouts, deadline) = (0, 0, Instant::now() + Duration::from_secs(120));
    while at < bytes {
        assert!(Instant::now() < deadline, "{at} of {bytes} came");
        match stream.read(&mut buffer) {
            Ok(0) => panic!("the end came after {at}"),
            Ok(count) => {
                let ends =
                    buffer[..count].iter().enumerate().find(|(i, byte)| **byte != pattern(at + i));
                assert_eq!(ends, None, "at {at}");
                at += count;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => timeouts += 1,
            Err(error) => panic!("{error} after {at}"),
        }
    }
    timeouts
}

#[test]
fn two_threads_on_each_side_with_tiny_timeouts() {
    let bytes = 100 << 20;
    let (near, far) = pair();
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(Duration::from_micros(1))).unwrap();
    }
    let timeouts: usize = thread::scope(|scope| {
        let mut readers = Vec::new();
        for stream in [&near, &far] {
            readers.push(scope.spawn(move || receive(stream, bytes)));
            // A pause in which readers run into their timeouts.
            scope.spawn(move || {
                send(stream, bytes / 2, 200_000);
                thread::sleep(Duration::from_millis(50));
                let rest: Vec<u8> = (bytes / 2..bytes).map(pattern).collect();
                let mut writer = stream;
                writer.write_all(&rest).unwrap();
            });
        }
        readers.into_iter().map(|reader| reader.join().unwrap()).sum()
    });
    assert!(timeouts > 0, "no timeout was run into");
    // The end that is meant.
    far.shutdown(Shutdown::Write).unwrap();
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!((&near).read(&mut [0; 10]).unwrap(), 0);
    assert_eq!((&near).read(&mut [0; 10]).unwrap(), 0);
    // In this direction only.
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (&near).write_all(b"hello").unwrap();
    let mut buffer = [0; 5];
    (&far).read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
    assert_eq!((&far).write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_writer_gets_on_while_a_reader_waits() {
    let (near, far) = pair();
    near.set_read_timeout(None).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buffer = [0; 2];
            (&near).read_exact(&mut buffer).unwrap();
            buffer
        });
        // It waits in the socket now, and for long.
        thread::sleep(Duration::from_millis(100));
        (&near).write_all(b"question").unwrap();
        let mut question = [0; 8];
        (&far).read_exact(&mut question).unwrap();
        (&far).write_all(b"ok").unwrap();
        assert_eq!(&reader.join().unwrap(), b"ok");
    });
}

#[test]
fn a_reader_gets_on_while_a_writer_waits() {
    let (near, far) = pair();
    near.set_write_timeout(None).unwrap();
    thread::scope(|scope| {
        // More than the sockets' buffers hold.
        let writer = scope.spawn(|| send(&near, 64 << 20, 1 << 20));
        thread::sleep(Duration::from_millis(200));
        assert!(!writer.is_finished());
        send(&far, 100_000, 10_000);
        receive(&near, 100_000);
        assert!(!writer.is_finished());
        receive(&far, 64 << 20);
        writer.join().unwrap();
    });
}

#[test]
fn a_write_that_takes_too_long_is_the_last() {
    let (near, far) = pair();
    near.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let part = vec![0; 1 << 20];
    let error = (0..100).find_map(|_| (&near).write_all(&part).err()).unwrap();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!((&near).write(b"x").is_err());
    // Reading goes on.
    (&far).write_all(b"x").unwrap();
    (&near).read_exact(&mut [0]).unwrap();
    // What was cut off is no end.
    drop(near);
    let mut all = Vec::new();
    let error = (&far).read_to_end(&mut all).unwrap_err();
    assert!(
        [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&error.kind()),
        "{error}"
    );
}

#[test]
fn a_socket_that_does_not_block_loses_nothing() {
    let (near, far) = pair();
    near.set_write_timeout(None).unwrap();
    near.tcp().set_nonblocking(true).unwrap();
    assert_eq!((&near).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let bytes = 16 << 20;
    thread::scope(|scope| {
        scope.spawn(|| receive(&far, bytes));
        let all: Vec<u8> = (0..bytes).map(pattern).collect();
        let (mut at, mut waits) = (0, 0);
        let deadline = soon();
        let mut again = |what: std::io::Result<usize>| match what {
            Ok(count) => count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                assert!(Instant::now() < deadline);
                waits += 1;
                thread::sleep(Duration::from_micros(100));
                0
            }
        };
        while at < bytes {
            at += again((&near).write(&all[at..]));
        }
        while again((&near).flush().map(|()| 1)) == 0 {}
        assert!(waits > 0);
    });
}

#[test]
fn who_waits_for_the_socket_reads_all_that_came() {
    let (near, far) = pair();
    far.tcp().set_nonblocking(true).unwrap();
    let bytes = 300_000;
    thread::scope(|scope| {
        scope.spawn(|| send(&near, bytes, 40_000));
        // Shorter and longer than what one look at the socket brings.
        let mut buffer = vec![0; 20_000];
        let (mut at, mut length, deadline) = (0, 1, soon());
        while at < bytes {
            if !far.holds_more() {
                let mut socket = [PollFd::new(far.tcp(), PollFlags::IN)];
                let seconds = Timespec { tv_sec: 10, tv_nsec: 0 };
                assert_eq!(poll(&mut socket, Some(&seconds)).unwrap(), 1, "{at} bytes came");
            }
            assert!(Instant::now() < deadline);
            length = (length * 7 + 3) % buffer.len();
            match (&far).read(&mut buffer[..length.max(1)]) {
                Ok(count) => at += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    });
    assert!(!far.holds_more(), "there is nothing to try");
    // What is wrong is something to read, and so is the end.
    near.tcp().write_all(b"\x17\x03\x03\x00\x20................................").unwrap();
    (&near).write_all(b"abc").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!((&far).read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::InvalidData);
    assert!(far.holds_more());
    let (near, far) = pair();
    (&near).write_all(b"abc").unwrap();
    drop(near);
    thread::sleep(Duration::from_millis(50));
    assert_eq!((&far).read(&mut [0; 3]).unwrap(), 3);
    assert!(far.holds_more());
}

#[test]
fn keys_change_while_both_sides_send() {
    let (near, far) = pair();
    let bytes = 8 << 20;
    thread::scope(|scope| {
        for stream in [&near, &far] {
            scope.spawn(move || receive(stream, bytes));
            scope.spawn(move || send(stream, bytes, 30_000));
            scope.spawn(move || {
                for _ in 0..20 {
                    let Stream::Tls(tls) = stream else { unreachable!() };
                    tls.refresh_keys().unwrap();
                    thread::sleep(Duration::from_millis(2));
                }
            });
        }
    });
    // One who only reads answers too, and who only writes hears no harm of it.
    let Stream::Tls(tls) = &near else { unreachable!() };
    for _ in 0..3 {
        tls.refresh_keys().unwrap();
        send(&near, 10, 5);
        receive(&far, 10);
    }
    send(&far, 10, 5);
    receive(&near, 10);
}

#[test]
fn records_longer_than_a_buffer() {
    let (near, far) = pair();
    thread::scope(|scope| {
        scope.spawn(|| {
            let all: Vec<u8> = (0..100_000).map(pattern).collect();
            (&near).write_all(&all).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
        });
        let mut buffer = [0; 7];
        let mut at = 0;
        loop {
            let count = (&far).read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            assert!(buffer[..count].iter().enumerate().all(|(i, byte)| *byte == pattern(at + i)));
            at += count;
        }
        assert_eq!(at, 100_000);
    });
    assert_eq!((&far).read(&mut []).unwrap(), 0);
}

#[test]
fn what_is_cut_off_is_an_unexpected_end() {
    let (near, far) = pair();
    (&near).write_all(b"abc").unwrap();
    // The socket ends, and TLS did not say so.
    near.tcp().shutdown(Shutdown::Write).unwrap();
    let mut buffer = [0; 10];
    assert_eq!((&far).read(&mut buffer).unwrap(), 3);
    for _ in 0..2 {
        assert_eq!((&far).read(&mut buffer).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
    let (near, far) = pair();
    (&near).write_all(b"abc").unwrap();
    drop(near);
    assert_eq!((&far).read(&mut buffer).unwrap(), 3);
    assert_eq!((&far).read(&mut buffer).unwrap(), 0, "the last copy says the end");
}

#[test]
fn bytes_that_were_not_encrypted_end_a_connection() {
    let (near, far) = pair();
    (&near).write_all(b"abc").unwrap();
    near.tcp().write_all(b"\x17\x03\x03\x00\x20................................").unwrap();
    let mut buffer = [0; 10];
    assert_eq!((&far).read(&mut buffer).unwrap(), 3, "what came before is read yet");
    for _ in 0..2 {
        assert_eq!((&far).read(&mut buffer).unwrap_err().kind(), ErrorKind::InvalidData);
    }
    // The other side hears of it.
    let text = (&near).read(&mut buffer).unwrap_err().to_string();
    assert!(text.contains("refused"), "{text}");
}

#[test]
fn shutdown_ends_a_reader_that_waits() {
    let (near, _far) = pair();
    near.set_read_timeout(None).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| (&near).read(&mut [0; 10]));
        thread::sleep(Duration::from_millis(100));
        near.shutdown(Shutdown::Both).unwrap();
        let read = reader.join().unwrap();
        assert!(read.is_err() || read.unwrap() == 0);
    });
}

/// What a server says of a client that does this.
fn accepted(within: Duration, client: impl FnOnce(TcpStream) + Send) -> (std::io::Error, Duration) {
    let server = Ca::new().identity(SAFEKEEPER);
    let config = server.server(Clients::MayHaveCertificate, &[]);
    let (near, far) = sockets();
    thread::scope(|scope| {
        scope.spawn(move || client(near));
        let begun = Instant::now();
        let error = Stream::accept(far, config, begun + within).unwrap_err();
        (error, begun.elapsed())
    })
}

#[test]
fn a_handshake_that_stalls_is_ended() {
    let within = Duration::from_millis(300);
    let (error, took) = accepted(within, |mut tcp| assert_eq!(tcp.read(&mut [0]).unwrap_or(0), 0));
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(took >= within && took < Duration::from_secs(10), "{took:?}");
    // A byte now and then does not help: the beginning of a record of 16 KiB.
    let (error, took) = accepted(within, |mut tcp| {
        let bytes = [0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3];
        let slow = bytes.into_iter().chain(std::iter::repeat(0)).take(1000);
        for byte in slow {
            if tcp.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("it was listened to");
    });
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(took >= within && took < Duration::from_secs(10), "{took:?}");
    // A deadline that has passed.
    let (error, _) = accepted(Duration::ZERO, drop);
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    // A client that goes.
    let (error, _) = accepted(Duration::from_secs(20), drop);
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{error}");
}

#[test]
fn plain_text_is_not_understood() {
    for hello in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
        &[0xff; 100],
    ] {
        let (error, _) = accepted(Duration::from_secs(20), |mut tcp| {
            tcp.write_all(hello).unwrap();
            let _ = tcp.read_to_end(&mut Vec::new());
        });
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(error.to_string().contains("does not speak TLS"), "{error}");
    }
    // A server of plain text.
    let client = Ca::new().identity(COMPUTE);
    let (near, mut far) = sockets();
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    let config = client.client(Whom::Broker, &[]);
    let error = Stream::connect(near, config, "localhost", soon()).unwrap_err();
    assert!(error.to_string().contains("does not speak TLS"), "{error}");
    // A name that is none.
    let (near, _far) = sockets();
    let config = client.client(Whom::Broker, &[]);
    let error = Stream::connect(near, config, "a b", soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn timeouts_are_what_they_were_after_a_handshake() {
    let ca = Ca::new();
    let (near, far) = connected(
        &ca.identity(COMPUTE),
        Whom::Safekeeper(None),
        &ca.identity(SAFEKEEPER),
        Clients::MustHaveCertificate,
    );
    for stream in [near.unwrap(), far.unwrap()] {
        let twenty = Some(Duration::from_secs(20));
        assert_eq!(stream.tcp().read_timeout().unwrap(), twenty);
        assert_eq!(stream.tcp().write_timeout().unwrap(), twenty);
    }
}

#[test]
fn plain_connections_do_the_same() {
    let (near, far) = sockets();
    let (near, far) = (Stream::from(near), Stream::from(far));
    let copy = near.clone();
    thread::scope(|scope| {
        scope.spawn(|| send(&near, 1 << 20, 100_000));
        receive(&far, 1 << 20);
        send(&far, 1000, 100);
        receive(&copy, 1000);
    });
    assert!(!near.is_tls() && near.peer_role().is_none() && near.protocol().is_none());
    assert!(near.peer_addr().unwrap().ip().is_loopback());
    drop(near);
    copy.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&far).read(&mut [0]).unwrap(), 0);
}
