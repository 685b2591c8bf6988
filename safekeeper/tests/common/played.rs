//! Conversations that were recorded, played to a safekeeper.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use pgstrata_format::safekeeper::encode_identity;
use pgstrata_ids::{Incarnation, Lsn, NodeId};
use pgstrata_sim::conversation::{Side, Turn};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::{HEADER_SIZE, split};
use pgstrata_wire::safekeeper::{Message, decode};

use super::cluster::Cluster;
use super::wal::{SEGMENT_SIZE, parameters};

pub const START: Lsn = Lsn(SEGMENT_SIZE);
pub const PATIENCE: Duration = Duration::from_secs(10);

/// One safekeeper, whose life is the same in every run: computes say whom of them they know.
pub fn one_safekeeper() -> Cluster {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    node.kill();
    let identity = encode_identity(NodeId(1), Incarnation([0xAB; 16]));
    std::fs::write(node.dir.join("identity"), identity).unwrap();
    node.start();
    cluster
}

/// Until the compute that was there is gone, and status says so.
pub fn wait_alone(address: &str) {
    let parameters = parameters(START);
    let deadline = Instant::now() + PATIENCE;
    let status = || {
        let mut client = SafekeeperClient::connect(address, None, None, PATIENCE).unwrap();
        client.open(parameters.tenant, parameters.timeline).unwrap()
    };
    while status().has_proposer {
        assert!(Instant::now() < deadline, "a compute stays");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Says what the client said, in the same pieces, and expects the same answers. The connection, which is open still.
pub fn play(address: &str, turns: &[Turn]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut input = FrameBuffer::new(1 << 16);
    let mut said = Vec::new();
    for (side, bytes) in turns {
        if *side == Side::Client {
            said.extend_from_slice(bytes);
            continue;
        }
        stream.write_all(&said).unwrap();
        said.clear();
        let expected = split(bytes).unwrap().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            while input.next().unwrap().is_none() {
                assert!(input.fill(&mut stream).unwrap(), "it was closed before {expected:?}");
            }
            let answer = input.next().unwrap().unwrap();
            assert_eq!(answer.version, expected.version);
            // By their bytes: two fields that change places are the same to a codec that changed with them.
            let same = answer.kind == expected.kind && answer.body == &bytes[HEADER_SIZE..];
            // What was acknowledged at once may be acknowledged in steps, and what was told in steps at once.
            let acked = |kind, body| match decode(kind, body) {
                Ok(Message::Ack(ack)) => Some(ack),
                _ => None,
            };
            let acks = acked(answer.kind, answer.body).zip(acked(expected.kind, expected.body));
            let behind = acks.is_some_and(|(answer, expected)| {
                answer.flush_lsn <= expected.flush_lsn && answer.commit_lsn <= expected.commit_lsn
            });
            assert!(same || behind, "{answer:?} instead of {expected:?}");
            let size = answer.size;
            input.consume(size);
            if same {
                break;
            }
            assert!(Instant::now() < deadline, "no {expected:?}");
        }
    }
    stream.write_all(&said).unwrap();
    stream
}
