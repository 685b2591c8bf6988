//! The program `far-switch`, while it runs: a network that is slow and loses some of what it is given.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::programs;

/// Longest wait for an answer, or for its end.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of frames: see `pgstrata_sim::Counts`.
#[derive(Clone, Copy, Debug)]
pub struct Frames {
    pub forwarded: u64,
    pub lost: u64,
    pub dropped: u64,
    pub late: u64,
}

/// See the module. It ends with this.
pub struct FarSwitch {
    child: Child,
    answers: Receiver<String>,
}

impl FarSwitch {
    /// Starts it behind a command that takes it into a network, where it makes these interfaces.
    pub fn start(prefix: &[&str], options: &[&str], interfaces: &[String]) -> FarSwitch {
        let mut command = Command::new(prefix[0]);
        command.args(&prefix[1..]).arg(programs().join("far-switch"));
        command.args(options).args(interfaces);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            said.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let far = FarSwitch { child, answers };
        assert_eq!(far.answer()["ready"], true);
        far
    }

    fn answer(&self) -> Value {
        serde_json::from_str(&self.answers.recv_timeout(PATIENCE).unwrap()).unwrap()
    }

    fn frames(&self) -> Frames {
        let answer = self.answer();
        let count = |name| answer[name].as_u64().unwrap();
        Frames {
            forwarded: count("forwarded"),
            lost: count("lost"),
            dropped: count("dropped"),
            late: count("late"),
        }
    }

    /// From now on each way takes so long, and loses so much. Returns what became of frames so far.
    pub fn set(&mut self, delay_ms: f64, loss_percent: f64) -> Frames {
        let mut input = self.child.stdin.as_ref().unwrap();
        writeln!(input, "{delay_ms} {loss_percent}").unwrap();
        self.frames()
    }

    /// Ends it. Returns what became of frames.
    pub fn end(mut self) -> Frames {
        drop(self.child.stdin.take());
        self.frames()
    }
}

impl Drop for FarSwitch {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > deadline {
                eprintln!("far-switch does not end");
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
