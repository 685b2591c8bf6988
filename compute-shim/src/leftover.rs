//! A `postgres` that outlived whoever started it, and still has the port and the directory.
//!
//! The kernel ends a server with its shim. This is for those that it was not asked to end: of earlier versions, and where
//! the request is not honoured.

use std::fs::{self, OpenOptions};
use std::io::{Read, Take};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};

use crate::plain_file::plain_file;

/// Bytes of `postmaster.pid` in which its first line is.
const FIRST_LINE_LIMIT: u64 = 64;
/// How long a killed server may take to be gone: its memory is freed meanwhile.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

fn noted(data: &Path) -> Option<Pid> {
    let file = plain_file(&data.join("postmaster.pid"), OpenOptions::new().read(true)).ok()?;
    let mut text = String::new();
    Take::read_to_string(&mut file.take(FIRST_LINE_LIMIT), &mut text).ok()?;
    // A single-user server notes itself with a minus.
    Pid::from_raw(text.lines().next()?.trim().parse::<i32>().ok()?.checked_abs()?)
}

/// Directory of a process in `/proc`.
fn process_directory(pid: Pid) -> PathBuf {
    Path::new("/proc").join(pid.as_raw_nonzero().to_string())
}

/// Whether a process is a server of this very directory, and of its owner: a number in a file proves nothing, and who can
/// write that file must not choose whom we end.
fn is_server_of(pid: Pid, data: &Path) -> bool {
    let process = process_directory(pid);
    let is_postgres = fs::read_link(process.join("exe")).is_ok_and(|program| {
        // What was upgraded meanwhile has " (deleted)" after its name.
        program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("postgres"))
    });
    let is_there = || {
        let (own, of_process) =
            (fs::symlink_metadata(data).ok()?, fs::metadata(process.join("cwd")).ok()?);
        let same = (own.dev(), own.ino()) == (of_process.dev(), of_process.ino());
        Some(own.is_dir() && same && user_of(&process)? == own.uid())
    };
    is_postgres && is_there().unwrap_or(false)
}

/// The user that a process runs as.
fn user_of(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Whether a process has ended, all of its threads included.
fn is_gone(pid: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(process_directory(pid).join("stat")) else { return true };
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| state.starts_with(['Z', 'X']))
}

/// Ends the server of a data directory that somebody else started, at once. Returns whether there was one. The caller
/// holds the right to the directory, so that whose it was is no more.
pub fn end(data: &Path) -> Result<bool> {
    let Some(pid) = noted(data).filter(|pid| is_server_of(*pid, data)) else { return Ok(false) };
    // Its group is its processes, if it leads one; they end with it in any case.
    let leads = getpgid(Some(pid)).is_ok_and(|group| group == pid);
    // The only failure is that it is gone already.
    let _ = if leads { kill_process_group(pid, Signal::KILL) } else { Ok(()) };
    let _ = kill_process(pid, Signal::KILL);
    let deadline = Instant::now() + KILL_PATIENCE;
    while !is_gone(pid) {
        ensure!(
            Instant::now() < deadline,
            "a server left over in {} (process {}) was killed, and has not ended in {KILL_PATIENCE:?}",
            data.display(),
            pid.as_raw_nonzero()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::process::Command;

    use super::*;

    #[test]
    fn a_server_is_ended_if_it_is_one_of_this_directory() {
        let place = tempfile::tempdir().unwrap();
        let [data, elsewhere] = ["data", "elsewhere"].map(|name| place.path().join(name));
        fs::create_dir(&data).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        assert!(!end(&data).unwrap());
        let [server, other] = ["postgres", "other"].map(|name| place.path().join(name));
        for program in [&server, &other] {
            fs::copy("/bin/sleep", program).unwrap();
        }
        for (program, directory, is_ours) in
            [(&server, &data, true), (&server, &elsewhere, false), (&other, &data, false)]
        {
            let mut child = Command::new(program).arg("60").current_dir(directory).spawn().unwrap();
            fs::write(data.join("postmaster.pid"), format!("{}\n/x\n", child.id())).unwrap();
            assert_eq!(end(&data).unwrap(), is_ours);
            assert_eq!(child.try_wait().unwrap().is_some(), is_ours);
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
