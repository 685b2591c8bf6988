//! Runs the mutants that `cargo mutants --list --json` names, all from one build.
//!
//! ```text
//! mutants weave LIST CRATE     writes the mutants of a list into the crate's sources (a copy of them), without those
//!                              that do not compile, and builds its tests; CRATE/mutants.json gets numbers and outcomes
//! mutants run CRATE SECONDS    runs the tests for each mutant that has no outcome; after SECONDS it stops
//! mutants apart CRATE          prints a pattern of those that cannot be chosen at run time, for cargo-mutants itself
//! mutants merge CRATE FILE...  takes their outcomes from its outcomes.json
//! mutants report CRATE REASONS prints the tables of docs/redo-mutants.md
//! mutants results LIST         prints a list of what cargo-mutants would do to functions that return `Step` if it knew
//!                              that this is a `Result`
//! ```

mod report;
mod run;
mod weave;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mutant as cargo-mutants lists it.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// From 1; 0 is the program as it is.
    pub id: u32,
    pub name: String,
    pub file: String,
    pub genre: String,
    pub replacement: String,
    /// Line and column, from 1.
    pub start: (usize, usize),
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["weave", list, root] => weave_all(Path::new(list), Path::new(root)),
        ["run", root, seconds] => run::run(Path::new(root), seconds.parse()?),
        ["apart", root] => {
            println!("{}", apart(Path::new(root))?);
            Ok(())
        }
        ["merge", root, ref paths @ ..] => report::merge(Path::new(root), paths),
        ["report", root, reasons] => {
            print!("{}", report::report(Path::new(root), Path::new(reasons))?);
            Ok(())
        }
        ["results", path] => {
            println!("{}", results(Path::new(path))?);
            Ok(())
        }
        _ => bail!("see the top of mutants/src/main.rs"),
    }
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

pub fn entries(root: &Path) -> Result<Vec<Value>> {
    let bytes = std::fs::read(root.join("mutants.json"))?;
    Ok(serde_json::from_slice::<Vec<Value>>(&bytes)?)
}

/// Names of mutants that need a build of their own, as one regular expression.
fn apart(root: &Path) -> Result<String> {
    let names = entries(root)?;
    let names = names.iter().filter(|entry| text(&entry["outcome"]) == "apart");
    let escape = |name: &str| {
        let special = |byte: char| !byte.is_alphanumeric() && !" /_:,<>='\"".contains(byte);
        name.chars()
            .flat_map(|c| special(c).then_some('\\').into_iter().chain([c]))
            .collect::<String>()
    };
    let names: Vec<_> = names.map(|entry| escape(text(&entry["name"]))).collect();
    Ok(format!("^({})$", names.join("|")))
}

fn results(path: &Path) -> Result<Value> {
    let mut values: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
    values.retain(|value| text(&value["replacement"]).starts_with("Step::new("));
    for value in &mut values {
        for field in ["replacement", "name"] {
            // `Step::new()` is made too, and is nothing of a `Result`.
            value[field] = text(&value[field]).replacen("Step::new(", "Ok(", 1).into();
        }
    }
    values.retain(|value| text(&value["replacement"]) != "Ok()");
    Ok(values.into())
}

pub fn save(root: &Path, entries: &[Value]) -> Result<()> {
    Ok(std::fs::write(root.join("mutants.json"), serde_json::to_vec_pretty(entries)?)?)
}

fn list(path: &Path) -> Result<Vec<Mutant>> {
    let values: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
    let number = |value: &Value| value.as_u64().context("a number").map(|number| number as usize);
    values
        .iter()
        .enumerate()
        .map(|(at, value)| {
            let start = &value["span"]["start"];
            // The crate's own path: behind the one of the package.
            let file = text(&value["file"]);
            let file = file.find("src/").map_or(file, |at| &file[at..]);
            Ok(Mutant {
                id: at as u32 + 1,
                name: text(&value["name"]).to_owned(),
                file: file.to_owned(),
                genre: text(&value["genre"]).to_owned(),
                replacement: text(&value["replacement"]).to_owned(),
                start: (number(&start["line"])?, number(&start["column"])?),
            })
        })
        .collect()
}

