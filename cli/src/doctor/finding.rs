//! What was found, and how it is printed.

use std::borrow::Cow;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{out, table};

/// How much it matters. Those that matter most come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A promise is broken, or will be by what happens every day: a restart, a full disk, a date.
    Danger,
    /// A promise holds, and less stands behind it than there could.
    Warning,
    /// It was not looked at, or can't be seen from here.
    Unknown,
    /// It is as it should be.
    Ok,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Severity::Danger => "danger",
            Severity::Warning => "warning",
            Severity::Unknown => "unknown",
            Severity::Ok => "ok",
        }
    }

    /// Its colour on a terminal: an escape sequence (ECMA-48).
    fn colour(self) -> &'static str {
        match self {
            Severity::Danger => "\x1b[31m",
            Severity::Warning => "\x1b[33m",
            Severity::Unknown => "\x1b[36m",
            Severity::Ok => "\x1b[32m",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: Cow<'static, str>,
    /// What was looked at.
    pub object: String,
    /// How much it matters.
    pub severity: Severity,
    /// One line: what was found, and what to do.
    pub text: String,
}

/// Much of it is what services and files said, which are not let write to a terminal what they like.
fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

impl Finding {
    /// See the fields.
    pub fn new(check: &'static str, object: &str, severity: Severity, text: &str) -> Finding {
        let check = Cow::Borrowed(check);
        Finding { check, object: one_line(object), severity, text: one_line(text) }
    }
}

/// Everything that was found, what matters most first.
#[derive(Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Report {
    findings: Vec<Finding>,
    /// How many of them are dangers.
    pub danger: usize,
    warnings: usize,
}

impl Report {
    /// Of what the checks say, in their order.
    pub fn of(mut findings: Vec<Finding>) -> Report {
        findings.sort_by_key(|finding| finding.severity);
        let count = |severity| findings.iter().filter(|one| one.severity == severity).count();
        let (danger, warnings) = (count(Severity::Danger), count(Severity::Warning));
        Report { findings, danger, warnings }
    }

    /// One as it was printed as JSON.
    pub fn read(line: &str) -> Result<Report> {
        let read: Report = serde_json::from_str(line)?;
        Ok(Report::of(read.findings))
    }

    /// For people: a table, and how many.
    fn lines(&self, has_colours: bool) -> Vec<String> {
        let rows = Vec::from_iter(self.findings.iter().map(|finding| json!(finding)));
        let mut lines = table::lines(&["severity", "check", "object", "text"], &rows);
        if has_colours {
            for (line, finding) in lines.iter_mut().skip(1).zip(&self.findings) {
                // The severity is what the line begins with.
                let (word, rest) = line.split_at(finding.severity.word().len());
                *line = format!("{}{word}\x1b[0m{rest}", finding.severity.colour());
            }
        }
        let numbered = |count: usize, name: &str| match count {
            1 => format!("1 {name}"),
            _ => format!("{count} {name}s"),
        };
        let counted = [numbered(self.danger, "danger"), numbered(self.warnings, "warning")];
        lines.extend([String::new(), counted.join(", ")]);
        lines
    }

    /// Prints it.
    pub fn print(&self, as_json: bool, has_colours: bool) -> Result<()> {
        if as_json {
            return out::line(&serde_json::to_string(self)?);
        }
        self.lines(has_colours).iter().try_for_each(|line| out::line(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::of(vec![
            Finding::new("space", "a", Severity::Ok, "enough"),
            Finding::new("space", "b", Severity::Warning, "little"),
            Finding::new("mounts", "c", Severity::Unknown, "not looked at"),
            Finding::new("mounts", "d", Severity::Danger, "in \x1b[2Jmemory\nonly"),
        ])
    }

    #[test]
    fn what_matters_most_comes_first() {
        let expected = "\
SEVERITY  CHECK   OBJECT  TEXT
danger    mounts  d       in  [2Jmemory only
warning   space   b       little
unknown   mounts  c       not looked at
ok        space   a       enough

1 danger, 1 warning";
        assert_eq!(report().lines(false).join("\n"), expected);
        assert_eq!(
            report().lines(true)[1],
            "\x1b[31mdanger\x1b[0m    mounts  d       in  [2Jmemory only"
        );
        assert_eq!(Report::of(Vec::new()).lines(false).last().unwrap(), "0 dangers, 0 warnings");
    }

    #[test]
    fn the_document_counts_what_matters() {
        let line = serde_json::to_string(&report()).unwrap();
        assert_eq!(Report::read(&line).unwrap(), report());
        let document = serde_json::to_value(report()).unwrap();
        assert_eq!((&document["danger"], &document["warnings"]), (&json!(1), &json!(1)));
        let first = json!({"check": "mounts", "object": "d", "severity": "danger", "text": "in  [2Jmemory only"});
        assert_eq!(document["findings"][0], first);
    }
}
