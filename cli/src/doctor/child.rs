//! The process that looks. A thread that waits for a disk which does not answer can't be ended, and keeps its process from
//! ending: so whoever was asked has another process look, takes its report when that is there, and leaves it behind.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::finding::{Finding, Report, Severity};
use super::later::Later;
use crate::Where;

/// Longest wait for the report: longer than whoever looks takes by itself, where not even its first thread gets on.
const PATIENCE: Duration = Duration::from_secs(35);
/// How long the process may take to be gone, once it has said what it found.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// What was found; `None` if it failed, and said why.
pub fn report(place: &Where) -> Result<Option<Report>> {
    let own = std::env::current_exe().context("can't find this program")?;
    let mut command = Command::new(own);
    match place {
        Where::Here(dir) => command.arg("--dir").arg(dir),
        Where::Elsewhere(file) => command.arg("--cluster").arg(file),
    };
    command.args(["doctor", "--json", "--look"]);
    follow(&mut command, PATIENCE)
}

/// The line that a command prints, or that it prints none in time.
fn follow(command: &mut Command, patience: Duration) -> Result<Option<Report>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let said = child.stdout.take().context("the process that looks has no output")?;
    let line = Later::start(move || BufReader::new(said).lines().next());
    let line = match line.wait(Instant::now() + patience) {
        Some(line) => line,
        None => {
            end(&mut child, Duration::ZERO);
            let text =
                "nothing is known of it: a disk or file system of this machine hangs (dmesg)";
            let hangs = Finding::new("machine", "machine", Severity::Danger, text);
            return Ok(Some(Report::of(vec![hangs])));
        }
    };
    end(&mut child, END_PATIENCE);
    let line = line.transpose().context("can't read what was found")?;
    line.map(|line| Report::read(&line)).transpose()
}

/// Sees that it ends, now or when what it waits for comes.
fn end(child: &mut Child, patience: Duration) {
    let deadline = Instant::now() + patience;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            // It may be gone by now.
            let _ = child.kill();
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: Duration) -> Result<Option<Report>> {
        follow(Command::new("sh").args(["-c", script]), patience)
    }

    #[test]
    fn a_report_is_taken_though_its_process_does_not_end() {
        let began = Instant::now();
        let (long, short) = (Duration::from_secs(30), Duration::from_millis(100));
        let line = r#"{"findings":[{"check":"a","object":"b","severity":"warning","text":"c"}],"danger":0,"warnings":1}"#;
        let found = shell(&format!("echo '{line}'; exec sleep 60"), long).unwrap().unwrap();
        assert_eq!(found, Report::of(vec![Finding::new("a", "b", Severity::Warning, "c")]));
        assert_eq!(shell("exit 1", long).unwrap(), None);
        assert!(shell("echo no report", long).is_err());
        assert_eq!(shell("exec sleep 60", short).unwrap().unwrap().danger, 1);
        assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    }
}
