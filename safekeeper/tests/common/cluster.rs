//! Safekeeper processes in a temporary directory; they end with the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use pgstrata_compute_shim::proposer::{Leader, ProposerConfig, Proposing, SafekeeperClient, elect};
use pgstrata_ids::{Lsn, NodeId, Term, TimelineParameters};
use pgstrata_quorum::ProposerId;
use serde_json::Value;
use tempfile::TempDir;

use super::source::{Writer, source};
use super::wal::WalGenerator;

pub struct Node {
    pub id: u64,
    pub dir: PathBuf,
    pub child: Option<Child>,
    pub wal: String,
    pub pg: String,
    pub http: String,
    pub args: Vec<String>,
}

pub struct Cluster {
    // Dropped first: the processes end before their directory goes.
    pub nodes: Vec<Node>,
    pub dir: TempDir,
}

static NEXT_PROPOSER: AtomicU8 = AtomicU8::new(1);

impl Node {
    pub fn start(&mut self) {
        let address = |known: &str| match known {
            "" => "127.0.0.1:0".to_owned(),
            known => known.to_owned(),
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeper"));
        command.arg("--dir").arg(&self.dir).args(["--id", &self.id.to_string()]);
        command.args(["--listen-wal", &address(&self.wal)]);
        command.args(["--listen-http", &address(&self.http)]);
        command.args(["--listen-pg", &address(&self.pg)]);
        command.args(&self.args).env("RUST_LOG", "warn").stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).expect("a ready line");
        let field = |name: &str| ready[name].as_str().unwrap_or_default().to_owned();
        (self.wal, self.pg, self.http) = (field("wal"), field("pg"), field("http"));
        self.child = Some(child);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; returns the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap().code()
    }

    pub fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// The status code and the body.
    pub fn post(&self, path: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// Its committed WAL of the tests' timeline, all of what is asked for.
    pub fn read_all(&self, from: Lsn, to: Lsn) -> Vec<u8> {
        let parameters = super::wal::parameters(Lsn(super::wal::SEGMENT_SIZE));
        let patience = Duration::from_secs(10);
        let mut client = SafekeeperClient::connect(&self.wal, None, None, patience).unwrap();
        client.open(parameters.tenant, parameters.timeline).unwrap();
        let mut bytes = Vec::new();
        assert_eq!(client.read_wal(from, to, Term(0), &mut bytes).unwrap(), to);
        bytes
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.get("/v1/status")).unwrap()
    }

    pub fn timeline_lsn(&self, field: &str) -> Lsn {
        let status = self.status();
        let text = status["timelines"][0][field].as_str().unwrap_or("0/0").to_owned();
        text.parse().unwrap()
    }

    pub fn wait_lsn(&self, field: &str, lsn: Lsn, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while self.timeline_lsn(field) < lsn {
            assert!(
                Instant::now() < deadline,
                "{field} of {} is {}, not {lsn}",
                self.id,
                self.timeline_lsn(field)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Cluster {
    pub fn start(count: u64) -> Cluster {
        Cluster::start_with(count, &[])
    }

    pub fn start_with(count: u64, args: &[&str]) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("objects").display().to_string();
        let own_store = ["--object-store", store.as_str()];
        let args = match args.contains(&"--object-store") {
            true => args.to_vec(),
            false => [args, &own_store[..]].concat(),
        };
        let node = |id: u64| {
            let mut node = Node {
                id,
                dir: dir.path().join(format!("sk{id}")),
                child: None,
                wal: String::new(),
                pg: String::new(),
                http: String::new(),
                args: args.iter().map(|&arg| arg.to_owned()).collect(),
            };
            node.start();
            node
        };
        Cluster { nodes: (1..=count).map(node).collect(), dir }
    }

    pub fn config(&self, parameters: &TimelineParameters) -> ProposerConfig {
        let ids = self.nodes.iter().map(|node| NodeId(node.id));
        let run = NEXT_PROPOSER.fetch_add(1, Ordering::Relaxed);
        let addresses = self.nodes.iter().map(|node| (NodeId(node.id), node.wal.clone()));
        let addresses: Vec<_> = addresses.collect();
        ProposerConfig {
            parameters: parameters.clone(),
            safekeepers_to_ask: ids.collect(),
            safekeepers: Arc::new(addresses),
            identity: None,
            id: ProposerId([run; 16]),
            seed: run.into(),
            asked_term: Arc::default(),
            limits: Default::default(),
        }
    }

    pub fn elect(&self, parameters: &TimelineParameters) -> Leader {
        elect(self.config(parameters), Duration::from_secs(10)).unwrap()
    }

    /// Elects, commits a first record, and follows a source.
    pub fn lead(&self, parameters: &TimelineParameters, keeps_old: bool) -> (Writer, Proposing) {
        let asked = self.config(parameters).safekeepers_to_ask;
        self.lead_by(parameters, keeps_old, asked)
    }

    /// The same for a compute that was told of these safekeepers only.
    pub fn lead_by(
        &self,
        parameters: &TimelineParameters,
        keeps_old: bool,
        asked: Vec<NodeId>,
    ) -> (Writer, Proposing) {
        let config = ProposerConfig { safekeepers_to_ask: asked, ..self.config(parameters) };
        self.lead_with(config, keeps_old)
    }

    /// The same for a compute that is told other things too.
    pub fn lead_with(&self, config: ProposerConfig, keeps_old: bool) -> (Writer, Proposing) {
        let parameters = &config.parameters.clone();
        let mut leader = elect(config, Duration::from_secs(10)).unwrap();
        let elected = leader.elected().clone();
        let prev = elected.prev_record_lsn.unwrap_or(Lsn(elected.start_lsn.0 - 8));
        let mut generator = WalGenerator::new(parameters.clone(), elected.start_lsn, prev);
        let barrier = generator.record(0);
        leader.append_record(barrier.into(), Duration::from_secs(10)).unwrap();
        let (writer, source, wake) = source(generator, keeps_old);
        (writer, leader.run(source, wake, std::sync::Arc::default()).unwrap())
    }
}
