//! A page server's process, driven through its ports.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_ids::TimelineId;
use serde_json::Value;

use super::TENANT;

pub struct Process {
    pub child: Child,
    pub http: String,
    pub pages: String,
    pub pg: String,
    agent: ureq::Agent,
}

/// An answer, whatever it is, and how long it took.
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    pub took: Duration,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }
}

/// The program, with its own directory.
pub fn command(directory: &Path, store: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageserver"));
    command.arg("--dir").arg(directory).args(["--object-store", store]);
    command
}

/// Adds what it takes to reach an S3 server.
pub fn with_s3(mut command: Command, endpoint: &str) -> Command {
    command.args(["--s3-endpoint", endpoint]);
    command.envs([("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")]);
    command.env("AWS_REGION", "us-east-1");
    command
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(20)))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
}

impl Process {
    pub fn start(mut command: Command) -> Process {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("said {line:?}"));
        let address = |name: &str| said[name].as_str().unwrap().to_owned();
        let (http, pages, pg) = (address("http"), address("pages"), address("pg"));
        Process { child, http, pages, pg, agent: agent() }
    }

    pub fn get(&self, path: &str) -> Answer {
        let started = Instant::now();
        let mut answer = self.agent.get(format!("http://{}{path}", self.http)).call().unwrap();
        let body = answer.body_mut().with_config().limit(u64::MAX).read_to_vec().unwrap();
        Answer { status: answer.status().as_u16(), body, took: started.elapsed() }
    }

    pub fn post(&self, path: &str, body: &[u8]) -> Answer {
        let started = Instant::now();
        let request = self.agent.post(format!("http://{}{path}", self.http));
        let mut answer = request.content_type("application/json").send(body).unwrap();
        let body = answer.body_mut().with_config().limit(u64::MAX).read_to_vec().unwrap();
        Answer { status: answer.status().as_u16(), body, took: started.elapsed() }
    }

    pub fn import(&self, id: TimelineId, name: &str, archive: &[u8]) -> Answer {
        self.post(&format!("/v1/import?tenant={TENANT}&timeline={id}&name={name}"), archive)
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