/// Leaves out mutants until the crate compiles: those are unviable, or not to be told apart at run time.
fn weave_all(list_path: &Path, root: &Path) -> Result<()> {
    let mutants = list(list_path)?;
    let files: BTreeSet<_> = mutants.iter().map(|mutant| mutant.file.clone()).collect();
    let mut sources = BTreeMap::new();
    for file in &files {
        sources.insert(file.clone(), std::fs::read_to_string(root.join(file))?);
    }
    let lib = root.join("src/lib.rs");
    let mut lib_text = std::fs::read_to_string(&lib)?;
    lib_text.push_str("\n#[path = \"mutant.rs\"]\npub(crate) mod mutant;\n");
    lib_text.insert_str(
        lib_text.find("\nmod ").context("a module")?,
        "\n#![allow(warnings, clippy::all)]\n",
    );
    std::fs::write(&lib, lib_text)?;
    std::fs::write(root.join("src/mutant.rs"), SWITCH)?;
    // An iterator of another type cannot be chosen at run time.
    let apart = |mutant: &Mutant| mutant.replacement.contains("::std::iter::");
    let mut dropped: BTreeMap<u32, String> = mutants
        .iter()
        .filter(|mutant| apart(mutant))
        .map(|mutant| (mutant.id, String::new()))
        .collect();
    let mut woven_ids = BTreeSet::new();
    loop {
        let mut places = BTreeMap::new();
        woven_ids.clear();
        for (file, source) in &sources {
            let wanted: Vec<_> = mutants
                .iter()
                .filter(|mutant| mutant.file == *file && !dropped.contains_key(&mutant.id))
                .cloned()
                .collect();
            let (woven, found) = weave::weave(source, &wanted).with_context(|| file.clone())?;
            woven_ids.extend(found.iter().map(|(_, id)| *id));
            woven_ids.extend(wanted.iter().filter(|m| m.genre == "MatchArm").map(|m| m.id));
            std::fs::write(root.join(file), &woven)?;
            places.insert(root.join(file), found);
        }
        let (failed, executables) = build(root, &places)?;
        println!("{} woven, {} do not compile", woven_ids.len(), failed.len());
        if failed.is_empty() {
            std::fs::write(root.join("executables"), executables.join("\n"))?;
            break;
        }
        dropped.extend(failed);
    }
    let entries: Vec<_> = mutants
        .iter()
        .map(|mutant| {
            let outcome = match dropped.get(&mutant.id).map(String::as_str) {
                None if woven_ids.contains(&mutant.id) => "",
                // E0015: a constant function, which cannot ask which mutant it is.
                None | Some("" | "E0015") => "apart",
                Some(_) => "unviable",
            };
            let error = dropped.get(&mutant.id);
            json!({ "id": mutant.id, "name": mutant.name, "file": mutant.file, "outcome": outcome, "error": error })
        })
        .collect();
    save(root, &entries)
}

const SWITCH: &str = r#"
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
static ACTIVE: AtomicU32 = AtomicU32::new(u32::MAX);
#[inline]
pub(crate) fn active() -> u32 {
    let number = ACTIVE.load(Relaxed);
    if number == u32::MAX { read() } else { number }
}
#[cold]
fn read() -> u32 {
    let number = std::env::var("MUTANT").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    ACTIVE.store(number, Relaxed);
    number
}
"#;

/// The mutants that errors point at, or the test programs.
fn build(
    root: &Path,
    places: &BTreeMap<PathBuf, weave::Places>,
) -> Result<(BTreeMap<u32, String>, Vec<String>)> {
    let mut command = Command::new("cargo");
    command.args(["test", "--no-run", "--lib", "--tests", "--message-format=json", "--quiet"]);
    let output = command.current_dir(root).output()?;
    let (mut failed, mut unknown, mut executables) = (BTreeMap::new(), Vec::new(), Vec::new());
    for line in output.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<Value>(line) else { continue };
        if let (Some(path), Some(true)) =
            (message["executable"].as_str(), message["profile"]["test"].as_bool())
        {
            executables.push(path.to_owned());
        }
        let message = &message["message"];
        if text(&message["level"]) != "error" {
            continue;
        }
        let spans = message["spans"].as_array().into_iter().flatten();
        let (primary, others): (Vec<_>, Vec<_>) =
            spans.partition(|span| span["is_primary"].as_bool() == Some(true));
        let hit = [primary, others]
            .iter()
            .map(|spans| blamed(root, spans, places))
            .find(|ids| !ids.is_empty());
        match hit {
            Some(ids) => {
                let code = text(&message["code"]["code"]);
                let code = if code.is_empty() { "syntax" } else { code };
                failed.extend(ids.into_iter().map(|id| (id, code.to_owned())));
            }
            None => unknown.push(text(&message["rendered"]).to_owned()),
        }
    }
    if failed.is_empty() && !output.status.success() {
        bail!("errors that no mutant explains:\n{}", unknown.join("\n"));
    }
    Ok((failed, executables))
}

fn blamed(
    root: &Path,
    spans: &[&Value],
    places: &BTreeMap<PathBuf, weave::Places>,
) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for span in spans {
        let Some(name) = span["file_name"].as_str() else { continue };
        let file = name.find("src/").map_or(name, |at| &name[at..]);
        let (start, end) = (span["byte_start"].as_u64(), span["byte_end"].as_u64());
        let (Some(start), Some(end)) = (start, end) else { continue };
        let (start, end) = (start as usize, end as usize);
        let in_file = places.get(&root.join(file)).into_iter().flatten();
        found.extend(
            in_file
                .filter(|(range, _)| range.start <= start && end <= range.end)
                .map(|(_, id)| *id),
        );
    }
    found
}
