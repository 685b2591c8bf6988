//! A storage broker; it ends with the test.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub struct Broker {
    child: Child,
    pub url: String,
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The broker is another package's program: build the whole workspace first.
pub fn start_broker() -> Broker {
    let path = Path::new(env!("CARGO_BIN_EXE_safekeeper")).with_file_name("storage-broker");
    assert!(path.exists(), "{} is not built: cargo build --workspace", path.display());
    let mut command = Command::new(path);
    command.args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    let url = format!("http://{}", ready["http"].as_str().unwrap());
    Broker { child, url }
}
