//! What programs print where nobody looks at a terminal: text, without what colours it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Output};

use pgstrata_tests::{Cluster, programs};

const PROGRAMS: [&str; 5] =
    ["pgstrata", "safekeeper", "pageserver", "storage-broker", "compute-shim"];

fn assert_plain(what: &str, bytes: &[u8]) {
    let at = bytes.iter().position(|byte| *byte == 0x1b);
    let shown = at.map(|at| String::from_utf8_lossy(&bytes[at.saturating_sub(80)..]).into_owned());
    assert_eq!(shown, None, "{what}");
}

/// Runs a program, which is told that it has a terminal that knows colours, and has none.
fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(programs().join(program));
    command.args(arguments).env("TERM", "xterm-256color").env("COLORTERM", "truecolor");
    command.output().unwrap()
}

#[test]
fn what_is_printed_into_a_pipe_is_not_coloured() {
    for program in PROGRAMS {
        for (arguments, status) in [(&["--help"][..], 0), (&["--nonsense"], 2), (&["-h"], 0)] {
            let output = run(program, arguments);
            assert_eq!(output.status.code(), Some(status), "{program} {arguments:?}");
            let printed = [output.stdout, output.stderr].concat();
            assert!(!printed.is_empty(), "{program} {arguments:?}");
            assert_plain(&format!("{program} {arguments:?}"), &printed);
        }
    }
    let environment =
        [("TERM", "xterm-256color"), ("RUST_LOG", "debug"), ("PGSTRATA_LOG", "debug")];
    let cluster = Cluster::with(&["--zones", "a,b,b"], &environment);
    for arguments in [
        &["up"][..],
        &["status"],
        &["branch", "create", "dev"],
        &["branch", "create", "dev"],
        &["branch", "list"],
        &["wal", "verify"],
        &["layers"],
        &["up"],
        &["down"],
    ] {
        let output = cluster.try_cli(arguments);
        assert_plain(&format!("{arguments:?}"), &[output.stdout, output.stderr].concat());
    }
    for entry in fs::read_dir(cluster.dir().join("logs")).unwrap() {
        let path = entry.unwrap().path();
        assert_plain(&path.display().to_string(), &fs::read(&path).unwrap());
    }
}
