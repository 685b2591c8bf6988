//! What the HTTP interfaces' own documents say of them is what they do: schemathesis asks each service of a running
//! cluster for its document, makes requests of it, good and bad, and compares the answers.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata_tests::{Cluster, thorough};
use serde_json::json;

/// What is logged of an answer that the document does not have.
const UNSAID: &str = "which its document does not say";
/// Branches that requests may be about; the page server is asked to delete and rename them too.
const BRANCHES: usize = 12;

fn schemathesis() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let installed = root.join(".cache/venv/bin/schemathesis");
    assert!(
        installed.is_file(),
        "{} is not there: scripts/install-deps --tests",
        installed.display()
    );
    installed
}

/// What requests may be about, as the hooks want it.
fn known(cluster: &Cluster) -> String {
    let rows = cluster.json(&["branch", "list"]);
    let rows = rows.as_array().unwrap();
    let texts = |field: &str| -> Vec<String> {
        rows.iter().filter_map(|row| row[field].as_str().map(str::to_owned)).collect()
    };
    // What every branch has: another one would be waited for where it is not yet. None has more than 4 GiB of WAL.
    let low = |lsn: &String| u32::from_str_radix(lsn.trim_start_matches("0/"), 16).unwrap();
    let least = texts("last_record_lsn").into_iter().min_by_key(low).unwrap();
    let lsns = ["0/0", "0/1", "0/1000000", &least];
    let (names, timelines, tenants) = (texts("name"), texts("timeline_id"), texts("tenant_id"));
    json!({ "names": names, "timelines": timelines, "tenants": tenants, "lsns": lsns }).to_string()
}

/// 503 and 507 are said and meant; 500 is said too, and nothing that anybody can ask for should end so.
const CONFIGURATION: &str = r#"
color = false
request-timeout = 75
suppress-health-check = ["all"]
continue-on-failure = true
warnings = false

[cache]
enabled = false

[output.truncation]
enabled = false

[checks]
enabled = false
not_a_server_error = { enabled = true, expected-statuses = ["2xx", "4xx", 503, 507] }
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_headers_conformance.enabled = true
response_schema_conformance = { enabled = true, validate-formats = true }
unsupported_method.enabled = true
allow_header_conformance.enabled = true

[generation]
database = "none"
"#;

/// Asks one interface for about so long. Returns what schemathesis said, if it has anything against it.
fn ask(address: &str, known: &str, patience: Duration, directory: &Path) -> Option<String> {
    let seconds = patience.as_secs().to_string();
    let url = format!("http://{address}/v1/openapi.json");
    let log = directory.join(format!("{}.log", address.replace(':', "-")));
    let mut child = Command::new(schemathesis())
        .args(["run", &url, "--phases", "examples,coverage,fuzzing", "--max-time", &seconds])
        .env("SCHEMATHESIS_HOOKS", "openapi_hooks")
        .env("PYTHONPATH", env!("CARGO_MANIFEST_DIR"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PGSTRATA_KNOWN", known)
        .current_dir(directory)
        .stdout(fs::File::create(&log).unwrap())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    // It may be in the middle of a request that waits.
    let deadline = Instant::now() + patience + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            break child.wait().unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let text = fs::read_to_string(&log).unwrap();
    (!status.success()).then(|| format!("{address}: {status}\n{text}"))
}

#[test]
fn what_is_served_is_what_the_documents_say() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client.batch_execute("create table t as select generate_series(1, 1000) n").unwrap();
    for at in 0..BRANCHES {
        cluster.cli(&["branch", "create", &format!("branch-{at}")]);
        client.batch_execute("insert into t values (0)").unwrap();
    }
    cluster.cli(&["branch", "create", "grandchild", "--from", "branch-0"]);
    let known = known(&cluster);
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("schemathesis.toml"), CONFIGURATION).unwrap();
    let status = cluster.status();
    let processes = status["processes"].as_array().unwrap();
    let http = |role: &str| {
        let found = processes.iter().find(|process| process["role"] == role).unwrap();
        found["http"].as_str().unwrap().to_owned()
    };
    let scale = if thorough() { 20 } else { 1 };
    let seconds = |seconds: u64| Duration::from_secs(seconds * scale);
    let asked = [
        ("storage-broker", seconds(8)),
        ("safekeeper", seconds(4)),
        ("compute", seconds(4)),
        ("pageserver", seconds(25)),
    ];
    // The page server takes longest, and the others are asked meanwhile.
    let complaints: Vec<_> = std::thread::scope(|scope| {
        let ask = |(role, patience): (&str, Duration)| {
            ask(&http(role), &known, patience, directory.path())
        };
        let pageserver = scope.spawn(move || ask(asked[3]));
        let others: Vec<_> = asked[..3].iter().filter_map(|asked| ask(*asked)).collect();
        others.into_iter().chain(pageserver.join().unwrap()).collect()
    });
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    // Everything is well afterwards.
    for (role, _) in asked {
        let url = format!("http://{}/readyz", http(role));
        let answer = Command::new("curl").args(["-sS", "--max-time", "10", &url]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer.stdout), "ready\n", "{role}");
    }
    client.batch_execute("insert into t values (0)").unwrap();
    for entry in fs::read_dir(cluster.dir().join("logs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let bad = text.lines().find(|line| line.contains(UNSAID) || line.contains("panicked"));
        assert_eq!(bad, None, "{}", path.display());
    }
}
