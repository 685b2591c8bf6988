//! Runs the tests once for each mutant.

use crate::{entries, save, text};
use anyhow::{Result, bail};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What one test program may take at least, and how many times what it takes without a mutant.
const LEAST: Duration = Duration::from_secs(5);
const TIMES: u32 = 10;

#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    Passed,
    Failed,
    TimedOut,
}

/// Runs those without an outcome, until the time is over.
pub fn run(root: &Path, seconds: u64) -> Result<()> {
    let executables = std::fs::read_to_string(root.join("executables"))?;
    let mut programs = Vec::new();
    // A slow program that is not worth its time while tests are being written.
    let left_out = std::env::var("LEAVE_OUT").ok();
    let wanted =
        |path: &&str| left_out.as_ref().is_none_or(|left_out| !path.contains(left_out.as_str()));
    for path in executables.lines().filter(wanted) {
        let start = Instant::now();
        if one(root, path, 0, Duration::from_secs(120))? != Outcome::Passed {
            bail!("{path} fails without a mutant");
        }
        programs.push((start.elapsed(), path));
    }
    if programs.is_empty() {
        bail!("there are no test programs");
    }
    programs.sort_unstable();
    for (time, path) in &programs {
        println!("{} ms {path}", time.as_millis());
    }
    let (start, mut ran) = (Instant::now(), 0);
    let mut all = entries(root)?;
    for entry in &mut all {
        if !text(&entry["outcome"]).is_empty() || start.elapsed() > Duration::from_secs(seconds) {
            continue;
        }
        let id = entry["id"].as_u64().unwrap_or(0) as u32;
        let mut outcome = "missed";
        for (time, path) in &programs {
            match one(root, path, id, LEAST.max(*time * TIMES))? {
                Outcome::Passed => continue,
                Outcome::Failed => outcome = "caught",
                Outcome::TimedOut => outcome = "timeout",
            }
            let name = Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned());
            entry["by"] = name.unwrap_or_default().into();
            break;
        }
        entry["outcome"] = outcome.into();
        ran += 1;
    }
    save(root, &all)?;
    let count =
        |outcome: &str| all.iter().filter(|entry| text(&entry["outcome"]) == outcome).count();
    println!(
        "{ran} ran in {} s; of all: {} caught, {} missed, {} timeouts, {} unviable, {} open",
        start.elapsed().as_secs(),
        count("caught"),
        count("missed"),
        count("timeout"),
        count("unviable"),
        count("")
    );
    Ok(())
}

fn one(root: &Path, program: &str, id: u32, limit: Duration) -> Result<Outcome> {
    // A mutant may ask for any amount of memory.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 4000000; exec \"$0\" --test-threads=1", program]);
    command
        .env("MUTANT", id.to_string())
        .env("PROPTEST_MAX_SHRINK_ITERS", "0")
        .env("RUST_BACKTRACE", "0");
    command.current_dir(root).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.process_group(0).spawn()?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(if status.success() { Outcome::Passed } else { Outcome::Failed });
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(Outcome::TimedOut);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
