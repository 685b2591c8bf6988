//! The document: figures, and every mutant that survives, with its reason.

use crate::{entries, save, text};
use anyhow::{Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

/// Takes over outcomes of cargo-mutants itself, and tells where it disagrees with an outcome that is there already.
pub fn merge(root: &Path, paths: &[&str]) -> Result<()> {
    let mut all = entries(root)?;
    let (mut agreed, mut taken) = (0, 0);
    for path in paths {
        let outcomes: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        for outcome in outcomes["outcomes"].as_array().into_iter().flatten() {
            let name = text(&outcome["scenario"]["Mutant"]["name"]);
            let found = match text(&outcome["summary"]) {
                "CaughtMutant" => "caught",
                "MissedMutant" => "missed",
                "Timeout" => "timeout",
                "Unviable" => "unviable",
                _ => continue,
            };
            for entry in all.iter_mut().filter(|entry| text(&entry["name"]) == name) {
                let before = text(&entry["outcome"]);
                if before == "apart" || entry["alone"] == true {
                    entry["alone"] = true.into();
                    entry["outcome"] = found.into();
                    taken += 1;
                } else if before == found {
                    agreed += 1;
                } else {
                    println!("{name}: {before}, but alone {found}");
                }
            }
        }
    }
    println!("{taken} outcomes taken over, {agreed} others agree");
    save(root, &all)
}

/// A mutant without its line and column, which other changes of the file move.
fn without_position(name: &str) -> String {
    let name = name.find("src/").map_or(name, |at| &name[at + 4..]);
    let Some((file, rest)) = name.split_once(':') else { return name.to_owned() };
    let rest = rest.split_once(": ").map_or(rest, |(_, mutation)| mutation);
    format!("{file}: {rest}")
}

/// Reasons by mutant: each `#` line is a reason, for the mutants on the lines behind it.
fn reasons(path: &Path) -> Result<(Vec<String>, BTreeMap<String, usize>)> {
    let (mut reasons, mut by_mutant) = (Vec::new(), BTreeMap::new());
    for line in std::fs::read_to_string(path)?.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("# ") {
            Some(reason) => reasons.push(reason.to_owned()),
            None if reasons.is_empty() => bail!("{line} comes before any reason"),
            None => {
                by_mutant.insert(line.to_owned(), reasons.len() - 1);
            }
        }
    }
    Ok((reasons, by_mutant))
}

/// Caught, missed, timeouts, unviable.
type Figures = [usize; 4];

fn add(figures: &mut Figures, outcome: &str) -> Result<()> {
    let place =
        ["caught", "missed", "timeout", "unviable"].iter().position(|name| *name == outcome);
    match place {
        Some(place) => figures[place] += 1,
        None => bail!("some mutants have no outcome yet"),
    }
    Ok(())
}

fn rate([caught, missed, timeouts, _]: Figures) -> String {
    let viable = caught + missed + timeouts;
    if viable == 0 {
        return "-".to_owned();
    }
    // Down, so that 100 % means all.
    let permille = (caught + timeouts) * 1000 / viable;
    format!("{}.{} %", permille / 10, permille % 10)
}

fn row(out: &mut String, name: &str, figures: Figures) {
    let [caught, missed, timeouts, unviable] = figures;
    let all = figures.iter().sum::<usize>();
    let rate = rate(figures);
    let _ = writeln!(
        out,
        "| {name} | {all} | {unviable} | {caught} | {timeouts} | {missed} | {rate} |"
    );
}

/// The tables, for the document to end with. Fails if a mutant survives without a reason.
pub fn report(root: &Path, reasons_path: &Path) -> Result<String> {
    let all = entries(root)?;
    let (reasons, by_mutant) = reasons(reasons_path)?;
    let mut files: BTreeMap<&str, Figures> = BTreeMap::new();
    let mut total = Figures::default();
    let mut survivors: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let (mut unexplained, mut not_run) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for entry in &all {
        let outcome = text(&entry["outcome"]);
        let open = outcome == "apart" || outcome.is_empty();
        // Until it is run, a mutant is one that no test was seen to catch.
        let outcome = if open { "missed" } else { outcome };
        let file = text(&entry["file"]);
        add(files.entry(file.strip_prefix("src/").unwrap_or(file)).or_default(), outcome)?;
        add(&mut total, outcome)?;
        if outcome != "missed" {
            continue;
        }
        let name = without_position(text(&entry["name"]));
        match by_mutant.get(&name) {
            _ if open => not_run.push(text(&entry["name"]).to_owned()),
            Some(reason) => survivors.entry(*reason).or_default().push(name.clone()),
            None => unexplained.push(name.clone()),
        }
        seen.insert(name);
    }
    let mut out = String::new();
    out.push_str("| file | mutants | unviable | caught | timeouts | missed | rate |\n");
    out.push_str("|---|--:|--:|--:|--:|--:|--:|\n");
    for (file, figures) in files {
        row(&mut out, file, figures);
    }
    row(&mut out, "**all**", total);
    if !survivors.is_empty() {
        out.push_str("\nSurvivors:\n");
    }
    for (reason, names) in survivors {
        let _ = writeln!(out, "\n{}\n", reasons[reason]);
        for (at, name) in names.iter().enumerate() {
            // Several of one function may read alike.
            let count = names.iter().filter(|other| *other == name).count();
            if names[..at].contains(name) {
                continue;
            }
            let times = if count > 1 { format!(" ({count} times)") } else { String::new() };
            let _ = writeln!(out, "* `{name}`{times}");
        }
    }
    if !not_run.is_empty() {
        out.push_str("\nNot run yet, and counted as missed:\n\n");
        not_run.iter().for_each(|name| out.push_str(&format!("* `{name}`\n")));
    }
    if !seen.is_empty() {
        for name in by_mutant.keys().filter(|name| !seen.contains(*name)) {
            eprintln!("a reason for what does not survive: {name}");
        }
    }
    if !unexplained.is_empty() {
        bail!("survivors without a reason:\n{}", unexplained.join("\n"));
    }
    Ok(out)
}
