//! Processes that hang for a while, and whether all is well afterwards.

use std::time::{Duration, Instant};

use postgres::Client;
use rustix::process::Signal;
use serde_json::Value;

use crate::probes::request;
use crate::{Cluster, signal};

/// A process that is stopped (`SIGSTOP`) until this is dropped.
pub struct Stopped {
    pid: u64,
}

impl Stopped {
    /// Stops it.
    pub fn stop(pid: u64) -> Stopped {
        signal(pid, Signal::STOP);
        Stopped { pid }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.pid, Signal::CONT);
    }
}

/// Waits until nothing is wrong any more; `wrong` says what is.
pub fn wait_until_right(patience: Duration, mut wrong: impl FnMut() -> Option<String>) -> Duration {
    let since = Instant::now();
    while let Some(what) = wrong() {
        assert!(since.elapsed() < patience, "still after {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    since.elapsed()
}

/// An LSN, as a number.
pub fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap_or_else(|| panic!("no LSN: {text}"));
    let parse = |text| u64::from_str_radix(text, 16).unwrap();
    parse(high) << 32 | parse(low)
}

/// The end of what is durable.
pub fn flushed(client: &mut Client) -> String {
    client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0)
}

fn array<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// What `status` says is wrong.
fn complaint(status: &Value) -> Option<String> {
    let stated = |row: &Value, field: &str| {
        let name = row["name"].as_str().or(row["branch"].as_str()).unwrap_or_default().to_owned();
        (!row[field].is_null()).then(|| format!("{name}: {field}: {}", row[field]))
    };
    for row in array(status, "processes").iter().chain(array(status, "computes")) {
        if row["state"] != "running" {
            return Some(format!("it does not run: {row}"));
        }
        if let Some(what) = stated(row, "failure") {
            return Some(what);
        }
    }
    for row in array(status, "branches") {
        for field in ["failure", "upload_failure", "compaction_failure", "unreadable_page"] {
            if let Some(what) = stated(row, field) {
                return Some(what);
            }
        }
        if row["bad_safekeepers"].as_object().is_some_and(|bad| !bad.is_empty()) {
            return stated(row, "bad_safekeepers");
        }
    }
    let failure = &status["branches_failure"];
    (!failure.is_null()).then(|| failure.to_string())
}

/// Waits until `status` has nothing to complain about.
pub fn wait_until_healthy(cluster: &Cluster, patience: Duration) -> Duration {
    wait_until_right(patience, || complaint(&cluster.status()))
}

/// Waits until each safekeeper's `field` of main is at least this, and so has the page server taken in.
pub fn wait_until_all_have(
    cluster: &Cluster,
    field: &str,
    least: &str,
    patience: Duration,
) -> Duration {
    let status = cluster.status();
    let main = array(&status, "branches").iter().find(|row| row["name"] == "main").unwrap();
    let timeline = &main["timeline_id"];
    let least = lsn(least);
    let reached = |value: &Value, field: &str| value[field].as_str().map(lsn) >= Some(least);
    wait_until_right(patience, || {
        for process in array(&status, "processes") {
            let (path, list, field) = match process["role"].as_str() {
                Some("safekeeper") => ("/v1/status", "timelines", field),
                Some("pageserver") => ("/v1/branches", "", "last_record_lsn"),
                _ => continue,
            };
            let address = process["http"].as_str().unwrap();
            let said = request("GET", address, path, Duration::from_secs(10));
            let said = said.and_then(|(_, text)| Ok(serde_json::from_str::<Value>(&text)?));
            let rows = said.map(|said| if list.is_empty() { said } else { said[list].clone() });
            let row = rows.map(|rows| {
                let rows = rows.as_array().cloned().unwrap_or_default();
                rows.into_iter().find(|row| row["timeline_id"] == *timeline)
            });
            match row {
                Ok(Some(row)) if reached(&row, field) => {}
                other => return Some(format!("{}: {field}: {other:?}", process["name"])),
            }
        }
        None
    })
}
