//! A client of the replication port.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use pgstrata_ids::Lsn;

/// A replication connection that has started to stream.
pub struct Client(TcpStream);

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

impl Client {
    pub fn start(address: &str, role: &str, from: Lsn) -> Client {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let options = format!("-c pgstrata.role={role}");
        let mut body = (3u32 << 16).to_be_bytes().to_vec();
        for text in ["user", "x", "replication", "true", "options", &options, ""] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        stream.write_all(&(body.len() as u32 + 4).to_be_bytes()).unwrap();
        stream.write_all(&body).unwrap();
        let mut client = Client(stream);
        while client.receive().0 != b'Z' {}
        let query = format!("START_REPLICATION PHYSICAL {from} TIMELINE 1\0");
        client.0.write_all(&message(b'Q', query.as_bytes())).unwrap();
        assert_eq!(client.receive().0, b'W');
        client
    }

    /// The next message, which is no error.
    pub fn receive(&mut self) -> (u8, Vec<u8>) {
        let (kind, body) = self.receive_any();
        assert_ne!(kind, b'E', "{}", String::from_utf8_lossy(&body));
        (kind, body)
    }

    fn receive_any(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let mut body = vec![0; length - 4];
        self.0.read_exact(&mut body).unwrap();
        (head[0], body)
    }

    pub fn say(&mut self, flushed: Lsn) {
        let mut body = vec![b'r'];
        for _ in 0..3 {
            body.extend_from_slice(&flushed.0.to_be_bytes());
        }
        body.extend_from_slice(&[0; 8]);
        body.push(1);
        self.0.write_all(&message(b'd', &body)).unwrap();
    }
}

/// What is sent of `[from, to)` before the server says that something is wrong, which it has to.
pub fn read_until_error(address: &str, from: Lsn, to: Lsn) -> Vec<u8> {
    let mut client = Client::start(address, "reader", from);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < to - from {
        let (kind, body) = client.receive_any();
        match (kind, body.first()) {
            (b'E', _) => return bytes,
            (_, Some(b'w')) => bytes.extend_from_slice(&body[25..]),
            _ => {}
        }
    }
    panic!("all of it was sent");
}
